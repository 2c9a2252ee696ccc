/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_iotlb - the table of IOVA ranges, and the views made of it. The rules are in vs_iotlb.h.
 *
 * The table is an array sorted by IOVA, of ranges that do not overlap; ranges are kept as first and last byte, so that one that
 * ends at 2^64 is a range like any other. It is small and changes by messages, which cost more than moving it in memory.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "vs_iotlb.h"
#include "vs_mem_priv.h"

struct entry {
	uint64_t first, last, uva;
	uint64_t age;			/* of updates: the smallest is the oldest */
	uint8_t perm;
};

struct vs_iotlb {
	struct entry *e;		/* n of VS_IOTLB_MAX + 1: a split in two needs one more for a moment */
	int n;
	uint64_t updates;
};

struct vs_iotlb *vs_iotlb_new(void)
{
	struct vs_iotlb *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	t->e = malloc((VS_IOTLB_MAX + 1) * sizeof(*t->e));
	if (!t->e) {
		free(t);
		return NULL;
	}
	return t;
}

void vs_iotlb_free(struct vs_iotlb *t)
{
	if (!t)
		return;
	free(t->e);
	free(t);
}

int vs_iotlb_count(const struct vs_iotlb *t)
{
	return t->n;
}

void vs_iotlb_clear(struct vs_iotlb *t)
{
	t->n = 0;
}

static void entry_remove(struct vs_iotlb *t, int i)
{
	memmove(t->e + i, t->e + i + 1, (--t->n - i) * sizeof(*t->e));
}

static void entry_insert(struct vs_iotlb *t, int i, struct entry e)
{
	memmove(t->e + i + 1, t->e + i, (t->n++ - i) * sizeof(*t->e));
	t->e[i] = e;
}

/* make room for one more */
static void evict(struct vs_iotlb *t)
{
	int oldest = 0;

	if (t->n < VS_IOTLB_MAX)
		return;
	for (int i = 1; i < t->n; i++)
		if (t->e[i].age < t->e[oldest].age)
			oldest = i;
	entry_remove(t, oldest);
}

/* forget [first, last]; what overlaps it in part is cut. Returns where a range that starts at first belongs. */
static int cut(struct vs_iotlb *t, uint64_t first, uint64_t last)
{
	int i = 0;

	while (i < t->n && t->e[i].last < first)
		i++;
	if (i < t->n && t->e[i].first < first) {
		struct entry tail = t->e[i];

		t->e[i].last = first - 1;
		i++;
		if (tail.last > last) {		/* the hole is inside one entry */
			tail.uva += last + 1 - tail.first;
			tail.first = last + 1;
			entry_insert(t, i, tail);
			return i;
		}
	}
	while (i < t->n && t->e[i].last <= last)
		entry_remove(t, i);
	if (i < t->n && t->e[i].first <= last) {
		t->e[i].uva += last + 1 - t->e[i].first;
		t->e[i].first = last + 1;
	}
	return i;
}

int vs_iotlb_update(struct vs_iotlb *t, uint64_t iova, uint64_t size, uint64_t uva, int perm, struct vs_err *err)
{
	uint64_t last = iova + size - 1;

	if (!size || last < iova || uva + size - 1 < uva)
		return vs_err_set(err, EINVAL, "IOTLB update {iova 0x%" PRIx64 ", size 0x%" PRIx64 ", uaddr 0x%" PRIx64
				  "} is empty or runs past the end of the address space", iova, size, uva);
	if (perm < 0 || perm > (VS_PERM_READ | VS_PERM_WRITE))
		return vs_err_set(err, EINVAL, "IOTLB update at iova 0x%" PRIx64 ": permissions 0x%x", iova, perm);
	cut(t, iova, last);
	while (t->n >= VS_IOTLB_MAX)	/* a split may have made one more than that */
		evict(t);
	/* only now: evict() moves the entries */
	entry_insert(t, cut(t, iova, last), (struct entry){ iova, last, uva, t->updates++, perm });
	return 0;
}

int vs_iotlb_invalidate(struct vs_iotlb *t, uint64_t iova, uint64_t size)
{
	uint64_t last = iova + size - 1;

	if (!size)
		return -EINVAL;
	cut(t, iova, last < iova ? UINT64_MAX : last);
	while (t->n > VS_IOTLB_MAX)
		evict(t);
	return 0;
}

/* does the next range go on where the last one of the view ends, in the guest's addresses and in ours? */
static bool goes_on(const struct vs_mem *v, struct vs_range r, int perm)
{
	const struct vs_range *last = &v->ranges[v->n - 1];

	return v->n && last->start + last->size == r.start && last->host + last->size == r.host && last->region == r.region &&
	       v->perms[v->n - 1] == perm;
}

struct vs_mem *vs_iotlb_view(const struct vs_iotlb *t, const struct vs_mem *m)
{
	struct vs_mem *v = calloc(1, sizeof(*v) + (size_t)t->n * (sizeof(struct vs_range) + 1));

	if (!v)
		return NULL;
	atomic_init(&v->refs, 1);
	v->by_gpa = v->by_uva = v->ranges;
	v->perms = (uint8_t *)(v->ranges + t->n);
	for (int i = 0; i < t->n; i++) {
		const struct entry *e = &t->e[i];
		const struct vs_range *r = vs_range_find(m->by_uva, m->n, e->uva);
		struct vs_range part;

		if (!r)
			continue;	/* its region is gone, or was never there */
		/* no further than the region; bytes after the first are counted, since there may be 2^64 */
		part = (struct vs_range){ e->first, r->size - (e->uva - r->start), r->host + (e->uva - r->start), r->region };
		if (e->last - e->first < part.size - 1)
			part.size = e->last - e->first + 1;
		if (goes_on(v, part, e->perm)) {
			v->ranges[v->n - 1].size += part.size;
			continue;
		}
		atomic_fetch_add_explicit(&r->region->refs, 1, memory_order_relaxed);
		v->perms[v->n] = e->perm;
		v->ranges[v->n++] = part;
	}
	return v;
}

bool vs_mem_missing(const struct vs_mem *view, uint64_t iova, uint64_t len, int perm, uint64_t *at)
{
	const struct vs_range *r;
	uint64_t left;

	for (; len; iova += left, len -= left) {
		r = vs_range_find(view->by_gpa, view->n, iova);
		if (!r || (view->perms && (view->perms[r - view->by_gpa] & perm) != perm)) {
			*at = iova;
			return true;
		}
		left = r->size - (iova - r->start);
		if (left >= len)
			return false;
	}
	return false;
}
