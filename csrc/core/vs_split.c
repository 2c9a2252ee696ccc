/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_split - the device side of a split virtqueue (virtio 1.3, 2.7).
 *
 * The driver writes desc and avail, the device writes used, each in memory that the other only reads. Indices run freely modulo
 * 2^16; index & mask is the place in a ring. Of the driver's memory every value is loaded exactly once into a register or a
 * local, then checked, then used.
 *
 * Who publishes what, and the barrier that makes it safe:
 *
 *   driver                                   device
 *   fill desc, avail.ring; wmb; avail.idx -> load-acquire avail.idx; load avail.ring, desc          avail_load()
 *   load used.idx; rmb; load used.ring    <- fill used.ring; store-release used.idx                 publish()
 *   avail.idx; mb; load avail_event/flags <- avail_event/flags; mb; load avail.idx again            enable_kick()
 *   used_event/flags; mb; load used.idx   <- used.idx; mb; load used_event/flags                    publish()
 *
 * In the last two rows both sides store one word and load the other's. Without a full barrier on both sides each may miss the
 * other's store, and a notification is lost for good (virtio 1.3, 2.7.7, 2.7.10 and 2.7.13.4.1).
 */
#include "vs_desc.h"

enum {
	AVAIL_F_NO_INTERRUPT = 1,
	USED_F_NO_NOTIFY = 1,
	FLAGS = 0, IDX = 1, RING = 2		/* avail and used, in 16-bit words */
};

static inline struct desc desc_load(const uint8_t *p)
{
	uint64_t lo, hi;

	desc_copy(p, &lo, &hi);
	return (struct desc){ lo, (uint32_t)hi, (uint16_t)(hi >> 32), (uint16_t)(hi >> 48) };
}

static inline uint16_t *used_event_of(const struct vs_split *s)
{
	return (uint16_t *)&s->avail[RING + s->mask + 1];
}

static inline uint16_t *avail_event_of(const struct vs_split *s)
{
	return &s->used[RING + 4 * (s->mask + 1)];	/* an element is four 16-bit words */
}

/* every store in the used ring but that of its elements */
static inline void store_used(struct vs_vq *vq, uint16_t *p, uint16_t v)
{
	store16(p, v);
	vs_log_used(vq, (uintptr_t)p - (uintptr_t)vq->split.used, sizeof(*p));
}

static int split_check(const struct vs_vq *vq, struct vs_err *err)
{
	/* virtio 1.3, 2.7; vs_vq_set_num() could not know yet that the ring would not be packed */
	if (vq->num & (vq->num - 1))
		return vs_err_set(err, EINVAL, "queue size %" PRIu32 " of a split ring is not a power of 2", vq->num);
	if (vq->base > UINT16_MAX)
		return vs_err_set(err, EINVAL, "ring base 0x%" PRIx32 " does not fit the 16-bit index of a split ring", vq->base);
	return 0;
}

static int split_map(struct vs_vq *vq, struct vs_err *err)
{
	/* virtio 1.3, 2.7: size and alignment of the three parts */
	const struct part part[3] = {
		{ "descriptor table", vq->desc_uva, (uint64_t)DESC_SIZE * vq->num, 16, VS_PERM_READ },
		{ "available ring", vq->avail_uva, 6 + 2 * (uint64_t)vq->num, 2, VS_PERM_READ },
		{ "used ring", vq->used_uva, 6 + 8 * (uint64_t)vq->num, 4, VS_PERM_WRITE },
	};
	uint8_t *host[3];
	int rc = parts_map(vq, part, host, err);

	if (rc < 0)
		return rc;
	vq->split.desc = host[0];
	vq->split.avail = (const uint16_t *)host[1];
	vq->split.used = (uint16_t *)host[2];
	return 0;
}

static bool split_enable_kick(struct vs_vq *vq)
{
	struct vs_split *s = &vq->split;

	if (s->event_idx)
		store_used(vq, avail_event_of(s), s->avail_next);
	else
		store_used(vq, &s->used[FLAGS], 0);
	/* pairs with the driver's barrier between avail.idx and avail_event or flags: it sees ours, or we see its chain */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return load16(&s->avail[IDX]) != s->avail_next;
}

static void split_disable_kick(struct vs_vq *vq)
{
	struct vs_split *s = &vq->split;

	/*
	 * With EVENT_IDX flags must stay 0 (virtio 1.3, 2.7.10.2), and an avail_event that is left behind avail.idx is not
	 * crossed again for 2^16 chains: leaving it alone is the suppression.
	 */
	if (!s->event_idx)
		store_used(vq, &s->used[FLAGS], USED_F_NO_NOTIFY);
}

static bool split_start(struct vs_vq *vq)
{
	struct vs_split *s = &vq->split;
	int known = 0;

	s->mask = vq->num - 1;
	s->event_idx = vs_vq_feature(vq, VIRTIO_RING_F_EVENT_IDX);
	s->indirect = vs_vq_feature(vq, VIRTIO_RING_F_INDIRECT_DESC);
	/* the base has no used index; the ring itself remembers it */
	s->used_next = s->used_published = load16(&s->used[IDX]);
	/*
	 * No more chains can have been used than were taken. Where the base says so, the front-end has lost it with the back-end
	 * that knew it: DPDK's virtio-user says 0 to the next one. All that is not used is to be taken then.
	 */
	if ((uint16_t)(vq->base - s->used_next) > vq->num)
		vq->base = s->used_next;
	s->avail_next = s->avail_seen = vq->base;
	s->batching = false;
	if (vs_inflight_on(vq) && (known = vs_inflight_split.load(vq)) < 0)
		return false;
	store_used(vq, &s->used[FLAGS], 0);
	split_enable_kick(vq);
	return known;
}

static uint32_t split_base(const struct vs_vq *vq)
{
	/* without holes, what is in flight are the youngest chains: the next start shall find them again, in the region or here */
	return (uint16_t)(vq->split.avail_next - (vq->holes || vs_inflight_on(vq) ? 0 : vq->in_flight));
}

static bool split_has_avail(const struct vs_vq *vq)
{
	return load16(&vq->split.avail[IDX]) != vq->split.avail_next;
}

/* is there a chain at avail_next? 1, 0, or -1 when the index is impossible */
static inline int avail_load(struct vs_vq *vq)
{
	struct vs_split *s = &vq->split;
	uint16_t idx;

	if (s->avail_next != s->avail_seen)
		return 1;
	/* acquire: pairs with the driver's write barrier before avail.idx (virtio 1.3, 2.7.13.3.1); ring and desc are read after it */
	idx = le16toh(__atomic_load_n(&s->avail[IDX], __ATOMIC_ACQUIRE));
	if (vs_unlikely(vs_vq_poisoned(vq)))
		return vs_vq_fail(vq, EFAULT, "the front-end truncated guest memory while it was mapped");
	if (idx == s->avail_next)
		return 0;
	if (vs_unlikely((uint16_t)(idx - s->avail_next) > vq->num))
		return vs_vq_fail(vq, EINVAL, "avail.idx moved from %u to %u, more than the queue size %" PRIu32,
				  s->avail_next, idx, vq->num);
	s->avail_seen = idx;
	return 1;
}

/* the indirect table that desc[w.i] refers to (virtio 1.3, 2.7.5.3); count: descriptors of the chain so far, w.i included */
static int table_walk(struct vs_vq *vq, struct vs_chain *c, struct where w, struct desc ref, uint32_t count, bool writable)
{
	uint32_t entries = ref.len / DESC_SIZE, seen = 0;
	struct where in = { w.i, 0 };
	const uint8_t *table;
	struct desc d;

	if (!vq->split.indirect)
		return desc_fail(vq, w, ref, "indirect, but VIRTIO_RING_F_INDIRECT_DESC was not negotiated");
	if (ref.flags & DESC_F_NEXT)
		return desc_fail(vq, w, ref, "INDIRECT and NEXT exclude one another");
	table = table_map(vq, w, ref);
	if (!table)
		return -1;
	count--;	/* the descriptor that only refers to the table describes no buffer */
	do {
		d = desc_load(table + (size_t)in.i * DESC_SIZE);
		if (vs_unlikely(d.flags & DESC_F_INDIRECT))
			return desc_fail(vq, in, d, "indirect inside an indirect table");
		if (vs_unlikely(seen++ == entries))
			return desc_fail(vq, in, d, "the chain in the indirect table loops");
		if (vs_unlikely(count++ == vq->chain_max))
			return desc_fail(vq, in, d, "the chain has more descriptors than the queue size (at most 1024)");
		if (vs_unlikely(buffer_add(vq, c, in, d, &writable) < 0))
			return -1;
		if (!(d.flags & DESC_F_NEXT))
			return 0;
		if (vs_unlikely(d.next >= entries))
			return vs_vq_fail(vq, EINVAL, "desc %" PRIu32 ", indirect entry %" PRIu32 " " DESC_FMT ": next %u is past the "
					  "table's %" PRIu32 " entries", w.i, in.i, DESC_ARG(d), d.next, entries);
		in.i = d.next;
	} while (1);
}

static int chain_walk(struct vs_vq *vq, struct vs_chain *c, uint16_t head)
{
	struct where w = { -1, head };
	bool writable = false;
	uint32_t count = 0;
	struct desc d;

	do {
		d = desc_load(vq->split.desc + (size_t)w.i * DESC_SIZE);
		/* a chain that is longer than the ring must visit some descriptor twice */
		if (vs_unlikely(count++ == vq->chain_max))
			return desc_fail(vq, w, d, "the chain loops, or has more descriptors than the queue size (at most 1024)");
		if (vs_unlikely(d.flags & DESC_F_INDIRECT)) {
			c->descs = count;
			return table_walk(vq, c, w, d, count, writable);
		}
		if (vs_unlikely(buffer_add(vq, c, w, d, &writable) < 0))
			return -1;
		if (!(d.flags & DESC_F_NEXT))
			break;
		if (vs_unlikely(d.next >= vq->num))
			return vs_vq_fail(vq, EINVAL, "desc %" PRIu32 " " DESC_FMT ": next %u is past the queue size %" PRIu32, w.i,
					  DESC_ARG(d), d.next, vq->num);
		w.i = d.next;
	} while (1);
	c->descs = count;
	return 0;
}

static int split_pop(struct vs_vq *vq, struct vs_chain *c)
{
	struct vs_split *s = &vq->split;
	uint32_t outstanding;
	uint16_t head;
	int rc;

	rc = avail_load(vq);
	if (rc <= 0)
		return rc;
	/*
	 * Each chain takes a descriptor until the driver sees it used, which is at the publish and not at the completion: the driver
	 * cannot have more than num outstanding. What is kept for each chain (vs_inflight.c, vs_order.c) has room for no more.
	 */
	outstanding = vq->in_flight + (uint16_t)(s->used_next - s->used_published);
	if (vs_unlikely(outstanding >= vq->num))
		return vs_vq_fail(vq, EINVAL, "a chain is available at index %u while %" PRIu32 " are in flight, as many as the "
				  "queue has descriptors", s->avail_next, outstanding);
	head = load16(&s->avail[RING + (s->avail_next & s->mask)]);
	if (vs_unlikely(head >= vq->num))
		return vs_vq_fail(vq, EINVAL, "avail.ring[%u]: head %u is past the queue size %" PRIu32,
				  s->avail_next & s->mask, head, vq->num);
	if (vs_unlikely(chain_walk(vq, c, head) < 0))
		return -1;
	c->head = c->entry = head;
	s->avail_next++;
	return 1;
}

static int split_pop_again(struct vs_vq *vq, struct vs_chain *c)
{
	/* the driver has not got these descriptors back, so they are what they were, if it keeps the rules */
	c->head = c->entry = vq->track.again[vq->track.again_at];
	return chain_walk(vq, c, c->head) < 0 ? -1 : 1;
}

static void split_unpop(struct vs_vq *vq, const struct vs_chain *c)
{
	if (!c->again)
		vq->split.avail_next--;
}

static void split_push(struct vs_vq *vq, const struct vs_done *d)
{
	struct vs_split *s = &vq->split;
	/* never laps the driver: at most num chains are in flight */
	uint32_t elem[2] = { htole32(d->head), htole32(d->written) }, at = RING + 4 * (s->used_next & s->mask);

	if (vs_unlikely(vq->order != NULL)) {
		/* virtio 1.3, 2.7.9: the last element of a batch stands where its first would, if what it skips was written whole */
		if (!s->batching)
			s->batch_at = s->used_next;
		s->batching = d->whole;
		at = RING + 4 * (s->batch_at & s->mask);
	}
	memcpy(&s->used[at], elem, sizeof(elem));
	vs_log_used(vq, sizeof(uint16_t) * at, sizeof(elem));
	s->used_next++;
}

static bool split_publish(struct vs_vq *vq)
{
	struct vs_split *s = &vq->split;
	uint16_t old = s->used_published, new = s->used_next;

	if (new == old)
		return false;
	if (vs_unlikely(vs_inflight_on(vq)))
		vs_inflight_split.publish(vq);
	/* release: pairs with the driver's read barrier after used.idx (virtio 1.3, 2.7.14); the elements are visible before it */
	__atomic_store_n(&s->used[IDX], htole16(new), __ATOMIC_RELEASE);
	vs_log_used(vq, sizeof(uint16_t) * IDX, sizeof(uint16_t));
	s->used_published = new;
	s->batching = false;
	if (vs_unlikely(vs_inflight_on(vq)))
		vs_inflight_split.published(vq);
	/* pairs with the driver's barrier between used_event or flags and used.idx: it sees our index, or we see that it waits */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!s->event_idx)
		return !(load16(&s->avail[FLAGS]) & AVAIL_F_NO_INTERRUPT);
	/* virtio 1.3, 2.7.7.2: call when the element used_event is among those published just now, [old, new) */
	return (uint16_t)(new - load16(used_event_of(s)) - 1) < (uint16_t)(new - old);
}

const struct vs_vq_ops vs_split_ops = {
	.inflight = &vs_inflight_split,
	.check = split_check,
	.map = split_map,
	.start = split_start,
	.base = split_base,
	.pop = split_pop,
	.pop_again = split_pop_again,
	.unpop = split_unpop,
	.push = split_push,
	.publish = split_publish,
	.disable_kick = split_disable_kick,
	.enable_kick = split_enable_kick,
	.has_avail = split_has_avail,
};
