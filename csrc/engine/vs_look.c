/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_look - streams of messages are looked for, instead of being kicked for.
 *
 * A driver that writes small messages one after the other is slower than we are: each kick finds one or two, and for each of
 * them the guest leaves for its host and a thread here wakes up. Both cost more than the message. So where kicks come in
 * quick succession, the ring is a *stream's*:
 *
 *	                 VSE_QUICK_MIN quick kicks in a row
 *	kicks enabled ----------------------------------------> stream: kicks stay disabled while there are messages; the thread
 *	      ^                                                   |     looks again when VSE_LOOK_NS are over, or earlier if anything else
 *	      +---------------- a look found nothing -------------+     wakes it
 *
 * Quick is a kick within VSE_QUICK_NS of the one before it, with nothing said to the driver in between: who waits for an answer makes no
 * stream, however quick both are, nor does a head and its body. So a message that finds kicks enabled is served at once, as ever, and one of a
 * stream VSE_LOOK_NS later at the latest. When the stream ends there is one look for nothing.
 *
 * Only the thread decides and looks. Whoever else serves such a ring wakes it, unless it will look anyway (vse_settle()).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <time.h>

#include "vse_priv.h"

static void kicked(struct vse_engine *e, struct vse_ring *r)
{
	uint64_t now = vse_now_ns();

	r->quick = now - r->kicked_ns < (e->config.quick_ns ? e->config.quick_ns : VSE_QUICK_NS) && r->kicked_out == e->stats.msgs_out ? r->quick + 1 : 0;
	r->stream = r->quick >= VSE_QUICK_MIN;
	r->kicked_ns = now;
	r->kicked_out = e->stats.msgs_out;
}

void vse_look_begin(void)
{
	prctl(PR_SET_TIMERSLACK, 1000ul);	/* not 50 us, which may double the time of a look */
}

bool vse_look_due(const struct vse_engine *e)
{
	for (uint32_t i = 0; i < e->config.pairs; i++)
		if (e->pairs[i].tx.look)
			return true;
	return false;
}

int vse_look_wait(const struct vse_engine *e, struct epoll_event *evs, int max)
{
	uint32_t ns = e->config.look_ns ? e->config.look_ns : VSE_LOOK_NS;
	const struct timespec look = { .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 };
	int n = epoll_pwait2(e->ep, evs, max, &look, NULL);

	return n < 0 && errno == ENOSYS ? epoll_wait(e->ep, evs, max, 1) : n;	/* Linux before 5.11 */
}

void vse_look_turn(struct vse_engine *e, const struct epoll_event *evs, int n)
{
	for (uint32_t i = 0; i < e->config.pairs; i++) {
		struct vse_ring *r = &e->pairs[i].tx;

		r->ready |= r->look;
		r->look = false;
	}
	for (int i = 0; i < n; i++) {
		uint64_t ring = evs[i].data.u64 >> VSE_SLOT_BITS;

		if ((evs[i].data.u64 & VSE_SLOT_MASK) == VSE_SLOT_KICK && ring & 1 && ring / 2 < e->config.pairs)
			kicked(e, &e->pairs[ring / 2].tx);
	}
}
