/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_vq_priv - inside of a virtqueue, for the files of csrc/core.
 *
 *   vs_vq.c      what every format shares: configuration, states, the broken state, the fds; hands the rest to struct vs_vq_ops
 *   vs_split.c   the split format
 *   vs_packed.c  the packed format
 *   vs_desc.h    what both formats do with a descriptor
 *   vs_chain.c   a popped chain: its storage, and adding guest buffers to it
 *   vs_notify.c  one fd that is written to without ever blocking
 */
#ifndef VS_VQ_PRIV_H
#define VS_VQ_PRIV_H

#include "vs_mem_priv.h"
#include "vs_vq.h"

/* feature bits (virtio 1.3, 6) that change how a ring works */
#define VIRTIO_RING_F_INDIRECT_DESC	28
#define VIRTIO_RING_F_EVENT_IDX		29
#define VIRTIO_F_RING_PACKED		34

/* one ring format; all are called on a running, unbroken vq, except check and map (which start uses) and base */
struct vs_vq_ops {
	int (*check)(const struct vs_vq *vq, struct vs_err *err);	/* base and size, before anything is touched */
	int (*map)(struct vs_vq *vq, struct vs_err *err);		/* translate the rings through vq->mem */
	void (*start)(struct vs_vq *vq);				/* load the indices; kicks are enabled afterwards */
	uint32_t (*base)(const struct vs_vq *vq);			/* what to report at the stop */
	int (*pop)(struct vs_vq *vq, struct vs_chain *c);		/* as vs_vq_pop; c is empty */
	bool (*unpop)(struct vs_vq *vq, const struct vs_chain *c);	/* false: not the last one popped */
	void (*push)(struct vs_vq *vq, const struct vs_chain *c, uint32_t written);
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
	uint16_t popped;		/* chains popped since the start, modulo 2^16 */
	uint32_t slots_in_flight;	/* descriptors of the ring that the chains in flight take */
	bool event_idx, indirect;	/* negotiated */
};

struct vs_vq {
	const struct vs_vq_ops *ops;
	bool live;			/* running and not broken */
	bool running, broken;
	bool holes;			/* a younger chain was completed before an older one that is still in flight */
	bool call_due;			/* a call fell due while there was no fd; a restart does not settle it */
	uint32_t in_flight;		/* chains popped and not yet given back */
	uint32_t chain_max;		/* descriptors that a chain may have: min(num, VS_CHAIN_MAX) */
	uint64_t run;			/* of this start; 0 when idle */
	struct vs_mem *mem;		/* NULL: none */
	union {				/* as ops says */
		struct vs_split split;
		struct vs_packed packed;
	};

	struct vs_notify call, error;
	/* the configuration, for the next start */
	uint64_t desc_uva, avail_uva, used_uva;
	uint64_t features;
	uint32_t num, base;
	uint16_t index;
	struct vs_err err;
};

/* the driver broke a rule: *vq becomes broken with this evidence, the error fd is signalled. Returns -1. */
int vs_vq_fail(struct vs_vq *vq, int code, const char *fmt, ...) __attribute__((cold, format(printf, 3, 4)));

static inline bool vs_vq_feature(const struct vs_vq *vq, int bit)
{
	return vq->features >> bit & 1;
}

/* add a guest buffer to c: 0, -EFAULT when a byte is not mapped, -E2BIG when it is in too many pieces, -ENOMEM */
int vs_chain_add(struct vs_chain *c, const struct vs_mem *mem, uint64_t gpa, uint32_t len, bool writable);

#endif
