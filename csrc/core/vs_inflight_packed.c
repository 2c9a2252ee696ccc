/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_inflight_packed - the packed layout of the in-flight region; vs_inflight.c has the rules.
 *
 * 32 bytes, then entries that are not bound to places in the ring: a chain takes as many as it has descriptors, and they hold
 * copies of these, since in the ring a used descriptor may be written over a chain that is still in flight. Entries are in lists
 * by their `next`: one of all that are free, one for each chain, from its first entry to `last`.
 *
 *   free_head --> f --> f --> (desc_num: the end)         chain: e --> . --> last
 *
 * There is an old value beside each of free_head, used_idx and its wrap counter: what holds if the batch under way never reached
 * the driver.
 *
 *   pop       the chain's entries, which are the first of the free list, with e.inflight = 1
 *             free_head = old_free_head = the one after them                         | from here on it is in flight
 *   publish   last.next = free_head, free_head = e; for each of the batch
 *             used_idx, wrap
 *             flags of the batch's first used descriptor, in the ring                | from here on the driver has the batch
 *             e.inflight = 0 for each of the batch
 *             old_free_head = free_head
 *             old_used_idx, old wrap = used_idx, wrap
 *   start     used place != old used place: it died in between. If the descriptor at the old place is still as the driver made it
 *             available, the batch never got there: back to the old values. Otherwise the old values become the new ones.
 *             Entries of the free list are not in flight, all others are; these are popped again in the order of their counters.
 *
 * The document compares used_idx alone; with the wrap counters a batch of exactly one lap is seen, too. A push changes nothing here
 * before the publish, so that a pop in between finds both heads equal.
 *
 * The places of SET_VRING_BASE do not matter at a start with a region that knows the ring: the used place is in the region, and
 * the avail place is as many descriptors further as the chains in flight have.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "vs_inflight.h"

static struct vs_packed_entry *entry_at(const struct vs_track *t, uint32_t i)
{
	return (struct vs_packed_entry *)(t->part + PACKED_HEAD) + i;
}

static void heads_store(const struct vs_track *t, uint16_t free_head, uint16_t old)
{
	const struct region_head head = { .version = INFLIGHT_VERSION, .desc_num = t->entries, .packed = { free_head, old } };

	head_store(t, head);
}

static void used_store(const struct vs_track *t, struct vs_place used, struct vs_place old)
{
	const struct region_used words = { used.at, old.at, used.wrap, old.wrap, { 0 } };
	uint64_t word;

	memcpy(&word, &words, sizeof(word));
	store64(t->part + USED_AT, word);
}

static bool same(struct vs_place a, struct vs_place b)
{
	return a.at == b.at && a.wrap == b.wrap;
}

static void packed_fresh(struct vs_vq *vq)
{
	struct vs_track *t = &vq->track;

	for (uint32_t i = 0; i < t->entries; i++) {
		store8(&entry_at(t, i)->inflight, 0);
		store16n(&entry_at(t, i)->next, i + 1);
		t->list[i].next = i + 1;
	}
	t->free = 0;
	used_store(t, vq->packed.used, vq->packed.used);
	heads_store(t, 0, 0);	/* with the version: last */
}

/* the batch that was under way when the last back-end ended: into the ring's past, or undone */
static int settle(struct vs_vq *vq, uint16_t *free_head, struct vs_place *used_out)
{
	struct region_head head = head_load(&vq->track);
	struct vs_place used, old;
	struct region_used words;
	uint64_t word = load64(vq->track.part + USED_AT);

	memcpy(&words, &word, sizeof(words));
	used = (struct vs_place){ words.idx, words.wrap & 1 };
	old = (struct vs_place){ words.old_idx, words.old_wrap & 1 };
	if (used.at >= vq->num || old.at >= vq->num)
		return vs_vq_fail(vq, EINVAL, "in-flight region: used place %u or %u is past the queue size %" PRIu32, used.at, old.at,
				  vq->num);
	if (same(used, old) || vs_packed_is_avail(vq, old)) {
		head.packed.free_head = head.packed.old_free_head;
		used = old;
	}
	heads_store(&vq->track, head.packed.free_head, head.packed.free_head);
	used_store(&vq->track, used, used);
	*free_head = head.packed.free_head;
	*used_out = used;
	return 0;
}

/* mark the entry of a list as seen: false when there is no such entry, or it was seen before */
static bool visit(struct vs_track *t, bool *seen, uint32_t i)
{
	if (i >= t->entries || seen[i])
		return false;
	seen[i] = true;
	t->list[i].next = load16n(&entry_at(t, i)->next);
	return true;
}

/* the entries of the chain that begins at first: how many, or -1 when it is no list of free-standing entries */
static int chain_load(struct vs_track *t, bool *seen, uint32_t first)
{
	uint16_t count = load16n(&entry_at(t, first)->num), last = load16n(&entry_at(t, first)->last);
	uint32_t i = first, n;

	t->list[first].last = last;
	t->list[first].count = count;
	for (n = 1; ; n++) {
		if (!visit(t, seen, i))
			return -1;
		if (n == count || i == last)
			break;
		i = t->list[i].next;
	}
	return n == count && i == last ? count : -1;
}

static int lists_load(struct vs_vq *vq, bool *seen, struct vs_found *found, uint32_t *slots)
{
	struct vs_track *t = &vq->track;
	uint32_t n = 0, i;

	for (i = t->free; i != t->entries; i = t->list[i].next) {
		if (!visit(t, seen, i))
			return vs_vq_fail(vq, EINVAL, "in-flight region: the free list loops, or leaves the %" PRIu32 " entries at %"
					  PRIu32, t->entries, i);
		store8(&entry_at(t, i)->inflight, 0);
	}
	for (i = 0; i < t->entries; i++) {
		int count;

		if (seen[i] || !load8(&entry_at(t, i)->inflight))
			continue;
		count = chain_load(t, seen, i);
		if (count < 0)
			return vs_vq_fail(vq, EINVAL, "in-flight region: the chain at entry %" PRIu32 " is no list of %u entries to "
					  "entry %u", i, t->list[i].count, t->list[i].last);
		*slots += count;
		found[n++] = (struct vs_found){ load64(&entry_at(t, i)->counter), i };
	}
	for (i = 0; i < t->entries; i++)
		if (!seen[i])
			return vs_vq_fail(vq, EINVAL, "in-flight region: entry %" PRIu32 " is neither free nor in flight", i);
	if (*slots > vq->num)
		return vs_vq_fail(vq, EINVAL, "in-flight region: %" PRIu32 " descriptors are in flight, the queue has %" PRIu32, *slots,
				  vq->num);
	vs_inflight_found(vq, found, n);
	return 0;
}

static int packed_load(struct vs_vq *vq)
{
	struct vs_track *t = &vq->track;
	struct vs_place used;
	struct vs_found *found;
	uint32_t slots = 0;
	bool *seen;
	int rc;

	if (!head_load(t).version) {
		packed_fresh(vq);
		return 0;
	}
	if (settle(vq, &t->free, &used) < 0)
		return -1;
	found = calloc(t->entries, sizeof(*found));
	seen = calloc(t->entries, sizeof(*seen));
	rc = found && seen ? lists_load(vq, seen, found, &slots) :
			     vs_vq_fail(vq, EFAULT, "no memory for what was in flight");
	free(found);
	free(seen);
	if (rc < 0)
		return -1;
	vq->packed.used = used;
	vq->packed.avail = vs_packed_forward(vq, used, slots);
	return 1;
}

void vs_inflight_record(struct vs_vq *vq, uint32_t n, struct vs_slot d)
{
	struct vs_track *t = &vq->track;
	struct vs_packed_entry *e;

	if (!n)
		t->record = t->free;
	else
		t->record = t->list[t->record].next;
	e = entry_at(t, t->record);
	store64(&e->addr, d.addr);
	store32n(&e->len, d.len);
	store16n(&e->flags, d.flags);
	store16n(&e->id, d.id);
}

struct vs_slot vs_inflight_recorded(const struct vs_vq *vq, uint16_t entry, uint32_t n)
{
	const struct vs_track *t = &vq->track;
	const struct vs_packed_entry *e;

	while (n--)
		entry = t->list[entry].next;
	e = entry_at(t, entry);
	return (struct vs_slot){ load64(&e->addr), load32n(&e->len), load16n(&e->id), load16n(&e->flags) };
}

static void packed_popped(struct vs_vq *vq, struct vs_chain *c)
{
	struct vs_track *t = &vq->track;
	uint16_t first = t->free, last = t->record;	/* the chain's last descriptor was recorded last */
	struct vs_packed_entry *e = entry_at(t, first);

	store64(&e->counter, t->counter++);
	store16n(&e->num, c->descs);
	store16n(&e->last, last);
	store8(&e->inflight, 1);
	t->list[first].last = last;
	t->list[first].count = c->descs;
	t->free = t->list[last].next;
	heads_store(t, t->free, t->free);
	c->entry = first;
}

/* back into the free list, in front */
static void give_back(struct vs_track *t, uint16_t first)
{
	uint16_t last = t->list[first].last;

	t->list[last].next = t->free;
	store16n(&entry_at(t, last)->next, t->free);
	t->free = first;
}

static void packed_unpopped(struct vs_vq *vq, const struct vs_chain *c)
{
	give_back(&vq->track, c->entry);
	heads_store(&vq->track, vq->track.free, vq->track.free);
	store8(&entry_at(&vq->track, c->entry)->inflight, 0);
}

static void packed_publish(struct vs_vq *vq)
{
	struct vs_track *t = &vq->track;
	uint16_t old = t->free;

	for (uint32_t i = 0; i < t->n_batch; i++)
		give_back(t, t->batch[i]);
	heads_store(t, t->free, old);
	used_store(t, vq->packed.used, vq->packed.batch);
}

static void packed_published(struct vs_vq *vq)
{
	struct vs_track *t = &vq->track;

	for (uint32_t i = 0; i < t->n_batch; i++)
		store8(&entry_at(t, t->batch[i])->inflight, 0);
	t->n_batch = 0;
	heads_store(t, t->free, t->free);
	used_store(t, vq->packed.used, vq->packed.used);
}

const struct vs_inflight_ops vs_inflight_packed = {
	.load = packed_load,
	.popped = packed_popped,
	.unpopped = packed_unpopped,
	.publish = packed_publish,
	.published = packed_published,
};
