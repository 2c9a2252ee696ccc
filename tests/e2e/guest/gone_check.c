// SPDX-License-Identifier: BSD-3-Clause
/*
 * gone_check PEER PORT - what is left when the device goes away.
 *
 * Opens connections to tests/e2e/peer.py and blocks on them in every way there is, prints "ready", and expects that whoever runs it
 * then takes the device away (unplugs it, or ends the back-end: the watchdog needs three periods of virtio_socket.ping_secs).
 */
#include "check.h"
#include <pthread.h>

static struct addr peer;
static pthread_t receiver, sender;
static int recv_fd, send_fd, poll_fd, ep, recv_errno, send_errno;
static int listener;

static void *receive(void *arg)
{
	(void)arg;
	recv_errno = recv(recv_fd, &(char){0}, 1, 0) == -1 ? errno : 0;
	return NULL;
}

static void *send_until_it_fails(void *arg)
{
	static char data[65536];

	(void)arg;
	while (send(send_fd, data, sizeof(data), MSG_NOSIGNAL) > 0)
		;
	send_errno = errno;
	return NULL;
}

static void a_blocked_reader_gets_econnreset(void)
{
	SAME(recv_errno, ECONNRESET);
	SAME(recv(recv_fd, &(char){0}, 1, 0), 0);
}

static void a_blocked_writer_gets_econnreset(void)
{
	SAME(send_errno, ECONNRESET);
	ERRNO(send(send_fd, "x", 1, MSG_NOSIGNAL), EPIPE);
}

static void epoll_hears_of_it(void)
{
	struct epoll_event ev;

	SAME(epoll_wait(ep, &ev, 1, 1000), 1);
	MUST(ev.events & EPOLLHUP);
	MUST(ev.events & EPOLLERR);
}

static void later_sockets_are_native(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	ERRNO(connect(fd, (void *)&peer.ss, peer.len), ENETUNREACH);
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
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET }, out;
	struct addr any = address("0.0.0.0", "8080");

	if (argc != 3) {
		fprintf(stderr, "usage: gone_check PEER PORT\n");
		return 2;
	}
	peer = address(argv[1], argv[2]);
	recv_fd = ask(&peer, "hold\n");
	send_fd = ask(&peer, "hold\n");
	poll_fd = ask(&peer, "hold\n");
	listener = socket(AF_INET, SOCK_STREAM, 0);
	ep = epoll_create1(0);
	MUST(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) == 0);
	MUST(bind(listener, (void *)&any.ss, any.len) == 0 && listen(listener, 5) == 0);
	MUST(epoll_ctl(ep, EPOLL_CTL_ADD, poll_fd, &ev) == 0);
	MUST(pthread_create(&receiver, NULL, receive, NULL) == 0);
	MUST(pthread_create(&sender, NULL, send_until_it_fails, NULL) == 0);
	printf("ready\n");
	fflush(stdout);
	SAME(epoll_wait(ep, &out, 1, 60000), 1);
	pthread_join(receiver, NULL);
	pthread_join(sender, NULL);
	MUST(epoll_ctl(ep, EPOLL_CTL_MOD, poll_fd, &ev) == 0);
#define RUN(fn) run_check(#fn, fn)
	RUN(a_blocked_reader_gets_econnreset);
	RUN(a_blocked_writer_gets_econnreset);
	RUN(epoll_hears_of_it);
	RUN(later_sockets_are_native);
	RUN(a_listener_still_serves_the_guest);
	return finish_checks();
}
