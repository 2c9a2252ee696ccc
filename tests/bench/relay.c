/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * relay - what passes through a process costs at least this: read() from one socket, write() to the other.
 *
 * relay PORT...	For each: prints a port of 127.0.0.1; what connects there is connected to PORT. Then prints "ready".
 *
 * One thread, one buffer of 64 KiB for all, level-triggered epoll. What a socket does not take waits in a buffer of the pair, and the other
 * socket is not read meanwhile. Ends are handed on; after both, or an error, the pair is closed.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "program.h"

enum { PIECE = 65536, TURN = 16, EVENTS = 64 };

struct pair;

struct side {
	int fd;
	struct pair *pair;
	uint32_t events;		/* what epoll watches */
	int eof;
	uint8_t *held;			/* for this socket, [at, len) */
	size_t at, len;
};

struct pair {
	struct side side[2];		/* of a listener: side[1].fd is -1, and */
	int port;			/* this is where it leads */
	struct pair *dead;		/* freed at the end of the turn: another event of it may follow */
};

static uint8_t piece[PIECE];
static struct pair *dead;
static int ep;

static void watch(struct side *s, int op, uint32_t events)
{
	struct epoll_event ev = { .events = events, .data.ptr = s };

	if ((op == EPOLL_CTL_ADD || s->events != events) && epoll_ctl(ep, op, s->fd, &ev))
		die("epoll_ctl");
	s->events = events;
}

static void side_init(struct pair *p, int i, int fd)
{
	int one = 1;

	p->side[i].fd = fd;
	p->side[i].pair = p;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	watch(&p->side[i], EPOLL_CTL_ADD, EPOLLIN);
}

static void end(struct pair *p)
{
	for (int i = 0; i < 2; i++) {
		close(p->side[i].fd);
		free(p->side[i].held);
		p->side[i].fd = -1;
	}
	p->dead = dead;
	dead = p;
}

static void take(struct pair *listener)
{
	struct sockaddr_in in = { AF_INET, htons((uint16_t)listener->port), { htonl(INADDR_LOOPBACK) }, { 0 } };
	int fd, out;

	for (int i = 0; i < TURN && (fd = accept4(listener->side[0].fd, NULL, NULL, SOCK_CLOEXEC)) >= 0; i++) {
		struct pair *p = calloc(1, sizeof(*p));

		out = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (!p || out < 0 || connect(out, (void *)&in, sizeof(in)))
			die("connect");
		side_init(p, 0, fd);
		side_init(p, 1, out);
	}
}

/* what was held for it; -1: an error */
static int unload(struct side *s)
{
	ssize_t n = send(s->fd, s->held + s->at, s->len - s->at, MSG_NOSIGNAL | MSG_DONTWAIT);

	if (n < 0)
		return errno == EAGAIN ? 0 : -1;
	s->at += (size_t)n;
	if (s->at == s->len)
		s->at = s->len = 0;
	return 0;
}

static int hold(struct side *s, const uint8_t *data, size_t len)
{
	if (!s->held && !(s->held = malloc(PIECE)))
		die("malloc");
	memcpy(s->held, data, len);
	s->at = 0;
	s->len = len;
	return 0;
}

/* from one to the other; 1: there may be more, 0: not now, -1: an error */
static int move(struct side *from, struct side *to)
{
	ssize_t n = recv(from->fd, piece, PIECE, MSG_DONTWAIT), m;

	if (n < 0)
		return errno == EAGAIN ? 0 : -1;
	if (!n) {
		from->eof = 1;
		shutdown(to->fd, SHUT_WR);
		return to->eof ? -1 : 0;
	}
	m = send(to->fd, piece, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (m < 0 && errno != EAGAIN)
		return -1;
	m = m < 0 ? 0 : m;
	if (m < n)
		return hold(to, piece + m, (size_t)(n - m));
	return n == PIECE;
}

static void turn(struct side *s, uint32_t events)
{
	struct pair *p = s->pair;
	struct side *other = &p->side[s == p->side];
	int rc = 0;

	if (p->port) {
		take(p);
		return;
	}
	if (s->fd < 0)
		return;
	if (s->len && events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
		rc = unload(s);
	if (!rc && !other->len && !s->eof && events & (EPOLLIN | EPOLLERR | EPOLLHUP))
		for (int i = 0; i < TURN && (rc = move(s, other)) > 0; i++)
			;
	if (rc < 0 || (s->eof && !s->len && events & (EPOLLERR | EPOLLHUP))) {
		end(p);
		return;
	}
	for (int i = 0; i < 2; i++) {
		struct side *x = &p->side[i], *y = &p->side[!i];

		watch(x, EPOLL_CTL_MOD, (x->len ? EPOLLOUT : 0) | (!y->len && !x->eof ? EPOLLIN : 0));
	}
}

int main(int argc, char **argv)
{
	struct epoll_event events[EVENTS];

	ep = epoll_create1(EPOLL_CLOEXEC);
	for (int i = 1; i < argc; i++) {
		struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		struct pair *p = calloc(1, sizeof(*p));
		socklen_t len = sizeof(in);

		if (!p || fd < 0 || bind(fd, (void *)&in, len) || listen(fd, 4096) || getsockname(fd, (void *)&in, &len))
			die("listen");
		p->port = atoi(argv[i]);
		p->side[1].fd = -1;
		side_init(p, 0, fd);
		printf("%u\n", ntohs(in.sin_port));
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(ep, events, EVENTS, -1);

		for (int i = 0; i < n; i++)
			turn(events[i].data.ptr, events[i].events);
		while (dead) {
			struct pair *next = dead->dead;

			free(dead);
			dead = next;
		}
	}
}
