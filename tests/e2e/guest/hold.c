// SPDX-License-Identifier: BSD-3-Clause
/*
 * hold HOST PORT - what a program sees that waits for data when its connection is taken from it.
 *
 * Connects, sends "hi\n", and waits in recv(), with a second thread in poll() on the same socket. Prints what each got, and what becomes
 * of the socket after that: "recv ERRNO", "poll EVENTS", "send ERRNO", then "end". Data is printed as "data ...".
 */
#include "check.h"
#include <pthread.h>

static int fd;

static void *poller(void *arg)
{
	struct pollfd p = { .fd = fd, .events = 0 };	/* HUP and ERR are always told */

	SAME(poll(&p, 1, -1), 1);
	return (void *)(long)p.revents;
}

int main(int argc, char **argv)
{
	char buf[256];
	struct addr a;
	pthread_t t;
	void *events;
	ssize_t n;

	if (argc != 3) {
		fprintf(stderr, "usage: %s HOST PORT\n", argv[0]);
		return 2;
	}
	a = address(argv[1], argv[2]);
	fd = open_connected(&a);
	MUST(pthread_create(&t, NULL, poller, NULL) == 0);
	send_all(fd, "hi\n", 3);
	while ((n = recv(fd, buf, sizeof(buf), 0)) > 0)
		printf("data %.*s", (int)n, buf);
	printf("recv %s\n", n ? strerrorname_np(errno) : "EOF");
	fflush(stdout);
	if (n == 0)
		return 0;
	MUST(pthread_join(t, &events) == 0);
	printf("poll%s\n", (long)events & POLLHUP ? " HUP" : "");	/* and ERR, until recv() took the error: a race between the two */
	n = send(fd, "x", 1, MSG_NOSIGNAL);
	printf("send %s\nend\n", n < 0 ? strerrorname_np(errno) : "ok");
	return 0;
}
