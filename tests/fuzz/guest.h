/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * guest - the guest's memory for the ring targets, and what may be said of every chain that is popped from it.
 *
 * One memfd, made once, of 32 KiB. It is mapped in four regions that have what is awkward: two are adjacent in the guest and not
 * in the host, one has a size that is no multiple of a page, one ends at the top of the address space.
 *
 *	file	0x0000 - 0x3ff0		gpa 0x10010		rings and tables
 *		0x4000 - 0x5b10		gpa 0x14000		buffers; follows the first without a gap
 *		0x6000 - 0x7000		gpa 0x40000		buffers
 *		0x7000 - 0x7800		gpa 2^64 - 0x801	buffers
 *		0x7800 - 0x8000		nowhere			a canary: nobody writes here
 *
 * The fuzzer writes through a mapping of its own, as a guest does. In the device's, ASan knows what lies behind a region's end: what
 * is mapped only because pages are whole may not be touched.
 */
#ifndef GUEST_H
#define GUEST_H

#include <sys/mman.h>

#ifndef __has_feature
#define __has_feature(x) 0	/* clang's; gcc has __SANITIZE_ADDRESS__ */
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, len) ((void)(at), (void)(len))
#define ASAN_UNPOISON_MEMORY_REGION(at, len) ((void)(at), (void)(len))
#endif

#include "fuzz.h"
#include "vs_vq_priv.h"

enum { RAM = 0x8000, CANARY_AT = 0x7800, CANARY = 0xa5, REGIONS = 4, UVA = 0x7000000 };

static const struct { uint64_t gpa, size, offset; } layout[REGIONS] = {
	{ 0x10010, 0x3ff0, 0 },
	{ 0x14000, 0x1b10, 0x4000 },
	{ 0x40000, 0x1000, 0x6000 },
	{ UINT64_MAX - 0x800, 0x800, 0x7000 },
};

static uint8_t *ram;
static int ram_fd;

static inline void guest_init(void)
{
	ram_fd = memfd_create("fuzz", MFD_CLOEXEC);
	MUST(ram_fd >= 0 && ftruncate(ram_fd, RAM) == 0, "no memfd");
	ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
	MUST(ram != MAP_FAILED, "no memory");
}

static inline uint64_t uva_of(int region)
{
	return UVA + ((uint64_t)region << 20);
}

/* a map of the regions whose bits are set */
static inline struct vs_mem *guest_map(unsigned regions)
{
	struct vs_mem *m = vs_mem_new();

	MUST(m, "no memory");
	for (int i = 0; i < REGIONS; i++) {
		struct vs_err err = { 0 };
		struct vs_region *r;
		struct vs_mem *with;

		if (!(regions & 1u << i))
			continue;
		r = vs_region_map(ram_fd, layout[i].gpa, layout[i].size, uva_of(i), layout[i].offset, &err);
		MUST(r, "%s", err.text);
		ASAN_UNPOISON_MEMORY_REGION(r->map, r->map_len);
		ASAN_POISON_MEMORY_REGION(r->host + r->size, (uint8_t *)r->map + r->map_len - (r->host + r->size));
		with = vs_mem_with(m, r, &err);
		MUST(with, "%s", err.text);
		vs_region_put(r);
		vs_mem_put(m);
		m = with;
	}
	return m;
}

/* a guest address, mostly one that is mapped or nearly so */
static inline uint64_t guest_address(struct cursor *c)
{
	uint32_t region = below(c, REGIONS + 1);

	if (region == REGIONS)
		return odd_number(c);
	return layout[region].gpa + (take(c, 2) & 0x7fff) % (layout[region].size + 16) - (take(c, 1) == 0 ? 8 : 0);
}

/* every iovec of n lies in one region of the map that the chain holds; returns their bytes */
static inline uint64_t check_iov(const struct vs_chain *c, const struct iovec *iov, unsigned n)
{
	uint64_t bytes = 0;

	for (unsigned i = 0; i < n; i++) {
		const uint8_t *start = iov[i].iov_base;
		bool inside = false;

		for (int k = 0; k < c->mem->n; k++) {
			const struct vs_range *r = &c->mem->by_gpa[k];

			inside |= start >= r->host && iov[i].iov_len <= r->size &&
				  (uint64_t)(start - r->host) <= r->size - iov[i].iov_len;
		}
		MUST(inside, "iovec %u of head %u: %p, %zu bytes", i, c->head, iov[i].iov_base, iov[i].iov_len);
		bytes += iov[i].iov_len;
	}
	return bytes;
}

/* what holds for every popped chain, whatever the driver wrote and writes meanwhile */
static inline void check_chain(const struct vs_vq *vq, const struct vs_chain *c)
{
	MUST(c->run && c->mem, "head %u", c->head);
	MUST(c->head < vq->num && c->descs >= 1 && c->descs <= vq->num, "head %u, %u descriptors", c->head, c->descs);
	MUST((unsigned)c->n_out + c->n_in <= 2 * VS_CHAIN_MAX && (unsigned)c->n_out + c->n_in <= c->cap, "%u + %u", c->n_out, c->n_in);
	MUST(check_iov(c, c->iov, c->n_out) == c->out_len, "out_len %lu", c->out_len);
	MUST(check_iov(c, c->iov + c->n_out, c->n_in) == c->in_len, "in_len %lu", c->in_len);
	MUST(c->out_len + c->in_len <= 1ull << 32, "%lu + %lu bytes", c->out_len, c->in_len);
	MUST(vq->in_flight >= 1 && vq->in_flight <= vq->num, "%u in flight", vq->in_flight);
}

static inline void check_canary(void)
{
	for (int i = CANARY_AT; i < RAM; i++)
		MUST(ram[i] == CANARY, "byte 0x%x was written", i);
}

#endif
