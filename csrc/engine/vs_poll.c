/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_poll - the engine waits awake for what is about to come, where that is shown to be faster.
 *
 * Whoever is woken from sleep pays for it: some 20 us on an idle core, and as much again for the kick that wakes it. Between a question and
 * its answer that happens four times, and is most of the time. So where little moves and the next message is near, the thread may look at the
 * rings and at epoll for up to config.poll_ns before it sleeps, with kicks off: neither the driver nor the host's end then calls anybody.
 *
 * But a thread that spins takes a core, which may be the one that the peer, the driver or another device needs; then all is slower. No
 * figure of this thread's own tells which it is, so it is tried out, on the traffic at hand:
 *
 *	try asleep (one epoch) -> try awake (one epoch) -> keep what was faster (VSE_POLL_KEEP epochs, and twice as many each time that
 *	it is the same again, up to VSE_POLL_KEEP_MAX) -> try asleep ...
 *
 * An epoch is VSE_POLL_WAITS waits, and its rate the messages on the rings for the time that they took. Who asks and waits for the answer goes as
 * fast as answers come, so the rate tells whether it is served sooner. Messages that come at their own pace come at the same rate either way:
 * awake must be faster by a quarter, so nothing is burnt for them. Nor may it move fewer bytes: who looks too often finds them in smaller
 * pieces, which are more messages and no gain. The rates are averages over the tries, a new one counts a half. They say nothing of other traffic: where
 * messages become four times as long or as short as they were on average, waiting the same way, all is forgotten and tried anew.
 *
 * A driver that wants no calls waits awake itself. Then this thread sleeps, whatever the tries say: of two cores one must be left to whoever is asked.
 * Each would have the other find that it does not pay.
 *
 * What counts are waits within a conversation: behind a turn that moved little (bulk needs no help: its turns find work), and no longer than
 * VSE_POLL_PAUSE times that, a pause otherwise, behind which one waits asleep. So an idle engine costs nothing. A stream of small messages has its own way of saving kicks (vs_look.c).
 *
 * All of it is under the lock, but for the wait itself; has_chains() takes it, rings come and go.
 */
#include <sys/epoll.h>

#include "vse_priv.h"

enum {
	VSE_POLL_WAITS = 64,		/* a few milliseconds */
	VSE_POLL_KEEP = 14,		/* so the slower way has one wait in sixteen at first */
	VSE_POLL_KEEP_MAX = 112,	/* and one in some hundred, if it is that for long; a fraction of a second */
	VSE_POLL_UNCALLED = 4,		/* so often a driver wanted no call, and is awake itself */
	VSE_POLL_HEADER = 64,		/* of a message, bytes, about */
	VSE_POLL_PAUSE = 20,		/* times poll_ns; a longer wait is between conversations */
};

/* ------------------------------------------------------------------------------------------------- which way is faster */

/* bytes a ns: headers too, for messages that have nothing else */
static double moved(const struct vse_rate *r)
{
	return r->bytes + r->msgs * VSE_POLL_HEADER;
}

static bool other_traffic(const struct vse_rate *was, const struct vse_rate *is)
{
	double before = moved(was) * is->msgs, after = moved(is) * was->msgs;	/* of a message, times both rates */

	return after > 4 * before || before > 4 * after;
}

/* asleep is tried next, then awake, as at the very beginning */
static void forget(struct vse_poll *p)
{
	p->rate[0] = p->rate[1] = (struct vse_rate){ 0 };
	p->epoch = p->keep = 0;
	p->awake = p->better = false;
}

static void weigh(struct vse_poll *p, const struct vse_rate *now)
{
	struct vse_rate *r = &p->rate[p->awake];
	double old = r->msgs > 0 ? 0.5 : 0;
	bool better;

	r->msgs = r->msgs * old + now->msgs * (1 - old);
	r->bytes = r->bytes * old + now->bytes * (1 - old);
	if (++p->epoch == 2) {
		better = p->rate[1].msgs > p->rate[0].msgs * 1.25 && moved(&p->rate[1]) >= moved(&p->rate[0]);
		p->keep = better != p->better || !p->keep ? VSE_POLL_KEEP : p->keep < VSE_POLL_KEEP_MAX ? p->keep * 2 : VSE_POLL_KEEP_MAX;
		p->awake = p->better = better;
	} else if (p->epoch == 1 || p->epoch == 2 + p->keep) {
		p->epoch %= 2 + p->keep;
		p->awake = p->epoch == 1;
	}
}

/* an epoch is over */
static void learn(struct vse_poll *p)
{
	struct vse_rate now = { (double)p->msgs / (double)p->ns, (double)p->bytes / (double)p->ns };

	if (other_traffic(&p->rate[p->awake], &now))
		forget(p);
	else
		weigh(p, &now);
	p->waits = 0;
	p->msgs = p->bytes = p->ns = 0;
}

static uint64_t bytes_of(const struct vse_engine *e)
{
	return e->stats.to_host + e->stats.to_guest;
}

void vse_poll_called(struct vse_engine *e, bool called)
{
	e->poll.uncalled = called ? 0 : e->poll.uncalled + (e->poll.uncalled < VSE_POLL_UNCALLED);
}

void vse_poll_end(struct vse_engine *e)
{
	uint64_t now, msgs = e->stats.msgs_in + e->stats.msgs_out;
	struct vse_poll *p = &e->poll;

	if (!e->config.poll_ns || p->in_vain)
		return;
	now = vse_now_ns();
	p->near = now - p->seen_ns < (uint64_t)e->config.poll_ns * VSE_POLL_PAUSE && bytes_of(e) - p->seen_bytes <= VSE_LIGHT_BYTES;
	if (p->near) {
		p->ns += now - p->seen_ns;
		p->msgs += msgs - p->seen_msgs;
		p->bytes += bytes_of(e) - p->seen_bytes;
		if (++p->waits == VSE_POLL_WAITS)
			learn(p);
	}
	p->seen_ns = now;
	p->seen_msgs = msgs;
	p->seen_bytes = bytes_of(e);
}

/* ---------------------------------------------------------------------------------------------------------------- a wait */

bool vse_poll_next(const struct vse_engine *e, uint64_t more)
{
	const struct vse_poll *p = &e->poll;

	return p->near && p->awake && !p->in_vain && p->uncalled < VSE_POLL_UNCALLED && bytes_of(e) + more - p->seen_bytes <= VSE_LIGHT_BYTES;
}

bool vse_poll_begin(struct vse_engine *e)
{
	bool awake = vse_poll_next(e, 0);

	e->poll.in_vain = false;
	for (uint32_t i = 0; i < e->config.pairs && awake; i++)
		awake = !e->pairs[i].tx.stream;
	for (uint32_t i = 0; i < e->config.pairs && awake; i++) {
		struct vse_ring *r = &e->pairs[i].tx;

		if (vse_usable(r) && !r->ready) {	/* else it has chains, and waits for something else */
			vs_vq_disable_kick(r->vq);	/* with EVENT_IDX the next one comes all the same, unless vs_in.c did not ask for it */
			r->look = true;
		}
	}
	return awake;
}

static bool has_chains(struct vse_engine *e)
{
	bool any = false;

	vse_lock(e);
	for (uint32_t i = 0; i < e->config.pairs && !any; i++) {
		struct vse_ring *r = &e->pairs[i].tx;

		any = r->look && vse_usable(r) && vs_vq_has_avail(r->vq);
	}
	pthread_mutex_unlock(&e->lock);
	return any;
}

int vse_poll_wait(struct vse_engine *e, struct epoll_event *evs, int max)
{
	uint64_t until = vse_now_ns() + e->config.poll_ns;
	int n;

	while (!(n = epoll_wait(e->ep, evs, max, 0)) && !has_chains(e)) {
		if (vse_now_ns() >= until) {
			e->poll.in_vain = true;		/* the turn that follows enables the kicks, then the thread sleeps */
			break;
		}
	}
	return n;
}
