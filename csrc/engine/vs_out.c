/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_out - messages to the driver.
 *
 * A message goes straight into a chain of the pair's rx ring. A control message that finds none is copied to the pair's control
 * queue, and as long as that holds anything, everything goes behind it: control messages into the queue, while data stays in the
 * host sockets. So the order within each flow is kept. The queue is bounded by what can make it grow: a pair stops reading its
 * driver at VSE_CTL_PAUSE, listeners accept only with a chain in hand, and Python answers each request once.
 */
#include <stdlib.h>
#include <string.h>

#include "vse_priv.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* the iovecs of a chain's readable or writable part without its first `skip` bytes, at most `limit`; returns their bytes */
size_t vse_payload_iov(const struct vs_chain *c, bool writable, size_t skip, size_t limit, struct iovec *iov, int *cnt)
{
	const struct iovec *src = writable ? c->iov + c->n_out : c->iov;
	int n = writable ? c->n_in : c->n_out, k = 0;
	size_t total = 0;

	for (int i = 0; i < n && total < limit; i++) {
		size_t off = MIN(skip, src[i].iov_len), len = MIN(src[i].iov_len - off, limit - total);

		skip -= off;
		if (!len)
			continue;
		iov[k].iov_base = (char *)src[i].iov_base + off;
		iov[k++].iov_len = len;
		total += len;
	}
	*cnt = k;
	return total;
}

struct vs_chain *vse_rx_get(struct vse_pair *p)
{
	struct vse_ring *r = &p->rx;
	struct vs_chain *c = p->e->rx_chain;
	int rc;

	if (!r->vq || r->broken || r->starved)
		return NULL;
	do {
		rc = vs_vq_pop(r->vq, c);
	} while (!rc && vs_vq_enable_kick(r->vq));
	if (!rc) {
		r->starved = true;
		r->dirty = r->dirty || r->late;	/* the driver has no buffer but those */
		return NULL;
	}
	if (rc < 0) {
		vse_ring_break(p->e, r, "%s", vs_vq_error(r->vq)->text);
		return NULL;
	}
	if (c->n_out || c->in_len < p->e->dialect->rx_min) {
		vse_ring_break(p->e, r, "chain %u to the driver has %llu readable and %llu writable bytes, not 0 and %u or more",
			       c->head, (unsigned long long)c->out_len, (unsigned long long)c->in_len, p->e->dialect->rx_min);
		vs_vq_push(r->vq, c, 0);
		r->dirty = true;
		return NULL;
	}
	vse_ring_poll_mem(r, c->mem);
	return c;
}

void vse_rx_put(struct vse_pair *p, struct vs_chain *c, const void *hdr, uint32_t len)
{
	uint32_t hdr_len = p->e->dialect->hdr_len;

	vs_chain_write(c, 0, hdr, hdr_len);
	vs_vq_push(p->rx.vq, c, hdr_len + len);
	p->rx.dirty = true;
	p->e->stats.msgs_out++;
}

void vse_rx_unget(struct vse_pair *p, struct vs_chain *c)
{
	vs_vq_unpop(p->rx.vq, c);
}

/* the chains of a gathering; no batch of the driver's messages is being served meanwhile */
static struct vs_chain *gathered(struct vse_engine *e, int i)
{
	return i ? e->batch[i] : e->rx_chain;
}

static void ungather(struct vse_pair *p, int keep)
{
	while (p->e->n_gathered > keep)
		vs_vq_unpop(p->rx.vq, gathered(p->e, --p->e->n_gathered));
}

/* the room of a chain for one message of the flow's, from iov on: so many bytes in *n pieces */
static size_t room_in(struct vse_engine *e, const struct vs_chain *c, size_t limit, struct iovec *iov, int *n)
{
	size_t len = vse_payload_iov(c, true, e->dialect->hdr_len, MIN(limit, e->max_payload), iov, n);

	for (; *n > VSE_IOV_CALL; --*n)
		len -= iov[*n - 1].iov_len;
	return len;
}

/*
 * Where much follows in other chains, the small last piece of one is left out, as a driver keeps large pieces for the reader, while what is in a small
 * one it copies once more (the guest module's are of 32, 32 and 4 KiB). `len` bytes in *n pieces are the room of the chain, `rest` is what the
 * window has for this chain and others; returns what is left of the room. What is little beside it is worth no message of its own.
 */
static size_t large_of(struct vse_engine *e, const struct vs_chain *c, size_t len, size_t rest, const struct iovec *iov, int *n, size_t *want)
{
	size_t last = *n > 1 ? iov[*n - 1].iov_len : len;

	if (last >= len / 4 || last >= iov[*n - 2].iov_len / 2 || rest < len - last + len / 4 || e->dialect->hdr_len + len != c->in_len)
		return len;
	--*n;
	*want -= MIN(*want, last);	/* no chain more than without this */
	return len - last;
}

/*
 * One chain always, and more for `want` bytes as long as there are any: a driver's buffers may be as small as 4 KiB, and what is in a
 * socket is then read by one call all the same. Only the first may find the ring starved, since the others can do without.
 */
size_t vse_rx_gather(struct vse_pair *p, size_t want, size_t limit, int *cnt)
{
	struct vse_engine *e = p->e;
	struct vs_chain *c = vse_rx_get(p);
	size_t total, len;
	int n, rc;
	bool many;

	if (!c)
		return 0;
	total = room_in(e, c, limit, e->iov, cnt);
	many = want > total && limit > total && !e->serving;
	if (many)
		total = large_of(e, c, total, limit, e->iov, cnt, &want);
	e->rx_len[0] = (uint32_t)total;
	e->n_gathered = 1;
	while (many && total < want && total < limit && e->n_gathered < VSE_BATCH) {
		c = gathered(e, e->n_gathered);
		rc = vs_vq_pop(p->rx.vq, c);
		if (!rc)
			break;
		if (rc < 0) {
			vse_ring_break(e, &p->rx, "%s", vs_vq_error(p->rx.vq)->text);
			ungather(p, 0);		/* nothing may be read into what will not be published */
			return 0;
		}
		if (c->n_out || c->in_len < e->dialect->rx_min || *cnt + c->n_in > VSE_IOV_CALL) {
			vs_vq_unpop(p->rx.vq, c);
			break;
		}
		len = room_in(e, c, limit - total, e->iov + *cnt, &n);
		len = large_of(e, c, len, limit - total, e->iov + *cnt, &n, &want);
		e->rx_len[e->n_gathered++] = (uint32_t)len;
		total += len;
		*cnt += n;
	}
	return total;
}

void vse_rx_gathered(struct vse_flow *f, size_t len)
{
	struct vse_engine *e = f->pair->e;
	union vse_hdr h;
	uint32_t part;
	int i;

	for (i = 0; len; i++) {
		part = (uint32_t)MIN(len, e->rx_len[i]);
		e->dialect->data(f, &h, part, false);
		vse_rx_put(f->pair, gathered(e, i), &h, part);
		len -= part;
	}
	ungather(f->pair, i);
}

static bool ctl_append(struct vse_pair *p, const void *hdr, const void *payload, uint32_t payload_len)
{
	uint32_t hdr_len = p->e->dialect->hdr_len;
	size_t need = (size_t)hdr_len + payload_len, len = p->ctl_tail - p->ctl_head, cap;
	uint8_t *buf;

	if (p->ctl_cap - p->ctl_tail < need && p->ctl_head) {
		memmove(p->ctl, p->ctl + p->ctl_head, len);
		p->ctl_head = 0;
		p->ctl_tail = len;
	}
	if (p->ctl_cap - p->ctl_tail < need) {
		for (cap = p->ctl_cap ? p->ctl_cap : 4096; cap - len < need; cap *= 2)
			;
		buf = realloc(p->ctl, cap);
		if (!buf)
			return false;
		p->ctl = buf;
		p->ctl_cap = cap;
	}
	memcpy(p->ctl + p->ctl_tail, hdr, hdr_len);
	if (payload_len)
		memcpy(p->ctl + p->ctl_tail + hdr_len, payload, payload_len);
	p->ctl_tail += need;
	return true;
}

bool vse_ctl_drain(struct vse_pair *p)
{
	uint32_t hdr_len = p->e->dialect->hdr_len, len;
	struct vs_chain *c;
	union vse_hdr hdr;

	while (!vse_ctl_empty(p)) {
		c = vse_rx_get(p);
		if (!c)
			return false;
		memcpy(&hdr, p->ctl + p->ctl_head, hdr_len);
		len = p->e->dialect->payload_len(&hdr);
		vs_chain_write(c, hdr_len, p->ctl + p->ctl_head + hdr_len, len);
		vse_rx_put(p, c, &hdr, len);
		p->ctl_head += hdr_len + len;
	}
	p->ctl_head = p->ctl_tail = 0;
	return true;
}

void vse_send_late(struct vse_pair *p, const void *hdr)
{
	struct vse_ring *r = &p->rx;
	bool dirty = r->dirty;

	vse_send(p, hdr, NULL, 0);
	if (!r->dirty || dirty || !vse_may_be_late(p->e) || !vse_ctl_empty(p) || ++r->late >= VSE_LATE_MAX)
		return;
	r->dirty = false;
	if (!p->e->late_at)
		p->e->late_at = vse_now_ms() + VSE_LATE_MS;
}

void vse_late_expire(struct vse_engine *e, uint64_t now)
{
	if (!e->late_at || e->late_at > now)
		return;
	e->late_at = 0;
	for (uint32_t i = 0; i < e->config.pairs; i++)
		e->pairs[i].rx.dirty = e->pairs[i].rx.dirty || e->pairs[i].rx.late;
}

void vse_send(struct vse_pair *p, const void *hdr, const void *payload, uint32_t len)
{
	struct vs_chain *c = vse_ctl_empty(p) ? vse_rx_get(p) : NULL;

	if (c) {
		vs_chain_write(c, p->e->dialect->hdr_len, payload, len);
		vse_rx_put(p, c, hdr, len);
	} else if (!ctl_append(p, hdr, payload, len) && p->rx.vq) {
		vse_ring_break(p->e, &p->rx, "no memory for a message to the driver");
	}
}
