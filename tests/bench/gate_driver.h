/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * gate_driver - the guest's side for the gate: an engine, its two rings, and a driver of either dialect, all on one thread.
 *
 * The rings are as a Linux guest has them: split, EVENT_IDX, an indirect table for each chain, buffers of the sizes that the guest module (or
 * Linux's vsock driver) posts, interrupts after each visit. gate.c includes vs_engine.c before this, and the engine's turns are made by
 * hand, so the same is done in the same order each time. What is counted is between count_begin() and count_end(): the engine's part
 * of a turn, never the driver's.
 */
#ifndef GATE_DRIVER_H
#define GATE_DRIVER_H

#include <stdio.h>
#include <sys/mman.h>
#include <valgrind/callgrind.h>

#define MUST(x) do { if (!(x)) { fprintf(stderr, "gate: line %d: %s (errno %d)\n", __LINE__, #x, errno); exit(1); } } while (0)

enum {
	NUM = 256, TX_SLOTS = 64, RX_SLOTS = 32, SLOT = 72 << 10, FLOWS = 8, WINDOW = 256 << 10, HEAD_MAX = 64,
	DESC_INDIRECT = 4, DESC_WRITE = 2, DESC_NEXT = 1,
	/* of ring r at r << 20: the parts of the ring, a table for each slot, then the slots */
	AVAIL_AT = 0x1000, USED_AT = 0x2000, TABLES_AT = 0x4000, BUFFERS_AT = 0x8000, RING_SIZE = 8 << 20, RAM = 2 * RING_SIZE,
	GPA = 0x100000
};

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

struct ring {
	struct vs_vq *vq;
	int kick, call;
	uint8_t *at;
	uint16_t avail, used, kicked;
	uint16_t free[TX_SLOTS];
	uint32_t nfree;
};

struct flow {
	uint32_t id;
	int host;			/* the host's end */
	uint32_t sent, dev_fwd, dev_alloc, got, told;
	bool open, closed;
};

static struct {
	bool vsock, counting;
	struct vse_engine *e;
	struct vs_mem *mem;
	struct ring rings[2];		/* to the driver, from it */
	struct flow flows[FLOWS];
	uint32_t nflows, next_id, accepted, dgrams;
	uint64_t handle;		/* of the last event */
} g;

/* ------------------------------------------------------------------------------------------------------------- the count */

/*
 * The C library chooses these by what the processor can do, and their counts are the processor's then. In the program itself they are
 * found first, and a byte that is copied costs the same everywhere. KEEP keeps a compiler from making a call of memcpy() of the loop.
 */
#define KEEP __asm__ volatile("" ::: "memory")

void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
	uint8_t *t = to;
	const uint8_t *f = from;

	for (; n >= 8; n -= 8, t += 8, f += 8) {
		KEEP;
		*(uint64_t __attribute__((aligned(1), may_alias)) *)t = *(const uint64_t __attribute__((aligned(1), may_alias)) *)f;
	}
	while (n--) {
		KEEP;
		*t++ = *f++;
	}
	return to;
}

void *memset(void *to, int byte, size_t n)
{
	for (uint8_t *t = to; n--;) {
		KEEP;
		*t++ = (uint8_t)byte;
	}
	return to;
}

/* the marks are for the system calls, which callgrind counts everywhere or nowhere: gate.py finds both in Valgrind's log */
static void count_begin(void)
{
	if (g.counting) {
		VALGRIND_PRINTF("gate: begin\n");
		CALLGRIND_TOGGLE_COLLECT;
	}
}

static void count_end(void)
{
	if (g.counting) {
		CALLGRIND_TOGGLE_COLLECT;
		VALGRIND_PRINTF("gate: end\n");
	}
}

/* ------------------------------------------------------------------------------------------------------------- the rings */

static uint16_t *word(const struct ring *r, uint32_t at)
{
	return (uint16_t *)(r->at + at);
}

static uint8_t *slot_at(const struct ring *r, uint32_t slot)
{
	return r->at + BUFFERS_AT + slot * SLOT;
}

static uint64_t gpa_of(const void *at)
{
	return GPA + (uint64_t)((const uint8_t *)at - g.rings[0].at);
}

/* offer a slot as pieces of these lengths, one behind the other */
static void offer(struct ring *r, uint32_t slot, const uint32_t *lens, uint32_t n, uint16_t flags)
{
	struct desc *table = (struct desc *)(r->at + TABLES_AT + slot * 64);
	uint64_t at = gpa_of(slot_at(r, slot));

	for (uint32_t i = 0; i < n; at += lens[i], i++)
		table[i] = (struct desc){ at, lens[i], (uint16_t)(flags | (i + 1 < n ? DESC_NEXT : 0)), (uint16_t)(i + 1) };
	((struct desc *)r->at)[slot] = (struct desc){ gpa_of(table), n * 16, DESC_INDIRECT, 0 };
	*word(r, AVAIL_AT + 4 + 2 * (r->avail % NUM)) = (uint16_t)slot;
	*word(r, AVAIL_AT + 2) = ++r->avail;
}

static void offer_rx(uint32_t slot)
{
	/* the guest module's, and those of virtio_vsock of Linux 6.12: a page without what an skb needs */
	static const uint32_t vso[] = { 32768, 32768, 4096 }, vsock[] = { 3776 };

	offer(&g.rings[0], slot, g.vsock ? vsock : vso, g.vsock ? 1 : 3, DESC_WRITE);
}

/* the device is notified as EVENT_IDX says */
static void kick(struct ring *r)
{
	uint16_t event = *word(r, USED_AT + 4 + 8 * NUM);

	if ((uint16_t)(r->avail - event - 1) < (uint16_t)(r->avail - r->kicked))
		vse_signal(r->kick);
	r->kicked = r->avail;
}

/* ----------------------------------------------------------------------------------------------------- messages to the driver */

static struct flow *flow_of(uint32_t id)
{
	for (uint32_t i = 0; i < g.nflows; i++)
		if (g.flows[i].id == id)
			return &g.flows[i];
	return NULL;
}

static struct flow *add_flow(uint32_t id)
{
	struct flow *f = &g.flows[g.nflows++];

	MUST(g.nflows <= FLOWS);
	*f = (struct flow){ .id = id, .host = -1 };
	return f;
}

static void heard_vso(const struct vso_hdr *h)
{
	const struct vso_reply *reply = (const void *)(h + 1);
	struct flow *f = flow_of(h->flow);

	if (h->type == VSO_HELLO_REPLY) {
		MUST(!h->arg);
		return;
	}
	MUST(f);
	f->dev_fwd = h->fwd_cnt;
	f->dev_alloc = h->buf_alloc;
	switch (h->type) {
	case VSO_DATA: f->got += h->len; break;
	case VSO_CREDIT: break;
	case VSO_CONNECT_REPLY:
	case VSO_BIND_REPLY:
	case VSO_LISTEN_REPLY:
		MUST(reply->verdict == VSO_OFFLOAD && !reply->error);
		f->open = true;
		break;
	case VSO_ACCEPT:
		add_flow(((const struct vso_accept *)(h + 1))->new_flow)->open = true;
		g.accepted++;
		break;
	case VSO_CLOSED: f->closed = true; break;
	case VSO_DGRAM: g.dgrams++; break;
	case VSO_SHUTDOWN: break;
	default: MUST(!"a message that nobody expects");
	}
}

static void heard_vsock(const struct vsk_hdr *h)
{
	struct flow *f = flow_of(h->dst_port);

	MUST(f);
	f->dev_fwd = h->fwd_cnt;
	f->dev_alloc = h->buf_alloc;
	switch (h->op) {
	case VSK_OP_RW: f->got += h->len; break;
	case VSK_OP_CREDIT_UPDATE: break;
	case VSK_OP_RESPONSE: f->open = true; break;
	case VSK_OP_RST: f->closed = true; break;
	default: MUST(!"a packet that nobody expects");
	}
}

/* take what is used, and ask for an interrupt at the next */
static void collect(void)
{
	struct ring *r = &g.rings[1];
	uint32_t elem[2];

	for (; r->used != *word(r, USED_AT + 2); r->used++) {
		memcpy(elem, r->at + USED_AT + 4 + 8 * (r->used % NUM), sizeof(elem));
		r->free[r->nfree++] = (uint16_t)elem[0];
	}
	/* as virtqueue_enable_cb_delayed() does */
	*word(r, AVAIL_AT + 4 + 2 * NUM) = (uint16_t)(r->used + (uint16_t)(r->avail - r->used) * 3 / 4);
	r = &g.rings[0];
	for (; r->used != *word(r, USED_AT + 2); r->used++) {
		memcpy(elem, r->at + USED_AT + 4 + 8 * (r->used % NUM), sizeof(elem));
		if (g.vsock)
			heard_vsock((const void *)slot_at(r, elem[0]));
		else
			heard_vso((const void *)slot_at(r, elem[0]));
		offer_rx(elem[0]);
	}
	*word(r, AVAIL_AT + 4 + 2 * NUM) = r->used;
}

/* ------------------------------------------------------------------------------------------------------------- the engine */

/* what thread_main() does each time it wakes */
static void one_turn(void)
{
	enum { EVENTS = 256 };
	struct epoll_event evs[EVENTS];
	int n;

	count_begin();
	n = epoll_wait(g.e->ep, evs, EVENTS, 0);
	lock_in_turn(g.e);
	turn(g.e, evs, n > 0 ? n : 0);
	sleep_ms(g.e);
	unlock(g.e);
	count_end();
}

static void turns(void)
{
	kick(&g.rings[1]);
	kick(&g.rings[0]);
	do {
		one_turn();
		collect();
		kick(&g.rings[0]);
	} while (has_work(g.e));
}

/* ------------------------------------------------------------------------------------------------- messages from the driver */

/* payload: what else than the slot's old bytes is sent; NULL: those will do */
static void post(const void *hdr, uint32_t hdr_len, const void *payload, uint32_t len)
{
	/* small messages share a descriptor with their header; else pieces as the guest's page frags are */
	uint32_t lens[] = { hdr_len, len < 32768 ? len : 32768, len < 32768 ? 0 : len - 32768 }, one = hdr_len + len, slot;
	struct ring *r = &g.rings[1];

	MUST(r->nfree && one <= SLOT);
	slot = r->free[--r->nfree];
	memcpy(slot_at(r, slot), hdr, hdr_len);
	if (payload)
		memcpy(slot_at(r, slot) + hdr_len, payload, len);
	if (len <= 2048)
		offer(r, slot, &one, 1, 0);
	else
		offer(r, slot, lens, lens[2] ? 3 : 2, 0);
}

static void say_vso(struct flow *f, uint16_t type, uint32_t arg, const void *payload, uint32_t len)
{
	struct vso_hdr h = {
		.type = type, .flow = f ? f->id : 0, .len = len, .arg = arg, .buf_alloc = WINDOW, .fwd_cnt = f ? f->got : 0,
	};

	post(&h, sizeof(h), payload, len);
}

static void say_vsock(struct flow *f, uint16_t op, uint32_t flags, uint32_t len)
{
	struct vsk_hdr h = {
		.src_cid = 3, .dst_cid = VSK_CID_HOST, .src_port = f->id, .dst_port = 80, .len = len, .type = VSK_TYPE_STREAM,
		.op = op, .flags = flags, .buf_alloc = WINDOW, .fwd_cnt = f->got,
	};

	post(&h, sizeof(h), NULL, len);
}

static void say_data(struct flow *f, uint32_t len)
{
	MUST(f->sent + len - f->dev_fwd <= f->dev_alloc);
	f->sent += len;
	f->told = f->got;
	if (g.vsock)
		say_vsock(f, VSK_OP_RW, 0, len);
	else
		say_vso(f, VSO_DATA, 0, NULL, len);
}

static void say_credit(struct flow *f)
{
	f->told = f->got;
	if (g.vsock)
		say_vsock(f, VSK_OP_CREDIT_UPDATE, 0, 0);
	else
		say_vso(f, VSO_CREDIT, 0, NULL, 0);
}

/* as drivers do: half of the window became free */
static void say_credit_if_due(struct flow *f)
{
	if (f->got - f->told >= WINDOW / 2)
		say_credit(f);
}

static void say_close(struct flow *f)
{
	if (g.vsock)
		say_vsock(f, VSK_OP_SHUTDOWN, VSK_SHUTDOWN_RECEIVE | VSK_SHUTDOWN_SEND, 0);
	else
		say_vso(f, VSO_CLOSE, 0, NULL, 0);
}

static void say_open(struct flow *f, uint16_t type, const char *uri)
{
	struct { struct vso_open open; char uri[64]; } open = { .open.uri_len = (uint16_t)strlen(uri), .open.comm = "program" };

	memcpy(open.uri, uri, open.open.uri_len);
	if (g.vsock)
		say_vsock(f, VSK_OP_REQUEST, 0, 0);
	else
		say_vso(f, type, 0, &open, (uint32_t)sizeof(open.open) + open.open.uri_len);
}

/* ------------------------------------------------------------------------------------------------------------ beginning and end */

static void set_up(bool vsock)
{
	struct vse_config config = {
		.pairs = 1, .max_flows = 64, .buf_alloc = WINDOW, .buf_total = 64 << 20, .grow_ns = VSE_GROW_NEVER, .features = VSO_F_DGRAM | VSO_F_DGRAM_INFO,
		.dialect = vsock ? VSE_VSOCK : VSE_OFFLOAD, .guest_cid = vsock ? 3 : 0,
	};
	struct vso_hello hello = {
		.magic = VSO_MAGIC, .abi_major = VSO_ABI_MAJOR, .epoch = 1, .features = config.features, .pairs = 1,
		.max_payload = VSO_PAYLOAD_MAX,
	};
	int fd = memfd_create("gate", MFD_CLOEXEC);
	struct vs_mem *none = vs_mem_new();
	struct vs_err err = { 0 };
	struct vs_region *region;

	memset(&g, 0, sizeof(g));
	g.vsock = vsock;
	MUST(fd >= 0 && !ftruncate(fd, RAM));
	region = vs_region_map(fd, GPA, RAM, GPA, 0, &err);
	MUST(none && region);
	close(fd);
	g.mem = vs_mem_with(none, region, &err);
	g.e = vse_new(&config, &err);
	MUST(g.mem && g.e);
	for (uint32_t i = 0; i < 2; i++) {
		struct ring *r = &g.rings[i];

		r->at = (uint8_t *)vs_mem_gpa(g.mem, GPA, RAM) + i * RING_SIZE;
		r->kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		r->call = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		r->vq = vs_vq_new(i);
		vs_vq_set_features(r->vq, 1ull << 32 | 1ull << 29 | 1ull << 28);
		vs_vq_set_addr(r->vq, gpa_of(r->at), gpa_of(r->at + AVAIL_AT), gpa_of(r->at + USED_AT));
		vs_vq_set_base(r->vq, 0);
		vs_vq_set_call(r->vq, r->call);
		vs_vq_set_mem(r->vq, g.mem);
		MUST(!vs_vq_set_num(r->vq, NUM, &err) && !vs_vq_start(r->vq, &err));
		MUST(!vse_ring_attach(g.e, i, r->vq, r->kick, &err));
		for (uint16_t slot = 0; i && slot < TX_SLOTS; slot++)
			r->free[r->nfree++] = slot;
		for (uint32_t slot = 0; !i && slot < RX_SLOTS; slot++)
			offer_rx(slot);
	}
	vs_region_put(region);
	vs_mem_put(none);
	if (!vsock)
		say_vso(NULL, VSO_HELLO, 0, &hello, sizeof(hello));
	turns();
}

static void tear_down(void)
{
	for (uint32_t i = 0; i < g.nflows; i++)
		if (g.flows[i].host >= 0)
			close(g.flows[i].host);
	vse_free(g.e);
	for (int i = 0; i < 2; i++) {
		vs_vq_stop(g.rings[i].vq);
		vs_vq_free(g.rings[i].vq);
		close(g.rings[i].kick);
		close(g.rings[i].call);
	}
	vs_mem_put(g.mem);
}

#endif
