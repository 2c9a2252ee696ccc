/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * vso.h - what the parts of virtio_socket.ko share.
 *
 * Parts.  main.c decides (whose socket is this?), hook.c puts our wrappers into the kernel's protocol switch, sock_*.c are the socket
 * operations, netns.c says which network namespaces are offered, flow.c is the life of a flow and what the device says about it, transport.c is the virtio driver, pair.c its rings, poll.c and idle.c look at them before a task or a processor sleeps, pool.c keeps pages to use them again, window.c says how much may wait for a reader, gather.c makes one message of small writes, lend.c sends pages of others as they are, proc.c shows
 * /proc/net/hwsock, uri.c translates addresses.
 *
 * A struct socket is in one of three states, told by sock->ops alone:
 *
 *   undecided   row->undecided: the native table with connect, bind, listen and sendmsg replaced. Nothing is allocated.
 *   native      row->native: what the kernel would have had without us. No residue. Or, of a stream socket whose connect() did not wait for the
 *               outcome, row->trying: the same but for connect(), so that one that failed is undecided again.
 *   offloaded   row->offloaded: every operation is ours, the state is a struct vso_sock found by the socket's sock pointer.
 *
 * All these tables are static and never freed (the module has no exit), so a stale reading of sock->ops is harmless: do_accept() gives a
 * new socket its listener's table, and kTLS copies the table of its first user (6.1).
 *
 * The native struct sock stays, in TCP_CLOSE and unhashed, as the carrier: SOL_SOCKET options, SO_ERROR, timeouts, the wait queue, the
 * cgroup and the security label are its. A bound or listening carrier really is bound or listening in the guest ("dual listener").
 *
 * Locks, outer to inner; each names what it guards:
 *
 *   vso_sock.recv_mutex   the readers' side of rxq: taken while bytes are copied to user memory, never while waiting. recv blocks only recv
 *   vso_sock.req_mutex    one LISTEN or option request of a socket on its way at a time (BIND and CONNECT have a state); who ends a
 *                         listener closes the flow first, so that nobody waits for the device any more, and takes it then
 *   vso_pair.tx_lock      (bh) the from-driver ring, txq, vso_sock.fin_queued, held, unread: the order of the messages of a flow
 *   vso_sock.lock         (bh) everything else in struct vso_sock that changes
 *   vso_pool.lock         (bh) the pages of a pool
 *   the sock's wait queue
 *
 * lock_sock() is never held around any of these while something sleeps, and nothing of ours waits for the device under any lock
 * but req_mutex (and that delays only other such calls on the same socket).
 */
#ifndef VSO_H
#define VSO_H

#include <linux/completion.h>
#include <linux/interrupt.h>
#include <linux/in6.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/net.h>
#include <linux/refcount.h>
#include <linux/rhashtable-types.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>
#include <net/protocol.h>
#include <net/sock.h>

#include "addr.h"
#include "compat.h"
#include "../include/vso_abi.h"

#define VSO_PAIRS_MAX		16	/* more ring pairs than a guest of today has use for */
#define VSO_RX_PAGES		3	/* pieces of a chain to the driver: 32 + 32 + 4 KiB hold the longest datagram with its URI */
#define VSO_RX_BUFFERS		32	/* such chains posted to a ring: 2 MiB in flight a pair */
#define VSO_COPYBREAK		4096	/* payloads up to here are copied out and their buffer posted again at once */
#define VSO_TX_MAX		65536	/* payload of one DATA message */
#define VSO_TX_INLINE		2048	/* payloads up to here share one allocation and one descriptor with their header */
#define VSO_TX_FRAGS		(VSO_TX_MAX / PAGE_SIZE + 2)
#define VSO_LOCALS		8	/* of the host's addresses at which a socket was reached, those it may answer from */
#define VSO_POOL_ORDER		3	/* pages of 32 KiB: the largest order that the per-CPU page lists cache, and what a task's fragment has */
#define VSO_POOL_MAX		64	/* of them kept for each direction of a pair: 2 MiB, as many as are posted to the driver's ring */
#define VSO_TXQ_LIMIT		(128 * 1024)	/* memory of a flow's messages that wait for ring space before writers wait too */

/* ------------------------------------------------------------------------------------------------------------- hook.c */

/**
 * struct vso_row - one entry of the kernel's protocol switch that we wrap; or AF_IPX, which has none (sock_ipx.c)
 * @family: PF_INET or PF_INET6
 * @type: SOCK_STREAM or SOCK_DGRAM
 * @protocol: IPPROTO_TCP, IPPROTO_UDP, IPPROTO_MPTCP, IPPROTO_ICMP, IPPROTO_ICMPV6
 * @native: the table that was there
 * @undecided: @native with four operations replaced (datagrams: five); what new sockets get
 * @trying: @native with connect replaced: a native connect is under way, or has succeeded and nobody called connect() again
 * @offloaded: our table
 * @entry: the kernel's entry, NULL when this kernel has none
 */
struct vso_row {
	int family;
	int type;
	int protocol;
	const struct proto_ops *native;
	struct proto_ops undecided;
	struct proto_ops trying;
	struct proto_ops offloaded;
	struct inet_protosw *entry;
};

int vso_hook_install(void);
const struct vso_row *vso_row_find(int family, int type, int protocol);

/* --------------------------------------------------------------------------------------------------------- pair.c, transport.c */

struct vso_dev;
struct vso_sock;

enum vso_way {
	VSO_POOL_OUT,
	VSO_POOL_IN,
	VSO_POOLS,
};

/**
 * struct vso_pool - pages that wait to be used again, pool.c
 * @lock: guards all of it
 * @open: it takes pages
 * @nr: pages in @kept, the oldest first
 * @low: the least that @nr was since the last tick: so many were not needed
 * @count: what all pools of this direction did
 */
struct vso_pool {
	spinlock_t lock;
	bool open;
	unsigned int nr, low;
	struct vso_pool_count *count;
	struct vso_kept {
		struct page *page;
		unsigned long payer;	/* what it is charged to: only compared, never 0 */
	} kept[VSO_POOL_MAX];
};

/* one chain to the driver: compound pages, the first holds the header and all of any control message */
struct vso_rxbuf {
	struct page *page[VSO_RX_PAGES];	/* NULL: a socket queue took it */
};

/* one message from the device, its header copied once */
struct vso_msg {
	struct vso_pair *pair;
	struct vso_sock *vs;
	struct vso_rxbuf *buf;
	const u8 *data;		/* payload, as far as it lies in the first page */
	u32 type, flow, len, arg, buf_alloc, fwd_cnt, cookie;
};

/* did looking for an answer pay? (poll.c) Written by whoever waits, without a lock: a guess that a race makes no worse */
struct vso_poll {
	u8 missed;		/* looks for nothing, one after the other */
	u8 pass;		/* waits that leave it out yet */
};

/**
 * struct vso_pair - one pair of rings
 * @tasklet: serves both rings after an interrupt; the only reader of @rx
 * @tx_lock: guards @tx, @txq, @held, @run, and of vso_sock fin_queued, held and unread
 * @run: @tx may be touched; false from remove on
 * @txq: messages that found the ring full, in order
 * @held: what flows hold back, in no order (gather.c)
 * @notes: messages in the ring whose end somebody is to be notified of (lend.c)
 * @rx_posted: chains the device holds (tasklet only)
 * @pool: pages to use again, by direction
 * @lookers: tasks that serve the rings while they wait, poll.c and idle.c: the device need not call
 * @came: messages so far (written by the tasklet only)
 * @requests, @firsts: did that pay for requests to the device, and for the first answers on flows?
 */
struct vso_pair {
	struct vso_dev *dev;
	struct virtqueue *rx;
	struct virtqueue *tx;
	struct tasklet_struct tasklet;
	spinlock_t tx_lock;
	bool run;
	struct list_head txq;
	struct list_head held;
	unsigned int notes;
	unsigned int rx_posted;
	unsigned int rx_target;
	struct vso_pool pool[VSO_POOLS];
	atomic_t lookers;
	u32 came;
	struct vso_poll requests, firsts;
};

/**
 * struct vso_dev - one device; lives until the last flow that names it is freed
 * @ref: the driver's own and one for each flow
 * @up: HELLO was answered, requests may be sent. Written under every tx_lock of the device
 * @stopping: remove or freeze is under way
 * @starved: a tasklet found no memory for buffers
 * @hints: what it said of destinations beforehand, NULL: nothing. Written by the first pair's tasklet
 * @unanswered: PINGs since the device last said anything
 * @flows: flows by id, the driver's and (in @accepted, bit 31 off) the device's
 */
struct vso_dev {
	struct virtio_device *vdev;
	refcount_t ref;
	struct rcu_head rcu;
	bool up;
	bool stopping;
	bool starved;
	u64 epoch;
	u64 features;
	struct vso_hints __rcu *hints;
	char hairpin[VSO_NETNS_MAX + 1];	/* the namespace whose loopback is the device's, too; written before @up */
	u32 max_payload;
	unsigned int nr_pairs;		/* rings found */
	unsigned int pairs;		/* agreed in HELLO */
	unsigned int unanswered;
	unsigned long alive;		/* jiffies of the last word */
	u32 next_flow;
	atomic_t nr_flows;
	atomic_long_t grown;		/* bytes of all windows beyond the parameter: window.c */
	struct xarray flows;
	struct xarray accepted;
	wait_queue_head_t hello_wait;
	struct delayed_work watchdog;
	struct work_struct down_work;
	struct vso_pair pair[];
};

struct vso_frag {
	struct page *page;
	u32 off : 31;
	u32 lent : 1;			/* not a page of ours: lend.c */
	u32 len;
};

/**
 * struct vso_tx - a message to the device
 * @vs: its flow (one reference), NULL for HELLO and PING
 * @frags: pages of payload behind @hdr, or 0: then the payload follows @hdr here
 * @truesize: memory it holds
 * @embedded: part of its struct vso_sock, not freed
 * @counted: in vso_sock.unread
 * @hdr: then either payload, or @frags times struct vso_frag
 */
struct vso_tx {
	struct list_head list;
	struct vso_sock *vs;
	u32 truesize;
	u16 frags;
	bool embedded;
	bool counted;
	bool queued;
	struct ubuf_info *note;		/* who is to be notified when it has been read, a reference: lend.c */
	struct vso_hdr hdr;
	u8 body[];
};

struct vso_dev *vso_dev_get(void);
void vso_dev_put(struct vso_dev *dev);
bool vso_dev_knows_netns(void);
bool vso_dev_hairpin(const char *name);
struct vso_tx *vso_tx_new(struct vso_sock *vs, u16 type, u32 arg, const void *payload, u32 len, gfp_t gfp);
int vso_tx_submit(struct vso_pair *pair, struct vso_tx *tx);
void vso_tx_free(struct vso_tx *tx);
bool vso_tx_drain(struct vso_pair *pair);
void vso_txq_purge(struct vso_pair *pair);
void vso_pair_init(struct vso_pair *pair, struct vso_dev *dev);
void vso_pair_start(struct vso_pair *pair, struct virtqueue *rx, struct virtqueue *tx);
bool vso_pair_idle(struct vso_pair *pair);
void vso_pair_tick(struct vso_pair *pair);
void vso_pair_close(struct vso_pair *pair);
void vso_pair_stop(struct vso_pair *pair);
void vso_hello_reply(struct vso_dev *dev, u32 error, const void *payload, u32 len);
void vso_pong(struct vso_pair *pair, u16 type, u32 cookie);
void vso_dev_broken(struct vso_dev *dev, const char *why);
int vso_transport_register(void);
void vso_transport_unregister(void);

/* -------------------------------------------------------------------------------------------------------------- pool.c */

#define VSO_PAYER_NONE	1UL	/* of received pages, which are charged to nobody */

void vso_pool_init(struct vso_pool *pool, enum vso_way way);
void vso_pool_open(struct vso_pool *pool);
void vso_pool_age(struct vso_pool *pool);
void vso_pool_close(struct vso_pool *pool);
void vso_pool_put(struct vso_pool *pool, struct page *page, unsigned long payer);
struct page *vso_pool_take(struct vso_pool *pool, unsigned long payer);
bool vso_frag_refill(struct vso_pool *pool, struct page_frag *frag, u32 n);

/* -------------------------------------------------------------------------------------------------------------- poll.c */

extern unsigned int vso_poll_us;
void vso_poll_look(struct vso_pair *pair);
bool vso_poll_pays(struct vso_poll *poll);
void vso_poll_learn(struct vso_poll *poll, bool found);
bool vso_poll_request(struct vso_sock *vs, bool (*ready)(struct vso_sock *vs, u32 arg), u32 arg);
bool vso_poll_receive(struct vso_sock *vs, const struct sock *sk, bool wait, bool (*ready)(struct vso_sock *vs, u32 arg), u32 arg);
void vso_poll_busy(struct vso_sock *vs, const struct poll_table_struct *wait);

/* -------------------------------------------------------------------------------------------------------------- idle.c */

int vso_idle_init(void);
void vso_idle_exit(void);
void vso_idle_ask(struct vso_pair *pair);

/* ------------------------------------------------------------------------------------------------------------ gather.c */

bool vso_gather_wanted(const struct vso_sock *vs, const struct iov_iter *pages, u32 n);
bool vso_gather_due(const struct vso_sock *vs);
void vso_gather_release(struct vso_pair *pair, struct vso_sock *vs);
void vso_gather_flush(struct vso_sock *vs);
int vso_gather(struct vso_sock *vs, struct msghdr *msg, u32 n, bool pages);

/* -------------------------------------------------------------------------------------------------------------- lend.c */

u32 vso_lend_piece(const struct iov_iter *it, struct page **page, u32 *off);
void vso_lend_page(struct vso_frag *frag, struct page *page, u32 off, u32 len);
void vso_lend_back(const struct vso_frag *frag);
int vso_lend(struct vso_tx *tx, struct msghdr *msg, u32 n, struct ubuf_info *note);
int vso_zerocopy_begin(struct sock *sk, const struct msghdr *msg, size_t len, struct ubuf_info **note);
void vso_zerocopy_copied(struct ubuf_info *note);
void vso_zerocopy_end(struct ubuf_info *note, bool sent);

/* ------------------------------------------------------------------------------------------------------------- hints.c */

void vso_hints_set(struct vso_dev *dev, const void *payload, u32 len);
bool vso_hinted_native(const struct vso_row *row, struct net *net, const union vso_addr *addr);

/* -------------------------------------------------------------------------------------------------------------- flow.c */

/*
 * enum vso_state - an offloaded socket
 *
 *   BINDING      BIND is on its way; the caller of bind() waits for the answer
 *   BOUND        the device holds the address
 *   CONNECTING   CONNECT is on its way
 *   NATIVE       the device said NATIVE: vso_sock.work connects natively, then the socket is GONE
 *   CONNECTED    bytes flow; also after FIN either way
 *   LISTENING    LISTEN was sent
 *   EMBRYO       announced with ACCEPT, no socket yet
 *   CLOSED       connect failed, connection reset or device gone: no flow any more; a new connect() starts over
 *   GONE         the socket has other ops by now; who sees this reads sock->ops again
 */
enum vso_state {
	VSO_ST_BINDING,
	VSO_ST_BOUND,
	VSO_ST_CONNECTING,
	VSO_ST_NATIVE,
	VSO_ST_CONNECTED,
	VSO_ST_LISTENING,
	VSO_ST_EMBRYO,
	VSO_ST_CLOSED,
	VSO_ST_GONE,
};

/* what becomes of the socket is not decided: readers and writers wait */
static inline bool vso_asking(enum vso_state state)
{
	return state == VSO_ST_BINDING || state == VSO_ST_CONNECTING || state == VSO_ST_NATIVE;
}

/* which side a datagram's other end is on */
enum vso_where {
	VSO_TO_DEVICE = 1,
	VSO_TO_NATIVE,
};

/* received bytes: in data[] when page is NULL, else in page at off */
struct vso_seg {
	struct list_head list;
	struct page *page;
	u32 off;
	u32 len;
	u32 cap;		/* of data[]; the room behind off + len takes what comes next */
	u32 truesize;
	u8 data[];
};

/**
 * struct vso_sock - an offloaded socket and its flow
 *
 * References: one of the socket (until detach), one of the flow table (from the opening request until CLOSED), one of each message to
 * the device, one of the accept queue it is in, one of each operation under way.
 */
struct vso_sock {
	refcount_t ref;
	struct rcu_head rcu;
	struct rhash_head node;
	unsigned long key;		/* the sock pointer, only compared */
	const struct vso_row *row;
	struct vso_dev *dev;
	struct vso_pair *pair;
	struct list_head all;		/* for /proc/net/hwsock */
	u32 flow;
	kuid_t uid;
	unsigned long ino;
	struct net *net;		/* compared and shown only; valid while sk is set */

	spinlock_t lock;
	enum vso_state state;
	struct socket *sock;		/* NULL before accept and after detach, as sk */
	struct sock *sk;
	bool attached;			/* sock->ops is ours: before and after that vso_sock_get() does not find it */
	bool flow_open;			/* the device knows the flow: CLOSE is due */
	bool opening;			/* the opening request is being made: CLOSE must not overtake it */
	bool close_wanted;		/* so whoever makes it sends CLOSE behind it */
	bool closing;			/* CLOSE was sent, CLOSED is due */
	bool dead;			/* the device is gone or lost the flow: nothing may be sent */
	bool was_bound;			/* BIND opened the flow: it outlives a failed connect */
	bool native_bound;		/* the carrier is bound, too */
	bool native_listen;		/* the carrier listens, too */
	bool hand_listen;		/* it does not, but its state was set to TCP_LISTEN by hand (lock_sock) */
	bool addr_only;			/* datagrams: sendto() names the peer */
	u8 conn;			/* with addr_only: which side connect() named a peer on, enum vso_where; 0: none */
	bool fin_queued;		/* SHUTDOWN or CLOSE is queued: no data after it (pair->tx_lock) */
	u32 unread;			/* DATA in the ring that the device has not read (pair->tx_lock) */
	struct vso_tx *held;		/* DATA that grows until it may go, gather.c (pair->tx_lock) */
	bool snd_shut, rcv_shut;	/* shutdown(): ours */
	bool peer_fin;			/* SHUTDOWN(SEND) came */
	bool want_write;		/* somebody found no room: wake writers at the next chance */
	int pend_err;			/* reset before accept(): the sk_err to be */

	union vso_addr local, peer;
	union vso_addr target;		/* what connect() asked for: the native fallback needs it */
	int target_len;

	/* credit (vso_abi.h); on a listener buf_alloc and fwd_cnt count connections */
	u32 buf_alloc, fwd_cnt;		/* ours */
	u32 promised;			/* the largest buf_alloc the device may go by: what it sends before it hears of a smaller one is no fault */
	u32 fwd_told;			/* the fwd_cnt the device knows */
	u32 grown;			/* of buf_alloc: window.c, as these three */
	u32 window_mark;		/* fwd_cnt when a whole window had been read the last time */
	unsigned long window_since;	/* and that time, jiffies */
	bool filled;			/* the device has had no room since then */
	u32 tx_cnt;			/* bytes reserved for sending */
	u32 peer_alloc, peer_fwd;
	atomic_t queued;		/* truesize of this flow's messages in pair->txq */

	struct list_head rxq;		/* struct vso_seg */
	struct sk_buff_head dgrams;	/* datagrams, as packets: see dgram_recv.c. Its own lock is not used */
	u32 rx_bytes;
	u32 rx_mem;
	u32 rx_drops;
	struct mutex recv_mutex;
	bool asked;			/* sent since it last received, and */
	bool answered_once;		/* received: whether to look for the answer, poll.c. No lock */
	bool watched;			/* its program waits for it elsewhere, as in epoll_wait(): idle.c. No lock */
	struct vso_poll poll;

	/* urgent data: sock_urgent.c */
	bool urg_valid, urg_mark;
	bool urg_coming;		/* the device has told urg_byte, and not its place */
	u8 urg_byte;
	u32 urg_seq;

	/* datagrams: where they go (dgram_dest.c, NULL: none but target yet), and addresses of the host where they came in */
	struct vso_dests *dests;
	struct in6_addr locals[VSO_LOCALS];
	u32 next_local;

	struct list_head server;	/* of a datagram server that shares its port: dgram_share.c */
	struct list_head acceptq;	/* of the listener: children */
	struct list_head accept_node;	/* of the child */
	u32 acceptq_len;

	/* the answer to the one request that a process waits for */
	u32 cookie;
	struct completion done;
	bool answered;
	u32 verdict, error;

	struct mutex req_mutex;
	struct list_head deferred;	/* options set while connecting: sent when connected */
	u32 opt_len;
	u8 *opt_buf;
	bool filter_locked;	/* by us: vso_filter_lock() */
	/* SOL_SOCKET options as the device has them: sock_opt.c */
	bool told_keepalive;
	int told_sndbuf, told_rcvbuf;
	u32 told_priority;
	u64 told_pacing;
	bool told_tied;		/* the log: that it is tied to the guest's own stack, which has no part in it */

	struct work_struct work;	/* the native fallback of connect() */
	struct vso_tx close;		/* always there, so that close() cannot fail; last (flexible body) */
};

int vso_flow_init(void);
void vso_flow_exit(void);
struct vso_sock *vso_sock_get(const struct socket *sock);
void vso_sock_put(struct vso_sock *vs);
struct vso_sock *vso_sock_new(const struct vso_row *row, struct vso_dev *dev, gfp_t gfp);
int vso_attach(struct vso_sock *vs, struct socket *sock, const struct proto_ops *from);
void vso_detach(struct vso_sock *vs, const struct proto_ops *to);
int vso_flow_open(struct vso_sock *vs);
void vso_flow_opened(struct vso_sock *vs);
void vso_flow_forget(struct vso_sock *vs);
void vso_flow_close(struct vso_sock *vs, u32 arg);
int vso_flow_send(struct vso_sock *vs, u16 type, u32 arg, const void *payload, u32 len, gfp_t gfp);
int vso_flow_request(struct vso_sock *vs, u16 type, u32 arg, const void *payload, u32 len);
int vso_flow_wait(struct vso_sock *vs);
void vso_flow_wake(struct vso_sock *vs, __poll_t events);
void vso_write_space(struct vso_sock *vs);
void vso_want_write(struct vso_sock *vs);
void vso_flows_kill(struct vso_dev *dev, int error);
long vso_rx_room(const struct vso_sock *vs);
bool vso_rx_queue(struct vso_sock *vs, struct vso_msg *m);
void vso_rx(struct vso_pair *pair, struct vso_rxbuf *buf, u32 used);
void vso_msg_copy(const struct vso_msg *m, u32 off, void *to, u32 len);
void vso_seg_free(struct vso_sock *vs, struct vso_seg *seg);

extern struct list_head vso_all;
extern spinlock_t vso_all_lock;

/* ------------------------------------------------------------------------------------------------------------- sock_*.c */

extern unsigned int vso_window;

/* sock_open.c: undecided sockets, and connect */
struct vso_sock *vso_take(const struct vso_row *row, struct socket *sock);
int vso_open_request(struct vso_sock *vs, struct socket *sock, u16 type, const union vso_addr *addr, u16 flags);
int vso_pre_connect(struct sock *sk, vso_sockaddr *uaddr, int len);
bool vso_eligible(const struct vso_row *row, struct sock *sk);
int vso_undecided_connect(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len, int flags);
int vso_trying_connect(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len, int flags);
int vso_undecided_listen(const struct vso_row *row, struct socket *sock, int backlog);
int vso_undecided_sendmsg(const struct vso_row *row, struct socket *sock, struct msghdr *msg, size_t len);
int vso_connect(struct socket *sock, vso_sockaddr *uaddr, int len, int flags);
bool vso_native_cancel(struct vso_sock *vs);
void vso_detach_sync(struct vso_sock *vs, const struct proto_ops *to);
void vso_native_work(struct work_struct *work);

/* sock_common.c: operations of all offloaded sockets */
void vso_ops_fill(struct vso_row *row);
int vso_wait_event(struct vso_sock *vs, struct sock *sk, long *timeo, bool (*ready)(struct vso_sock *vs, u32 arg), u32 arg,
		   bool exclusive);
void vso_acceptq_flush(struct vso_sock *vs);
void vso_carrier_unlisten(struct vso_sock *vs, struct sock *sk);

/* sock_listen.c */
int vso_undecided_bind(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len);
int vso_bind(struct socket *sock, vso_sockaddr *uaddr, int len);
int vso_listen(struct socket *sock, int backlog);
int vso_accept(struct socket *sock, struct socket *newsock, VSO_ACCEPT_ARGS);

/* stream_recv.c */
int vso_stream_recvmsg(struct socket *sock, struct msghdr *msg, size_t len, int flags);

/* window.c */
void vso_window_set(struct vso_sock *vs, u32 bytes);
bool vso_window_filled(const struct vso_sock *vs);
void vso_window_used(struct vso_sock *vs, const struct sock *sk);
void vso_windows_tick(struct vso_dev *dev);

/* sock_stream.c */
int vso_stream_sendmsg(struct socket *sock, struct msghdr *msg, size_t len);
#ifdef VSO_HAVE_SENDPAGE
ssize_t vso_stream_sendpage(struct socket *sock, struct page *page, int offset, size_t size, int flags);
#endif
__poll_t vso_stream_poll(struct file *file, struct socket *sock, struct poll_table_struct *wait);
int vso_stream_shutdown(struct socket *sock, int how);
bool vso_stream_writable(struct vso_sock *vs);

/* sock_urgent.c */
u32 vso_urgent_ahead(const struct vso_sock *vs, u32 at);
bool vso_urgent_hides(const struct vso_sock *vs);
void vso_urgent_passed(struct vso_sock *vs);
int vso_urgent_ioctl(const struct vso_sock *vs, bool at_mark);
int vso_rx_urgent(struct vso_msg *m);
int vso_urgent_recv(struct vso_sock *vs, struct msghdr *msg, size_t len, int flags);
int vso_urgent_send(struct vso_sock *vs, struct msghdr *msg);

/* sock_dgram.c */
int vso_dgram_sendmsg(struct socket *sock, struct msghdr *msg, size_t len);
int vso_dgram_undecided_sendmsg(const struct vso_row *row, struct socket *sock, struct msghdr *msg, size_t len);
int vso_dgram_shutdown(struct socket *sock, int how);
int vso_dgram_undecided_connect(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len, int flags);
int vso_dgram_connect(struct socket *sock, vso_sockaddr *uaddr, int len, int flags);

bool vso_dgram_send_ready(struct vso_sock *vs, u32 arg);

/* sock_ipx.c */
void vso_ipx_register(void);
void vso_ipx_rx(const struct vso_msg *m);
void vso_ipx_error(struct vso_sock *vs, int error);

/* dgram_recv.c */
struct sk_buff *vso_payload_skb(const struct vso_msg *m, u32 head, u32 off, u32 len);
int vso_dgram_recvmsg(struct socket *sock, struct msghdr *msg, size_t len, int flags);
int vso_dgram_undecided_recvmsg(const struct vso_row *row, struct socket *sock, struct msghdr *msg, size_t len, int flags);
__poll_t vso_dgram_poll(struct file *file, struct socket *sock, struct poll_table_struct *wait);
void vso_rx_dgram(const struct vso_msg *m);
void vso_rx_error(const struct vso_msg *m);
bool vso_local_known(struct vso_sock *vs, const struct in6_addr *in6);

/* dgram_share.c */
void vso_share_add(struct vso_sock *vs, const struct sock *sk);
void vso_share_remove(struct vso_sock *vs);
struct vso_sock *vso_share_owner(struct vso_sock *vs, const union vso_addr *from);

/* dgram_dest.c */
struct vso_dests *vso_dests_new(void);
void vso_dest_add(struct vso_sock *vs, const union vso_addr *a, enum vso_where where);
int vso_dest_where(struct vso_sock *vs, struct sock *sk, const union vso_addr *a);
bool vso_addr_equal(const union vso_addr *a, const union vso_addr *b);

/* sock_opt.c */
int vso_setsockopt(struct socket *sock, int level, int name, sockptr_t val, unsigned int len);
int vso_getsockopt(struct socket *sock, int level, int name, char __user *val, int __user *len);
void vso_opts_told(struct vso_sock *vs, const struct sock *sk);
void vso_opts_told_as(struct vso_sock *child, const struct vso_sock *vs);
void vso_opts_sync_slow(struct vso_sock *vs, struct sock *sk, bool may_wait);
u32 vso_opts_window(const struct sock *sk);
int vso_host_queue(struct vso_sock *vs, u32 name);
u32 vso_opts_build(struct sock *sk, const struct vso_row *row, bool bind, void *buf, u32 size);
void vso_opts_inherit(struct sock *to, struct sock *from);

/* ------------------------------------------------------------------------------------------------------------- netns.c */

extern bool vso_all_netns;

int vso_netns_init(void);
void vso_netns_exit(void);
int vso_netns_name(struct net *net, char *name);
bool vso_netns_offered(struct net *net);
bool vso_netns_hairpin(struct net *net);

/* --------------------------------------------------------------------------------------------------------------- proc.c */

int vso_proc_init(void);
void vso_proc_exit(void);
const char *vso_state_name(enum vso_state state);
void vso_show_fdinfo(struct seq_file *m, struct socket *sock);

/*
 * Places where another thread may come between two steps. Built with VSO_RACES (build-guest-module --races), a thread sometimes stays
 * there a while, so that the tests' racing threads meet what they would meet once in a million times. Otherwise nothing.
 */
#ifdef VSO_RACES
#include <linux/delay.h>
#include <linux/random.h>

#define vso_race_atomic()	do { if (get_random_u32() % 2) udelay(1000); } while (0)	/* where sleeping is not allowed */
#define vso_race()		do { if (get_random_u32() % 2) usleep_range(50, 2000); } while (0)
#else
#define vso_race_atomic()	do { } while (0)
#define vso_race()		do { } while (0)
#endif

/* options that only the guest's own stack can honour: sockets with them are not offered to the device */
static inline bool vso_opts_tied(const struct sock *sk)
{
	return READ_ONCE(sk->sk_bound_dev_if) || READ_ONCE(sk->sk_mark);
}

/* SO_RCVBUF; negative: the program has chosen it, also where that is what it was */
static inline int vso_opts_rcvbuf(const struct sock *sk)
{
	int rcvbuf = READ_ONCE(sk->sk_rcvbuf);

	return sk->sk_userlocks & SOCK_RCVBUF_LOCK ? -rcvbuf : rcvbuf;
}

/*
 * Before Linux 6.8 the kernel keeps SOL_SOCKET options from us: streams look, with each call, and datagram sockets with each send, whether one
 * has changed. @may_wait: not in poll
 */
static inline void vso_opts_sync(struct vso_sock *vs, struct sock *sk, bool may_wait)
{
	if (unlikely(vs->told_keepalive != sock_flag(sk, SOCK_KEEPOPEN) || vs->told_sndbuf != READ_ONCE(sk->sk_sndbuf) ||
		     vs->told_rcvbuf != vso_opts_rcvbuf(sk) || vs->told_priority != READ_ONCE(sk->sk_priority) ||
		     vs->told_pacing != READ_ONCE(sk->sk_max_pacing_rate) || (vso_opts_tied(sk) && !vs->told_tied)))
		vso_opts_sync_slow(vs, sk, may_wait);
}

/* for idle.c: who waits elsewhere may expect something now */
static inline void vso_idle_asked(const struct vso_sock *vs)
{
	if (READ_ONCE(vs->watched))
		vso_idle_ask(vs->pair);
}

/* for poll.c: who sends may expect an answer, until something comes */
static inline void vso_poll_sent(struct vso_sock *vs)
{
	if (!READ_ONCE(vs->asked))
		WRITE_ONCE(vs->asked, true);
	vso_idle_asked(vs);
}

static inline void vso_poll_answered(struct vso_sock *vs)
{
	if (READ_ONCE(vs->asked)) {
		WRITE_ONCE(vs->asked, false);
		WRITE_ONCE(vs->answered_once, true);
	}
}

/* an offloaded operation finds its state, or else the socket changed its table under us: then the new table serves the call */
#define vso_again(sock, op, ...) ({ vso_race(); smp_load_acquire(&(sock)->ops)->op((sock), ##__VA_ARGS__); })

/* the same for poll, which has queued the caller already */
static inline __poll_t vso_again_poll(struct socket *sock, struct file *file)
{
	return smp_load_acquire(&sock->ops)->poll(file, sock, NULL);
}

#endif
