/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_vq - one virtqueue as the device sees it, split or packed, as VIRTIO_F_RING_PACKED says at the start.
 *
 * States.  idle: configured bit by bit (num, addresses, base, features, memory). running: vs_vq_start() checked the whole
 * configuration; pop, push and flush are legal. broken: the driver broke a rule; err holds the evidence, every later pop
 * answers -1 until vs_vq_stop(). vs_vq_stop() returns to idle and gives the base to report.
 *
 * The driver's memory is hostile and changes while it is read: every descriptor and index is copied once, the copy is checked,
 * and only the copy is used. Chains that were popped are completed with vs_vq_push(), in any order, and become visible to the
 * driver with vs_vq_flush(), which also decides on the call (virtio 1.3, 2.7.7.2). Give back every chain that was popped: by
 * push, or by vs_chain_drop() after a stop. A chain that is pushed after the run it was popped in is only dropped.
 *
 * Stop with chains in flight.  When all that were completed were completed in order, the base that stop reports is the oldest
 * chain in flight, so that the next start finds those chains again. Out of order, a base cannot say which are open, and the
 * chains in flight are lost to the driver: complete them before the stop. With in-flight tracking (vs_vq_set_inflight) nothing is
 * lost, in any order and even to SIGKILL: the base is the next chain, and a start with the same region pops those in flight
 * again before any new one, oldest first, with vs_chain.again set.
 *
 * VIRTIO_F_IN_ORDER.  A completion waits until all older chains are completed, however late the device pushed those; and of a run of
 * completions only the last one needs a place in the ring, as long as the others were written to their ends (2.7.9, 2.8.9).
 *
 * Threads.  A vq has no lock; its owner serialises all calls. Different vqs are independent.
 */
#ifndef VS_VQ_H
#define VS_VQ_H

#include "vs_mem.h"

/* cdef begin */

enum {
	VS_VQ_SIZE_MAX = 32768,		/* virtio 1.3, 2.7 */
	VS_CHAIN_MAX = 1024		/* descriptors in a chain, indirect ones included, cap below the queue size (UIO_MAXIOV) */
};

struct vs_vq;

/* One popped chain. iov: n_out device-readable buffers, then n_in device-writable ones. Owned by the caller, reusable. */
struct vs_chain {
	uint64_t run;			/* the run (start to stop) of the vq it was popped in, unique in the process; 0: empty */
	uint16_t head;
	uint16_t pos;			/* its place in the order of popping, modulo 2^16 */
	uint16_t n_out, n_in;		/* iovecs */
	uint16_t entry;			/* its entry in the in-flight region, when that is tracked */
	bool again;			/* it was in flight at an earlier stop or crash: perhaps it was carried out, all or in part */
	uint32_t descs;			/* ring slots it takes (packed: the skip on completion) */
	uint64_t out_len, in_len;	/* bytes */
	uint64_t touched;		/* bytes of the writable part up to the last that vs_chain_write() put there */
	struct iovec *iov;		/* in the chain's own storage */
	struct vs_mem *mem;		/* snapshot held until push or drop, NULL when the chain is empty */
	uint32_t cap;
};

struct vs_chain *vs_chain_new(void);	/* grows on demand, to 2 * VS_CHAIN_MAX iovecs; NULL: no memory */
void vs_chain_drop(struct vs_chain *c);	/* let the memory snapshot go without completing (after a stop) */
void vs_chain_free(struct vs_chain *c);	/* drop, then free */
/* copy between a chain and plain memory; offsets count bytes over the readable (writable) part. Return the bytes copied. */
size_t vs_chain_read(const struct vs_chain *c, size_t offset, void *dst, size_t len);
size_t vs_chain_write(struct vs_chain *c, size_t offset, const void *src, size_t len);

struct vs_vq *vs_vq_new(uint16_t index);
void vs_vq_free(struct vs_vq *vq);

/* -errno with *err filled when the value itself is impossible */
int vs_vq_set_num(struct vs_vq *vq, uint32_t num, struct vs_err *err);
void vs_vq_set_addr(struct vs_vq *vq, uint64_t desc_uva, uint64_t avail_uva, uint64_t used_uva);
void vs_vq_set_base(struct vs_vq *vq, uint32_t base);
void vs_vq_set_features(struct vs_vq *vq, uint64_t features);	/* the acked device features: EVENT_IDX, INDIRECT, ... */

/* num, addresses, base and features take effect at the next start; set_num alone is refused (-EBUSY) while running */

/*
 * any state; fds are dup'ed (CLOEXEC) or -1 for none; the old one is closed. -errno if fd is neither an eventfd, a socket nor a
 * pipe. Writes to them never block and never raise SIGPIPE. A call that fell due while there was no fd is made when one comes.
 */
int vs_vq_set_call(struct vs_vq *vq, int fd);
int vs_vq_set_err(struct vs_vq *vq, int fd);

/* any state; takes its own reference. On a running vq the rings are translated again: -1 and broken when they left the map. */
int vs_vq_set_mem(struct vs_vq *vq, struct vs_mem *mem);

/*
 * In-flight tracking (the vhost-user document, "Inflight I/O tracking"): idle only, -EBUSY otherwise. r is the mapped area of all
 * queues, of which this one uses the part of its index; entries is the queue size that the area was made for. NULL: no tracking.
 * Takes its own reference. What is in the region, the start judges.
 */
int vs_vq_set_inflight(struct vs_vq *vq, struct vs_region *r, uint32_t entries, struct vs_err *err);
uint64_t vs_inflight_size(bool packed, uint32_t entries);	/* bytes of one queue's part, a multiple of 64 */

/*
 * Dirty log: any state, at once. log NULL: off. data: log what the device writes into chains; ring: log its writes to the ring,
 * whose used ring (packed: device event area) the log has at log_addr. Takes its own reference.
 */
void vs_vq_set_log(struct vs_vq *vq, struct vs_log *log, bool data, bool ring, uint64_t log_addr);

int vs_vq_start(struct vs_vq *vq, struct vs_err *err);	/* 0, or -errno; -EAGAIN: the rings are not in the IOTLB */
uint32_t vs_vq_stop(struct vs_vq *vq);			/* flushes; the base for GET_VRING_BASE; idempotent */
bool vs_vq_running(const struct vs_vq *vq);
bool vs_vq_broken(const struct vs_vq *vq);
const struct vs_err *vs_vq_error(const struct vs_vq *vq);
/* the device found that the driver broke a rule of its own protocol: a running ring becomes broken, as by a rule of the ring */
void vs_vq_break(struct vs_vq *vq, int code, const char *text);
uint32_t vs_vq_num(const struct vs_vq *vq);

/*
 * 1: *c is the next chain; 0: none available; -1: broken (the error fd was signalled when it became so). Behind an IOMMU 0 may also
 * mean that the next chain's addresses are not in the view of the IOTLB: vs_vq_missing() tells, and the chain waits.
 */
int vs_vq_pop(struct vs_vq *vq, struct vs_chain *c);
/* pop into c[0..max): how many, or -1 when broken and none was popped before */
int vs_vq_pop_many(struct vs_vq *vq, struct vs_chain **c, int max);
/* give the last popped chain back, unprocessed; it is the next to be popped again (only before any later pop) */
void vs_vq_unpop(struct vs_vq *vq, struct vs_chain *c);
/* complete a chain: written bytes were put into its writable part. Not yet visible to the driver. */
void vs_vq_push(struct vs_vq *vq, struct vs_chain *c, uint32_t written);
/* publish what was pushed; signal the call fd if the driver wants it. 1: signalled, 0: not, -1: broken */
int vs_vq_flush(struct vs_vq *vq);

/* did the last pop (or a start that returned -EAGAIN) miss an IOVA? *perm: VS_PERM_... that it needs */
bool vs_vq_missing(const struct vs_vq *vq, uint64_t *iova, int *perm);
/* would the rings be where they are now, or anywhere, in this map? false: setting it would break a running vq */
bool vs_vq_fits(struct vs_vq *vq, struct vs_mem *mem);

/* kick suppression. enable returns true when chains became available meanwhile: process again before sleeping. */
void vs_vq_disable_kick(struct vs_vq *vq);
bool vs_vq_enable_kick(struct vs_vq *vq);
bool vs_vq_has_avail(struct vs_vq *vq);

/* cdef end */

#endif
