/* SPDX-License-Identifier: BSD-3-Clause */
/* See load.h. The driver's side of the rings: the messages of the offload protocol (vso_abi.h) and the packets of vsock (vsock_abi.h). */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "load_priv.h"
#include "vso_abi.h"
#include "vsock_abi.h"

/* ------------------------------------------------------------------------------------------------------- messages, driver to device */

static uint8_t *slot_at(const struct drv *d, uint32_t slot)
{
	return d->ram + (d->buffers - d->gpa) + (uint64_t)slot * d->stride;
}

static int await_call(struct load *l, struct drv *a, struct drv *b)
{
	struct pollfd p[2] = { { .fd = a->call_fd, .events = POLLIN }, { .fd = b ? b->call_fd : -1, .events = POLLIN } };
	uint64_t n;

	if (poll(p, 2, LOAD_PATIENCE) < 1)
		return load_fail(l, "the device made no call");
	for (int i = 0; i < 2; i++)
		if (p[i].revents && read(p[i].fd, &n, sizeof(n)) < 0 && errno != EAGAIN)
			return load_fail(l, "read of a call fd: %s", strerror(errno));
	a->calls++;
	return 0;
}

uint32_t load_tx_room(struct load *l, const struct load_flow *f)
{
	struct drv *d = &l->pair[load_index(l, f) % l->pairs].tx;

	drv_collect(d);
	return d->n_free;
}

/* one message: a header and len bytes of payload (NULL: whatever is in the buffer). The kick follows with load_kick(). 0, or -1 */
static int post(struct load *l, uint32_t pair, const void *head, uint32_t head_len, const void *payload, uint32_t len)
{
	struct { uint64_t addr; uint32_t len; uint16_t flags, next; } *desc;
	struct drv *d = &l->pair[pair].tx;
	uint32_t slot;
	uint8_t *at;

	while (!d->n_free && !drv_collect(d)) {
		drv_kick(d);
		if (!drv_want_calls(d) && await_call(l, d, NULL))
			return -1;
		drv_no_calls(d);
	}
	slot = d->free[d->n_free - 1];
	at = slot_at(d, slot);
	memcpy(at, head, head_len);
	if (payload)
		memcpy(at + LOAD_HEAD, payload, len);
	desc = (void *)(d->ram + (d->desc - d->gpa));
	desc += slot * 2;
	desc[0].len = head_len;
	desc[0].flags = len ? 1 : 0;	/* NEXT */
	desc[1].len = len;
	drv_offer(d, 1);
	l->messages_out++;
	return 0;
}

void load_kick(struct load *l)
{
	for (uint32_t i = 0; i < l->pairs && l->kind != LOAD_SOCKETS; i++)
		drv_kick(&l->pair[i].tx);
}

int load_say_vso(struct load *l, struct load_flow *f, uint32_t type, uint32_t arg, const void *payload, uint32_t len)
{
	struct vso_hdr h = {
		.type = (uint16_t)type, .flow = f->id, .len = len, .arg = arg, .buf_alloc = LOAD_WINDOW, .fwd_cnt = f->fwd_cnt,
		.cookie = ++l->cookie,
	};

	f->told = f->fwd_cnt;
	return post(l, load_index(l, f) % l->pairs, &h, sizeof(h), payload, len);
}

int load_say_vsock(struct load *l, struct load_flow *f, uint32_t op, uint32_t flags, const void *payload, uint32_t len)
{
	struct vsk_hdr h = {
		.src_cid = l->cid, .dst_cid = VSK_CID_HOST, .src_port = f->id, .dst_port = f->port, .len = len,
		.type = VSK_TYPE_STREAM, .op = (uint16_t)op, .flags = flags, .buf_alloc = LOAD_WINDOW, .fwd_cnt = f->fwd_cnt,
	};

	f->told = f->fwd_cnt;
	return post(l, load_index(l, f) % l->pairs, &h, sizeof(h), payload, len);
}

static int say_credit(struct load *l, struct load_flow *f)
{
	return l->kind == LOAD_OFFLOAD ? load_say_vso(l, f, VSO_CREDIT, 0, NULL, 0) : load_say_vsock(l, f, VSK_OP_CREDIT_UPDATE, 0, NULL, 0);
}

/* ------------------------------------------------------------------------------------------------------- messages, device to driver */

/* data of a ring: handed on at once, and told of as Linux's virtio-vsock does, and as our module does (half of the window) */
static int got_data(struct load *l, struct load_flow *f, const uint8_t *data, uint32_t len)
{
	uint32_t behind;

	if (load_got(l, f, data, len))
		return -1;
	f->fwd_cnt += len;
	behind = f->fwd_cnt - f->told;
	if (l->kind == LOAD_OFFLOAD ? behind >= LOAD_WINDOW / 2 : LOAD_WINDOW - behind < LOAD_PIECE)
		return say_credit(l, f);
	return 0;
}

static int on_vso(struct load *l, const uint8_t *at)
{
	const struct vso_hdr *h = (const void *)at;
	const struct vso_reply *r = (const void *)(at + sizeof(*h));
	struct load_flow *f = &l->flows[(h->flow & 0xffff) % l->n_flows];

	if (!h->flow) {
		l->reply = h->arg;
		l->reply_seen = h->type;
		return 0;
	}
	if (f->id != h->flow)
		return load_fail(l, "message %u for flow %x", h->type, h->flow);
	if (h->type != VSO_CLOSED) {
		f->peer_alloc = h->buf_alloc;
		f->peer_fwd = h->fwd_cnt;
	}
	switch (h->type) {
	case VSO_DATA:
		return got_data(l, f, at + sizeof(*h), h->len);
	case VSO_CREDIT:
		return 0;
	case VSO_CONNECT_REPLY:
		if (r->verdict || r->error)
			return load_fail(l, "CONNECT_REPLY: verdict %u, error %u", r->verdict, r->error);
		f->state = LOAD_OPEN;
		return 0;
	case VSO_SHUTDOWN:
		f->state = LOAD_ENDED;
		return 0;
	case VSO_CLOSED:
		f->state = LOAD_NONE;
		return 0;
	default:
		return load_fail(l, "message %u, error %u", h->type, h->arg);
	}
}

static int on_vsock(struct load *l, const uint8_t *at)
{
	const struct vsk_hdr *h = (const void *)at;
	struct load_flow *f = &l->flows[(h->dst_port & 0xffff) % l->n_flows];

	if (f->id != h->dst_port || f->state == LOAD_NONE) {
		if (h->op == VSK_OP_RST)
			return 0;
		if (f->id != h->dst_port)
			return load_fail(l, "op %u for port %x", h->op, h->dst_port);
		return load_say_vsock(l, f, VSK_OP_RST, 0, NULL, 0);	/* it crossed our last word; as Linux */
	}
	if (h->op != VSK_OP_RST) {
		f->peer_alloc = h->buf_alloc;
		f->peer_fwd = h->fwd_cnt;
	}
	switch (h->op) {
	case VSK_OP_RW:
		return got_data(l, f, at + sizeof(*h), h->len);
	case VSK_OP_CREDIT_UPDATE:
		return 0;
	case VSK_OP_CREDIT_REQUEST:
		return say_credit(l, f);
	case VSK_OP_RESPONSE:
		f->state = LOAD_OPEN;
		return 0;
	case VSK_OP_SHUTDOWN:
		if (f->state == LOAD_CLOSING)
			return 0;
		f->state = LOAD_ENDED;
		if ((h->flags & LOAD_BOTH) != LOAD_BOTH)
			return 0;
		f->state = LOAD_NONE;	/* as Linux: nothing is left to say but this */
		return load_say_vsock(l, f, VSK_OP_RST, 0, NULL, 0);
	case VSK_OP_RST:
		if (f->state == LOAD_OPENING || f->want > f->got)
			return load_fail(l, "RST");
		f->state = LOAD_NONE;
		return 0;
	default:
		return load_fail(l, "op %u", h->op);
	}
}

/* take what there is from one ring; messages, or -1 */
static int take(struct load *l, uint32_t pair)
{
	struct drv *d = &l->pair[pair].rx;
	uint32_t n = drv_collect(d);

	for (uint32_t i = d->n_free - n; i < d->n_free; i++) {
		const uint8_t *at = slot_at(d, d->free[i]);

		if (l->kind == LOAD_OFFLOAD ? on_vso(l, at) : on_vsock(l, at))
			return -1;
	}
	l->messages_in += n;
	if (n) {
		drv_offer(d, n);
		drv_kick(d);
	}
	return (int)n;
}

int load_pump_rings(struct load *l, int wait)
{
	struct pollfd p[2 * LOAD_PAIRS];
	int total = 0, n, ready = 0;
	uint64_t count;

	for (uint32_t i = 0; i < l->pairs; i++) {
		n = take(l, i);
		if (n < 0)
			return -1;
		total += n;
	}
	load_kick(l);
	if (total || !wait)
		return total;
	for (uint32_t i = 0; i < l->pairs; i++) {
		ready |= drv_want_calls(&l->pair[i].rx);
		p[2 * i] = (struct pollfd){ .fd = l->pair[i].rx.call_fd, .events = POLLIN };
		p[2 * i + 1] = (struct pollfd){ .fd = -1 };
		if (!l->pair[i].tx.n_free) {
			/* who waits may wait for room */
			ready |= drv_collect(&l->pair[i].tx) || drv_want_calls(&l->pair[i].tx);
			p[2 * i + 1] = (struct pollfd){ .fd = l->pair[i].tx.call_fd, .events = POLLIN };
		}
	}
	if (!ready && poll(p, 2 * l->pairs, LOAD_PATIENCE) < 1)
		return load_fail(l, "the device made no call");
	for (uint32_t i = 0; i < l->pairs; i++) {
		for (int k = 0; !ready && k < 2; k++)
			if (p[2 * i + k].revents && read(p[2 * i + k].fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
				return load_fail(l, "read of a call fd: %s", strerror(errno));
		l->pair[i].rx.calls += !ready;
		drv_no_calls(&l->pair[i].rx);
		drv_no_calls(&l->pair[i].tx);
	}
	return 0;
}

int load_hello(struct load *l, const void *payload, uint32_t len)
{
	struct vso_hdr h = { .type = VSO_HELLO, .len = len };

	if (post(l, 0, &h, sizeof(h), payload, len))
		return -1;
	for (l->reply_seen = 0; l->reply_seen != VSO_HELLO_REPLY;)
		if (load_pump_rings(l, 1) < 0)
			return -1;
	return (int)l->reply;
}
