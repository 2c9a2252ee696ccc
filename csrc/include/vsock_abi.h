/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vsock_abi.h - the wire of the virtio socket device (virtio 1.3, 5.10), in the one place where its numbers are written.
 *
 * Ring 0 carries packets to the driver, ring 1 packets from the driver, ring 2 events to the driver. One descriptor chain holds one
 * packet: struct vsk_hdr, then hdr.len bytes of payload, in any layout of descriptors. The header is 44 bytes: its last member ends
 * on a multiple of 4, and nothing is padded.
 *
 * A connection is named by its two addresses, each a context id (CID) and a port. Every packet of it carries the sender's credit.
 *
 *	REQUEST --> RESPONSE --> RW, CREDIT_UPDATE, CREDIT_REQUEST, SHUTDOWN both ways --> RST
 *
 * Who is done says SHUTDOWN with both flags, and the other side answers RST; RST at any other time, or for what is not there, means
 * refused, reset, or nonsense.
 */
#ifndef VSOCK_ABI_H
#define VSOCK_ABI_H

#include <assert.h>
#include <stdint.h>

typedef uint16_t vsk_le16;
typedef uint32_t vsk_le32;
typedef uint64_t vsk_le64;

#pragma pack(push, 1)

/* cdef begin */

enum {
	VSK_CID_HOST = 2		/* 0 and 1 are reserved; guests have 3 and above, 32 bits (5.10.4) */
};

enum vsk_type {
	VSK_TYPE_STREAM = 1,
	VSK_TYPE_SEQPACKET = 2		/* with VIRTIO_VSOCK_F_SEQPACKET */
};

enum vsk_op {				/* 5.10.6 */
	VSK_OP_INVALID = 0,
	VSK_OP_REQUEST = 1,
	VSK_OP_RESPONSE = 2,
	VSK_OP_RST = 3,
	VSK_OP_SHUTDOWN = 4,		/* flags: VSK_SHUTDOWN_*, never taken back */
	VSK_OP_RW = 5,			/* payload; flags: VSK_SEQ_*, for seqpackets */
	VSK_OP_CREDIT_UPDATE = 6,
	VSK_OP_CREDIT_REQUEST = 7	/* answered with CREDIT_UPDATE */
};

enum {					/* 5.10.6.5: what the sender does not do any more */
	VSK_SHUTDOWN_RECEIVE = 1,
	VSK_SHUTDOWN_SEND = 2
};

enum {					/* 5.10.6.4 */
	VSK_SEQ_EOM = 1,		/* the last packet of a message */
	VSK_SEQ_EOR = 2			/* and the message the last of a record: MSG_EOR */
};

enum {					/* feature bits by number (5.10.3) */
	VSK_F_STREAM = 0,
	VSK_F_SEQPACKET = 1
};

enum {
	VSK_EVENT_TRANSPORT_RESET = 0	/* 5.10.6.7: all connections are gone, read the CID again */
};

struct vsk_hdr {			/* 44 bytes */
	vsk_le64 src_cid;
	vsk_le64 dst_cid;
	vsk_le32 src_port;
	vsk_le32 dst_port;
	vsk_le32 len;			/* payload bytes that follow in this chain */
	vsk_le16 type;			/* enum vsk_type */
	vsk_le16 op;			/* enum vsk_op */
	vsk_le32 flags;
	vsk_le32 buf_alloc;		/* bytes the sender can hold for this connection */
	vsk_le32 fwd_cnt;		/* payload bytes that it has handed on, modulo 2^32 */
};

struct vsk_event {			/* 4 bytes */
	vsk_le32 id;
};

struct vsk_config {			/* 8 bytes, the config space */
	vsk_le64 guest_cid;
};

/* cdef end */

#pragma pack(pop)

_Static_assert(sizeof(struct vsk_hdr) == 44, "struct vsk_hdr");
_Static_assert(sizeof(struct vsk_event) == 4, "struct vsk_event");
_Static_assert(sizeof(struct vsk_config) == 8, "struct vsk_config");

#endif
