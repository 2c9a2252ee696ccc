/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_in - chains from the driver, a batch at a time.
 *
 * Each chain is one message: a header of the dialect, then payload, in any layout of descriptors. First every header of the batch is
 * copied and checked, then the dialect serves them in order, several together where it can, and they are completed. Together go the
 * data of one flow, also when other flows' data and credit stand between: flows have no order among each other. What stands
 * behind a malformed message is not served: the ring is broken there.
 *
 * For the same reason a small message need not wait for the large ones of other flows. What is behind more than VSE_POLL_BYTES in a
 * batch goes before all others if it is small and its flow's first, up to a message that is about more than bytes. And whenever
 * VSE_POLL_BYTES went to the host, the batch is looked at again before it goes on:
 *
 *	what was served is completed, so that a driver whose ring is full can say more
 *	what light flows (vs_turn.c) have for the driver goes to it
 *	what the driver has said meanwhile joins the batch, up to VSE_BATCH_MOST chains in all: the turn must end
 *
 * Once the ring is seen empty kicks are asked for, before the batch is served: what comes then is looked for in the next turn at the latest.
 */
#include "vse_priv.h"

/* copy the header of batch[i] and check it and the chain */
static bool header_ok(struct vse_engine *e, int i)
{
	const struct vs_chain *c = e->batch[i];
	uint32_t hdr_len = e->dialect->hdr_len;

	return !c->n_in && vs_chain_read(c, 0, &e->hdrs[i], hdr_len) == hdr_len && e->dialect->well_formed(e, i);
}

/* what header_ok() found wrong */
static void break_on_header(struct vse_pair *p, int i)
{
	const struct vs_chain *c = p->e->batch[i];

	if (c->n_in)
		vse_ring_break(p->e, &p->tx, "chain %u from the driver has %u writable buffers", c->head, c->n_in);
	else if (c->out_len < p->e->dialect->hdr_len)
		vse_ring_break(p->e, &p->tx, "chain %u has %llu bytes, less than a header", c->head,
			       (unsigned long long)c->out_len);
	else
		p->e->dialect->complain(p, i);
}

/* the first bytes of flows which are a few, behind many of others */
static void serve_light(struct vse_pair *p, int end)
{
	uint64_t flow[VSE_BATCH], ahead = 0;
	struct vse_engine *e = p->e;
	uint32_t len[VSE_BATCH];
	int n, k;

	for (n = 0; n < end && e->dialect->plain(e, n, &flow[n], &len[n]); n++)
		;
	for (int i = 0; i < n && !p->tx.broken; i++) {
		ahead += len[i];
		if (!len[i] || len[i] > VSE_LIGHT_MSG || ahead <= VSE_POLL_BYTES || e->served >> i & 1)
			continue;
		for (k = 0; k < i && flow[k] != flow[i]; k++)
			;
		if (k == i)
			e->dialect->serve(p, i, end);
	}
}

/* in order, up to VSE_POLL_BYTES to the host. False: nothing is left */
static bool serve_some(struct vse_pair *p, int end)
{
	struct vse_engine *e = p->e;
	uint64_t sent = e->stats.to_host;

	for (int i = 0; i < end && !p->tx.broken; i++) {
		if (e->served >> i & 1)
			continue;
		if (e->stats.to_host - sent >= VSE_POLL_BYTES)
			return true;
		e->dialect->serve(p, i, end);
		e->served |= 1ull << i;
	}
	return false;
}

/* complete what was served; the others move up, *end of them and what is behind. How many are left */
static int complete(struct vse_pair *p, int n, int *end)
{
	struct vse_engine *e = p->e;
	int left = 0, good = *end;

	for (int i = 0; i < n; i++) {
		struct vs_chain *c = e->batch[i];

		if (e->served >> i & 1) {
			vs_vq_push(p->tx.vq, c, 0);
			*end -= i < good;
			continue;
		}
		e->batch[i] = e->batch[left];
		e->batch[left] = c;
		e->hdrs[left++] = e->hdrs[i];
	}
	e->served = 0;
	vse_ring_publish(e, &p->tx);
	return left;
}

/* are there small messages behind more than VSE_POLL_BYTES of others? */
static bool small_behind(const struct vse_engine *e, int end)
{
	uint64_t bytes = 0;

	for (int i = 0; i < end; i++) {
		uint64_t len = e->batch[i]->out_len;

		if (bytes > VSE_POLL_BYTES && len <= VSE_LIGHT_MSG + e->dialect->hdr_len)
			return true;
		bytes += len;
	}
	return false;
}

static uint64_t bytes_of_batch(const struct vse_engine *e, int n)
{
	uint64_t bytes = 0;

	for (int i = 0; i < n; i++)
		bytes += e->batch[i]->out_len;
	return bytes;
}

/* the ring is empty, after so many, which the batch is */
static void ask_for_kicks(struct vse_pair *p, int popped)
{
	struct vse_ring *r = &p->tx;

	r->stream = r->stream && popped;
	if (r->stream || (vse_poll_next(p->e, 0) && vse_poll_next(p->e, bytes_of_batch(p->e, popped)))) {
		r->ready = false;
		r->look = true;
	} else {
		r->ready = vs_vq_enable_kick(r->vq);
		if (r->ready)
			vs_vq_disable_kick(r->vq);
	}
}

static_assert(VSE_BATCH <= 64, "e->served has a bit for each chain");

void vse_tx_batch(struct vse_pair *p)
{
	int n = 0, end = 0, total = 0, most, rc = 1;
	struct vse_engine *e = p->e;
	struct vse_ring *r = &p->tx;
	bool more, asked = false;

	e->served = 0;
	e->serving = true;
	do {
		most = vse_tx_open(p) ? VSE_BATCH_MOST : total;
		for (; end == n && n < VSE_BATCH && total < most && (rc = vs_vq_pop(r->vq, e->batch[n])) == 1; n++, total++) {
			vse_ring_poll_mem(r, e->batch[n]->mem);
			if (header_ok(e, n))
				end++;
		}
		if (!rc && !asked) {
			ask_for_kicks(p, n);
			asked = true;
		}
		if (small_behind(e, end))
			serve_light(p, end);
		more = serve_some(p, end) && !r->broken;
		if (more) {
			n = complete(p, n, &end);
			vse_poll_light(e);
		}
	} while (more && vse_usable(r));
	e->serving = false;
	if (end < n)
		break_on_header(p, end);
	else if (rc < 0)
		vse_ring_break(e, r, "%s", vs_vq_error(r->vq)->text);
	for (int i = 0; i < n; i++)
		vs_vq_push(r->vq, e->batch[i], 0);
	e->stats.msgs_in += (uint64_t)(total - (n - end));
	r->dirty = r->dirty || n;
}
