/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_sigbus - a load or store in memory that the front-end truncated must not kill the process.
 *
 * Each mapping is registered as a guard. When a SIGBUS comes from an address inside one, the handler puts anonymous zero pages
 * over the whole guard, so that the interrupted instruction completes, and marks it poisoned; the owner finds out at its next
 * vs_mem_poisoned(). Everything else goes to the handler that was there before us (Python's faulthandler, a sanitizer, or the
 * default, which kills).
 *
 * Guards live in chunks that are never freed, because the handler walks them without a lock while other threads add and remove.
 * A guard's address range is published under a sequence count: odd while it changes. The handler skips a guard that changes
 * under its eyes. That is right, not only safe: the faulting thread holds a reference on the region that it touches, so the
 * guard it looks for is the one that cannot be changing.
 *
 * A thread that touches guest memory must not block SIGBUS: the kernel answers a blocked synchronous signal by killing the process.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "vs_mem_priv.h"

struct vs_guard {
	atomic_uint seq;		/* odd: start and end are being changed */
	atomic_uintptr_t start, end;	/* [start, end), both 0 when unused */
	atomic_bool poisoned;
	bool used;			/* under lock */
};

enum { CHUNK = 64 };

struct chunk {
	struct vs_guard guard[CHUNK];
	_Atomic(struct chunk *) next;
};

static struct chunk first;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;	/* guards: used, and who may write a guard or a next */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct sigaction previous;				/* written before the handler can run */

atomic_uint vs_guards_poisoned;

static struct vs_guard *guard_at(uintptr_t addr)
{
	for (struct chunk *c = &first; c; c = atomic_load_explicit(&c->next, memory_order_acquire)) {
		for (int i = 0; i < CHUNK; i++) {
			struct vs_guard *g = &c->guard[i];
			unsigned int seq = atomic_load_explicit(&g->seq, memory_order_acquire);
			uintptr_t start = atomic_load_explicit(&g->start, memory_order_relaxed);
			uintptr_t end = atomic_load_explicit(&g->end, memory_order_relaxed);

			/* pairs with the release fence in guard_set */
			atomic_thread_fence(memory_order_acquire);
			if ((seq & 1) || seq != atomic_load_explicit(&g->seq, memory_order_relaxed))
				continue;
			if (addr >= start && addr < end)
				return g;
		}
	}
	return NULL;
}

/* under lock */
static void guard_set(struct vs_guard *g, uintptr_t start, uintptr_t end)
{
	unsigned int seq = atomic_load_explicit(&g->seq, memory_order_relaxed);

	atomic_store_explicit(&g->seq, seq + 1, memory_order_relaxed);
	/* pairs with the acquire fence in guard_at: who sees a new start or end sees the odd count too */
	atomic_thread_fence(memory_order_release);
	atomic_store_explicit(&g->start, start, memory_order_relaxed);
	atomic_store_explicit(&g->end, end, memory_order_relaxed);
	atomic_store_explicit(&g->seq, seq + 2, memory_order_release);
}

static bool cover(uintptr_t addr)
{
	struct vs_guard *g = guard_at(addr);
	uintptr_t start, end;

	if (!g)
		return false;
	start = atomic_load_explicit(&g->start, memory_order_relaxed);
	end = atomic_load_explicit(&g->end, memory_order_relaxed);
	/* a plain system call in Linux, so safe in a handler; a second thread that faults here at once does the same again */
	if (mmap((void *)start, end - start, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
		 -1, 0) == MAP_FAILED)
		return false;
	if (!atomic_exchange(&g->poisoned, true))
		atomic_fetch_add(&vs_guards_poisoned, 1);
	return true;
}

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	int saved = errno;

	/* si_code above 0: the kernel raised it, for si_addr */
	if (info->si_code > 0 && cover((uintptr_t)info->si_addr)) {
		errno = saved;
		return;
	}
	if (previous.sa_flags & SA_SIGINFO) {
		previous.sa_sigaction(sig, info, context);
	} else if (previous.sa_handler == SIG_IGN && info->si_code <= 0) {
		/* somebody's kill(), which was to be ignored */
	} else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
		previous.sa_handler(sig);
	} else {
		signal(sig, SIG_DFL);	/* the instruction faults again and ends the process; a kill() needs repeating */
		if (info->si_code <= 0)
			raise(sig);
	}
	errno = saved;
}

static void install(void)
{
	struct sigaction sa = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };

	sigemptyset(&sa.sa_mask);
	sigaction(SIGBUS, NULL, &previous);
	sigaction(SIGBUS, &sa, NULL);
}

struct vs_guard *vs_guard_add(void *start, size_t len)
{
	struct vs_guard *g = NULL;
	struct chunk *c = &first;

	pthread_once(&once, install);
	pthread_mutex_lock(&lock);
	for (;;) {
		struct chunk *next;

		for (int i = 0; i < CHUNK && !g; i++)
			if (!c->guard[i].used)
				g = &c->guard[i];
		if (g)
			break;
		next = atomic_load_explicit(&c->next, memory_order_relaxed);
		if (!next) {
			next = calloc(1, sizeof(*next));
			if (!next)
				break;
			/* pairs with the acquire in guard_at: the chunk is zeroed before it is seen */
			atomic_store_explicit(&c->next, next, memory_order_release);
		}
		c = next;
	}
	if (g) {
		g->used = true;
		atomic_store(&g->poisoned, false);
		guard_set(g, (uintptr_t)start, (uintptr_t)start + len);
	}
	pthread_mutex_unlock(&lock);
	return g;
}

void vs_guard_del(struct vs_guard *g)
{
	pthread_mutex_lock(&lock);
	guard_set(g, 0, 0);
	if (atomic_exchange(&g->poisoned, false))
		atomic_fetch_sub(&vs_guards_poisoned, 1);
	g->used = false;
	pthread_mutex_unlock(&lock);
}

bool vs_guard_poisoned(const struct vs_guard *g)
{
	return atomic_load_explicit(&g->poisoned, memory_order_acquire);
}
