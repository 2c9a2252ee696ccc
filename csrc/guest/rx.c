// SPDX-License-Identifier: GPL-2.0-only
/*
 * rx.c - what the device says.
 *
 * Runs in the pair's tasklet, so the messages of a flow are handled one after the other, in order. A message is checked against the table
 * below (length, needs a flow) and then handled under RCU, which keeps the flow's memory; a flow that is found has the flow table's
 * reference until vso_flow_forget(), and that runs here or when the device is gone.
 *
 * Whose fault.  A malformed message or one of an unknown type is the device's fault: all flows are reset. One for a flow that does not
 * exist crossed our CLOSE and is ignored. More bytes than the window reset that flow with EPROTO. Not enough memory for bytes that
 * came resets the flow with ENOBUFS: a stream never silently loses a part.
 */
#include <linux/slab.h>

#include "vso.h"

/**
 * vso_msg_copy() - copy @len bytes of the payload from @off on; they must be there
 */
void vso_msg_copy(const struct vso_msg *m, u32 off, void *to, u32 len)
{
	unsigned int i;

	off += sizeof(struct vso_hdr);
	for (i = 0; len && i < VSO_RX_PAGES; i++) {
		u32 size = page_size(m->buf->page[i]), n;

		if (off < size) {
			n = min(len, size - off);
			memcpy(to, page_address(m->buf->page[i]) + off, n);
			to += n;
			len -= n;
			off += n;
		}
		off -= size;
	}
}

/* the flow ends here with an error for the application; the device hears CLOSE */
static void vso_flow_fail(struct vso_sock *vs, int error)
{
	spin_lock_bh(&vs->lock);
	if (vs->state == VSO_ST_EMBRYO) {
		vs->pend_err = error;
	} else if (vs->state == VSO_ST_CONNECTED) {
		vs->state = VSO_ST_CLOSED;
		if (vs->sk)
			WRITE_ONCE(vs->sk->sk_err, error);
		vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDHUP | EPOLLOUT | EPOLLWRNORM | EPOLLERR | EPOLLHUP);
	}
	spin_unlock_bh(&vs->lock);
	vso_flow_close(vs, VSO_CLOSE_ABORT);
}

/*
 * Append the part of a message that lies in one page: copied if small, else the queue takes the page. Called under vs->lock.
 * Return: false without memory
 */
static bool vso_rx_piece(struct vso_sock *vs, struct page **page, u32 off, u32 len)
{
	struct vso_seg *seg;
	u32 cap;

	if (len > VSO_COPYBREAK) {
		seg = kmalloc(sizeof(*seg), GFP_ATOMIC);
		if (!seg)
			return false;
		seg->page = *page;
		seg->off = off;
		seg->truesize = sizeof(*seg) + page_size(*page);
		*page = NULL;
	} else {
		/* small pieces share an allocation, so that a stream of single bytes costs little more than its bytes */
		seg = list_empty(&vs->rxq) ? NULL : list_last_entry(&vs->rxq, struct vso_seg, list);
		if (seg && !seg->page && seg->cap - seg->off - seg->len >= len) {
			memcpy(seg->data + seg->off + seg->len, page_address(*page) + off, len);
			seg->len += len;
			goto counted;
		}
		cap = roundup_pow_of_two(sizeof(*seg) + max_t(u32, len, 256)) - sizeof(*seg);
		seg = kmalloc(sizeof(*seg) + cap, GFP_ATOMIC);
		if (!seg)
			return false;
		seg->page = NULL;
		seg->off = 0;
		seg->cap = cap;
		seg->truesize = sizeof(*seg) + cap;
		memcpy(seg->data, page_address(*page) + off, len);
	}
	seg->len = len;
	vs->rx_mem += seg->truesize;
	list_add_tail(&seg->list, &vs->rxq);
counted:
	vs->rx_bytes += len;
	return true;
}

/** vso_rx_queue() - append the payload to what readers find. Called under vs->lock. Return: false without memory */
bool vso_rx_queue(struct vso_sock *vs, struct vso_msg *m)
{
	u32 off = sizeof(struct vso_hdr), left = m->len, size, n;
	unsigned int i;

	for (i = 0; left && i < VSO_RX_PAGES; i++) {
		size = page_size(m->buf->page[i]);
		n = min(left, size - off);
		if (!vso_rx_piece(vs, &m->buf->page[i], off, n))
			return false;
		left -= n;
		off = 0;
	}
	return true;
}

/** vso_rx_room() - bytes that the device may send on this flow; negative: it is not of interest what it sends. Called under vs->lock */
long vso_rx_room(const struct vso_sock *vs)
{
	bool early = vs->state == VSO_ST_EMBRYO && vs->dev->features & VSO_F_EARLY_DATA;

	if ((vs->state != VSO_ST_CONNECTED && !early) || vs->closing)
		return -1;		/* it crossed our CLOSE, or comes after a RESET */
	return vs->peer_fin ? 0 : (early ? VSO_EARLY_MAX : vs->promised) - vs->rx_bytes;
}

/* bytes were appended. Called under vs->lock */
static void vso_rx_came(struct vso_sock *vs)
{
	vs->filled |= vso_window_filled(vs);
	if (vs->rx_bytes >= min_t(u32, vs->sk ? READ_ONCE(vs->sk->sk_rcvlowat) : 1, vs->buf_alloc / 2))
		vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDBAND);
}

static void vso_msg_data(struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;
	int error = 0;
	long room;

	if (!m->len)
		return;
	spin_lock(&vs->lock);
	room = vso_rx_room(vs);
	if (room < 0)
		goto unlock;
	if (m->len > room)
		error = EPROTO;
	else if (!vso_rx_queue(vs, m))
		error = ENOBUFS;
	else
		vso_rx_came(vs);
unlock:
	spin_unlock(&vs->lock);
	if (error)
		vso_flow_fail(vs, error);
}

static void vso_msg_urgent(struct vso_msg *m)
{
	int error = vso_rx_urgent(m);

	if (error)
		vso_flow_fail(m->vs, error);
}

static void vso_msg_credit(struct vso_msg *m)
{
	/* vso_rx() took the numbers already */
}

static void vso_msg_shutdown(struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;

	spin_lock(&vs->lock);
	if (m->arg & VSO_SHUT_SEND && !vs->peer_fin) {
		vs->peer_fin = true;
		vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDHUP | (vs->snd_shut ? EPOLLHUP : 0));
	}
	spin_unlock(&vs->lock);
}

static void vso_msg_dgram(struct vso_msg *m)
{
	vso_rx_dgram(m);
}

static void vso_msg_error(struct vso_msg *m)
{
	vso_rx_error(m);
}

static void vso_msg_ping(struct vso_msg *m)
{
	vso_pong(m->pair, VSO_PONG, m->cookie);
}

static void vso_msg_pong(struct vso_msg *m)
{
	/* dev->alive says it all */
}

static void vso_msg_hello_reply(struct vso_msg *m)
{
	vso_hello_reply(m->pair->dev, m->arg, m->data, m->len);
}

/*
 * The URIs behind a reply. What cannot be said in this socket's family (a Unix socket serves it, say) reads as the unspecified address for
 * the local side and as what was asked for on the peer side.
 */
static void vso_msg_names(struct vso_sock *vs, const u8 *data, u32 len, u32 local_len, u32 peer_len)
{
	union vso_addr addr;

	if (local_len + peer_len > len)
		return;
	if (!vso_uri_parse(data, local_len, vs->row->family, &addr))
		vs->local = addr;
	if (peer_len && !vso_uri_parse(data + local_len, peer_len, vs->row->family, &addr))
		vs->peer = addr;
}

static bool vso_reply_ok(const struct vso_reply *r)
{
	return le32_to_cpu(r->verdict) == VSO_OFFLOAD && !r->error;
}

/* what connect(), bind() or listen() of a refused socket shall say */
static u32 vso_reply_errno(const struct vso_reply *r)
{
	u32 error = le32_to_cpu(r->error);

	return error && error < MAX_ERRNO ? error : EACCES;
}

/* the verdict on a destination: a process waits for it and does the rest */
static void vso_msg_dest_reply(struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;
	struct vso_reply r;

	memcpy(&r, m->data, sizeof(r));
	spin_lock(&vs->lock);
	if (!vs->closing && m->cookie == vs->cookie && !vs->answered) {
		vs->verdict = le32_to_cpu(r.verdict);
		vs->error = vso_reply_ok(&r) || vs->verdict == VSO_NATIVE ? 0 : vso_reply_errno(&r);
		vs->answered = true;
		complete_all(&vs->done);
	}
	spin_unlock(&vs->lock);
}

static void vso_msg_connect_reply(struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;
	bool ends = false, fallback = false;
	struct vso_tx *tx, *next;
	struct vso_reply r;
	LIST_HEAD(deferred);

	memcpy(&r, m->data, sizeof(r));
	spin_lock(&vs->lock);
	if (vs->closing || vs->state != VSO_ST_CONNECTING || m->cookie != vs->cookie) {
		/* crossed our CLOSE; a refusal ended the flow, and the device will ignore the CLOSE */
		ends = vs->closing && !vso_reply_ok(&r) && !vs->was_bound;
		goto unlock;
	}
	vs->verdict = le32_to_cpu(r.verdict);
	vs->error = vso_reply_ok(&r) ? 0 : vso_reply_errno(&r);
	vs->answered = true;
	if (vso_reply_ok(&r)) {
		vs->peer = vs->target;
		vso_msg_names(vs, m->data + sizeof(r), m->len - sizeof(r), le16_to_cpu(r.local_len), le16_to_cpu(r.peer_len));
		list_splice_init(&vs->deferred, &deferred);
		list_for_each_entry(tx, &deferred, list) {
			refcount_inc(&vs->ref);
			tx->vs = vs;
		}
		vs->state = VSO_ST_CONNECTED;
		vso_flow_wake(vs, EPOLLOUT | EPOLLWRNORM);
		if (vs->sk)
			sk_wake_async(vs->sk, SOCK_WAKE_IO, POLL_OUT);	/* nobody found no room: it is the connection that is told */
	} else if (vs->verdict == VSO_NATIVE) {
		ends = !vs->was_bound;
		vs->error = 0;
		fallback = vs->row->type == SOCK_STREAM;	/* datagram sockets do it themselves: they always wait */
		vs->state = VSO_ST_NATIVE;
	} else {
		ends = !vs->was_bound;
		vs->state = vs->was_bound ? VSO_ST_BOUND : VSO_ST_CLOSED;
		if (vs->sk && vs->row->type == SOCK_STREAM)
			WRITE_ONCE(vs->sk->sk_err, vs->error);
		vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLOUT | EPOLLWRNORM | EPOLLERR | EPOLLHUP);
	}
	complete_all(&vs->done);
unlock:
	spin_unlock(&vs->lock);
	list_for_each_entry_safe(tx, next, &deferred, list) {
		list_del_init(&tx->list);
		vso_tx_submit(vs->pair, tx);
	}
	if (fallback) {
		vso_race_atomic();
		refcount_inc(&vs->ref);		/* the work's */
		if (!queue_work(system_unbound_wq, &vs->work))
			vso_sock_put(vs);	/* it is being cancelled: the socket is closed or disconnected, and needs no fallback */
	}
	if (ends)
		vso_flow_forget(vs);
}

/* BIND_REPLY and LISTEN_REPLY: a process waits for it and does the rest */
static void vso_msg_bind_reply(struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;
	bool bind = m->type == VSO_BIND_REPLY, ends = false;
	struct vso_reply r;

	memcpy(&r, m->data, sizeof(r));
	spin_lock(&vs->lock);
	if (vs->closing || m->cookie != vs->cookie) {
		ends = vs->closing && bind && !vso_reply_ok(&r);
		goto unlock;
	}
	vs->verdict = le32_to_cpu(r.verdict);
	vs->error = vso_reply_ok(&r) || vs->verdict == VSO_NATIVE ? 0 : vso_reply_errno(&r);
	vs->answered = true;
	if (vso_reply_ok(&r))
		vso_msg_names(vs, m->data + sizeof(r), m->len - sizeof(r), le16_to_cpu(r.local_len), 0);
	else
		ends = bind;
	complete_all(&vs->done);
unlock:
	spin_unlock(&vs->lock);
	if (ends)
		vso_flow_forget(vs);
}

static void vso_msg_accept(struct vso_msg *m)
{
	struct vso_sock *vs = m->vs, *child;
	struct vso_dev *dev = m->pair->dev;
	struct vso_accept a;
	u32 id;

	memcpy(&a, m->data, sizeof(a));
	id = le32_to_cpu(a.new_flow);
	if (!(id & VSO_FLOW_DEVICE)) {
		vso_dev_broken(dev, "ACCEPT names a flow id of the driver's range");
		return;
	}
	refcount_inc(&dev->ref);
	child = vso_sock_new(vs->row, dev, GFP_ATOMIC);
	if (!child)
		goto nomem;
	child->pair = m->pair;
	child->flow = id;
	child->state = VSO_ST_EMBRYO;
	child->flow_open = true;
	child->peer_alloc = le32_to_cpu(a.buf_alloc);
	child->peer.sa.sa_family = vs->row->family;
	child->local = vs->local;
	vso_msg_names(child, m->data + sizeof(a), m->len - sizeof(a), le16_to_cpu(a.local_len), le16_to_cpu(a.peer_len));
	if (xa_insert_bh(&dev->accepted, id & ~VSO_FLOW_DEVICE, child, GFP_ATOMIC)) {
		vso_sock_put(child);
		goto nomem;
	}
	atomic_inc(&dev->nr_flows);		/* the first reference is the flow table's */

	spin_lock(&vs->lock);
	if (vs->closing || vs->rcv_shut || !vs->sk || vs->acceptq_len >= vs->buf_alloc) {
		spin_unlock(&vs->lock);
		vso_flow_close(child, VSO_CLOSE_ABORT);
		return;
	}
	refcount_inc(&child->ref);
	list_add_tail(&child->accept_node, &vs->acceptq);
	vs->acceptq_len++;
	vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM);
	spin_unlock(&vs->lock);
	return;
nomem:
	/* without an id there is no CLOSE either; the device's flow ends with the listener's epoch */
	pr_warn_ratelimited("virtio_socket: no memory for a connection to a listener\n");
}

static void vso_msg_closed(struct vso_msg *m)
{
	if (!READ_ONCE(m->vs->closing)) {
		vso_dev_broken(m->pair->dev, "CLOSED without CLOSE");
		return;
	}
	vso_flow_forget(m->vs);
}

static void vso_msg_reset(struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;
	int error = m->arg && m->arg < MAX_ERRNO ? m->arg : ECONNRESET;

	spin_lock(&vs->lock);
	switch (vs->state) {
	case VSO_ST_EMBRYO:
		vs->pend_err = error;
		break;
	case VSO_ST_CONNECTING:
	case VSO_ST_CONNECTED:
		/* as tcp_reset(): after a FIN nobody waits for more, and a writer sees EPIPE */
		if (vs->peer_fin && error == ECONNRESET)
			error = EPIPE;
		vs->state = VSO_ST_CLOSED;
		if (vs->sk)
			WRITE_ONCE(vs->sk->sk_err, error);
		break;
	default:
		break;		/* a listener stays reachable inside the guest */
	}
	vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDHUP | EPOLLOUT | EPOLLWRNORM | EPOLLERR | EPOLLHUP);
	spin_unlock(&vs->lock);
	vso_flow_close(vs, VSO_CLOSE_ABORT);
}

static void vso_msg_hints(struct vso_msg *m)
{
	struct vso_dev *dev = m->pair->dev;

	if (m->pair == &dev->pair[0] && dev->features & VSO_F_HINTS)	/* one tasklet writes the table */
		vso_hints_set(dev, m->data, m->len);
}

static void vso_msg_sockopt_reply(struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;
	struct vso_sockopt o;

	memcpy(&o, m->data, sizeof(o));
	spin_lock(&vs->lock);
	if (m->cookie && m->cookie == vs->cookie && !vs->answered) {
		vs->error = m->arg < MAX_ERRNO ? m->arg : EIO;
		vs->answered = true;
		if (vs->opt_buf) {
			vs->opt_len = min3((u32)le32_to_cpu(o.len), m->len - (u32)sizeof(o), vs->opt_len);
			memcpy(vs->opt_buf, m->data + sizeof(o), vs->opt_len);
		}
		complete_all(&vs->done);
	}
	spin_unlock(&vs->lock);
}

/* control messages lie in the first page, which may be one of 4 KiB */
#define VSO_CTL_MAX	(VSO_RX_MIN - sizeof(struct vso_hdr))

/* the messages of the device: least and most payload, whether they name a flow, what they do */
static const struct vso_rule {
	u32 min, max;
	bool flow;
	void (*handle)(struct vso_msg *m);
} vso_rules[] = {
	[VSO_DATA]		= { 0, VSO_PAYLOAD_MAX, true, vso_msg_data },
	[VSO_URGENT]		= { 0, 1, true, vso_msg_urgent },
	[VSO_CREDIT]		= { 0, VSO_CTL_MAX, true, vso_msg_credit },
	[VSO_SHUTDOWN]		= { 0, VSO_CTL_MAX, true, vso_msg_shutdown },
	[VSO_DGRAM]		= { sizeof(struct vso_dgram), VSO_PAYLOAD_MAX, true, vso_msg_dgram },
	[VSO_PING]		= { 0, VSO_CTL_MAX, false, vso_msg_ping },
	[VSO_PONG]		= { 0, VSO_CTL_MAX, false, vso_msg_pong },
	[VSO_HELLO_REPLY]	= { sizeof(struct vso_hello), VSO_CTL_MAX, false, vso_msg_hello_reply },
	[VSO_CONNECT_REPLY]	= { sizeof(struct vso_reply), VSO_CTL_MAX, true, vso_msg_connect_reply },
	[VSO_BIND_REPLY]	= { sizeof(struct vso_reply), VSO_CTL_MAX, true, vso_msg_bind_reply },
	[VSO_LISTEN_REPLY]	= { sizeof(struct vso_reply), VSO_CTL_MAX, true, vso_msg_bind_reply },
	[VSO_ACCEPT]		= { sizeof(struct vso_accept), VSO_CTL_MAX, true, vso_msg_accept },
	[VSO_CLOSED]		= { 0, VSO_CTL_MAX, true, vso_msg_closed },
	[VSO_RESET]		= { 0, VSO_CTL_MAX, true, vso_msg_reset },
	[VSO_DEST_REPLY]	= { sizeof(struct vso_reply), VSO_CTL_MAX, true, vso_msg_dest_reply },
	[VSO_ERROR]		= { sizeof(struct vso_error), VSO_CTL_MAX, true, vso_msg_error },
	[VSO_HINTS]		= { 0, VSO_HINTS_MAX * sizeof(struct vso_hint), false, vso_msg_hints },
	[VSO_SOCKOPT_REPLY]	= { sizeof(struct vso_sockopt), VSO_CTL_MAX, true, vso_msg_sockopt_reply },
};

/* the device's window; on a listener the same fields mean nothing from its side */
static void vso_rx_credit(struct vso_sock *vs, const struct vso_msg *m)
{
	if (vs->row->type != SOCK_STREAM || READ_ONCE(vs->state) == VSO_ST_LISTENING)
		return;
	spin_lock(&vs->lock);
	vs->peer_alloc = m->buf_alloc;
	vs->peer_fwd = m->fwd_cnt;
	if (vs->want_write && vso_stream_writable(vs)) {
		vs->want_write = false;
		vso_flow_wake(vs, EPOLLOUT | EPOLLWRNORM | EPOLLWRBAND);
	}
	spin_unlock(&vs->lock);
}

/**
 * vso_rx() - handle one message
 * @buf: the chain that holds it; comes back without the pages that a socket queue took
 * @used: bytes that the device says it wrote
 */
void vso_rx(struct vso_pair *pair, struct vso_rxbuf *buf, u32 used)
{
	struct vso_msg m = { .pair = pair, .buf = buf };
	struct vso_dev *dev = pair->dev;
	const struct vso_rule *rule;
	struct vso_hdr hdr;
	u32 room = 0;
	int i;

	WRITE_ONCE(dev->alive, jiffies);
	WRITE_ONCE(dev->unanswered, 0);
	for (i = 0; i < VSO_RX_PAGES; i++)
		room += page_size(buf->page[i]);
	used = min(used, room);
	if (used < sizeof(hdr)) {
		vso_dev_broken(dev, "a message shorter than its header");
		return;
	}
	memcpy(&hdr, page_address(buf->page[0]), sizeof(hdr));
	m.data = (const u8 *)page_address(buf->page[0]) + sizeof(hdr);
	m.type = le16_to_cpu(hdr.type);
	m.flow = le32_to_cpu(hdr.flow);
	m.len = le32_to_cpu(hdr.len);
	m.arg = le32_to_cpu(hdr.arg);
	m.buf_alloc = le32_to_cpu(hdr.buf_alloc);
	m.fwd_cnt = le32_to_cpu(hdr.fwd_cnt);
	m.cookie = le32_to_cpu(hdr.cookie);
	rule = m.type < ARRAY_SIZE(vso_rules) ? &vso_rules[m.type] : NULL;
	if (!rule || !rule->handle) {
		vso_dev_broken(dev, "a message of a type that does not exist");
		return;
	}
	if (m.len > used - sizeof(hdr) || m.len < rule->min || m.len > rule->max) {
		vso_dev_broken(dev, "a message with a wrong length");
		return;
	}
	if (!rule->flow) {
		rule->handle(&m);
		return;
	}
	rcu_read_lock();
	m.vs = xa_load(m.flow & VSO_FLOW_DEVICE ? &dev->accepted : &dev->flows, m.flow & ~VSO_FLOW_DEVICE);
	if (m.vs) {
		vso_rx_credit(m.vs, &m);
		rule->handle(&m);
	}
	rcu_read_unlock();
}
