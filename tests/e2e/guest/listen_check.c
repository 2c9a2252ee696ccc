// SPDX-License-Identifier: BSD-3-Clause
/*
 * listen_check PORT PORT6 - what a TCP server may rely on; the client is on the other side of the device (natively: anywhere).
 *
 * Prints "port N" once it listens on ADDR_ANY:PORT (0: any). The client then opens connections in this order, each of which sends one line:
 *   1 "hello\n"    the server answers with "<its peer's port>\n" and closes
 *   2 "rst\n"      the server reads one byte less than was sent and closes: the client must see a reset
 *   3 "half\n"     then EOF; the server answers "eof\n" after it
 *   4 "flags\n"    the server answers "ok\n"
 *   5 "dead\n"     then a reset, at once
 *   6 "stay\n"     stays open: from here on the server says in it, a word a line, what the client shall do (drive_listener() in clients.py)
 * Before them, a client of its own, over 127.0.0.1, must be served by the same listener.
 */
#include "check.h"
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>

enum { WAITERS = 8, WAKES = 16, SHARED = 32 };

static int listener, port, port6, stay;

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

/* the last claim with this listener: it does not listen any more */
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

/* the client's turn: what it does at this word is in clients.py */
static void tell(const char *word)
{
	send_all(stay, word, strlen(word));
	send_all(stay, "\n", 1);
}

static void serve_ok(int fd, const char *line)
{
	char buf[32];

	MUST(fd >= 0);
	read_line(fd, buf, line);
	send_all(fd, "ok\n", 3);
	MUST(close(fd) == 0);
}

static void no_more_connections_wait_than_the_backlog_lets(void)
{
	char line[8] = "";
	int n;

	MUST(listen(listener, 1) == 0);		/* again: a new backlog */
	tell("backlog");			/* eight try, one after the other, and nobody accepts */
	for (size_t i = 0; i < sizeof(line) - 1 && !strchr(line, '\n'); i++)
		recv_exactly(stay, line + i, 1);
	n = atoi(line);
	MUST(n >= 1 && n <= 4);			/* two here, and so many on the other side of a device */
	while (n) {
		char buf[7];
		int fd;

		MUST(wait_for(listener, POLLIN) & POLLIN);
		fd = accept(listener, NULL, NULL);
		MUST(fd >= 0);
		if (recv(fd, buf, sizeof(buf), MSG_WAITALL) == sizeof(buf)) {	/* not one that the client gave up */
			MUST(memcmp(buf, "queued\n", sizeof(buf)) == 0);
			send_all(fd, "ok\n", 3);
			n--;
		}
		close(fd);
	}
	MUST(listen(listener, 16) == 0);
}

static void accept_and_socket_at_the_limit_of_descriptors_are_emfile_and_lose_nothing(void)
{
	struct rlimit old, limit;
	int next = dup(0);

	tell("limit");
	MUST(wait_for(listener, POLLIN) & POLLIN);
	MUST(next >= 0 && close(next) == 0);
	MUST(getrlimit(RLIMIT_NOFILE, &old) == 0);
	limit = (struct rlimit){ .rlim_cur = next, .rlim_max = old.rlim_max };
	MUST(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	ERRNO(accept(listener, NULL, NULL), EMFILE);
	ERRNO(socket(AF_INET, SOCK_STREAM, 0), EMFILE);
	MUST(setrlimit(RLIMIT_NOFILE, &old) == 0);
	MUST(wait_for(listener, POLLIN) & POLLIN);
	serve_ok(accept(listener, NULL, NULL), "limit\n");
}

struct waiter {
	volatile pid_t tid;
	int epoll;		/* -1: in accept() */
};

static void *wait_and_serve(void *arg)
{
	struct waiter *w = arg;

	w->tid = gettid();
	for (;;) {
		struct epoll_event e;
		int fd;

		if (w->epoll >= 0 && epoll_wait(w->epoll, &e, 1, -1) != 1)
			continue;
		fd = accept(listener, NULL, NULL);
		if (fd >= 0 && send(fd, "x", 1, MSG_NOSIGNAL) == 1)
			close(fd);
	}
	return NULL;
}

/* how often the threads have gone to sleep so far; once all of them sleep */
static long sleeps(const struct waiter *waiters)
{
	long sum = 0;

	for (int i = 0; i < WAITERS; i++) {
		char path[64], line[128], state = 0;
		long n = -1;

		while (!waiters[i].tid)
			sched_yield();
		snprintf(path, sizeof(path), "/proc/self/task/%d/status", waiters[i].tid);
		while (state != 'S' || n < 0) {
			FILE *f = fopen(path, "r");

			MUST(f);
			while (fgets(line, sizeof(line), f)) {
				sscanf(line, "State: %c", &state);
				sscanf(line, "voluntary_ctxt_switches: %ld", &n);
			}
			fclose(f);
		}
		sum += n;
	}
	return sum;
}

/* connections come one at a time: of those who wait one at a time gets up */
static void check_wakes(bool epoll)
{
	static struct waiter waiters[WAITERS];
	char done[5];
	long before;

	MUST(!epoll || fcntl(listener, F_SETFL, O_NONBLOCK) == 0);
	for (int i = 0; i < WAITERS; i++) {
		struct epoll_event e = { .events = EPOLLIN | EPOLLEXCLUSIVE };
		pthread_t thread;

		waiters[i].epoll = epoll ? epoll_create1(0) : -1;
		MUST(!epoll || epoll_ctl(waiters[i].epoll, EPOLL_CTL_ADD, listener, &e) == 0);
		MUST(pthread_create(&thread, NULL, wait_and_serve, &waiters[i]) == 0);
	}
	before = sleeps(waiters);
	tell("wake");
	recv_exactly(stay, done, sizeof(done));
	MUST(sleeps(waiters) - before < 2 * WAKES);	/* a herd would be WAITERS times WAKES */
	MUST(fcntl(listener, F_SETFL, 0) == 0);
}

static void a_connection_wakes_one_of_those_who_wait_in_accept(void)
{
	check_wakes(false);
}

static void a_connection_wakes_one_of_those_who_wait_exclusively_in_epoll(void)
{
	check_wakes(true);
}

/* what bind() says to a new socket with these options; v6only: -1 for an IPv4 one */
static int bind_new(int number, bool reuseaddr, bool reuseport, int v6only)
{
	char text[8];
	struct addr a;
	int fd, error;

	snprintf(text, sizeof(text), "%d", number);
	a = address(v6only < 0 ? "0.0.0.0" : "::", text);
	fd = socket(a.ss.ss_family, SOCK_STREAM, 0);
	MUST(fd >= 0);
	MUST(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){ reuseaddr }, sizeof(int)) == 0);
	MUST(setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &(int){ reuseport }, sizeof(int)) == 0);
	MUST(v6only < 0 || setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &v6only, sizeof(int)) == 0);
	if (bind(fd, (void *)&a.ss, a.len) == 0)
		return fd;
	error = errno;
	close(fd);
	errno = error;
	return -1;
}

static int listen_new(int number, bool reuseport, int v6only)
{
	int fd = bind_new(number, true, reuseport, v6only);

	if (fd < 0 || listen(fd, 16))
		fail("no listener on port %d: %s", number, strerror(errno));
	return fd;
}

/* the old listener is gone and a connection of its is left */
static void a_port_with_a_connection_is_bound_by_who_says_reuseaddr_alone(void)
{
	int fd;

	ERRNO(bind_new(port, false, false, -1), EADDRINUSE);
	ERRNO(bind_new(port, false, true, -1), EADDRINUSE);
	fd = listen_new(port, false, -1);
	ERRNO(bind_new(port, true, false, -1), EADDRINUSE);		/* it shares its port with no other listener */
	ERRNO(bind_new(port, true, true, -1), EADDRINUSE);
	tell("again");
	serve_ok(accept(fd, NULL, NULL), "again\n");
}

static void listeners_with_reuseport_share_a_port_and_what_comes(void)
{
	struct pollfd p[2] = { { .fd = listen_new(port, true, -1), .events = POLLIN }, { .fd = listen_new(port, true, -1), .events = POLLIN } };
	int served[2] = { 0, 0 };

	ERRNO(bind_new(port, true, false, -1), EADDRINUSE);
	tell("shared");
	while (served[0] + served[1] < SHARED) {
		MUST(poll(p, 2, CHECK_SECONDS * 1000) > 0);
		for (int i = 0; i < 2; i++) {
			if (!(p[i].revents & POLLIN))
				continue;
			serve_ok(accept(p[i].fd, NULL, NULL), "shared\n");
			served[i]++;
		}
	}
	MUST(served[0] && served[1]);		/* that one gets none of them by chance: once in two thousand million runs */
}

static void serve_six(int l, bool mapped)
{
	struct sockaddr_in6 peer = { 0 }, own = { 0 };
	socklen_t len = sizeof(peer);
	int fd = accept(l, (void *)&peer, &len);

	MUST(fd >= 0);
	SAME(len, sizeof(peer));
	SAME(peer.sin6_family, AF_INET6);
	SAME(IN6_IS_ADDR_V4MAPPED(&peer.sin6_addr), mapped);
	MUST(getsockname(fd, (void *)&own, &len) == 0);
	SAME(own.sin6_family, AF_INET6);
	SAME(IN6_IS_ADDR_V4MAPPED(&own.sin6_addr), mapped);
	SAME(ntohs(own.sin6_port), port6);
	serve_ok(fd, "six\n");
}

static void a_listener_of_both_families_shows_ipv4_clients_mapped(void)
{
	int l = listen_new(port6, false, 0);

	ERRNO(bind_new(port6, true, false, -1), EADDRINUSE);	/* it has the port of IPv4, too */
	tell("both");
	serve_six(l, true);
	serve_six(l, false);
}

static void v6only_leaves_ipv4_to_another_listener(void)
{
	int six = listen_new(port6, false, 1), four;
	char done[5];

	tell("refused");
	recv_exactly(stay, done, sizeof(done));
	four = listen_new(port6, false, -1);
	tell("both");
	serve_ok(accept(four, NULL, NULL), "six\n");
	serve_six(six, false);
	SAME(poll(&(struct pollfd){ .fd = four, .events = POLLIN }, 1, 0), 0);
}

int main(int argc, char **argv)
{
	struct addr from;

	if (argc != 3) {
		fprintf(stderr, "usage: %s PORT PORT6\n", argv[0]);
		return 2;
	}
	make_listener(argv[1]);
	port6 = atoi(argv[2]);
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
	stay = accept_one(&from);
	read_line(stay, (char[8]){ 0 }, "stay\n");
	C(no_more_connections_wait_than_the_backlog_lets);
	C(accept_and_socket_at_the_limit_of_descriptors_are_emfile_and_lose_nothing);
	C(a_connection_wakes_one_of_those_who_wait_in_accept);
	C(a_connection_wakes_one_of_those_who_wait_exclusively_in_epoll);
	C(shutting_a_listener_down_wakes_a_blocked_accept_with_einval);
	close(listener);
	C(a_port_with_a_connection_is_bound_by_who_says_reuseaddr_alone);
	C(listeners_with_reuseport_share_a_port_and_what_comes);
	C(a_listener_of_both_families_shows_ipv4_clients_mapped);
	C(v6only_leaves_ipv4_to_another_listener);
	return finish_checks();
}
