/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_inflight.h - the layouts of the in-flight region, for vs_inflight.c and vs_inflight_packed.c.
 *
 * All numbers are in native byte order: the region is shared on one host. What must change together lies in one aligned word of 8
 * bytes, and is stored as one: {version, desc_num, and the two that follow} in both layouts, and in the packed one
 * {used_idx, old_used_idx and their wrap counters}. A process can be killed between two stores, not within one.
 */
#ifndef VS_INFLIGHT_H
#define VS_INFLIGHT_H

#include <string.h>

#include "vs_vq_priv.h"

enum {
	INFLIGHT_VERSION = 1,		/* 0: a region that nobody used yet */
	HEAD_AT = 8,			/* after the features, which are 0 */
	USED_AT = 16,			/* packed: the second word */
	SPLIT_HEAD = 16,
	PACKED_HEAD = 32
};

/* the word at HEAD_AT */
struct region_head {
	uint16_t version, desc_num;
	union {
		struct {
			uint16_t last_batch_head, used_idx;
		} split;
		struct {
			uint16_t free_head, old_free_head;
		} packed;
	};
};

/* packed: the word at USED_AT */
struct region_used {
	uint16_t idx, old_idx;
	uint8_t wrap, old_wrap, padding[2];
};

struct vs_split_entry {
	uint8_t inflight, padding[5];
	uint16_t next;
	uint64_t counter;
};

struct vs_packed_entry {
	uint8_t inflight, padding;
	uint16_t next, last, num;
	uint64_t counter;
	uint16_t id, flags;
	uint32_t len;
	uint64_t addr;
};

/* stores that stay in program order, and loads that happen once */
static inline void store8(uint8_t *p, uint8_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline void store16n(uint16_t *p, uint16_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline void store32n(uint32_t *p, uint32_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline void store64(void *p, uint64_t v)
{
	__atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE);
}

static inline uint8_t load8(const uint8_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline uint16_t load16n(const uint16_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline uint32_t load32n(const uint32_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline uint64_t load64(const void *p)
{
	return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED);
}

static inline struct region_head head_load(const struct vs_track *t)
{
	uint64_t word = load64(t->part + HEAD_AT);
	struct region_head head;

	memcpy(&head, &word, sizeof(head));
	return head;
}

static inline void head_store(const struct vs_track *t, struct region_head head)
{
	uint64_t word;

	memcpy(&word, &head, sizeof(word));
	store64(t->part + HEAD_AT, word);
}

#endif
