/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * driver - the driver side of a virtqueue, fast: one kind of request, offered again as soon as it is completed.
 *
 * For benchmarks only. It trusts the device, and a request's descriptors stay where they are, so that what is measured is the
 * device and not this. The driver that checks what a device does is vhostsock.testing.driver.
 */
#ifndef BENCH_DRIVER_H
#define BENCH_DRIVER_H

#include <stdint.h>

/* cdef begin */

enum { DRV_DESCS = 4, DRV_DEPTH = 512 };

struct drv {
	/* given by the caller */
	uint8_t *ram;			/* guest-physical gpa is mapped here */
	uint64_t gpa;
	uint64_t desc, avail, used;	/* guest-physical: the parts of a fresh ring */
	uint64_t buffers;		/* guest-physical: for each request, room for its buffers */
	uint32_t num;			/* of the ring; at least descs * depth */
	uint32_t depth;			/* requests that there are, at most DRV_DEPTH */
	uint32_t descs;			/* of a request, the first n_out of them device-readable */
	uint32_t n_out;
	uint32_t len[DRV_DESCS];
	int packed, event_idx, kick_fd, call_fd;
	/* kept by the driver */
	uint32_t stride, n_free;
	uint16_t free[DRV_DEPTH];
	uint16_t avail_next, used_next, kicked;	/* packed: places in the ring, and slots since the last kick decision */
	int avail_wrap, used_wrap;
	uint64_t kicks, calls;		/* notifications made, and waited for */
};

void drv_init(struct drv *d);
void drv_offer(struct drv *d, uint32_t count);	/* of the free requests; to be followed by drv_kick() */
void drv_kick(struct drv *d);			/* publish, and notify the device if it wants that */
uint32_t drv_collect(struct drv *d);		/* completed requests, which are free again */
int drv_want_calls(struct drv *d);		/* 1: some are completed already */
void drv_no_calls(struct drv *d);
/* do this many requests, at most depth at once: nanoseconds, or -1 when nothing was completed for 10 s */
int64_t drv_run(struct drv *d, uint64_t requests, uint32_t depth);

/* cdef end */

#endif
