/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vse_priv - what the files of the engine share. Users include vs_engine.h.
 *
 *	vs_engine.c	the thread, the rings, life of the engine
 *	vs_event.c	events for Python
 *	vs_in.c		chains from the driver, in batches
 *	vs_look.c	the driver's streams of small messages: served without kicks
 *	vs_poll.c	waiting awake, where that is faster
 *	vs_out.c	chains to the driver, the queue of what found none
 *	vs_turn.c	the flows' turns, what epoll said
 *	vs_flow.c	flow table, life and death of a flow, the answers of Python
 *	vs_stream.c	bytes of stream flows both ways, half-close, errors, lingering
 *	vs_window.c	how much of a stream may be under way to the host
 *	vs_seqpkt.c	messages of seqpacket flows both ways
 *
 * The offload protocol (vso_abi.h):
 *
 *	vs_vso.c	its messages: the table of what is legal when, HELLO, CLOSE, ...
 *	vs_listen.c	listening flows, accepting, addresses as URIs
 *	vs_dgram.c	datagram flows to the host, the destination cache
 *	vs_dgram_in.c	and to the guest; errors of sent ones
 *	vs_ipx.c	datagram flows of IPX, over one UDP socket
 *	vs_sockopt.c	the whitelist of socket options
 *
 * virtio-vsock (vsock_abi.h):
 *
 *	vs_vsock.c	its packets, and connections that the host begins
 *
 * Dialects.  The engine speaks one of several protocols with its driver; struct vse_dialect is what tells them apart. A flow, when
 * its bytes may move, who waits for whose credit, what a slow or dead host does to it: that is one machine, and knows no message. How a
 * message looks, what the driver may say when, and which words announce what became of a flow: that is the dialect. So the lower
 * files never name a message, and a dialect never touches a host socket's bytes. Per message the seam costs one indirect call.
 *
 * Everything here is called with the engine's lock held. No chain stays popped when the lock is dropped, so a ring can be
 * detached, or its memory changed, between any two turns of the thread.
 */
#ifndef VSE_PRIV_H
#define VSE_PRIV_H

#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/queue.h>
#include <sys/socket.h>

#include "vs_engine.h"

enum {
	VSE_BATCH = 64,			/* chains popped from a ring before its completions are flushed */
	VSE_BATCH_MOST = 128,		/* popped in a turn at most, where those that come meanwhile join the batch */
	VSE_EPOLL_BATCH = 256,		/* events of one look at the host sockets */
	VSE_RUN_GAP = 16,		/* chains of other flows between two messages that go to a host socket in one call */
	VSE_IOV = 2 * VS_CHAIN_MAX,	/* iovecs gathered for one run of DATA; one chain has no more */
	VSE_IOV_CALL = 1024,		/* iovecs of one system call: UIO_MAXIOV */
	VSE_TURN_BYTES = 262144,	/* bytes to the guest a flow may move before the next flow has its turn */
	VSE_CALL_BYTES = 262144,	/* bytes to the guest at which the driver hears of them, though other flows have more */
	VSE_TURN_MSGS = 16,		/* messages, datagrams or connections, likewise */
	VSE_QUICK_NS = 100000,		/* config.quick_ns unless set: a kick so soon after another, with nothing said to the driver between, is one of a stream */
	VSE_QUICK_MIN = 4,		/* so many such kicks one after the other are a stream */
	VSE_LOOK_NS = 50000,		/* config.look_ns unless set: how long a stream's messages may lie before they are looked for without a kick */
	VSE_POLL_BYTES = 524288,	/* bytes after which host sockets are looked at again: 64 KiB are some 20 us */
	VSE_LIGHT_BYTES = 16384,	/* a light flow moves no more in a turn: 16 of their turns are one of a heavy flow */
	VSE_LIGHT_TURNS = 16,		/* turns of light flows before a heavy one has its turn */
	VSE_LIGHT_MSG = 4096,		/* bytes of the driver's message that need not wait for larger ones of other flows */
	VSE_CTL_PAUSE = 65536,		/* bytes of queued control messages at which a pair stops reading the driver */
	VSE_EVENTS_LOG = 64,	/* events Python did not take at which those for the log alone are left out */
	VSE_EVENTS_MS = 20,	/* how late Python may hear of what is for the log alone */
	VSE_LATE_MS = 10,	/* how late the driver may hear of what nobody waits for (VSO_F_LATE_CLOSED), */
	VSE_LATE_MAX = 8,	/* and of how many such messages at most: each keeps a buffer from it */
	VSE_EVENTS_PAUSE = 4096,	/* events Python did not take at which all pairs stop reading, and listeners accepting */
	VSE_SCRATCH = 65536 + 512,	/* the largest datagram with its header and URI */
	VSE_LINGER_MAX = 1024,		/* closed flows whose last bytes still wait for the host; one more aborts the oldest */
	VSE_LINGER_MS = 60000,		/* config.linger_ms unless set: the kernel's tcp_fin_timeout */
	VSE_WINDOW_MIN = 4096,		/* bytes of a flow's window, however small the application's SO_SNDBUF */
	VSE_RETRY_MS = 100,		/* a listener that found no fd or no free flow tries again after this, or when a flow ends */
	VSE_DEST_MAX = 64,		/* destinations a datagram flow remembers */
	VSE_PEERS_MAX = 1024,		/* and one that the guest's server bound: clients that can still be answered */
	VSE_DEST_ASK_MAX = 8,		/* of those, waiting for Python */
	VSE_LOCALS = 8,			/* the host's addresses at which a datagram flow was reached: what it may send from */
	VSE_DEST_HELD = 131072,		/* bytes of datagrams a flow may hold while Python decides */
	VSE_FLOWS_CAP = 1 << 20,	/* config.max_flows may not be more */
	VSE_IPX_IOV = 256,		/* pieces of memory that the payload of an IPX packet may lie in */
};

/* what an epoll event is about, in the low 24 bits of its data; a flow's handle has its slot there */
#define VSE_SLOT_BITS	24
#define VSE_SLOT_MASK	((1u << VSE_SLOT_BITS) - 1)
#define VSE_SLOT_KICK	VSE_SLOT_MASK		/* ring number above */
#define VSE_SLOT_WAKE	(VSE_SLOT_MASK - 1)
#define VSE_SLOT_IPX	(VSE_SLOT_MASK - 2)

/*
 * NEW       opened by the driver, waits for Python. No fd.
 * BOUND     stream, BIND was answered; fd is bound and not in epoll.
 * LISTEN    fd listens.
 * CALLING   vsock: announced to the driver, which did not answer yet. fd is connected and not in epoll.
 * STREAM    fd is connected; bytes move.
 * DGRAM     fd is a datagram socket, connected or not.
 * DEAD      RESET was sent; no fd; waits for the driver's CLOSE. vsock: RST was sent, so it is gone (not in the id table).
 * LINGER    the driver closed, its id is free (not in the id table); the rest of wbuf still goes to the host.
 */
enum vse_state { ST_NEW, ST_BOUND, ST_LISTEN, ST_CALLING, ST_STREAM, ST_DGRAM, ST_DEAD, ST_LINGER, ST_COUNT };

/* what the driver said that it will not do any more, whatever the dialect's word for it */
enum {
	VSE_SHUT_SEND = 1,
	VSE_SHUT_RECV = 2,
};

struct epoll_event;
struct vse_pair;
struct vse_dest;
TAILQ_HEAD(vse_destq, vse_dest);

struct vse_flow {
	uint64_t handle;		/* serial << 24 | slot */
	uint64_t id;			/* the dialect's name for it, unique among flows that have one */
	enum vse_state state;
	int fd;				/* -1: none */
	struct vse_pair *pair;
	struct vse_flow *hash_next;
	struct vse_flowq *queue;	/* pair->runq or pair->lightq when queued, else NULL */
	TAILQ_ENTRY(vse_flow) run;	/* on *queue when queued */
	TAILQ_ENTRY(vse_flow) aux;	/* on engine->linger (LINGER), engine->stalled (LISTEN, when stalled) or engine->gone */

	/* what Python was asked: VSE_EV_CONNECT, VSE_EV_BIND or 0; with the request's cookie and options */
	uint32_t pending;
	uint32_t cookie;
	uint8_t *opts;
	uint32_t opts_len;
	int dialed;			/* of a route that dials: connecting, or -1. Python takes it */
	int dial_error;			/* or how that failed, -errno */
	char *local, *peer;		/* URIs as the guest knows them; kept for BOUND, LISTEN and DGRAM */

	bool dgram;			/* by the URI's scheme */
	bool ping;			/* datagrams: of ICMP echo */
	bool ipx;			/* datagrams: of IPX; no fd, the node's serves them all */
	uint16_t ipx_number;		/* its socket number; 0: not bound */
	struct vse_flow *ipx_next;
	bool addr_only;			/* datagrams: CONNECT asked for a socket without a peer */
	bool server;			/* datagrams: opened by BIND; whoever sent to it may be answered */
	bool seq;			/* messages, not a stream: SOCK_SEQPACKET */
	bool greet;			/* CALLING: the host's end waits for "OK PORT" */
	bool gone;			/* on engine->gone: the id is given back, freed at the end of the turn */
	bool counted;			/* was connected or bound: ENDED is due */
	bool routed;			/* by a route: Python does nothing but log it */
	bool heavy;			/* its last turn was more than a light one, see vs_turn.c */
	bool stalled;			/* on engine->stalled */
	bool polled;			/* fd is in epoll */
	bool shared;			/* somebody else may have a duplicate of fd */
	bool readable, writable;	/* edge-triggered readiness, cleared by EAGAIN */
	bool pri_seen;			/* EPOLLPRI was, see vs_urgent.c */
	enum { PRI_NONE, PRI_TOLD, PRI_PASSING } pri;
	uint8_t urgent;			/* TOLD: the byte */
	bool hup;			/* EPOLLRDHUP, ERR or HUP was seen: a short read does not mean empty */
	bool host_eof;			/* read returned 0 and SHUTDOWN was sent */
	bool fin_sent;			/* shutdown(SHUT_WR) done */
	bool connected;			/* datagrams: fd has a peer of its own */
	bool six;			/* whose address is IPv6, and not IPv4 mapped */
	bool group_asked;		/* datagrams: GROUP waits for Python's answer, under this cookie */
	uint32_t group_cookie;
	bool errq;			/* the error queue of fd may have entries */
	uint32_t shut;			/* VSE_SHUT_* of the driver */
	uint32_t error;			/* host or protocol error; RESET follows when what was readable is delivered */

	/* to the host: rx_cnt received, fwd_cnt handed to the host, told: fwd_cnt as the driver last heard it. promised: the largest buf_alloc
	 * that the driver may go by: what it sends before it hears of a smaller one is no fault */
	uint32_t buf_alloc, promised, rx_cnt, fwd_cnt, told, dropped;
	uint32_t grown;			/* of buf_alloc (vs_window.c); */
	uint64_t window_ns;		/* when that was looked at last */
	bool fixed;			/* it is as the application has chosen it */
	uint8_t *wbuf;			/* ring buffer of wcap bytes, NULL when empty */
	uint32_t wcap, whead, wlen;
	uint32_t part;			/* seq: bytes of the incomplete message at the end of wbuf */
	uint32_t empties;		/* seq: empty messages in wbuf */
	bool partial;			/* seq: there is one */
	bool urgent_out;		/* the byte at urgent_at, counted as rx_cnt counts, goes out as urgent */
	uint32_t urgent_at;
	uint64_t linger_until;

	uint32_t tx_cnt, peer_alloc, peer_fwd;	/* to the guest: bytes (or connections, when listening) sent, and the driver's window */
	uint32_t burst;			/* bytes to make room for in the next read: what the last one gave, twice that if it was full */
	uint8_t *rmsg;			/* seq: a message of rlen bytes, of which rat were sent */
	uint32_t rlen, rat;

	struct in6_addr locals[VSE_LOCALS];	/* datagrams; IPv4 mapped. Unspecified: none */
	uint32_t next_local;
	struct vse_destq dests;		/* most recently used first */
	uint32_t ndests, nasked, held;	/* held: bytes of datagrams, or of the messages (seq) in wbuf */

	uint64_t to_host, to_guest;
};

TAILQ_HEAD(vse_flowq, vse_flow);

struct vse_ring {
	struct vs_vq *vq;		/* NULL: not attached */
	int kick_fd;
	uint32_t index;
	bool broken;			/* until it is attached again */
	bool ready;			/* from the driver: may have chains */
	bool stream;			/* from the driver: messages come in quick succession, one way; see vs_look.c */
	bool look;			/* kick is not enabled: the thread will look */
	uint32_t quick;			/* kicks so far that came so */
	uint64_t kicked_ns, kicked_out;	/* when the last one came, and stats.msgs_out then */
	bool starved;			/* to the driver: had no chain, kick is enabled */
	bool dirty;			/* pushed and not flushed */
	uint32_t late;			/* to the driver: pushed and not flushed, and not dirty for them */
	struct vs_mem *mem;		/* memory of the chains of this turn: looked at for poison */
};

struct vse_pair {
	struct vse_engine *e;
	struct vse_ring rx, tx;		/* from the driver's view: rx to the driver, tx from it */
	struct vse_flowq runq, lightq;	/* flows that may have something for the driver: heavy and light ones */
	uint32_t light_turns;		/* since a heavy flow had one */
	uint64_t talks, alone_ns;	/* the flow that was heard last, and since when no other was; 0: not so yet. See vs_window.c */
	uint8_t *ctl;			/* control messages that found no chain: [head, tail) of header + payload each */
	size_t ctl_head, ctl_tail, ctl_cap;
};

/* any dialect's header */
union vse_hdr {
	struct vso_hdr vso;
	struct vsk_hdr vsock;
};

/*
 * What a dialect is. Headers of the driver are copied once, to e->hdrs[i] for the chain e->batch[i], and checked before anything of
 * the batch is served, so that consecutive messages of a flow can be taken together.
 */
struct vse_dialect {
	uint32_t hdr_len;		/* every message, both ways, starts with a header of so many bytes */
	bool capped;			/* a driver has no more under way than it would take itself (peer_alloc), whatever the window is */
	uint32_t rx_min;		/* writable bytes that every chain to the driver must have */

	/* from the driver */
	bool (*well_formed)(const struct vse_engine *e, int i);	/* all of hdr_len was there */
	/* is batch[i] about a flow's bytes and nothing else? Then of which (any number that no other has), and how many */
	bool (*plain)(const struct vse_engine *e, int i, uint64_t *flow, uint32_t *len);
	void (*complain)(struct vse_pair *p, int i);		/* it was not well-formed: break the ring and say why */
	void (*serve)(struct vse_pair *p, int first, int end);	/* batch[first], and what else it says in e->served */

	/* to the driver */
	uint32_t (*payload_len)(const union vse_hdr *hdr);
	/* the header of len bytes; last: a message ends with them (seq) */
	void (*data)(const struct vse_flow *f, union vse_hdr *hdr, uint32_t len, bool last);
	void (*credit)(struct vse_flow *f);			/* the window of the flow moved */
	void (*eof)(struct vse_flow *f);			/* the host sends no more */
	/* f->urgent: is on its way, or (here) is the next byte of the stream. NULL: this dialect has no urgent data */
	void (*urgent)(struct vse_flow *f, bool here);
	void (*reset)(struct vse_flow *f, uint32_t error);	/* the host side is dead; f->state is ST_DEAD already */
	/* what Python decided on `asked` (f->pending), VSO_OFFLOAD and error 0: it is connected, or bound */
	void (*answer)(struct vse_flow *f, uint32_t asked, uint32_t verdict, uint32_t error, const char *local, const char *peer);
};

extern const struct vse_dialect vse_vso, vse_vsock;

/* see vs_poll.c */
struct vse_poll {
	uint64_t seen_ns, seen_msgs, seen_bytes;	/* at the end of the last wait: when, and what had been moved */
	uint32_t uncalled;	/* so often the driver wanted no call, one after the other */
	bool near;		/* that one was within a conversation */
	bool in_vain;		/* nothing came while it was awake */
	bool awake;		/* how this epoch waits */
	bool better;		/* was awake the faster way, when last tried? */
	uint32_t epoch, keep, waits;	/* in the cycle of tries; epochs of what was faster; in this epoch */
	uint64_t ns, msgs, bytes;	/* and what they came to */
	struct vse_rate {
		double msgs, bytes;	/* a ns */
	} rate[2];			/* asleep, and awake */
};

struct vse_evnode;

struct vse_engine {
	const struct vse_dialect *dialect;
	struct vse_config config;
	pthread_mutex_t gate, lock;	/* see vse_lock() */
	pthread_t thread;
	bool started, stopped;
	atomic_bool stopping;
	int ep, wake_fd, event_fd;
	bool sleeping;			/* the thread is, or is about to be, in epoll_wait with a timeout */
	bool looking;			/* and with that of a look; the thread's alone to write */
	struct vse_poll poll;

	bool hello;			/* a driver has said HELLO */
	uint64_t epoch;
	uint64_t features;
	uint32_t max_payload;		/* of one message to the driver */

	struct vse_pair *pairs;
	struct vse_flow **slots;	/* by the low bits of the handle; free ones are chained through free_slots */
	uint32_t *free_slots, nfree;
	struct vse_flow **hash;		/* by id */
	uint32_t hash_mask;
	uint64_t serial;
	uint32_t next_device_id, next_port;
	struct vse_flowq linger, stalled, gone;
	uint32_t nlinger;
	uint64_t retry_at;		/* when stalled listeners try again; 0: none wait */
	uint64_t grown;			/* bytes of all windows beyond config.buf_alloc */
	uint64_t reserved;		/* bytes of write buffers and held datagrams, bounded by buf_total */

	struct vse_ipx *ipx;		/* the guest's node; NULL: it has none */
	struct vse_evnode *ev_first, **ev_last;
	uint32_t nevents;
	bool told;			/* event_fd is readable */
	uint64_t late_at;		/* when such messages of any ring are due; 0: there are none */
	uint64_t tell_at;		/* when it has to be, for events that may be late; 0: there are none */
	uint64_t log_second, unlogged;
	uint32_t log_flows;		/* that Python heard of in that second */
	struct vse_stats stats;

	struct vs_chain *batch[VSE_BATCH];
	union vse_hdr hdrs[VSE_BATCH];
	uint64_t served;		/* bit i: batch[i] was served together with one before it */
	struct vs_chain *rx_chain;
	bool serving;			/* batch is in use, see vse_poll_light() */
	int n_gathered;			/* chains of vse_rx_gather(), and the payload that each has room for */
	uint32_t rx_len[VSE_BATCH];
	struct iovec iov[VSE_IOV + 8];
	uint8_t scratch[VSE_SCRATCH];
};

/* vs_event.c */
void vse_signal(int fd);			/* an eventfd */
void vse_events_free(struct vse_engine *e);
/* the thread is on its way to sleep_ms(): what it may be late with needs no wake-up */
static inline bool vse_may_be_late(const struct vse_engine *e) { return e->started && !e->sleeping; }
void vse_tell(struct vse_engine *e);		/* Python, that there are events */
void vse_event(struct vse_engine *e, uint32_t type, const struct vse_flow *f, uint32_t flow, uint32_t error,
	       const void *payload, uint32_t len);
static inline bool vse_paused(const struct vse_engine *e) { return e->nevents >= VSE_EVENTS_PAUSE; }

/* vs_engine.c */
uint64_t vse_now_ns(void);
uint64_t vse_now_ms(void);
void vse_ring_break(struct vse_engine *e, struct vse_ring *r, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
void vse_ring_publish(struct vse_engine *e, struct vse_ring *r);	/* what was pushed; the call is the decision of the driver's EVENT_IDX */
void vse_ring_poll_mem(struct vse_ring *r, struct vs_mem *mem);
void vse_turn_now(struct vse_engine *e);	/* serve what host sockets have, in the caller's thread */
static inline bool vse_usable(const struct vse_ring *r) { return r->vq && !r->broken; }
struct vse_ring *vse_ring_of(struct vse_engine *e, uint32_t ring);	/* NULL: none of that number */
void vse_settle(struct vse_engine *e);		/* at the end of every call from outside: flush, wake the thread if it has work */

/* vs_window.c */
void vse_window_heard(struct vse_flow *f);	/* of every flow that the driver says something on, where windows grow */
void vse_window_adapt(struct vse_flow *f);	/* before the driver is told of room */
void vse_window_fix(struct vse_flow *f);	/* it is what it was, and stays so */

/* vs_look.c */
void vse_look_begin(void);			/* in the thread */
bool vse_look_due(const struct vse_engine *e);
int vse_look_wait(const struct vse_engine *e, struct epoll_event *evs, int max);	/* epoll_wait; called without the lock */
void vse_look_turn(struct vse_engine *e, const struct epoll_event *evs, int n);	/* behind it */

/* vs_poll.c, around each wait of the thread */
bool vse_poll_next(const struct vse_engine *e, uint64_t more);	/* will it wait awake, if so many bytes more move before? Then kicks need not be enabled */
void vse_poll_called(struct vse_engine *e, bool called);	/* the driver was told something, and wanted a call, or not */
bool vse_poll_begin(struct vse_engine *e);	/* may it wait with vse_poll_wait()? */
int vse_poll_wait(struct vse_engine *e, struct epoll_event *evs, int max);	/* epoll_wait; called without the lock */
void vse_poll_end(struct vse_engine *e);

/* vs_in.c */
void vse_tx_batch(struct vse_pair *p);		/* one batch of the driver's messages */
/* may the driver say more, or do too many answers and questions wait? */
static inline bool vse_tx_open(const struct vse_pair *p)
{
	return p->ctl_tail - p->ctl_head < VSE_CTL_PAUSE && !vse_paused(p->e);
}

/* vs_out.c */
struct vs_chain *vse_rx_get(struct vse_pair *p);	/* a chain to fill: give it to rx_put or rx_unget. NULL: none now */
void vse_rx_put(struct vse_pair *p, struct vs_chain *c, const void *hdr, uint32_t len);	/* len bytes of payload are in place */
void vse_rx_unget(struct vse_pair *p, struct vs_chain *c);
/* chains for want bytes of payload, at most limit, as e->iov[0..*cnt); returns what fits, 0: no chain now. Then vse_rx_gathered() */
size_t vse_rx_gather(struct vse_pair *p, size_t want, size_t limit, int *cnt);
void vse_rx_gathered(struct vse_flow *f, size_t len);	/* len bytes are in place: say so; the other chains go back */
bool vse_ctl_drain(struct vse_pair *p);		/* queued control messages; false: some are left */
static inline bool vse_ctl_empty(const struct vse_pair *p) { return p->ctl_head == p->ctl_tail; }
void vse_send(struct vse_pair *p, const void *hdr, const void *payload, uint32_t len);	/* now, or queued */
void vse_send_late(struct vse_pair *p, const void *hdr);	/* without payload; the driver may hear of it VSE_LATE_MS later, or with the next message */
void vse_late_expire(struct vse_engine *e, uint64_t now);	/* at the end of the turn it does, when VSE_LATE_MS are over */
size_t vse_payload_iov(const struct vs_chain *c, bool writable, size_t skip, size_t limit, struct iovec *iov, int *cnt);

/* vs_turn.c */
void vse_rx_pump(struct vse_pair *p);		/* queued control messages, then what flows have */
static inline int64_t vse_budget(const struct vse_flow *f)	/* bytes to the guest in this turn */
{
	return f->heavy ? VSE_TURN_BYTES : VSE_LIGHT_BYTES;
}

/* there is something for the driver, and it may have a chain */
static inline bool vse_rx_work(const struct vse_pair *p)
{
	return vse_usable(&p->rx) && !p->rx.starved && (!vse_ctl_empty(p) || !TAILQ_EMPTY(&p->runq) || !TAILQ_EMPTY(&p->lightq));
}

void vse_polled(struct vse_engine *e, const struct epoll_event *evs, int n);	/* what epoll said */
void vse_poll_light(struct vse_engine *e);		/* between two messages of a batch: at epoll, and what light flows have */

/* vs_flow.c */
struct vse_flow *vse_flow_new(struct vse_engine *e, struct vse_pair *p, uint64_t id);	/* NULL: no room */
struct vse_flow *vse_flow_find(struct vse_engine *e, uint64_t id);
struct vse_flow *vse_flow_of(struct vse_engine *e, uint64_t handle);
void vse_flow_free(struct vse_flow *f);		/* closes the fd plainly; ENDED if due */
void vse_flow_unhash(struct vse_flow *f);
void vse_flow_run(struct vse_flow *f);		/* put on the run queue */
void vse_flow_rest(struct vse_flow *f);		/* take off */
int vse_flow_poll(struct vse_flow *f);		/* put the fd in epoll */
void vse_flow_drop_fd(struct vse_flow *f, bool abort);
void vse_flow_reset(struct vse_flow *f, uint32_t error);	/* RST on the host, RESET to the driver, DEAD */
void vse_flow_gone(struct vse_flow *f);		/* give the id back now, and the flow at the end of the turn */
void vse_flows_reap(struct vse_engine *e);	/* the end of the turn */
void vse_flow_close(struct vse_flow *f, bool abort);	/* the driver is done with it: its id is free; freed, or LINGER */
void vse_flow_ready(struct vse_flow *f, uint32_t events);	/* what epoll said */
void vse_flows_forget(struct vse_engine *e, bool linger_too);	/* every flow, no message: new epoch, stop */

/* vs_stream.c */
void vse_stream_begin(struct vse_flow *f);
void vse_stream_data(struct vse_flow *f, struct iovec *iov, int cnt, size_t total, bool last);
void vse_stream_urgent(struct vse_flow *f, uint8_t byte);	/* the next byte of the stream, urgent */
void vse_stream_shutdown(struct vse_flow *f, uint32_t how);
bool vse_stream_credit(struct vse_flow *f, uint32_t buf_alloc, uint32_t fwd_cnt);	/* false: nonsense, the flow was reset */
void vse_stream_bound(struct vse_flow *f, uint32_t sndbuf);
void vse_stream_ready(struct vse_flow *f, uint32_t events);
void vse_stream_free_wbuf(struct vse_flow *f);
void vse_stream_discard(struct vse_flow *f);	/* what is unread at the host, so that close() sends FIN and not RST */
uint32_t vse_stream_window(const struct vse_flow *f);	/* bytes that the driver takes now */
void vse_stream_failed(struct vse_flow *f, int error);	/* the write side met an error */
void vse_stream_quiet(struct vse_flow *f, ssize_t rc);	/* a read gave no data, but rc: 0 or -errno */
ssize_t vse_stream_drop(struct vse_flow *f);	/* read and forget; bytes or -errno */
void vse_linger_expire(struct vse_engine *e, uint64_t now);
/* a turn of a flow on the run queue: done (take it off), again (to the tail), or starved of chains (leave it) */
enum vse_turn { TURN_DONE, TURN_AGAIN, TURN_STARVED };
enum vse_turn vse_stream_turn(struct vse_flow *f);

/* vs_urgent.c */
void vse_urgent_seen(struct vse_flow *f);	/* epoll said so */
int vse_urgent_turn(struct vse_flow *f);
void vse_urgent_said(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c);	/* URGENT of the driver */

/* vs_seqpkt.c */
void vse_seq_begin(struct vse_flow *f);
void vse_seq_data(struct vse_flow *f, struct iovec *iov, int cnt, size_t total, bool eom);
void vse_seq_send(struct vse_flow *f);		/* what is whole in wbuf */
enum vse_turn vse_seq_turn(struct vse_flow *f);
void vse_seq_free(struct vse_flow *f);

/* vs_vso.c */
bool vse_printable(const void *s, uint32_t len);
struct vso_hdr vse_vso_hdr(const struct vse_flow *f, uint32_t type, uint32_t arg, uint32_t len);	/* with the credit fields */
void vse_vso_reply(struct vse_pair *p, struct vse_flow *f, uint32_t type, uint32_t id, uint32_t cookie, uint32_t verdict,
		   uint32_t error, const char *local, const char *peer);

/* vs_listen.c */
void vse_listen(struct vse_flow *f, const struct vso_hdr *h);
enum vse_turn vse_listen_turn(struct vse_flow *f);
void vse_listen_retry(struct vse_engine *e, uint64_t now);
void vse_listen_unstall(struct vse_flow *f);
int vse_flow_connected(struct vse_flow *f, int fd, const char *local, const char *peer);	/* the answer to its CONNECT: takes fd, or -errno */
bool vse_routes_valid(const struct vse_config *c);
bool vse_routes_copy(struct vse_engine *e, const struct vse_config *c);	/* false: no memory */
void vse_routes_free(struct vse_engine *e);
/* did a route connect what this CONNECT asks for? Then the driver has heard of it; else Python is to be asked */
bool vse_routed(struct vse_flow *f, const struct vso_open *o, const uint8_t *payload);
bool vse_port_routed(struct vse_flow *f, const struct vsk_hdr *h);
int vse_connect_now(int fd, const void *addr, uint32_t addr_len);
void vse_uri_format(char *buf, const char *scheme, const struct sockaddr_storage *ss);	/* buf: VSO_URI_MAX + 1; "" if no IP */

/* vs_dgram.c */
void vse_dgram_send(struct vse_flow *f, const struct vs_chain *c, const struct vso_hdr *h);
void vse_dgram_ask(struct vse_flow *f, const struct vs_chain *c, const struct vso_hdr *h);
/* the URI that the guest knows this address by; NULL: it has none. sent: it is where one went, not where one came from */
const char *vse_dgram_name(struct vse_flow *f, const struct sockaddr_storage *ss, socklen_t ss_len, bool sent, char *buf, size_t *len);
void vse_dgram_free(struct vse_flow *f);
bool vse_dgram_sent_to(const struct vse_flow *f, const struct sockaddr_storage *ss);	/* or may, as Python said */

/* vs_dgram_in.c */
void vse_dgram_begin(struct vse_flow *f);
enum vse_turn vse_dgram_turn(struct vse_flow *f);
void vse_dgram_failed(struct vse_flow *f, const char *uri, size_t uri_len, int error);	/* a call on the host's socket gave it */
bool vse_local_known(const struct vse_flow *f, const struct in6_addr *local);
bool vse_is_six(const struct sockaddr_storage *ss);

/* vs_ipx.c */
void vse_ipx_send(struct vse_flow *f, const char *uri, size_t uri_len, uint8_t type, const struct iovec *data, int cnt);
void vse_ipx_turn(struct vse_engine *e);	/* the node's socket is readable */
void vse_ipx_resume(struct vse_engine *e);	/* a ring may have chains again */
void vse_ipx_free(struct vse_flow *f);		/* its number is free again */
void vse_ipx_close(struct vse_engine *e);	/* the node, when no flow is left */

/* vs_sockopt.c */
void vse_sockopt_said(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c);	/* SETSOCKOPT, GETSOCKOPT */
bool vse_opts_valid(const void *opts, uint32_t len);	/* well-formed, whatever the names */

#endif
