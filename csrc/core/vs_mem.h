/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_mem - the guest memory map of one vhost-user session.
 *
 * A region is one mmap of a front-end's memory fd. A map is an immutable, sorted snapshot of regions. Both are counted: a change
 * of the memory table makes a new snapshot that shares the regions, and a descriptor chain in flight holds the snapshot it was
 * translated with, so a region stays mapped until the last chain that uses it completes. Counts are atomic: chains may end on
 * another thread than the one that changes the table.
 *
 * A front-end can truncate the memory under a mapping. System calls on such pages fail with EFAULT, but a load or store raises
 * SIGBUS. A process-wide handler (installed by the first vs_region_map) finds the region by address, puts anonymous zero pages
 * over it so that the access completes, and marks the region poisoned; users check vs_mem_poisoned() after each batch and end
 * the session. Faults elsewhere go to the handler that was there before. A thread that touches guest memory must leave SIGBUS
 * unblocked: the kernel answers a blocked synchronous signal by killing the process.
 */
#ifndef VS_MEM_H
#define VS_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define VS_ERR_LEN 224

/* cdef begin */

enum { VS_MAX_REGIONS = 512 };		/* QEMU caps memory slots there; a bound on what a front-end can make us map */

struct vs_region;
struct vs_mem;

/* what went wrong, with the evidence; text is always NUL-terminated */
struct vs_err {
	int code;			/* errno value, 0 when nothing went wrong */
	char text[224];
};

/*
 * Map [offset, offset + size) of fd at guest-physical gpa, front-end address uva. The fd is not kept. The file must hold
 * offset + size bytes now (fstat), size > 0, and neither gpa + size, uva + size nor offset + size may overflow; offset and size
 * need not be page-aligned. NULL on error.
 */
struct vs_region *vs_region_map(int fd, uint64_t gpa, uint64_t size, uint64_t uva, uint64_t offset, struct vs_err *err);
struct vs_region *vs_region_get(struct vs_region *r);
void vs_region_put(struct vs_region *r);
bool vs_region_poisoned(const struct vs_region *r);
uint64_t vs_region_gpa(const struct vs_region *r);
uint64_t vs_region_size(const struct vs_region *r);
uint64_t vs_region_uva(const struct vs_region *r);
int vs_region_count_live(void);		/* regions mapped in this process: for leak checks */

struct vs_mem *vs_mem_new(void);	/* an empty map, one reference */
/* a new snapshot with r added (takes its own reference on r); NULL with EEXIST on overlap in gpa or uva, ENOSPC when full */
struct vs_mem *vs_mem_with(const struct vs_mem *m, struct vs_region *r, struct vs_err *err);
/* a new snapshot without the region that matches all three; NULL with ENOENT */
struct vs_mem *vs_mem_without(const struct vs_mem *m, uint64_t gpa, uint64_t size, uint64_t uva, struct vs_err *err);
struct vs_mem *vs_mem_get(struct vs_mem *m);
void vs_mem_put(struct vs_mem *m);
int vs_mem_count(const struct vs_mem *m);
bool vs_mem_poisoned(const struct vs_mem *m);

/*
 * The dirty log that a front-end shares for migration: a bit for each page of 4 KiB, from guest-physical address 0 on. The file is
 * mapped and guarded as guest memory is; fd is not kept. NULL on error. notify: -1, or an fd to signal when bits were set.
 */
struct vs_log;
struct vs_log *vs_log_new(int fd, uint64_t size, uint64_t offset, struct vs_err *err);
struct vs_log *vs_log_get(struct vs_log *log);
void vs_log_put(struct vs_log *log);
int vs_log_set_notify(struct vs_log *log, int fd);	/* as vs_vq_set_call() */

void vs_mb(void);			/* a full memory barrier, for drivers and devices written in Python */

/* len bytes at a guest-physical (front-end virtual) address, wholly inside one region; NULL if not */
void *vs_mem_gpa(const struct vs_mem *m, uint64_t gpa, uint64_t len);
void *vs_mem_uva(const struct vs_mem *m, uint64_t uva, uint64_t len);

/* cdef end */

/*
 * Translate [gpa, gpa + len) into at most max iovecs; a range may cross into an adjacent region. Returns the number of iovecs,
 * -EFAULT when a byte is not mapped, -E2BIG when max is too small. len 0 gives 0. Permissions (vs_iotlb.h) are not looked at.
 */
int vs_mem_iov(const struct vs_mem *m, uint64_t gpa, uint64_t len, struct iovec *iov, int max);

#endif
