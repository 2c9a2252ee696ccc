// SPDX-License-Identifier: GPL-2.0-only
/*
 * dgram_recv.c - what datagram sockets receive: datagrams, and errors of those that were sent.
 *
 * A datagram becomes an skb with the headers that it would have had, on a queue of ours (vso_sock.dgrams). So the kernel's own functions
 * make the control messages from it (PKTINFO, TTL, TOS, timestamps, UDP_GRO), as the options of the carrier say at the time of recvmsg().
 * The interface is the guest's loopback: it came over none of the guest's. Its time is that of its arrival here, by the guest's clock.
 *
 * An error (VSO_ERROR) becomes an entry of the carrier's error queue, which the native recvmsg(MSG_ERRQUEUE) reads, and sk_err. As natively
 * only who asked for it (IP_RECVERR) has the queue and hears of errors without being connected, others of hard errors of their peer.
 *
 * The receive buffer is the carrier's SO_RCVBUF, counted as natively by the memory that the skbs take. What finds it full is dropped.
 */
#include <linux/errqueue.h>
#include <linux/icmp.h>
#include <linux/icmpv6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/skbuff.h>
#include <linux/slab.h>
#include <linux/udp.h>
#include <net/icmp.h>
#include <net/inet_sock.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/transp_v6.h>

#include "vso.h"

#define VSO_LINEAR	16384	/* payloads up to here are one piece of memory */

static bool vso_addr_is_six(const union vso_addr *a)
{
	return a->sa.sa_family == AF_INET6 && !ipv6_addr_v4mapped(&a->v6.sin6_addr);
}

static __be32 vso_addr_four(const union vso_addr *a)
{
	return a->sa.sa_family == AF_INET6 ? a->v6.sin6_addr.s6_addr32[3] : a->v4.sin_addr.s_addr;
}

static void vso_put_ip(void *at, bool six, const union vso_addr *from, const union vso_addr *to, u8 ttl, u8 tos, unsigned int len)
{
	if (six) {
		struct ipv6hdr *h = at;

		ip6_flow_hdr(h, tos, 0);
		h->nexthdr = IPPROTO_UDP;
		h->hop_limit = ttl;
		h->payload_len = htons(min(len, 65535U));
		h->saddr = from->v6.sin6_addr;
		h->daddr = to->v6.sin6_addr;
	} else {
		struct iphdr *h = at;

		*h = (struct iphdr) { .version = 4, .ihl = 5, .tos = tos, .ttl = ttl, .protocol = IPPROTO_UDP };
		h->tot_len = htons(min_t(unsigned int, len + sizeof(*h), 65535));
		h->saddr = vso_addr_four(from);
		h->daddr = vso_addr_four(to);
	}
}

/* the payload of a message from @off on, @len bytes, to the end of an skb that has room for it */
static bool vso_copy_payload(const struct vso_msg *m, struct sk_buff *skb, u32 off, u32 len)
{
	u32 size, n, at = skb->len - len;
	unsigned int i;

	off += sizeof(struct vso_hdr);
	for (i = 0; len && i < VSO_RX_PAGES; i++) {
		size = page_size(m->buf->page[i]);
		if (off < size) {
			n = min(len, size - off);
			if (skb_store_bits(skb, at, page_address(m->buf->page[i]) + off, n))
				return false;
			len -= n;
			at += n;
			off += n;
		}
		off -= size;
	}
	return true;
}

/**
 * vso_payload_skb() - the payload of a message from @off on, @len bytes, as an skb
 * @head: bytes of room before it
 *
 * Return: NULL without memory.
 */
struct sk_buff *vso_payload_skb(const struct vso_msg *m, u32 head, u32 off, u32 len)
{
	struct sk_buff *skb;
	int err;

	if (len <= VSO_LINEAR)
		skb = alloc_skb(head + len, GFP_ATOMIC | __GFP_NOWARN);
	else
		skb = alloc_skb_with_frags(head, len, PAGE_ALLOC_COSTLY_ORDER, &err, GFP_ATOMIC | __GFP_NOWARN);
	if (!skb)
		return NULL;
	skb_reserve(skb, head);
	if (len <= VSO_LINEAR) {
		skb_put(skb, len);
	} else {
		skb->data_len = len;
		skb->len += len;
	}
	if (!vso_copy_payload(m, skb, off, len)) {
		kfree_skb(skb);
		return NULL;
	}
	return skb;
}

/* a datagram as the packet it would have been, at its payload. @to: where it came to. NULL without memory */
static struct sk_buff *vso_dgram_skb(const struct vso_msg *m, const struct vso_dgram *d, const union vso_addr *from,
				     const union vso_addr *to, u32 off, u32 len)
{
	bool six = vso_addr_is_six(from);
	u32 head = (six ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) + sizeof(struct udphdr);
	struct udphdr *udp;
	struct sk_buff *skb = vso_payload_skb(m, head, off, len);

	if (!skb)
		return NULL;
	skb_push(skb, head);
	skb_reset_network_header(skb);
	skb_set_transport_header(skb, head - sizeof(*udp));
	vso_put_ip(skb_network_header(skb), six, from, to, d->flags & cpu_to_le16(VSO_DG_TTL) ? d->ttl : 64, d->tos, len + sizeof(*udp));
	udp = udp_hdr(skb);
	*udp = (struct udphdr) { .source = vso_addr_port(from), .dest = vso_addr_port(to) };
	udp->len = htons(min_t(u32, len + sizeof(*udp), 65535));
	skb_pull(skb, head);
	skb->protocol = htons(six ? ETH_P_IPV6 : ETH_P_IP);
	skb->tstamp = ktime_get_real();
	if (d->flags & cpu_to_le16(VSO_DG_SEGMENT)) {
		skb_shinfo(skb)->gso_size = le16_to_cpu(d->segment);
		skb_shinfo(skb)->gso_type = SKB_GSO_UDP_L4;
	}
	if (six) {
		memset(IP6CB(skb), 0, sizeof(*IP6CB(skb)));
		IP6CB(skb)->iif = LOOPBACK_IFINDEX;
	} else {
		memset(skb->cb, 0, sizeof(skb->cb));
		PKTINFO_SKB_CB(skb)->ipi_ifindex = LOOPBACK_IFINDEX;
		PKTINFO_SKB_CB(skb)->ipi_spec_dst.s_addr = vso_addr_four(to);
	}
	return skb;
}

/* the host's address that a datagram came to, with the port that the socket has. Called under vs->lock. */
static void vso_dgram_local(struct vso_sock *vs, const struct in6_addr *in6, union vso_addr *to)
{
	unsigned int i;

	to->sa.sa_family = vs->row->family;
	if (vs->row->family == AF_INET6) {
		to->v6.sin6_port = vso_addr_port(&vs->local);
		to->v6.sin6_addr = *in6;
	} else {
		to->v4.sin_port = vso_addr_port(&vs->local);
		to->v4.sin_addr.s_addr = in6->s6_addr32[3];
	}
	for (i = 0; i < VSO_LOCALS; i++)
		if (ipv6_addr_equal(&vs->locals[i], in6))
			return;
	vs->locals[vs->next_local++ % VSO_LOCALS] = *in6;
}

/** vso_local_known() - may a datagram leave from this address of the host? It may where one came in. */
bool vso_local_known(struct vso_sock *vs, const struct in6_addr *in6)
{
	bool known = false;
	unsigned int i;

	spin_lock_bh(&vs->lock);
	for (i = 0; i < VSO_LOCALS; i++)
		known |= ipv6_addr_equal(&vs->locals[i], in6);
	spin_unlock_bh(&vs->lock);
	return known;
}

static bool vso_in6_multicast(const struct in6_addr *in6)
{
	return ipv6_addr_v4mapped(in6) ? ipv4_is_multicast(in6->s6_addr32[3]) : ipv6_addr_is_multicast(in6);
}

/** vso_rx_dgram() - a datagram came: struct vso_dgram, the source's URI, perhaps the address it came to, its bytes */
void vso_rx_dgram(const struct vso_msg *m)
{
	struct vso_sock *vs = m->vs, *other = NULL;
	union vso_addr from, to = {};
	char uri[VSO_URI_MAX];
	struct vso_dgram d;
	struct in6_addr in6;
	struct sk_buff *skb;
	u32 uri_len, off;
	bool local, named;

	if (vs->row->family == AF_IPX) {
		vso_ipx_rx(m);
		return;
	}
	vso_msg_copy(m, 0, &d, sizeof(d));
	if (!(vs->dev->features & VSO_F_DGRAM_INFO))
		d.flags = 0;
	uri_len = le16_to_cpu(d.uri_len);
	local = d.flags & cpu_to_le16(VSO_DG_LOCAL);
	off = sizeof(d) + uri_len + (local ? VSO_LOCAL_LEN : 0);
	if (uri_len > VSO_URI_MAX || off > m->len || vs->row->type != SOCK_DGRAM)
		return;
	vso_msg_copy(m, sizeof(d), uri, uri_len);
	if (local)
		vso_msg_copy(m, sizeof(d) + uri_len, &in6, sizeof(in6));
	named = uri_len && !vso_uri_parse(uri, uri_len, vs->row->family, &from);
	/* what was sent to a group came for each socket in it */
	if (named && !list_empty_careful(&vs->server) && !(local && vso_in6_multicast(&in6)))
		vs = other = vso_share_owner(vs, &from);
	spin_lock(&vs->lock);
	if (vs->state != VSO_ST_CONNECTED || vs->closing || vs->rcv_shut || !vs->sk || vs->conn == VSO_TO_NATIVE)
		goto out;
	if (!named)
		from = vs->peer;
	if (vs->conn == VSO_TO_DEVICE && !vso_addr_equal(&from, &vs->peer))
		goto out;		/* connected: nobody else is heard */
	to = vs->local;
	if (local)
		vso_dgram_local(vs, &in6, &to);
	if (vs->was_bound)
		vso_dest_add(vs, &from, VSO_TO_DEVICE);
	skb = NULL;
	if (vs->rx_mem <= READ_ONCE(vs->sk->sk_rcvbuf))
		skb = vso_dgram_skb(m, &d, &from, &to, off, m->len - off);
	if (!skb) {
		vs->rx_drops++;
		goto out;
	}
	__skb_queue_tail(&vs->dgrams, skb);
	vs->rx_bytes += skb->len;
	vs->rx_mem += skb->truesize;
	vso_flow_wake(vs, EPOLLIN | EPOLLRDNORM | EPOLLRDBAND);
out:
	spin_unlock(&vs->lock);
	if (other)
		vso_sock_put(other);
}

/* --------------------------------------------------------------------------------------------------------------- errors */

/* an entry for the error queue: outer and inner header say who and where, then what is known of the datagram. NULL without memory */
static struct sk_buff *vso_error_skb(const struct vso_error *e, const union vso_addr *offender, const union vso_addr *to,
				     const u8 *data, u32 len)
{
	bool six = vso_addr_is_six(to);
	u32 head = six ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	struct sk_buff *skb = alloc_skb(2 * head + len, GFP_ATOMIC | __GFP_NOWARN);
	struct sock_exterr_skb *serr;

	if (!skb)
		return NULL;
	skb_reset_network_header(skb);
	skb_put(skb, 2 * head);
	vso_put_ip(skb->data, six, offender, to, 64, 0, len);
	vso_put_ip(skb->data + head, six, offender, to, 64, 0, len);
	skb_pull(skb, 2 * head);
	skb_reset_transport_header(skb);
	skb_put_data(skb, data, len);
	skb->protocol = htons(six ? ETH_P_IPV6 : ETH_P_IP);
	skb->tstamp = ktime_get_real();
	serr = SKB_EXT_ERR(skb);
	memset(serr, 0, sizeof(*serr));
	serr->ee.ee_errno = le32_to_cpu(e->error);
	serr->ee.ee_origin = e->origin;
	serr->ee.ee_type = e->icmp_type;
	serr->ee.ee_code = e->icmp_code;
	serr->ee.ee_info = le32_to_cpu(e->info);
	serr->addr_offset = head + (six ? offsetof(struct ipv6hdr, daddr) : offsetof(struct iphdr, daddr));
	serr->port = vso_addr_port(to);
	return skb;
}

/* does it end a connected socket's hopes natively? (net/ipv4/udp.c: __udp4_lib_err, net/ipv6/udp.c: __udp6_lib_err) */
static bool vso_error_hard(const struct sock *sk, const struct vso_error *e)
{
	int err;

	if (e->origin == SO_EE_ORIGIN_ICMP6)
		return icmpv6_err_convert(e->icmp_type, e->icmp_code, &err);
	if (e->origin != SO_EE_ORIGIN_ICMP)
		return false;
	if (e->icmp_type == ICMP_DEST_UNREACH && e->icmp_code == ICMP_FRAG_NEEDED)
		return READ_ONCE(inet_sk(sk)->pmtudisc) != IP_PMTUDISC_DONT;
	if (e->icmp_type == ICMP_DEST_UNREACH)
		return e->icmp_code <= NR_ICMP_UNREACH && icmp_err_convert[e->icmp_code].fatal;
	return e->icmp_type == ICMP_PARAMETERPROB;
}

/** vso_rx_error() - a datagram that was sent met an error */
void vso_rx_error(const struct vso_msg *m)
{
	union vso_addr to = {}, offender = {};
	struct vso_sock *vs = m->vs;
	const u8 *uri = m->data + sizeof(struct vso_error);
	u32 uri_len, offender_len, off, error;
	struct sk_buff *skb = NULL;
	struct vso_error e;
	bool queue;

	memcpy(&e, m->data, sizeof(e));
	uri_len = le16_to_cpu(e.uri_len);
	offender_len = le16_to_cpu(e.offender_len);
	off = sizeof(e) + uri_len + offender_len;
	error = le32_to_cpu(e.error);
	if (off > m->len || vs->row->type != SOCK_DGRAM || !error || error >= MAX_ERRNO)
		return;
	if (vs->row->family == AF_IPX) {
		vso_ipx_error(vs, error);
		return;
	}
	spin_lock(&vs->lock);
	if (vs->state != VSO_ST_CONNECTED || vs->closing || !vs->sk)
		goto out;
	if (!uri_len || vso_uri_parse(uri, uri_len, vs->row->family, &to))
		to = vs->peer.sa.sa_family ? vs->peer : vs->target;
	if (vs->conn && (vs->conn == VSO_TO_NATIVE || !vso_addr_equal(&to, &vs->peer)))
		goto out;
	if (!offender_len || vso_uri_parse(uri + uri_len, offender_len, vs->row->family, &offender))
		offender.sa.sa_family = vs->row->family;
	if (vso_addr_is_six(&to) != vso_addr_is_six(&offender)) {
		memset(&offender, 0, sizeof(offender));
		offender.sa.sa_family = vs->row->family;
	}
	queue = vso_addr_is_six(&to) ? vso_inet6_recverr(vs->sk) : vso_inet_recverr(vs->sk);
	if (e.origin && !queue && ((vs->addr_only && !vs->conn) || !vso_error_hard(vs->sk, &e)))
		goto out;
	if (e.origin && queue)
		skb = vso_error_skb(&e, &offender, &to, m->data + off, m->len - off);
	if (skb && sock_queue_err_skb(vs->sk, skb))
		kfree_skb(skb);		/* no room, as natively */
	if (e.origin != SO_EE_ORIGIN_LOCAL)
		WRITE_ONCE(vs->sk->sk_err, error);
	vso_flow_wake(vs, EPOLLERR | EPOLLIN | EPOLLRDNORM | EPOLLOUT | EPOLLWRNORM);
out:
	spin_unlock(&vs->lock);
}

/* ----------------------------------------------------------------------------------------------------------- receiving */

/* did something arrive at the carrier, from inside the guest? */
static __poll_t vso_dgram_native(struct vso_sock *vs, struct socket *sock)
{
	if (!inet_sk(sock->sk)->inet_num || READ_ONCE(vs->conn) == VSO_TO_DEVICE)
		return 0;
	return vs->row->native->poll(sock->file, sock, NULL) & (EPOLLIN | EPOLLRDNORM);
}

static bool vso_dgram_recv_ready(struct vso_sock *vs, u32 arg)
{
	struct socket *sock;
	bool ready;

	spin_lock_bh(&vs->lock);
	sock = vs->sock;
	ready = !sock || !skb_queue_empty(&vs->dgrams) || vs->rcv_shut || vs->state == VSO_ST_GONE || READ_ONCE(vs->sk->sk_err);
	spin_unlock_bh(&vs->lock);
	return ready || vso_dgram_native(vs, sock);
}

/* the next datagram, with a reference; @peek: it stays in the queue */
static struct sk_buff *vso_dgram_next(struct vso_sock *vs, bool peek)
{
	struct sk_buff *skb;

	spin_lock_bh(&vs->lock);
	skb = skb_peek(&vs->dgrams);
	if (skb && peek) {
		skb_get(skb);
	} else if (skb) {
		__skb_unlink(skb, &vs->dgrams);
		vs->rx_bytes -= skb->len;
		vs->rx_mem -= skb->truesize;
	}
	spin_unlock_bh(&vs->lock);
	return skb;
}

static void vso_dgram_name(struct msghdr *msg, const struct vso_sock *vs, struct sk_buff *skb)
{
	union vso_addr *a = msg->msg_name;

	if (!a)
		return;
	memset(a, 0, vs->row->family == AF_INET6 ? sizeof(a->v6) : sizeof(a->v4));
	a->sa.sa_family = vs->row->family;
	if (vs->row->family == AF_INET) {
		a->v4.sin_port = udp_hdr(skb)->source;
		a->v4.sin_addr.s_addr = ip_hdr(skb)->saddr;
	} else if (skb->protocol == htons(ETH_P_IP)) {
		a->v6.sin6_port = udp_hdr(skb)->source;
		ipv6_addr_set_v4mapped(ip_hdr(skb)->saddr, &a->v6.sin6_addr);
	} else {
		a->v6.sin6_port = udp_hdr(skb)->source;
		a->v6.sin6_addr = ipv6_hdr(skb)->saddr;
		a->v6.sin6_scope_id = ipv6_iface_scope_id(&a->v6.sin6_addr, IP6CB(skb)->iif);
	}
	msg->msg_namelen = vso_addr_len(a);
}

/* the control messages of udp_recvmsg() and udpv6_recvmsg() */
static void vso_dgram_control(struct msghdr *msg, struct vso_sock *vs, struct sock *sk, struct sk_buff *skb)
{
	bool six = skb->protocol == htons(ETH_P_IPV6);

	sock_recv_cmsgs(msg, sk, skb);
	if (vs->row->protocol == IPPROTO_UDP && udp_test_bit(GRO_ENABLED, sk))
		udp_cmsg_recv(msg, sk, skb);
	if (six) {
		if (inet6_sk(sk)->rxopt.all)
			ip6_datagram_recv_ctl(sk, msg, skb);
		return;
	}
	if (ipv6_sk_rxinfo(sk)) {
		struct in6_pktinfo info = { .ipi6_ifindex = PKTINFO_SKB_CB(skb)->ipi_ifindex };

		ipv6_addr_set_v4mapped(ip_hdr(skb)->daddr, &info.ipi6_addr);
		put_cmsg(msg, SOL_IPV6, IPV6_PKTINFO, sizeof(info), &info);
	}
	if (vso_inet_cmsg_flags(sk))
		ip_cmsg_recv_offset(msg, sk, skb, sizeof(struct udphdr), 0);
}

int vso_dgram_recvmsg(struct socket *sock, struct msghdr *msg, size_t len, int flags)
{
	struct vso_sock *vs = vso_sock_get(sock);
	struct sock *sk = sock->sk;
	struct sk_buff *skb;
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
	while (!(skb = vso_dgram_next(vs, flags & MSG_PEEK))) {
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
		if (vso_poll_receive(vs, sk, timeo, vso_dgram_recv_ready, 0))
			continue;
		err = vso_wait_event(vs, sk, &timeo, vso_dgram_recv_ready, 0, false);
		if (err)
			goto out;
	}
	n = min_t(size_t, skb->len, len);
	if (n < skb->len)
		msg->msg_flags |= MSG_TRUNC;
	err = skb_copy_datagram_msg(skb, 0, msg, n);
	if (!err) {
		vso_dgram_name(msg, vs, skb);
		vso_dgram_control(msg, vs, sk, skb);
		err = flags & MSG_TRUNC ? skb->len : n;
	}
	consume_skb(skb);
	vso_poll_answered(vs);
out:
	vso_sock_put(vs);
	return err;
}

/**
 * vso_dgram_undecided_recvmsg() - wait where the takeover can be seen
 *
 * A thread may wait in recv() while another makes the first sendto(); inside the native recvmsg() it would go on waiting for native
 * datagrams alone.
 */
int vso_dgram_undecided_recvmsg(const struct vso_row *row, struct socket *sock, struct msghdr *msg, size_t len, int flags)
{
	DEFINE_WAIT_FUNC(wait, woken_wake_function);
	struct sock *sk = sock->sk;
	long timeo;
	int err;

	if (flags & (MSG_DONTWAIT | MSG_ERRQUEUE) || !vso_eligible(row, sk))
		return row->native->recvmsg(sock, msg, len, flags);
	timeo = sock_rcvtimeo(sk, 0);
	for (;;) {
		err = row->native->recvmsg(sock, msg, len, flags | MSG_DONTWAIT);
		if (err != -EAGAIN)
			return err;
		add_wait_queue(sk_sleep(sk), &wait);
		smp_mb();	/* first queued, then looked; pairs with skwq_has_sleeper() */
		while (smp_load_acquire(&sock->ops) == &row->undecided && !READ_ONCE(sk->sk_err) && !READ_ONCE(sk->sk_shutdown) &&
		       !(row->native->poll(sock->file, sock, NULL) & EPOLLIN)) {
			err = timeo ? signal_pending(current) ? sock_intr_errno(timeo) : 0 : -EAGAIN;
			if (err)
				break;
			timeo = wait_woken(&wait, TASK_INTERRUPTIBLE, timeo);
			err = -EAGAIN;
		}
		remove_wait_queue(sk_sleep(sk), &wait);
		if (smp_load_acquire(&sock->ops) != &row->undecided)
			return vso_again(sock, recvmsg, msg, len, flags);
		if (READ_ONCE(sk->sk_shutdown) & RCV_SHUTDOWN)
			return row->native->recvmsg(sock, msg, len, flags);
		if (err != -EAGAIN || !timeo)
			return err;
	}
}

__poll_t vso_dgram_poll(struct file *file, struct socket *sock, struct poll_table_struct *wait)
{
	struct sock *sk = sock->sk;
	struct vso_sock *vs;
	__poll_t mask = 0;

	sock_poll_wait(file, sock, wait);
	vs = vso_sock_get(sock);
	if (!vs)
		return vso_again_poll(sock, file);
	vso_poll_busy(vs, wait);
	spin_lock_bh(&vs->lock);
	if (!skb_queue_empty(&vs->dgrams))
		mask |= EPOLLIN | EPOLLRDNORM;
	if (vs->rcv_shut)
		mask |= EPOLLIN | EPOLLRDNORM | EPOLLRDHUP;
	if (vs->rcv_shut && vs->snd_shut)
		mask |= EPOLLHUP;
	if (READ_ONCE(sk->sk_err) || !skb_queue_empty_lockless(&sk->sk_error_queue))
		mask |= EPOLLERR | (sock_flag(sk, SOCK_SELECT_ERR_QUEUE) ? EPOLLPRI : 0);
	if (vso_stream_writable(vs))
		mask |= EPOLLOUT | EPOLLWRNORM | EPOLLWRBAND;
	else
		vso_want_write(vs);
	spin_unlock_bh(&vs->lock);
	if (READ_ONCE(vs->state) == VSO_ST_GONE)
		mask = vso_again_poll(sock, file);
	else
		mask |= vso_dgram_native(vs, sock);
	vso_sock_put(vs);
	return mask;
}
