/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_inflight - which chains are in flight, kept in memory that outlives this process (the vhost-user document, "Inflight I/O
 * tracking"). This file: what both layouts share, and the split one.
 *
 * The memory is a file that the back-end makes and the front-end keeps and hands to the next back-end. A back-end may be killed
 * between any two instructions; what it stored before is there then, in program order, what comes after is not. So there is one
 * store that makes a chain count as in flight, one that shows a batch of completions to the driver, and the next back-end can
 * tell on which side of them the last one died. That needs no fence, only stores that the compiler keeps in order (release).
 *
 * The front-end, and through it whoever else has the file, can write to it at any time. While a ring runs the region is only
 * written to: what is needed of it is in struct vs_track. It is read once, at the start, and all that is read is checked: an
 * entry is an index below the queue size, a list has no loops. A region that contradicts itself or the ring breaks the ring.
 *
 * Split layout: 16 bytes, then one entry for each descriptor, of which those of heads count.
 *
 *   pop       entry.counter, entry.inflight = 1                             | from here on it is in flight
 *   publish   entry.next = last_batch_head, last_batch_head = it; for each of the batch
 *             used ring's idx                                                 | from here on the driver has the batch
 *             entry.inflight = 0 for each of the batch
 *             used_idx = idx
 *   start     used_idx != idx: it died in between, and the first (idx - used_idx) of the list are the batch: inflight = 0 for each.
 *             avail index = idx + entries that are in flight; these are popped again in the order of their counters
 *
 * The avail index of SET_VRING_BASE does not matter then: after a crash the front-end cannot know it (QEMU sends used_idx).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "vs_inflight.h"

_Static_assert(sizeof(struct vs_split_entry) == 16 && sizeof(struct vs_packed_entry) == 32, "as the document has them");
_Static_assert(SPLIT_HEAD == 16 && PACKED_HEAD == 32, "as the document has them");

enum { ALIGN = 64 };		/* of each queue's part; what other back-ends take, too */

uint64_t vs_inflight_size(bool packed, uint32_t entries)
{
	uint64_t size = packed ? PACKED_HEAD + (uint64_t)entries * sizeof(struct vs_packed_entry) :
				 SPLIT_HEAD + (uint64_t)entries * sizeof(struct vs_split_entry);

	return (size + ALIGN - 1) / ALIGN * ALIGN;
}

void vs_inflight_close(struct vs_vq *vq)
{
	struct vs_track *t = &vq->track;

	free(t->batch);
	free(t->again);
	free(t->list);
	*t = (struct vs_track){ 0 };
}

int vs_inflight_open(struct vs_vq *vq, struct vs_err *err)
{
	uint32_t entries = vq->inflight_entries;
	bool packed = vs_vq_feature(vq, VIRTIO_F_RING_PACKED);
	uint64_t size = vs_inflight_size(packed, entries), at = size * vq->index;
	struct vs_track *t = &vq->track;
	struct region_head head;

	vs_inflight_close(vq);
	if (!vq->inflight)
		return 0;
	if (vq->num > entries)
		return vs_err_set(err, EINVAL, "queue size %" PRIu32 ", but the in-flight region was made for %" PRIu32, vq->num,
				  entries);
	if (at + size > vq->inflight->size)
		return vs_err_set(err, EINVAL, "the in-flight region has 0x%" PRIx64 " bytes, this queue's part is 0x%" PRIx64
				  " bytes at 0x%" PRIx64, vq->inflight->size, size, at);
	if ((uintptr_t)(vq->inflight->host + at) % sizeof(uint64_t))
		return vs_err_set(err, EINVAL, "the in-flight region is not aligned to 8 bytes");
	t->part = vq->inflight->host + at;
	head = head_load(t);
	if (head.version > INFLIGHT_VERSION || (head.version && head.desc_num != entries)) {
		t->part = NULL;
		return vs_err_set(err, EINVAL, "in-flight region, queue %u: version %u for %u descriptors, should be %d for %" PRIu32,
				  vq->index, head.version, head.desc_num, INFLIGHT_VERSION, entries);
	}
	t->entries = entries;
	t->batch = calloc(vq->num, sizeof(*t->batch));
	t->again = calloc(entries, sizeof(*t->again));
	t->list = packed ? calloc(entries, sizeof(*t->list)) : NULL;
	if (!t->batch || !t->again || (packed && !t->list)) {
		vs_inflight_close(vq);
		return vs_err_set(err, ENOMEM, "no memory to track %" PRIu32 " descriptors in flight", entries);
	}
	return 0;
}

static int by_counter(const void *a, const void *b)
{
	uint64_t x = ((const struct vs_found *)a)->counter, y = ((const struct vs_found *)b)->counter;

	return x < y ? -1 : x > y;
}

void vs_inflight_found(struct vs_vq *vq, struct vs_found *found, uint32_t n)
{
	struct vs_track *t = &vq->track;

	qsort(found, n, sizeof(*found), by_counter);
	for (uint32_t i = 0; i < n; i++)
		t->again[i] = found[i].entry;
	t->n_again = n;
	t->counter = n ? found[n - 1].counter + 1 : 0;
}

/* ---- the split layout */

static struct vs_split_entry *entry_at(const struct vs_track *t, uint32_t i)
{
	return (struct vs_split_entry *)(t->part + SPLIT_HEAD) + i;
}

static void split_head_store(struct vs_vq *vq, uint16_t used_idx)
{
	const struct region_head head = {
		.version = INFLIGHT_VERSION, .desc_num = vq->track.entries, .split = { vq->track.last_batch, used_idx },
	};

	head_store(&vq->track, head);
}

static void split_fresh(struct vs_vq *vq)
{
	for (uint32_t i = 0; i < vq->track.entries; i++)
		store8(&entry_at(&vq->track, i)->inflight, 0);
	vq->track.last_batch = 0;
	split_head_store(vq, vq->split.used_next);
}

static int split_load(struct vs_vq *vq)
{
	struct region_head head = head_load(&vq->track);
	uint16_t used = vq->split.used_next, batch = used - head.split.used_idx, at = head.split.last_batch_head;
	struct vs_track *t = &vq->track;
	struct vs_found *found;
	uint32_t n = 0;

	if (!head.version) {
		split_fresh(vq);
		return 0;
	}
	if (batch > vq->num)
		return vs_vq_fail(vq, EINVAL, "in-flight region: used_idx is %u, used.idx of the ring is %u: the region is another "
				  "ring's, or the driver wrote to used.idx", head.split.used_idx, used);
	for (; batch; batch--) {
		if (at >= vq->num)
			return vs_vq_fail(vq, EINVAL, "in-flight region: the last batch has entry %u, past the queue size %" PRIu32,
					  at, vq->num);
		store8(&entry_at(t, at)->inflight, 0);
		at = load16n(&entry_at(t, at)->next);
	}
	t->last_batch = head.split.last_batch_head < vq->num ? head.split.last_batch_head : 0;
	split_head_store(vq, used);
	found = calloc(vq->num, sizeof(*found));
	if (!found)
		return vs_vq_fail(vq, EFAULT, "no memory for what was in flight");
	for (uint32_t i = 0; i < t->entries; i++) {
		if (!load8(&entry_at(t, i)->inflight))
			continue;
		if (i >= vq->num) {
			free(found);
			return vs_vq_fail(vq, EINVAL, "in-flight region: entry %" PRIu32 " is in flight, past the queue size %" PRIu32,
					  i, vq->num);
		}
		found[n++] = (struct vs_found){ load64(&entry_at(t, i)->counter), i };
	}
	vs_inflight_found(vq, found, n);
	free(found);
	vq->split.avail_next = vq->split.avail_seen = used + n;
	return 1;
}

static void split_popped(struct vs_vq *vq, struct vs_chain *c)
{
	struct vs_split_entry *e = entry_at(&vq->track, c->head);

	store64(&e->counter, vq->track.counter++);
	store8(&e->inflight, 1);
}

static void split_unpopped(struct vs_vq *vq, const struct vs_chain *c)
{
	store8(&entry_at(&vq->track, c->head)->inflight, 0);
}

static void split_publish(struct vs_vq *vq)
{
	struct vs_track *t = &vq->track;

	for (uint32_t i = 0; i < t->n_batch; i++) {
		store16n(&entry_at(t, t->batch[i])->next, t->last_batch);
		t->last_batch = t->batch[i];
	}
	split_head_store(vq, vq->split.used_published);
}

static void split_published(struct vs_vq *vq)
{
	struct vs_track *t = &vq->track;

	for (uint32_t i = 0; i < t->n_batch; i++)
		store8(&entry_at(t, t->batch[i])->inflight, 0);
	t->n_batch = 0;
	split_head_store(vq, vq->split.used_published);
}

const struct vs_inflight_ops vs_inflight_split = {
	.load = split_load,
	.popped = split_popped,
	.unpopped = split_unpopped,
	.publish = split_publish,
	.published = split_published,
};
