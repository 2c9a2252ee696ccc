/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * See load.h. Bulk flows with one that asks beside them.
 *
 * Rings: all of it is one loop, as a guest with one processor. The one who asks comes first in each turn, and the bulk flows each post a message,
 * so that what an answer waits for in here is some hundred instructions a flow. Sockets: bulk and questions are two mixes, each in a
 * thread, as programs of the host are; nothing here makes one wait for the other.
 */
#include <sys/epoll.h>

#include "far.h"
#include "load_priv.h"
#include "program.h"

struct question {
	struct far_request request;
	uint8_t bytes[LOAD_PIECE / 64];
};

static int is_over(const struct load_mix *m)
{
	return __atomic_load_n(m->over, __ATOMIC_RELAXED);
}

static void end(struct load_mix *m)
{
	__atomic_store_n(m->over, 1, __ATOMIC_RELAXED);
}

static int ask(struct load *l, const struct load_mix *m)
{
	struct load_flow *f = &l->flows[m->asker];
	struct question q = { .request = { FAR_ECHO, m->question, m->question } };

	f->want = m->question;
	f->got = 0;
	if (load_put_all(l, f, &q, sizeof(q.request) + m->question))
		return -1;
	load_kick(l);
	return 0;
}

/* questions and nothing else */
static int only_ask(struct load *l, struct load_mix *m)
{
	while (!is_over(m) && m->asked < m->most) {
		int64_t before = now();

		if (ask(l, m) || load_await(l, &l->flows[m->asker], m->question))
			return -1;
		if (!is_over(m))
			m->each[m->asked++] = (uint32_t)MIN(now() - before, UINT32_MAX);
	}
	return 0;
}

static int begin_bulk(struct load *l, const struct load_mix *m)
{
	for (uint32_t i = m->first; i < m->first + m->count; i++) {
		struct load_flow *f = &l->flows[i];

		f->left = m->to_host ? m->amount : 0;
		f->want = m->to_host ? sizeof(f->answer) : m->amount;
		if (load_request(l, f, m->to_host ? FAR_SINK : FAR_SOURCE, m->size, m->amount))
			return -1;
	}
	load_kick(l);
	return 0;
}

/*
 * A message of each flow that has one; bytes that were taken, or -1. It is over when one is through. A ring that has some room goes to those whose turn it
 * is, as tasks that wait for it would have it in a guest.
 */
static int64_t send_bulk(struct load *l, struct load_mix *m)
{
	uint32_t turn = m->turn;
	int64_t moved = 0;

	for (uint32_t i = 0; m->to_host && i < m->count; i++) {
		uint32_t at = (turn + i) % m->count;
		struct load_flow *f = &l->flows[m->first + at];
		ssize_t n;

		if (!f->left || (l->kind == LOAD_SOCKETS && f->watched & EPOLLOUT))
			continue;
		n = load_put(l, f, NULL, MIN(f->left, m->size));
		if (n < 0)
			return -1;
		moved += n;
		m->turn = n ? (at + 1) % m->count : m->turn;
		f->left -= (uint64_t)n;
		if (!f->left)
			end(m);
	}
	return moved;
}

/* bytes that every flow still has to move; notes whether one is through */
static uint64_t left(struct load *l, struct load_mix *m)
{
	uint64_t total = 0, each;

	for (uint32_t i = m->first; i < m->first + m->count; i++) {
		each = m->to_host ? l->flows[i].left : l->flows[i].want - l->flows[i].got;
		total += each;
		if (!each)
			end(m);
	}
	return total;
}

static void note(struct load *l, struct load_mix *m, int64_t start)
{
	m->took = now() - start;
	for (uint32_t i = 0; i < m->count; i++) {
		const struct load_flow *f = &l->flows[m->first + i];

		m->moved[i] = m->to_host ? m->amount - f->left : f->got;
	}
}

static int bulk(struct load *l, struct load_mix *m, int64_t start)
{
	struct load_flow *asker = m->asker < l->n_flows ? &l->flows[m->asker] : NULL;
	int64_t before = 0, moved;
	int noted = 0, asking = 0;

	if (begin_bulk(l, m))
		return -1;
	while (left(l, m)) {
		if (!noted && is_over(m)) {
			note(l, m, start);
			noted = 1;
		}
		if (asking && asker->got == asker->want) {
			asking = 0;
			if (!noted)
				m->each[m->asked++] = (uint32_t)MIN(now() - before, UINT32_MAX);
		}
		if (asker && !asking && !noted && m->asked < m->most) {
			before = now();
			asking = 1;
			if (ask(l, m))
				return -1;
		}
		moved = send_bulk(l, m);
		/* as load_send() */
		if (moved < 0 || ((!moved || l->kind != LOAD_SOCKETS) && load_pump(l, !moved) < 0))
			return -1;
	}
	if (!noted)
		note(l, m, start);
	if (load_all_got(l, m->first, m->count) || (asking && load_await(l, asker, m->question)))
		return -1;
	for (uint32_t i = m->first; m->to_host && i < m->first + m->count; i++)
		if (l->flows[i].answer != m->amount)
			return load_fail(l, "the far end of flow %u got %llu bytes", i, (unsigned long long)l->flows[i].answer);
	return 0;
}

int64_t load_mix(struct load *l, struct load_mix *m)
{
	int64_t start = now();

	m->asked = m->turn = 0;
	if (m->asker < l->n_flows && (m->question > sizeof(((struct question *)0)->bytes) || (m->count && l->kind == LOAD_SOCKETS)))
		return load_fail(l, "a mix that is none");
	if (m->count ? bulk(l, m, start) : only_ask(l, m))
		return -1;
	if (!m->count)
		m->took = now() - start;
	return now() - start;
}
