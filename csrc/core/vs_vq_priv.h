/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_vq_priv - inside of a virtqueue, for the files of csrc/core.
 *
 *   vs_vq.c      what every format shares: configuration, states, the broken state, the fds; hands the rest to struct vs_vq_ops
 *   vs_split.c   the split format
 *   vs_packed.c  the packed format
 *   vs_desc.h    what both formats do with a descriptor
 *   vs_chain.c   a popped chain: its storage, and adding guest buffers to it
 *   vs_order.c   completions that wait for older ones (VIRTIO_F_IN_ORDER)
 *   vs_inflight.c, vs_inflight_packed.c   what is in flight, in memory that outlives this process
 *   vs_log.c     the dirty log
 *   vs_notify.c  one fd that is written to without ever blocking
 */
#ifndef VS_VQ_PRIV_H
#define VS_VQ_PRIV_H

#include <stdatomic.h>

#include "vs_mem_priv.h"
#include "vs_vq.h"

/* feature bits (virtio 1.3, 6) that change how a ring works */
#define VIRTIO_RING_F_INDIRECT_DESC	28
#define VIRTIO_RING_F_EVENT_IDX		29
#define VIRTIO_F_RING_PACKED		34
#define VIRTIO_F_IN_ORDER		35

/* a completed chain, as far as the formats and the in-flight region need it */
struct vs_done {
	uint32_t written;
	uint32_t descs;
	uint16_t head, entry;		/* as in struct vs_chain */
	bool writable;			/* it has a device-writable part */
	bool whole;			/* which was written to its end */
	bool ready;			/* vs_order.c: it is completed, but perhaps waits for an older one */
};

/*
 * One ring format; all are called on a running, unbroken vq, except check and map (which start uses) and base. What chains have in
 * common in both (their order, how many are in flight) is kept by vs_vq.c.
 */
struct vs_vq_ops {
	const struct vs_inflight_ops *inflight;
	int (*check)(const struct vs_vq *vq, struct vs_err *err);	/* base and size, before anything is touched */
	int (*map)(struct vs_vq *vq, struct vs_err *err);		/* translate the rings through vq->mem */
	/* load the indices, from the in-flight region if that knows this ring: then true, and a call may have been lost */
	bool (*start)(struct vs_vq *vq);
	uint32_t (*base)(const struct vs_vq *vq);			/* what to report at the stop */
	int (*pop)(struct vs_vq *vq, struct vs_chain *c);		/* as vs_vq_pop; c is empty */
	int (*pop_again)(struct vs_vq *vq, struct vs_chain *c);		/* the next of those that were in flight; there is one */
	void (*unpop)(struct vs_vq *vq, const struct vs_chain *c);	/* the last one popped */
	void (*push)(struct vs_vq *vq, const struct vs_done *d);
	bool (*publish)(struct vs_vq *vq);				/* true: the driver wants a call */
	void (*disable_kick)(struct vs_vq *vq);
	bool (*enable_kick)(struct vs_vq *vq);
	bool (*has_avail)(const struct vs_vq *vq);
};

extern const struct vs_vq_ops vs_split_ops, vs_packed_ops;

/* an fd to signal through */
struct vs_notify {
	int fd;						/* ours; -1: none */
	void (*write)(int fd);
};

void vs_notify_init(struct vs_notify *n);
int vs_notify_set(struct vs_notify *n, int fd);		/* dups fd, closes the old one; -errno and no change if unusable */
bool vs_notify_signal(const struct vs_notify *n);	/* false: there is no fd */

/* the split format's view of the rings; host addresses are valid while running and not broken */
struct vs_split {
	const uint8_t *desc;		/* driver-written: struct virtq_desc[num], 16 bytes each */
	const uint16_t *avail;		/* driver-written: flags, idx, ring[num], used_event */
	uint16_t *used;			/* device-written: flags, idx, struct virtq_used_elem[num] (8 bytes each), avail_event */
	uint16_t avail_seen;		/* avail.idx as last read (and checked) */
	uint16_t avail_next;		/* the next place in avail.ring to pop */
	uint16_t used_next;		/* the next place in used.ring to fill */
	uint16_t used_published;	/* used.idx as last written */
	uint16_t batch_at;		/* IN_ORDER: the element that stands for all completions since (an index as used_next) */
	bool batching;			/* IN_ORDER: the next completion may go on with that one */
	uint16_t mask;			/* num - 1 */
	bool event_idx, indirect;	/* negotiated */
};

/* a place in a packed ring, with the wrap counter of the lap it is on */
struct vs_place {
	uint16_t at;
	bool wrap;
};

/* the packed format's view of the ring; as for the split one */
struct vs_packed {
	uint8_t *ring;			/* written by both: struct pvirtq_desc[num], 16 bytes each */
	const uint32_t *driver_event;	/* driver-written: place and wrap (16 bits), flags (16 bits) */
	uint16_t *device_event;		/* device-written: the same as two words */
	struct vs_place avail;		/* the next chain to pop */
	struct vs_place used;		/* the next used descriptor to fill */
	struct vs_place batch;		/* the first that is filled and not published; == used: none */
	uint16_t batch_flags;		/* its flags, which publish it */
	struct vs_place group;		/* IN_ORDER: the used descriptor that stands for all completions since */
	bool grouping;			/* IN_ORDER: the next completion may go on with that one */
	uint32_t slots_in_flight;	/* descriptors of the ring that the chains in flight take */
	uint64_t ring_gpa;		/* where the dirty log has the ring */
	bool event_idx, indirect;	/* negotiated */
};

/* in-flight tracking of one vq: what vs_inflight.c keeps for itself, and never reads back from the region while the vq runs */
struct vs_track {
	uint32_t entries;
	uint8_t *part;			/* this queue's part of the region; NULL: not tracked */
	uint64_t counter;		/* of the next chain popped */
	uint32_t n_batch;
	uint16_t *batch;		/* entries[num]: completed, not published */
	uint32_t n_again, again_at;
	uint16_t *again;		/* entries[num]: in flight at the start, oldest first; from again_at on not popped yet */
	uint16_t last_batch;		/* split: last_batch_head as in the region */
	uint16_t free;			/* packed: first free entry; entries: none */
	uint16_t record;		/* packed: the entry of the descriptor that was recorded last */
	struct packed_list {
		uint16_t next;		/* packed: as in the region */
		uint16_t last, count;	/* packed, of a first entry: its chain's last, and how many it has */
	} *list;			/* [entries] */
};

struct vs_vq {
	const struct vs_vq_ops *ops;
	bool live;			/* running and not broken */
	bool running;
	atomic_bool broken;		/* written with err complete, by the thread of the data plane; others may ask */
	bool holes;			/* a younger chain was completed before an older one that is still in flight */
	bool call_due;			/* a call fell due while there was no fd; a restart does not settle it */
	uint32_t in_flight;		/* chains popped and not yet used */
	uint16_t popped;		/* chains popped since the start, modulo 2^16 */
	struct vs_done *order;		/* IN_ORDER: by place in the order of popping; NULL: not negotiated */
	uint16_t order_mask;
	bool log_data, log_ring;	/* what of ours goes to the dirty log; both false without one */
	bool logged;			/* since the last flush */
	uint32_t chain_max;		/* descriptors that a chain may have: min(num, VS_CHAIN_MAX) */
	uint64_t run;			/* of this start; 0 when idle */
	struct vs_mem *mem;		/* NULL: none */
	uint64_t miss;			/* what the last pop or start did not find in the IOTLB; meaningful with miss_perm != 0 */
	int miss_perm;
	union {				/* as ops says */
		struct vs_split split;
		struct vs_packed packed;
	};

	struct vs_track track;
	struct vs_log *log;		/* NULL: none */
	uint64_t log_addr;

	struct vs_notify call, error;
	/* the configuration, for the next start */
	uint64_t desc_uva, avail_uva, used_uva;
	uint64_t features;
	uint32_t num, base;
	struct vs_region *inflight;	/* NULL: no tracking */
	uint32_t inflight_entries;
	uint16_t index;
	struct vs_err err;
};

/* the driver broke a rule: *vq becomes broken with this evidence, the error fd is signalled. Returns -1. */
int vs_vq_fail(struct vs_vq *vq, int code, const char *fmt, ...) __attribute__((cold, format(printf, 3, 4)));

static inline bool vs_vq_feature(const struct vs_vq *vq, int bit)
{
	return vq->features >> bit & 1;
}

/* the front-end truncated memory that this vq uses */
bool vs_vq_poisoned(const struct vs_vq *vq);

/* complete the oldest chain, or any one without IN_ORDER; pos: its place in the order of popping */
void vs_vq_use(struct vs_vq *vq, uint16_t pos, const struct vs_done *d);

/* vs_order.c */
int vs_order_start(struct vs_vq *vq, struct vs_err *err);		/* at every start */
void vs_order_push(struct vs_vq *vq, uint16_t pos, const struct vs_done *d);

/* vs_packed.c, for vs_inflight_packed.c */
bool vs_packed_is_avail(const struct vs_vq *vq, struct vs_place p);	/* the descriptor there is as the driver left it */
struct vs_place vs_packed_forward(const struct vs_vq *vq, struct vs_place p, uint32_t n);

/* vs_inflight.c. open: at every start, after map: 0 when the part is there and is new or of our version */
int vs_inflight_open(struct vs_vq *vq, struct vs_err *err);
void vs_inflight_close(struct vs_vq *vq);

/* the layout of one format; called only while in-flight is tracked */
struct vs_inflight_ops {
	/* by ops->start: 1 when the region knows this ring, and the indices are set from it; 0: it was new; -1: vq is broken */
	int (*load)(struct vs_vq *vq);
	void (*popped)(struct vs_vq *vq, struct vs_chain *c);	/* record it; sets c->entry */
	void (*unpopped)(struct vs_vq *vq, const struct vs_chain *c);
	void (*publish)(struct vs_vq *vq);			/* before the driver sees the batch */
	void (*published)(struct vs_vq *vq);			/* after */
};

extern const struct vs_inflight_ops vs_inflight_split, vs_inflight_packed;

/* one entry that was found in flight, on the way to track.again */
struct vs_found {
	uint64_t counter;
	uint16_t entry;
};

/* track.again, and the counter to go on with, from n entries in any order; sorts them */
void vs_inflight_found(struct vs_vq *vq, struct vs_found *found, uint32_t n);

/* packed: a descriptor as it was in the ring */
struct vs_slot {
	uint64_t addr;
	uint32_t len;
	uint16_t id, flags;
};

/* packed: record the n-th descriptor of the chain that is being popped; counts only after popped() */
void vs_inflight_record(struct vs_vq *vq, uint32_t n, struct vs_slot d);
/* packed: the n-th descriptor of the chain at an entry */
struct vs_slot vs_inflight_recorded(const struct vs_vq *vq, uint16_t entry, uint32_t n);

static inline bool vs_inflight_on(const struct vs_vq *vq)
{
	return vq->track.part != NULL;
}

/* vs_log.c: mark [gpa, gpa + len) or what a chain was given; broken when that is outside of the log */
void vs_log_write(struct vs_vq *vq, uint64_t gpa, uint64_t len);
void vs_log_chain(struct vs_vq *vq, const struct vs_chain *c, uint64_t written);
void vs_log_signal(struct vs_vq *vq);
bool vs_log_poisoned(const struct vs_log *log);

/* the device wrote len bytes at this offset of the used ring (packed: of the device event area) */
static inline void vs_log_used(struct vs_vq *vq, uint64_t offset, uint64_t len)
{
	if (vs_unlikely(vq->log_ring))
		vs_log_write(vq, vq->log_addr + offset < offset ? UINT64_MAX : vq->log_addr + offset, len);
}

/* add a guest buffer to c: 0, -EFAULT when a byte is not mapped, -E2BIG when it is in too many pieces, -ENOMEM */
int vs_chain_add(struct vs_chain *c, const struct vs_mem *mem, uint64_t gpa, uint32_t len, bool writable);

#endif
