/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_mem_priv - inside of the memory map, for the files of csrc/core.
 *
 * A snapshot (struct vs_mem) keeps its regions twice, sorted by guest-physical and by front-end address, as plain ranges: a
 * lookup touches one small array and no region.
 */
#ifndef VS_MEM_PRIV_H
#define VS_MEM_PRIV_H

#include <stdatomic.h>

#include "vs_mem.h"

#define vs_likely(x)	__builtin_expect(!!(x), 1)
#define vs_unlikely(x)	__builtin_expect(!!(x), 0)

/* Fill *err (if there is one). Returns -code, to end a function with. */
int vs_err_set(struct vs_err *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
int vs_err_vset(struct vs_err *err, int code, const char *fmt, __builtin_va_list ap);

/* vs_sigbus.c: address ranges that survive a SIGBUS. A guard is never freed, only reused. */
struct vs_guard;
struct vs_guard *vs_guard_add(void *start, size_t len);		/* NULL: no memory. Installs the handler once */
void vs_guard_del(struct vs_guard *g);				/* before munmap */
bool vs_guard_poisoned(const struct vs_guard *g);
extern atomic_uint vs_guards_poisoned;				/* guards in use that are poisoned; nearly always 0 */

struct vs_region {
	atomic_uint refs;
	uint64_t gpa, size, uva;
	uint8_t *host;			/* the byte at gpa */
	void *map;			/* what mmap gave: starts before host when the offset is not page-aligned */
	size_t map_len;
	struct vs_guard *guard;
};

struct vs_range {
	uint64_t start, size;
	uint8_t *host;
	struct vs_region *region;
};

struct vs_mem {
	atomic_uint refs;
	int n;
	struct vs_range *by_gpa, *by_uva;	/* both in ranges[], n each, sorted by start, disjoint; a view has one for both */
	uint8_t *perms;				/* of a view (vs_iotlb.h), beside by_gpa; NULL: everything may be read and written */
	struct vs_range ranges[];
};

/* the guest-physical address of a host address inside the map */
uint64_t vs_mem_gpa_of(const struct vs_mem *m, const void *host);

static inline bool vs_mem_is_view(const struct vs_mem *m)
{
	return m->perms;
}

/* the range that holds addr, or NULL */
static inline const struct vs_range *vs_range_find(const struct vs_range *t, int n, uint64_t addr)
{
	int lo = 0, hi = n;	/* t[0..lo) start at or below addr, t[hi..n) above */

	while (lo < hi) {
		int mid = (lo + hi) / 2;

		if (t[mid].start <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (!lo || addr - t[lo - 1].start >= t[lo - 1].size)
		return NULL;
	return &t[lo - 1];
}

#endif
