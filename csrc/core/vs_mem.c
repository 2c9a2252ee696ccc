/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_mem - regions and snapshots of the guest memory map. The rules are in vs_mem.h; SIGBUS is the subject of vs_sigbus.c.
 */
#include <errno.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "vs_mem_priv.h"

static atomic_int regions_live;

int vs_err_vset(struct vs_err *err, int code, const char *fmt, va_list ap)
{
	if (err) {
		err->code = code;
		vsnprintf(err->text, sizeof(err->text), fmt, ap);
	}
	return -code;
}

int vs_err_set(struct vs_err *err, int code, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vs_err_vset(err, code, fmt, ap);
	va_end(ap);
	return -code;
}

/*
 * Everything that can be wrong with what a front-end asks to map, in one place. The sums are checked as "x + size wraps",
 * size being at least 1; a range that ends exactly at 2^64 counts as wrapped, so that start + size always is a number.
 */
static int region_check(int fd, uint64_t gpa, uint64_t size, uint64_t uva, uint64_t offset, struct stat *st, struct vs_err *err)
{
	uint64_t sum;

	if (!size)
		return vs_err_set(err, EINVAL, "memory region at gpa 0x%" PRIx64 " has size 0", gpa);
	if (__builtin_add_overflow(gpa, size, &sum) || __builtin_add_overflow(uva, size, &sum))
		return vs_err_set(err, EINVAL, "memory region {gpa 0x%" PRIx64 ", size 0x%" PRIx64 ", uva 0x%" PRIx64
				  "} runs past the end of the address space", gpa, size, uva);
	if (__builtin_add_overflow(offset, size, &sum) || sum > INT64_MAX)
		return vs_err_set(err, EINVAL, "memory region at gpa 0x%" PRIx64 ": offset 0x%" PRIx64 " + size 0x%" PRIx64
				  " is past the end of any file", gpa, offset, size);
	if (fstat(fd, st) < 0)
		return vs_err_set(err, errno, "memory region at gpa 0x%" PRIx64 ": fd %d: %s", gpa, fd, strerror(errno));
	if (!S_ISREG(st->st_mode))
		return vs_err_set(err, EINVAL, "memory region at gpa 0x%" PRIx64 ": fd is not a file (mode 0%o): share memory "
				  "from a memfd or a file", gpa, st->st_mode);
	if ((uint64_t)st->st_size < sum)
		return vs_err_set(err, EINVAL, "memory region at gpa 0x%" PRIx64 ": the file has 0x%" PRIx64 " bytes, offset 0x%"
				  PRIx64 " + size 0x%" PRIx64 " needs more", gpa, (uint64_t)st->st_size, offset, size);
	return 0;
}

/* what offset and length of a mapping of this file must be multiples of */
static uint64_t map_unit(int fd)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS_MAGIC)
		return fs.f_bsize;
	return sysconf(_SC_PAGESIZE);
}

struct vs_region *vs_region_map(int fd, uint64_t gpa, uint64_t size, uint64_t uva, uint64_t offset, struct vs_err *err)
{
	struct vs_region *r;
	uint64_t unit, before;
	struct stat st;

	if (region_check(fd, gpa, size, uva, offset, &st, err) < 0)
		return NULL;
	r = calloc(1, sizeof(*r));
	if (!r) {
		vs_err_set(err, ENOMEM, "no memory for a region");
		return NULL;
	}
	unit = map_unit(fd);
	before = offset % unit;
	atomic_init(&r->refs, 1);
	r->gpa = gpa;
	r->size = size;
	r->uva = uva;
	/* no overflow: offset + size fits a file offset, and unit is small next to what is left of 64 bits */
	r->map_len = (before + size + unit - 1) / unit * unit;
	r->map = mmap(NULL, r->map_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, offset - before);
	if (r->map == MAP_FAILED) {
		vs_err_set(err, errno, "memory region {gpa 0x%" PRIx64 ", size 0x%" PRIx64 ", offset 0x%" PRIx64 "}: mmap: %s",
			   gpa, size, offset, strerror(errno));
		free(r);
		return NULL;
	}
	madvise(r->map, r->map_len, MADV_DONTDUMP);	/* guest memory has no place in our core dumps; advice only */
	r->host = (uint8_t *)r->map + before;
	r->guard = vs_guard_add(r->map, r->map_len);
	if (!r->guard) {
		vs_err_set(err, ENOMEM, "no memory to guard a region");
		munmap(r->map, r->map_len);
		free(r);
		return NULL;
	}
	atomic_fetch_add(&regions_live, 1);
	return r;
}

struct vs_region *vs_region_get(struct vs_region *r)
{
	atomic_fetch_add_explicit(&r->refs, 1, memory_order_relaxed);
	return r;
}

void vs_region_put(struct vs_region *r)
{
	/* acq_rel: what other threads did with the memory happened before the unmap */
	if (!r || atomic_fetch_sub_explicit(&r->refs, 1, memory_order_acq_rel) != 1)
		return;
	vs_guard_del(r->guard);
	munmap(r->map, r->map_len);
	free(r);
	atomic_fetch_sub(&regions_live, 1);
}

bool vs_region_poisoned(const struct vs_region *r)
{
	return vs_guard_poisoned(r->guard);
}

uint64_t vs_region_gpa(const struct vs_region *r)
{
	return r->gpa;
}

uint64_t vs_region_size(const struct vs_region *r)
{
	return r->size;
}

uint64_t vs_region_uva(const struct vs_region *r)
{
	return r->uva;
}

int vs_region_count_live(void)
{
	return atomic_load(&regions_live);
}

static struct vs_mem *mem_alloc(int n)
{
	struct vs_mem *m = calloc(1, sizeof(*m) + 2 * (size_t)n * sizeof(struct vs_range));

	if (!m)
		return NULL;
	atomic_init(&m->refs, 1);
	m->n = n;
	m->by_gpa = m->ranges;
	m->by_uva = m->ranges + n;
	return m;
}

struct vs_mem *vs_mem_new(void)
{
	return mem_alloc(0);
}

/* where start goes in t, or -1 when [start, start + size) overlaps what is there (which is then *other) */
static int range_slot(const struct vs_range *t, int n, uint64_t start, uint64_t size, const struct vs_range **other)
{
	int i = 0;

	while (i < n && t[i].start < start)
		i++;
	*other = NULL;
	if (i > 0 && start - t[i - 1].start < t[i - 1].size)
		*other = &t[i - 1];
	else if (i < n && t[i].start - start < size)
		*other = &t[i];
	return *other ? -1 : i;
}

static void range_insert(struct vs_range *to, const struct vs_range *from, int n, int at, uint64_t start, struct vs_region *r)
{
	memcpy(to, from, at * sizeof(*to));
	to[at] = (struct vs_range){ start, r->size, r->host, r };
	memcpy(to + at + 1, from + at, (n - at) * sizeof(*to));
}

static void range_remove(struct vs_range *to, const struct vs_range *from, int n, const struct vs_region *r)
{
	for (int i = 0; i < n; i++)
		if (from[i].region != r)
			*to++ = from[i];
}

struct vs_mem *vs_mem_with(const struct vs_mem *m, struct vs_region *r, struct vs_err *err)
{
	const struct vs_range *other;
	struct vs_mem *new;
	int gpa_at, uva_at;

	if (m->n >= VS_MAX_REGIONS) {
		vs_err_set(err, ENOSPC, "the memory table is full: %d regions", m->n);
		return NULL;
	}
	gpa_at = range_slot(m->by_gpa, m->n, r->gpa, r->size, &other);
	uva_at = gpa_at < 0 ? -1 : range_slot(m->by_uva, m->n, r->uva, r->size, &other);
	if (uva_at < 0) {
		const struct vs_region *o = other->region;

		vs_err_set(err, EEXIST, "memory region {gpa 0x%" PRIx64 ", size 0x%" PRIx64 ", uva 0x%" PRIx64 "} overlaps {gpa 0x%"
			   PRIx64 ", size 0x%" PRIx64 ", uva 0x%" PRIx64 "}", r->gpa, r->size, r->uva, o->gpa, o->size, o->uva);
		return NULL;
	}
	new = mem_alloc(m->n + 1);
	if (!new) {
		vs_err_set(err, ENOMEM, "no memory for a memory map of %d regions", m->n + 1);
		return NULL;
	}
	range_insert(new->by_gpa, m->by_gpa, m->n, gpa_at, r->gpa, r);
	range_insert(new->by_uva, m->by_uva, m->n, uva_at, r->uva, r);
	for (int i = 0; i < new->n; i++)
		vs_region_get(new->by_gpa[i].region);
	return new;
}

struct vs_mem *vs_mem_without(const struct vs_mem *m, uint64_t gpa, uint64_t size, uint64_t uva, struct vs_err *err)
{
	const struct vs_range *at = vs_range_find(m->by_gpa, m->n, gpa);
	const struct vs_region *r = at ? at->region : NULL;
	struct vs_mem *new;

	if (!r || r->gpa != gpa || r->size != size || r->uva != uva) {
		vs_err_set(err, ENOENT, "no memory region {gpa 0x%" PRIx64 ", size 0x%" PRIx64 ", uva 0x%" PRIx64
			   "} in the table", gpa, size, uva);
		return NULL;
	}
	new = mem_alloc(m->n - 1);
	if (!new) {
		vs_err_set(err, ENOMEM, "no memory for a memory map of %d regions", m->n - 1);
		return NULL;
	}
	range_remove(new->by_gpa, m->by_gpa, m->n, r);
	range_remove(new->by_uva, m->by_uva, m->n, r);
	for (int i = 0; i < new->n; i++)
		vs_region_get(new->by_gpa[i].region);
	return new;
}

struct vs_mem *vs_mem_get(struct vs_mem *m)
{
	atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
	return m;
}

void vs_mem_put(struct vs_mem *m)
{
	if (!m || atomic_fetch_sub_explicit(&m->refs, 1, memory_order_acq_rel) != 1)
		return;
	for (int i = 0; i < m->n; i++)
		vs_region_put(m->by_gpa[i].region);
	free(m);
}

int vs_mem_count(const struct vs_mem *m)
{
	return m->n;
}

bool vs_mem_poisoned(const struct vs_mem *m)
{
	if (vs_likely(!atomic_load_explicit(&vs_guards_poisoned, memory_order_relaxed)))
		return false;
	for (int i = 0; i < m->n; i++)
		if (vs_guard_poisoned(m->by_gpa[i].region->guard))
			return true;
	return false;
}

static void *range_ptr(const struct vs_range *t, int n, uint64_t addr, uint64_t len)
{
	const struct vs_range *r = vs_range_find(t, n, addr);

	if (!r || len > r->size - (addr - r->start))
		return NULL;
	return r->host + (addr - r->start);
}

void *vs_mem_gpa(const struct vs_mem *m, uint64_t gpa, uint64_t len)
{
	return range_ptr(m->by_gpa, m->n, gpa, len);
}

void *vs_mem_uva(const struct vs_mem *m, uint64_t uva, uint64_t len)
{
	return range_ptr(m->by_uva, m->n, uva, len);
}

int vs_mem_iov(const struct vs_mem *m, uint64_t gpa, uint64_t len, struct iovec *iov, int max)
{
	const struct vs_range *r, *end = m->by_gpa + m->n;
	int n = 0;

	if (!len)
		return 0;
	r = vs_range_find(m->by_gpa, m->n, gpa);
	/* gpa cannot wrap: it moves to the end of a range, and start + size of a range does not wrap */
	for (; r && r < end && gpa - r->start < r->size; r++) {
		uint64_t off = gpa - r->start, part = r->size - off;

		if (n == max)
			return -E2BIG;
		if (part > len)
			part = len;
		iov[n].iov_base = r->host + off;
		iov[n++].iov_len = part;
		len -= part;
		gpa += part;
		if (!len)
			return n;
	}
	return -EFAULT;
}

uint64_t vs_mem_gpa_of(const struct vs_mem *m, const void *host)
{
	const struct vs_range *r = m->by_gpa;

	/* linear, and rare: only a dirty log asks. That host is in the map is the caller's promise. */
	while ((uintptr_t)host - (uintptr_t)r->host >= r->size)
		r++;
	/* of the region, not of the range: that one's start is an IOVA in a view (vs_iotlb.h) */
	return r->region->gpa + ((uintptr_t)host - (uintptr_t)r->region->host);
}

void vs_mb(void)
{
	atomic_thread_fence(memory_order_seq_cst);
}
