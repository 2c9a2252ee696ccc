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

bool vse_ctl_empty(const struct vse_pair *p)
{
	return p->ctl_head == p->ctl_tail;
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
		return NULL;
	}
	if (rc < 0) {
		vse_ring_break(p->e, r, "%s", vs_vq_error(r->vq)->text);
		return NULL;
	}
	if (c->n_out || c->in_len < VSO_RX_MIN) {
		vse_ring_break(p->e, r, "chain %u to the driver has %llu readable and %llu writable bytes, not 0 and %u or more",
			       c->head, (unsigned long long)c->out_len, (unsigned long long)c->in_len, VSO_RX_MIN);
		vs_vq_push(r->vq, c, 0);
		r->dirty = true;
		return NULL;
	}
	vse_ring_poll_mem(r, c->mem);
	return c;
}

void vse_rx_put(struct vse_pair *p, struct vs_chain *c, const struct vso_hdr *h)
{
	vs_chain_write(c, 0, h, sizeof(*h));
	vs_vq_push(p->rx.vq, c, (uint32_t)sizeof(*h) + h->len);
	p->rx.dirty = true;
	p->e->stats.msgs_out++;
}

void vse_rx_unget(struct vse_pair *p, struct vs_chain *c)
{
	vs_vq_unpop(p->rx.vq, c);
}

static bool ctl_append(struct vse_pair *p, const struct vso_hdr *h, const void *payload)
{
	size_t need = sizeof(*h) + h->len, len = p->ctl_tail - p->ctl_head, cap;
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
	memcpy(p->ctl + p->ctl_tail, h, sizeof(*h));
	if (h->len)
		memcpy(p->ctl + p->ctl_tail + sizeof(*h), payload, h->len);
	p->ctl_tail += need;
	return true;
}

static bool ctl_drain(struct vse_pair *p)
{
	struct vs_chain *c;
	struct vso_hdr h;

	while (!vse_ctl_empty(p)) {
		c = vse_rx_get(p);
		if (!c)
			return false;
		memcpy(&h, p->ctl + p->ctl_head, sizeof(h));
		vs_chain_write(c, sizeof(h), p->ctl + p->ctl_head + sizeof(h), h.len);
		vse_rx_put(p, c, &h);
		p->ctl_head += sizeof(h) + h.len;
	}
	p->ctl_head = p->ctl_tail = 0;
	return true;
}

void vse_send(struct vse_pair *p, const struct vso_hdr *h, const void *payload)
{
	struct vs_chain *c = vse_ctl_empty(p) ? vse_rx_get(p) : NULL;

	if (c) {
		vs_chain_write(c, sizeof(*h), payload, h->len);
		vse_rx_put(p, c, h);
	} else if (!ctl_append(p, h, payload) && p->rx.vq) {
		vse_ring_break(p->e, &p->rx, "no memory for a message to the driver");
	}
}

struct vso_hdr vse_hdr(const struct vse_flow *f, uint32_t type, uint32_t arg, uint32_t len)
{
	bool stream = f->state == ST_STREAM;

	return (struct vso_hdr){
		.type = (uint16_t)type, .flow = f->id, .len = len, .arg = arg,
		.buf_alloc = stream ? f->buf_alloc : 0, .fwd_cnt = stream ? f->fwd_cnt : 0,
	};
}

void vse_send_flow(struct vse_flow *f, uint32_t type, uint32_t arg)
{
	struct vso_hdr h = vse_hdr(f, type, arg, 0);

	f->told = f->fwd_cnt;
	vse_send(f->pair, &h, NULL);
}

void vse_send_reply(struct vse_pair *p, struct vse_flow *f, uint32_t type, uint32_t id, uint32_t cookie, uint32_t verdict,
		    uint32_t error, const char *local, const char *peer)
{
	uint8_t buf[sizeof(struct vso_reply) + 2 * VSO_URI_MAX];
	size_t local_len = local ? strlen(local) : 0, peer_len = peer ? strlen(peer) : 0;
	struct vso_reply r = { .verdict = verdict, .error = error, .local_len = (uint16_t)local_len, .peer_len = (uint16_t)peer_len };
	struct vso_hdr h = { .type = (uint16_t)type, .flow = id, .cookie = cookie };

	memcpy(buf, &r, sizeof(r));
	memcpy(buf + sizeof(r), local ? local : "", local_len);
	memcpy(buf + sizeof(r) + local_len, peer ? peer : "", peer_len);
	h.len = (uint32_t)(sizeof(r) + local_len + peer_len);
	if (f && f->state == ST_STREAM) {
		h.buf_alloc = f->buf_alloc;
		h.fwd_cnt = f->told = f->fwd_cnt;
	}
	vse_send(p, &h, buf);
}

void vse_rx_pump(struct vse_pair *p)
{
	uint64_t sent = p->e->stats.msgs_out;
	enum vse_turn rc = TURN_DONE;
	struct vse_flow *f;

	if (!ctl_drain(p))
		return;
	while (rc != TURN_STARVED && (f = TAILQ_FIRST(&p->runq)) && p->e->stats.msgs_out - sent < VSE_BATCH) {
		switch (f->state) {
		case ST_STREAM: rc = vse_stream_turn(f); break;
		case ST_LISTEN: rc = vse_listen_turn(f); break;
		case ST_DGRAM: rc = vse_dgram_turn(f); break;
		default: rc = TURN_DONE;
		}
		if (rc == TURN_DONE) {
			vse_flow_rest(f);
		} else if (rc == TURN_AGAIN && f->queued) {
			vse_flow_rest(f);
			vse_flow_run(f);
		}
		/* let the driver work on it while the next flow is served; the call is its EVENT_IDX's decision */
		if (p->rx.dirty && vs_vq_flush(p->rx.vq) < 0)
			vse_ring_break(p->e, &p->rx, "%s", vs_vq_error(p->rx.vq)->text);
		p->rx.dirty = false;
	}
}
