/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_window - how much of a stream may be under way to the host.
 *
 * A driver that fills the window (config.buf_alloc) sleeps until the half of it is free. One flow alone is faster with a larger one: the guest sleeps
 * less often, and there is always something to send. But what is in the ring is waited for by whoever comes next. So a window grows for
 * a flow that moves many bytes while nobody else says anything on that pair, and is what it was as soon as somebody does:
 *
 *	it doubles	up to VSE_WINDOW_TIMES config.buf_alloc, each time that its flow has had the pair to itself for config.grow_ns and the host's
 *			socket took half a window at VSE_WINDOW_PACE at least; all flows together may have a quarter of config.buf_total so
 *	it is reset	when half a window was slower than that, or another flow of the pair was heard of meanwhile
 *
 * A driver of virtio-vsock has no more under way than its own buffer holds (Linux since 2026, and 6.1.x): there a larger window would be for nothing.
 *
 * It is looked at when the driver must be told of room anyway, and told with that. A window that the application has chosen (SO_SNDBUF) stays.
 */
#include "vse_priv.h"

enum {
	VSE_WINDOW_TIMES = 4,
	VSE_WINDOW_PACE = 20,		/* bytes a microsecond */
	VSE_GROW_NS = 3000000,		/* config.grow_ns unless set */
};

static void set(struct vse_flow *f, uint32_t grown)
{
	f->pair->e->grown += grown;
	f->pair->e->grown -= f->grown;
	f->buf_alloc += grown - f->grown;
	f->grown = grown;
	if (f->promised < f->buf_alloc)
		f->promised = f->buf_alloc;
}

static void grow(struct vse_flow *f)
{
	const struct vse_config *c = &f->pair->e->config;
	uint64_t most = (uint64_t)c->buf_alloc * VSE_WINDOW_TIMES, more = f->buf_alloc;

	if (f->buf_alloc + more <= most && most <= VSE_BUF_ALLOC_MAX && f->pair->e->grown + more <= c->buf_total / 4)
		set(f, f->grown + (uint32_t)more);
}

void vse_window_heard(struct vse_flow *f)
{
	struct vse_pair *p = f->pair;

	if (p->talks != f->handle) {
		p->talks = f->handle;
		p->alone_ns = 0;
	}
}

void vse_window_adapt(struct vse_flow *f)
{
	uint32_t grow_ns = f->pair->e->config.grow_ns;
	struct vse_pair *p = f->pair;
	bool alone = p->alone_ns;
	uint64_t now, took;

	if (f->fixed || p->e->dialect->capped || grow_ns == VSE_GROW_NEVER)
		return;
	now = vse_now_ns();
	took = now - f->window_ns;
	f->window_ns = now;
	if (!alone)
		p->alone_ns = now;
	if (!alone || (uint64_t)(f->fwd_cnt - f->told) * 1000 < took * VSE_WINDOW_PACE) {
		set(f, 0);
	} else if (now - p->alone_ns >= (grow_ns ? grow_ns : VSE_GROW_NS)) {
		p->alone_ns = now;
		grow(f);
	}
}

void vse_window_fix(struct vse_flow *f)
{
	set(f, 0);
	f->fixed = true;
}
