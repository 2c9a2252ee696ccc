// SPDX-License-Identifier: GPL-2.0-only
/*
 * sock_dgram.c - datagram sockets: clients of a host's servers, such as a resolver.
 *
 * connect() asks the device for the peer, the first sendto() of an unconnected socket asks for its destination (VSO_OPEN_ADDR_ONLY). Both
 * wait for the answer, also on a non-blocking socket: natively they never wait, so there is nothing to poll for. After NATIVE a connected
 * socket stays undecided (getaddrinfo() connects one socket to address after address); an unconnected one is native for good, lest a
 * native server pays a round trip for each reply. A socket bound to a port of its choice is a server: bind() asked about it
 * (sock_listen.c), and what it sends afterwards is no reason to ask again.
 *
 * The carrier of an offloaded socket may be bound (a resolver binds to port 0 first) and goes on receiving: destinations in the guest are sent
 * to natively, and what arrives natively is received when the device's queue is empty.
 *
 * A client of a published server may have an address that means something else here: host's loopback is not the guest's. Such sources are
 * remembered (struct vso_peers), and what the server sends to one of them goes to the device.
 *
 * Datagrams keep their boundaries: one VSO_DGRAM is one struct vso_seg. What finds the receive buffer full is dropped, as UDP does.
 */
#include <linux/slab.h>
#include <linux/udp.h>
#include <net/inet_sock.h>
#include <net/tcp_states.h>

#include "vso.h"

#define VSO_DGRAM_MAX	65507	/* what fits an IPv4 packet: the host could not send more */

#define VSO_PEERS	64	/* a power of 2 */

/* sources on the device's side with addresses of this guest, the oldest overwritten first. Guarded by vso_sock.lock */
struct vso_peers {
	u32 next;
	union vso_addr addr[VSO_PEERS];
};

struct vso_peers *vso_peers_new(void)
{
	return kzalloc(sizeof(struct vso_peers), GFP_KERNEL_ACCOUNT);
}

static bool vso_peers_find(const struct vso_peers *peers, const union vso_addr *a)
{
	unsigned int i;

	for (i = 0; i < VSO_PEERS; i++) {
		const union vso_addr *b = &peers->addr[i];

		if (a->sa.sa_family != b->sa.sa_family || vso_addr_port(a) != vso_addr_port(b))
			continue;
		if (a->sa.sa_family == AF_INET6 ? !memcmp(&a->v6.sin6_addr, &b->v6.sin6_addr, sizeof(struct in6_addr))
						: a->v4.sin_addr.s_addr == b->v4.sin_addr.s_addr)
			return true;
	}
	return false;
}

/* Called under vs->lock, from the tasklet. */
static void vso_peers_add(struct vso_sock *vs, const union vso_addr *a)
{
	struct vso_peers *peers = vs->peers;

	if (peers && vso_addr_scope(sock_net(vs->sk), a) != VSO_SCOPE_REMOTE && !vso_peers_find(peers, a))
		peers->addr[peers->next++ % VSO_PEERS] = *a;
}

/* does a destination that is this guest's mean the other side all the same? */
static bool vso_peer_of_device(struct vso_sock *vs, const union vso_addr *a)
{
	bool found;

	spin_lock_bh(&vs->lock);
	found = vs->peers && vso_peers_find(vs->peers, a);
	spin_unlock_bh(&vs->lock);
	return found;
}

/* may this destination be the device's? */
static bool vso_dgram_asks(const struct vso_row *row, struct sock *sk, const struct sockaddr *sa, int len, union vso_addr *addr)
{
	if (!vso_eligible(row, sk) || sk->sk_state == TCP_ESTABLISHED || sk->sk_userlocks & SOCK_BINDPORT_LOCK)
		return false;
	return vso_addr_copy(addr, sa, len, row->family) > 0 && vso_addr_port(addr) &&
	       vso_addr_scope(sock_net(sk), addr) == VSO_SCOPE_REMOTE;
}

/*
 * Ask about one destination. Return: 0: the socket is offloaded; 1: natively, please; -EAGAIN: the socket changed hands; or an error.
 */
static int vso_dgram_ask(const struct vso_row *row, struct socket *sock, const union vso_addr *addr, bool addr_only,
			 const struct proto_ops *if_native)
{
	struct vso_sock *vs = vso_take(row, sock);
	int err;

	if (!vs)
		return 1;
	if (IS_ERR(vs))
		return PTR_ERR(vs);
	spin_lock_bh(&vs->lock);
	vs->state = VSO_ST_CONNECTING;
	vs->addr_only = addr_only;
	vs->target = *addr;
	vs->target_len = vso_addr_len(addr);
	spin_unlock_bh(&vs->lock);
	err = vso_open_request(vs, sock, VSO_CONNECT, addr, addr_only ? VSO_OPEN_ADDR_ONLY : 0);
	if (!err)
		err = vso_flow_wait(vs);
	if (!err && vs->error)
		err = -(int)vs->error;
	else if (!err && vs->verdict == VSO_OFFLOAD)
		goto out;
	else if (!err || err == -ENODEV)
		err = 1;
	vso_flow_close(vs, 0);
	vso_detach(vs, err == 1 ? if_native : &row->undecided);
out:
	vso_sock_put(vs);
	return err;
}

int vso_dgram_undecided_connect(const struct vso_row *row, struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	struct sock *sk = sock->sk;
	union vso_addr addr;
	int err;

	if (len < (int)sizeof(sa_family_t) || uaddr->sa_family == AF_UNSPEC || !vso_dgram_asks(row, sk, (void *)uaddr, len, &addr))
		return row->native->connect(sock, uaddr, len, flags);
	err = vso_pre_connect(sk, uaddr, len);
	if (err)
		return err;
	if (!vso_dgram_asks(row, sk, (void *)uaddr, len, &addr))	/* BPF may have written another address */
		return row->native->connect(sock, uaddr, len, flags);
	err = vso_dgram_ask(row, sock, &addr, false, &row->undecided);
	if (err == -EAGAIN)
		return vso_again(sock, connect, uaddr, len, flags);
	return err == 1 ? row->native->connect(sock, uaddr, len, flags) : err;
}

int vso_dgram_undecided_sendmsg(const struct vso_row *row, struct socket *sock, struct msghdr *msg, size_t len)
{
	union vso_addr addr;
	int err;

	if (!msg->msg_name || !vso_dgram_asks(row, sock->sk, msg->msg_name, msg->msg_namelen, &addr))
		return row->native->sendmsg(sock, msg, len);
	err = vso_dgram_ask(row, sock, &addr, true, row->native);
	if (err == 1)
		return row->native->sendmsg(sock, msg, len);
	return err && err != -EAGAIN ? err : vso_again(sock, sendmsg, msg, len);
}

/*
 * With hairpin the host's socket is the whole socket, so it is that which gets another peer, or none (AF_UNSPEC: an address without a port):
 * its address and what waits in its queue stay. Return: as connect(); 1: not now, begin anew.
 */
static int vso_dgram_reconnect(struct vso_sock *vs, struct socket *sock, const vso_sockaddr *uaddr, int len)
{
	bool none = uaddr->sa_family == AF_UNSPEC, addr_only;
	union vso_addr addr = { .sa.sa_family = vs->row->family };
	int err = none ? 0 : vso_addr_copy(&addr, (const void *)uaddr, len, vs->row->family);

	if (err < 0)
		return err;
	spin_lock_bh(&vs->lock);
	if (vs->state != VSO_ST_CONNECTED) {
		spin_unlock_bh(&vs->lock);
		return 1;
	}
	vs->state = VSO_ST_CONNECTING;
	vs->was_bound = true;		/* the flow outlives a refusal */
	addr_only = vs->addr_only;
	vs->addr_only = none;
	vs->target = addr;
	vs->target_len = vso_addr_len(&addr);
	spin_unlock_bh(&vs->lock);
	err = vso_open_request(vs, sock, VSO_CONNECT, &addr, none ? VSO_OPEN_ADDR_ONLY : 0) ?: vso_flow_wait(vs);
	if (!err && vs->verdict == VSO_NATIVE)
		err = -ENETUNREACH;
	else if (!err)
		err = -(int)vs->error;
	if (!err)
		return 0;
	spin_lock_bh(&vs->lock);
	vs->addr_only = addr_only;
	if (vs->state != VSO_ST_CLOSED && vs->state != VSO_ST_GONE)
		vs->state = VSO_ST_CONNECTED;
	spin_unlock_bh(&vs->lock);
	return err;
}

/** vso_dgram_connect() - connect() of an offloaded socket: to another peer, or to none */
int vso_dgram_connect(struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	struct vso_sock *vs = vso_sock_get(sock);
	int err = -EINVAL;

	if (!vs)
		return vso_again(sock, connect, uaddr, len, flags);
	if (READ_ONCE(vs->state) == VSO_ST_CONNECTING) {
		err = vso_flow_wait(vs);	/* another thread asks: first come, first served */
		if (err == -EINTR)
			goto out;
	}
	if (len >= (int)sizeof(sa_family_t) && vso_netns_hairpin(sock_net(sock->sk))) {
		err = vso_dgram_reconnect(vs, sock, uaddr, len);
		if (err != 1)
			goto out;
	}
	if (len >= (int)sizeof(sa_family_t)) {
		vso_flow_close(vs, 0);
		vso_detach(vs, &vs->row->undecided);
		err = vso_again(sock, connect, uaddr, len, flags);
	}
out:
	vso_sock_put(vs);
	return err;
}

/* ------------------------------------------------------------------------------------------------------------- sending */

static bool vso_dgram_send_ready(struct vso_sock *vs, u32 arg)
{
	bool ready;

	spin_lock_bh(&vs->lock);
	ready = vs->state != VSO_ST_CONNECTING && (vs->state != VSO_ST_CONNECTED || vso_stream_writable(vs));
	vs->want_write |= !ready;
	spin_unlock_bh(&vs->lock);
	return ready;
}

/* ancillary data that changes what is sent and that we cannot honour must not be ignored */
static int vso_dgram_cmsg(struct msghdr *msg)
{
	struct cmsghdr *cmsg;

	if (msg->msg_controllen)
		for_each_cmsghdr(cmsg, msg)
			if (CMSG_OK(msg, cmsg) && cmsg->cmsg_level == SOL_UDP)
				return -EOPNOTSUPP;	/* UDP_SEGMENT */
	return 0;
}

static struct vso_tx *vso_dgram_build(struct vso_sock *vs, struct msghdr *msg, size_t len, const union vso_addr *to)
{
	char uri[VSO_URI_MAX + 1];
	struct vso_dgram d = {};
	struct vso_tx *tx;
	int n = 0;

	if (to)
		n = vso_uri_format(uri, sizeof(uri), to, true);
	d.uri_len = cpu_to_le16(n);
	tx = vso_tx_new(vs, VSO_DGRAM, 0, NULL, sizeof(d) + n + len, GFP_KERNEL_ACCOUNT);
	if (!tx)
		return ERR_PTR(-ENOBUFS);
	memcpy(tx->body, &d, sizeof(d));
	memcpy(tx->body + sizeof(d), uri, n);
	if (!copy_from_iter_full(tx->body + sizeof(d) + n, len, &msg->msg_iter)) {
		vso_tx_free(tx);
		return ERR_PTR(-EFAULT);
	}
	return tx;
}

/* the host gave the flow up (port unreachable, say): ask again, as a datagram socket survives its errors */
static int vso_dgram_revive(struct vso_sock *vs, struct socket *sock)
{
	bool addr_only = vs->addr_only;
	int err;

	vso_detach(vs, &vs->row->undecided);
	if (addr_only)
		return 0;		/* sendmsg() of the undecided socket asks */
	err = vso_dgram_undecided_connect(vs->row, sock, (void *)&vs->target, vs->target_len, 0);
	return err;
}

int vso_dgram_sendmsg(struct socket *sock, struct msghdr *msg, size_t len)
{
	struct vso_sock *vs = vso_sock_get(sock);
	struct sock *sk = sock->sk;
	union vso_addr to;
	struct vso_tx *tx;
	long timeo;
	int err;

	if (!vs)
		return vso_again(sock, sendmsg, msg, len);
	err = -EMSGSIZE;
	if (len > VSO_DGRAM_MAX)
		goto out;
	err = -EOPNOTSUPP;
	if (msg->msg_flags & (MSG_OOB | MSG_MORE))
		goto out;
	err = vso_dgram_cmsg(msg);
	if (err)
		goto out;
	if (msg->msg_name) {
		err = vso_addr_copy(&to, msg->msg_name, msg->msg_namelen, vs->row->family);
		if (err < 0)
			goto out;
		err = -EINVAL;
		if (!vso_addr_port(&to))
			goto out;
		if (vso_addr_scope(sock_net(sk), &to) != VSO_SCOPE_REMOTE && !vso_peer_of_device(vs, &to)) {
			err = vs->row->native->sendmsg(sock, msg, len);
			goto out;
		}
	}
	err = sock_error(sk);
	if (err)
		goto out;
	timeo = sock_sndtimeo(sk, msg->msg_flags & MSG_DONTWAIT);
	while (!vso_dgram_send_ready(vs, 0)) {
		err = vso_wait_event(vs, sk, &timeo, vso_dgram_send_ready, 0, false);
		if (err)
			goto out;
	}
	switch (READ_ONCE(vs->state)) {
	case VSO_ST_CONNECTED:
		break;
	case VSO_ST_CLOSED:
		err = vso_dgram_revive(vs, sock);
		if (!err)
			err = vso_again(sock, sendmsg, msg, len);
		goto out;
	default:
		err = vso_again(sock, sendmsg, msg, len);
		goto out;
	}
	err = -EDESTADDRREQ;
	if (!msg->msg_name && vs->addr_only)
		goto out;
	err = -EPIPE;
	if (vs->snd_shut)
		goto out;
	tx = vso_dgram_build(vs, msg, len, msg->msg_name ? &to : NULL);
	err = PTR_ERR_OR_ZERO(tx);
	if (!err)
		err = vso_tx_submit(vs->pair, tx);
	if (err == -ENODEV)
		err = -ECONNRESET;
out:
	if (err == -EPIPE && !(msg->msg_flags & MSG_NOSIGNAL))
		send_sig(SIGPIPE, current, 0);
	vso_sock_put(vs);
	return err ? err : len;
}

/* ----------------------------------------------------------------------------------------------------------- receiving */

/** vso_rx_dgram() - a datagram came: struct vso_dgram, the source's URI, its bytes */
void vso_rx_dgram(const struct vso_msg *m)
{
	struct vso_sock *vs = m->vs;
	char uri[VSO_URI_MAX];
	struct vso_dgram d;
	struct vso_seg *seg;
	u32 uri_len, len;

	vso_msg_copy(m, 0, &d, sizeof(d));
	uri_len = le16_to_cpu(d.uri_len);
	if (uri_len > min_t(u32, m->len - sizeof(d), VSO_URI_MAX) || vs->row->type != SOCK_DGRAM)
		return;
	vso_msg_copy(m, sizeof(d), uri, uri_len);
	len = m->len - sizeof(d) - uri_len;
	spin_lock(&vs->lock);
	if ((vs->state != VSO_ST_CONNECTED && !(vs->state == VSO_ST_CONNECTING && vs->was_bound)) || vs->closing || vs->rcv_shut ||
	    !vs->sk)
		goto out;
	if (vs->rx_mem > READ_ONCE(vs->sk->sk_rcvbuf))
		goto drop;
	seg = kmalloc(sizeof(*seg) + len, GFP_ATOMIC | __GFP_NOWARN);
	if (!seg)
		goto drop;
	seg->page = NULL;
	seg->off = 0;
	seg->len = len;
	seg->cap = seg->len;
	seg->truesize = sizeof(*seg) + seg->len;
	if (!uri_len || vso_uri_parse(uri, uri_len, vs->row->family, &seg->from))
		seg->from = vs->peer;
	vso_msg_copy(m, sizeof(d) + uri_len, seg->data, len);
	vso_peers_add(vs, &seg->from);
	list_add_tail(&seg->list, &vs->rxq);
	vs->rx_bytes += seg->len;
	vs->rx_mem += seg->truesize;
	vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDBAND);
	goto out;
drop:
	vs->rx_drops++;
out:
	spin_unlock(&vs->lock);
}

/* did something arrive at the carrier, from inside the guest? */
static __poll_t vso_dgram_native(struct vso_sock *vs, struct socket *sock)
{
	if (!inet_sk(sock->sk)->inet_num)
		return 0;
	return vs->row->native->poll(sock->file, sock, NULL) & (EPOLLIN | EPOLLRDNORM);
}

static bool vso_dgram_recv_ready(struct vso_sock *vs, u32 arg)
{
	struct socket *sock;
	bool ready;

	spin_lock_bh(&vs->lock);
	sock = vs->sock;
	ready = !sock || !list_empty(&vs->rxq) || vs->rcv_shut || vs->state == VSO_ST_GONE || READ_ONCE(vs->sk->sk_err);
	spin_unlock_bh(&vs->lock);
	return ready || vso_dgram_native(vs, sock);
}

int vso_dgram_recvmsg(struct socket *sock, struct msghdr *msg, size_t len, int flags)
{
	struct vso_sock *vs = vso_sock_get(sock);
	struct sock *sk = sock->sk;
	struct vso_seg *seg = NULL;
	long timeo;
	u32 n;
	int err;

	if (!vs)
		return vso_again(sock, recvmsg, msg, len, flags);
	timeo = sock_rcvtimeo(sk, flags & MSG_DONTWAIT);
	if (flags & MSG_ERRQUEUE) {
		err = vs->row->native->recvmsg(sock, msg, len, flags);
		goto out;
	}
	for (;;) {
		mutex_lock(&vs->recv_mutex);
		spin_lock_bh(&vs->lock);
		seg = list_first_entry_or_null(&vs->rxq, struct vso_seg, list);
		if (seg && !(flags & MSG_PEEK)) {
			list_del(&seg->list);
			vs->rx_bytes -= seg->len;
			vs->rx_mem -= seg->truesize;
		}
		spin_unlock_bh(&vs->lock);
		if (seg)
			break;
		mutex_unlock(&vs->recv_mutex);
		if (READ_ONCE(vs->state) == VSO_ST_GONE) {
			err = vso_again(sock, recvmsg, msg, len, flags);
			goto out;
		}
		err = sock_error(sk);
		if (err || vs->rcv_shut)
			goto out;
		if (vso_dgram_native(vs, sock)) {
			err = vs->row->native->recvmsg(sock, msg, len, flags | MSG_DONTWAIT);
			if (err != -EAGAIN)
				goto out;
		}
		err = vso_wait_event(vs, sk, &timeo, vso_dgram_recv_ready, 0, false);
		if (err)
			goto out;
	}
	n = min_t(size_t, seg->len, len);
	if (n < seg->len)
		msg->msg_flags |= MSG_TRUNC;
	err = copy_to_iter(seg->data, n, &msg->msg_iter) == n ? (flags & MSG_TRUNC ? seg->len : n) : -EFAULT;
	if (err >= 0 && msg->msg_name) {
		memcpy(msg->msg_name, &seg->from, vso_addr_len(&seg->from));
		msg->msg_namelen = vso_addr_len(&seg->from);
	}
	mutex_unlock(&vs->recv_mutex);
	if (!(flags & MSG_PEEK))
		vso_seg_free(seg);
out:
	vso_sock_put(vs);
	return err;
}

/* ------------------------------------------------------------------------------------------------------ poll, shutdown */

__poll_t vso_dgram_poll(struct file *file, struct socket *sock, struct poll_table_struct *wait)
{
	struct vso_sock *vs;
	__poll_t mask = 0;

	sock_poll_wait(file, sock, wait);
	vs = vso_sock_get(sock);
	if (!vs)
		return vso_again_poll(sock, file);
	spin_lock_bh(&vs->lock);
	if (!list_empty(&vs->rxq))
		mask |= EPOLLIN | EPOLLRDNORM;
	if (vs->rcv_shut)
		mask |= EPOLLIN | EPOLLRDNORM | EPOLLRDHUP;
	if (vs->rcv_shut && vs->snd_shut)
		mask |= EPOLLHUP;
	if (READ_ONCE(sock->sk->sk_err))
		mask |= EPOLLERR;
	if (vso_stream_writable(vs))
		mask |= EPOLLOUT | EPOLLWRNORM | EPOLLWRBAND;
	else
		vs->want_write = true;
	spin_unlock_bh(&vs->lock);
	if (READ_ONCE(vs->state) == VSO_ST_GONE)
		mask = vso_again_poll(sock, file);
	else
		mask |= vso_dgram_native(vs, sock);
	vso_sock_put(vs);
	return mask;
}

int vso_dgram_shutdown(struct socket *sock, int how)
{
	struct vso_sock *vs = vso_sock_get(sock);
	int err = 0;

	if (!vs)
		return vso_again(sock, shutdown, how);
	how++;
	spin_lock_bh(&vs->lock);
	if (how < 1 || how > 3)
		err = -EINVAL;
	else if (vs->addr_only)
		err = -ENOTCONN;
	if (!err) {
		vs->rcv_shut |= !!(how & RCV_SHUTDOWN);
		vs->snd_shut |= !!(how & SEND_SHUTDOWN);
		vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDHUP | EPOLLOUT | (vs->rcv_shut && vs->snd_shut ? EPOLLHUP : 0));
	}
	spin_unlock_bh(&vs->lock);
	vso_sock_put(vs);
	return err;
}
