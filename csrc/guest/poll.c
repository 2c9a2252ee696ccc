// SPDX-License-Identifier: GPL-2.0-only
/*
 * poll.c - who waits for an answer looks at the ring for a moment before sleeping.
 *
 * An answer that comes at once costs more to be woken for than to wait for: the device calls, the processor leaves its idle state and takes an
 * interrupt, and the scheduler changes tasks twice. So a task that waits serves the ring itself for a while, with the device's calls off, and
 * sleeps only then. It works for everybody whose flows are on that pair, as an interrupt would.
 *
 * Who looks, and how long:
 *
 *   SO_BUSY_POLL, net.core.busy_read       as natively: a receive that finds nothing looks for so many microseconds; one that may not wait, once
 *   net.core.busy_poll                     as natively: poll() and select() look at each of their sockets with SO_BUSY_POLL in turn
 *   neither                                vso_poll_us at most, and only who has asked something: connect() and whatever else the device itself
 *                                          answers, and a receive of a socket that has sent since it last received
 *
 * The last adapts. A look that ends without an answer was for nothing, and the next ones are left out: 1, 3, 7, ... up to 255 after
 * each further one; an answer makes it forget that (struct vso_poll). A flow has a history of its own, but for its first answer, which
 * it has in common with other young ones of its pair; so have requests to the device. Nobody looks while another task could use the processor.
 *
 * The ring still has one reader: the tasklet, which a looker runs by scheduling it where softirqs are off and enabling them. While there are
 * lookers it leaves the device's calls off, and the last one that leaves runs it once more, which enables them with a last look. A looker
 * cannot be preempted, so that calls are not off while nobody looks; it gives way as soon as the scheduler wants it to.
 *
 * Who waits elsewhere, as in epoll_wait(), cannot look; for those idle.c does.
 */
#include <linux/moduleparam.h>
#include <linux/poll.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/sched/signal.h>
#include <linux/sched/stat.h>

#include "vso.h"

#define VSO_POLL_MISSED_MAX	8

unsigned int vso_poll_us = 200;
module_param_named(poll_us, vso_poll_us, uint, 0644);
MODULE_PARM_DESC(poll_us, "microseconds for which who has asked something looks for the answer before sleeping, where that has paid (0: never)");

/** vso_poll_look() - one look at the ring; nothing, once the pair is closed */
void vso_poll_look(struct vso_pair *pair)
{
	spin_lock_bh(&pair->tx_lock);
	if (pair->run)
		tasklet_schedule(&pair->tasklet);
	spin_unlock_bh(&pair->tx_lock);		/* where it runs */
}

/* look until ready() or @us are over. @lone: not while another task could run here */
static bool vso_poll_for(struct vso_sock *vs, unsigned int us, bool lone, bool (*ready)(struct vso_sock *vs, u32 arg), u32 arg)
{
	struct vso_pair *pair = vs->pair;
	bool found;
	u64 end;

	preempt_disable();
	end = local_clock() + (u64)us * NSEC_PER_USEC;
	atomic_inc(&pair->lookers);
	for (;;) {
		vso_poll_look(pair);
		found = ready(vs, arg);
		if (found || need_resched() || signal_pending(current) || (lone && !single_task_running()) || local_clock() >= end)
			break;
		cpu_relax();
	}
	if (atomic_dec_and_test(&pair->lookers))
		vso_poll_look(pair);
	preempt_enable();
	return found;
}

/** vso_poll_pays() - does it pay to look this time? */
bool vso_poll_pays(struct vso_poll *poll)
{
	u8 pass = READ_ONCE(poll->pass);

	if (pass)
		WRITE_ONCE(poll->pass, pass - 1);
	return !pass;
}

/** vso_poll_learn() - a look has ended */
void vso_poll_learn(struct vso_poll *poll, bool found)
{
	u8 missed = found ? 0 : min(READ_ONCE(poll->missed) + 1, VSO_POLL_MISSED_MAX);

	WRITE_ONCE(poll->missed, missed);
	WRITE_ONCE(poll->pass, (1 << missed) - 1);
}

static bool vso_poll_try(struct vso_sock *vs, struct vso_poll *poll, bool (*ready)(struct vso_sock *vs, u32 arg), u32 arg)
{
	unsigned int us = READ_ONCE(vso_poll_us);
	bool found;

	if (IS_ENABLED(CONFIG_PREEMPT_RT) || !us || !single_task_running() || !vso_poll_pays(poll))
		return false;
	found = vso_poll_for(vs, us, true, ready, arg);
	vso_poll_learn(poll, found);
	return found;
}

/** vso_poll_request() - before sleeping for what the device itself answers. Return: ready() */
bool vso_poll_request(struct vso_sock *vs, bool (*ready)(struct vso_sock *vs, u32 arg), u32 arg)
{
	return vso_poll_try(vs, &vs->pair->requests, ready, arg);
}

/** vso_poll_receive() - before sleeping for what the other end sends, or before EAGAIN. Return: ready() */
bool vso_poll_receive(struct vso_sock *vs, const struct sock *sk, bool wait, bool (*ready)(struct vso_sock *vs, u32 arg), u32 arg)
{
#ifdef CONFIG_NET_RX_BUSY_POLL
	unsigned int us = READ_ONCE(sk->sk_ll_usec);

	if (us && !IS_ENABLED(CONFIG_PREEMPT_RT))
		return vso_poll_for(vs, wait ? us : 0, false, ready, arg);
#endif
	if (READ_ONCE(vs->watched) == wait)
		WRITE_ONCE(vs->watched, !wait);
	return wait && READ_ONCE(vs->asked) && vso_poll_try(vs, READ_ONCE(vs->answered_once) ? &vs->poll : &vs->pair->firsts, ready, arg);
}

/** vso_poll_busy() - in a socket's poll operation: it may be its turn to look for net.core.busy_poll */
void vso_poll_busy(struct vso_sock *vs, const struct poll_table_struct *wait)
{
	if (!READ_ONCE(vs->watched))
		WRITE_ONCE(vs->watched, true);
	if (wait && wait->_key & POLL_BUSY_LOOP)
		vso_poll_look(vs->pair);
}
