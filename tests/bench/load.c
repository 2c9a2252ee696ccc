/* SPDX-License-Identifier: BSD-3-Clause */
/* See load.h. Here are the jobs, and what flows of any kind have in common; load_rings.c has the messages of drivers. */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "far.h"
#include "load_priv.h"
#include "program.h"
#include "vso_abi.h"
#include "vsock_abi.h"

enum { EVENTS = 64 };

static _Thread_local uint8_t bytes[LOAD_PIECE];	/* several loads may run at once, each in a thread of its own */

int load_fail(struct load *l, const char *fmt, ...)
{
	va_list args;

	if (l->why[0])
		return -1;
	va_start(args, fmt);
	vsnprintf(l->why, sizeof(l->why), fmt, args);
	va_end(args);
	return -1;
}

int load_got(struct load *l, struct load_flow *f, const uint8_t *data, size_t len)
{
	if (len > f->want - f->got)
		return load_fail(l, "%zu bytes on flow %u, %llu expected", len, load_index(l, f), (unsigned long long)(f->want - f->got));
	if (f->want <= sizeof(f->answer))
		memcpy((uint8_t *)&f->answer + f->got, data, len);
	f->got += len;
	return 0;
}

/* a new name, for what was closed may have something on its way still */
static uint32_t new_id(struct load *l, const struct load_flow *f)
{
	l->serial = l->serial % 0x7fff + 1;
	return l->serial << 16 | load_index(l, f);
}

/* --------------------------------------------------------------------------------------------------------------------------- sockets */

static int watch(struct load *l, struct load_flow *f, int events)
{
	struct epoll_event ev = { .events = (uint32_t)events, .data.u32 = load_index(l, f) };

	if (f->watched == events)
		return 0;
	if (epoll_ctl(l->ep, f->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, f->fd, &ev))
		return load_fail(l, "epoll_ctl: %s", strerror(errno));
	f->watched = events;
	return 0;
}

static int read_socket(struct load *l, struct load_flow *f)
{
	ssize_t n = recv(f->fd, bytes, sizeof(bytes), MSG_DONTWAIT);

	if (n < 0)
		return errno == EAGAIN ? 0 : load_fail(l, "recv: %s", strerror(errno));
	if (!n && f->want > f->got)
		return load_fail(l, "the end of a connection");
	if (!n)
		f->state = LOAD_ENDED;
	return load_got(l, f, bytes, (size_t)n);
}

static int pump_sockets(struct load *l, int wait)
{
	struct epoll_event ev[EVENTS];
	int n = epoll_wait(l->ep, ev, EVENTS, wait ? LOAD_PATIENCE : 0);

	if (n <= 0)
		return wait ? load_fail(l, "nothing came") : 0;
	for (int i = 0; i < n; i++) {
		struct load_flow *f = &l->flows[ev[i].data.u32];

		if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR) && read_socket(l, f))
			return -1;
		if (ev[i].events & EPOLLOUT && watch(l, f, EPOLLIN))
			return -1;
	}
	return n;
}

int load_pump(struct load *l, int wait)
{
	return l->kind == LOAD_SOCKETS ? pump_sockets(l, wait) : load_pump_rings(l, wait);
}

/* ------------------------------------------------------------------------------------------------------------------- what flows do */

ssize_t load_put(struct load *l, struct load_flow *f, const void *data, size_t len)
{
	uint32_t used = f->tx_cnt - f->peer_fwd, n;
	ssize_t sent;

	if (f->state != LOAD_OPEN)
		return load_fail(l, "flow %u is not open", load_index(l, f));
	if (l->kind == LOAD_SOCKETS) {
		sent = send(f->fd, data ? data : bytes, len, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (sent >= 0)
			return sent;
		return errno == EAGAIN ? watch(l, f, EPOLLIN | EPOLLOUT) : load_fail(l, "send: %s", strerror(errno));
	}
	n = used < f->peer_alloc ? (uint32_t)MIN(len, f->peer_alloc - used) : 0;
	if (!n || !load_tx_room(l, f))
		return 0;
	f->tx_cnt += n;
	if (l->kind == LOAD_OFFLOAD ? load_say_vso(l, f, VSO_DATA, 0, data, n) : load_say_vsock(l, f, VSK_OP_RW, 0, data, n))
		return -1;
	return n;
}

int load_put_all(struct load *l, struct load_flow *f, const void *data, size_t len)
{
	while (len) {
		ssize_t n = load_put(l, f, data, len);

		if (n < 0 || (!n && load_pump(l, 1) < 0))
			return -1;
		data = (const uint8_t *)data + n;
		len -= (size_t)n;
	}
	return 0;
}

int load_request(struct load *l, struct load_flow *f, uint32_t what, uint32_t size, uint64_t amount)
{
	struct far_request r = { what, size, amount };

	f->got = 0;
	return load_put_all(l, f, &r, sizeof(r));
}

/* the device may wait for us to take what it says before it takes what we say */
static int make_room(struct load *l, const struct load_flow *f)
{
	while (l->kind != LOAD_SOCKETS && !load_tx_room(l, f))
		if (load_pump_rings(l, 1) < 0)
			return -1;
	return 0;
}

static int begin(struct load *l, struct load_flow *f)
{
	struct timeval patience = { .tv_sec = LOAD_PATIENCE / 1000 };
	int one = 1;

	if (make_room(l, f))
		return -1;
	*f = (struct load_flow){ .fd = -1, .state = LOAD_OPENING, .id = new_id(l, f), .port = l->port };
	switch (l->kind) {
	case LOAD_OFFLOAD:
		return load_say_vso(l, f, VSO_CONNECT, 0, l->open, l->open_len);
	case LOAD_VSOCK:
		return load_say_vsock(l, f, VSK_OP_REQUEST, 0, NULL, 0);
	}
	f->fd = socket(*(sa_family_t *)l->address, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (f->fd < 0 || connect(f->fd, (void *)l->address, l->address_len))
		return load_fail(l, "connect: %s", strerror(errno));
	setsockopt(f->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(f->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	f->state = LOAD_OPEN;
	return watch(l, f, EPOLLIN);
}

static int finish(struct load *l, struct load_flow *f)
{
	int rc = 0;

	if (f->state == LOAD_NONE)
		return 0;
	if (l->kind == LOAD_SOCKETS) {
		close(f->fd);
		f->fd = -1;
		f->state = LOAD_NONE;
	} else {
		if (make_room(l, f))
			return -1;
		if (f->state == LOAD_NONE)
			return 0;	/* meanwhile */
		f->state = LOAD_CLOSING;
		rc = l->kind == LOAD_OFFLOAD ? load_say_vso(l, f, VSO_CLOSE, 0, NULL, 0) : load_say_vsock(l, f, VSK_OP_SHUTDOWN, LOAD_BOTH, NULL, 0);
	}
	return rc;
}

/* ------------------------------------------------------------------------------------------------------------------------------ jobs */

int load_init(struct load *l)
{
	l->ep = epoll_create1(EPOLL_CLOEXEC);
	if (l->ep < 0)
		return load_fail(l, "epoll_create1: %s", strerror(errno));
	for (uint32_t i = 0; i < l->n_flows; i++)
		l->flows[i].fd = -1;
	for (uint32_t i = 0; l->kind != LOAD_SOCKETS && i < l->pairs; i++) {
		drv_init(&l->pair[i].rx);
		drv_init(&l->pair[i].tx);
		drv_no_calls(&l->pair[i].rx);
		drv_no_calls(&l->pair[i].tx);
		drv_offer(&l->pair[i].rx, l->pair[i].rx.depth);
		drv_kick(&l->pair[i].rx);
	}
	return 0;
}

void load_end(struct load *l)
{
	for (uint32_t i = 0; i < l->n_flows; i++)
		if (l->flows[i].fd >= 0)
			close(l->flows[i].fd);
	close(l->ep);
}

static int all_left(struct load *l, uint32_t first, uint32_t count, int state)
{
	for (uint32_t i = first; i < first + count; i++)
		while (l->flows[i].state == state)
			if (load_pump(l, 1) < 0)
				return -1;
	return 0;
}

/* take `step` with each of them, until none is left in the state that it leads to */
static int64_t step_all(struct load *l, uint32_t first, uint32_t count, int (*step)(struct load *l, struct load_flow *f), int state)
{
	int64_t start = now();

	for (uint32_t i = first; i < first + count; i++)
		if (step(l, &l->flows[i]) || load_pump(l, 0) < 0)
			return -1;
	return all_left(l, first, count, state) ? -1 : now() - start;
}

int64_t load_connect(struct load *l, uint32_t first, uint32_t count)
{
	return step_all(l, first, count, begin, LOAD_OPENING);
}

int64_t load_close(struct load *l, uint32_t first, uint32_t count)
{
	return step_all(l, first, count, finish, LOAD_CLOSING);
}

int64_t load_abort(struct load *l, uint32_t flow)
{
	struct load_flow *f = &l->flows[flow];
	int64_t start = now();

	if (l->kind == LOAD_SOCKETS)
		return finish(l, f);
	if (make_room(l, f))
		return -1;
	f->state = l->kind == LOAD_OFFLOAD ? LOAD_CLOSING : LOAD_NONE;	/* vsock's RST is not answered */
	if (l->kind == LOAD_OFFLOAD ? load_say_vso(l, f, VSO_CLOSE, VSO_CLOSE_ABORT, NULL, 0) : load_say_vsock(l, f, VSK_OP_RST, 0, NULL, 0))
		return -1;
	load_kick(l);
	return all_left(l, flow, 1, LOAD_CLOSING) ? -1 : now() - start;
}

int load_all_got(struct load *l, uint32_t first, uint32_t count)
{
	for (uint32_t i = first; i < first + count; i++)
		while (l->flows[i].got < l->flows[i].want)
			if (load_pump(l, 1) < 0)
				return -1;
	return 0;
}

int64_t load_send(struct load *l, uint32_t first, uint32_t count, uint64_t amount, uint32_t size)
{
	uint32_t busy = count;
	int64_t start = now();

	for (uint32_t i = first; i < first + count; i++) {
		struct load_flow *f = &l->flows[i];

		f->left = amount;
		f->want = sizeof(f->answer);
		if (load_request(l, f, FAR_SINK, size, amount))
			return -1;
	}
	while (busy) {
		uint64_t moved = 0;

		for (uint32_t i = first; i < first + count; i++) {
			struct load_flow *f = &l->flows[i];
			ssize_t n;

			if (!f->left || (l->kind == LOAD_SOCKETS && f->watched & EPOLLOUT))
				continue;
			n = load_put(l, f, NULL, MIN(f->left, size));
			if (n < 0)
				return -1;
			moved += (uint64_t)n;
			f->left -= (uint64_t)n;
			busy -= !f->left;
		}
		/* a socket's send() has told the host; a ring is looked at, and kicked, when all have had their turn */
		if ((!moved || l->kind != LOAD_SOCKETS) && load_pump(l, !moved) < 0)
			return -1;
	}
	if (load_all_got(l, first, count))
		return -1;
	for (uint32_t i = first; i < first + count; i++)
		if (l->flows[i].answer != amount)
			return load_fail(l, "the far end of flow %u got %llu bytes", i, (unsigned long long)l->flows[i].answer);
	return now() - start;
}

int64_t load_receive(struct load *l, uint32_t first, uint32_t count, uint64_t amount, uint32_t size)
{
	int64_t start = now();

	for (uint32_t i = first; i < first + count; i++) {
		l->flows[i].want = amount;
		if (load_request(l, &l->flows[i], FAR_SOURCE, size, amount))
			return -1;
	}
	load_kick(l);
	return load_all_got(l, first, count) ? -1 : now() - start;
}

int load_await(struct load *l, struct load_flow *f, uint64_t upto)
{
	while (f->got < upto) {
		/* a program that waits for one answer waits in recv() */
		if (l->kind == LOAD_SOCKETS) {
			ssize_t n = recv(f->fd, bytes, sizeof(bytes), 0);

			if (n <= 0)
				return load_fail(l, "recv: %s", n ? strerror(errno) : "the end");
			if (load_got(l, f, bytes, (size_t)n))
				return -1;
		} else if (load_pump(l, 1) < 0) {
			return -1;
		}
	}
	return 0;
}

int64_t load_ask(struct load *l, uint32_t flow, uint32_t times, uint32_t size, uint32_t *each)
{
	struct load_flow *f = &l->flows[flow];
	int64_t start = now(), before, after = 0;

	f->want = (uint64_t)times * size;
	if (load_request(l, f, FAR_ECHO, size, f->want))
		return -1;
	for (uint32_t i = 1; i <= times; i++) {
		before = now();
		if (load_put_all(l, f, bytes, size))
			return -1;
		load_kick(l);
		if (load_await(l, f, (uint64_t)i * size))
			return -1;
		after = now();
		each[i - 1] = (uint32_t)MIN(after - before, UINT32_MAX);
	}
	return after - start;
}

int64_t load_cycle(struct load *l, uint32_t first, uint32_t parallel, uint32_t total)
{
	uint32_t begun = 0, done = 0;
	int64_t start = now();

	for (uint32_t i = first; i < first + parallel; i++)
		l->flows[i].id = 0;	/* not begun */
	while (done < total) {
		uint32_t before = done + begun;

		for (uint32_t i = first; i < first + parallel; i++) {
			struct load_flow *f = &l->flows[i];

			if (f->state == LOAD_ENDED && finish(l, f))
				return -1;
			if (f->state == LOAD_NONE && f->id) {
				f->id = 0;
				done++;
			}
			if (f->state == LOAD_NONE && begun < total) {
				begun++;
				if (begin(l, f))
					return -1;
			}
		}
		if (done < total && load_pump(l, before == done + begun) < 0)
			return -1;
	}
	return now() - start;
}

int64_t load_stuff(struct load *l, uint32_t flow)
{
	struct load_flow *f = &l->flows[flow];
	int64_t total = 0;
	ssize_t n = 1;

	if (load_request(l, f, FAR_HOLD, 0, 0))
		return -1;
	/* nobody takes anything: when nothing was taken and nothing is told within 200 ms, it is full */
	for (int quiet = 0; quiet < 20;) {
		struct timespec t = { .tv_nsec = 10000000 };

		n = load_put(l, f, NULL, LOAD_PIECE);
		if (n < 0 || (l->kind != LOAD_SOCKETS && load_pump(l, 0) < 0))
			return -1;
		total += n;
		quiet = n ? 0 : quiet + 1;
		if (!n)
			nanosleep(&t, NULL);
	}
	return total;
}

int64_t load_cpu(int pid)
{
	struct timespec t;
	clockid_t clock;

	if (clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &t))
		return -1;
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}
