/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_iotlb - the device IOTLB of a session whose driver is behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM).
 *
 * The addresses of rings and buffers are then I/O virtual ones (IOVAs). A table of what the front-end told (IOVA range -> front-end
 * address, permissions) is combined with a memory map into a *view*: a snapshot like any other, in which the IOVA takes the place
 * of both the guest-physical and the front-end address. Rings and chains use it as they use a map without an IOMMU, so translation
 * costs nothing there, and a chain in flight keeps the view that it was translated with: an invalidation cannot pull memory away
 * from under it. What a view does not hold is a miss, to be asked for; vs_vq.h says how it shows.
 *
 * A table is a cache. It holds VS_IOTLB_MAX entries, and a new one takes the place of the oldest.
 */
#ifndef VS_IOTLB_H
#define VS_IOTLB_H

#include "vs_mem.h"

/* cdef begin */

enum {
	VS_IOTLB_MAX = 2048,		/* a view is made anew at each change: some 50 us for as many */
	VS_PERM_READ = 1,		/* struct vhost_iotlb_msg */
	VS_PERM_WRITE = 2
};

struct vs_iotlb;

struct vs_iotlb *vs_iotlb_new(void);
void vs_iotlb_free(struct vs_iotlb *t);
int vs_iotlb_count(const struct vs_iotlb *t);

/* [iova, iova + size) is at front-end address uva now, whatever was there before. -EINVAL for an empty or impossible range. */
int vs_iotlb_update(struct vs_iotlb *t, uint64_t iova, uint64_t size, uint64_t uva, int perm, struct vs_err *err);
/* nothing is known of [iova, iova + size) any more; past the end of all addresses means to the end. -ENOMEM: the table is empty now */
int vs_iotlb_invalidate(struct vs_iotlb *t, uint64_t iova, uint64_t size);
void vs_iotlb_clear(struct vs_iotlb *t);

/* what t says about the regions of m. An entry counts up to the end of the region that it begins in. NULL: no memory */
struct vs_mem *vs_iotlb_view(const struct vs_iotlb *t, const struct vs_mem *m);

/* the first byte of [iova, iova + len) that the view does not have with this permission: true, and *at says which one */
bool vs_mem_missing(const struct vs_mem *view, uint64_t iova, uint64_t len, int perm, uint64_t *at);

/* cdef end */

#endif
