// SPDX-License-Identifier: GPL-2.0-only
/*
 * stream_recv.c - stream sockets: receive.
 *
 * The tasklet appends to rxq under the lock; a reader takes recv_mutex, then looks at the head under the lock, copies without
 * it (only readers shorten the queue), and takes off what it copied. Bytes handed to the application raise fwd_cnt; CREDIT is sent when a
 * quarter of the window has not been announced. EOF and errors come after the bytes before them, as with tcp_recvmsg().
 */
#include <linux/sched/signal.h>
#include <net/sock.h>

#include "vso.h"

/* nothing more will be appended. Called under vs->lock */
static bool vso_rx_over(const struct vso_sock *vs)
{
	return vs->peer_fin || vs->rcv_shut || vs->state == VSO_ST_CLOSED;
}

static bool vso_recv_ready(struct vso_sock *vs, u32 arg)
{
	bool ready;

	spin_lock_bh(&vs->lock);
	if (vs->state == VSO_ST_CONNECTED)
		ready = vs->rx_bytes > arg + vso_urgent_hides(vs) || vso_rx_over(vs);
	else
		ready = !vso_asking(vs->state);
	spin_unlock_bh(&vs->lock);
	return ready;
}

/* take @n bytes off the first segment. Called under recv_mutex: only readers shorten the queue */
static void vso_rx_take(struct vso_sock *vs, u32 n)
{
	struct vso_seg *seg;
	bool empty;

	spin_lock_bh(&vs->lock);
	seg = list_first_entry(&vs->rxq, struct vso_seg, list);
	seg->off += n;
	seg->len -= n;
	vs->rx_bytes -= n;
	vs->fwd_cnt += n;
	vso_urgent_passed(vs);
	empty = !seg->len;
	if (empty) {
		list_del(&seg->list);
		vs->rx_mem -= seg->truesize;
	}
	spin_unlock_bh(&vs->lock);
	if (empty)
		vso_seg_free(vs, seg);
}

/*
 * Copy up to @len bytes from the queue. PEEK leaves them, TRUNC only takes them off. @copied: bytes that this call has, by earlier rounds,
 * @seen: bytes that PEEK leaves out, these and those before SO_PEEK_OFF. @mark: set when the urgent mark ended it. Called under recv_mutex.
 * Return: bytes, or -EFAULT when not one could be copied.
 */
static ssize_t vso_rx_copy(struct vso_sock *vs, struct msghdr *msg, size_t len, int flags, size_t copied, u32 seen, bool *mark)
{
	struct vso_seg *seg = NULL;
	size_t done = 0;
	bool hidden;
	u32 skip;

	spin_lock_bh(&vs->lock);
	hidden = vso_urgent_hides(vs);
	spin_unlock_bh(&vs->lock);
	if (hidden && flags & MSG_PEEK)
		seen++;
	else if (hidden && !copied && len)
		vso_rx_take(vs, 1);	/* the urgent byte, which is for nobody */
	skip = seen;
	while (done < len) {
		u32 off, n, got, ahead;

		spin_lock_bh(&vs->lock);
		if (!(flags & MSG_PEEK) || !seg)
			seg = list_first_entry_or_null(&vs->rxq, struct vso_seg, list);
		else
			seg = list_is_last(&seg->list, &vs->rxq) ? NULL : list_next_entry(seg, list);
		off = seg ? seg->off : 0;
		n = seg ? seg->len : 0;
		ahead = vso_urgent_ahead(vs, vs->fwd_cnt + (flags & MSG_PEEK ? seen + (u32)done : 0));
		spin_unlock_bh(&vs->lock);
		if (!seg)
			break;
		if (!ahead && copied + done) {
			*mark = true;
			break;
		}
		if (skip) {
			u32 over = min(skip, n);

			off += over;
			n -= over;
			skip -= over;
		}
		n = min3((size_t)n, len - done, (size_t)(ahead ?: U32_MAX));
		if (flags & MSG_TRUNC)
			got = n;
		else	/* in one piece: copy_page_to_iter() would go page by page, for the sake of memory that is not mapped; ours is */
			got = copy_to_iter((seg->page ? page_address(seg->page) : seg->data) + off, n, &msg->msg_iter);
		done += got;
		if (!(flags & MSG_PEEK))
			vso_rx_take(vs, got);
		if (got < n)
			return done ?: -EFAULT;
	}
	return done;
}

/* tell the device about room when a quarter of the window is news to it */
static void vso_rx_credit_due(struct vso_sock *vs)
{
	if (READ_ONCE(vs->fwd_cnt) - READ_ONCE(vs->fwd_told) >= READ_ONCE(vs->buf_alloc) / 4 &&
	    READ_ONCE(vs->state) == VSO_ST_CONNECTED && !vs->peer_fin)
		vso_flow_send(vs, VSO_CREDIT, 0, NULL, 0, GFP_KERNEL);
}

/* of the @target bytes that a call waits for, as many as the window lets wait at once */
static size_t vso_recv_enough(const struct vso_sock *vs, int flags, u32 off, size_t target)
{
	u32 window = READ_ONCE(vs->buf_alloc);

	if (flags & MSG_PEEK)
		return min_t(size_t, target, off < window ? window - off : 1);
	return flags & MSG_WAITALL ? target : min_t(size_t, target, window / 2);
}

int vso_stream_recvmsg(struct socket *sock, struct msghdr *msg, size_t len, int flags)
{
	struct vso_sock *vs = vso_sock_get(sock);
	struct sock *sk = sock->sk;
	enum vso_state state;
	size_t copied = 0, target;
	bool over, empty, mark = false;
	u32 off, seen = 0;		/* of PEEK: where SO_PEEK_OFF begins, and what was looked at so far */
	ssize_t n;
	long timeo;
	int err = 0;

	if (!vs)
		return vso_again(sock, recvmsg, msg, len, flags);
	if (flags & MSG_ERRQUEUE) {
		err = vs->row->native->recvmsg(sock, msg, len, flags);		/* of zero-copy sends: vso_zerocopy_begin() */
		goto out;
	}
	state = READ_ONCE(vs->state);
	if (state == VSO_ST_LISTENING || state == VSO_ST_BOUND) {
		err = -ENOTCONN;
		goto out;
	}
	if (flags & MSG_OOB) {
		err = vso_urgent_recv(vs, msg, len, flags);
		goto out;
	}
	vso_opts_sync(vs, sk, true);
	timeo = sock_rcvtimeo(sk, flags & MSG_DONTWAIT);
	target = min_t(size_t, sock_rcvlowat(sk, flags & MSG_WAITALL, len), INT_MAX);
	off = max(sk_peek_offset(sk, flags), 0);
	for (;;) {
		mutex_lock(&vs->recv_mutex);
		seen = flags & MSG_PEEK ? off + copied : 0;
		n = vso_rx_copy(vs, msg, len - copied, flags, copied, seen, &mark);
		mutex_unlock(&vs->recv_mutex);
		if (n < 0) {
			err = n;
			break;
		}
		copied += n;
		seen += flags & MSG_PEEK ? n : 0;
		if (!(flags & MSG_PEEK)) {
			vso_window_used(vs, sk);
			vso_rx_credit_due(vs);
		}
		if (copied >= vso_recv_enough(vs, flags, off, target) || (n && copied >= len) || mark)
			break;
		spin_lock_bh(&vs->lock);
		state = vs->state;
		over = vso_rx_over(vs);
		empty = vs->rx_bytes <= seen + vso_urgent_hides(vs);
		spin_unlock_bh(&vs->lock);
		if (!empty && !len)
			break;
		if (!empty)
			continue;
		if (state == VSO_ST_GONE && !copied) {
			vso_sock_put(vs);
			return vso_again(sock, recvmsg, msg, len, flags);
		}
		if (copied && (over || READ_ONCE(sk->sk_err) || state != VSO_ST_CONNECTED))
			break;
		if (over || READ_ONCE(sk->sk_err)) {
			/* once the error has been told, the end of the stream */
			err = sock_error(sk);
			if (!err && state == VSO_ST_CLOSED && sock->state != SS_CONNECTED)
				err = -ENOTCONN;
			break;
		}
		vso_gather_flush(vs);
		if (vso_poll_receive(vs, sk, timeo, vso_recv_ready, seen))
			continue;
		err = vso_wait_event(vs, sk, &timeo, vso_recv_ready, seen, false);
		if (err)
			break;
	}
	if (copied && flags & MSG_PEEK) {
		sk_peek_offset_fwd(sk, copied);
	} else if (copied) {
		sk_peek_offset_bwd(sk, copied);
		vso_poll_answered(vs);
	}
out:
	vso_sock_put(vs);
	return copied ? copied : err;
}
