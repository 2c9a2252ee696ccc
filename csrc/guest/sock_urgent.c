// SPDX-License-Identifier: GPL-2.0-only
/*
 * sock_urgent.c - urgent data of TCP (tcp(7), "out of band").
 *
 * The device tells a byte twice (vso_abi.h): that it is on its way, however much lies before it, and then the byte in its place in the
 * stream, which is the mark. It is in rxq like any other byte from then on. What a reader sees is Linux's:
 *
 *   urg_valid     the byte waits for recv(MSG_OOB): POLLPRI
 *   urg_mark      the byte with the number urg_seq, counted as fwd_cnt counts, is the mark, and nobody has read past it
 *
 * No read goes past the mark, one that begins there leaves the byte out, or takes it like others with SO_OOBINLINE. Newer urgent data
 * replace older ones, whose byte becomes one of the stream. All of it changes under vs->lock; the mark moves under recv_mutex, too.
 */
#include <net/sock.h>

#include "vso.h"

/* Called under vs->lock */
static bool vso_urgent_in_line(const struct vso_sock *vs)
{
	return vs->sk && sock_flag(vs->sk, SOCK_URGINLINE);
}

/** vso_urgent_ahead() - bytes from the one with this number to the mark; very many if it is not ahead. Called under vs->lock */
u32 vso_urgent_ahead(const struct vso_sock *vs, u32 at)
{
	return vs->urg_mark ? vs->urg_seq - at : U32_MAX;
}

/** vso_urgent_hides() - the next byte is one that no ordinary read sees. Called under vs->lock */
bool vso_urgent_hides(const struct vso_sock *vs)
{
	return vs->urg_mark && vs->urg_seq == vs->fwd_cnt && !vso_urgent_in_line(vs);
}

/** vso_urgent_passed() - fwd_cnt has grown. Called under vs->lock */
void vso_urgent_passed(struct vso_sock *vs)
{
	if (vs->urg_mark && (s32)(vs->fwd_cnt - vs->urg_seq) > 0)
		vs->urg_mark = vs->urg_valid = false;
}

/** vso_urgent_ioctl() - SIOCATMARK and SIOCINQ. Called under vs->lock */
int vso_urgent_ioctl(const struct vso_sock *vs, bool at_mark)
{
	if (at_mark)
		return vs->urg_mark && vs->urg_seq == vs->fwd_cnt;
	return vs->urg_mark && !vso_urgent_in_line(vs) ? vs->urg_seq - vs->fwd_cnt : vs->rx_bytes;
}

/* the byte is new to us. Called under vs->lock */
static void vso_urgent_tell(struct vso_sock *vs, u8 byte)
{
	vs->urg_byte = byte;
	vs->urg_valid = true;
	if (vs->sk)
		sk_send_sigurg(vs->sk);
	vso_flow_wake(vs, EPOLLPRI);
}

/** vso_rx_urgent() - URGENT. Return: 0 or the errno that ends the flow */
int vso_rx_urgent(struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;
	u8 byte = m->len ? m->data[0] : m->arg;
	int error = 0;
	long room;

	spin_lock(&vs->lock);
	room = vso_rx_room(vs);
	if (room < 0)
		goto unlock;
	if (vs->peer_fin || m->len > room) {
		error = EPROTO;
		goto unlock;
	}
	if (!vs->urg_coming || byte != vs->urg_byte)
		vso_urgent_tell(vs, byte);
	vs->urg_coming = !m->len;
	vs->urg_mark = m->len;
	vs->urg_seq = vs->fwd_cnt + vs->rx_bytes;
	if (m->len) {
		if (!vso_rx_queue(vs, m))
			error = ENOBUFS;
		vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDBAND);
	}
unlock:
	spin_unlock(&vs->lock);
	return error;
}

/** vso_urgent_recv() - recv(MSG_OOB), as tcp_recv_urg() */
int vso_urgent_recv(struct vso_sock *vs, struct msghdr *msg, size_t len, int flags)
{
	bool there;
	u8 byte;

	spin_lock_bh(&vs->lock);
	there = vs->urg_valid && !vso_urgent_in_line(vs);
	byte = vs->urg_byte;
	if (there && !(flags & MSG_PEEK))
		vs->urg_valid = false;
	spin_unlock_bh(&vs->lock);
	if (!there)
		return -EINVAL;
	msg->msg_flags |= MSG_OOB;
	if (!len) {
		msg->msg_flags |= MSG_TRUNC;
		return 0;
	}
	return flags & MSG_TRUNC || !memcpy_to_msg(msg, &byte, 1) ? 1 : -EFAULT;
}

/** vso_urgent_send() - the next byte of the caller, for which credit is reserved. Return: 0, -EFAULT, -ENOBUFS, -EPIPE */
int vso_urgent_send(struct vso_sock *vs, struct msghdr *msg)
{
	struct vso_tx *tx;
	u8 byte;

	if (memcpy_from_msg(&byte, msg, 1))
		return -EFAULT;
	tx = vso_tx_new(vs, VSO_URGENT, byte, &byte, 1, GFP_KERNEL);
	if (!tx)
		return -ENOBUFS;
	return vso_tx_submit(vs->pair, tx) ? -EPIPE : 0;
}
