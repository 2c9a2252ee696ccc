/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_packed - the device side of a packed virtqueue (virtio 1.3, 2.8).
 *
 * One ring of descriptors that both sides write, and two event areas of 4 bytes: the driver's, which the device only reads, and
 * the device's. There are no indices in memory. Each side counts its place in the ring, and a wrap counter that starts as 1 and
 * flips whenever the place comes back to 0. A descriptor's AVAIL and USED flags say in whose hands it is:
 *
 *   AVAIL == wrap, USED != wrap     available, on the driver's lap with that wrap counter
 *   AVAIL == USED == wrap           used, on the device's lap with that wrap counter
 *
 * The device follows with two places of its own. Slots from used to avail are outstanding: taken by chains that were popped and
 * are not completed yet, or were lost at an earlier stop. Completion writes one used descriptor at the used place, whichever
 * chain it is that completes, and skips as many slots as that chain took. So it never writes past what was popped.
 *
 *   num slots:   ....UUUUUUUU|oooooooooooo|AAAAAA.....      U used, o outstanding, A available and not popped
 *                            used         avail
 *
 * Who publishes what, and the barrier that makes it safe:
 *
 *   driver                                   device
 *   fill the chain; wmb; head's flags     -> load-acquire the head's flags; load the chain               packed_pop()
 *   load flags; rmb; load id, len         <- fill a batch but its first flags; store-release these       packed_publish()
 *   head's flags; mb; load device event   <- device event; mb; load the next head's flags                packed_enable_kick()
 *   driver event; mb; load flags          <- first flags; mb; load driver event                          packed_publish()
 *
 * The driver takes used descriptors in order, so it does not look at those of a batch before the first one is used (QEMU's own
 * device side and DPDK's publish a batch the same way). As in vs_split.c, the last two rows need a full barrier on both sides.
 */
#include "vs_desc.h"

enum {
	DESC_F_AVAIL = 1 << 7,
	DESC_F_USED = 1 << 15,
	EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_DESC = 2,	/* virtio 1.3, 2.8.10 */
	EVENT_FLAGS_MASK = 3,
	EVENT_SIZE = 4,
	PLACE_MASK = 0x7fff, WRAP_SHIFT = 15
};

/* virtio 1.3, 2.8.13: the ring's descriptor; it is aligned to 16 bytes */
static inline struct vs_slot *slot_at(const struct vs_vq *vq, uint32_t i)
{
	return (struct vs_slot *)vq->packed.ring + i;
}

/* the device wrote to a descriptor; the front-end names no place in the log for them, so it is where the ring is */
static inline void log_slot(struct vs_vq *vq, uint32_t i)
{
	if (vs_unlikely(vq->log_ring))
		vs_log_write(vq, vq->packed.ring_gpa + i * sizeof(struct vs_slot), sizeof(struct vs_slot));
}

static inline uint16_t encode(struct vs_place p)
{
	return p.at | p.wrap << WRAP_SHIFT;
}

static inline struct vs_place decode(uint16_t v)
{
	return (struct vs_place){ v & PLACE_MASK, v >> WRAP_SHIFT };
}

/* n slots further, n <= num */
static inline struct vs_place forward(const struct vs_vq *vq, struct vs_place p, uint32_t n)
{
	uint32_t at = p.at + n;

	return at < vq->num ? (struct vs_place){ at, p.wrap } : (struct vs_place){ at - vq->num, !p.wrap };
}

/* n slots back, n <= num */
static inline struct vs_place back(const struct vs_vq *vq, struct vs_place p, uint32_t n)
{
	return p.at >= n ? (struct vs_place){ p.at - n, p.wrap } : (struct vs_place){ p.at + vq->num - n, !p.wrap };
}

/* slots from a up to b, when b is at most one lap further */
static inline int32_t distance(const struct vs_vq *vq, struct vs_place a, struct vs_place b)
{
	return (int32_t)b.at - a.at + (a.wrap != b.wrap ? (int32_t)vq->num : 0);
}

static inline bool is_avail(uint16_t flags, bool wrap)
{
	return !!(flags & DESC_F_AVAIL) == wrap && !!(flags & DESC_F_USED) != wrap;
}

/*
 * SET_VRING_BASE: avail place and wrap in the lower half, used ones in the upper. DPDK's virtio-user sends the lower half alone.
 * With an upper half of 0, a lower wrap bit of 1 would mean a lap and more between the two, or exactly one lap at 0x8000: a whole
 * ring in flight on a device that never ran. So nothing that can be is lost by taking it for both.
 */
static uint32_t base_of(uint32_t base)
{
	return base >> 16 == 0 && base >> WRAP_SHIFT ? base << 16 | base : base;
}

struct vs_place vs_packed_forward(const struct vs_vq *vq, struct vs_place p, uint32_t n)
{
	return forward(vq, p, n);
}

bool vs_packed_is_avail(const struct vs_vq *vq, struct vs_place p)
{
	return is_avail(load16(&slot_at(vq, p.at)->flags), p.wrap);
}

static int packed_check(const struct vs_vq *vq, struct vs_err *err)
{
	uint32_t base = base_of(vq->base);
	struct vs_place avail = decode(base), used = decode(base >> 16);
	int32_t outstanding = distance(vq, used, avail);

	if (avail.at >= vq->num || used.at >= vq->num)
		return vs_err_set(err, EINVAL, "packed ring base 0x%" PRIx32 ": avail place %u or used place %u is past the queue "
				  "size %" PRIu32, vq->base, avail.at, used.at, vq->num);
	if (outstanding < 0 || outstanding > (int32_t)vq->num)
		return vs_err_set(err, EINVAL, "packed ring base 0x%" PRIx32 ": from used place %u (wrap %d) to avail place %u "
				  "(wrap %d) there are not 0 to %" PRIu32 " descriptors", vq->base, used.at, used.wrap, avail.at,
				  avail.wrap, vq->num);
	return 0;
}

static int packed_map(struct vs_vq *vq, struct vs_err *err)
{
	/* virtio 1.3, 2.8.10.1: size and alignment of the three parts */
	const struct part part[3] = {
		{ "descriptor ring", vq->desc_uva, (uint64_t)DESC_SIZE * vq->num, 16, VS_PERM_READ | VS_PERM_WRITE },
		{ "driver event area", vq->avail_uva, 4, 4, VS_PERM_READ },
		{ "device event area", vq->used_uva, 4, 4, VS_PERM_WRITE },
	};
	uint8_t *host[3];
	int rc = parts_map(vq, part, host, err);

	if (rc < 0)
		return rc;
	vq->packed.ring = host[0];
	vq->packed.ring_gpa = vs_mem_gpa_of(vq->mem, host[0]);
	vq->packed.driver_event = (const uint32_t *)host[1];
	vq->packed.device_event = (uint16_t *)host[2];
	return 0;
}

static bool packed_has_avail(const struct vs_vq *vq)
{
	return vs_packed_is_avail(vq, vq->packed.avail);
}

static bool packed_enable_kick(struct vs_vq *vq)
{
	struct vs_packed *p = &vq->packed;

	if (p->event_idx)
		store16(&p->device_event[0], encode(p->avail));
	/* release: a driver that reads DESC reads the place that belongs to it */
	__atomic_store_n(&p->device_event[1], htole16(p->event_idx ? EVENT_DESC : EVENT_ENABLE), __ATOMIC_RELEASE);
	vs_log_used(vq, 0, EVENT_SIZE);
	/* pairs with the driver's barrier between the head's flags and the device event area: it sees ours, or we see its chain */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return packed_has_avail(vq);
}

static void packed_disable_kick(struct vs_vq *vq)
{
	store16(&vq->packed.device_event[1], EVENT_DISABLE);
	vs_log_used(vq, 0, EVENT_SIZE);
}

static bool packed_start(struct vs_vq *vq)
{
	struct vs_packed *p = &vq->packed;
	uint32_t base = base_of(vq->base);
	int known = 0;

	p->event_idx = vs_vq_feature(vq, VIRTIO_RING_F_EVENT_IDX);
	p->indirect = vs_vq_feature(vq, VIRTIO_RING_F_INDIRECT_DESC);
	p->avail = decode(base);
	p->used = decode(base >> 16);
	p->slots_in_flight = 0;
	p->grouping = false;
	if (vs_inflight_on(vq) && (known = vs_inflight_packed.load(vq)) < 0)
		return false;
	p->batch = p->used;
	packed_enable_kick(vq);
	return known;
}

static uint32_t packed_base(const struct vs_vq *vq)
{
	const struct vs_packed *p = &vq->packed;
	/* without holes, what is in flight are the youngest chains, and no used descriptor was written over them */
	struct vs_place avail = back(vq, p->avail, vq->holes || vs_inflight_on(vq) ? 0 : p->slots_in_flight);

	/* what was not published does not count: a broken ring keeps it back */
	return (uint32_t)encode(p->batch) << 16 | encode(avail);
}

/* one copy of a descriptor of the ring but for its flags, which the caller has loaded before */
static inline struct desc slot_load(const struct vs_slot *s, uint16_t flags)
{
	return (struct desc){
		.addr = le64toh(__atomic_load_n(&s->addr, __ATOMIC_RELAXED)),
		.len = le32toh(__atomic_load_n(&s->len, __ATOMIC_RELAXED)),
		.flags = flags,
		.next = load16(&s->id),
	};
}

static inline struct vs_slot slot_of(struct desc d)
{
	return (struct vs_slot){ .addr = d.addr, .len = d.len, .id = d.next, .flags = d.flags };
}

static inline struct desc desc_of(struct vs_slot s)
{
	return (struct desc){ .addr = s.addr, .len = s.len, .flags = s.flags, .next = s.id };
}

/* a driver has at most num buffers in flight and numbers them; ids are used as indices by those who track them */
static int id_check(struct vs_vq *vq, struct where w, struct desc d)
{
	if (vs_likely(d.next < vq->num))
		return 0;
	return vs_vq_fail(vq, EINVAL, "desc %" PRIu32 " " DESC_FMT ": buffer id %u is past the queue size %" PRIu32, w.i, DESC_ARG(d),
			  d.next, vq->num);
}

/* the indirect table that a descriptor refers to (virtio 1.3, 2.8.7): its entries in order; of their flags only WRITE counts */
static int table_walk(struct vs_vq *vq, struct vs_chain *c, struct where w, struct desc ref, uint32_t count)
{
	struct where in = { w.i, 0 };
	bool writable = false;
	const uint8_t *table;
	uint64_t lo, hi;
	struct desc d;

	if (!vq->packed.indirect)
		return desc_fail(vq, w, ref, "indirect, but VIRTIO_RING_F_INDIRECT_DESC was not negotiated");
	/* virtio 1.3, 2.8.19 */
	if (count > 1 || ref.flags & DESC_F_NEXT)
		return desc_fail(vq, w, ref, "INDIRECT and NEXT exclude one another in a packed ring");
	table = table_map(vq, w, ref);
	if (!table)
		return -1;
	for (; in.i < ref.len / DESC_SIZE; in.i++) {
		desc_copy(table + (size_t)in.i * DESC_SIZE, &lo, &hi);
		d = (struct desc){ lo, (uint32_t)hi, (uint16_t)(hi >> 48), (uint16_t)(hi >> 32) };
		if (vs_unlikely(d.flags & DESC_F_INDIRECT))
			return desc_fail(vq, in, d, "indirect inside an indirect table");
		if (vs_unlikely(buffer_add(vq, c, in, d, &writable) < 0))
			return -1;
	}
	return 0;
}

/* the chain at the avail place; flags are its head's. The last descriptor has the buffer id (2.8.6). */
static int chain_walk(struct vs_vq *vq, struct vs_chain *c, uint16_t flags, uint16_t *id)
{
	/* from the batch: the driver cannot use a slot again before it sees it used, which is at the publish */
	uint32_t outstanding = distance(vq, vq->packed.batch, vq->packed.avail), count = 0;
	struct vs_place at = vq->packed.avail;
	bool writable = false;
	struct where w;
	struct desc d;

	do {
		w = (struct where){ -1, at.at };
		d = slot_load(slot_at(vq, at.at), flags);
		if (vs_unlikely(outstanding + count == vq->num))
			return desc_fail(vq, w, d, "more descriptors are available than the queue has");
		if (vs_unlikely(vs_inflight_on(vq)))
			vs_inflight_record(vq, count, slot_of(d));
		if (vs_unlikely(count++ == vq->chain_max))
			return desc_fail(vq, w, d, "the chain has more descriptors than the queue size (at most 1024)");
		if (vs_unlikely(d.flags & DESC_F_INDIRECT)) {
			if (table_walk(vq, c, w, d, count) < 0)
				return -1;
			break;
		}
		if (vs_unlikely(buffer_add(vq, c, w, d, &writable) < 0))
			return -1;
		if (!(d.flags & DESC_F_NEXT))
			break;
		at = forward(vq, at, 1);
		flags = load16(&slot_at(vq, at.at)->flags);
		/* virtio 1.3, 2.8.21.1: the head becomes available last */
		if (vs_unlikely(!is_avail(flags, at.wrap)))
			return vs_vq_fail(vq, EINVAL, "desc %" PRIu32 " " DESC_FMT ": the chain goes on, but the next descriptor (flags "
					  "0x%x) is not available", w.i, DESC_ARG(d), flags);
	} while (1);
	if (vs_unlikely(id_check(vq, w, d) < 0))
		return -1;
	*id = d.next;
	c->descs = count;
	return 0;
}

static int packed_pop(struct vs_vq *vq, struct vs_chain *c)
{
	struct vs_packed *p = &vq->packed;
	uint16_t flags;

	/* acquire: pairs with the driver's write barrier before the head's flags (2.8.21.1); the chain is read after it */
	flags = le16toh(__atomic_load_n(&slot_at(vq, p->avail.at)->flags, __ATOMIC_ACQUIRE));
	if (vs_unlikely(vs_vq_poisoned(vq)))
		return vs_vq_fail(vq, EFAULT, "the front-end truncated guest memory while it was mapped");
	if (!is_avail(flags, p->avail.wrap))
		return 0;
	if (vs_unlikely(chain_walk(vq, c, flags, &c->head) < 0))
		return -1;
	p->avail = forward(vq, p->avail, c->descs);
	p->slots_in_flight += c->descs;
	return 1;
}

/* from the region: used descriptors may have been written over those in the ring. The region is no more trusted than the ring. */
static int packed_pop_again(struct vs_vq *vq, struct vs_chain *c)
{
	const struct vs_track *t = &vq->track;
	uint16_t entry = t->again[t->again_at];
	uint32_t count = t->list[entry].count;
	struct where w = { -1, 0 };
	bool writable = false;
	struct desc d;

	for (; w.i < count; w.i++) {
		d = desc_of(vs_inflight_recorded(vq, entry, w.i));
		if (vs_unlikely(d.flags & DESC_F_INDIRECT ? table_walk(vq, c, w, d, count) < 0 : buffer_add(vq, c, w, d, &writable) < 0))
			return -1;
	}
	if (vs_unlikely(id_check(vq, w, d) < 0))
		return -1;
	c->head = d.next;
	c->entry = entry;
	c->descs = count;
	vq->packed.slots_in_flight += count;
	return 1;
}

static void packed_unpop(struct vs_vq *vq, const struct vs_chain *c)
{
	struct vs_packed *p = &vq->packed;

	if (!c->again)
		p->avail = back(vq, p->avail, c->descs);
	p->slots_in_flight -= c->descs;
}

static inline uint16_t used_flags(bool wrap, bool writable)
{
	/* virtio 1.3, 2.8.4: WRITE says that len means something */
	return (wrap ? DESC_F_AVAIL | DESC_F_USED : 0) | (writable ? DESC_F_WRITE : 0);
}

static void packed_push(struct vs_vq *vq, const struct vs_done *d)
{
	struct vs_packed *p = &vq->packed;
	struct vs_place at = p->used;
	struct vs_slot *s;
	uint16_t flags;

	if (vs_unlikely(vq->order != NULL)) {
		/* virtio 1.3, 2.8.9: the last descriptor of a batch stands where its first would, if what it skips was written whole */
		if (!p->grouping)
			p->group = p->used;
		p->grouping = d->whole;
		at = p->group;
	}
	s = slot_at(vq, at.at);
	flags = used_flags(at.wrap, d->writable);
	store16(&s->id, d->head);
	__atomic_store_n(&s->len, htole32(d->written), __ATOMIC_RELAXED);
	if (at.at == p->batch.at && at.wrap == p->batch.wrap)
		p->batch_flags = flags;		/* publish() stores them; the driver stops in front of this one until then */
	else
		store16(&s->flags, flags);
	log_slot(vq, at.at);
	p->used = forward(vq, p->used, d->descs);
	p->slots_in_flight -= d->descs;
}

static bool packed_publish(struct vs_vq *vq)
{
	struct vs_packed *p = &vq->packed;
	int32_t slots = distance(vq, p->batch, p->used), since;
	struct vs_place event;
	uint32_t driver;

	if (!slots)
		return false;
	if (vs_unlikely(vs_inflight_on(vq)))
		vs_inflight_packed.publish(vq);
	/* release: pairs with the driver's read barrier after the flags (2.8.22); the whole batch is visible before its first flags */
	__atomic_store_n(&slot_at(vq, p->batch.at)->flags, htole16(p->batch_flags), __ATOMIC_RELEASE);
	log_slot(vq, p->batch.at);
	p->batch = p->used;
	p->grouping = false;
	if (vs_unlikely(vs_inflight_on(vq)))
		vs_inflight_packed.published(vq);
	/* pairs with the driver's barrier between its event area and the flags: it sees our descriptor, or we see that it waits */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	/* one load, so that place and flags belong together */
	driver = le32toh(__atomic_load_n(p->driver_event, __ATOMIC_RELAXED));
	switch (driver >> 16 & EVENT_FLAGS_MASK) {
	case EVENT_DISABLE:
		return false;
	case EVENT_DESC:
		break;
	default:	/* ENABLE, or reserved: rather a call too many */
		return true;
	}
	if (!p->event_idx)
		return true;
	/* virtio 1.3, 2.8.10: call when the place is among the slots published just now */
	event = decode((uint16_t)driver);
	since = distance(vq, event, p->used);
	return since > 0 && since <= slots;
}

const struct vs_vq_ops vs_packed_ops = {
	.inflight = &vs_inflight_packed,
	.check = packed_check,
	.map = packed_map,
	.start = packed_start,
	.base = packed_base,
	.pop = packed_pop,
	.pop_again = packed_pop_again,
	.unpop = packed_unpop,
	.push = packed_push,
	.publish = packed_publish,
	.disable_kick = packed_disable_kick,
	.enable_kick = packed_enable_kick,
	.has_avail = packed_has_avail,
};
