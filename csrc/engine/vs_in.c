/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_in - chains from the driver, a batch at a time.
 *
 * Each chain is one message: a header of the dialect, then payload, in any layout of descriptors. First every header of the batch is
 * copied and checked, then the dialect serves them in order, several together where it can, then all chains are completed. Together go the
 * data of one flow, also when other flows' data and credit stand between: flows have no order among each other. What stands
 * behind a malformed message is not served: the ring is broken there.
 *
 * For the same reason a small message need not wait for the large ones of other flows. What is behind more than VSE_POLL_BYTES in a
 * batch goes before all others if it is small and its flow's first, up to a message that is about more than bytes. And whenever
 * VSE_POLL_BYTES went to the host, what light flows (vs_turn.c) have for the driver goes to it before the batch goes on.
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

static void serve_all(struct vse_pair *p, int end)
{
	struct vse_engine *e = p->e;
	uint64_t sent = e->stats.to_host;

	for (int i = 0; i < end && !p->tx.broken; i++) {
		if (e->served >> i & 1)
			continue;
		if (e->stats.to_host - sent >= VSE_POLL_BYTES) {
			vse_poll_light(e);
			sent = e->stats.to_host;
		}
		e->dialect->serve(p, i, end);
	}
}

static_assert(VSE_BATCH <= 64, "e->served has a bit for each chain");

void vse_tx_batch(struct vse_pair *p)
{
	struct vse_engine *e = p->e;
	struct vse_ring *r = &p->tx;
	uint64_t bytes = 0;
	bool small = false;
	int n, i, end, rc = 1;

	for (n = 0; n < VSE_BATCH && (rc = vs_vq_pop(r->vq, e->batch[n])) == 1; n++)
		vse_ring_poll_mem(r, e->batch[n]->mem);
	r->stream = r->stream && n;
	if (!rc && (r->stream || vse_poll_next(e))) {
		r->ready = false;
		r->look = true;
	} else if (!rc) {
		r->ready = vs_vq_enable_kick(r->vq);
		if (r->ready)
			vs_vq_disable_kick(r->vq);
	}
	for (end = 0; end < n && header_ok(e, end); end++) {
		uint64_t len = e->batch[end]->out_len;

		small = small || (bytes > VSE_POLL_BYTES && len <= VSE_LIGHT_MSG + e->dialect->hdr_len);
		bytes += len;
	}
	e->stats.msgs_in += (uint64_t)end;
	e->served = 0;
	e->serving = true;
	if (small)
		serve_light(p, end);
	serve_all(p, end);
	e->serving = false;
	if (end < n)
		break_on_header(p, end);
	else if (rc < 0)
		vse_ring_break(e, r, "%s", vs_vq_error(r->vq)->text);
	for (i = 0; i < n; i++)
		vs_vq_push(r->vq, e->batch[i], 0);
	r->dirty = r->dirty || n;
}
