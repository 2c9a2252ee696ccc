/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_desc - what the two ring formats share when they walk descriptors: flags, evidence, and adding a buffer to a chain.
 *
 * A struct desc is our own copy. It is judged and used, the driver's memory is not looked at again.
 */
#ifndef VS_DESC_H
#define VS_DESC_H

#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "vs_iotlb.h"
#include "vs_vq_priv.h"

enum {
	DESC_F_NEXT = 1,
	DESC_F_WRITE = 2,
	DESC_F_INDIRECT = 4,
	DESC_SIZE = 16
};

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;			/* packed: the buffer id */
};

#define DESC_FMT	"{addr 0x%" PRIx64 ", len 0x%" PRIx32 ", flags 0x%x}"
#define DESC_ARG(d)	(d).addr, (d).len, (d).flags

static inline uint16_t load16(const uint16_t *p)
{
	return le16toh(__atomic_load_n(p, __ATOMIC_RELAXED));
}

static inline void store16(uint16_t *p, uint16_t v)
{
	__atomic_store_n(p, htole16(v), __ATOMIC_RELAXED);
}

/* where a descriptor was found: in the table of the ring, or in an indirect table */
struct where {
	int indirect_at;	/* the descriptor that refers to the table, or -1 */
	uint32_t i;
};

static inline int __attribute__((cold)) desc_fail(struct vs_vq *vq, struct where w, struct desc d, const char *what)
{
	if (w.indirect_at < 0)
		return vs_vq_fail(vq, EINVAL, "desc %" PRIu32 " " DESC_FMT ": %s", w.i, DESC_ARG(d), what);
	return vs_vq_fail(vq, EINVAL, "desc %d, indirect entry %" PRIu32 " " DESC_FMT ": %s", w.indirect_at, w.i, DESC_ARG(d), what);
}

/*
 * Something that a descriptor refers to could not be translated. Behind an IOMMU that may only mean that nobody asked for it yet:
 * the chain stays where it is, and vs_vq_missing() says what for. True if so; else the driver is to blame.
 */
static inline bool __attribute__((cold)) is_miss(struct vs_vq *vq, uint64_t addr, uint64_t len, int perm)
{
	if (!vs_mem_is_view(vq->mem) || !vs_mem_missing(vq->mem, addr, len, perm, &vq->miss))
		return false;
	vq->miss_perm = perm;
	return true;
}

/* a descriptor that describes a buffer; *writable: one before it was device-writable */
static inline int buffer_add(struct vs_vq *vq, struct vs_chain *c, struct where w, struct desc d, bool *writable)
{
	int rc;

	/* virtio 1.3, 2.7.4.2 and 2.8.17: writable after readable, always */
	if (d.flags & DESC_F_WRITE)
		*writable = true;
	else if (vs_unlikely(*writable))
		return desc_fail(vq, w, d, "device-readable after a device-writable one");
	rc = vs_chain_add(c, vq->mem, d.addr, d.len, d.flags & DESC_F_WRITE);
	if (vs_unlikely(rc == -EFAULT) && is_miss(vq, d.addr, d.len, d.flags & DESC_F_WRITE ? VS_PERM_WRITE : VS_PERM_READ))
		return -1;
	if (vs_unlikely(rc < 0))
		return desc_fail(vq, w, d, rc == -EFAULT ? "the buffer is not in guest memory" :
				 rc == -E2BIG ? "the chain is in too many pieces" : "the host has no memory for the chain");
	/* virtio 1.3, 2.7.5.2: a chain has at most 2^32 bytes */
	if (vs_unlikely(c->out_len + c->in_len > (uint64_t)1 << 32))
		return desc_fail(vq, w, d, "the chain has more than 2^32 bytes");
	return 0;
}

/* an indirect table's size is right, and it is there: its host address, or NULL and the vq is broken */
static inline const uint8_t *table_map(struct vs_vq *vq, struct where w, struct desc ref)
{
	const uint8_t *table;

	if (!ref.len || ref.len % DESC_SIZE) {
		vs_vq_fail(vq, EINVAL, "desc %" PRIu32 " " DESC_FMT ": indirect table length %" PRIu32
			   " is not a positive multiple of 16", w.i, DESC_ARG(ref), ref.len);
		return NULL;
	}
	if (ref.len / DESC_SIZE > vq->chain_max) {
		vs_vq_fail(vq, EINVAL, "desc %" PRIu32 " " DESC_FMT ": indirect table has %" PRIu32 " entries, a chain may "
			   "have %" PRIu32, w.i, DESC_ARG(ref), ref.len / DESC_SIZE, vq->chain_max);
		return NULL;
	}
	if (vs_unlikely(vs_mem_is_view(vq->mem)) && is_miss(vq, ref.addr, ref.len, VS_PERM_READ))
		return NULL;
	table = vs_mem_gpa(vq->mem, ref.addr, ref.len);
	if (!table)
		desc_fail(vq, w, ref, "the indirect table is not wholly inside one memory region");
	return table;
}

/*
 * One copy of one descriptor. An indirect table may have any alignment, hence memcpy; the asm hides from the compiler where the
 * values came from, so that it cannot load them again after they were checked.
 */
static inline void desc_copy(const uint8_t *p, uint64_t *lo, uint64_t *hi)
{
	memcpy(lo, p, sizeof(*lo));
	memcpy(hi, p + sizeof(*lo), sizeof(*hi));
	__asm__ volatile("" : "+r"(*lo), "+r"(*hi));
	*lo = le64toh(*lo);
	*hi = le64toh(*hi);
}

/* one of the three parts of a ring, as the front-end gave it */
struct part {
	const char *name;
	uint64_t uva, size, align;
	int perm;
};

/* translate the parts of a ring: each aligned, each wholly inside one memory region */
static inline int parts_map(struct vs_vq *vq, const struct part part[3], uint8_t *host[3], struct vs_err *err)
{
	for (int i = 0; i < 3; i++) {
		if (part[i].uva % part[i].align)
			return vs_err_set(err, EINVAL, "%s at uva 0x%" PRIx64 " is not aligned to %" PRIu64 " bytes",
					  part[i].name, part[i].uva, part[i].align);
		if (vq->mem && is_miss(vq, part[i].uva, part[i].size, part[i].perm))
			return vs_err_set(err, EAGAIN, "%s: iova 0x%" PRIx64 " is not in the IOTLB", part[i].name, vq->miss);
		host[i] = vq->mem ? vs_mem_uva(vq->mem, part[i].uva, part[i].size) : NULL;
		if (!host[i])
			return vs_err_set(err, EFAULT, "%s at uva 0x%" PRIx64 ", size 0x%" PRIx64
					  ", is not wholly inside one memory region", part[i].name, part[i].uva, part[i].size);
		/* a region may start anywhere in its file: what is aligned for the driver need not be for us */
		if ((uintptr_t)host[i] % part[i].align)
			return vs_err_set(err, EINVAL, "%s at uva 0x%" PRIx64 " is in a memory region whose file offset is not "
					  "aligned to %" PRIu64 " bytes", part[i].name, part[i].uva, part[i].align);
	}
	return 0;
}

#endif
