// SPDX-License-Identifier: GPL-2.0-only
/*
 * sock_common.c - what all offloaded sockets do alike: waiting, release, names, ioctls, and the table itself.
 *
 * Every operation begins with vso_sock_get(). No entry means that the socket has got another table since the caller read sock->ops, and
 * the call goes there (vso_again).
 *
 * Waiting is on the socket's own queue, so the same wake-ups serve poll, epoll and sleepers, and always for a condition of ours; the
 * state GONE makes every condition true.
 *
 * release() waits for nothing but what SO_LINGER asks for: CLOSE is queued (its message is part of struct vso_sock) and the
 * flow lives on without the socket until CLOSED. What the native release does for the carrier is done last, by the native table.
 */
#include <linux/sched/signal.h>
#include <linux/wait.h>
#include <net/inet_sock.h>
#include <net/tcp_states.h>
#include <asm/ioctls.h>
#include <linux/sockios.h>

#include "vso.h"

/**
 * vso_wait_event() - sleep until ready(vs, arg)
 *
 * Return: 0, -EAGAIN when the time is up, -ERESTARTSYS or -EINTR for a signal (as sock_intr_errno()).
 */
int vso_wait_event(struct vso_sock *vs, struct sock *sk, long *timeo, bool (*ready)(struct vso_sock *vs, u32 arg), u32 arg,
		   bool exclusive)
{
	DEFINE_WAIT_FUNC(wait, woken_wake_function);
	int err = 0;

	if (exclusive)
		add_wait_queue_exclusive(sk_sleep(sk), &wait);
	else
		add_wait_queue(sk_sleep(sk), &wait);
	smp_mb();	/* first queued, then looked; pairs with skwq_has_sleeper() */
	while (!ready(vs, arg)) {
		if (!*timeo) {
			err = -EAGAIN;
			break;
		}
		if (signal_pending(current)) {
			err = sock_intr_errno(*timeo);
			break;
		}
		*timeo = wait_woken(&wait, TASK_INTERRUPTIBLE, *timeo);
	}
	remove_wait_queue(sk_sleep(sk), &wait);
	return err;
}

/** vso_acceptq_flush() - refuse the connections that nobody accepted */
void vso_acceptq_flush(struct vso_sock *vs)
{
	struct vso_sock *child, *next;
	LIST_HEAD(flush);

	spin_lock_bh(&vs->lock);
	list_splice_init(&vs->acceptq, &flush);
	vs->acceptq_len = 0;
	vs->rcv_shut = true;		/* and no new ones */
	spin_unlock_bh(&vs->lock);
	list_for_each_entry_safe(child, next, &flush, accept_node) {
		list_del_init(&child->accept_node);
		vso_flow_close(child, VSO_CLOSE_ABORT);
		vso_sock_put(child);
	}
}

/**
 * vso_carrier_unlisten() - take back the TCP_LISTEN that was set by hand
 *
 * Only that one: a carrier that really listens is in the kernel's tables, and leaves them by native means alone.
 */
void vso_carrier_unlisten(struct vso_sock *vs, struct sock *sk)
{
	lock_sock(sk);
	if (vs->hand_listen) {
		vs->hand_listen = false;
		inet_sk_set_state(sk, TCP_CLOSE);
	}
	release_sock(sk);
}

/*
 * Bytes that were sent and that the device, or the host's socket (@name: VSO_QUEUE_*), has not got rid of; -errno: it could not be asked. Waits
 * for the device's answer.
 */
static int vso_out_queue(struct vso_sock *vs, u32 name)
{
	bool stream = vs->row->type == SOCK_STREAM;
	int host = 0, n;

	if (stream && READ_ONCE(vs->tx_cnt) && READ_ONCE(vs->state) == VSO_ST_CONNECTED)
		host = vso_host_queue(vs, name);	/* which says how much the host's socket has taken, too */
	if (host < 0)
		return host;
	spin_lock_bh(&vs->lock);
	n = stream && vs->state == VSO_ST_CONNECTED ? vs->tx_cnt - vs->peer_fwd + host : 0;
	spin_unlock_bh(&vs->lock);
	return n;
}

/*
 * close() with SO_LINGER and a time: until the other end has all, the time is over or a signal comes; not for a task that exits. Nobody tells
 * when the host's peer acknowledges, so we ask again and again.
 */
static void vso_linger(struct vso_sock *vs, struct sock *sk)
{
	unsigned long end = jiffies + sk->sk_lingertime;

	if (!sock_flag(sk, SOCK_LINGER) || !sk->sk_lingertime || current->flags & PF_EXITING)
		return;
	while (!READ_ONCE(sk->sk_err) && vso_out_queue(vs, VSO_QUEUE_OUT) && time_before(jiffies, end) && !signal_pending(current))
		schedule_timeout_interruptible(max(HZ / 100, 1));
}

static int vso_release(struct socket *sock)
{
	const struct proto_ops *native;
	struct sock *sk = sock->sk;
	struct vso_sock *vs;
	bool abort;

	if (!sk)
		return 0;	/* a socket that accept() could not complete has its listener's table and nothing else */
	vs = vso_sock_get(sock);
	if (!vs || !vso_native_cancel(vs)) {
		if (vs)
			vso_sock_put(vs);
		return vso_again(sock, release);
	}
	native = vs->row->native;
	vso_linger(vs, sk);
	vso_race();
	abort = READ_ONCE(vs->rx_bytes) || (sock_flag(sk, SOCK_LINGER) && !sk->sk_lingertime);
	vso_flow_close(vs, abort ? VSO_CLOSE_ABORT : 0);
	vso_idle_asked(vs);
	vso_acceptq_flush(vs);
	vso_carrier_unlisten(vs, sk);
	vso_detach_sync(vs, native);
	vso_sock_put(vs);
	return native->release(sock);
}

static int vso_getname(struct socket *sock, struct sockaddr *uaddr, int peer)
{
	struct vso_sock *vs = vso_sock_get(sock);
	enum vso_state state;
	union vso_addr addr;
	bool none;

	if (!vs)
		return vso_again(sock, getname, uaddr, peer);
	spin_lock_bh(&vs->lock);
	state = vs->state;
	addr = peer ? vs->peer : vs->local;
	none = vs->addr_only && !vs->conn;	/* datagrams to anybody: there is no peer */
	spin_unlock_bh(&vs->lock);
	vso_sock_put(vs);
	if (peer == 1 && (state != VSO_ST_CONNECTED || none))	/* 2: accept(), which names a peer that is gone, too */
		return -ENOTCONN;
	memcpy(uaddr, &addr, vso_addr_len(&addr));
	return vso_addr_len(&addr);
}

static int vso_ioctl(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	struct vso_sock *vs;
	int answer, out = 0;

	switch (cmd) {
	case SIOCINQ:
	case SIOCOUTQ:
	case SIOCOUTQNSD:
	case SIOCATMARK:
		break;
	default:
		vs = vso_sock_get(sock);
		if (!vs)
			return vso_again(sock, ioctl, cmd, arg);
		answer = vs->row->native->ioctl(sock, cmd, arg);	/* interfaces and routes: not about this socket */
		vso_sock_put(vs);
		return answer;
	}
	vs = vso_sock_get(sock);
	if (!vs)
		return vso_again(sock, ioctl, cmd, arg);
	if (cmd == SIOCOUTQ || cmd == SIOCOUTQNSD)
		out = vso_out_queue(vs, cmd == SIOCOUTQ ? VSO_QUEUE_OUT : VSO_QUEUE_UNSENT);
	spin_lock_bh(&vs->lock);
	if (vs->state == VSO_ST_LISTENING) {
		answer = -EINVAL;
	} else if (cmd == SIOCINQ) {
		struct sk_buff *skb = skb_peek(&vs->dgrams);

		answer = vs->row->type == SOCK_STREAM ? vso_urgent_ioctl(vs, false) : skb ? skb->len : 0;
	} else if (cmd == SIOCATMARK) {
		answer = vso_urgent_ioctl(vs, true);
	} else {
		answer = out;
	}
	spin_unlock_bh(&vs->lock);
	vso_sock_put(vs);
	return answer < 0 ? answer : put_user(answer, (int __user *)arg);
}

/** vso_ops_fill() - what an offloaded socket does. @row->offloaded comes as a copy of the native table */
void vso_ops_fill(struct vso_row *row)
{
	struct proto_ops *ops = &row->offloaded;
	bool stream = row->type == SOCK_STREAM;

	ops->release = vso_release;
	ops->getname = vso_getname;
	ops->ioctl = vso_ioctl;
	ops->setsockopt = vso_setsockopt;
	ops->getsockopt = vso_getsockopt;
	ops->bind = vso_bind;
	ops->listen = stream ? vso_listen : sock_no_listen;
	ops->accept = stream ? vso_accept : sock_no_accept;
	ops->connect = stream ? vso_connect : vso_dgram_connect;
	ops->poll = stream ? vso_stream_poll : vso_dgram_poll;
	ops->shutdown = stream ? vso_stream_shutdown : vso_dgram_shutdown;
	ops->sendmsg = stream ? vso_stream_sendmsg : vso_dgram_sendmsg;
	ops->recvmsg = stream ? vso_stream_recvmsg : vso_dgram_recvmsg;
	ops->show_fdinfo = vso_show_fdinfo;
	ops->mmap = sock_no_mmap;
	/* users inside the kernel that would reach around us: splice falls back to sendmsg and recvmsg */
#ifdef VSO_HAVE_SENDPAGE
	ops->sendpage = stream ? vso_stream_sendpage : NULL;
	ops->sendpage_locked = NULL;
#endif
	ops->splice_read = NULL;
	ops->splice_eof = NULL;
	if (!stream)
		ops->set_peek_off = NULL;	/* a stream has it where the native one has it: Linux 6.9 */
	ops->peek_len = NULL;
	ops->read_sock = NULL;
	ops->read_skb = NULL;
	ops->sendmsg_locked = NULL;
	ops->set_rcvlowat = NULL;	/* the core stores it in the carrier, where we look */
}
