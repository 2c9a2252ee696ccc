// SPDX-License-Identifier: BSD-3-Clause
/*
 * gone_check PEER PORT STUCK [back] - what is left when the device goes away.
 *
 * Opens connections to tests/e2e/peer.py and blocks on them in every way there is, prints "ready", and expects that whoever runs it
 * then takes the device away: unplugs it, ends the back-end (the watchdog needs three periods of virtio_socket.ping_secs), suspends the
 * guest. STUCK is the peer's port where connects can be made to hang. "back": the device serves again by then.
 */
#include "check.h"
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>

static struct addr peer, stuck;
static int recv_fd, send_fd, poll_fd, epoll_fd, connect_fd, splice_fd, sendfile_fd, dgram_fd, listener, ep;
static long outcome[16];	/* what each waiter got: -errno, or what the call returned */

/* each waiter is a thread that blocks until the device is gone */
static long receiver(void)
{
	return recv(recv_fd, &(char){0}, 1, 0) < 0 ? -errno : 0;
}

static long sender(void)
{
	static char data[65536];

	while (send(send_fd, data, sizeof(data), MSG_NOSIGNAL) > 0)
		;
	return -errno;
}

static long poller(void)
{
	struct pollfd p = { .fd = poll_fd };	/* HUP and ERR are always told */

	return poll(&p, 1, -1) < 0 ? -errno : p.revents;
}

static long epoll_waiter(void)
{
	struct epoll_event ev;

	return epoll_wait(ep, &ev, 1, -1) < 0 ? -errno : (long)ev.events;
}

static long connector(void)
{
	return connect(connect_fd, (void *)&stuck.ss, stuck.len) < 0 ? -errno : 0;
}

static long splicer(void)
{
	int p[2];

	MUST(pipe(p) == 0);
	return splice(splice_fd, NULL, p[1], NULL, 4096, 0) < 0 ? -errno : 0;
}

static long file_sender(void)
{
	int fd = memfd_create("data", 0);

	MUST(fd >= 0 && ftruncate(fd, 64 << 20) == 0);
	signal(SIGPIPE, SIG_IGN);
	while (sendfile(sendfile_fd, fd, NULL, 64 << 20) > 0)
		;
	return -errno;
}

static long datagram_receiver(void)
{
	return recv(dgram_fd, &(char){0}, 1, 0) < 0 ? -errno : 0;
}

static long acceptor(void)
{
	int fd = accept(listener, NULL, NULL);

	if (fd < 0)
		return -errno;
	send_all(fd, "x", 1);
	close(fd);
	return 0;
}

enum { RECEIVER, SENDER, POLLER, EPOLLER, CONNECTOR, SPLICER, FILE_SENDER, DATAGRAM_RECEIVER, ACCEPTOR, WAITERS };

static long (* const waiters[WAITERS])(void) = {
	receiver, sender, poller, epoll_waiter, connector, splicer, file_sender, datagram_receiver, acceptor,
};

static pthread_t threads[WAITERS];
static pid_t tids[WAITERS];

static void *wait_in_thread(void *arg)
{
	long i = (long)arg;

	__atomic_store_n(&tids[i], syscall(SYS_gettid), __ATOMIC_RELEASE);
	outcome[i] = waiters[i]();
	return NULL;
}

/* it sleeps in the kernel, in no call but the one it shall wait in: the others of these threads do not sleep */
static void await_sleep(int i)
{
	char path[64], state;
	FILE *f;

	for (;;) {
		pid_t tid = __atomic_load_n(&tids[i], __ATOMIC_ACQUIRE);

		if (tid) {
			snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
			f = fopen(path, "r");
			MUST(f && fscanf(f, "%*d (%*[^)]) %c", &state) == 1);
			fclose(f);
			if (state == 'S')
				return;
		}
		usleep(10000);
	}
}

static void a_blocked_reader_gets_econnreset(void)
{
	SAME(outcome[RECEIVER], -ECONNRESET);
	SAME(recv(recv_fd, &(char){0}, 1, 0), 0);
}

static void a_blocked_writer_gets_econnreset(void)
{
	SAME(outcome[SENDER], -ECONNRESET);
	ERRNO(send(send_fd, "x", 1, MSG_NOSIGNAL), EPIPE);
}

static void a_blocked_poll_hears_of_it(void)
{
	SAME(outcome[POLLER] & (POLLHUP | POLLERR), POLLHUP | POLLERR);
}

static void a_blocked_epoll_hears_of_it(void)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET };

	SAME(outcome[EPOLLER] & (EPOLLHUP | EPOLLERR), EPOLLHUP | EPOLLERR);
	/* and who asks later */
	MUST(epoll_ctl(ep, EPOLL_CTL_MOD, epoll_fd, &ev) == 0);
	SAME(epoll_wait(ep, &ev, 1, 1000), 1);
	MUST(ev.events & EPOLLHUP);
	MUST(ev.events & EPOLLERR);
}

static void a_blocked_connect_gets_econnreset(void)
{
	SAME(outcome[CONNECTOR], -ECONNRESET);
}

static void a_blocked_splice_gets_econnreset(void)
{
	SAME(outcome[SPLICER], -ECONNRESET);
}

static void a_blocked_sendfile_fails(void)
{
	/* what had been sent by then was returned first, perhaps by the call that met the reset: then this is the next one */
	MUST(outcome[FILE_SENDER] == -ECONNRESET || outcome[FILE_SENDER] == -EPIPE);
}

static void a_blocked_datagram_reader_gets_econnreset(void)
{
	SAME(outcome[DATAGRAM_RECEIVER], -ECONNRESET);
}

static void later_sockets_are_native(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	ERRNO(connect(fd, (void *)&peer.ss, peer.len), ENETUNREACH);
}

static void later_sockets_are_served(void)
{
	int fd = ask(&peer, "echo\n!");

	recv_exactly(fd, &(char){0}, 1);
}

static void a_blocked_accept_goes_on_inside_the_guest(void)
{
	SAME(outcome[ACCEPTOR], 0);
}

static void a_listener_still_serves_the_guest(void)
{
	struct addr a = { .len = sizeof(a.ss) };
	char port[8];
	int fd, c;

	MUST(getsockname(listener, (void *)&a.ss, &a.len) == 0);
	snprintf(port, sizeof(port), "%d", port_of(&a));
	a = address("127.0.0.1", port);
	c = open_connected(&a);
	fd = accept(listener, NULL, NULL);
	MUST(fd >= 0);
	send_all(fd, "x", 1);
	recv_exactly(c, &(char){0}, 1);
}

int main(int argc, char **argv)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET };
	char answer[3];
	struct addr any = address("0.0.0.0", "8080"), lo = address("127.0.0.1", "8080");

	if (argc < 4 || argc > 5) {
		fprintf(stderr, "usage: gone_check PEER PORT STUCK [back]\n");
		return 2;
	}
	peer = address(argv[1], argv[2]);
	stuck = address(argv[1], argv[3]);
	recv_exactly(ask(&peer, "stick\n"), answer, 3);
	recv_fd = ask(&peer, "hold\n");
	send_fd = ask(&peer, "hold\n");
	poll_fd = ask(&peer, "hold\n");
	epoll_fd = ask(&peer, "hold\n");
	splice_fd = ask(&peer, "hold\n");
	sendfile_fd = ask(&peer, "hold\n");
	connect_fd = socket(AF_INET, SOCK_STREAM, 0);
	dgram_fd = socket(AF_INET, SOCK_DGRAM, 0);
	MUST(connect(dgram_fd, (void *)&peer.ss, peer.len) == 0);
	listener = socket(AF_INET, SOCK_STREAM, 0);
	ep = epoll_create1(0);
	MUST(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) == 0);
	MUST(bind(listener, (void *)&any.ss, any.len) == 0 && listen(listener, 5) == 0);
	MUST(epoll_ctl(ep, EPOLL_CTL_ADD, epoll_fd, &ev) == 0);
	for (long i = 0; i < WAITERS; i++)
		MUST(pthread_create(&threads[i], NULL, wait_in_thread, (void *)i) == 0);
	for (int i = 0; i < WAITERS; i++)
		await_sleep(i);
	printf("ready\n");
	fflush(stdout);
	for (int i = 0; i < WAITERS; i++) {
		if (i == ACCEPTOR) {		/* waits on: for the guest alone */
			int c = open_connected(&lo);

			recv_exactly(c, &(char){0}, 1);
			close(c);
		}
		pthread_join(threads[i], NULL);
	}
	C(a_blocked_reader_gets_econnreset);
	C(a_blocked_writer_gets_econnreset);
	C(a_blocked_poll_hears_of_it);
	C(a_blocked_epoll_hears_of_it);
	C(a_blocked_connect_gets_econnreset);
	C(a_blocked_splice_gets_econnreset);
	C(a_blocked_sendfile_fails);
	C(a_blocked_datagram_reader_gets_econnreset);
	C(a_blocked_accept_goes_on_inside_the_guest);
	C(a_listener_still_serves_the_guest);
	if (argc == 5)
		C(later_sockets_are_served);
	else
		C(later_sockets_are_native);
	return finish_checks();
}
