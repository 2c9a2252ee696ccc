/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * far - the far end of every connection that tests/bench/flows.py makes: sink, source, echo. The same for all that are compared. Of those
 * that tests/bench/guest.py makes, too, from a guest to its host, and in a guest of those from the host.
 *
 * far KIND:WHERE...	KIND serve: does what is asked (far.h), job after job. KIND close: closes what it has accepted. KIND dgram: datagrams.
 *			WHERE tcp: a free port of 127.0.0.1, tcp:ADDRESS: of that, tcp:ADDRESS:PORT, vsock:PORT; else the path of a
 *			Unix socket. dgram: udp, udp:ADDRESS
 *
 * Prints the port of each tcp or udp socket, a line each, and then "ready". One thread, level-triggered epoll.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "far.h"
#include "program.h"

enum { EVENTS = 64, TURN = 16 /* reads or writes of a connection before another has its turn */ };

struct conn {
	int fd;
	enum { SERVE = 1, CLOSE, CONNECTED, DGRAM } kind;
	struct far_request job;		/* what: 0 while `got` bytes of the next one are there */
	uint32_t got;
	uint64_t done;
	int turn;			/* connections that a listener takes before another has its turn */
};

static uint8_t piece[FAR_PIECE];
static int ep;

static void watch(struct conn *c, int op, uint32_t events)
{
	struct epoll_event ev = { .events = events, .data.ptr = c };

	if (epoll_ctl(ep, op, c->fd, &ev))
		die("epoll_ctl");
}

static void end(struct conn *c)
{
	close(c->fd);
	free(c);
}

static struct conn *conn_new(int fd, int kind)
{
	struct conn *c = calloc(1, sizeof(*c));

	if (!c)
		die("calloc");
	c->fd = fd;
	c->kind = kind;
	watch(c, EPOLL_CTL_ADD, EPOLLIN);
	return c;
}

static void take(struct conn *listener)
{
	int fd, one = 1;

	for (int i = 0; i < listener->turn && (fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC)) >= 0; i++) {
		if (listener->kind == CLOSE) {
			close(fd);
			continue;
		}
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));	/* fails on a Unix socket, which needs none */
		conn_new(fd, CONNECTED);
	}
}

/* all of it, waiting for room: answers and echoes are small */
static int put(int fd, const void *data, size_t len)
{
	while (len) {
		ssize_t n = send(fd, data, len, MSG_NOSIGNAL | MSG_DONTWAIT);
		struct pollfd p = { .fd = fd, .events = POLLOUT };

		if (n < 0 && errno == EAGAIN && poll(&p, 1, 60000) == 1)
			continue;
		if (n < 0)
			return -1;
		data = (const uint8_t *)data + n;
		len -= (size_t)n;
	}
	return 0;
}

static void over(struct conn *c)
{
	if (c->job.what == FAR_SOURCE)
		watch(c, EPOLL_CTL_MOD, EPOLLIN);
	c->job.what = c->got = 0;
	c->done = 0;
}

/* -1: the connection is done with */
static int begin(struct conn *c)
{
	struct far_request r;
	ssize_t n = recv(c->fd, (uint8_t *)&c->job.what + c->got, sizeof(r) - c->got, MSG_DONTWAIT);

	if (n <= 0)
		return n < 0 && errno == EAGAIN ? 0 : -1;
	c->got += (uint32_t)n;
	if (c->got < sizeof(r))
		return 0;
	if (c->job.what == FAR_SOURCE)
		watch(c, EPOLL_CTL_MOD, EPOLLOUT);
	else if (c->job.what == FAR_HOLD)
		watch(c, EPOLL_CTL_MOD, 0);
	return c->job.what > FAR_HOLD || !c->job.what || c->job.size > FAR_PIECE ? -1 : 0;
}

static int receive(struct conn *c)
{
	uint64_t left = c->job.amount - c->done;
	ssize_t n = recv(c->fd, piece, left < FAR_PIECE ? left : FAR_PIECE, MSG_DONTWAIT);

	if (n <= 0)
		return n < 0 && errno == EAGAIN ? 0 : -1;
	c->done += (uint64_t)n;
	if (c->job.what == FAR_ECHO && put(c->fd, piece, (size_t)n))
		return -1;
	if (c->done == c->job.amount) {
		if (c->job.what == FAR_SINK && put(c->fd, &c->done, sizeof(c->done)))
			return -1;
		over(c);
	}
	return n == FAR_PIECE;
}

static int give(struct conn *c)
{
	uint64_t left = c->job.amount - c->done;
	ssize_t n = send(c->fd, piece, left < c->job.size ? left : c->job.size, MSG_NOSIGNAL | MSG_DONTWAIT);

	if (n < 0)
		return errno == EAGAIN ? 0 : -1;
	c->done += (uint64_t)n;
	if (c->done == c->job.amount)
		over(c);
	return 1;
}

/* datagrams of one client at a time, whose number is in `done` */
static void exchange(struct conn *c)
{
	struct sockaddr_in from;
	socklen_t len = sizeof(from);
	struct far_dgram d;
	ssize_t n;

	for (int i = 0; i < TURN && (n = recvfrom(c->fd, &d, sizeof(d), MSG_DONTWAIT, (void *)&from, &len)) >= 0; i++) {
		if (n < (ssize_t)sizeof(d) || d.magic != FAR_DGRAM) {
			c->done++;
			continue;
		}
		if (d.what == FAR_GIVE) {
			uint32_t head[FAR_PIECE / sizeof(uint32_t)] = { 0, d.burst };

			for (uint32_t k = 0; k < d.number && k < FAR_BURST && d.size <= sizeof(head); k++)
				sendto(c->fd, head, d.size, 0, (void *)&from, len);
			continue;
		}
		if (d.what == FAR_ZERO)
			c->done = 0;
		d.number = (uint32_t)c->done;
		sendto(c->fd, &d, sizeof(d), 0, (void *)&from, len);
	}
}

static void turn(struct conn *c)
{
	int rc = 1;

	if (c->kind == DGRAM) {
		exchange(c);
		return;
	}
	if (c->kind != CONNECTED) {
		take(c);
		return;
	}
	for (int i = 0; i < TURN && rc > 0; i++) {
		if (c->got < sizeof(c->job))
			rc = begin(c);
		else if (c->job.what == FAR_SOURCE)
			rc = give(c);
		else
			rc = c->job.what == FAR_HOLD ? -1 : receive(c);	/* a holder only hears of its end */
	}
	if (rc < 0)
		end(c);
}

static void listen_on(const char *kind_and_where)
{
	int turn = TURN;
	int kind = !strncmp(kind_and_where, "close:", 6) ? CLOSE : !strncmp(kind_and_where, "dgram:", 6) ? DGRAM : SERVE, fd;
	const char *where = strchr(kind_and_where, ':') + 1;
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	struct sockaddr_vm vm = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
	char address[64], *port;
	socklen_t len = sizeof(in);

	if (!strcmp(where, "tcp") || !strncmp(where, "tcp:", 4) || kind == DGRAM) {
		snprintf(address, sizeof(address), "%s", where[3] ? where + 4 : "127.0.0.1");
		port = strchr(address, ':');
		if (port) {
			*port++ = 0;
			in.sin_port = htons((uint16_t)strtoul(port, NULL, 10));
		}
		if (inet_pton(AF_INET, address, &in.sin_addr) != 1)
			die(where);
		fd = socket(AF_INET, (kind == DGRAM ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (fd < 0 || bind(fd, (void *)&in, len) || getsockname(fd, (void *)&in, &len))
			die("bind");
		printf("%u\n", ntohs(in.sin_port));
	} else if (!strncmp(where, "vsock:", 6)) {
		vm.svm_port = (unsigned int)strtoul(where + 6, NULL, 10);
		turn = 1;	/* where nobody waits, AF_VSOCK's accept() sleeps until the next tick, also one that shall not wait */
		fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (fd < 0 || bind(fd, (void *)&vm, sizeof(vm)))
			die(where);
	} else {
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		snprintf(un.sun_path, sizeof(un.sun_path), "%s", where);
		if (fd < 0 || bind(fd, (void *)&un, sizeof(un)))
			die(where);
	}
	if (kind != DGRAM && listen(fd, 4096))
		die("listen");
	conn_new(fd, kind)->turn = turn;
}

int main(int argc, char **argv)
{
	struct epoll_event events[EVENTS];

	ep = epoll_create1(EPOLL_CLOEXEC);
	for (size_t i = 0; i < sizeof(piece); i++)
		piece[i] = (uint8_t)(i * 31);
	for (int i = 1; i < argc; i++)
		listen_on(argv[i]);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(ep, events, EVENTS, -1);

		for (int i = 0; i < n; i++)
			turn(events[i].data.ptr);
	}
}
