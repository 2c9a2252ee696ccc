/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_in - chains from the driver, a batch at a time.
 *
 * Each chain is one message: a header of the dialect, then payload, in any layout of descriptors. First every header of the batch is
 * copied and checked, then the dialect serves them in order, several together where it can, then all chains are completed. Together go the
 * data of one flow, also when other flows' data and credit stand between: flows have no order among each other. What stands
 * behind a malformed message is not served: the ring is broken there.
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

static_assert(VSE_BATCH <= 64, "e->served has a bit for each chain");

void vse_tx_batch(struct vse_pair *p)
{
	struct vse_engine *e = p->e;
	struct vse_ring *r = &p->tx;
	int n, i, end, rc = 1;

	for (n = 0; n < VSE_BATCH && (rc = vs_vq_pop(r->vq, e->batch[n])) == 1; n++)
		vse_ring_poll_mem(r, e->batch[n]->mem);
	r->stream = r->stream && n;
	if (!rc && r->stream) {
		r->ready = false;
		r->look = true;
	} else if (!rc) {
		r->ready = vs_vq_enable_kick(r->vq);
		if (r->ready)
			vs_vq_disable_kick(r->vq);
	}
	for (end = 0; end < n && header_ok(e, end); end++)
		;
	e->stats.msgs_in += (uint64_t)end;
	e->served = 0;
	for (i = 0; i < end && !r->broken; i++)
		if (!(e->served >> i & 1))
			e->dialect->serve(p, i, end);
	if (end < n)
		break_on_header(p, end);
	else if (rc < 0)
		vse_ring_break(e, r, "%s", vs_vq_error(r->vq)->text);
	for (i = 0; i < n; i++)
		vs_vq_push(r->vq, e->batch[i], 0);
	r->dirty = r->dirty || n;
}
