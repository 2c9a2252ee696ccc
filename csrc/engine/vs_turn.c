/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_turn - whose turn it is to say something to the driver.
 *
 * A flow that may have something is on one of its pair's two queues. Heavy is one whose last turn moved more than VSE_LIGHT_BYTES or did not
 * come to an end; every other is light: one that answers a question now and then, or a new one. Light flows go first, so that an
 * answer does not wait for VSE_TURN_BYTES of each flow that moves many; and a light turn is short, so nobody is light for long who is not.
 * What light flows may take from heavy ones is bounded: after VSE_LIGHT_TURNS of them a heavy flow has its turn, which is about as many
 * bytes. Within a queue it goes round. A flow that finds no chain keeps its place, and the queue waits for the rx kick.
 *
 * Host sockets are looked at again after each VSE_POLL_BYTES, either way, for who became ready meanwhile. Where that is in the middle of a
 * batch of the driver's messages (vs_in.c) light flows have a turn, and no others: it shall not take long.
 */
#include <sys/epoll.h>
#include <unistd.h>

#include "vse_priv.h"

/* *moved grows by the bytes that it gave */
static enum vse_turn take_turn(struct vse_flow *f, uint64_t *moved)
{
	uint64_t before = f->to_guest;
	enum vse_turn rc = TURN_DONE;

	switch (f->state) {
	case ST_STREAM: rc = vse_stream_turn(f); break;
	case ST_LISTEN: rc = vse_listen_turn(f); break;
	case ST_DGRAM: rc = vse_dgram_turn(f); break;
	default: break;
	}
	*moved += f->to_guest - before;
	if (rc != TURN_STARVED) {
		bool again = rc == TURN_AGAIN && f->queue;

		vse_flow_rest(f);
		f->heavy = again || f->to_guest - before > VSE_LIGHT_BYTES;
		if (again)
			vse_flow_run(f);
	}
	return rc;
}

static struct vse_flow *whose_turn(struct vse_pair *p)
{
	struct vse_flow *light = TAILQ_FIRST(&p->lightq), *heavy = TAILQ_FIRST(&p->runq);

	if (light && (!heavy || p->light_turns < VSE_LIGHT_TURNS)) {
		p->light_turns += !!heavy;
		return light;
	}
	p->light_turns = 0;
	return heavy;
}

/* the driver may work on what it has */
static void tell(struct vse_pair *p)
{
	if (p->rx.dirty)
		vse_ring_publish(p->e, &p->rx);
}

void vse_rx_pump(struct vse_pair *p)
{
	uint64_t sent = p->e->stats.msgs_out, moved = 0, told = 0;
	bool light = false;
	struct vse_flow *f;

	if (!vse_ctl_empty(p) && !vse_ctl_drain(p))
		return;
	while (p->e->stats.msgs_out - sent < VSE_BATCH && moved < VSE_POLL_BYTES && (f = whose_turn(p))) {
		/* enough to work on while the next flows are served, or an answer before what is much */
		if (moved - told >= VSE_CALL_BYTES || (light && f->heavy)) {
			tell(p);
			told = moved;
		}
		light = !f->heavy;
		if (take_turn(f, &moved) == TURN_STARVED)
			return;
	}
}

static void pump_light(struct vse_pair *p)
{
	struct vse_flow *f, *next;
	uint64_t moved = 0;
	int turns = 0;

	if (!vse_ctl_empty(p) && !vse_ctl_drain(p))
		return;
	for (f = TAILQ_FIRST(&p->lightq); f && turns < VSE_LIGHT_TURNS; f = next) {
		next = TAILQ_NEXT(f, run);
		if (!f->readable)
			continue;	/* it has a window to tell of, and the driver is not to be called for each */
		turns++;
		if (take_turn(f, &moved) == TURN_STARVED)
			break;
	}
	tell(p);	/* the end of the turn is far */
}

static void kicked(struct vse_engine *e, uint32_t ring)
{
	struct vse_ring *r = vse_ring_of(e, ring);

	if (!r || !r->vq)
		return;
	vs_vq_disable_kick(r->vq);
	r->ready = true;
	r->starved = false;
	vse_ipx_resume(e);
}

void vse_polled(struct vse_engine *e, const struct epoll_event *evs, int n)
{
	for (int i = 0; i < n; i++) {
		uint64_t data = evs[i].data.u64;
		uint32_t slot = data & VSE_SLOT_MASK;
		struct vse_flow *f;
		uint64_t count;

		if (slot == VSE_SLOT_KICK)
			kicked(e, (uint32_t)(data >> VSE_SLOT_BITS));
		else if (slot == VSE_SLOT_WAKE) {
			if (read(e->wake_fd, &count, sizeof(count)) < 0)
				continue;
		} else if (slot == VSE_SLOT_IPX) {
			vse_ipx_turn(e);
		} else if ((f = vse_flow_of(e, data)))	/* else: ended earlier in this batch */
			vse_flow_ready(f, evs[i].events);
	}
}

void vse_poll_light(struct vse_engine *e)
{
	struct epoll_event evs[VSE_EPOLL_BATCH];
	int n = epoll_wait(e->ep, evs, VSE_EPOLL_BATCH, 0);

	vse_polled(e, evs, n);
	for (uint32_t i = 0; i < e->config.pairs; i++)
		if (vse_rx_work(&e->pairs[i]))
			pump_light(&e->pairs[i]);
}
