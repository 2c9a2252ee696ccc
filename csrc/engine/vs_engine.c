/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_engine - the engine's thread and its rings.
 *
 * The thread sleeps in epoll_wait without the lock. Awake, it takes the lock, turns what epoll said into flags (a ring is ready, a
 * flow is readable), and gives every pair one turn: a batch of messages from the driver, then what its flows have for the
 * driver, then one flush of each ring. A turn is bounded, so the lock is free again soon; while work is left the next
 * epoll_wait has no timeout. What it does instead of sleeping, when more is about to come: vs_look.c and vs_poll.c.
 *
 * Everything in epoll is edge-triggered and registered once, so the data path makes no epoll_ctl call and no read of a kick
 * eventfd: each write to an eventfd is a new edge (fs/eventfd.c wakes on every signal), whatever its count.
 *
 * Calls from other threads do their work themselves, under the lock, messages to the driver included, and wake the thread only
 * if something is left to do: a thread hop costs more than the work.
 */
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "vse_priv.h"

uint64_t vse_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

uint64_t vse_now_ms(void)
{
	return vse_now_ns() / 1000000;
}

static int fail(struct vs_err *err, int code, const char *what)
{
	if (err) {
		err->code = code;
		snprintf(err->text, sizeof(err->text), "%s: %s", what, strerror(code));
	}
	return -code;
}

/* ------------------------------------------------------------------------------------------------------------ the lock */

/*
 * A mutex does not queue its waiters, and the thread takes it again at once while it is busy: others would starve. So there is a
 * gate. Who waits for the lock holds the gate, and the thread, which always comes through the gate, waits behind them.
 */
static void lock_in_turn(struct vse_engine *e)
{
	pthread_mutex_lock(&e->gate);
	pthread_mutex_lock(&e->lock);
	pthread_mutex_unlock(&e->gate);
}

void vse_lock(struct vse_engine *e)
{
	/* who has the lock already must not wait at the gate: whoever is in it waits for the lock */
	if (pthread_mutex_trylock(&e->lock))
		lock_in_turn(e);
}

static void unlock(struct vse_engine *e)
{
	pthread_mutex_unlock(&e->lock);
}

/* --------------------------------------------------------------------------------------------------------------- rings */

void vse_ring_break(struct vse_engine *e, struct vse_ring *r, const char *fmt, ...)
{
	char text[VS_ERR_LEN];
	va_list ap;

	if (r->broken)
		return;
	r->broken = true;	/* nor is what this turn filled published: only a guest with a broken driver, and no reset, can notice */
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (r->mem && vs_mem_poisoned(r->mem))	/* what looks like a broken rule are the zeros that were read instead */
		snprintf(text, sizeof(text), "the guest memory was truncated under its mapping");
	if (r->vq)
		vs_vq_break(r->vq, EPROTO, text);	/* nothing, if it is the ring's own error that is being told */
	vse_event(e, VSE_EV_BROKEN, NULL, r->index, r->vq ? (uint32_t)vs_vq_error(r->vq)->code : EPROTO, text, (uint32_t)strlen(text));
}

/* remember the memory of a chain of this turn; the chain itself gives it up when it is pushed */
void vse_ring_poll_mem(struct vse_ring *r, struct vs_mem *mem)
{
	if (!r->mem && mem)
		r->mem = vs_mem_get(mem);
}

void vse_ring_publish(struct vse_engine *e, struct vse_ring *r)
{
	int rc = vs_vq_flush(r->vq);

	r->dirty = false;
	r->late = 0;
	if (rc < 0)
		vse_ring_break(e, r, "%s", vs_vq_error(r->vq)->text);
	else if (!(r->index & 1))
		vse_poll_called(e, rc);
}

static void ring_flush(struct vse_engine *e, struct vse_ring *r)
{
	bool poisoned = r->mem && vs_mem_poisoned(r->mem);

	if (poisoned && r->vq)
		vse_ring_break(e, r, "poisoned");
	if (r->mem) {
		vs_mem_put(r->mem);
		r->mem = NULL;
	}
	if (poisoned) {
		/* bytes were read as zeros that the guest never wrote: no stream that touched them may end cleanly */
		vse_flows_forget(e, true);
	}
	if (r->dirty && r->vq)
		vse_ring_publish(e, r);
}

static void flush_all(struct vse_engine *e)
{
	for (uint32_t i = 0; i < e->config.pairs; i++) {
		ring_flush(e, &e->pairs[i].tx);
		ring_flush(e, &e->pairs[i].rx);
	}
}

static bool tx_work(const struct vse_pair *p)
{
	return p->tx.ready && vse_usable(&p->tx) && vse_tx_open(p);
}

static bool has_work(const struct vse_engine *e)
{
	for (uint32_t i = 0; i < e->config.pairs; i++)
		if (tx_work(&e->pairs[i]) || vse_rx_work(&e->pairs[i]))
			return true;
	return false;
}

void vse_settle(struct vse_engine *e)
{
	vse_flows_reap(e);
	flush_all(e);
	/* lingering flows need no look: only the thread itself makes them */
	if (e->sleeping && (has_work(e) || e->retry_at || (!e->looking && vse_look_due(e)))) {
		e->sleeping = false;
		vse_signal(e->wake_fd);
	}
}

void vse_unlock(struct vse_engine *e)
{
	vse_settle(e);
	unlock(e);
}

struct vse_ring *vse_ring_of(struct vse_engine *e, uint32_t ring)
{
	if (ring / 2 >= e->config.pairs)
		return NULL;
	return ring & 1 ? &e->pairs[ring / 2].tx : &e->pairs[ring / 2].rx;
}

int vse_ring_attach(struct vse_engine *e, uint32_t ring, struct vs_vq *vq, int kick_fd, struct vs_err *err)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET, .data.u64 = (uint64_t)ring << VSE_SLOT_BITS | VSE_SLOT_KICK };
	struct vse_ring *r = vse_ring_of(e, ring);
	int rc = 0;

	if (!r)
		return fail(err, EINVAL, "attach a ring of a pair that the engine does not have");
	vse_lock(e);
	if (r->vq)
		rc = fail(err, EBUSY, "attach a ring that is attached");
	else if (e->stopped)
		rc = fail(err, ESHUTDOWN, "attach a ring to a stopped engine");
	else if (kick_fd >= 0 && epoll_ctl(e->ep, EPOLL_CTL_ADD, kick_fd, &ev))
		rc = fail(err, errno, "poll the kick fd");
	if (!rc) {
		r->vq = vq;
		r->kick_fd = kick_fd;
		r->broken = r->starved = r->dirty = r->stream = r->look = false;
		r->ready = true;	/* a kick may have come before */
		vs_vq_disable_kick(vq);
		vse_ipx_resume(e);
	}
	vse_unlock(e);
	return rc;
}

static void detach(struct vse_engine *e, struct vse_ring *r)
{
	if (!r->vq)
		return;
	r->dirty = r->dirty || r->late;
	ring_flush(e, r);
	if (r->kick_fd >= 0)
		epoll_ctl(e->ep, EPOLL_CTL_DEL, r->kick_fd, NULL);
	r->vq = NULL;
	r->ready = r->starved = r->dirty = r->stream = r->look = false;
	r->late = 0;
}

void vse_ring_detach(struct vse_engine *e, uint32_t ring)
{
	struct vse_ring *r = vse_ring_of(e, ring);

	if (!r)
		return;
	vse_lock(e);
	detach(e, r);
	vse_unlock(e);
}

/* ---------------------------------------------------------------------------------------------------------- the thread */

static void turn(struct vse_engine *e, const struct epoll_event *evs, int n)
{
	uint64_t now;

	vse_polled(e, evs, n);
	for (uint32_t i = 0; i < e->config.pairs; i++) {
		struct vse_pair *p = &e->pairs[i];

		if (tx_work(p)) {
			vse_tx_batch(p);
			ring_flush(e, &p->tx);
		}
		if (vse_rx_work(p))
			vse_rx_pump(p);
	}
	if (e->retry_at || e->tell_at || e->late_at || !TAILQ_EMPTY(&e->linger)) {
		now = vse_now_ms();
		vse_late_expire(e, now);
		if (e->tell_at && e->tell_at <= now)
			vse_tell(e);
		vse_listen_retry(e, now);
		vse_linger_expire(e, now);
	}
	vse_flows_reap(e);
	flush_all(e);
}

void vse_turn_now(struct vse_engine *e)
{
	struct epoll_event evs[VSE_EPOLL_BATCH];
	int n = epoll_wait(e->ep, evs, VSE_EPOLL_BATCH, 0);

	if (n > 0)
		turn(e, evs, n);
}

/* the earlier of two deadlines; 0 is none */
static uint64_t sooner(uint64_t one, uint64_t other)
{
	return !one || (other && other < one) ? other : one;
}

/* how long epoll_wait may sleep: not at all with work left, else until the next deadline */
static int sleep_ms(struct vse_engine *e)
{
	struct vse_flow *f = TAILQ_FIRST(&e->linger);
	uint64_t until, now;

	if (has_work(e))
		return 0;
	until = sooner(sooner(e->retry_at, f ? f->linger_until : 0), sooner(e->tell_at, e->late_at));
	if (!until)
		return -1;
	now = vse_now_ms();
	return until <= now ? 0 : (int)(until - now);
}

static void *thread_main(void *arg)
{
	struct vse_engine *e = arg;
	struct epoll_event evs[VSE_EPOLL_BATCH];
	int n, timeout;
	bool awake;

	vse_look_begin();
	lock_in_turn(e);
	while (!atomic_load_explicit(&e->stopping, memory_order_relaxed)) {
		timeout = sleep_ms(e);
		awake = timeout && vse_poll_begin(e);
		e->looking = (e->sleeping = timeout != 0) && vse_look_due(e);
		unlock(e);
		if (awake)
			n = vse_poll_wait(e, evs, VSE_EPOLL_BATCH);
		else
			n = e->looking ? vse_look_wait(e, evs, VSE_EPOLL_BATCH) : epoll_wait(e->ep, evs, VSE_EPOLL_BATCH, timeout);
		lock_in_turn(e);
		e->sleeping = e->looking = false;
		e->stats.wakeups += !awake;
		vse_poll_end(e);
		vse_look_turn(e, evs, n);
		turn(e, evs, n);
	}
	unlock(e);
	return NULL;
}

/* ----------------------------------------------------------------------------------------------------- life and figures */

static int check_config(const struct vse_config *c, struct vs_err *err)
{
	if (c->pairs < 1 || c->pairs > 128)
		return fail(err, EINVAL, "pairs must be 1..128");
	if (c->max_flows < 1 || c->max_flows > VSE_FLOWS_CAP)
		return fail(err, EINVAL, "max_flows must be 1..1048576");
	if (c->buf_alloc < 1 || c->buf_alloc > VSE_BUF_ALLOC_MAX)
		return fail(err, EINVAL, "buf_alloc must be 1..2^30 bytes");
	if (!vse_routes_valid(c))
		return fail(err, EINVAL, "more than 1024 routes, or a target that is no address");
	if (c->nr_hints > VSO_HINTS_MAX)
		return fail(err, EINVAL, "a driver takes at most 50 hints");
	if (c->hairpin[VSO_NETNS_MAX])
		return fail(err, EINVAL, "the name for hairpin must be shorter");
	if (c->dialect != VSE_OFFLOAD && c->dialect != VSE_VSOCK)
		return fail(err, EINVAL, "no such dialect");
	if (c->dialect == VSE_VSOCK && (c->pairs != 1 || c->guest_cid <= VSK_CID_HOST || c->guest_cid >= UINT32_MAX))
		return fail(err, EINVAL, "vsock has one ring pair and a guest_cid of 3..2^32-2");
	return 0;
}

struct vse_engine *vse_new(const struct vse_config *config, struct vs_err *err)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET, .data.u64 = VSE_SLOT_WAKE };
	pthread_mutexattr_t attr;
	struct vse_engine *e;
	uint32_t i, buckets = 64;

	if (check_config(config, err))
		return NULL;
	e = calloc(1, sizeof(*e));
	if (!e)
		goto nomem;
	e->config = *config;
	e->config.routes = NULL;
	e->config.ports = NULL;
	e->dialect = config->dialect == VSE_VSOCK ? &vse_vsock : &vse_vso;
	e->ep = e->wake_fd = e->event_fd = -1;
	e->max_payload = VSO_PAYLOAD_MAX;	/* vsock has no limit of its own: this bounds what one read may take */
	e->ev_last = &e->ev_first;
	TAILQ_INIT(&e->linger);
	TAILQ_INIT(&e->stalled);
	TAILQ_INIT(&e->gone);
	pthread_mutex_init(&e->gate, NULL);
	/* recursive: a caller that holds vse_lock() to change a ring may attach and detach it, too */
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_RECURSIVE);
	pthread_mutex_init(&e->lock, &attr);
	pthread_mutexattr_destroy(&attr);

	while (buckets < config->max_flows && buckets < 65536)
		buckets *= 2;
	e->hash_mask = buckets - 1;
	e->hash = calloc(buckets, sizeof(*e->hash));
	e->slots = calloc(config->max_flows, sizeof(*e->slots));
	e->free_slots = calloc(config->max_flows, sizeof(*e->free_slots));
	e->pairs = calloc(config->pairs, sizeof(*e->pairs));
	e->rx_chain = vs_chain_new();
	if (!e->hash || !e->slots || !e->free_slots || !e->pairs || !e->rx_chain)
		goto nomem;
	for (i = 0; i < VSE_BATCH; i++)
		if (!(e->batch[i] = vs_chain_new()))
			goto nomem;
	if (!vse_routes_copy(e, config))
		goto nomem;
	/* the lowest slot is taken first */
	for (i = config->max_flows; i > 0; i--)
		e->free_slots[e->nfree++] = i - 1;
	for (i = 0; i < config->pairs; i++) {
		struct vse_pair *p = &e->pairs[i];

		p->e = e;
		p->rx.index = 2 * i;
		p->tx.index = 2 * i + 1;
		TAILQ_INIT(&p->runq);
		TAILQ_INIT(&p->lightq);
	}

	e->ep = epoll_create1(EPOLL_CLOEXEC);
	e->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	e->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (e->ep < 0 || e->wake_fd < 0 || e->event_fd < 0 || epoll_ctl(e->ep, EPOLL_CTL_ADD, e->wake_fd, &ev)) {
		fail(err, errno, "make the engine's epoll and event fds");
		vse_free(e);
		return NULL;
	}
	return e;
nomem:
	fail(err, ENOMEM, "make the engine");
	vse_free(e);
	return NULL;
}

int vse_start(struct vse_engine *e, struct vs_err *err)
{
	sigset_t all, old;
	int rc;

	if (e->started || e->stopped)
		return fail(err, EALREADY, "start an engine that was started");
	sigfillset(&all);
	/* a fault in guest memory must reach its handler: a blocked SIGBUS kills the process (vs_mem.h) */
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGILL);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	e->started = true;	/* before there is a thread that reads it */
	rc = pthread_create(&e->thread, NULL, thread_main, e);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc) {
		e->started = false;
		return fail(err, rc, "start the engine's thread");
	}
	return 0;
}

void vse_stop(struct vse_engine *e)
{
	if (e->stopped)
		return;
	if (e->started) {
		atomic_store(&e->stopping, true);
		vse_signal(e->wake_fd);
		pthread_join(e->thread, NULL);
	}
	/* the driver learns it from RESET where a ring has room; whatever is left is forgotten */
	vse_reset_all(e, false);
	vse_lock(e);
	e->stopped = true;
	vse_flows_forget(e, true);
	for (uint32_t i = 0; i < e->config.pairs; i++) {
		detach(e, &e->pairs[i].rx);
		detach(e, &e->pairs[i].tx);
	}
	unlock(e);
}

void vse_free(struct vse_engine *e)
{
	if (!e)
		return;
	if (e->pairs && e->slots)
		vse_stop(e);
	vse_events_free(e);
	vse_ipx_close(e);
	for (int i = 0; i < VSE_BATCH; i++)
		if (e->batch[i])
			vs_chain_free(e->batch[i]);
	if (e->rx_chain)
		vs_chain_free(e->rx_chain);
	for (uint32_t i = 0; e->pairs && i < e->config.pairs; i++)
		free(e->pairs[i].ctl);
	vse_routes_free(e);
	free(e->pairs);
	free(e->hash);
	free(e->slots);
	free(e->free_slots);
	if (e->ep >= 0)
		close(e->ep);
	if (e->wake_fd >= 0)
		close(e->wake_fd);
	if (e->event_fd >= 0)
		close(e->event_fd);
	pthread_mutex_destroy(&e->lock);
	pthread_mutex_destroy(&e->gate);
	free(e);
}

void vse_get_stats(struct vse_engine *e, struct vse_stats *out)
{
	vse_lock(e);
	*out = e->stats;
	out->flows = e->config.max_flows - e->nfree;
	unlock(e);
}
