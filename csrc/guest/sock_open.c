// SPDX-License-Identifier: GPL-2.0-only
/*
 * sock_open.c - undecided sockets, and connect().
 *
 * The four operations of the undecided table decide. What is clearly not the device's (loopback, an address of this guest, a socket of
 * the kernel, another network namespace, a socket tied to an interface, a destination that the device named native beforehand
 * (hints.c), no device) goes to the native table at once. For a stream
 * socket the native table is put back *before* the native call, with cmpxchg, so that of two racing threads one decides; when the
 * native connect fails, the socket becomes undecided again. A caller that did not wait hears of it from a second connect(), as ever: hence
 * row->trying.
 *
 * What may be the device's is taken over (vso_take) and asked for, one round trip. The answer:
 *
 *   OFFLOAD          the socket is CONNECTED
 *   OFFLOAD, DENY    with an errno: connect() fails with it, and the socket is undecided again
 *   NATIVE           a work item does the native connect, non-blocking, on the same socket and gives the native table back. It must
 *                    be a work item: a non-blocking caller is long gone. A blocking caller then waits in the native connect().
 *
 * connect() of an offloaded socket follows __inet_stream_connect() in what it returns when: sock->state tells, as there, whether the
 * application has heard of the outcome (SS_CONNECTING until a connect() call reported it).
 */
#include <linux/cred.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/tcp.h>
#include <net/inet_connection_sock.h>
#include <net/inet_sock.h>
#include <net/net_namespace.h>
#include <net/tcp_states.h>

#include "vso.h"

unsigned int vso_window = 512 * 1024;

/*
 * Users inside the kernel call around our table, so their sockets must be native. Not all say that they are such users (nvme-tcp in 6.1 and
 * 6.12), but a program's socket has a file, and may wait for memory.
 */
static bool vso_is_kernels(const struct sock *sk)
{
	return sk->sk_kern_sock || !sk->sk_socket || !sk->sk_socket->file || sk->sk_allocation != GFP_KERNEL;
}

/* bound to an address that nobody has given this guest (yet): the host would not send from it */
static bool vso_bound_freely(const struct vso_row *row, struct sock *sk)
{
	union vso_addr addr = {};

	return vso_inet_freebind(sk) && inet_sk(sk)->inet_num && !vso_netns_hairpin(sock_net(sk)) &&
	       row->native->getname(sk->sk_socket, &addr.sa, 0) > 0 && vso_addr_scope(sock_net(sk), &addr) == VSO_SCOPE_REMOTE;
}

/**
 * vso_eligible() - may the device be asked about this socket at all?
 *
 * Not for sockets of the kernel, of other network namespaces (a container without a network must not gain one), or with
 * properties that only the guest's own stack can honour.
 */
bool vso_eligible(const struct vso_row *row, struct sock *sk)
{
	if (!sk || vso_is_kernels(sk) || !vso_netns_offered(sock_net(sk)))
		return false;
	if (vso_opts_tied(sk) || vso_inet_transparent(sk))
		return false;
	if (rcu_access_pointer(sk->sk_filter) || rcu_access_pointer(sk->sk_user_data))	/* BPF filters, sockmap */
		return false;
	if (row->protocol == IPPROTO_TCP && (inet_csk(sk)->icsk_ulp_ops || tcp_sk(sk)->repair))
		return false;
	return !vso_bound_freely(row, sk);
}

/* what the device must know of, to serve datagrams of this kind */
static u64 vso_row_feature(const struct vso_row *row)
{
	if (row->family == PF_IPX)
		return VSO_F_IPX;
	return vso_is_ping(row->protocol) ? VSO_F_PING : VSO_F_DGRAM;
}

/**
 * vso_take() - take an undecided socket over
 *
 * Return: its new state with a reference for the caller; NULL: no device or no memory, so native; ERR_PTR(-EAGAIN): somebody else
 * decided, read sock->ops again.
 */
struct vso_sock *vso_take(const struct vso_row *row, struct socket *sock)
{
	struct vso_dev *dev = vso_dev_get();
	struct vso_sock *vs;
	int err;

	if (!dev)
		return NULL;
	if (row->type == SOCK_DGRAM && !(dev->features & vso_row_feature(row))) {
		vso_dev_put(dev);
		return NULL;
	}
	vs = vso_sock_new(row, dev, GFP_KERNEL_ACCOUNT);
	if (!vs)
		return NULL;
	vs->state = VSO_ST_BINDING;	/* whoever comes now waits */
	while ((err = vso_attach(vs, sock, &row->undecided)) == -EEXIST) {
		if (READ_ONCE(sock->ops) != &row->undecided) {
			err = -EAGAIN;
			break;
		}
		cond_resched();		/* the other thread is a few instructions from done */
	}
	if (!err)
		return vs;
	vso_sock_put(vs);
	return err == -EAGAIN ? ERR_PTR(err) : NULL;
}

/**
 * vso_open_request() - send CONNECT or BIND
 *
 * Opens the flow unless BIND did. On failure the flow is forgotten if this call opened it. Return: 0, -ENODEV, -ENOMEM, -ENFILE.
 */
int vso_open_request(struct vso_sock *vs, struct socket *sock, u16 type, const union vso_addr *addr, u16 flags)
{
	bool opened = false;
	struct sock *sk = sock->sk;
	union vso_addr local = {};
	struct vso_open *open;
	u8 *buf, *p;
	int err, n;

	buf = kzalloc(sizeof(*open) + 2 * (VSO_URI_MAX + 1) + VSO_OPTS_MAX + VSO_NETNS_MAX + 1, GFP_KERNEL);
	if (!buf)
		return -ENOMEM;
	open = (struct vso_open *)buf;
	p = buf + sizeof(*open);
	n = vso_uri_format(p, VSO_URI_MAX + 1, addr, vs->row->protocol);
	open->uri_len = cpu_to_le16(n);
	p += n;
	if (type == VSO_CONNECT && inet_sk(sk)->inet_num &&
	    vs->row->native->getname(sock, (struct sockaddr *)&local, 0) > 0) {
		n = vso_uri_format(p, VSO_URI_MAX + 1, &local, vs->row->protocol);
		open->local_len = cpu_to_le16(n);
		p += n;
	}
	n = vs->row->family == PF_IPX ? 0 : vso_opts_build(sk, vs->row, type == VSO_BIND, p, VSO_OPTS_MAX);
	vso_opts_told(vs, sk);
	if (type == VSO_CONNECT) {
		vs->promised = 0;	/* the flow, if BIND opened it, has had no other window */
		vso_window_set(vs, vso_opts_window(sk));
	}
	open->opts_len = cpu_to_le16(n);
	p += n;
	open->flags = cpu_to_le16(flags);
	if (!net_eq(sock_net(sk), &init_net)) {
		open->netns = cpu_to_le64(sock_net(sk)->ns.inum);
		n = vso_netns_name(sock_net(sk), p);
		open->name_len = cpu_to_le16(n);
		p += n;
	}
	open->uid = cpu_to_le32(from_kuid(&init_user_ns, current_fsuid()));
	open->pid = cpu_to_le32(task_tgid_nr(current));
	get_task_comm(open->comm, current);
	if (sk->sk_userlocks & SOCK_SNDBUF_LOCK)
		open->sndbuf = cpu_to_le32(READ_ONCE(sk->sk_sndbuf));
	if (sk->sk_userlocks & SOCK_RCVBUF_LOCK)
		open->rcvbuf = cpu_to_le32(READ_ONCE(sk->sk_rcvbuf));

	if (!READ_ONCE(vs->flow_open)) {
		err = vso_flow_open(vs);
		opened = !err;
		if (err)
			goto out;
	}
	err = vso_flow_request(vs, type, 0, buf, p - buf);
	if (err && opened)
		vso_flow_forget(vs);
	if (opened)
		vso_flow_opened(vs);
out:
	kfree(buf);
	return err;
}

/**
 * vso_pre_connect() - what runs before a native connect: the cgroup's BPF programs
 *
 * They may refuse, or rewrite the address in place. They run once more should the connect become native.
 */
int vso_pre_connect(struct sock *sk, vso_sockaddr *uaddr, int len)
{
	int err;

	if (!sk->sk_prot->pre_connect)
		return 0;
	if (sk->sk_type == SOCK_DGRAM)		/* takes the lock itself where a program is attached, as inet_dgram_connect() knows */
		return sk->sk_prot->pre_connect(sk, (void *)uaddr, len);
	lock_sock(sk);
	err = sk->sk_prot->pre_connect(sk, (void *)uaddr, len);
	release_sock(sk);
	return err;
}

/* nothing came of a native call: undecided again, unless another thread's came to something. Its listen() holds the lock, too */
static void vso_undecide(const struct vso_row *row, struct socket *sock)
{
	struct sock *sk = sock->sk;

	vso_race();
	lock_sock(sk);
	if (sock->state == SS_UNCONNECTED && sk->sk_state == TCP_CLOSE)
		cmpxchg(&sock->ops, row->native, &row->undecided);
	release_sock(sk);
}

/*
 * A native connect() returned: which native table is it now? Nothing came of it: undecided again; it is under way, and the next connect() tells
 * what came of it: trying; else native. The kernel's own sockets get no table of ours.
 */
static void vso_native_settle(const struct vso_row *row, struct socket *sock)
{
	const struct proto_ops *from = READ_ONCE(sock->ops), *to = row->native;
	struct sock *sk = sock->sk;

	if (from != row->native && from != &row->trying)
		return;
	vso_race();
	lock_sock(sk);
	if (sock->state == SS_UNCONNECTED && sk->sk_state == TCP_CLOSE)
		to = &row->undecided;
	else if (sock->state == SS_CONNECTING && row->type == SOCK_STREAM && !vso_is_kernels(sk))
		to = &row->trying;
	cmpxchg(&sock->ops, from, to);
	release_sock(sk);
}

/* connect() of a socket that has its native table */
static int vso_native_connect(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	int err = row->native->connect(sock, uaddr, len, flags);

	if (err)
		vso_native_settle(row, sock);
	return err;
}

/** vso_trying_connect() - connect() again, natively: what came of the one that is under way, or AF_UNSPEC */
int vso_trying_connect(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	int err = row->native->connect(sock, uaddr, len, flags);

	vso_native_settle(row, sock);
	return err;
}

/* the native table is back before the native call */
static int vso_commit_connect(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	vso_race();
	if (cmpxchg(&sock->ops, &row->undecided, row->native) != &row->undecided)
		return vso_again(sock, connect, uaddr, len, flags);
	vso_race();
	return vso_native_connect(row, sock, uaddr, len, flags);
}

static bool vso_connect_done(struct vso_sock *vs, u32 arg)
{
	switch (READ_ONCE(vs->state)) {
	case VSO_ST_BINDING:
	case VSO_ST_CONNECTING:
	case VSO_ST_NATIVE:
		return false;
	default:
		return true;
	}
}

static bool vso_not_binding(struct vso_sock *vs, u32 arg)
{
	return READ_ONCE(vs->state) != VSO_ST_BINDING;
}

/* connect() that is under way: wait as the caller wishes, then say how it went. @err: what an unfinished one returns */
static int vso_connect_wait(struct vso_sock *vs, struct socket *sock, int flags, int err)
{
	long timeo = sock_sndtimeo(sock->sk, flags & O_NONBLOCK);
	const struct vso_row *row = vs->row;
	struct sock *sk = sock->sk;
	int wait;

	if (!timeo) {
		vso_idle_ask(vs->pair);
		return err;
	}
	wait = vso_poll_request(vs, vso_connect_done, 0) ? 0 : vso_wait_event(vs, sk, &timeo, vso_connect_done, 0, false);
	vso_race();
	if (wait)
		return wait == -EAGAIN ? err : wait;
	switch (READ_ONCE(vs->state)) {
	case VSO_ST_CONNECTED:
		sock->state = SS_CONNECTED;
		return 0;
	case VSO_ST_GONE:
		if (READ_ONCE(sock->ops) == row->native || READ_ONCE(sock->ops) == &row->trying)
			return vso_native_connect(row, sock, (void *)&vs->target, vs->target_len, flags);
		return sock_error(sk) ?: -ECONNABORTED;
	case VSO_ST_CLOSED:
		err = sock_error(sk) ?: -ECONNABORTED;
		sock->state = SS_UNCONNECTED;
		vso_flow_close(vs, VSO_CLOSE_ABORT);	/* shutdown() may have come before the flow was open */
		vso_detach(vs, &row->undecided);
		return err;
	default:
		sock->state = SS_UNCONNECTED;	/* bound, as before */
		return sock_error(sk) ?: -ECONNABORTED;
	}
}

/* ask for a connection, from one of the two states in which the socket may be: just taken over (BINDING), or BOUND */
static int vso_connect_start(struct vso_sock *vs, enum vso_state from, struct socket *sock, const union vso_addr *addr,
			     vso_sockaddr *uaddr, int len, int flags)
{
	int err;

	spin_lock_bh(&vs->lock);
	if (vs->state != from) {
		spin_unlock_bh(&vs->lock);
		return -EALREADY;	/* another thread was first */
	}
	vs->state = VSO_ST_CONNECTING;
	vs->target = *addr;
	vs->target_len = vso_addr_len(addr);
	spin_unlock_bh(&vs->lock);
	vso_race();
	sock->state = SS_CONNECTING;
	err = vso_open_request(vs, sock, VSO_CONNECT, addr, 0);
	vso_race();
	if (err) {
		/* nothing was asked: as if there were no device */
		sock->state = SS_UNCONNECTED;
		vso_flow_close(vs, 0);
		vso_detach(vs, &vs->row->undecided);
		return vso_commit_connect(vs->row, sock, uaddr, len, flags);
	}
	return vso_connect_wait(vs, sock, flags, -EINPROGRESS);
}

int vso_undecided_connect(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	struct sock *sk = sock->sk;
	union vso_addr addr;
	struct vso_sock *vs;
	int err;

	if (row->type == SOCK_DGRAM)
		return vso_dgram_undecided_connect(row, sock, uaddr, len, flags);
	if (len >= (int)sizeof(sa_family_t) && uaddr->sa_family == AF_UNSPEC)
		return row->native->connect(sock, uaddr, len, flags);
	if (!vso_eligible(row, sk) || sk->sk_state != TCP_CLOSE || sock->state != SS_UNCONNECTED ||
	    len < (int)sizeof(sa_family_t) || uaddr->sa_family != row->family)
		goto native;
	err = vso_pre_connect(sk, uaddr, len);
	if (err)
		return err;
	if (vso_addr_copy(&addr, (void *)uaddr, len, row->family) < 0 || !vso_addr_port(&addr) ||
	    vso_addr_scope(sock_net(sk), &addr) != VSO_SCOPE_REMOTE || vso_hinted_native(row, sock_net(sk), &addr))
		goto native;
	vs = vso_take(row, sock);
	if (!vs)
		goto native;
	if (IS_ERR(vs))
		return vso_again(sock, connect, uaddr, len, flags);
	if (READ_ONCE(sk->sk_state) != TCP_CLOSE) {	/* another thread has listened since we looked */
		vso_detach(vs, row->native);
		vso_sock_put(vs);
		return vso_again(sock, connect, uaddr, len, flags);
	}
	err = vso_connect_start(vs, VSO_ST_BINDING, sock, &addr, uaddr, len, flags);
	vso_sock_put(vs);
	return err;
native:
	return vso_commit_connect(row, sock, uaddr, len, flags);
}

int vso_undecided_listen(const struct vso_row *row, struct socket *sock, int backlog)
{
	union vso_addr any = { .sa.sa_family = row->family };
	struct sock *sk = sock->sk;
	int err;

	if (row->type != SOCK_STREAM)
		return row->native->listen(sock, backlog);
	/* not bound yet: listen() binds to any address and a free port, and that is the device's to know */
	if (vso_eligible(row, sk) && sk->sk_state == TCP_CLOSE && sock->state == SS_UNCONNECTED && !inet_sk(sk)->inet_num) {
		err = vso_undecided_bind(row, sock, (void *)&any, vso_addr_len(&any));
		if (err)
			return err;
		if (READ_ONCE(sock->ops) != &row->undecided)
			return vso_again(sock, listen, backlog);
	}
	if (cmpxchg(&sock->ops, &row->undecided, row->native) != &row->undecided)
		return vso_again(sock, listen, backlog);
	err = row->native->listen(sock, backlog);
	if (err)
		vso_undecide(row, sock);
	return err;
}

int vso_undecided_sendmsg(const struct vso_row *row, struct socket *sock, struct msghdr *msg, size_t len)
{
	int err;

	if (row->type == SOCK_DGRAM)
		return vso_dgram_undecided_sendmsg(row, sock, msg, len);
	/* TCP Fast Open: connect and send in one call. The device connects in one round trip anyway. */
	if (!(msg->msg_flags & MSG_FASTOPEN) || !msg->msg_name || msg->msg_namelen <= 0)
		return row->native->sendmsg(sock, msg, len);
	err = vso_undecided_connect(row, sock, msg->msg_name, msg->msg_namelen, msg->msg_flags & MSG_DONTWAIT ? O_NONBLOCK : 0);
	if (err)
		return err;
	msg->msg_flags &= ~MSG_FASTOPEN;
	msg->msg_name = NULL;
	msg->msg_namelen = 0;
	return vso_again(sock, sendmsg, msg, len);
}

/* connect(AF_UNSPEC): dissolve the connection, the socket can be used anew */
static int vso_disconnect(struct vso_sock *vs, struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	struct sock *sk = sock->sk;

	if (!vso_native_cancel(vs))
		return vso_again(sock, connect, uaddr, len, flags);
	vso_flow_close(vs, VSO_CLOSE_ABORT);
	vso_race();
	mutex_lock(&vs->req_mutex);	/* behind a listen() in another thread, which the closed flow ends */
	vso_acceptq_flush(vs);
	vso_carrier_unlisten(vs, sk);
	sk->sk_err = 0;
	sock->state = SS_UNCONNECTED;
	vso_detach_sync(vs, &vs->row->undecided);
	mutex_unlock(&vs->req_mutex);
	return vs->row->native->connect(sock, uaddr, len, flags);
}

/** vso_connect() - connect() of an offloaded stream socket */
int vso_connect(struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	struct vso_sock *vs = vso_sock_get(sock);
	struct sock *sk = sock->sk;
	union vso_addr addr;
	int err;

	if (!vs)
		return vso_again(sock, connect, uaddr, len, flags);
	if (len < (int)sizeof(sa_family_t)) {
		err = -EINVAL;
		goto out;
	}
	if (uaddr->sa_family == AF_UNSPEC) {
		err = vso_disconnect(vs, sock, uaddr, len, flags);
		goto out;
	}
	if (READ_ONCE(vs->state) == VSO_ST_BINDING) {
		long timeo = MAX_SCHEDULE_TIMEOUT;	/* another thread's bind(), which natively would hold the socket */

		err = vso_wait_event(vs, sk, &timeo, vso_not_binding, 0, false);
		if (err)
			goto out;
	}
	spin_lock_bh(&vs->lock);
	switch (vs->state) {
	case VSO_ST_CONNECTING:
	case VSO_ST_NATIVE:
		spin_unlock_bh(&vs->lock);
		err = vso_connect_wait(vs, sock, flags, -EALREADY);
		goto out;
	case VSO_ST_CONNECTED:
		err = sock->state == SS_CONNECTING ? 0 : -EISCONN;
		sock->state = SS_CONNECTED;
		break;
	case VSO_ST_CLOSED:
		if (sock->state == SS_CONNECTED) {
			err = -EISCONN;
			break;
		}
		spin_unlock_bh(&vs->lock);
		err = vso_connect_wait(vs, sock, 0, -EALREADY);	/* it is over: does not wait */
		goto out;
	case VSO_ST_BOUND:
		spin_unlock_bh(&vs->lock);
		err = uaddr->sa_family == vs->row->family ? vso_addr_copy(&addr, (void *)uaddr, len, vs->row->family) : -EAFNOSUPPORT;
		if (err < 0)
			goto out;
		if (READ_ONCE(vs->dead) || vso_addr_scope(sock_net(sk), &addr) != VSO_SCOPE_REMOTE) {
			/* the guest's own business; the carrier is bound where that was possible */
			vso_flow_close(vs, 0);
			vso_detach(vs, &vs->row->undecided);
			err = vso_commit_connect(vs->row, sock, uaddr, len, flags);
			goto out;
		}
		err = vso_pre_connect(sk, uaddr, len) ?:
		      vso_connect_start(vs, VSO_ST_BOUND, sock, &addr, uaddr, len, flags);
		goto out;
	case VSO_ST_GONE:
		spin_unlock_bh(&vs->lock);
		err = vso_again(sock, connect, uaddr, len, flags);
		goto out;
	default:
		err = -EISCONN;
	}
	spin_unlock_bh(&vs->lock);
out:
	vso_sock_put(vs);
	return err;
}

/** vso_native_work() - the device said NATIVE: connect natively on behalf of a caller who may have left */
void vso_native_work(struct work_struct *work)
{
	struct vso_sock *vs = container_of(work, struct vso_sock, work);
	const struct vso_row *row = vs->row;
	struct socket *sock;
	int err;

	spin_lock_bh(&vs->lock);
	sock = vs->state == VSO_ST_NATIVE ? vs->sock : NULL;	/* stays: release waits for this work, vso_detach_sync() */
	spin_unlock_bh(&vs->lock);
	vso_race();
	if (sock) {
		vso_flow_close(vs, 0);
		vso_race();
		sock->state = SS_UNCONNECTED;
		err = row->native->connect(sock, (void *)&vs->target, vs->target_len, O_NONBLOCK);
		if (err && err != -EINPROGRESS) {
			WRITE_ONCE(sock->sk->sk_err, -err);
			vso_detach(vs, &row->undecided);
		} else {
			vso_detach(vs, err ? &row->trying : row->native);
		}
	}
	vso_sock_put(vs);
}

/**
 * vso_native_cancel() - make sure that no native fallback runs or will run
 *
 * Return: false when one ran and the socket has other ops by now.
 */
bool vso_native_cancel(struct vso_sock *vs)
{
	if (cancel_work_sync(&vs->work))
		vso_sock_put(vs);
	return READ_ONCE(vs->state) != VSO_ST_GONE;
}

/**
 * vso_detach_sync() - vso_detach(), and no native fallback touches the socket from here on
 *
 * The device may say NATIVE until the flow is closed, so after any vso_native_cancel() that came before. A fallback that starts now finds
 * the socket gone; one that had it in hand is waited for, and may have been first to detach. May sleep; not for that work itself.
 */
void vso_detach_sync(struct vso_sock *vs, const struct proto_ops *to)
{
	vso_detach(vs, to);
	if (cancel_work_sync(&vs->work))
		vso_sock_put(vs);
}
