// SPDX-License-Identifier: BSD-3-Clause
/*
 * listen_check PORT - what a TCP server may rely on; the client is on the other side of the device (natively: anywhere).
 *
 * Prints "port N" once it listens on ADDR_ANY:PORT (0: any). The client then opens connections in this order, each of which sends one line:
 *   1 "hello\n"    the server answers with "<its peer's port>\n" and closes
 *   2 "rst\n"      the server reads one byte less than was sent and closes: the client must see a reset
 *   3 "half\n"     then EOF; the server answers "eof\n" after it
 *   4 "flags\n"    the server answers "ok\n"
 *   5 "dead\n"     then a reset, at once
 * Before them, a client of its own, over 127.0.0.1, must be served by the same listener.
 */
#include "check.h"
#include <pthread.h>
#include <sched.h>

static int listener, port;

static const struct { int level, name, value; } inherited[] = {
	{ IPPROTO_TCP, TCP_NODELAY, 1 }, { SOL_SOCKET, SO_KEEPALIVE, 1 }, { IPPROTO_TCP, TCP_KEEPIDLE, 77 }, { IPPROTO_IP, IP_TOS, 0x10 },
	{ SOL_SOCKET, SO_OOBINLINE, 1 },
};

static void make_listener(const char *arg)
{
	struct addr a = address("0.0.0.0", arg);
	int one = 1;

	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	MUST(listener >= 0);
	MUST(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0);
	for (size_t i = 0; i < sizeof(inherited) / sizeof(*inherited); i++)
		MUST(setsockopt(listener, inherited[i].level, inherited[i].name, &inherited[i].value, sizeof(int)) == 0);
	MUST(bind(listener, (void *)&a.ss, a.len) == 0);
	a.len = sizeof(a.ss);
	MUST(getsockname(listener, (void *)&a.ss, &a.len) == 0);
	port = port_of(&a);
	MUST(port != 0);
	MUST(listen(listener, 16) == 0);
}

static void a_listener_says_so_and_accept_on_an_empty_queue_is_eagain(void)
{
	int v = 0;
	socklen_t len = sizeof(v);

	MUST(getsockopt(listener, SOL_SOCKET, SO_ACCEPTCONN, &v, &len) == 0);
	SAME(v, 1);
	MUST(fcntl(listener, F_SETFL, O_NONBLOCK) == 0);
	ERRNO(accept4(listener, NULL, NULL, 0), EAGAIN);
	MUST(fcntl(listener, F_SETFL, 0) == 0);
}

static void the_port_is_taken_inside_the_guest_too(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons(port) };

	ERRNO(bind(fd, (void *)&in, sizeof(in)), EADDRINUSE);
}

static void the_listener_is_reachable_over_guest_loopback(void)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM, 0), conn;
	struct addr a = { .len = sizeof(a.ss) };
	char c = 'l';

	MUST(connect(fd, (void *)&in, sizeof(in)) == 0);
	MUST(wait_for(listener, POLLIN) & POLLIN);
	conn = accept4(listener, (void *)&a.ss, &a.len, SOCK_CLOEXEC);
	MUST(conn >= 0);
	SAME(((struct sockaddr_in *)&a.ss)->sin_addr.s_addr, htonl(INADDR_LOOPBACK));
	SAME(write(fd, &c, 1), 1);
	c = 0;
	SAME(read(conn, &c, 1), 1);
	SAME(c, 'l');
}

static int accept_one(struct addr *from)
{
	int fd;

	from->len = sizeof(from->ss);
	MUST(wait_for(listener, POLLIN) & POLLIN);
	fd = accept4(listener, (void *)&from->ss, &from->len, SOCK_NONBLOCK);
	MUST(fd >= 0);
	MUST(fcntl(fd, F_GETFL) & O_NONBLOCK);
	MUST(fcntl(fd, F_SETFL, 0) == 0);
	return fd;
}

static void read_line(int fd, char *buf, const char *want)
{
	recv_exactly(fd, buf, strlen(want));
	MUST(memcmp(buf, want, strlen(want)) == 0);
}

static void an_accepted_connection_has_names_and_talks(void)
{
	struct addr from, a = { .len = sizeof(a.ss) };
	char buf[32];
	int fd = accept_one(&from);

	MUST(getpeername(fd, (void *)&a.ss, &a.len) == 0);
	SAME(a.len, from.len);
	MUST(memcmp(&a.ss, &from.ss, 8) == 0);
	a.len = sizeof(a.ss);
	MUST(getsockname(fd, (void *)&a.ss, &a.len) == 0);
	SAME(port_of(&a), port);
	read_line(fd, buf, "hello\n");
	send_all(fd, buf, snprintf(buf, sizeof(buf), "%d\n", port_of(&from)));
	MUST(close(fd) == 0);
}

static void closing_with_unread_data_resets(void)
{
	struct addr from;
	char buf[32];
	int fd = accept_one(&from);

	MUST(wait_for(fd, POLLIN) & POLLIN);
	SAME(recv(fd, buf, 4, MSG_PEEK | MSG_WAITALL), 4);
	SAME(recv(fd, buf, 3, 0), 3);
	MUST(close(fd) == 0);
}

static void an_accepted_connection_half_closes(void)
{
	struct addr from;
	char buf[32];
	int fd = accept_one(&from);

	read_line(fd, buf, "half\n");
	SAME(recv(fd, buf, 1, 0), 0);
	send_all(fd, "eof\n", 4);
	MUST(close(fd) == 0);
}

static void accepted_sockets_have_their_listeners_options_and_not_its_file_flags(void)
{
	char buf[8];
	int fd;

	MUST(wait_for(listener, POLLIN) & POLLIN);
	MUST(fcntl(listener, F_SETFL, O_NONBLOCK) == 0);
	MUST(fcntl(listener, F_GETFD) & FD_CLOEXEC);
	fd = accept(listener, NULL, NULL);
	MUST(fcntl(listener, F_SETFL, 0) == 0);
	MUST(fd >= 0);
	SAME(fcntl(fd, F_GETFL) & O_NONBLOCK, 0);
	SAME(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
	for (size_t i = 0; i < sizeof(inherited) / sizeof(*inherited); i++) {
		socklen_t len = sizeof(int);
		int v = -1;

		MUST(getsockopt(fd, inherited[i].level, inherited[i].name, &v, &len) == 0);
		SAME(v, inherited[i].value);
	}
	read_line(fd, buf, "flags\n");
	send_all(fd, "ok\n", 3);
	MUST(close(fd) == 0);
}

static void a_connection_that_is_reset_early_is_accepted_and_says_so(void)
{
	struct addr from;
	char c;
	int fd = accept_one(&from);
	ssize_t n;

	while ((n = recv(fd, &c, 1, 0)) == 1)
		;
	SAME(n, -1);
	SAME(errno, ECONNRESET);
}

static volatile pid_t blocked;

static void *blocked_accept(void *arg)
{
	blocked = gettid();
	*(int *)arg = accept(listener, NULL, NULL) < 0 ? errno : 0;
	return NULL;
}

/* the last claim: nobody listens any more */
static void shutting_a_listener_down_wakes_a_blocked_accept_with_einval(void)
{
	char path[64], state = 0;
	pthread_t thread;
	int error = -1;

	MUST(pthread_create(&thread, NULL, blocked_accept, &error) == 0);
	while (!blocked)
		sched_yield();
	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", blocked);
	while (state != 'S') {			/* it sleeps, and there is nothing else to sleep for */
		FILE *f = fopen(path, "r");

		MUST(f && fscanf(f, "%*d (%*[^)]) %c", &state) == 1);
		fclose(f);
	}
	MUST(shutdown(listener, SHUT_RDWR) == 0);
	MUST(pthread_join(thread, NULL) == 0);
	SAME(error, EINVAL);
}

int main(int argc, char **argv)
{
	if (argc != 2) {
		fprintf(stderr, "usage: %s PORT\n", argv[0]);
		return 2;
	}
	make_listener(argv[1]);
	C(a_listener_says_so_and_accept_on_an_empty_queue_is_eagain);
	C(the_port_is_taken_inside_the_guest_too);
	C(the_listener_is_reachable_over_guest_loopback);
	printf("port %d\n", port);
	fflush(stdout);
	C(an_accepted_connection_has_names_and_talks);
	C(closing_with_unread_data_resets);
	C(an_accepted_connection_half_closes);
	C(accepted_sockets_have_their_listeners_options_and_not_its_file_flags);
	C(a_connection_that_is_reset_early_is_accepted_and_says_so);
	C(shutting_a_listener_down_wakes_a_blocked_accept_with_einval);
	return finish_checks();
}
