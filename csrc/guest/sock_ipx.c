// SPDX-License-Identifier: GPL-2.0-only
/*
 * sock_ipx.c - AF_IPX datagram sockets, in a kernel that has none (Linux dropped them in 4.18).
 *
 * There is no native stack below, so this is the whole socket family: its carrier is a sock of ours, whose receive queue the device's
 * datagrams fill, and its two tables (row->undecided, row->offloaded) are the same functions. "Undecided" is a socket without an address:
 * it gets one with bind(), or with the first call that needs one, by a BIND that the device answers with network, node and socket number.
 * What the host does with a datagram is its business (IPX over UDP, RFC 1234); headers never come here.
 *
 * What calls return is what Linux' own IPX returned, but for two things: a broadcast needs SO_BROADCAST (EACCES), and a destination that the
 * policy denies has the policy's errno. Without a device that knows IPX, or without a network for this guest, there is "no interface":
 * EADDRNOTAVAIL. When the device goes, sockets lose their address and hear ENOLINK, as when an interface went.
 *
 * Where another module has the family already, it keeps it.
 *
 * vso_ipx.mutex is held while the device is asked for an address, and guards the change from one table to the other; peer and type are under
 * lock_sock().
 */
#include <linux/capability.h>
#include <linux/sched/signal.h>
#include <linux/skbuff.h>
#include <linux/slab.h>
#include <net/net_namespace.h>
#include <net/tcp_states.h>
#include <asm/ioctls.h>

#include "vso.h"

#define VSO_IPX_PROTECTED	0x4000	/* socket numbers below need CAP_NET_ADMIN: routing and service advertising have theirs there */
#define VSO_IPX_TYPE		1	/* the one option of SOL_IPX: IPX_TYPE */
#define VSO_IPX_DATA_MAX	(65535 - 30)	/* what a header can say: so much or more is EINVAL */
#define VSO_IPX_UDP_MAX		(65507 - 30)	/* what fits a UDP datagram */

struct vso_ipx {
	struct sock sk;		/* first */
	struct mutex mutex;
	struct vso_sockaddr_ipx peer;	/* while sk_state is TCP_ESTABLISHED */
	u8 type;
};

static struct vso_row vso_ipx_row = { .family = PF_IPX, .type = SOCK_DGRAM };
static const u8 vso_ipx_everybody[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };

static struct vso_ipx *vso_ipx(const struct sock *sk)
{
	return (struct vso_ipx *)sk;
}

/* whose datagram this is, in skb->cb until it is received */
static struct vso_sockaddr_ipx *vso_ipx_from(struct sk_buff *skb)
{
	sock_skb_cb_check_size(sizeof(struct vso_sockaddr_ipx));
	return (struct vso_sockaddr_ipx *)skb->cb;
}

/* ------------------------------------------------------------------------------------------------------- from the device */

/** vso_ipx_rx() - a datagram came: struct vso_dgram, the source's URI, its bytes */
void vso_ipx_rx(const struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;
	char uri[VSO_URI_MAX];
	union vso_addr from;
	struct vso_dgram d;
	struct sk_buff *skb;
	u32 off, len;

	vso_msg_copy(m, 0, &d, sizeof(d));
	off = sizeof(d) + le16_to_cpu(d.uri_len);
	if (off > m->len || off > sizeof(d) + sizeof(uri))
		return;
	vso_msg_copy(m, sizeof(d), uri, off - sizeof(d));
	if (vso_uri_parse(uri, off - sizeof(d), AF_IPX, &from))
		return;
	len = m->len - off;
	skb = vso_payload_skb(m, 0, off, len);
	if (skb) {
		from.ipx.sipx_type = d.tos;
		*vso_ipx_from(skb) = from.ipx;
		skb->tstamp = ktime_get_real();
	}
	spin_lock(&vs->lock);
	if (vs->state != VSO_ST_CONNECTED || vs->closing || !vs->sk || vs->sk->sk_shutdown & RCV_SHUTDOWN) {
		kfree_skb(skb);
	} else if (!skb || sock_queue_rcv_skb(vs->sk, skb)) {
		vs->rx_drops++;
		kfree_skb(skb);
	}
	spin_unlock(&vs->lock);
}

/** vso_ipx_error() - a datagram could not leave the host. Linux' IPX has such errors at once; the next call hears it */
void vso_ipx_error(struct vso_sock *vs, int error)
{
	spin_lock(&vs->lock);
	if (vs->state == VSO_ST_CONNECTED && !vs->closing && vs->sk) {
		WRITE_ONCE(vs->sk->sk_err, error);
		vso_flow_wake(vs, EPOLLERR | EPOLLIN | EPOLLRDNORM | EPOLLOUT | EPOLLWRNORM);
	}
	spin_unlock(&vs->lock);
}

/* ------------------------------------------------------------------------------------------------------------ addresses */

/*
 * The state of a socket that has an address, with a reference; NULL: it has none, any more. Called under mutex, where a socket whose device
 * is gone becomes one without an address.
 */
static struct vso_sock *vso_ipx_get(struct socket *sock)
{
	struct vso_sock *vs = vso_sock_get(sock);

	if (vs && READ_ONCE(vs->state) != VSO_ST_CONNECTED) {
		vso_flow_close(vs, 0);
		vso_detach(vs, &vso_ipx_row.undecided);
		vso_sock_put(vs);
		return NULL;
	}
	return vs;
}

/* ask the device for an address. Called under mutex. Return: the socket's state with a reference, or ERR_PTR() as bind() */
static struct vso_sock *vso_ipx_open(struct socket *sock, const union vso_addr *addr)
{
	struct vso_sock *vs = vso_take(&vso_ipx_row, sock);
	int err;

	if (IS_ERR_OR_NULL(vs))
		return ERR_PTR(-EADDRNOTAVAIL);
	err = vso_open_request(vs, sock, VSO_BIND, addr, 0) ?: vso_flow_wait(vs);
	if (!err && vs->error)
		err = -(int)vs->error;
	else if (!err && vs->verdict != VSO_OFFLOAD)
		err = -EADDRNOTAVAIL;
	if (!err) {
		spin_lock_bh(&vs->lock);
		vs->was_bound = true;
		vs->addr_only = true;
		/* it is BINDING, unless the device went meanwhile */
		vs->state = vs->dead ? VSO_ST_CLOSED : VSO_ST_CONNECTED;
		spin_unlock_bh(&vs->lock);
		return vs;
	}
	vso_flow_close(vs, 0);
	vso_detach(vs, &vso_ipx_row.undecided);
	vso_sock_put(vs);
	return ERR_PTR(err == -ENODEV ? -EADDRNOTAVAIL : err);
}

/* the state of a socket, which gets any address now if it has none. Return: with a reference, or ERR_PTR() as bind(), or -EINTR */
static struct vso_sock *vso_ipx_bound(struct socket *sock)
{
	union vso_addr any = { .sa.sa_family = AF_IPX };
	struct vso_ipx *ipx = vso_ipx(sock->sk);
	struct vso_sock *vs = vso_sock_get(sock);

	if (vs && READ_ONCE(vs->state) == VSO_ST_CONNECTED)
		return vs;
	if (vs)
		vso_sock_put(vs);
	if (mutex_lock_killable(&ipx->mutex))
		return ERR_PTR(-EINTR);
	vs = vso_ipx_get(sock) ?: vso_ipx_open(sock, &any);
	mutex_unlock(&ipx->mutex);
	return vs;
}

/* an address that the application gives; its own type of packet is not part of it. Return: 0 or -EINVAL */
static int vso_ipx_addr(union vso_addr *to, const void *from, int len)
{
	memset(to, 0, sizeof(*to));
	if (len < (int)sizeof(to->ipx))
		return -EINVAL;
	memcpy(&to->ipx, from, sizeof(to->ipx));
	to->ipx.sipx_type = 0;
	to->ipx.sipx_zero = 0;
	return to->ipx.sipx_family == AF_IPX ? 0 : -EINVAL;
}

static int vso_ipx_bind(struct socket *sock, vso_sockaddr *uaddr, int len)
{
	struct vso_ipx *ipx = vso_ipx(sock->sk);
	union vso_addr addr;
	struct vso_sock *vs;
	int err;

	if (len != sizeof(addr.ipx) || vso_ipx_addr(&addr, uaddr, len))
		return -EINVAL;
	if (addr.ipx.sipx_port && ntohs(addr.ipx.sipx_port) < VSO_IPX_PROTECTED && !capable(CAP_NET_ADMIN))
		return -EACCES;
	memset(addr.ipx.sipx_node, 0, sizeof(addr.ipx.sipx_node));	/* it is the network's to know */
	if (mutex_lock_killable(&ipx->mutex))
		return -EINTR;
	vs = vso_ipx_get(sock);
	err = vs ? -EINVAL : 0;
	if (!vs) {
		vs = vso_ipx_open(sock, &addr);
		err = PTR_ERR_OR_ZERO(vs);
	}
	mutex_unlock(&ipx->mutex);
	if (!IS_ERR(vs))
		vso_sock_put(vs);
	return err;
}

/* may it be sent there? Fills in the network. Return: 0, or -errno as sendto() */
static int vso_ipx_may(struct vso_sock *vs, struct sock *sk, union vso_addr *to)
{
	int where;

	if (!to->ipx.sipx_network)
		to->ipx.sipx_network = vs->local.ipx.sipx_network;
	where = vso_dest_where(vs, sk, to);
	if (where < 0)
		return where == -ECONNRESET ? -ENETDOWN : where;
	return where == VSO_TO_DEVICE ? 0 : -ENETUNREACH;
}

static int vso_ipx_connect(struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	struct sock *sk = sock->sk;
	struct vso_sock *vs;
	union vso_addr to;
	int err;

	lock_sock(sk);
	sk->sk_state = TCP_CLOSE;	/* whatever comes of it, the old peer is gone */
	sock->state = SS_UNCONNECTED;
	release_sock(sk);
	if (len >= (int)sizeof(sa_family_t) && uaddr->sa_family == AF_UNSPEC)
		return 0;
	if (len != sizeof(to.ipx) || vso_ipx_addr(&to, uaddr, len))
		return -EINVAL;
	vs = vso_ipx_bound(sock);
	if (IS_ERR(vs))
		return PTR_ERR(vs);
	err = vso_ipx_may(vs, sk, &to);
	vso_sock_put(vs);
	if (err)
		return err;
	lock_sock(sk);
	vso_ipx(sk)->peer = to.ipx;
	vso_ipx(sk)->type = ((const struct vso_sockaddr_ipx *)uaddr)->sipx_type;
	sk->sk_state = TCP_ESTABLISHED;
	sock->state = SS_CONNECTED;
	release_sock(sk);
	return 0;
}

static int vso_ipx_getname(struct socket *sock, struct sockaddr *uaddr, int peer)
{
	struct vso_sockaddr_ipx addr = { .sipx_family = AF_IPX };
	struct sock *sk = sock->sk;
	struct vso_sock *vs;
	int err = sizeof(addr);

	lock_sock(sk);
	if (!peer) {
		vs = vso_sock_get(sock);
		if (vs && READ_ONCE(vs->state) == VSO_ST_CONNECTED)
			addr = vs->local.ipx;
		if (vs)
			vso_sock_put(vs);
	} else if (sk->sk_state == TCP_ESTABLISHED) {
		addr = vso_ipx(sk)->peer;
	} else {
		err = -ENOTCONN;
	}
	addr.sipx_type = vso_ipx(sk)->type;
	release_sock(sk);
	if (err > 0)
		memcpy(uaddr, &addr, sizeof(addr));
	return err;
}

/* ------------------------------------------------------------------------------------------------------------ datagrams */

static int vso_ipx_send(struct vso_sock *vs, struct msghdr *msg, size_t len, const union vso_addr *to, u8 type)
{
	struct vso_dgram d = { .tos = type };
	char uri[VSO_URI_MAX + 1];
	struct vso_tx *tx;
	int n, err;

	n = vso_uri_format(uri, sizeof(uri), to, vs->row->protocol);
	d.uri_len = cpu_to_le16(n);
	tx = vso_tx_new(vs, VSO_DGRAM, 0, NULL, sizeof(d) + n + len, GFP_KERNEL_ACCOUNT);
	if (!tx)
		return -ENOBUFS;
	memcpy(tx->body, &d, sizeof(d));
	memcpy(tx->body + sizeof(d), uri, n);
	if (!copy_from_iter_full(tx->body + sizeof(d) + n, len, &msg->msg_iter)) {
		vso_tx_free(tx);
		return -EFAULT;
	}
	err = vso_tx_submit(vs->pair, tx);
	return err == -ENODEV ? -ENETDOWN : err ?: (int)len;
}

static int vso_ipx_sendmsg(struct socket *sock, struct msghdr *msg, size_t len)
{
	struct sock *sk = sock->sk;
	struct vso_sock *vs;
	union vso_addr to = {};
	bool connected;
	long timeo;
	u8 type;
	int err;

	if (msg->msg_flags & ~(MSG_DONTWAIT | MSG_NOSIGNAL | MSG_CMSG_COMPAT) || len >= VSO_IPX_DATA_MAX)
		return -EINVAL;
	if (len > VSO_IPX_UDP_MAX)
		return -EMSGSIZE;
	lock_sock(sk);
	connected = sk->sk_state == TCP_ESTABLISHED;
	to.ipx = vso_ipx(sk)->peer;
	type = vso_ipx(sk)->type;
	release_sock(sk);
	if (!msg->msg_name && !connected)
		return -ENOTCONN;
	vs = vso_ipx_bound(sock);
	if (IS_ERR(vs))
		return PTR_ERR(vs);
	if (msg->msg_name) {
		err = vso_ipx_addr(&to, msg->msg_name, msg->msg_namelen);
		if (err)
			goto out;
		type = ((const struct vso_sockaddr_ipx *)msg->msg_name)->sipx_type;
	}
	err = -EACCES;
	if (!memcmp(to.ipx.sipx_node, vso_ipx_everybody, sizeof(vso_ipx_everybody)) && !sock_flag(sk, SOCK_BROADCAST))
		goto out;
	err = sock_error(sk);
	if (err)
		goto out;
	timeo = sock_sndtimeo(sk, msg->msg_flags & MSG_DONTWAIT);
	err = vso_wait_event(vs, sk, &timeo, vso_dgram_send_ready, 0, false) ?: vso_ipx_may(vs, sk, &to);
	if (!err)
		err = sk->sk_shutdown & SEND_SHUTDOWN ? -EPIPE : vso_ipx_send(vs, msg, len, &to, type);
out:
	vso_sock_put(vs);
	if (err == -EPIPE && !(msg->msg_flags & MSG_NOSIGNAL))
		send_sig(SIGPIPE, current, 0);
	return err;
}

static int vso_ipx_recvmsg(struct socket *sock, struct msghdr *msg, size_t size, int flags)
{
	struct sock *sk = sock->sk;
	struct vso_sock *vs;
	struct sk_buff *skb;
	int err, n;

	if (flags & MSG_ERRQUEUE)
		return -EAGAIN;		/* there are none */
	if (skb_queue_empty_lockless(&sk->sk_receive_queue) && !READ_ONCE(sk->sk_err)) {
		vs = vso_ipx_bound(sock);
		if (IS_ERR(vs))
			return PTR_ERR(vs);
		vso_sock_put(vs);
	}
	skb = skb_recv_datagram(sk, flags, &err);
	if (!skb)
		return err == -EAGAIN && sk->sk_shutdown & RCV_SHUTDOWN ? 0 : err;
	n = min_t(size_t, skb->len, size);
	if (n < skb->len)
		msg->msg_flags |= MSG_TRUNC;
	err = skb_copy_datagram_msg(skb, 0, msg, n);
	if (!err) {
		sock_recv_cmsgs(msg, sk, skb);
		if (msg->msg_name) {
			memcpy(msg->msg_name, vso_ipx_from(skb), sizeof(struct vso_sockaddr_ipx));
			msg->msg_namelen = sizeof(struct vso_sockaddr_ipx);
		}
		err = flags & MSG_TRUNC ? skb->len : n;
	}
	skb_free_datagram(sk, skb);
	return err;
}

static __poll_t vso_ipx_poll(struct file *file, struct socket *sock, struct poll_table_struct *wait)
{
	__poll_t mask = datagram_poll(file, sock, wait);
	struct vso_sock *vs = vso_sock_get(sock);

	if (!vs)
		return mask;
	spin_lock_bh(&vs->lock);
	if (vs->state == VSO_ST_CONNECTED && !vso_stream_writable(vs)) {
		vso_want_write(vs);
		mask &= ~(EPOLLOUT | EPOLLWRNORM | EPOLLWRBAND);
	}
	spin_unlock_bh(&vs->lock);
	vso_sock_put(vs);
	return mask;
}

/* --------------------------------------------------------------------------------------------------------------- the rest */

static int vso_ipx_setsockopt(struct socket *sock, int level, int name, sockptr_t val, unsigned int len)
{
	int type;

	if (len != sizeof(type))
		return -EINVAL;
	if (copy_from_sockptr(&type, val, sizeof(type)))
		return -EFAULT;
	if (level != SOL_IPX || name != VSO_IPX_TYPE)
		return -ENOPROTOOPT;
	lock_sock(sock->sk);
	vso_ipx(sock->sk)->type = type;
	release_sock(sock->sk);
	return 0;
}

static int vso_ipx_getsockopt(struct socket *sock, int level, int name, char __user *val, int __user *optlen)
{
	int len, type = READ_ONCE(vso_ipx(sock->sk)->type);

	if (level != SOL_IPX || name != VSO_IPX_TYPE)
		return -ENOPROTOOPT;
	if (get_user(len, optlen))
		return -EFAULT;
	if (len < 0)
		return -EINVAL;
	len = min_t(int, len, sizeof(type));
	return put_user(len, optlen) || copy_to_user(val, &type, len) ? -EFAULT : 0;
}

static int vso_ipx_ioctl(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	struct sock *sk = sock->sk;
	struct sk_buff *skb;
	int amount = 0;

	switch (cmd) {
	case TIOCOUTQ:
		amount = READ_ONCE(sk->sk_sndbuf);	/* of IPX it is what is free, not what is queued */
		break;
	case TIOCINQ:
		spin_lock_bh(&sk->sk_receive_queue.lock);
		skb = skb_peek(&sk->sk_receive_queue);
		amount = skb ? skb->len : 0;
		spin_unlock_bh(&sk->sk_receive_queue.lock);
		break;
	default:
		return -ENOIOCTLCMD;	/* there are no interfaces and routes to configure */
	}
	return put_user(amount, (int __user *)arg);
}

static int vso_ipx_shutdown(struct socket *sock, int how)
{
	struct sock *sk = sock->sk;

	if (how < SHUT_RD || how > SHUT_RDWR)
		return -EINVAL;
	lock_sock(sk);
	sk->sk_shutdown |= how + 1;
	release_sock(sk);
	sk->sk_state_change(sk);
	return 0;
}

static int vso_ipx_release(struct socket *sock)
{
	struct sock *sk = sock->sk;
	struct vso_sock *vs;

	if (!sk)
		return 0;
	vs = vso_sock_get(sock);
	if (vs) {
		vso_flow_close(vs, 0);
		vso_detach(vs, &vso_ipx_row.undecided);	/* nothing is queued from here on */
		vso_sock_put(vs);
	}
	sock_orphan(sk);
	sock->sk = NULL;
	skb_queue_purge(&sk->sk_receive_queue);
	sock_put(sk);
	return 0;
}

static const struct proto_ops vso_ipx_ops = {
	.family = PF_IPX,
	.release = vso_ipx_release,
	.bind = vso_ipx_bind,
	.connect = vso_ipx_connect,
	.socketpair = sock_no_socketpair,
	.accept = sock_no_accept,
	.getname = vso_ipx_getname,
	.poll = vso_ipx_poll,
	.ioctl = vso_ipx_ioctl,
	.gettstamp = sock_gettstamp,
	.listen = sock_no_listen,
	.shutdown = vso_ipx_shutdown,
	.setsockopt = vso_ipx_setsockopt,
	.getsockopt = vso_ipx_getsockopt,
	.sendmsg = vso_ipx_sendmsg,
	.recvmsg = vso_ipx_recvmsg,
	.mmap = sock_no_mmap,
	.show_fdinfo = vso_show_fdinfo,
};

static struct proto vso_ipx_proto = {
	.name = "IPX",
	.owner = THIS_MODULE,
	.obj_size = sizeof(struct vso_ipx),
};

static int vso_ipx_create(struct net *net, struct socket *sock, int protocol, int kern)
{
	struct sock *sk;

	if (!net_eq(net, &init_net))
		return -EAFNOSUPPORT;
	if (sock->type != SOCK_DGRAM)
		return -ESOCKTNOSUPPORT;
	sk = sk_alloc(net, PF_IPX, GFP_KERNEL, &vso_ipx_proto, kern);
	if (!sk)
		return -ENOMEM;
	sock_init_data(sock, sk);
	mutex_init(&vso_ipx(sk)->mutex);
	memset(&vso_ipx(sk)->peer, 0, sizeof(vso_ipx(sk)->peer));
	vso_ipx(sk)->type = 0;
	sock->ops = &vso_ipx_row.undecided;
	return 0;
}

static const struct net_proto_family vso_ipx_family = {
	.family = PF_IPX,
	.create = vso_ipx_create,
	.owner = THIS_MODULE,
};

/** vso_ipx_register() - be AF_IPX, if nobody is. What it cannot is said in the log: the module is of use without. */
void vso_ipx_register(void)
{
	int err;

	vso_ipx_row.undecided = vso_ipx_ops;
	vso_ipx_row.offloaded = vso_ipx_ops;
	err = proto_register(&vso_ipx_proto, 0);
	if (!err) {
		err = sock_register(&vso_ipx_family);
		if (err)
			proto_unregister(&vso_ipx_proto);
	}
	if (err)
		pr_info("virtio_socket: IPX sockets are not offered: %s (error %d)\n",
			err == -EEXIST ? "another module has AF_IPX" : "AF_IPX cannot be registered", err);
}
