// SPDX-License-Identifier: GPL-2.0-only
/*
 * sock_stream.c - stream sockets: send, poll, shutdown. Receiving is in stream_recv.c.
 *
 * Sending.  A writer reserves credit under the lock, copies its bytes into a message of its own without any lock, and submits it; the
 * order is that of submitting. Nobody who sends waits for somebody who receives. No room (credit, or too much memory of this flow behind a
 * full ring): sleep, or EAGAIN, and want_write asks for the wake-up. Writers wait for a quarter of the window, so that a window which opens
 * byte by byte does not make messages of single bytes; a device that announces at three quarters or earlier never stalls. Small writes
 * may share a message: gather.c.
 */
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <net/sock.h>
#include <net/tcp_states.h>

#include "vso.h"

/* bytes that may be sent now. Called under vs->lock */
static u32 vso_room(const struct vso_sock *vs)
{
	u32 used = vs->tx_cnt - vs->peer_fwd;

	return used < vs->peer_alloc && atomic_read(&vs->queued) < VSO_TXQ_LIMIT ? vs->peer_alloc - used : 0;
}

/** vso_stream_writable() - is there room worth a wake-up? Called under vs->lock. */
bool vso_stream_writable(struct vso_sock *vs)
{
	if (vs->row->type == SOCK_DGRAM)
		return atomic_read(&vs->queued) < VSO_TXQ_LIMIT;
	return vso_room(vs) && vso_room(vs) >= vs->peer_alloc / 4;
}

/* ------------------------------------------------------------------------------------------------------------- sending */

static bool vso_send_ready(struct vso_sock *vs, u32 arg)
{
	bool ready;

	spin_lock_bh(&vs->lock);
	if (vs->state == VSO_ST_CONNECTED) {
		ready = vs->snd_shut || vso_stream_writable(vs);
		if (!ready)
			vso_want_write(vs);
	} else {
		ready = !vso_asking(vs->state);
	}
	spin_unlock_bh(&vs->lock);
	return ready;
}

/*
 * Reserve credit for up to @want bytes; who may sleep takes no crumbs. Return: the bytes; 0: wait; -EPIPE: this direction is over; -ESTALE: the socket changed hands.
 */
static int vso_reserve(struct vso_sock *vs, u32 want, bool nonblock)
{
	int got = 0;

	spin_lock_bh(&vs->lock);
	switch (vs->state) {
	case VSO_ST_CONNECTED:
		if (vs->snd_shut) {
			got = -EPIPE;
			break;
		}
		got = min(want, vso_room(vs));
		if (!nonblock && got < want && got < vs->peer_alloc / 4)
			got = 0;
		vs->tx_cnt += got;
		if (!got)
			vso_want_write(vs);
		break;
	case VSO_ST_BINDING:
	case VSO_ST_CONNECTING:
	case VSO_ST_NATIVE:
		break;
	case VSO_ST_GONE:
		got = -ESTALE;
		break;
	default:
		got = -EPIPE;
	}
	spin_unlock_bh(&vs->lock);
	return got;
}

static void vso_unreserve(struct vso_sock *vs, u32 n)
{
	spin_lock_bh(&vs->lock);
	vs->tx_cnt -= n;
	spin_unlock_bh(&vs->lock);
}

/* copy the next @n bytes of the caller to pages of the task's fragment. Return: the bytes, fewer without memory; -EFAULT */
static int vso_copy_data(struct vso_sock *vs, struct vso_tx *tx, struct msghdr *msg, u32 n)
{
	struct vso_frag *frag = (struct vso_frag *)tx->body;
	struct page_frag *pfrag = &current->task_frag;
	u32 done = 0;

	while (done < n && tx->frags < VSO_TX_FRAGS) {
		u32 part;

		if (!vso_frag_refill(&vs->pair->pool[VSO_POOL_OUT], pfrag, min_t(u32, n - done, PAGE_SIZE)))
			break;
		part = min(n - done, pfrag->size - pfrag->offset);
		if (copy_from_iter(page_address(pfrag->page) + pfrag->offset, part, &msg->msg_iter) != part)
			return -EFAULT;
		get_page(pfrag->page);
		frag[tx->frags++] = (struct vso_frag){ .page = pfrag->page, .off = pfrag->offset, .len = part };
		pfrag->offset += part;
		done += part;
	}
	return done;
}

/*
 * A DATA message with the next @n bytes of the caller, or fewer: header and bytes together if small, else bytes in pages. @lend: they may be
 * the caller's own, @note: who wants to know when they are read
 */
static struct vso_tx *vso_build_data(struct vso_sock *vs, struct msghdr *msg, u32 n, bool lend, struct ubuf_info *note)
{
	struct vso_tx *tx;
	int done = 0;

	if (n <= VSO_TX_INLINE) {
		tx = kmalloc(sizeof(*tx) + n, GFP_KERNEL_ACCOUNT);
		if (!tx)
			return ERR_PTR(-ENOBUFS);
		memset(tx, 0, sizeof(*tx));
		tx->truesize = sizeof(*tx) + n;
		if (!copy_from_iter_full(tx->body, n, &msg->msg_iter)) {
			kfree(tx);
			return ERR_PTR(-EFAULT);
		}
		vso_zerocopy_copied(note);
	} else {
		tx = kmalloc(sizeof(*tx) + VSO_TX_FRAGS * sizeof(struct vso_frag), GFP_KERNEL_ACCOUNT);
		if (!tx)
			return ERR_PTR(-ENOBUFS);
		memset(tx, 0, sizeof(*tx));
		tx->truesize = sizeof(*tx) + VSO_TX_FRAGS * sizeof(struct vso_frag) + n;
		if (lend)
			done = vso_lend(tx, msg, n, note);
		if (!done) {
			vso_zerocopy_copied(note);
			done = vso_copy_data(vs, tx, msg, n);
		}
		if (done <= 0) {
			vso_tx_free(tx);
			return ERR_PTR(done ?: -ENOBUFS);
		}
		if (done < n) {
			vso_unreserve(vs, n - done);
			n = done;
		}
	}
	INIT_LIST_HEAD(&tx->list);
	tx->hdr.type = cpu_to_le16(VSO_DATA);
	tx->hdr.flow = cpu_to_le32(vs->flow);
	tx->hdr.len = cpu_to_le32(n);
	refcount_inc(&vs->ref);
	tx->vs = vs;
	if (note) {
		net_zcopy_get(note);
		tx->note = note;
	}
	return tx;
}

/* @pages: the bytes lie in pages that may be lent (lend.c); MSG_ZEROCOPY says of itself that they may */
static int vso_stream_send(struct socket *sock, struct msghdr *msg, size_t len, bool pages)
{
	struct vso_sock *vs = vso_sock_get(sock);
	struct sock *sk = sock->sk;
	struct ubuf_info *note = NULL;
	struct vso_tx *tx;
	size_t copied = 0;
	long timeo;
	int err = 0, n;

	if (!vs)
		return vso_again(sock, sendmsg, msg, len);
	if (msg->msg_flags & MSG_OOB && !(vs->dev->features & VSO_F_URGENT)) {
		err = -EOPNOTSUPP;
		goto out;
	}
	if (msg->msg_flags & MSG_FASTOPEN) {
		err = READ_ONCE(vs->state) == VSO_ST_CONNECTED ? -EISCONN : -EALREADY;
		goto out;
	}
	err = vso_zerocopy_begin(sk, msg, len, &note);
	if (err)
		goto out;
	vso_opts_sync(vs, sk, true);
	timeo = sock_sndtimeo(sk, msg->msg_flags & MSG_DONTWAIT);
	while (msg_data_left(msg)) {
		size_t left = msg_data_left(msg);
		bool urgent = msg->msg_flags & MSG_OOB && left == 1;	/* the last byte is */

		if (READ_ONCE(sk->sk_err)) {
			err = -EPIPE;	/* sk_stream_error() says which */
			break;
		}
		if (msg->msg_flags & MSG_OOB && !urgent)
			left--;
		n = vso_reserve(vs, min3(left, (size_t)VSO_TX_MAX, (size_t)vs->dev->max_payload), !timeo);
		if (n == -ESTALE && !copied) {
			vso_zerocopy_end(note, false);
			vso_sock_put(vs);
			return vso_again(sock, sendmsg, msg, len);
		}
		if (n < 0) {
			err = -EPIPE;
			break;
		}
		if (!n) {
			vso_gather_flush(vs);
			err = vso_wait_event(vs, sk, &timeo, vso_send_ready, 0, false);
			if (err)
				break;
			continue;
		}
		if (urgent) {
			err = vso_urgent_send(vs, msg);
			if (err == -EFAULT || err == -ENOBUFS)
				vso_unreserve(vs, 1);
			copied += !err;
			break;
		}
		if (!note && vso_gather_wanted(vs, pages ? &msg->msg_iter : NULL, n)) {
			err = vso_gather(vs, msg, n, pages);
			if (err) {
				vso_unreserve(vs, n);
				break;
			}
			copied += n;
			continue;
		}
		tx = vso_build_data(vs, msg, n, pages || note, note);
		if (IS_ERR(tx)) {
			vso_unreserve(vs, n);
			err = PTR_ERR(tx);
			break;
		}
		n = le32_to_cpu(tx->hdr.len);
		err = vso_tx_submit(vs->pair, tx);
		if (err) {
			err = -EPIPE;
			break;
		}
		copied += n;
	}
out:
	vso_zerocopy_end(note, copied);
	if (copied) {
		vso_poll_sent(vs);
		err = copied;
	} else if (err == -EPIPE) {
		err = sk_stream_error(sk, msg->msg_flags, err);
	}
	vso_sock_put(vs);
	return err;
}

int vso_stream_sendmsg(struct socket *sock, struct msghdr *msg, size_t len)
{
	return vso_stream_send(sock, msg, len, msg->msg_flags & VSO_SPLICE_PAGES && iov_iter_is_bvec(&msg->msg_iter));
}

#ifdef VSO_HAVE_SENDPAGE
ssize_t vso_stream_sendpage(struct socket *sock, struct page *page, int offset, size_t size, int flags)
{
	struct bio_vec piece = { .bv_page = page, .bv_len = size, .bv_offset = offset };
	struct msghdr msg = { .msg_flags = flags };

	iov_iter_bvec(&msg.msg_iter, WRITE, &piece, 1, size);
	return vso_stream_send(sock, &msg, size, true);
}
#endif

/* ------------------------------------------------------------------------------------------------------ poll, shutdown */

__poll_t vso_stream_poll(struct file *file, struct socket *sock, struct poll_table_struct *wait)
{
	struct vso_sock *vs;
	struct sock *sk = sock->sk;
	__poll_t mask = 0;

	sock_poll_wait(file, sock, wait);
	vs = vso_sock_get(sock);
	if (!vs)
		return vso_again_poll(sock, file);
	vso_opts_sync(vs, sk, false);
	vso_poll_busy(vs, wait);
	spin_lock_bh(&vs->lock);
	switch (vs->state) {
	case VSO_ST_BINDING:
	case VSO_ST_CONNECTING:
	case VSO_ST_NATIVE:
	case VSO_ST_EMBRYO:
		break;
	case VSO_ST_BOUND:
		mask = EPOLLOUT | EPOLLWRNORM | EPOLLHUP;
		break;
	case VSO_ST_LISTENING:
		if (!list_empty(&vs->acceptq))
			mask = EPOLLIN | EPOLLRDNORM;
		break;
	case VSO_ST_CONNECTED:
		if (vs->rx_bytes >= min_t(u32, READ_ONCE(sk->sk_rcvlowat), vs->buf_alloc / 2) + vso_urgent_hides(vs) && vs->rx_bytes)
			mask |= EPOLLIN | EPOLLRDNORM;
		if (vs->urg_valid)
			mask |= EPOLLPRI;
		if (vs->peer_fin || vs->rcv_shut)
			mask |= EPOLLIN | EPOLLRDNORM | EPOLLRDHUP;
		if ((vs->peer_fin || vs->rcv_shut) && vs->snd_shut)
			mask |= EPOLLHUP;
		if (vs->snd_shut || vso_stream_writable(vs))
			mask |= EPOLLOUT | EPOLLWRNORM;
		else
			vso_want_write(vs);
		break;
	case VSO_ST_CLOSED:
		mask = EPOLLIN | EPOLLRDNORM | EPOLLRDHUP | EPOLLOUT | EPOLLWRNORM | EPOLLHUP;
		break;
	case VSO_ST_GONE:
		break;
	}
	if (READ_ONCE(sk->sk_err) || !skb_queue_empty_lockless(&sk->sk_error_queue))
		mask |= EPOLLERR;
	spin_unlock_bh(&vs->lock);
	if (READ_ONCE(vs->state) == VSO_ST_LISTENING && vs->native_listen)
		mask |= vs->row->native->poll(file, sock, NULL);
	else if (READ_ONCE(vs->state) == VSO_ST_GONE)
		mask = vso_again_poll(sock, file);
	if (!(mask & poll_requested_events(wait)))
		vso_gather_flush(vs);
	vso_sock_put(vs);
	return mask;
}

/* a listener stops listening on both sides; the socket can be used anew */
static int vso_listener_shutdown(struct vso_sock *vs, struct socket *sock, int how)
{
	const struct vso_row *row = vs->row;
	struct sock *sk = sock->sk;
	int err = 0;

	vso_flow_close(vs, 0);		/* a listen() that waits for the device does not any more */
	mutex_lock(&vs->req_mutex);
	switch (READ_ONCE(vs->state)) {
	case VSO_ST_LISTENING:
		vso_acceptq_flush(vs);
		if (vs->native_listen)
			err = row->native->shutdown(sock, how);
		vso_carrier_unlisten(vs, sk);
		vso_detach(vs, &row->undecided);	/* accept() finds it not listening: EINVAL */
		break;
	case VSO_ST_GONE:
		mutex_unlock(&vs->req_mutex);
		return vso_again(sock, shutdown, how);
	default:
		err = -ENOTCONN;	/* that listen() failed */
	}
	mutex_unlock(&vs->req_mutex);
	return err;
}

/**
 * vso_stream_shutdown() - shutdown()
 *
 * As TCP: ending the receiving side is a matter of this end only, the peer does not hear of it. FIN is queued behind the data.
 */
int vso_stream_shutdown(struct socket *sock, int how)
{
	struct vso_sock *vs = vso_sock_get(sock);
	bool fin = false;
	int err = 0;

	if (!vs)
		return vso_again(sock, shutdown, how);
	if (how < SHUT_RD || how > SHUT_RDWR) {
		err = -EINVAL;
		goto out;
	}
	how++;		/* 0..2 becomes the bits RCV_SHUTDOWN, SEND_SHUTDOWN */
	spin_lock_bh(&vs->lock);
	switch (vs->state) {
	case VSO_ST_LISTENING:
		spin_unlock_bh(&vs->lock);
		if (how & RCV_SHUTDOWN)
			err = vso_listener_shutdown(vs, sock, how - 1);
		goto out;
	case VSO_ST_CONNECTING:
		/* as TCP in SYN_SENT: the attempt is given up */
		vs->state = VSO_ST_CLOSED;
		sock->state = SS_UNCONNECTED;
		vso_flow_wake(vs, EPOLLIN | EPOLLOUT | EPOLLHUP);
		spin_unlock_bh(&vs->lock);
		vso_flow_close(vs, VSO_CLOSE_ABORT);
		goto out;
	case VSO_ST_CONNECTED:
		if (how & RCV_SHUTDOWN)
			vs->rcv_shut = true;
		if (how & SEND_SHUTDOWN && !vs->snd_shut) {
			vs->snd_shut = true;
			fin = true;
		}
		vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDHUP | EPOLLOUT | EPOLLWRNORM |
			      (vs->snd_shut && (vs->rcv_shut || vs->peer_fin) ? EPOLLHUP : 0));
		break;
	case VSO_ST_GONE:
		spin_unlock_bh(&vs->lock);
		vso_sock_put(vs);
		return vso_again(sock, shutdown, how - 1);
	default:
		err = -ENOTCONN;
	}
	spin_unlock_bh(&vs->lock);
	if (fin) {
		vso_flow_send(vs, VSO_SHUTDOWN, VSO_SHUT_SEND, NULL, 0, GFP_KERNEL | __GFP_NOFAIL);
		vso_idle_asked(vs);
	}
out:
	vso_sock_put(vs);
	return err;
}
