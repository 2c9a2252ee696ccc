/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_flow - the flow table, life and death of a flow, and the answers of Python.
 *
 *	                CONNECT, BIND                     vse_connected            host error, nonsense
 *	(none) ------------------------> NEW ---------------------------> STREAM -----------------------> DEAD
 *	   ^                              | vse_bound            (stream)   ^  |                            |
 *	   |                              +----------> BOUND ---------------+  | CLOSE, wbuf not empty      | CLOSE
 *	   |                              |              | LISTEN             +------> LINGER               |
 *	   |                              |              +--------> LISTEN                |                 |
 *	   |                              +----------> DGRAM (udp)                        | sent, or 60 s   |
 *	   +---- CLOSE, vse_refuse (NEW) -------------------------------------------------+-----------------+
 *
 * `pending` says that Python was asked and did not answer yet; it stands beside the state, since a BOUND or DGRAM flow may
 * be asked to connect. A flow that leaves with pending set tells Python with VSE_EV_CANCEL; the answer then finds -ESTALE.
 *
 * CLOSED answers a CLOSE at once, also when bytes for a slow host peer are left: the flow gives its id back and lingers under its
 * handle alone. Lingering flows are bounded in number and time, then end in RST: the stream was not completed.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vse_priv.h"

/* --------------------------------------------------------------------------------------------------------------- table */

static struct vse_flow **bucket(struct vse_engine *e, uint64_t id)
{
	return &e->hash[(id * 0x9e3779b97f4a7c15 >> 40) & e->hash_mask];	/* Fibonacci hashing; the mask has 16 bits at most */
}

struct vse_flow *vse_flow_find(struct vse_engine *e, uint64_t id)
{
	struct vse_flow *f = *bucket(e, id);

	while (f && f->id != id)
		f = f->hash_next;
	return f;
}

struct vse_flow *vse_flow_of(struct vse_engine *e, uint64_t handle)
{
	uint32_t slot = handle & VSE_SLOT_MASK;
	struct vse_flow *f = slot < e->config.max_flows ? e->slots[slot] : NULL;

	return f && f->handle == handle ? f : NULL;
}

struct vse_flow *vse_flow_new(struct vse_engine *e, struct vse_pair *p, uint64_t id)
{
	struct vse_flow *f;
	uint32_t slot;

	if (!e->nfree || !(f = calloc(1, sizeof(*f))))
		return NULL;
	slot = e->free_slots[--e->nfree];
	e->slots[slot] = f;
	f->handle = ++e->serial << VSE_SLOT_BITS | slot;
	f->id = id;
	f->fd = f->dialed = -1;
	f->shared = true;
	f->pair = p;
	f->buf_alloc = f->promised = e->config.buf_alloc;
	f->hash_next = *bucket(e, id);
	*bucket(e, id) = f;
	TAILQ_INIT(&f->dests);
	e->stats.opened++;
	return f;
}

void vse_flow_unhash(struct vse_flow *f)
{
	struct vse_flow **at = bucket(f->pair->e, f->id);

	while (*at && *at != f)
		at = &(*at)->hash_next;
	if (*at)
		*at = f->hash_next;
	f->hash_next = NULL;
}

void vse_flow_run(struct vse_flow *f)
{
	if (!f->queue) {
		f->queue = f->heavy ? &f->pair->runq : &f->pair->lightq;
		TAILQ_INSERT_TAIL(f->queue, f, run);
	}
}

void vse_flow_rest(struct vse_flow *f)
{
	if (f->queue) {
		TAILQ_REMOVE(f->queue, f, run);
		f->queue = NULL;
	}
}

int vse_flow_poll(struct vse_flow *f)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.u64 = f->handle };

	if (epoll_ctl(f->pair->e->ep, EPOLL_CTL_ADD, f->fd, &ev))
		return -errno;
	f->polled = true;
	return 0;
}

void vse_flow_drop_fd(struct vse_flow *f, bool abort)
{
	struct linger rst = { .l_onoff = 1, .l_linger = 0 };

	if (f->fd < 0)
		return;
	/* by hand: the registration lives on while anybody has a duplicate of the descriptor */
	if (f->polled && f->shared)
		epoll_ctl(f->pair->e->ep, EPOLL_CTL_DEL, f->fd, NULL);
	f->polled = false;
	if (abort)
		setsockopt(f->fd, SOL_SOCKET, SO_LINGER, &rst, sizeof(rst));
	close(f->fd);
	f->fd = -1;
}

static void cancel(struct vse_flow *f)
{
	if (f->pending)
		vse_event(f->pair->e, VSE_EV_CANCEL, f, 0, 0, NULL, 0);
	f->pending = 0;
	if (f->dialed >= 0)
		close(f->dialed);
	f->dialed = -1;
	free(f->opts);
	f->opts = NULL;
	f->opts_len = 0;
}

/* everything a flow holds but its id, slot and names */
static void release(struct vse_flow *f, bool abort)
{
	cancel(f);
	vse_flow_rest(f);
	vse_listen_unstall(f);
	vse_stream_free_wbuf(f);
	vse_window_fix(f);
	vse_dgram_free(f);
	vse_ipx_free(f);
	vse_seq_free(f);
	vse_flow_drop_fd(f, abort && f->state != ST_LISTEN && f->state != ST_BOUND);
	f->readable = f->writable = false;
}

static void flow_end(struct vse_flow *f, bool abort)
{
	struct vse_engine *e = f->pair->e;

	if (f->state == ST_LINGER) {
		TAILQ_REMOVE(&e->linger, f, aux);
		e->nlinger--;
	} else if (f->gone) {
		TAILQ_REMOVE(&e->gone, f, aux);
	} else {
		vse_flow_unhash(f);
	}
	release(f, abort);
	if (f->counted)
		vse_event(e, VSE_EV_ENDED, f, 0, f->error, NULL, 0);
	e->slots[f->handle & VSE_SLOT_MASK] = NULL;
	e->free_slots[e->nfree++] = f->handle & VSE_SLOT_MASK;
	e->stats.ended++;
	if (!TAILQ_EMPTY(&e->stalled))
		e->retry_at = 1;	/* the past: a listener may go on now */
	free(f->local);
	free(f->peer);
	free(f);
}

void vse_flow_free(struct vse_flow *f)
{
	flow_end(f, false);
}

void vse_flow_reset(struct vse_flow *f, uint32_t error)
{
	if (f->state == ST_DEAD)
		return;
	if (!f->error)
		f->error = error;
	if (f->state == ST_LINGER) {
		flow_end(f, true);
		return;
	}
	release(f, true);
	f->state = ST_DEAD;
	f->pair->e->dialect->reset(f, error);
}

void vse_flow_gone(struct vse_flow *f)
{
	vse_flow_unhash(f);
	f->gone = true;
	TAILQ_INSERT_TAIL(&f->pair->e->gone, f, aux);
}

void vse_flows_reap(struct vse_engine *e)
{
	struct vse_flow *f;

	while ((f = TAILQ_FIRST(&e->gone)))
		flow_end(f, true);
}

void vse_flow_close(struct vse_flow *f, bool abort)
{
	struct vse_engine *e = f->pair->e;

	if (f->state == ST_STREAM && abort && !f->error)
		f->error = ECONNRESET;	/* for ENDED: a Unix peer in this process cannot tell an abort from an EOF by its socket */
	if (f->state != ST_STREAM || abort || f->error) {
		flow_end(f, abort || f->error);
		return;
	}
	if (!f->wlen) {
		vse_stream_discard(f);
		flow_end(f, false);
		return;
	}
	if (e->nlinger == VSE_LINGER_MAX)
		vse_flow_reset(TAILQ_FIRST(&e->linger), ETIMEDOUT);
	vse_flow_unhash(f);
	vse_flow_rest(f);
	f->state = ST_LINGER;
	f->linger_until = vse_now_ms() + (e->config.linger_ms ? e->config.linger_ms : VSE_LINGER_MS);
	TAILQ_INSERT_TAIL(&e->linger, f, aux);
	e->nlinger++;
	vse_stream_discard(f);
}

void vse_flow_ready(struct vse_flow *f, uint32_t events)
{
	if (events & (EPOLLIN | EPOLLPRI | EPOLLERR | EPOLLHUP | EPOLLRDHUP))
		f->readable = true;
	if (events & EPOLLPRI)
		vse_urgent_seen(f);
	if (events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP))
		f->hup = true;
	if (events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
		f->writable = true;
	if (f->state == ST_STREAM || f->state == ST_LINGER)
		vse_stream_ready(f, events);
	else if (f->readable)
		vse_flow_run(f);
}

void vse_flows_forget(struct vse_engine *e, bool linger_too)
{
	struct vse_flow *f;

	for (uint32_t i = 0; i < e->config.max_flows; i++)
		if ((f = e->slots[i]) && (linger_too || f->state != ST_LINGER)) {
			if (!f->error && f->state == ST_STREAM)
				f->error = ECONNRESET;
			flow_end(f, true);
		}
}

/* ------------------------------------------------------------------------------------------------------------- answers */

static bool uri_fits(const char *uri)
{
	return !uri || strlen(uri) <= VSO_URI_MAX;
}

/* the descriptor and URIs of an answer; 0, or -errno that leaves the request unanswered */
static int check_answer(const struct vse_flow *f, uint32_t pending, int fd, const char *local, const char *peer)
{
	socklen_t len = sizeof(int);
	int type, fl;

	if (!f || f->pending != pending)
		return -ESTALE;
	if (!uri_fits(local) || !uri_fits(peer))
		return -ENAMETOOLONG;
	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len))
		return -errno;
	if (type != (f->dgram ? SOCK_DGRAM : f->seq ? SOCK_SEQPACKET : SOCK_STREAM))
		return -EPROTOTYPE;
	fl = fcntl(fd, F_GETFL);
	if (fl < 0 || (!(fl & O_NONBLOCK) && fcntl(fd, F_SETFL, fl | O_NONBLOCK)))
		return -errno;
	return 0;
}

static void set_uri(char **at, const char *uri)
{
	free(*at);
	*at = uri ? strdup(uri) : NULL;
}

/* the flow takes fd and becomes `state`; the options of the request apply as far as this kind of socket has them */
static int adopt(struct vse_flow *f, int fd, enum vse_state state)
{
	int old = f->fd, rc = 0;
	bool polled = f->polled;

	f->fd = fd;
	f->polled = false;
	if (state != ST_BOUND)
		rc = vse_flow_poll(f);
	if (rc) {
		f->fd = old;
		f->polled = polled;
		return rc;
	}
	if (old >= 0) {
		if (polled)
			epoll_ctl(f->pair->e->ep, EPOLL_CTL_DEL, old, NULL);
		close(old);
	}
	if (f->opts_len)
		vse_apply_opts(fd, f->opts, f->opts_len);
	free(f->opts);
	f->opts = NULL;
	f->opts_len = 0;
	f->pending = 0;
	f->state = state;
	f->counted = true;
	return 0;
}

/* the flow takes a connected fd, and the driver hears of it; an error leaves both as they were */
int vse_flow_connected(struct vse_flow *f, int fd, const char *local, const char *peer)
{
	struct sockaddr_storage ss;
	socklen_t len = sizeof(ss);
	int rc = adopt(f, fd, f->dgram ? ST_DGRAM : ST_STREAM);

	if (rc)
		return rc;
	if (f->dgram) {
		set_uri(&f->local, local);
		set_uri(&f->peer, peer);
		f->connected = !getpeername(fd, (struct sockaddr *)&ss, &len);
		if (f->ping && !f->addr_only)	/* getpeername() says ENOTCONN of a peer without a port */
			f->connected = !getsockname(fd, (struct sockaddr *)&ss, &len);
		f->six = f->connected && vse_is_six(&ss);
		vse_dgram_begin(f);
	}
	f->pair->e->dialect->answer(f, VSE_EV_CONNECT, VSO_OFFLOAD, 0, local, peer);
	if (!f->dgram)
		vse_stream_begin(f);
	return 0;
}

static int connected(struct vse_flow *f, int fd, const char *local, const char *peer)
{
	int rc = check_answer(f, VSE_EV_CONNECT, fd, local, peer);

	return rc ? rc : vse_flow_connected(f, fd, local, peer);
}

int vse_connected(struct vse_engine *e, uint64_t handle, int fd, const char *local, const char *peer)
{
	int rc;

	vse_lock(e);
	rc = connected(vse_flow_of(e, handle), fd, local, peer);
	if (rc)
		close(fd);
	vse_unlock(e);
	return rc;
}

int vse_connect(struct vse_engine *e, uint64_t handle, int fd, const void *addr, uint32_t addr_len)
{
	char local[VSO_URI_MAX + 1] = "", peer[VSO_URI_MAX + 1] = "";
	struct sockaddr_storage ss = { 0 };
	socklen_t len = sizeof(ss);
	struct vse_flow *f;
	int rc = -ESTALE;

	vse_lock(e);
	f = vse_flow_of(e, handle);
	if (f && f->pending == VSE_EV_CONNECT)
		rc = vse_connect_now(fd, addr, addr_len);
	if (!rc) {
		const char *scheme = f->dgram ? "udp" : "tcp";

		if (!getsockname(fd, (struct sockaddr *)&ss, &len))
			vse_uri_format(local, scheme, &ss);
		memset(&ss, 0, sizeof(ss));
		memcpy(&ss, addr, addr_len < sizeof(ss) ? addr_len : sizeof(ss));
		len = sizeof(ss);
		getpeername(fd, (struct sockaddr *)&ss, &len);	/* fails where it is reset already: then what was asked for */
		vse_uri_format(peer, scheme, &ss);
		rc = connected(f, fd, local, peer);
	}
	if (!rc)
		vse_turn_now(e);
	vse_unlock(e);
	return rc;
}

int vse_bound(struct vse_engine *e, uint64_t handle, int fd, const char *local)
{
	struct vse_flow *f;
	int rc;

	vse_lock(e);
	f = vse_flow_of(e, handle);
	rc = check_answer(f, VSE_EV_BIND, fd, local, NULL);
	if (!rc)
		rc = adopt(f, fd, f->dgram ? ST_DGRAM : ST_BOUND);
	if (rc) {
		close(fd);
	} else {
		f->server = f->dgram;
		if (f->dgram)
			vse_dgram_begin(f);
		set_uri(&f->local, local);
		e->dialect->answer(f, VSE_EV_BIND, VSO_OFFLOAD, 0, local, NULL);
	}
	vse_unlock(e);
	return rc;
}

int vse_refuse(struct vse_engine *e, uint64_t handle, uint32_t verdict, uint32_t error)
{
	struct vse_flow *f;
	int rc = 0;

	vse_lock(e);
	f = vse_flow_of(e, handle);
	if (!f || !f->pending) {
		rc = -ESTALE;
	} else {
		e->dialect->answer(f, f->pending, verdict, error, NULL, NULL);
		f->pending = 0;
		if (f->state == ST_NEW)
			vse_flow_free(f);
	}
	vse_unlock(e);
	return rc;
}

int vse_dup(struct vse_engine *e, uint64_t handle)
{
	struct vse_flow *f;
	int fd = -ESTALE;

	vse_lock(e);
	f = vse_flow_of(e, handle);
	if (f && f->fd < 0)
		fd = -EBADF;
	else if (f && (fd = fcntl(f->fd, F_DUPFD_CLOEXEC, 0)) < 0)
		fd = -errno;
	else if (f)
		f->shared = true;
	vse_unlock(e);
	return fd;
}

int vse_reset_flow(struct vse_engine *e, uint64_t handle, uint32_t error)
{
	struct vse_flow *f;

	vse_lock(e);
	f = vse_flow_of(e, handle);
	if (f)
		vse_flow_reset(f, error);
	vse_unlock(e);
	return f ? 0 : -ESTALE;
}

void vse_reset_all(struct vse_engine *e, bool quiet)
{
	struct vse_flow *f;

	vse_lock(e);
	if (quiet) {
		vse_flows_forget(e, true);
		for (uint32_t i = 0; i < e->config.pairs; i++)
			e->pairs[i].ctl_head = e->pairs[i].ctl_tail = 0;
		e->hello = false;	/* whoever comes next must say HELLO, or its ring breaks instead of going silent */
	} else {
		for (uint32_t i = 0; i < e->config.max_flows; i++)
			if ((f = e->slots[i]))
				vse_flow_reset(f, ECONNRESET);
	}
	vse_unlock(e);
}
