/* SPDX-License-Identifier: BSD-3-Clause */
/* See driver.h. Clauses are those of virtio 1.3. */
#include "driver.h"

#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { NEXT = 1, WRITE = 2, AVAIL = 1 << 7, USED = 1 << 15 };
enum { EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC };

struct split_desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct packed_desc { uint64_t addr; uint32_t len; uint16_t id, flags; };

static void *at(const struct drv *d, uint64_t gpa)
{
	return d->ram + (gpa - d->gpa);
}

static uint16_t *word(const struct drv *d, uint64_t gpa)
{
	return at(d, gpa);
}

static uint64_t buffer(const struct drv *d, uint32_t slot, uint32_t i)
{
	uint64_t gpa = d->buffers + (uint64_t)slot * d->stride;

	for (uint32_t k = 0; k < i; k++)
		gpa += (d->len[k] + 15) & ~15u;
	return gpa;
}

static uint16_t flags_of(const struct drv *d, uint32_t i)
{
	return (i < d->n_out ? 0 : WRITE) | (i + 1 < d->descs ? NEXT : 0);
}

void drv_init(struct drv *d)
{
	struct split_desc *desc = at(d, d->desc);

	d->stride = 0;
	for (uint32_t i = 0; i < d->descs; i++)
		d->stride += (d->len[i] + 15) & ~15u;
	d->avail_next = d->used_next = d->kicked = 0;
	d->avail_wrap = d->used_wrap = 1;
	d->kicks = d->calls = 0;
	d->n_free = 0;
	for (uint32_t slot = d->depth; slot-- > 0;)
		d->free[d->n_free++] = slot;
	for (uint32_t slot = 0; !d->packed && slot < d->depth; slot++)
		for (uint32_t i = 0; i < d->descs; i++)
			desc[slot * d->descs + i] = (struct split_desc) {
				buffer(d, slot, i), d->len[i], flags_of(d, i), slot * d->descs + i + 1
			};
}

static void offer_split(struct drv *d, uint32_t slot)
{
	word(d, d->avail)[2 + (d->avail_next++ & (d->num - 1))] = slot * d->descs;
}

static void offer_packed(struct drv *d, uint32_t slot)
{
	struct packed_desc *ring = at(d, d->desc), *head = &ring[d->avail_next];
	uint16_t head_flags = 0;

	for (uint32_t i = 0; i < d->descs; i++) {
		struct packed_desc *p = &ring[d->avail_next];
		uint16_t flags = flags_of(d, i) | (d->avail_wrap ? AVAIL : USED);

		p->addr = buffer(d, slot, i);
		p->len = d->len[i];
		p->id = slot;
		if (i)
			p->flags = flags;
		else
			head_flags = flags;
		if (++d->avail_next == d->num) {
			d->avail_next = 0;
			d->avail_wrap = !d->avail_wrap;
		}
	}
	d->kicked += d->descs;
	__atomic_store_n(&head->flags, head_flags, __ATOMIC_RELEASE);	/* 2.8.21.1 */
}

void drv_offer(struct drv *d, uint32_t count)
{
	while (count--) {
		uint32_t slot = d->free[--d->n_free];

		if (d->packed)
			offer_packed(d, slot);
		else
			offer_split(d, slot);
	}
}

void drv_kick(struct drv *d)
{
	uint64_t one = 1;
	int wanted;

	if (!d->packed)
		__atomic_store_n(&word(d, d->avail)[1], d->avail_next, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);	/* 2.7.13.4.1, 2.8.21.3.1 */
	if (d->packed) {
		uint16_t place = word(d, d->used)[0], flags = word(d, d->used)[1], slots = d->kicked;
		int since = d->avail_next - (place & 0x7fff) + (place >> 15 == d->avail_wrap ? 0 : (int)d->num);

		d->kicked = 0;
		wanted = flags == EVENT_DESC && d->event_idx ? since > 0 && since <= slots : flags != EVENT_DISABLE;
	} else {
		uint16_t old = d->kicked, event = word(d, d->used)[2 + 4 * d->num];

		d->kicked = d->avail_next;
		wanted = d->event_idx ? (uint16_t)(d->avail_next - event - 1) < (uint16_t)(d->avail_next - old) :
					!(word(d, d->used)[0] & 1);
	}
	if (wanted && write(d->kick_fd, &one, sizeof(one)) == sizeof(one))
		d->kicks++;
}

static int is_used(const struct drv *d)
{
	const struct packed_desc *ring = at(d, d->desc);
	uint16_t flags = __atomic_load_n(&ring[d->used_next].flags, __ATOMIC_ACQUIRE);

	return !!(flags & AVAIL) == d->used_wrap && !!(flags & USED) == d->used_wrap;
}

uint32_t drv_collect(struct drv *d)
{
	uint32_t n = 0;

	if (d->packed) {
		const struct packed_desc *ring = at(d, d->desc);

		for (; d->n_free < d->depth && is_used(d); n++) {
			d->free[d->n_free++] = ring[d->used_next].id;
			d->used_next += d->descs;
			if (d->used_next >= d->num) {
				d->used_next -= d->num;
				d->used_wrap = !d->used_wrap;
			}
		}
	} else {
		const uint32_t *elem = (const uint32_t *)(word(d, d->used) + 2);
		uint16_t idx = __atomic_load_n(&word(d, d->used)[1], __ATOMIC_ACQUIRE);

		for (; d->used_next != idx; d->used_next++, n++)
			d->free[d->n_free++] = elem[2 * (d->used_next & (d->num - 1))] / d->descs;
	}
	return n;
}

int drv_want_calls(struct drv *d)
{
	if (d->packed) {
		word(d, d->avail)[0] = d->used_next | d->used_wrap << 15;
		word(d, d->avail)[1] = d->event_idx ? EVENT_DESC : EVENT_ENABLE;
	} else if (d->event_idx) {
		word(d, d->avail)[2 + d->num] = d->used_next;
	} else {
		word(d, d->avail)[0] = 0;
	}
	__atomic_thread_fence(__ATOMIC_SEQ_CST);	/* 2.7.7, 2.8.10 */
	return d->packed ? is_used(d) : __atomic_load_n(&word(d, d->used)[1], __ATOMIC_RELAXED) != d->used_next;
}

void drv_no_calls(struct drv *d)
{
	if (d->packed)
		word(d, d->avail)[1] = EVENT_DISABLE;
	else if (d->event_idx)
		word(d, d->avail)[2 + d->num] = d->used_next - 1;
	else
		word(d, d->avail)[0] = 1;
}

int64_t drv_run(struct drv *d, uint64_t requests, uint32_t depth)
{
	uint64_t offered = 0, done = 0, n;
	struct timespec a, b;

	drv_no_calls(d);
	clock_gettime(CLOCK_MONOTONIC, &a);
	while (done < requests) {
		uint64_t room = depth - (offered - done), left = requests - offered;
		uint32_t got;

		if (room > left)
			room = left;
		if (room) {
			drv_offer(d, room);
			drv_kick(d);
			offered += room;
		}
		got = drv_collect(d);
		if (!got && !drv_want_calls(d)) {
			struct pollfd p = { .fd = d->call_fd, .events = POLLIN };

			if (poll(&p, 1, 10000) != 1 || read(d->call_fd, &n, sizeof(n)) != sizeof(n))
				return -1;
			d->calls++;
			drv_no_calls(d);
		}
		done += got;
	}
	clock_gettime(CLOCK_MONOTONIC, &b);
	return (b.tv_sec - a.tv_sec) * 1000000000ll + b.tv_nsec - a.tv_nsec;
}
