// SPDX-License-Identifier: GPL-2.0-only
/*
 * sock_listen.c - bind, listen, accept: listeners and datagram servers that are reachable from both sides.
 *
 * bind() asks the device, which answers at once with the real port. NATIVE: bound natively, and the socket stays undecided, since a connect()
 * from it may still be the device's. OFFLOAD: the same port is bound natively as well, which reserves it in the guest and makes bind(0)
 * show one port on both sides. An address the guest does not have (EADDRNOTAVAIL) leaves the socket to the device alone.
 *
 * A datagram socket that binds to a port of its choice is a server and asks, too. With OFFLOAD it is CONNECTED at once, to no peer: datagrams
 * come from both sides, and each goes out on the side its destination is on (sock_dgram.c). bind(0) is a client's and does not ask.
 *
 * listen() then listens on both: connections over the guest's loopback and NICs arrive at the carrier, those from the host are announced
 * with ACCEPT. accept() takes from either, the device's first; there is one wait queue, and poll is the union. Both use the listener's
 * own backlog. Where the carrier is not bound its state is set to TCP_LISTEN by hand, for SO_ACCEPTCONN, and reset before it is released.
 *
 * accept() of an announced connection makes a socket through the front door (__sock_create: LSM and cgroup see it), moves its sock to
 * the socket that the caller brought, and opens the window with CREDIT: only then does the device send.
 */
#include <linux/slab.h>
#include <net/inet_connection_sock.h>
#include <net/inet_sock.h>
#include <net/tcp_states.h>

#include "vso.h"

#define VSO_BIND_TRIES	8	/* free ports of the host that are taken in the guest, in a row */

/* give up what bind() began; the socket is undecided again */
static void vso_bind_undo(struct vso_sock *vs)
{
	vso_flow_close(vs, 0);
	vso_detach(vs, &vs->row->undecided);
}

/* the device holds the address: bind the carrier to it, too. Return: as bind() */
static int vso_bind_carrier(struct vso_sock *vs, struct socket *sock, const union vso_addr *asked)
{
	union vso_addr addr = *asked;
	int err;

	if (!vso_addr_port(asked)) {
		__be16 port = vso_addr_port(&vs->local);

		if (!port)
			return -EADDRINUSE;	/* the device must name the port */
		if (addr.sa.sa_family == AF_INET6)
			addr.v6.sin6_port = port;
		else
			addr.v4.sin_port = port;
	}
	if (vs->row->type == SOCK_DGRAM) {
		vs->dests = vso_dests_new();	/* nobody looks before the state below */
		if (!vs->dests)
			return -ENOMEM;
	}
	/* with hairpin the device's side is all there is */
	err = vso_netns_hairpin(sock_net(sock->sk)) ? -EADDRNOTAVAIL : vs->row->native->bind(sock, (void *)&addr, vso_addr_len(&addr));
	if (err && err != -EADDRNOTAVAIL)
		return err;
	spin_lock_bh(&vs->lock);
	if (!vso_addr_port(&vs->local))
		vs->local = addr;
	vs->native_bound = !err;
	vs->was_bound = true;
	vs->addr_only = vs->row->type == SOCK_DGRAM;
	vs->state = vs->addr_only ? VSO_ST_CONNECTED : VSO_ST_BOUND;
	vso_flow_wake(vs, EPOLLOUT | EPOLLHUP);
	spin_unlock_bh(&vs->lock);
	if (vs->row->type == SOCK_DGRAM)
		vso_share_add(vs, sock->sk);
	return 0;
}

/*
 * Ask the device for the address. Return: as bind(); 1: natively, please; -EAGAIN: the socket changed hands, or the free port
 * of the host is not free in the guest: once more.
 */
static int vso_bind_try(const struct vso_row *row, struct socket *sock, const union vso_addr *addr)
{
	struct vso_sock *vs = vso_take(row, sock);
	int err;

	if (!vs)
		return 1;
	if (IS_ERR(vs))
		return PTR_ERR(vs);
	err = vso_open_request(vs, sock, VSO_BIND, addr, 0);
	vso_race();
	if (!err)
		err = vso_flow_wait(vs);
	vso_race();
	if (err == -ENODEV || (!err && vs->verdict == VSO_NATIVE))
		err = 1;
	else if (!err && vs->error)
		err = -(int)vs->error;
	else if (!err)
		err = vso_bind_carrier(vs, sock, addr);
	if (err == -EADDRINUSE && !vso_addr_port(addr) && !vs->error)
		err = -EAGAIN;
	if (err)
		vso_bind_undo(vs);
	vso_sock_put(vs);
	return err;
}

int vso_undecided_bind(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len)
{
	struct sock *sk = sock->sk;
	union vso_addr addr;
	enum vso_scope scope;
	int err, tries;

	if (vso_is_ping(row->protocol) || !vso_eligible(row, sk) || sk->sk_state != TCP_CLOSE || inet_sk(sk)->inet_num ||
	    len < (int)sizeof(sa_family_t) || uaddr->sa_family != row->family ||
	    vso_addr_copy(&addr, (void *)uaddr, len, row->family) < 0)
		goto native;
	if (!vso_addr_port(&addr) && (row->type == SOCK_DGRAM || vso_inet_bind_no_port(sk)) && !vso_netns_hairpin(sock_net(sk)))
		goto native;
	scope = vso_addr_scope(sock_net(sk), &addr);
	if (scope != VSO_SCOPE_ANY && scope != VSO_SCOPE_REMOTE)
		goto native;
	for (tries = 0; tries < VSO_BIND_TRIES; tries++) {
		err = vso_bind_try(row, sock, &addr);
		if (err == 1)
			goto native;
		if (err != -EAGAIN)
			return err;
		if (READ_ONCE(sock->ops) != &row->undecided)
			return vso_again(sock, bind, uaddr, len);
	}
	return -EADDRINUSE;
native:
	return row->native->bind(sock, uaddr, len);
}

/** vso_bind() - bind() of a socket that is offloaded: it is bound or connected already */
int vso_bind(struct socket *sock, vso_sockaddr *uaddr, int len)
{
	struct vso_sock *vs = vso_sock_get(sock);
	int err = -EINVAL;

	if (!vs)
		return vso_again(sock, bind, uaddr, len);
	if (READ_ONCE(vs->state) == VSO_ST_CLOSED && sock->state == SS_UNCONNECTED) {
		vso_detach(vs, &vs->row->undecided);
		err = vso_again(sock, bind, uaddr, len);
	}
	vso_sock_put(vs);
	return err;
}

/* the carrier does not listen any more; bound it stays where bind() said so */
static void vso_listen_undo(struct vso_sock *vs, struct sock *sk)
{
	lock_sock(sk);
	if (vs->native_listen)
		sk->sk_prot->disconnect(sk, O_NONBLOCK);
	release_sock(sk);
	vso_carrier_unlisten(vs, sk);
	spin_lock_bh(&vs->lock);
	vs->native_listen = false;
	if (vs->state == VSO_ST_LISTENING)
		vs->state = VSO_ST_BOUND;
	spin_unlock_bh(&vs->lock);
	vso_acceptq_flush(vs);
	vs->rcv_shut = false;	/* it may still connect */
}

/* the carrier has no address of its own to listen on: SO_ACCEPTCONN shall be true all the same */
static void vso_carrier_pretend(struct vso_sock *vs, struct sock *sk)
{
	lock_sock(sk);
	if (sk->sk_state == TCP_CLOSE) {
		inet_sk_set_state(sk, TCP_LISTEN);
		vs->hand_listen = true;
	}
	release_sock(sk);
}

/*
 * Listen on both sides; again on a listener: a new backlog. Called under req_mutex, under which alone a listener ends.
 *
 * The state is LISTENING before anything is done, so that of this and a connect() in another thread one finds the socket taken.
 * Return: as listen(); 1: the socket changed hands while we waited for the mutex.
 */
static int vso_do_listen(struct vso_sock *vs, struct socket *sock, int backlog)
{
	const struct vso_row *row = vs->row;
	struct sock *sk = sock->sk;
	bool first;
	int err;

	spin_lock_bh(&vs->lock);
	first = vs->state == VSO_ST_BOUND;
	if (!first && vs->state != VSO_ST_LISTENING) {
		err = vs->state == VSO_ST_GONE ? 1 : -EINVAL;	/* another thread's connect() was first */
		spin_unlock_bh(&vs->lock);
		return err;
	}
	vs->state = VSO_ST_LISTENING;
	vs->buf_alloc = max(backlog, 1);
	if (first) {
		vs->fwd_cnt = 0;
		vs->rcv_shut = false;
	}
	spin_unlock_bh(&vs->lock);
	if (vs->native_bound) {
		err = row->native->listen(sock, backlog);
		if (err) {
			if (first)
				vso_listen_undo(vs, sk);
			return err;
		}
		WRITE_ONCE(vs->native_listen, true);	/* accept() and poll look there from here on */
	} else if (first) {
		vso_carrier_pretend(vs, sk);
	}
	vso_race();
	err = vso_flow_request(vs, VSO_LISTEN, max(backlog, 1), NULL, 0) ?: vso_flow_wait(vs);
	vso_race();
	if (!err && !vs->error && vs->verdict == VSO_OFFLOAD)
		return 0;
	if (err == -ENODEV || (!err && vs->verdict == VSO_NATIVE)) {
		if (!vs->native_listen) {
			vso_listen_undo(vs, sk);
			return -EADDRNOTAVAIL;
		}
		/* a native listener from here on */
		vso_flow_close(vs, 0);
		vso_detach(vs, row->native);
		return 0;
	}
	if (first)
		vso_listen_undo(vs, sk);
	return err ?: -(int)vs->error;
}

int vso_listen(struct socket *sock, int backlog)
{
	struct vso_sock *vs = vso_sock_get(sock);
	int err;

	if (!vs)
		return vso_again(sock, listen, backlog);
	switch (READ_ONCE(vs->state)) {
	case VSO_ST_BOUND:
	case VSO_ST_LISTENING:
		err = -EINTR;
		if (!mutex_lock_killable(&vs->req_mutex)) {
			err = vso_do_listen(vs, sock, backlog);
			mutex_unlock(&vs->req_mutex);
			if (err == 1)
				err = vso_again(sock, listen, backlog);
		}
		break;
	case VSO_ST_CLOSED:
		err = -EINVAL;
		if (sock->state == SS_UNCONNECTED) {
			vso_detach(vs, &vs->row->undecided);
			err = vso_again(sock, listen, backlog);
		}
		break;
	case VSO_ST_GONE:
		err = vso_again(sock, listen, backlog);
		break;
	default:
		err = -EINVAL;
	}
	vso_sock_put(vs);
	return err;
}

static bool vso_accept_ready(struct vso_sock *vs, u32 arg)
{
	struct socket *sock;
	bool ready;

	if (READ_ONCE(vs->state) != VSO_ST_LISTENING || READ_ONCE(vs->acceptq_len))
		return true;
	spin_lock_bh(&vs->lock);
	sock = vs->sock;
	ready = !sock;
	spin_unlock_bh(&vs->lock);
	/* the caller of accept() holds the file, so the socket stays */
	return ready || (vs->native_listen && vs->row->native->poll(sock->file, sock, NULL) & (EPOLLIN | EPOLLERR | EPOLLHUP));
}

static struct vso_sock *vso_acceptq_pop(struct vso_sock *vs)
{
	struct vso_sock *child;

	spin_lock_bh(&vs->lock);
	child = list_first_entry_or_null(&vs->acceptq, struct vso_sock, accept_node);
	if (child) {
		list_del_init(&child->accept_node);
		vs->acceptq_len--;
	}
	spin_unlock_bh(&vs->lock);
	return child;
}

/* make the announced connection a socket. Return: 0, or -errno and the connection still waits */
static int vso_accept_child(struct vso_sock *vs, struct vso_sock *child, struct socket *sock, struct socket *newsock)
{
	const struct vso_row *row = vso_row_find(vs->row->family, SOCK_STREAM, IPPROTO_TCP);
	struct sock *sk = sock->sk, *newsk;
	struct socket *shell;
	int err;

	err = __sock_create(sock_net(sk), row->family, SOCK_STREAM, IPPROTO_TCP, &shell, 0);
	if (err)
		return err;
	newsk = shell->sk;
	vso_opts_inherit(newsk, sk);
	vso_opts_told_as(child, vs);
	sock_graft(newsk, newsock);
	shell->sk = NULL;
	sock_release(shell);

	child->row = row;
	newsock->state = SS_CONNECTED;
	WRITE_ONCE(newsock->ops, &row->undecided);
	err = vso_attach(child, newsock, &row->undecided);
	if (err)
		return err;	/* the caller releases newsock and its sock */
	spin_lock_bh(&child->lock);
	if (child->pend_err) {
		child->state = VSO_ST_CLOSED;
		WRITE_ONCE(newsk->sk_err, child->pend_err);
	} else {
		child->state = VSO_ST_CONNECTED;
	}
	spin_unlock_bh(&child->lock);
	vso_opts_sync(child, newsk, true);	/* what was set on the listener since the connection came */
	vso_flow_send(child, VSO_CREDIT, 0, NULL, 0, GFP_KERNEL);	/* opens the window */
	spin_lock_bh(&vs->lock);
	vs->fwd_cnt++;
	spin_unlock_bh(&vs->lock);
	vso_flow_send(vs, VSO_CREDIT, 0, NULL, 0, GFP_KERNEL);		/* room for one more */
	WRITE_ONCE(child->watched, READ_ONCE(vs->watched));
	vso_idle_asked(child);
	return 0;
}

int vso_accept(struct socket *sock, struct socket *newsock, VSO_ACCEPT_ARGS)
{
	struct vso_sock *vs = vso_sock_get(sock), *child;
	struct sock *sk = sock->sk;
	long timeo;
	int err;

	if (!vs)
		return vso_again(sock, accept, newsock, VSO_ACCEPT_PASS);
	/* do_accept() copied our table: whatever comes out of this, it is not the new socket's */
	WRITE_ONCE(newsock->ops, vs->row->native);
	vso_opts_sync(vs, sk, true);
	timeo = sock_rcvtimeo(sk, VSO_ACCEPT_FLAGS & O_NONBLOCK);
	for (;;) {
		if (READ_ONCE(vs->state) == VSO_ST_GONE) {
			err = vso_again(sock, accept, newsock, VSO_ACCEPT_PASS);
			break;
		}
		err = -EINVAL;
		if (READ_ONCE(vs->state) != VSO_ST_LISTENING)
			break;
		child = vso_acceptq_pop(vs);
		if (child) {
			err = vso_accept_child(vs, child, sock, newsock);
			if (err && !newsock->sk) {
				spin_lock_bh(&vs->lock);
				list_add(&child->accept_node, &vs->acceptq);
				vs->acceptq_len++;
				spin_unlock_bh(&vs->lock);
			} else {
				if (err)
					vso_flow_close(child, VSO_CLOSE_ABORT);
				vso_sock_put(child);
			}
			break;
		}
		if (vs->native_listen) {
			err = vso_accept_nonblock(vs->row->native, sock, newsock, VSO_ACCEPT_PASS);
			if (!err && vs->filter_locked)
				vso_filter_unlock(newsock->sk);		/* a native connection inherits what is the listener's alone */
			if (err != -EAGAIN)
				break;
		}
		err = vso_wait_event(vs, sk, &timeo, vso_accept_ready, 0, true);
		if (err)
			break;
	}
	vso_sock_put(vs);
	return err;
}
