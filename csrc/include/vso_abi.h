/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/*
 * vso_abi.h - the socket-offload wire protocol, in the one place where its numbers are written.
 *
 * Included by the guest module, by the device engine, and (the part between the "cdef" marks, as text) by cffi. Keep that part
 * free of preprocessor lines other than integer defines. docs/offload-abi.md is the prose; this is the summary a reader of the code needs.
 *
 * Rings.  Rings come in pairs k = 0, 1, ...: ring 2k carries messages to the driver, ring 2k+1 messages from the driver. One
 * descriptor chain carries one message: struct vso_hdr, then hdr.len bytes of payload. Any descriptor layout is legal; a header
 * may span descriptors. A flow lives on one pair for all its life, so its messages never overtake one another.
 *
 * Start.  The driver sends VSO_HELLO on pair 0 and waits for VSO_HELLO_REPLY before any other message on any pair. The epoch is
 * random per driver start: a HELLO with another epoch than the last one resets every flow of the old epoch without a message.
 * VM stop and continue do not change the epoch, so flows survive them.
 *
 * Flows.  A flow is one socket. The driver picks ids 1..0x7fffffff for its own sockets, the device picks ids with
 * VSO_FLOW_DEVICE set for connections it announces with VSO_ACCEPT. Life of a driver-opened flow:
 *
 *      CONNECT ------------> CONNECT_REPLY (OFFLOAD, 0) --> DATA, CREDIT, SHUTDOWN, sockopts both ways --> CLOSE --> CLOSED
 *      BIND ---> BIND_REPLY [--> LISTEN --> LISTEN_REPLY --> ACCEPT ...]  or  [--> CONNECT ...]        --> CLOSE --> CLOSED
 *
 * A reply with a verdict other than OFFLOAD, or with an error, ends the flow at once: the id is free again and no CLOSE follows.
 * The exceptions are failed CONNECT and LISTEN on a flow that BIND opened: the flow stays as BIND left it. The driver may send CLOSE
 * at any time after it sent the opening request, also before its reply (this cancels it). After CLOSE the driver must not use the
 * id until CLOSED arrives; the device sends nothing else for it once CLOSED is sent, and every message that crossed is ignored.
 * RESET (device to driver only) says that the host side is dead: no data follows in either direction; the driver still sends CLOSE.
 *
 * Credit.  As virtio-vsock (virtio 1.3, 5.10.6.3). Every message on a stream flow carries the sender's buf_alloc (bytes it can hold
 * for this flow) and fwd_cnt (payload bytes of VSO_DATA it has handed on, modulo 2^32). A sender keeps
 * tx_cnt - peer.fwd_cnt <= peer.buf_alloc, where tx_cnt counts its own VSO_DATA payload bytes. A peer that exceeds it is broken:
 * the flow is reset with EPROTO. On a listening flow the same two fields count connections: the device announces while
 * announced - driver.fwd_cnt < driver.buf_alloc (the backlog). Datagram flows have no credit: what finds no room is dropped.
 *
 * Numbers are little-endian; error numbers and socket option numbers are Linux's generic ones (asm-generic), whatever the guest.
 */
#ifndef VSO_ABI_H
#define VSO_ABI_H

#ifdef __KERNEL__
#include <linux/types.h>
typedef __le16 vso_le16;
typedef __le32 vso_le32;
typedef __le64 vso_le64;
#else
#include <assert.h>
#include <stdint.h>
typedef uint16_t vso_le16;
typedef uint32_t vso_le32;
typedef uint64_t vso_le64;
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the engine reads the wire as little-endian and runs on little-endian hosts only"
#endif
#endif

/* cdef begin */

enum {
	VSO_MAGIC = 0x4b4f5356,		/* "VSOK" */
	VSO_ABI_MAJOR = 1,		/* other major: the device answers EPROTONOSUPPORT and the driver stays native */
	VSO_ABI_MINOR = 0,		/* the lower minor of both sides is spoken */
	VSO_URI_MAX = 255,		/* bytes in a URI, no NUL on the wire */
	VSO_COMM_LEN = 16,
	VSO_PAYLOAD_MAX = 262144,	/* bytes of payload in one message, either direction */
	VSO_OPTS_MAX = 1024,		/* bytes of options in CONNECT and BIND */
	VSO_OPTVAL_MAX = 512,		/* bytes of one option's value */
	VSO_NETNS_MAX = 63,		/* bytes in the name of a network namespace, printable, no NUL on the wire */
	VSO_RX_MIN = 2048		/* writable bytes in every chain of a to-driver ring, so that any control message fits */
};

/* bit 31 of a flow id: the device chose it (a define, since an enumerator past INT_MAX is not portable C) */
#define VSO_FLOW_DEVICE 0x80000000u

enum vso_type {
	/* both directions */
	VSO_DATA = 1,			/* payload: bytes of the stream */
	VSO_CREDIT = 2,			/* no payload: the credit fields are the message */
	VSO_SHUTDOWN = 3,		/* arg: VSO_SHUT_* of the sender's side, cumulative */
	VSO_DGRAM = 4,			/* payload: struct vso_dgram, URI, 16 bytes of address with VSO_DG_LOCAL, datagram */
	VSO_PING = 5,			/* flow 0, cookie; answered by PONG with the same cookie */
	VSO_PONG = 6,
	VSO_URGENT = 7,			/* VSO_F_URGENT. payload: one byte of the stream, urgent. Device, no payload: arg is on its way */

	/* driver to device */
	VSO_HELLO = 16,			/* payload: struct vso_hello (no hairpin); pair 0, flow 0 */
	VSO_CONNECT = 17,		/* payload: struct vso_open, URI, local URI, options, namespace */
	VSO_BIND = 18,			/* payload: struct vso_open, URI to bind, no local URI, options, namespace */
	VSO_LISTEN = 19,		/* arg: backlog, also in buf_alloc; again on a listening flow: new backlog */
	VSO_CLOSE = 20,			/* arg: VSO_CLOSE_* */
	VSO_SETSOCKOPT = 21,		/* payload: struct vso_sockopt, value */
	VSO_GETSOCKOPT = 22,		/* payload: struct vso_sockopt (len: room for the value) */
	VSO_DEST = 23,			/* payload: URI; may an unconnected datagram flow send there? */
	VSO_GROUP = 24,			/* arg: VSO_GROUP_*; payload: URI of a multicast group, port 0; of a datagram flow that BIND opened */

	/* device to driver */
	VSO_HELLO_REPLY = 64,		/* payload: struct vso_hello, hairpin namespace; arg: errno */
	VSO_CONNECT_REPLY = 65,		/* payload: struct vso_reply, local URI, peer URI */
	VSO_BIND_REPLY = 66,		/* payload: struct vso_reply, local URI with the real port */
	VSO_LISTEN_REPLY = 67,		/* payload: struct vso_reply, local URI */
	VSO_ACCEPT = 68,		/* flow: the listener; payload: struct vso_accept, local URI, peer URI */
	VSO_CLOSED = 69,		/* the answer to CLOSE: the id is free */
	VSO_RESET = 70,			/* arg: errno for SO_ERROR (ECONNRESET, ETIMEDOUT, EPROTO, ...) */
	VSO_SOCKOPT_REPLY = 71,		/* arg: errno; payload: struct vso_sockopt, value (GETSOCKOPT only) */
	VSO_DEST_REPLY = 72,		/* to DEST and GROUP; payload: struct vso_reply without URIs */
	VSO_ERROR = 73,			/* payload: struct vso_error, URI sent to, URI of the offender, begin of the datagram */
	VSO_HINTS = 74			/* VSO_F_HINTS; flow 0; payload: up to VSO_HINTS_MAX struct vso_hint, instead of all before */
};

enum vso_verdict {
	VSO_OFFLOAD = 0,		/* the device serves it; error: 0, or why the host could not */
	VSO_NATIVE = 1,			/* not for the device: the guest's own stack takes it */
	VSO_DENY = 2			/* the policy forbids it; error: what the application gets */
};

enum {
	VSO_SHUT_SEND = 1,		/* the sender sends no more data: FIN */
	VSO_SHUT_RECV = 2		/* the sender reads no more data: what still arrives is dropped */
};

enum {
	VSO_CLOSE_ABORT = 1		/* SO_LINGER 0 or unread data: RST on the host, not FIN */
};

enum {
	VSO_F_DGRAM = 1,		/* feature bit 0: datagram flows */
	VSO_F_DGRAM_INFO = 2,		/* feature bit 1: DEST, ERROR, and what vso_dgram.flags says */
	/*
	 * Feature bit 3: requests may come from other network namespaces than the guest's initial one, and say from which. Without it the
	 * driver asks for sockets of the initial one only. HELLO_REPLY may name a namespace for hairpin: of that one the driver offers
	 * every address, loopback too, and binds nothing natively.
	 */
	VSO_F_NETNS = 8,
	VSO_F_PING = 32,		/* feature bit 5: datagram flows of ICMP echo (icmp, icmp6; the port is the identifier) */
	VSO_F_IPX = 64,			/* feature bit 6: datagram flows of IPX, opened by BIND; vso_dgram.tos is the packet type, ttl the hops so far */
	VSO_F_URGENT = 128,		/* feature bit 7: URGENT, both ways */
	VSO_F_GROUP = 256,		/* feature bit 8: GROUP */
	/*
	 * Feature bit 9: HINTS, after HELLO_REPLY and at any time later. Of requests to connect or send that come from the guest's initial
	 * namespace the first hint that covers scheme, address and port decides: ASK, or NATIVE without being asked; none: ASK.
	 */
	VSO_F_HINTS = 512,
	VSO_F_LATE_CLOSED = 1024,	/* feature bit 10: nobody waits for CLOSED, so it may come some milliseconds late, or with what comes next */
	VSO_F_EARLY_DATA = 2048,	/* feature bit 11: ACCEPT opens a window of VSO_EARLY_MAX bytes to the driver, of which no CREDIT tells */
	VSO_EARLY_MAX = 4096
};

/* vso_dgram.flags: what else is said, and asked for, about one datagram. To the device: how to send it; to the driver: how it came */
enum {
	VSO_DG_TTL = 1,			/* vso_dgram.ttl: TTL or hop limit */
	VSO_DG_TOS = 2,			/* vso_dgram.tos: TOS or traffic class */
	VSO_DG_SEGMENT = 4,		/* vso_dgram.segment: it is several datagrams of that size, the last may be shorter */
	VSO_DG_LOCAL = 8,		/* 16 bytes behind the URI: the host's address that it came to, or shall come from, IPv4 mapped */
	VSO_LOCAL_LEN = 16
};

/* GETSOCKOPT of a level that no host has, on a stream: what the host's socket holds, an int of bytes */
enum {
	VSO_SOL_QUEUE = 0x7f000000,
	VSO_QUEUE_OUT = 1,		/* its peer has not acknowledged (SIOCOUTQ) */
	VSO_QUEUE_UNSENT = 2		/* not sent yet (SIOCOUTQNSD) */
};

enum {
	VSO_HINT_TCP = 1,		/* by which schemes a hint's addresses are asked for */
	VSO_HINT_TCP6 = 2,
	VSO_HINT_UDP = 4,
	VSO_HINT_UDP6 = 8,
	VSO_HINT_ASK = 0,		/* what it says of them: ask, or it is native */
	VSO_HINT_NATIVE = 1,
	VSO_HINTS_MAX = 50		/* as many as fit into VSO_RX_MIN */
};

enum {
	VSO_GROUP_JOIN = 1,		/* NATIVE: the device does not serve this group */
	VSO_GROUP_LEAVE = 2		/* NATIVE: it did not join it */
};

enum {
	VSO_OPEN_ADDR_ONLY = 1		/* vso_open.flags, CONNECT on udp: open for sendto() to this destination, do not connect */
};

struct vso_hdr {			/* 32 bytes, starts every message */
	vso_le16 type;			/* enum vso_type */
	vso_le16 flags;			/* 0 */
	vso_le32 flow;			/* flow id, 0 where none */
	vso_le32 len;			/* payload bytes that follow in this chain */
	vso_le32 arg;			/* by type, else 0 */
	vso_le32 buf_alloc;		/* credit, see above */
	vso_le32 fwd_cnt;
	vso_le32 cookie;		/* a reply carries its request's */
	vso_le32 reserved;		/* 0 */
};

struct vso_hello {			/* 48 bytes */
	vso_le32 magic;			/* VSO_MAGIC */
	vso_le16 abi_major;
	vso_le16 abi_minor;
	vso_le64 epoch;			/* the driver's; echoed in the reply */
	vso_le64 features;		/* VSO_F_*: the reply holds those both sides have */
	vso_le32 pairs;			/* ring pairs: the driver's wish, the device's answer (1..wish) */
	vso_le32 max_payload;		/* the largest hdr.len that the sender accepts */
	vso_le32 max_flows;		/* reply: flows that the device keeps for this guest; driver: 0 */
	vso_le16 hairpin_len;		/* reply, VSO_F_NETNS: the name of the namespace for hairpin, 0: none */
	vso_le16 reserved0;
	vso_le64 reserved1;
};

struct vso_open {			/* 56 bytes; then uri_len, local_len, opts_len, name_len bytes, unpadded */
	vso_le16 uri_len;
	vso_le16 local_len;		/* CONNECT: the address the guest bound natively before, or 0 */
	vso_le16 opts_len;		/* struct vso_sockopt + value, each value padded to 8 bytes */
	vso_le16 flags;			/* VSO_OPEN_* */
	vso_le64 netns;			/* the guest's network namespace, 0 for the initial one */
	vso_le32 uid;			/* the caller's fsuid in the initial user namespace */
	vso_le32 pid;			/* tgid in the initial pid namespace, 0 if unknown */
	char comm[VSO_COMM_LEN];	/* task name, NUL-padded */
	vso_le32 sndbuf;		/* the application's SO_SNDBUF (bounds the device's window) and SO_RCVBUF, 0: default */
	vso_le32 rcvbuf;
	vso_le16 name_len;		/* VSO_F_NETNS: the name that the guest gave the namespace, 0: none */
	vso_le16 reserved0;
	vso_le32 reserved1;
};

struct vso_reply {			/* 16 bytes; then local_len, peer_len bytes */
	vso_le32 verdict;		/* enum vso_verdict */
	vso_le32 error;			/* errno for the application, 0 for success */
	vso_le16 local_len;
	vso_le16 peer_len;
	vso_le32 reserved;
};

struct vso_accept {			/* 16 bytes; then local_len, peer_len bytes */
	vso_le32 new_flow;		/* has VSO_FLOW_DEVICE; the driver opens its window with CREDIT, or refuses with CLOSE */
	vso_le16 local_len;
	vso_le16 peer_len;
	vso_le32 buf_alloc;		/* the device's window on the new flow */
	vso_le32 reserved;
};

struct vso_sockopt {			/* 16 bytes; then len bytes of value */
	vso_le32 level;
	vso_le32 name;
	vso_le32 len;
	vso_le32 reserved;
};

struct vso_dgram {			/* 8 bytes; then uri_len bytes, then the datagram to the end of the payload */
	vso_le16 uri_len;		/* to the device: destination, 0 for the connected peer; to the driver: source */
	vso_le16 flags;			/* VSO_DG_*; 0 without VSO_F_DGRAM_INFO */
	uint8_t ttl;
	uint8_t tos;
	vso_le16 segment;
};

struct vso_error {			/* 24 bytes; then uri_len, offender_len bytes, then as much of the datagram as is known */
	vso_le32 error;			/* errno */
	uint8_t origin;			/* SO_EE_ORIGIN_*; 0: a call on the host's socket gave it, there is no more to say */
	uint8_t icmp_type;
	uint8_t icmp_code;
	uint8_t reserved0;
	vso_le32 info;			/* ee_info: the MTU, for EMSGSIZE */
	vso_le32 reserved1;
	vso_le16 uri_len;		/* where the datagram went; 0: to the connected peer */
	vso_le16 offender_len;		/* who said so, port 0 */
	vso_le32 reserved2;
};

struct vso_hint {			/* 40 bytes */
	uint8_t first[16];		/* addresses first..last, in network order; IPv4 mapped into IPv6 */
	uint8_t last[16];
	vso_le16 port_first;
	vso_le16 port_last;
	uint8_t schemes;		/* VSO_HINT_TCP... */
	uint8_t verdict;		/* VSO_HINT_ASK, VSO_HINT_NATIVE */
	vso_le16 reserved;
};

/* cdef end */

#ifdef __KERNEL__
#define VSO_CHECK(expr) static_assert(expr)
#else
#define VSO_CHECK(expr) _Static_assert(expr, #expr)
#endif

VSO_CHECK(sizeof(struct vso_hdr) == 32);
VSO_CHECK(sizeof(struct vso_hello) == 48);
VSO_CHECK(sizeof(struct vso_open) == 56);
VSO_CHECK(sizeof(struct vso_reply) == 16);
VSO_CHECK(sizeof(struct vso_accept) == 16);
VSO_CHECK(sizeof(struct vso_sockopt) == 16);
VSO_CHECK(sizeof(struct vso_dgram) == 8);
VSO_CHECK(sizeof(struct vso_error) == 24);
VSO_CHECK(sizeof(struct vso_hint) == 40);
VSO_CHECK(VSO_HINTS_MAX * sizeof(struct vso_hint) <= VSO_RX_MIN - sizeof(struct vso_hdr));

#endif
