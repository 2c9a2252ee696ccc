// SPDX-License-Identifier: GPL-2.0-only
/*
 * sock_dgram.c - datagram sockets: taking them over, connecting, sending. dgram_recv.c receives, dgram_dest.c says where
 * datagrams go, dgram_share.c whose they are where sockets share a port.
 *
 * connect() asks the device for the peer, the first sendto() of an unconnected socket asks for its destination (VSO_OPEN_ADDR_ONLY). Both
 * wait for the answer, also on a non-blocking socket: natively they never wait, so there is nothing to poll for. After NATIVE a connected
 * socket stays undecided (getaddrinfo() connects one socket to address after address); an unconnected one is native for good, lest a
 * native server pays a round trip for each reply. A socket bound to a port of its choice is a server: bind() asked about it
 * (sock_listen.c), and what it sends afterwards is no reason to ask again.
 *
 * The carrier of an offloaded socket may be bound (a resolver binds to port 0 first) and goes on receiving: destinations in the guest, and
 * those that the policy leaves native, are sent to natively, and what arrives natively is received when the device's queue is empty.
 *
 * connect() of an offloaded socket that has no peer keeps the host's socket, and so its port: the peer is remembered (vso_sock.conn) and
 * who else sends is not heard. To the host it stays unconnected; the errors of its datagrams come all the same.
 *
 * Datagrams keep their boundaries: one VSO_DGRAM is one skb. What finds the receive buffer full is dropped, as UDP does.
 */
#include <linux/slab.h>
#include <linux/udp.h>
#include <net/inet_sock.h>
#include <net/ipv6.h>
#include <net/tcp_states.h>

#include "vso.h"

#define VSO_DGRAM_MAX	65507	/* what fits an IPv4 packet: the host could not send more */
#define VSO_DGRAM6_MAX	65527
#define VSO_NATIVELY	0x100000	/* more than any datagram has bytes: shall be sent natively */

/* a destination needs a port, and an echo request must have none here, so that one destination has one name */
static bool vso_dgram_port(const struct vso_row *row, union vso_addr *addr)
{
	if (!vso_is_ping(row->protocol))
		return vso_addr_port(addr);
	if (addr->sa.sa_family == AF_INET6)
		addr->v6.sin6_port = 0;
	else
		addr->v4.sin_port = 0;
	return true;
}

/* may this destination be the device's? */
static bool vso_dgram_asks(const struct vso_row *row, struct sock *sk, const struct sockaddr *sa, int len, union vso_addr *addr)
{
	if (!vso_eligible(row, sk) || sk->sk_state == TCP_ESTABLISHED || sk->sk_userlocks & SOCK_BINDPORT_LOCK)
		return false;
	return vso_addr_copy(addr, sa, len, row->family) > 0 && vso_dgram_port(row, addr) &&
	       vso_addr_scope(sock_net(sk), addr) == VSO_SCOPE_REMOTE && !vso_hinted_native(row, sock_net(sk), addr);
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

/*
 * A socket without a peer gets one, or loses it again (AF_UNSPEC), and keeps its flow. Return: as connect(); 1: not for this socket, begin
 * anew.
 */
static int vso_dgram_connect_here(struct vso_sock *vs, struct socket *sock, vso_sockaddr *uaddr, int len, int flags)
{
	int where = 0, was = READ_ONCE(vs->conn), err;
	struct sock *sk = sock->sk;
	union vso_addr addr = {};

	if (uaddr->sa_family == AF_UNSPEC) {
		if (!vs->was_bound)
			return 1;	/* natively, too, it loses its port */
	} else {
		err = vso_addr_copy(&addr, (void *)uaddr, len, vs->row->family);
		if (err >= 0)
			err = vso_pre_connect(sk, uaddr, len);
		if (err)
			return err;
		vso_addr_copy(&addr, (void *)uaddr, len, vs->row->family);	/* BPF may have written another address */
		where = vso_dgram_port(vs->row, &addr) ? vso_dest_where(vs, sk, &addr) : VSO_TO_NATIVE;
		if (where < 0)
			return where;
		if (where == VSO_TO_NATIVE && !vs->was_bound)
			return 1;
	}
	if (where == VSO_TO_NATIVE || was == VSO_TO_NATIVE) {
		struct sockaddr none = { .sa_family = AF_UNSPEC };
		void *to = where == VSO_TO_NATIVE ? (void *)uaddr : (void *)&none;

		err = vs->row->native->connect(sock, to, where == VSO_TO_NATIVE ? len : (int)sizeof(none), flags);
		if (err)
			return err;
	}
	spin_lock_bh(&vs->lock);
	WRITE_ONCE(vs->conn, where);
	vs->peer = addr;
	vs->snd_shut = vs->rcv_shut = false;
	spin_unlock_bh(&vs->lock);
	return 0;
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
	if (len >= (int)sizeof(sa_family_t) && vs->addr_only && READ_ONCE(vs->state) == VSO_ST_CONNECTED) {
		err = vso_dgram_connect_here(vs, sock, uaddr, len, flags);
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

/** vso_dgram_send_ready() - is there room for a datagram, or no use in waiting? */
bool vso_dgram_send_ready(struct vso_sock *vs, u32 arg)
{
	bool ready;

	spin_lock_bh(&vs->lock);
	ready = vs->state != VSO_ST_CONNECTING && (vs->state != VSO_ST_CONNECTED || vso_stream_writable(vs));
	if (!ready)
		vso_want_write(vs);
	spin_unlock_bh(&vs->lock);
	return ready;
}

/* how one datagram shall be sent: what the control messages say, and the options that are the carrier's alone */
struct vso_how {
	u16 flags;		/* VSO_DG_* */
	u16 segment;
	u8 ttl, tos;
	bool native;		/* over an interface of the guest */
	struct in6_addr local;
};

static int vso_cmsg_int(const struct cmsghdr *cmsg, int low, int high, int *value)
{
	if (cmsg->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(value, CMSG_DATA((struct cmsghdr *)cmsg), sizeof(int));
	else if (cmsg->cmsg_level == SOL_IP && cmsg->cmsg_type == IP_TOS && cmsg->cmsg_len == CMSG_LEN(1))
		*value = *(u8 *)CMSG_DATA((struct cmsghdr *)cmsg);
	else
		return -EINVAL;
	return *value < low || *value > high ? -EINVAL : 0;
}

/* the address and interface to send from: only where something came in, unless they are the guest's */
static int vso_how_from(struct vso_sock *vs, struct sock *sk, struct vso_how *how, const struct in6_addr *in6, int ifindex)
{
	union vso_addr a = { .v6 = { .sin6_family = AF_INET6, .sin6_addr = *in6 } };

	how->native |= ifindex && ifindex != LOOPBACK_IFINDEX;
	if (ipv6_addr_any(in6) || (ipv6_addr_v4mapped(in6) && !in6->s6_addr32[3]))
		return 0;
	if (vso_local_known(vs, in6)) {
		how->flags |= VSO_DG_LOCAL;
		how->local = *in6;
		return 0;
	}
	return vso_addr_scope(sock_net(sk), &a) == VSO_SCOPE_LOCAL ? 0 : -EINVAL;
}

/* one control message, with the answers of ip_cmsg_send(), ip6_datagram_send_ctl() and udp_cmsg_send() */
static int vso_how_cmsg(struct vso_sock *vs, struct sock *sk, struct vso_how *how, const struct cmsghdr *cmsg)
{
	const void *data = CMSG_DATA((struct cmsghdr *)cmsg);
	struct in6_pktinfo info6;
	struct in_pktinfo info;
	int err, value = 0;

	if (cmsg->cmsg_level == SOL_SOCKET)
		return cmsg->cmsg_type == SCM_RIGHTS || cmsg->cmsg_type == SCM_CREDENTIALS ? 0 : -EINVAL;
	if (cmsg->cmsg_level == SOL_UDP) {
		if (cmsg->cmsg_type != UDP_SEGMENT || cmsg->cmsg_len != CMSG_LEN(sizeof(u16)))
			return -EINVAL;
		memcpy(&how->segment, data, sizeof(u16));
		return 0;
	}
	if (cmsg->cmsg_level == SOL_IP) {
		switch (cmsg->cmsg_type) {
		case IP_PKTINFO:
			if (cmsg->cmsg_len != CMSG_LEN(sizeof(info)))
				return -EINVAL;
			memcpy(&info, data, sizeof(info));
			ipv6_addr_set_v4mapped(info.ipi_spec_dst.s_addr, &info6.ipi6_addr);
			return vso_how_from(vs, sk, how, &info6.ipi6_addr, info.ipi_ifindex);
		case IP_TTL:
			err = vso_cmsg_int(cmsg, 1, 255, &value);
			how->flags |= VSO_DG_TTL;
			how->ttl = value;
			return err;
		case IP_TOS:
			err = vso_cmsg_int(cmsg, 0, 255, &value);
			how->flags |= VSO_DG_TOS;
			how->tos = value;
			return err;
		default:
			return -EINVAL;
		}
	}
	if (cmsg->cmsg_level != SOL_IPV6 || vs->row->family != AF_INET6)
		return 0;
	switch (cmsg->cmsg_type) {
	case IPV6_PKTINFO:
		if (cmsg->cmsg_len != CMSG_LEN(sizeof(info6)))
			return -EINVAL;
		memcpy(&info6, data, sizeof(info6));
		return vso_how_from(vs, sk, how, &info6.ipi6_addr, info6.ipi6_ifindex);
	case IPV6_HOPLIMIT:
		err = vso_cmsg_int(cmsg, -1, 255, &value);
		if (value >= 0)
			how->flags |= VSO_DG_TTL;
		how->ttl = value;
		return err;
	case IPV6_TCLASS:
		err = vso_cmsg_int(cmsg, -1, 255, &value);
		if (value >= 0)
			how->flags |= VSO_DG_TOS;
		how->tos = value;
		return err;
	default:
		return -EINVAL;
	}
}

static int vso_dgram_how(struct vso_sock *vs, struct sock *sk, struct msghdr *msg, size_t len, struct vso_how *how)
{
	bool told = vs->dev->features & VSO_F_DGRAM_INFO;
	struct cmsghdr *cmsg;
	int err;

	*how = (struct vso_how) { .segment = vs->row->protocol == IPPROTO_UDP ? READ_ONCE(udp_sk(sk)->gso_size) : 0 };
	if (msg->msg_controllen) {
		for_each_cmsghdr(cmsg, msg) {
			if (!CMSG_OK(msg, cmsg))
				return -EINVAL;
			err = vso_how_cmsg(vs, sk, how, cmsg);
			if (err)
				return err;
		}
	}
	if (how->segment && len > how->segment) {
		if (len > (size_t)how->segment * UDP_MAX_SEGMENTS)
			return -EINVAL;
		how->flags |= VSO_DG_SEGMENT;
	}
	return how->flags && !told ? -EOPNOTSUPP : 0;	/* a device that would ignore it */
}

static struct vso_tx *vso_dgram_build(struct vso_sock *vs, struct msghdr *msg, size_t len, const union vso_addr *to,
				      const struct vso_how *how)
{
	char uri[VSO_URI_MAX + 1];
	struct vso_dgram d = {
		.flags = cpu_to_le16(how->flags), .ttl = how->ttl, .tos = how->tos, .segment = cpu_to_le16(how->segment),
	};
	u32 local = how->flags & VSO_DG_LOCAL ? VSO_LOCAL_LEN : 0;
	struct vso_tx *tx;
	int n = 0;
	u8 *p;

	if (to)
		n = vso_uri_format(uri, sizeof(uri), to, vs->row->protocol);
	d.uri_len = cpu_to_le16(n);
	tx = vso_tx_new(vs, VSO_DGRAM, 0, NULL, sizeof(d) + n + local + len, GFP_KERNEL_ACCOUNT);
	if (!tx)
		return ERR_PTR(-ENOBUFS);
	p = tx->body;
	memcpy(p, &d, sizeof(d));
	memcpy(p + sizeof(d), uri, n);
	memcpy(p + sizeof(d) + n, &how->local, local);
	if (!copy_from_iter_full(p + sizeof(d) + n + local, len, &msg->msg_iter)) {
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

static size_t vso_dgram_max(const struct vso_sock *vs, const union vso_addr *to)
{
	return to->sa.sa_family == AF_INET6 && !ipv6_addr_v4mapped(&to->v6.sin6_addr) ? VSO_DGRAM6_MAX : VSO_DGRAM_MAX;
}

/* to the device, now that it can be sent. @to: NULL: to the connected peer. Return: as sendmsg(); VSO_NATIVELY */
static int vso_dgram_send(struct vso_sock *vs, struct sock *sk, struct msghdr *msg, size_t len, const union vso_addr *to)
{
	struct vso_how how;
	struct vso_tx *tx;
	int err, where = VSO_TO_DEVICE;

	if (to)
		where = vso_dest_where(vs, sk, to);
	if (where < 0)
		return where;
	if (where == VSO_TO_NATIVE)
		return VSO_NATIVELY;
	if (len > vso_dgram_max(vs, to ?: &vs->peer))
		return -EMSGSIZE;
	err = vso_dgram_how(vs, sk, msg, len, &how);
	if (err)
		return err;
	if (how.native)
		return VSO_NATIVELY;
	if (vs->snd_shut)
		return -EPIPE;
	tx = vso_dgram_build(vs, msg, len, to, &how);
	err = PTR_ERR_OR_ZERO(tx) ?: vso_tx_submit(vs->pair, tx);
	if (!err)
		vso_poll_sent(vs);
	return err == -ENODEV ? -ECONNRESET : err ?: (int)len;
}

int vso_dgram_sendmsg(struct socket *sock, struct msghdr *msg, size_t len)
{
	struct vso_sock *vs = vso_sock_get(sock);
	struct sock *sk = sock->sk;
	struct ubuf_info *note;
	union vso_addr to = {};
	long timeo;
	int err;

	if (!vs)
		return vso_again(sock, sendmsg, msg, len);
	err = -EMSGSIZE;
	if (len > 0xffff)
		goto out;
	err = -EOPNOTSUPP;
	if (msg->msg_flags & (MSG_OOB | MSG_MORE))
		goto out;
	err = -EINVAL;
	if (vso_is_ping(vs->row->protocol) && len < 8)
		goto out;		/* the header of an echo request */
	if (msg->msg_name) {
		err = vso_addr_copy(&to, msg->msg_name, msg->msg_namelen, vs->row->family);
		if (err < 0)
			goto out;
		err = -EINVAL;
		if (!vso_dgram_port(vs->row, &to))
			goto out;
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
	if (!msg->msg_name && vs->addr_only) {
		spin_lock_bh(&vs->lock);
		to = vs->peer;
		err = vs->conn ?: -EDESTADDRREQ;
		spin_unlock_bh(&vs->lock);
		if (err < 0)
			goto out;
	}
	vso_opts_sync(vs, sk, false);
	err = vso_zerocopy_begin(sk, msg, len, &note);
	if (err)
		goto out;
	vso_zerocopy_copied(note);
	if (!msg->msg_name && vs->conn == VSO_TO_NATIVE)
		err = VSO_NATIVELY;
	else
		err = vso_dgram_send(vs, sk, msg, len, msg->msg_name || vs->addr_only ? &to : NULL);
	vso_zerocopy_end(note, err > 0 && err != VSO_NATIVELY);
	if (err == VSO_NATIVELY)
		err = vs->row->native->sendmsg(sock, msg, len);
out:
	if (err == -EPIPE && !(msg->msg_flags & MSG_NOSIGNAL))
		send_sig(SIGPIPE, current, 0);
	vso_sock_put(vs);
	return err;
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
	else if (vs->addr_only && !vs->conn)
		err = -ENOTCONN;	/* and has its effect all the same, as natively */
	if (err != -EINVAL) {
		vs->rcv_shut |= !!(how & RCV_SHUTDOWN);
		vs->snd_shut |= !!(how & SEND_SHUTDOWN);
		vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDHUP | EPOLLOUT | (vs->rcv_shut && vs->snd_shut ? EPOLLHUP : 0));
	}
	spin_unlock_bh(&vs->lock);
	vso_sock_put(vs);
	return err;
}
