// SPDX-License-Identifier: GPL-2.0-only
/*
 * sock_opt.c - socket options: who knows them, carrier or host.
 *
 * The carrier checks and stores every option, as natively, and answers getsockopt. Those that shape the host's connection go to the device
 * as well (VSO_OPT_HOST): with CONNECT and BIND what was set before, with SETSOCKOPT what is set later; set while connecting, they
 * are kept and sent when connected. Those that servers set on each connection (VSO_OPT_HOST_TOLD) are not waited for. An option that is in
 * no row below would succeed on the carrier and do nothing, so it is ENOPROTOOPT. Multicast groups of a published server are asked about (VSO_GROUP). SOL_SOCKET is the carrier's alone before 6.8, where the
 * core does not show it to us (vso_custom_sockopt); what has changed there is seen at a stream's next call, a datagram socket's next send
 * (vso_opts_sync), before anything of that call: nobody who sets and then calls finds a difference. SO_MARK and SO_BINDTODEVICE are then said to
 * do nothing, in the log and in fdinfo.
 */
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/net_tstamp.h>
#include <linux/slab.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <net/inet_connection_sock.h>
#include <net/inet_sock.h>
#include <net/ipv6.h>
#include <net/tcp.h>

#include "vso.h"

enum vso_opt_where {
	VSO_OPT_CARRIER = 1,	/* about this end only: the carrier stores it, and we or nobody look at it */
	VSO_OPT_HOST,		/* an integer for the host's socket */
	VSO_OPT_HOST_TOLD,	/* one that it takes whenever the carrier did: nobody waits for its answer */
	VSO_OPT_HOST_STR,	/* bytes for the host's socket, of whatever length */
	VSO_OPT_NOT_HERE,	/* would act on the host's packets, which are the host's to mark: EPERM, as for those who may not */
};

static const struct vso_opt {
	int level, name;
	enum vso_opt_where where;
} vso_opts[] = {
	{ SOL_TCP, TCP_NODELAY,			VSO_OPT_HOST_TOLD },
	{ SOL_TCP, TCP_CORK,			VSO_OPT_HOST },
	{ SOL_TCP, TCP_KEEPIDLE,		VSO_OPT_HOST },
	{ SOL_TCP, TCP_KEEPINTVL,		VSO_OPT_HOST },
	{ SOL_TCP, TCP_KEEPCNT,			VSO_OPT_HOST },
	{ SOL_TCP, TCP_USER_TIMEOUT,		VSO_OPT_HOST },
	{ SOL_TCP, TCP_QUICKACK,		VSO_OPT_HOST_TOLD },
	{ SOL_TCP, TCP_MAXSEG,			VSO_OPT_HOST },
	{ SOL_TCP, TCP_SYNCNT,			VSO_OPT_HOST },
	{ SOL_TCP, TCP_LINGER2,			VSO_OPT_HOST },
	{ SOL_TCP, TCP_WINDOW_CLAMP,		VSO_OPT_HOST },
	{ SOL_TCP, TCP_CONGESTION,		VSO_OPT_HOST_STR },
	{ SOL_TCP, TCP_DEFER_ACCEPT,		VSO_OPT_CARRIER },	/* both only save round trips */
	{ SOL_TCP, TCP_FASTOPEN,		VSO_OPT_CARRIER },
	{ SOL_TCP, TCP_FASTOPEN_CONNECT,	VSO_OPT_CARRIER },
	{ SOL_TCP, TCP_NOTSENT_LOWAT,		VSO_OPT_CARRIER },
	{ SOL_TCP, TCP_THIN_LINEAR_TIMEOUTS,	VSO_OPT_CARRIER },
	{ SOL_IP, IP_TOS,			VSO_OPT_HOST },
	{ SOL_IP, IP_TTL,			VSO_OPT_HOST },
	{ SOL_IP, IP_MTU_DISCOVER,		VSO_OPT_HOST },
	{ SOL_IP, IP_RECVERR,			VSO_OPT_CARRIER },	/* the device always tells; dgram_recv.c looks at these */
	{ SOL_IP, IP_PKTINFO,			VSO_OPT_CARRIER },
	{ SOL_IP, IP_RECVTTL,			VSO_OPT_CARRIER },
	{ SOL_IP, IP_RECVTOS,			VSO_OPT_CARRIER },
	{ SOL_IP, IP_RECVORIGDSTADDR,		VSO_OPT_CARRIER },
	{ SOL_IP, IP_MULTICAST_IF,		VSO_OPT_CARRIER },	/* groups are the guest's own, but for vso_opt_group() */
	{ SOL_IP, IP_MULTICAST_TTL,		VSO_OPT_CARRIER },
	{ SOL_IP, IP_MULTICAST_LOOP,		VSO_OPT_CARRIER },
	{ SOL_IP, IP_MULTICAST_ALL,		VSO_OPT_CARRIER },
	{ SOL_IP, IP_ADD_MEMBERSHIP,		VSO_OPT_CARRIER },
	{ SOL_IP, IP_DROP_MEMBERSHIP,		VSO_OPT_CARRIER },
	{ SOL_IP, MCAST_JOIN_GROUP,		VSO_OPT_CARRIER },
	{ SOL_IP, MCAST_LEAVE_GROUP,		VSO_OPT_CARRIER },
	{ SOL_IP, IP_BIND_ADDRESS_NO_PORT,	VSO_OPT_CARRIER },
	{ SOL_IP, IP_LOCAL_PORT_RANGE,		VSO_OPT_CARRIER },
	{ SOL_IP, IP_FREEBIND,			VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_TCLASS,		VSO_OPT_HOST },
	{ SOL_IPV6, IPV6_UNICAST_HOPS,		VSO_OPT_HOST },
	{ SOL_IPV6, IPV6_MTU_DISCOVER,		VSO_OPT_HOST },
	{ SOL_IPV6, IPV6_V6ONLY,		VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_RECVERR,		VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_RECVPKTINFO,		VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_RECVHOPLIMIT,		VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_RECVTCLASS,		VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_MULTICAST_IF,		VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_MULTICAST_HOPS,	VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_MULTICAST_LOOP,	VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_ADD_MEMBERSHIP,	VSO_OPT_CARRIER },
	{ SOL_IPV6, IPV6_DROP_MEMBERSHIP,	VSO_OPT_CARRIER },
	{ SOL_IPV6, MCAST_JOIN_GROUP,		VSO_OPT_CARRIER },
	{ SOL_IPV6, MCAST_LEAVE_GROUP,		VSO_OPT_CARRIER },
	{ SOL_UDP, UDP_SEGMENT,			VSO_OPT_CARRIER },	/* said with each datagram */
	{ SOL_UDP, UDP_GRO,			VSO_OPT_HOST },
	{ SOL_SOCKET, SO_KEEPALIVE,		VSO_OPT_HOST },
	{ SOL_SOCKET, SO_BROADCAST,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_REUSEADDR,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_REUSEPORT,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_LINGER,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_OOBINLINE,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_PEEK_OFF,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_SNDBUF,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_RCVBUF,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_SNDBUFFORCE,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_RCVBUFFORCE,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_RCVLOWAT,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_RCVTIMEO_OLD,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_RCVTIMEO_NEW,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_SNDTIMEO_OLD,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_SNDTIMEO_NEW,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_PRIORITY,		VSO_OPT_HOST },
	{ SOL_SOCKET, SO_MARK,			VSO_OPT_NOT_HERE },
	{ SOL_SOCKET, SO_ZEROCOPY,		VSO_OPT_CARRIER },	/* vso_zerocopy_begin() */
	{ SOL_SOCKET, SO_DONTROUTE,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_NO_CHECK,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_BUSY_POLL,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_PREFER_BUSY_POLL,	VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_INCOMING_CPU,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_MAX_PACING_RATE,	VSO_OPT_HOST_STR },	/* four bytes or eight */
	{ SOL_SOCKET, SO_PASSCRED,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_TIMESTAMP_OLD,		VSO_OPT_CARRIER },	/* the time of arrival in the guest */
	{ SOL_SOCKET, SO_TIMESTAMP_NEW,		VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_TIMESTAMPNS_OLD,	VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_TIMESTAMPNS_NEW,	VSO_OPT_CARRIER },
	{ SOL_SOCKET, SO_TIMESTAMPING_OLD,	VSO_OPT_CARRIER },	/* likewise; vso_opt_unstamped() */
	{ SOL_SOCKET, SO_TIMESTAMPING_NEW,	VSO_OPT_CARRIER },
};

static const struct vso_opt *vso_opt_find(int level, int name)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(vso_opts); i++)
		if (vso_opts[i].level == level && vso_opts[i].name == name)
			return &vso_opts[i];
	return NULL;
}

/* one option on its way at a time. @get: room for the answer, in and out its length. Return: as the call */
static int vso_opt_ask(struct vso_sock *vs, u16 type, const void *payload, u32 len, u8 *get, u32 *get_len)
{
	int err;

	if (mutex_lock_killable(&vs->req_mutex))
		return -EINTR;
	spin_lock_bh(&vs->lock);
	vs->opt_buf = get;
	vs->opt_len = get ? *get_len : 0;
	spin_unlock_bh(&vs->lock);
	err = vso_flow_request(vs, type, 0, payload, len) ?: vso_flow_wait(vs);
	spin_lock_bh(&vs->lock);
	if (get)
		*get_len = vs->opt_len;
	vs->opt_buf = NULL;
	spin_unlock_bh(&vs->lock);
	if (!err)
		err = -(int)vs->error;
	mutex_unlock(&vs->req_mutex);
	return err == -ENODEV ? 0 : err;	/* the connection died meanwhile, and the carrier took the option */
}

/* tell the host; while connecting, later */
static int vso_opt_forward(struct vso_sock *vs, const struct vso_opt *opt, const void *val, u32 len)
{
	u8 buf[sizeof(struct vso_sockopt) + VSO_OPTVAL_MAX] = {};
	struct vso_sockopt *o = (struct vso_sockopt *)buf;
	struct vso_tx *tx = NULL;
	enum vso_state state;

	o->level = cpu_to_le32(opt->level);
	o->name = cpu_to_le32(opt->name);
	o->len = cpu_to_le32(len);
	memcpy(buf + sizeof(*o), val, len);
	if (READ_ONCE(vs->state) == VSO_ST_CONNECTING) {
		tx = vso_tx_new(NULL, VSO_SETSOCKOPT, 0, buf, sizeof(*o) + len, GFP_KERNEL);
		if (!tx)
			return -ENOBUFS;
		tx->hdr.flow = cpu_to_le32(vs->flow);
	}
	spin_lock_bh(&vs->lock);
	state = vs->state;
	if (state == VSO_ST_CONNECTING && tx) {
		list_add_tail(&tx->list, &vs->deferred);
		tx = NULL;
	}
	spin_unlock_bh(&vs->lock);
	kfree(tx);
	if (state != VSO_ST_CONNECTED && state != VSO_ST_LISTENING)
		return 0;	/* a bound socket sends it with CONNECT; a closed one has no host side */
	return vso_opt_ask(vs, VSO_SETSOCKOPT, buf, sizeof(*o) + len, NULL, NULL);
}

/* the group that an option joins or leaves, if its interface is left open: one that is named is the guest's. Return: VSO_GROUP_*, 0: none */
static u32 vso_opt_which_group(int level, int name, sockptr_t val, unsigned int len, union vso_addr *group)
{
	struct ip_mreqn four = {};
	struct ipv6_mreq six;

	*group = (union vso_addr) {};
	if (level == SOL_IP && (name == IP_ADD_MEMBERSHIP || name == IP_DROP_MEMBERSHIP)) {
		if (len < sizeof(struct ip_mreq) || copy_from_sockptr(&four, val, min_t(u32, len, sizeof(four))) ||
		    four.imr_address.s_addr || four.imr_ifindex || !ipv4_is_multicast(four.imr_multiaddr.s_addr))
			return 0;
		group->v4.sin_family = AF_INET;
		group->v4.sin_addr = four.imr_multiaddr;
		return name == IP_ADD_MEMBERSHIP ? VSO_GROUP_JOIN : VSO_GROUP_LEAVE;
	}
	if (level == SOL_IPV6 && (name == IPV6_ADD_MEMBERSHIP || name == IPV6_DROP_MEMBERSHIP)) {
		if (len < sizeof(six) || copy_from_sockptr(&six, val, sizeof(six)) || six.ipv6mr_ifindex ||
		    !ipv6_addr_is_multicast(&six.ipv6mr_multiaddr))
			return 0;
		group->v6.sin6_family = AF_INET6;
		group->v6.sin6_addr = six.ipv6mr_multiaddr;
		return name == IPV6_ADD_MEMBERSHIP ? VSO_GROUP_JOIN : VSO_GROUP_LEAVE;
	}
	return 0;
}

/* a server that the device publishes joins a group, or leaves it: on the host, if the policy has it there. Return: as the call; 1: natively */
static int vso_opt_group(struct vso_sock *vs, int level, int name, sockptr_t val, unsigned int len)
{
	char uri[VSO_URI_MAX + 1];
	union vso_addr group;
	u32 which, verdict;
	int err, n;

	if (!vs->was_bound || !vs->addr_only || !(vs->dev->features & VSO_F_GROUP) || READ_ONCE(vs->state) != VSO_ST_CONNECTED)
		return 1;
	which = vso_opt_which_group(level, name, val, len, &group);
	if (!which)
		return 1;
	n = vso_uri_format(uri, sizeof(uri), &group, vs->row->protocol);
	if (mutex_lock_killable(&vs->req_mutex))
		return -EINTR;
	err = vso_flow_request(vs, VSO_GROUP, which, uri, n) ?: vso_flow_wait(vs);
	verdict = vs->verdict;
	if (!err)
		err = -(int)vs->error;
	mutex_unlock(&vs->req_mutex);
	return err == -ENODEV || (!err && verdict == VSO_NATIVE) ? 1 : err;
}

/** vso_opts_told() - the device has, or is being sent, what the carrier has */
void vso_opts_told(struct vso_sock *vs, const struct sock *sk)
{
	vs->told_keepalive = sock_flag(sk, SOCK_KEEPOPEN);
	vs->told_sndbuf = READ_ONCE(sk->sk_sndbuf);
	vs->told_rcvbuf = vso_opts_rcvbuf(sk);
	vs->told_priority = READ_ONCE(sk->sk_priority);
	vs->told_pacing = READ_ONCE(sk->sk_max_pacing_rate);
}

/** vso_opts_told_as() - the host's side of an accepted connection has what that of its listener has */
void vso_opts_told_as(struct vso_sock *child, const struct vso_sock *vs)
{
	child->told_keepalive = vs->told_keepalive;
	child->told_sndbuf = vs->told_sndbuf;
	child->told_rcvbuf = vs->told_rcvbuf;
	child->told_priority = vs->told_priority;
	child->told_pacing = vs->told_pacing;
}

/** vso_opts_window() - bytes that a stream socket may hold for its reader */
u32 vso_opts_window(const struct sock *sk)
{
	return sk->sk_userlocks & SOCK_RCVBUF_LOCK ? clamp_t(u32, READ_ONCE(sk->sk_rcvbuf), PAGE_SIZE, vso_window) : vso_window;
}

/* without waiting: the carrier took the option, and nobody waits for what the host says of it */
static int vso_opt_tell_bytes(struct vso_sock *vs, int level, int name, const void *value, u32 len)
{
	u8 buf[sizeof(struct vso_sockopt) + sizeof(u64)];
	struct vso_sockopt o = { .level = cpu_to_le32(level), .name = cpu_to_le32(name), .len = cpu_to_le32(len) };

	memcpy(buf, &o, sizeof(o));
	memcpy(buf + sizeof(o), value, len);
	return vso_flow_send(vs, VSO_SETSOCKOPT, 0, buf, sizeof(o) + len, GFP_ATOMIC);
}

static void vso_opt_tell(struct vso_sock *vs, int name, int value)
{
	vso_opt_tell_bytes(vs, SOL_SOCKET, name, &value, sizeof(value));
}

/*
 * SO_SNDBUF bounds the device's window (its answer has the new one) and the host's buffer. A smaller one is for what is sent from now on: the
 * sender waits for the answer, and poll leaves it to him. A larger one wakes those who found no room.
 */
static void vso_opts_sync_sndbuf(struct vso_sock *vs, struct sock *sk, bool may_wait)
{
	int sndbuf = READ_ONCE(sk->sk_sndbuf), value = sndbuf / 2;	/* the kernel keeps twice what setsockopt() said */
	struct {
		struct vso_sockopt o;
		int value;
	} msg = { { .level = cpu_to_le32(SOL_SOCKET), .name = cpu_to_le32(SO_SNDBUF), .len = cpu_to_le32(sizeof(int)) }, value };

	if (sndbuf == vs->told_sndbuf)
		return;
	if (sk->sk_userlocks & SOCK_SNDBUF_LOCK) {
		if (vs->row->type != SOCK_STREAM || READ_ONCE(vs->state) != VSO_ST_CONNECTED || sndbuf > vs->told_sndbuf)
			vso_opt_tell(vs, SO_SNDBUF, value);
		else if (!may_wait || vso_opt_ask(vs, VSO_SETSOCKOPT, &msg, sizeof(msg), NULL, NULL) == -EINTR)
			return;
	}
	vs->told_sndbuf = sndbuf;
}

/* SO_RCVBUF bounds our window and the host's buffer */
static void vso_opts_sync_rcvbuf(struct vso_sock *vs, struct sock *sk)
{
	int rcvbuf = vso_opts_rcvbuf(sk);

	if (rcvbuf == vs->told_rcvbuf)
		return;
	vs->told_rcvbuf = rcvbuf;
	if (rcvbuf > 0)
		return;
	spin_lock_bh(&vs->lock);
	if (vs->row->type == SOCK_STREAM && vs->state == VSO_ST_CONNECTED)
		vso_window_set(vs, vso_opts_window(sk));
	spin_unlock_bh(&vs->lock);
	vso_opt_tell(vs, SO_RCVBUF, -rcvbuf / 2);
}

/** vso_opts_sync_slow() - send those that have changed, if there is a connection or a listener to have them */
void vso_opts_sync_slow(struct vso_sock *vs, struct sock *sk, bool may_wait)
{
	bool keepalive = sock_flag(sk, SOCK_KEEPOPEN);
	u64 pacing = READ_ONCE(sk->sk_max_pacing_rate);
	u32 priority = READ_ONCE(sk->sk_priority);
	enum vso_state state = READ_ONCE(vs->state);

	if (state != VSO_ST_CONNECTED && state != VSO_ST_LISTENING)
		return;
	if (keepalive != vs->told_keepalive)
		vso_opt_tell(vs, SO_KEEPALIVE, keepalive);
	vs->told_keepalive = keepalive;
	if (priority != vs->told_priority)
		vso_opt_tell(vs, SO_PRIORITY, priority);
	vs->told_priority = priority;
	if (pacing != vs->told_pacing)
		vso_opt_tell_bytes(vs, SOL_SOCKET, SO_MAX_PACING_RATE, &pacing, sizeof(pacing));
	vs->told_pacing = pacing;
	vso_opts_sync_rcvbuf(vs, sk);
	vso_opts_sync_sndbuf(vs, sk, may_wait);
	if (vso_opts_tied(sk) && !vs->told_tied) {
		vs->told_tied = true;
		pr_info_ratelimited("virtio_socket: %s[%d]: SO_MARK or SO_BINDTODEVICE of an offloaded socket does nothing on the host\n",
				    current->comm, task_tgid_nr(current));
	}
}

/* timestamps that nobody makes: of what is sent, which the host sends, and of a stream, whose bytes have come together on the host */
static bool vso_opt_unstamped(const struct vso_sock *vs, int level, int name, sockptr_t val, unsigned int len)
{
	int flags = 0;

	if (level != SOL_SOCKET || (name != SO_TIMESTAMPING_OLD && name != SO_TIMESTAMPING_NEW))
		return false;
	if (len < sizeof(flags) || copy_from_sockptr(&flags, val, sizeof(flags)))
		return false;	/* the carrier says what is wrong */
	return flags & SOF_TIMESTAMPING_TX_RECORD_MASK || (flags && vs->row->type == SOCK_STREAM);
}

/* one that was forwarded by itself */
static void vso_opts_told_one(struct vso_sock *vs, const struct sock *sk, int name)
{
	if (name == SO_KEEPALIVE)
		vs->told_keepalive = sock_flag(sk, SOCK_KEEPOPEN);
	else if (name == SO_PRIORITY)
		vs->told_priority = READ_ONCE(sk->sk_priority);
	else if (name == SO_MAX_PACING_RATE)
		vs->told_pacing = READ_ONCE(sk->sk_max_pacing_rate);
}

int vso_setsockopt(struct socket *sock, int level, int name, sockptr_t val, unsigned int len)
{
	const struct vso_opt *opt = vso_opt_find(level, name);
	struct vso_sock *vs = vso_sock_get(sock);
	u8 buf[VSO_OPTVAL_MAX] = {};
	bool integer;
	u32 n;
	int err;

	if (!vs)
		return vso_again(sock, setsockopt, level, name, val, len);
	err = -ENOPROTOOPT;
	if (!opt || (vs->row->type != SOCK_STREAM && level == SOL_TCP) || vso_opt_unstamped(vs, level, name, val, len))
		goto out;
	err = -EPERM;
	if (opt->where == VSO_OPT_NOT_HERE)
		goto out;
	err = vso_opt_group(vs, level, name, val, len);
	if (err != 1)
		goto out;
	if (level == SOL_SOCKET && vs->row->protocol != IPPROTO_MPTCP)
		err = sock_setsockopt(sock, level, name, val, len);
	else
		err = vs->row->native->setsockopt(sock, level, name, val, len);
	if (!err && level == SOL_SOCKET && opt->where == VSO_OPT_CARRIER)
		vso_opts_sync(vs, sock->sk, true);
	if (err || opt->where == VSO_OPT_CARRIER)
		goto out;
	integer = opt->where == VSO_OPT_HOST || opt->where == VSO_OPT_HOST_TOLD;
	n = min_t(u32, len, integer ? sizeof(int) : sizeof(buf));
	err = -EFAULT;
	if (copy_from_sockptr(buf, val, n))
		goto out;
	/* IP options take one byte, too: the wire has integers */
	if (integer)
		n = sizeof(int);
	err = 0;
	if (opt->where != VSO_OPT_HOST_TOLD || READ_ONCE(vs->state) != VSO_ST_CONNECTED || vso_opt_tell_bytes(vs, level, name, buf, n))
		err = vso_opt_forward(vs, opt, buf, n);
	if (level == SOL_SOCKET)
		vso_opts_told_one(vs, sock->sk, name);
out:
	vso_sock_put(vs);
	return err;
}

/* what only the host's socket knows */
static bool vso_opt_ask_host(int level, int name)
{
	if (level == SOL_IP && name == IP_MTU)
		return true;
	return level == SOL_TCP && (name == TCP_INFO || name == TCP_MAXSEG || name == TCP_CONGESTION);
}

int vso_getsockopt(struct socket *sock, int level, int name, char __user *val, int __user *len)
{
	struct vso_sock *vs = vso_sock_get(sock);
	u8 buf[VSO_OPTVAL_MAX];
	struct vso_sockopt o = { .level = cpu_to_le32(level), .name = cpu_to_le32(name) };
	int room, err;
	u32 n;

	if (!vs)
		return vso_again(sock, getsockopt, level, name, val, len);
	if (!vso_opt_ask_host(level, name) || READ_ONCE(vs->state) != VSO_ST_CONNECTED) {
		err = vs->row->native->getsockopt(sock, level, name, val, len);
		goto out;
	}
	if (vs->row->type == SOCK_STREAM)
		vso_opts_sync(vs, sock->sk, true);	/* what is asked may tell of it */
	err = -EFAULT;
	if (get_user(room, len))
		goto out;
	err = -EINVAL;
	if (room < 0)
		goto out;
	n = min_t(u32, room, sizeof(buf));
	o.len = cpu_to_le32(n);
	err = vso_opt_ask(vs, VSO_GETSOCKOPT, &o, sizeof(o), buf, &n);
	if (!err && (put_user((int)n, len) || copy_to_user(val, buf, n)))
		err = -EFAULT;
out:
	vso_sock_put(vs);
	return err;
}

/**
 * vso_host_queue() - bytes that the host's socket has taken and not got rid of (@name: VSO_QUEUE_*)
 *
 * Return: 0 also of a device that cannot say, and of a connection that died meanwhile; -errno when it could not be asked.
 */
int vso_host_queue(struct vso_sock *vs, u32 name)
{
	struct vso_sockopt o = { .level = cpu_to_le32(VSO_SOL_QUEUE), .name = cpu_to_le32(name), .len = cpu_to_le32(sizeof(u32)) };
	__le32 bytes = 0;
	u32 n = sizeof(bytes);
	int err = vso_opt_ask(vs, VSO_GETSOCKOPT, &o, sizeof(o), (u8 *)&bytes, &n);

	if (err)
		return err == -ENOPROTOOPT ? 0 : err;
	return n == sizeof(bytes) ? min_t(u32, le32_to_cpu(bytes), INT_MAX) : 0;
}

struct vso_opt_buf {
	u8 *at;
	u32 left;
};

/* @len: up to 8 */
static void vso_opt_put_bytes(struct vso_opt_buf *b, int level, int name, const void *value, u32 len)
{
	struct vso_sockopt o = { .level = cpu_to_le32(level), .name = cpu_to_le32(name), .len = cpu_to_le32(len) };

	if (b->left < sizeof(o) + 8)
		return;		/* not reached: all of vso_opts_build() fits VSO_OPTS_MAX */
	memcpy(b->at, &o, sizeof(o));
	memset(b->at + sizeof(o), 0, 8);
	memcpy(b->at + sizeof(o), value, len);
	b->at += sizeof(o) + 8;
	b->left -= sizeof(o) + 8;
}

static void vso_opt_put(struct vso_opt_buf *b, int level, int name, int value)
{
	vso_opt_put_bytes(b, level, name, &value, sizeof(value));
}

/**
 * vso_opts_build() - the options that were set before the takeover, for CONNECT and BIND
 *
 * Only what differs from the defaults, so that the usual socket sends none. Return: bytes written.
 */
u32 vso_opts_build(struct sock *sk, const struct vso_row *row, bool bind, void *buf, u32 size)
{
	struct vso_opt_buf b = { buf, size };
	const struct inet_sock *inet = inet_sk(sk);
	u64 pacing = READ_ONCE(sk->sk_max_pacing_rate);

	if (sock_flag(sk, SOCK_KEEPOPEN))
		vso_opt_put(&b, SOL_SOCKET, SO_KEEPALIVE, 1);
	if (sk->sk_userlocks & SOCK_SNDBUF_LOCK)	/* the kernel keeps twice what setsockopt() said */
		vso_opt_put(&b, SOL_SOCKET, SO_SNDBUF, READ_ONCE(sk->sk_sndbuf) / 2);
	if (sk->sk_userlocks & SOCK_RCVBUF_LOCK)
		vso_opt_put(&b, SOL_SOCKET, SO_RCVBUF, READ_ONCE(sk->sk_rcvbuf) / 2);
	if (bind && sk->sk_reuse)
		vso_opt_put(&b, SOL_SOCKET, SO_REUSEADDR, 1);
	if (bind && sk->sk_reuseport)
		vso_opt_put(&b, SOL_SOCKET, SO_REUSEPORT, 1);
	if (bind && row->family == PF_INET6 && sk->sk_ipv6only)
		vso_opt_put(&b, SOL_IPV6, IPV6_V6ONLY, 1);
	if (inet->tos)
		vso_opt_put(&b, SOL_IP, IP_TOS, inet->tos);
	if (inet->uc_ttl > 0)
		vso_opt_put(&b, SOL_IP, IP_TTL, inet->uc_ttl);
	if (row->family == PF_INET6 && inet6_sk(sk)->tclass)
		vso_opt_put(&b, SOL_IPV6, IPV6_TCLASS, inet6_sk(sk)->tclass);
	if (READ_ONCE(sk->sk_priority))		/* behind the options that set it, too */
		vso_opt_put(&b, SOL_SOCKET, SO_PRIORITY, READ_ONCE(sk->sk_priority));
	if (pacing != ~0UL)
		vso_opt_put_bytes(&b, SOL_SOCKET, SO_MAX_PACING_RATE, &pacing, sizeof(pacing));
	if (row->protocol == IPPROTO_UDP && udp_test_bit(GRO_ENABLED, sk))
		vso_opt_put(&b, SOL_UDP, UDP_GRO, 1);
	if (row->protocol == IPPROTO_TCP) {
		const struct tcp_sock *tp = tcp_sk(sk);

		if (tp->nonagle & TCP_NAGLE_OFF)
			vso_opt_put(&b, SOL_TCP, TCP_NODELAY, 1);
		if (tp->keepalive_time)
			vso_opt_put(&b, SOL_TCP, TCP_KEEPIDLE, tp->keepalive_time / HZ);
		if (tp->keepalive_intvl)
			vso_opt_put(&b, SOL_TCP, TCP_KEEPINTVL, tp->keepalive_intvl / HZ);
		if (tp->keepalive_probes)
			vso_opt_put(&b, SOL_TCP, TCP_KEEPCNT, tp->keepalive_probes);
		if (inet_csk(sk)->icsk_user_timeout)
			vso_opt_put(&b, SOL_TCP, TCP_USER_TIMEOUT, inet_csk(sk)->icsk_user_timeout);
	}
	return size - b.left;
}

/**
 * vso_opts_inherit() - an accepted socket starts with its listener's options, as sk_clone() does it natively
 *
 * The host's side of it inherited from the host's listener, which has them by SETSOCKOPT.
 */
void vso_opts_inherit(struct sock *to, struct sock *from)
{
	static const enum sock_flags flags[] = { SOCK_KEEPOPEN, SOCK_LINGER, SOCK_URGINLINE, SOCK_LOCALROUTE, SOCK_ZEROCOPY };
	size_t i;

	for (i = 0; i < ARRAY_SIZE(flags); i++)
		sock_valbool_flag(to, flags[i], sock_flag(from, flags[i]));
	to->sk_lingertime = from->sk_lingertime;
	to->sk_rcvtimeo = from->sk_rcvtimeo;
	to->sk_sndtimeo = from->sk_sndtimeo;
	to->sk_rcvlowat = from->sk_rcvlowat;
	to->sk_rcvbuf = from->sk_rcvbuf;
	to->sk_sndbuf = from->sk_sndbuf;
	to->sk_userlocks |= from->sk_userlocks & (SOCK_RCVBUF_LOCK | SOCK_SNDBUF_LOCK);
	to->sk_priority = from->sk_priority;
	to->sk_max_pacing_rate = from->sk_max_pacing_rate;
	to->sk_reuse = from->sk_reuse;
	to->sk_mark = from->sk_mark;
	inet_sk(to)->tos = inet_sk(from)->tos;
	inet_sk(to)->uc_ttl = inet_sk(from)->uc_ttl;
	if (from->sk_prot == to->sk_prot) {
		tcp_sk(to)->nonagle = tcp_sk(from)->nonagle;
		tcp_sk(to)->keepalive_time = tcp_sk(from)->keepalive_time;
		tcp_sk(to)->keepalive_intvl = tcp_sk(from)->keepalive_intvl;
		tcp_sk(to)->keepalive_probes = tcp_sk(from)->keepalive_probes;
		inet_csk(to)->icsk_user_timeout = inet_csk(from)->icsk_user_timeout;
	}
}
