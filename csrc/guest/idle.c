// SPDX-License-Identifier: GPL-2.0-only
/*
 * idle.c - a processor that has nothing to do looks at the ring for a moment.
 *
 * A server that waits in epoll_wait() for all of its sockets is in nobody's hands but the kernel's, so it cannot look for itself (poll.c). A
 * task of each processor, which runs only where no other wants to (SCHED_IDLE), does it, for vso_poll_us after something was asked there:
 *
 *   asleep    nobody has asked, or looking has not paid lately (struct vso_poll, as in poll.c)
 *   looks     the device's calls are off. It stops where the scheduler wants it to, with calls on again
 *   ready     some other task runs, mostly the one that a message has woken. It asks again, sleeps, and the look goes on, without another wake-up.
 *             If it runs for longer than the look, that was one in vain
 *
 * Whether others want to run is the scheduler's business alone: SCHED_IDLE has three parts in a thousand of what they have. To ask for the number of tasks would not do: since
 * Linux 6.12 those that have just gone to sleep may count.
 *
 * What counts as asking: sending, shutting down, closing, a connect() that does not wait and an accept(), of sockets that are watched: whose program last
 * used poll() and its kin, or received without waiting. Whoever waits in a call looks there instead, and would not if this task were in the way.
 *
 * Each processor's struct vso_idle is its own: it is touched there alone, and only by tasks, with preemption off.
 */
#include <linux/percpu.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/smpboot.h>
#include <uapi/linux/sched/types.h>

#include "vso.h"

/**
 * struct vso_idle - what one processor looks for
 * @until: when it gives up, local_clock()
 * @pairs: where it was asked, a bit for each
 * @on: the task looks, or is ready
 * @found: something came since the last time that it was asked
 * @poll: has it paid?
 */
struct vso_idle {
	u64 until;
	unsigned long pairs;
	bool on;
	bool found;
	struct vso_poll poll;
};

static_assert(VSO_PAIRS_MAX <= BITS_PER_LONG);

static DEFINE_PER_CPU(struct vso_idle, vso_idles);
static DEFINE_PER_CPU(struct task_struct *, vso_idle_tasks);

/** vso_idle_ask() - something was asked on this pair, and whoever waits for the answer will not look for it */
void vso_idle_ask(struct vso_pair *pair)
{
	unsigned int us = READ_ONCE(vso_poll_us);
	struct vso_idle *idle;

	if (IS_ENABLED(CONFIG_PREEMPT_RT) || !us || in_interrupt())
		return;
	idle = get_cpu_ptr(&vso_idles);
	if (idle->on || vso_poll_pays(&idle->poll)) {
		idle->until = local_clock() + (u64)us * NSEC_PER_USEC;
		idle->pairs |= BIT(pair - pair->dev->pair);
		idle->found = false;
		if (!idle->on) {
			idle->on = true;
			wake_up_process(__this_cpu_read(vso_idle_tasks));
		}
	}
	put_cpu_ptr(&vso_idles);
}

/* messages that came on these pairs so far */
static u32 vso_idle_came(const struct vso_dev *dev, unsigned long pairs)
{
	unsigned int i;
	u32 came = 0;

	for_each_set_bit(i, &pairs, dev->nr_pairs)
		came += READ_ONCE(dev->pair[i].came);
	return came;
}

/* look until somebody else wants to run, or the time is over. Return: whether it is. Preemption is off */
static bool vso_idle_look(struct vso_dev *dev, struct vso_idle *idle)
{
	unsigned long pairs = idle->pairs;
	u32 came = vso_idle_came(dev, pairs);
	unsigned int i;
	bool over;

	for_each_set_bit(i, &pairs, dev->nr_pairs)
		atomic_inc(&dev->pair[i].lookers);
	do {
		for_each_set_bit(i, &pairs, dev->nr_pairs)
			vso_poll_look(&dev->pair[i]);
		idle->found |= vso_idle_came(dev, pairs) != came;
		over = local_clock() >= idle->until;
		cpu_relax();
	} while (!over && !need_resched());
	for_each_set_bit(i, &pairs, dev->nr_pairs)
		if (atomic_dec_and_test(&dev->pair[i].lookers))
			vso_poll_look(&dev->pair[i]);
	return over;
}

static int vso_idle_wanted(unsigned int cpu)
{
	return per_cpu(vso_idles, cpu).on;
}

/* once for each time that others let it run, so that it can be parked in between */
static void vso_idle_run(unsigned int cpu)
{
	struct vso_dev *dev = vso_dev_get();
	struct vso_idle *idle;

	idle = get_cpu_ptr(&vso_idles);
	if (!dev || vso_idle_look(dev, idle)) {
		vso_poll_learn(&idle->poll, idle->found);
		idle->pairs = 0;
		idle->on = false;
	}
	put_cpu_ptr(&vso_idles);
	if (dev)
		vso_dev_put(dev);
	cond_resched();
}

static void vso_idle_setup(unsigned int cpu)
{
	static const struct sched_attr attr = { .sched_policy = SCHED_IDLE };

	sched_setattr_nocheck(current, &attr);
}

static struct smp_hotplug_thread vso_idle_threads = {
	.store = &vso_idle_tasks,
	.setup = vso_idle_setup,
	.thread_should_run = vso_idle_wanted,
	.thread_fn = vso_idle_run,
	.thread_comm = "vso-idle/%u",
};

int vso_idle_init(void)
{
	return smpboot_register_percpu_thread(&vso_idle_threads);
}

void vso_idle_exit(void)
{
	smpboot_unregister_percpu_thread(&vso_idle_threads);
}
