// SPDX-License-Identifier: GPL-2.0-only
/*
 * flow.c - the life of a struct vso_sock and of its flow.
 *
 * The two do not end together. A socket may be closed while its flow waits for CLOSED (the id may not be used before), and a
 * flow may end (refused, reset, device gone) while the socket lives on. Hence the references listed at struct vso_sock.
 *
 * Attaching.  vso_attach() enters the socket into the table first and exchanges sock->ops then, with cmpxchg: of several threads that
 * decide about one socket, one wins, and the losers read sock->ops again. Detaching goes the other way round: ops first, then the table.
 * So an operation of ours that finds no entry knows that sock->ops has changed already (vso_again). An entry whose exchange is still to come
 * may yet lose it, and would then be a state that nobody will ever change: until it has won it is found by no one. Both steps are under the
 * lock, so who meets such an entry waits for a few instructions.
 *
 * After detach nothing of the struct vso_sock points to the socket: sk and sock are cleared under the lock, and wake-ups happen
 * under the same lock. The socket may be released at once.
 */
#include <linux/rhashtable.h>
#include <linux/slab.h>
#include <net/net_namespace.h>

#include "vso.h"

static const struct rhashtable_params vso_table_params = {
	.key_len = sizeof(unsigned long),
	.key_offset = offsetof(struct vso_sock, key),
	.head_offset = offsetof(struct vso_sock, node),
	.automatic_shrinking = true,
};

static struct rhashtable vso_table;

LIST_HEAD(vso_all);			/* attached sockets */
DEFINE_SPINLOCK(vso_all_lock);		/* taken with bh off, alone or inside nothing */

int vso_flow_init(void)
{
	return rhashtable_init(&vso_table, &vso_table_params);
}

void vso_flow_exit(void)
{
	rhashtable_destroy(&vso_table);
}

/* did the entry win sock->ops? false also once it was detached */
static bool vso_attached(struct vso_sock *vs)
{
	bool attached = smp_load_acquire(&vs->attached);

	if (!attached) {
		spin_lock_bh(&vs->lock);
		attached = vs->attached;
		spin_unlock_bh(&vs->lock);
	}
	return attached;
}

/** vso_sock_get() - the state of an offloaded socket, with a reference; NULL when it is not offloaded (any more) */
struct vso_sock *vso_sock_get(const struct socket *sock)
{
	unsigned long key = (unsigned long)sock->sk;
	struct vso_sock *vs;

	rcu_read_lock();
	vs = rhashtable_lookup(&vso_table, &key, vso_table_params);
	if (vs && (!vso_attached(vs) || !refcount_inc_not_zero(&vs->ref)))
		vs = NULL;
	rcu_read_unlock();
	return vs;
}

void vso_seg_free(struct vso_sock *vs, struct vso_seg *seg)
{
	if (seg->page)
		vso_pool_put(&vs->pair->pool[VSO_POOL_IN], seg->page, VSO_PAYER_NONE);
	kfree(seg);
}

static void vso_sock_free(struct vso_sock *vs)
{
	struct vso_seg *seg, *next;
	struct vso_tx *tx, *tnext;

	list_for_each_entry_safe(seg, next, &vs->rxq, list)
		vso_seg_free(vs, seg);
	list_for_each_entry_safe(tx, tnext, &vs->deferred, list)
		kfree(tx);	/* unsent ones hold no reference */
	__skb_queue_purge(&vs->dgrams);
	kfree(vs->dests);
	atomic_long_sub(vs->grown, &vs->dev->grown);
	vso_dev_put(vs->dev);
	kfree_rcu(vs, rcu);
}

void vso_sock_put(struct vso_sock *vs)
{
	if (refcount_dec_and_test(&vs->ref))
		vso_sock_free(vs);
}

/**
 * vso_sock_new() - a socket state without socket and flow
 * @dev: its reference goes to the new state, also on failure
 *
 * Return: with one reference, NULL without memory.
 */
struct vso_sock *vso_sock_new(const struct vso_row *row, struct vso_dev *dev, gfp_t gfp)
{
	struct vso_sock *vs = kzalloc(sizeof(*vs), gfp);

	if (!vs) {
		vso_dev_put(dev);
		return NULL;
	}
	refcount_set(&vs->ref, 1);
	vs->row = row;
	vs->dev = dev;
	vs->pair = &dev->pair[raw_smp_processor_id() % dev->pairs];
	vs->state = VSO_ST_CLOSED;
	vs->buf_alloc = vs->promised = vso_window;
	vs->window_since = jiffies;
	spin_lock_init(&vs->lock);
	INIT_LIST_HEAD(&vs->all);
	INIT_LIST_HEAD(&vs->rxq);
	skb_queue_head_init(&vs->dgrams);
	INIT_LIST_HEAD(&vs->server);
	INIT_LIST_HEAD(&vs->acceptq);
	INIT_LIST_HEAD(&vs->accept_node);
	INIT_LIST_HEAD(&vs->deferred);
	mutex_init(&vs->recv_mutex);
	mutex_init(&vs->req_mutex);
	init_completion(&vs->done);
	INIT_WORK(&vs->work, vso_native_work);
	INIT_LIST_HEAD(&vs->close.list);
	vs->close.embedded = true;
	vs->close.hdr.type = cpu_to_le16(VSO_CLOSE);
	vs->local.sa.sa_family = row->family;
	return vs;
}

/* enter the list that /proc/net/hwsock shows, or leave it */
static void vso_list(struct vso_sock *vs, bool on)
{
	spin_lock_bh(&vso_all_lock);
	if (on)
		list_add_tail(&vs->all, &vso_all);
	else
		list_del_init(&vs->all);
	spin_unlock_bh(&vso_all_lock);
}

/**
 * vso_attach() - give a socket our operations
 * @from: the table it must have now
 *
 * Takes one reference of @vs for the socket. Return: 0; -EAGAIN when the socket has another table (somebody decided first); -EEXIST while
 * another thread is between its two steps of attaching or detaching this socket; -ENOMEM.
 */
int vso_attach(struct vso_sock *vs, struct socket *sock, const struct proto_ops *from)
{
	struct sock *sk = sock->sk;
	int err;

	vs->key = (unsigned long)sk;
	vs->sk = sk;
	vs->sock = sock;
	vs->net = sock_net(sk);
	vs->uid = sk->sk_uid;
	vs->ino = SOCK_INODE(sock)->i_ino;
	vs->buf_alloc = vs->promised = vso_opts_window(sk);
	refcount_inc(&vs->ref);
	vso_list(vs, true);	/* before anybody can detach it */
	spin_lock_bh(&vs->lock);
	err = rhashtable_insert_fast(&vso_table, &vs->node, vso_table_params);
	vso_race_atomic();
	if (!err && cmpxchg(&sock->ops, from, &vs->row->offloaded) != from) {
		rhashtable_remove_fast(&vso_table, &vs->node, vso_table_params);
		err = -EAGAIN;
	}
	if (err) {
		refcount_dec(&vs->ref);
		vs->sk = NULL;
		vs->sock = NULL;
		spin_unlock_bh(&vs->lock);
		vso_list(vs, false);
		return err == -EEXIST || err == -EAGAIN ? err : -ENOMEM;
	}
	if (vs->row->family != AF_IPX) {
		vso_custom_sockopt(sock, true);
		vs->filter_locked = vso_filter_lock(sk);
	}
	smp_store_release(&vs->attached, true);
	spin_unlock_bh(&vs->lock);
	return 0;
}

/**
 * vso_detach() - give the socket back
 * @to: the table it gets: undecided or native
 *
 * Process context. The flow, if open, is the caller's to close. Wakes all who wait, so that they read sock->ops again. Harmless when
 * another thread was first.
 */
void vso_detach(struct vso_sock *vs, const struct proto_ops *to)
{
	struct socket *sock;

	spin_lock_bh(&vs->lock);
	sock = vs->sock;
	if (!sock) {
		spin_unlock_bh(&vs->lock);
		return;
	}
	vs->state = VSO_ST_GONE;
	vs->attached = false;
	if (vs->row->protocol != IPPROTO_MPTCP)
		vso_custom_sockopt(sock, false);
	if (vs->filter_locked)
		vso_filter_unlock(vs->sk);
	vs->filter_locked = false;
	WRITE_ONCE(sock->ops, to);
	vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLOUT | EPOLLWRNORM | EPOLLERR | EPOLLHUP);
	vs->sk = NULL;
	vs->sock = NULL;
	spin_unlock_bh(&vs->lock);

	vso_race();
	rhashtable_remove_fast(&vso_table, &vs->node, vso_table_params);
	vso_list(vs, false);
	vso_share_remove(vs);
	vso_sock_put(vs);
}

/**
 * vso_flow_wake() - tell who waits on the socket. Called under vs->lock.
 *
 * The same wait queue as natively: poll and epoll entries that were added before the takeover keep working.
 */
void vso_flow_wake(struct vso_sock *vs, __poll_t events)
{
	struct sock *sk = vs->sk;
	struct socket_wq *wq;

	if (!sk)
		return;
	rcu_read_lock();
	wq = rcu_dereference(sk->sk_wq);
	if (skwq_has_sleeper(wq))
		wake_up_interruptible_poll(&wq->wait, events);
	if (events & EPOLLIN)
		sk_wake_async(sk, SOCK_WAKE_WAITD, POLL_IN);
	if (events & EPOLLOUT)
		sk_wake_async(sk, SOCK_WAKE_SPACE, POLL_OUT);
	if (events & EPOLLHUP)
		sk_wake_async(sk, SOCK_WAKE_WAITD, POLL_HUP);
	if (events & EPOLLERR)
		sk_wake_async(sk, SOCK_WAKE_IO, POLL_ERR);
	rcu_read_unlock();
}

/** vso_want_write() - somebody found no room: poll, SIGIO and sleepers hear of it when there is. Called under vs->lock. */
void vso_want_write(struct vso_sock *vs)
{
	vs->want_write = true;
	if (vs->sk)
		sk_set_bit(SOCKWQ_ASYNC_NOSPACE, vs->sk);
}

/** vso_write_space() - room came: wake writers who found none. Called without vs->lock. */
void vso_write_space(struct vso_sock *vs)
{
	spin_lock_bh(&vs->lock);
	if (vs->want_write && vso_stream_writable(vs)) {
		vs->want_write = false;
		vso_flow_wake(vs, EPOLLOUT | EPOLLWRNORM | EPOLLWRBAND);
	}
	spin_unlock_bh(&vs->lock);
}

/**
 * vso_flow_open() - take an id for an opening request that follows; then call vso_flow_opened()
 *
 * Return: 0, -ENOMEM, -ENFILE when 2^31 flows are open.
 */
int vso_flow_open(struct vso_sock *vs)
{
	struct vso_dev *dev = vs->dev;
	u32 id;
	int err;

	refcount_inc(&vs->ref);
	err = xa_alloc_cyclic_bh(&dev->flows, &id, vs, XA_LIMIT(1, VSO_FLOW_DEVICE - 1), &dev->next_flow, GFP_KERNEL);
	if (err < 0) {
		refcount_dec(&vs->ref);
		return err == -EBUSY ? -ENFILE : err;
	}
	atomic_inc(&dev->nr_flows);
	spin_lock_bh(&vs->lock);
	vs->flow = id;
	vs->flow_open = true;
	vs->opening = true;
	spin_unlock_bh(&vs->lock);
	return 0;
}

/**
 * vso_flow_opened() - the opening request is in the ring, or will never be
 *
 * Sends the CLOSE that somebody wanted meanwhile: shutdown() in another thread, before the flow was open or since.
 */
void vso_flow_opened(struct vso_sock *vs)
{
	bool unwanted;

	spin_lock_bh(&vs->lock);
	vs->opening = false;
	unwanted = vs->close_wanted || vs->state == VSO_ST_CLOSED || vs->state == VSO_ST_GONE;
	spin_unlock_bh(&vs->lock);
	if (unwanted)
		vso_flow_close(vs, VSO_CLOSE_ABORT);
}

/** vso_flow_forget() - the flow ended on both sides: its id is free. Once only; later calls find nothing. */
void vso_flow_forget(struct vso_sock *vs)
{
	struct xarray *xa = vs->flow & VSO_FLOW_DEVICE ? &vs->dev->accepted : &vs->dev->flows;
	bool open;

	spin_lock_bh(&vs->lock);
	open = vs->flow_open;
	vs->flow_open = false;
	WRITE_ONCE(vs->dead, true);
	spin_unlock_bh(&vs->lock);
	if (!open)
		return;
	xa_erase_bh(xa, vs->flow & ~VSO_FLOW_DEVICE);
	atomic_dec(&vs->dev->nr_flows);
	vso_sock_put(vs);
}

/**
 * vso_flow_close() - we are done with the flow. Any context, never fails, sent once.
 * @arg: VSO_CLOSE_*
 */
void vso_flow_close(struct vso_sock *vs, u32 arg)
{
	bool send;

	spin_lock_bh(&vs->lock);
	vs->close_wanted |= vs->opening;
	send = vs->flow_open && !vs->closing && !vs->opening;
	if (send) {
		vs->closing = true;
		complete_all(&vs->done);	/* answers that come now are ignored: who waits for one shall not */
	}
	spin_unlock_bh(&vs->lock);
	if (!send)
		return;
	vs->close.hdr.flow = cpu_to_le32(vs->flow);
	vs->close.hdr.arg = cpu_to_le32(arg);
	vs->close.truesize = sizeof(vs->close);
	refcount_inc(&vs->ref);
	vs->close.vs = vs;
	vso_tx_submit(vs->pair, &vs->close);
}

/** vso_flow_send() - send a message on the flow that nobody waits for. Return: 0 or -errno. */
int vso_flow_send(struct vso_sock *vs, u16 type, u32 arg, const void *payload, u32 len, gfp_t gfp)
{
	struct vso_tx *tx = vso_tx_new(vs, type, arg, payload, len, gfp);

	return tx ? vso_tx_submit(vs->pair, tx) : -ENOMEM;
}

/**
 * vso_flow_request() - send a request whose answer will be awaited
 *
 * The cookie tells its answer from the one to an earlier request that was given up.
 */
int vso_flow_request(struct vso_sock *vs, u16 type, u32 arg, const void *payload, u32 len)
{
	struct vso_tx *tx = vso_tx_new(vs, type, arg, payload, len, GFP_KERNEL);

	if (!tx)
		return -ENOMEM;
	spin_lock_bh(&vs->lock);
	if (vs->closing) {
		spin_unlock_bh(&vs->lock);
		vso_tx_free(tx);
		return -ENODEV;		/* its answer would be ignored */
	}
	vs->answered = false;
	reinit_completion(&vs->done);
	tx->hdr.cookie = cpu_to_le32(++vs->cookie);
	spin_unlock_bh(&vs->lock);
	return vso_tx_submit(vs->pair, tx);
}

static bool vso_flow_done(struct vso_sock *vs, u32 arg)
{
	return completion_done(&vs->done);
}

/**
 * vso_flow_wait() - wait for the answer; only a fatal signal or the end of the device ends it early
 *
 * Return: 0: vs->verdict and vs->error hold; -ENODEV: the device is gone; -EINTR.
 */
int vso_flow_wait(struct vso_sock *vs)
{
	int err = vso_poll_request(vs, vso_flow_done, 0) ? 0 : wait_for_completion_killable(&vs->done);

	if (err)
		return -EINTR;
	return READ_ONCE(vs->answered) ? 0 : -ENODEV;
}

/* one flow of a device that is gone */
static void vso_flow_kill(struct vso_sock *vs, int error)
{
	spin_lock_bh(&vs->lock);
	switch (vs->state) {
	case VSO_ST_EMBRYO:
		vs->pend_err = error;
		break;
	case VSO_ST_CONNECTING:
	case VSO_ST_CONNECTED:
		vs->state = VSO_ST_CLOSED;
		if (vs->row->family == AF_IPX)
			error = ENOLINK;	/* its interface is gone */
		else if (vs->addr_only && vs->was_bound)
			break;			/* a datagram server goes on natively, too */
		if (vs->sk)
			WRITE_ONCE(vs->sk->sk_err, error);
		break;
	default:
		break;	/* a bound or listening socket goes on natively, a waiting bind() hears it from vso_flow_wait() */
	}
	complete_all(&vs->done);
	vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDHUP | EPOLLOUT | EPOLLWRNORM | EPOLLERR | EPOLLHUP);
	spin_unlock_bh(&vs->lock);
	vso_flow_forget(vs);
}

/** vso_flows_kill() - the device is gone: every flow of it ends here */
void vso_flows_kill(struct vso_dev *dev, int error)
{
	struct xarray *tables[] = { &dev->flows, &dev->accepted };
	size_t i;

	for (i = 0; i < ARRAY_SIZE(tables); i++) {
		for (;;) {
			unsigned long id = 0;
			struct vso_sock *vs;

			rcu_read_lock();
			vs = xa_find(tables[i], &id, ULONG_MAX, XA_PRESENT);
			if (vs && !refcount_inc_not_zero(&vs->ref))
				vs = NULL;
			rcu_read_unlock();
			if (!vs)
				break;
			vso_flow_kill(vs, error);
			vso_sock_put(vs);
		}
	}
}
