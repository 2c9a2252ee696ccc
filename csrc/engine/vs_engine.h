/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_engine - the data plane of the socket devices: moves bytes between ring pairs and host sockets on a thread of its own.
 *
 * Division of work.  The engine thread reads every message of the driver. DATA, CREDIT, SHUTDOWN, CLOSE, LISTEN, PING, HELLO,
 * socket options and known datagram destinations are served here, in C, without Python. What needs a decision (CONNECT, BIND, a
 * new datagram destination) becomes a struct vse_event; Python answers with vse_connected(), vse_bound(), vse_refuse() or
 * vse_dgram_dest(). The answer to a CONNECT is a connected file descriptor, of any kind: from then on the engine owns it.
 *
 * Dialects.  What the driver and the engine say to each other is the offload protocol (vso_abi.h), or virtio-vsock (vsock_abi.h), as
 * the config says. The words above and below are the offload protocol's. With vsock: an event's flow is the guest's port << 32 | the
 * host's, CONNECT's payload is the packet's struct vsk_hdr, the URIs of an answer are not used (NULL), any refusal is RST, and
 * BIND and DGRAM_DEST do not occur; vse_call() begins a connection from the host.
 *
 * Threads.  One mutex guards all of the engine; the thread holds it while it works and not while it sleeps in epoll_wait, so
 * every call below may be made from any thread, and waits at most for one bounded batch. Between vse_lock() and vse_unlock() the
 * rings and their memory map may be changed (vs_vq_set_call, vs_vq_set_mem, ...).
 *
 * Handles.  A flow id may be used again by the driver; a handle is unique for the life of the engine. An answer for a handle
 * that is gone (closed, reset, new epoch) returns -ESTALE and closes the fd that came with it: callers need no locking.
 */
#ifndef VS_ENGINE_H
#define VS_ENGINE_H

#include "vs_vq.h"
#include "vso_abi.h"
#include "vsock_abi.h"

/* cdef begin */

enum { VSE_IPX_PEERS = 64 };	/* peers of an IPX node */
enum { VSE_ROUTES_MAX = 1024 };
enum { VSE_BUF_ALLOC_MAX = 1 << 30 };
enum { VSE_GROW_NEVER = 0x7fffffff };
enum { VSE_PAYLOAD_MAX = 1856 };	/* fits struct vso_open with both URIs, VSO_OPTS_MAX bytes of options and a namespace's name */

enum vse_event_type {
	VSE_EV_HELLO = 1,	/* a driver started (new epoch); all handles before are gone. payload: struct vso_hello */
	VSE_EV_CONNECT = 2,	/* answer with vse_connected() or vse_refuse(). payload: that of VSO_CONNECT */
	VSE_EV_BIND = 3,	/* answer with vse_bound() or vse_refuse(). payload: that of VSO_BIND */
	VSE_EV_DGRAM_DEST = 4,	/* answer with vse_dgram_dest(). payload: the destination URI */
	VSE_EV_CANCEL = 5,	/* the driver closed (or broke) the flow before the answer: stop working on it */
	VSE_EV_ACCEPTED = 6,	/* for the log: handle is the listener's. payload: the peer's URI */
	/*
	 * for the log: to_host and to_guest are final; error says why (0: the driver closed it and all it sent was handed on;
	 * ECONNRESET also for an abort by the driver). Sent for flows that were connected or bound, after CLOSED.
	 */
	VSE_EV_ENDED = 7,
	/* ring `flow` broke a rule of the ring or of the protocol. payload: the evidence as text, also in vs_vq_error() */
	VSE_EV_BROKEN = 8,
	VSE_EV_TAKEN = 9,	/* the driver took the connection of vse_call(); else ENDED with ECONNREFUSED comes */
	VSE_EV_GROUP = 10,	/* answer with vse_group(). payload: the group's URI, error: VSO_GROUP_JOIN or _LEAVE */
	/*
	 * for the log: a route connected the flow. payload: its URI, error: vse_route.rule; vsock: that of CONNECT. While Python is behind, or
	 * when there were config.log_flows in this second, neither this nor ENDED comes for such a flow, and vse_unlogged() counts its lines.
	 */
	VSE_EV_ROUTED = 11
};

struct vse_event {
	uint64_t flow;		/* the driver's id, for the log */
	uint64_t handle;
	uint32_t type;
	uint32_t error;
	uint32_t len;		/* bytes of payload */
	uint64_t to_host;	/* bytes (ENDED) */
	uint64_t to_guest;
	uint8_t payload[VSE_PAYLOAD_MAX];
};

enum vse_dialect_id { VSE_OFFLOAD = 0, VSE_VSOCK = 1 };

/* what becomes of a stream's CONNECT without asking, see vs_route.c. The first that covers it decides */
struct vse_route {
	uint8_t first[16];	/* addresses, as in struct vso_hint */
	uint8_t last[16];
	uint16_t port_first;
	uint16_t port_last;
	uint8_t schemes;	/* VSO_HINT_TCP, VSO_HINT_TCP6 */
	uint8_t dial;		/* connect; else ask Python */
	uint16_t target_len;	/* 0: to what is asked for; else to this struct sockaddr_in or sockaddr_in6 */
	uint8_t target[28];
	uint32_t rule;		/* comes back with VSE_EV_ROUTED */
};

/* vsock: where a stream to this port of the host leads without asking */
struct vse_port {
	uint32_t port;
	uint16_t target_len;	/* of a struct sockaddr_un, _in or _in6; 0: ask */
	uint8_t target[110];
};

struct vse_config {
	uint32_t pairs;		/* ring pairs, 1..128 */
	uint32_t max_flows;	/* flows at once, listeners included; one more is refused with ENFILE */
	uint32_t buf_alloc;	/* bytes a stream flow may hold for a host socket that does not take them; allocated when needed */
	uint64_t buf_total;	/* bytes of such buffers over all flows: a flow that would exceed it is reset with ENOBUFS */
	uint64_t features;	/* VSO_F_* offered */
	uint32_t dialect;	/* enum vse_dialect_id */
	uint64_t guest_cid;	/* vsock */
	char hairpin[VSO_NETNS_MAX + 1];	/* the guest's network namespace whose loopback is offered, too; empty: none */
	uint32_t nr_routes;
	const struct vse_route *routes;	/* the caller's until vse_new() returns */
	uint32_t nr_ports;	/* vsock */
	const struct vse_port *ports;	/* likewise */
	char ports_path[97];	/* vsock: other ports lead to the Unix socket PATH_PORT; empty: ask */
	uint32_t nr_hints;	/* what the driver is told of native destinations, so that it need not ask (VSO_F_HINTS) */
	struct vso_hint hints[VSO_HINTS_MAX];
	uint32_t log_flows;	/* of routes, a second, that are told for the log (VSE_EV_ROUTED, and ENDED); 0: all */
	uint32_t linger_ms;	/* how long a closed flow may go on sending what a slow host socket did not take; 0: 60 s */
	uint32_t quick_ns;	/* a kick so soon after another may be one of a stream (vs_look.c); 0: 100 us */
	uint32_t look_ns;	/* of a stream, how long messages may lie that need no kick; 0: 50 us */
	uint32_t grow_ns;	/* of a flow that has a pair to itself for so long the window grows (vs_window.c); 0: 3 ms. VSE_GROW_NEVER */
	uint32_t poll_ns;	/* how long the thread may wait awake for what is about to come (vs_poll.c); 0: it always sleeps */
};

struct vse_stats {
	uint64_t flows;		/* now */
	uint64_t opened, ended;	/* ever */
	uint64_t to_host, to_guest;	/* stream bytes */
	uint64_t dgrams_to_host, dgrams_to_guest, dgrams_dropped;
	uint64_t msgs_in, msgs_out;	/* messages on the rings */
	uint64_t events;	/* events handed to Python: what "no Python per packet" is judged by */
	uint64_t wakeups;	/* returns of epoll_wait */
	uint64_t buffered;	/* bytes held now for host sockets that do not take them */
};

struct vse_engine;

struct vse_engine *vse_new(const struct vse_config *config, struct vs_err *err);
int vse_start(struct vse_engine *e, struct vs_err *err);	/* the thread; all signals blocked in it */
void vse_stop(struct vse_engine *e);		/* joins the thread, resets all flows, detaches the rings; idempotent */
void vse_free(struct vse_engine *e);

void vse_lock(struct vse_engine *e);
void vse_unlock(struct vse_engine *e);

/*
 * Rings come and go as the front-end starts and stops them. attach: vq is running; it and kick_fd stay the caller's and must
 * live until detach. The ring is scanned at once, a kick may have come before. detach: on return the engine does not use the vq
 * any more and has completed or given back each chain. Flows survive.
 */
int vse_ring_attach(struct vse_engine *e, uint32_t ring, struct vs_vq *vq, int kick_fd, struct vs_err *err);
void vse_ring_detach(struct vse_engine *e, uint32_t ring);

uint64_t vse_unlogged(struct vse_engine *e);	/* lines that the log lacks, since the last call: see VSE_EV_ROUTED */
int vse_event_fd(const struct vse_engine *e);	/* readable while events wait; an eventfd the engine owns */
int vse_events(struct vse_engine *e, struct vse_event *out, int max);	/* takes up to max events, in order */

/*
 * Answers. They take the fd in every case, also on error: it is closed then. -ESTALE: the flow is gone. Any other error leaves the
 * request open, to be answered again: -EPROTOTYPE for a socket of the wrong type (SOCK_STREAM for streams, SOCK_DGRAM for
 * datagrams), -ENAMETOOLONG for a URI above VSO_URI_MAX. URIs are NUL-terminated and are what the guest's getsockname() and getpeername()
 * show. The fd is made non-blocking; options that came with the request, or after it, are applied as far as this kind of
 * socket has them. A datagram socket that has a peer of its own gets what the guest sends to `peer` without an address.
 */
int vse_connected(struct vse_engine *e, uint64_t handle, int fd, const char *local, const char *peer);
int vse_bound(struct vse_engine *e, uint64_t handle, int fd, const char *local);
/*
 * For a peer that is a listener of the same guest: connect fd, without waiting, and answer with its real names. On one loopback the connection
 * is there when connect() returns, so the driver hears of both ends at once and in the kernel's order: CONNECT_REPLY, then ACCEPT.
 * 0: answered, fd is the engine's. Else fd stays the caller's: -EINPROGRESS, or -errno, and the request waits for its answer.
 */
int vse_connect(struct vse_engine *e, uint64_t handle, int fd, const void *addr, uint32_t addr_len);
/*
 * What a route that dials has begun for a CONNECT: *fd, now the caller's, is connecting, or -1: nothing was begun. -errno: it failed
 * with this. Ask once.
 */
int vse_dialed(struct vse_engine *e, uint64_t handle, int *fd);
int vse_refuse(struct vse_engine *e, uint64_t handle, uint32_t verdict, uint32_t error);
/* sockaddr bytes for this destination URI on this flow, or another verdict than OFFLOAD, or an error, to drop what goes there. Cached,
 * the least used goes first. */
int vse_dgram_dest(struct vse_engine *e, uint64_t handle, const char *uri, const void *addr, uint32_t addr_len, uint32_t verdict,
		   uint32_t error);
/* has a datagram come from what this URI names, to the server that this flow is? Its sockaddr goes to addr: the length; else -ENOENT */
int vse_dgram_client(struct vse_engine *e, uint64_t handle, const char *uri, void *addr, uint32_t room);
/*
 * vsock: a connection of the host to a port of the guest. Takes the connected fd in every case, as the answers do. The driver hears of
 * it at once; TAKEN or ENDED follows. greet: the peer of fd is told "OK <host port>\n" before any byte of the guest. -ENOTCONN: no driver
 * serves its rings; -EAGAIN: it does not keep up; -ENFILE: max_flows.
 */
int vse_call(struct vse_engine *e, int fd, uint32_t guest_port, bool greet, uint64_t *handle);
int vse_group(struct vse_engine *e, uint64_t handle, uint32_t verdict, uint32_t error);	/* what became of joining or leaving it */
/*
 * IPX. The guest's node: fd is a UDP socket bound to an IPv4 address, the engine's in every case, for the life of the engine; peers are node
 * addresses of 6 bytes each, who is sent broadcasts and heard. A BIND of an ipx URI is answered with a socket number (0: any that is free)
 * in place of a descriptor; local has room for VSO_URI_MAX + 1 bytes and gets the address. -EADDRINUSE, -EINVAL: none is free, no node; as above.
 * The address of vse_dgram_dest() says where a destination is, who is then heard, too.
 */
int vse_ipx_open(struct vse_engine *e, int fd, uint32_t network, const uint8_t *peers, uint32_t npeers);
int vse_ipx_bound(struct vse_engine *e, uint64_t handle, uint16_t number, char *local);
int vse_dup(struct vse_engine *e, uint64_t handle);	/* a duplicate of the flow's descriptor, the caller's; -ESTALE, -EBADF: none, -errno */
int vse_reset_flow(struct vse_engine *e, uint64_t handle, uint32_t error);	/* RESET to the driver, RST on the host */
/* every flow; quiet: no message, and the next driver must say HELLO first (the guest is gone) */
void vse_reset_all(struct vse_engine *e, bool quiet);

/* the options of a CONNECT or BIND (struct vso_sockopt + value, padded) applied to a host socket: 0, or -errno of the first that
 * failed on this kind of socket; unknown options are -ENOPROTOOPT. One whitelist for this and for SETSOCKOPT. */
int vse_apply_opts(int fd, const void *opts, uint32_t len);

void vse_get_stats(struct vse_engine *e, struct vse_stats *out);

/* cdef end */

#endif
