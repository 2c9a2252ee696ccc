/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_ipx - datagram flows of IPX: the guest as a node of an IPX network that is carried over UDP (RFC 1234).
 *
 * One UDP socket of the host is the whole guest's node, so these flows have no descriptor of their own: what arrives is given to the flow
 * that has the packet's destination socket. The driver sees payloads and addresses only. The 30 bytes of header are written and read
 * here: it cannot claim to be another node, nor does it see a header that is wrong.
 *
 * Addresses.  RFC 1234 makes a node of two zero octets and the IPv4 address, and knows one UDP port, 213. Here the two octets are the UDP
 * port where it is another one, so that several nodes may share an address; on port 213 both are the same.
 *
 * Who is heard.  A packet counts if its UDP sender is the node that its header names as the source (no node can speak for another), and
 * that is a peer of the list that Python gave, this node itself, or one that the addressed flow has sent to. All else is dropped and counted,
 * as is what is shorter than its header says, has a checksum (RFC 1234: ignored), too many hops, or another destination.
 *
 * To the guest.  A packet is looked at before it is taken from the socket: when the ring of its flow has no chain it waits there, and all
 * behind it, until a ring is kicked. So a guest that is slow loses nothing but what the host's socket buffer does not hold, and it delays
 * nobody but itself.
 *
 * Broadcast.  Node ffffffffffff is every peer and this node: one datagram each. VSE_IPX_PEERS bounds what one message can cost.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vse_priv.h"

#define HEAD (sizeof(struct vso_hdr) + sizeof(struct vso_dgram))

enum {
	IPX_UDP_PORT = 213,		/* RFC 1234 */
	IPX_HOPS_MAX = 16,		/* a packet that came through so many routers is lost */
	IPX_DYNAMIC = 0x4000,		/* socket numbers that are given to who asks for any: up to IPX_DYNAMIC_END */
	IPX_DYNAMIC_END = 0x7fff,
	IPX_BUCKETS = 256,
	IPX_BATCH = 64,			/* packets taken before others have their turn */
	IPX_URI_LEN = 6 + 8 + 1 + 12 + 1 + 4,	/* ipx://00000001.007f00000001.4000 */
};

struct ipx_addr {
	uint8_t network[4];
	uint8_t node[6];
	uint8_t socket[2];
};

struct ipx_hdr {
	uint8_t checksum[2];		/* ff ff: none */
	uint8_t length[2];		/* of the packet with this header */
	uint8_t hops;
	uint8_t type;
	struct ipx_addr to, from;
};
_Static_assert(sizeof(struct ipx_hdr) == 30, "an IPX header has 30 bytes");

struct vse_ipx {
	int fd;
	bool waiting;			/* fd is not polled: a ring had no chain */
	uint8_t network[4];
	uint8_t node[6];
	uint32_t npeers;
	uint8_t peers[VSE_IPX_PEERS][6];
	uint16_t next;			/* the dynamic socket number to try first */
	struct vse_flow *bucket[IPX_BUCKETS];
};

static const uint8_t everybody[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };

/* ---------------------------------------------------------------------------------------------------------- addresses */

static void node_of(uint8_t *node, const struct sockaddr_in *in)
{
	uint16_t port = in->sin_port == htons(IPX_UDP_PORT) ? 0 : in->sin_port;

	memcpy(node, &port, 2);
	memcpy(node + 2, &in->sin_addr, 4);
}

static struct sockaddr_in addr_of(const uint8_t *node)
{
	struct sockaddr_in in = { .sin_family = AF_INET };

	memcpy(&in.sin_port, node, 2);
	if (!in.sin_port)
		in.sin_port = htons(IPX_UDP_PORT);
	memcpy(&in.sin_addr, node + 2, 4);
	return in;
}

static uint16_t number_of(const struct ipx_addr *a)
{
	return (uint16_t)(a->socket[0] << 8 | a->socket[1]);
}

static void format(char *buf, const struct ipx_addr *a)
{
	const uint8_t *n = a->network, *d = a->node;

	snprintf(buf, IPX_URI_LEN + 1, "ipx://%02x%02x%02x%02x.%02x%02x%02x%02x%02x%02x.%04x", n[0], n[1], n[2], n[3],
		 d[0], d[1], d[2], d[3], d[4], d[5], number_of(a));
}

static bool hex(const char **at, uint8_t *out, int bytes, char end)
{
	for (int i = 0; i < 2 * bytes; i++) {
		char c = *(*at)++;
		int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;

		if (digit < 0)
			return false;
		out[i / 2] = (uint8_t)(out[i / 2] << 4 | digit);
	}
	return !end || *(*at)++ == end;
}

/* the one text that an address has: what format() writes */
static bool parse(const char *uri, size_t len, struct ipx_addr *a)
{
	memset(a, 0, sizeof(*a));
	if (len != IPX_URI_LEN || memcmp(uri, "ipx://", 6))
		return false;
	uri += 6;
	return hex(&uri, a->network, 4, '.') && hex(&uri, a->node, 6, '.') && hex(&uri, a->socket, 2, 0);
}

/* ------------------------------------------------------------------------------------------------------ node and flows */

static struct vse_flow *flow_at(const struct vse_ipx *x, uint16_t number)
{
	struct vse_flow *f = x->bucket[number % IPX_BUCKETS];

	while (f && f->ipx_number != number)
		f = f->ipx_next;
	return f;
}

int vse_ipx_open(struct vse_engine *e, int fd, uint32_t network, const uint8_t *peers, uint32_t npeers)
{
	struct epoll_event ev = { .events = EPOLLIN, .data.u64 = VSE_SLOT_IPX };
	struct sockaddr_in in = { 0 };
	socklen_t len = sizeof(in);
	struct vse_ipx *x = NULL;
	int rc = 0, fl;

	vse_lock(e);
	if (e->ipx)
		rc = -EBUSY;
	else if (npeers > VSE_IPX_PEERS || getsockname(fd, (struct sockaddr *)&in, &len) || in.sin_family != AF_INET)
		rc = -EINVAL;
	else if ((fl = fcntl(fd, F_GETFL)) < 0 || fcntl(fd, F_SETFL, fl | O_NONBLOCK))
		rc = -errno;
	else if (!(x = calloc(1, sizeof(*x))))
		rc = -ENOMEM;
	else if (epoll_ctl(e->ep, EPOLL_CTL_ADD, fd, &ev))
		rc = -errno;
	if (rc) {
		free(x);
		close(fd);
	} else {
		x->fd = fd;
		x->next = IPX_DYNAMIC;
		network = htonl(network);
		memcpy(x->network, &network, 4);
		node_of(x->node, &in);
		x->npeers = npeers;
		memcpy(x->peers, peers, 6 * (size_t)npeers);
		e->ipx = x;
	}
	vse_unlock(e);
	return rc;
}

void vse_ipx_close(struct vse_engine *e)
{
	if (!e->ipx)
		return;
	close(e->ipx->fd);
	free(e->ipx);
	e->ipx = NULL;
}

void vse_ipx_free(struct vse_flow *f)
{
	struct vse_flow **at;

	if (!f->ipx_number)
		return;
	at = &f->pair->e->ipx->bucket[f->ipx_number % IPX_BUCKETS];
	while (*at != f)
		at = &(*at)->ipx_next;
	*at = f->ipx_next;
	f->ipx_number = 0;
}

/* a socket number nobody has; 0: all are taken */
static uint16_t free_number(struct vse_ipx *x)
{
	for (int i = IPX_DYNAMIC; i <= IPX_DYNAMIC_END; i++) {
		uint16_t number = x->next;

		x->next = number == IPX_DYNAMIC_END ? IPX_DYNAMIC : number + 1;
		if (!flow_at(x, number))
			return number;
	}
	return 0;
}

int vse_ipx_bound(struct vse_engine *e, uint64_t handle, uint16_t number, char *local)
{
	struct ipx_addr a;
	struct vse_flow *f;
	struct vse_ipx *x;
	int rc = 0;

	vse_lock(e);
	x = e->ipx;
	f = vse_flow_of(e, handle);
	if (!f || f->pending != VSE_EV_BIND)
		rc = -ESTALE;
	else if (!x || !f->ipx)
		rc = -EINVAL;
	else if (!number && !(number = free_number(x)))
		rc = -EINVAL;		/* as Linux' bind() has it */
	else if (flow_at(x, number))
		rc = -EADDRINUSE;
	if (!rc) {
		f->ipx_number = number;
		f->ipx_next = x->bucket[number % IPX_BUCKETS];
		x->bucket[number % IPX_BUCKETS] = f;
		f->pending = 0;
		f->state = ST_DGRAM;
		f->counted = true;
		memcpy(a.network, x->network, sizeof(a.network));
		memcpy(a.node, x->node, sizeof(a.node));
		a.socket[0] = (uint8_t)(number >> 8);
		a.socket[1] = (uint8_t)number;
		format(local, &a);
		e->dialect->answer(f, VSE_EV_BIND, VSO_OFFLOAD, 0, local, NULL);
	}
	vse_unlock(e);
	return rc;
}

/* --------------------------------------------------------------------------------------------------------- to the host */

static int send_to(const struct vse_ipx *x, const uint8_t *node, struct iovec *iov, int cnt)
{
	struct sockaddr_in in = addr_of(node);
	struct msghdr msg = { .msg_name = &in, .msg_namelen = sizeof(in), .msg_iov = iov, .msg_iovlen = (size_t)cnt };

	return sendmsg(x->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? errno : 0;
}

void vse_ipx_send(struct vse_flow *f, const char *uri, size_t uri_len, uint8_t type, const struct iovec *data, int cnt)
{
	struct ipx_hdr h = { .checksum = { 0xff, 0xff }, .type = type };
	struct vse_stats *s = &f->pair->e->stats;
	struct vse_ipx *x = f->pair->e->ipx;
	struct iovec iov[1 + VSE_IPX_IOV];
	size_t len = sizeof(h);
	int error = 0;

	for (int i = 0; i < cnt; i++)
		len += data[i].iov_len;
	if (!parse(uri, uri_len, &h.to))
		error = EINVAL;		/* Python allowed what is no address: its own text of one is another */
	else if (cnt > VSE_IPX_IOV || len > UINT16_MAX)
		error = EMSGSIZE;
	if (!error) {
		h.length[0] = (uint8_t)(len >> 8);
		h.length[1] = (uint8_t)len;
		memcpy(h.to.network, x->network, sizeof(h.to.network));	/* 0 means this one, and there is no other */
		memcpy(h.from.network, x->network, sizeof(h.from.network));
		memcpy(h.from.node, x->node, sizeof(h.from.node));
		h.from.socket[0] = (uint8_t)(f->ipx_number >> 8);
		h.from.socket[1] = (uint8_t)f->ipx_number;
		iov[0] = (struct iovec){ &h, sizeof(h) };
		memcpy(iov + 1, data, (size_t)cnt * sizeof(*iov));
		if (memcmp(h.to.node, everybody, sizeof(everybody))) {
			error = send_to(x, h.to.node, iov, cnt + 1);
		} else {
			error = send_to(x, x->node, iov, cnt + 1);
			for (uint32_t i = 0; i < x->npeers; i++)	/* one that cannot be reached takes nothing from the others */
				send_to(x, x->peers[i], iov, cnt + 1);
		}
	}
	if (!error) {
		s->dgrams_to_host++;
		f->to_host += len - sizeof(h);
		return;
	}
	s->dgrams_dropped++;
	if (error != EAGAIN)
		vse_dgram_failed(f, uri, uri_len, error);
}

/* -------------------------------------------------------------------------------------------------------- to the guest */

static bool heard(const struct vse_ipx *x, const struct vse_flow *f, const uint8_t *node, const struct sockaddr_in *in)
{
	struct sockaddr_storage ss = { 0 };

	if (!memcmp(node, x->node, 6))
		return true;
	for (uint32_t i = 0; i < x->npeers; i++)
		if (!memcmp(node, x->peers[i], 6))
			return true;
	memcpy(&ss, in, sizeof(*in));
	return vse_dgram_sent_to(f, &ss);
}

/* the flow that a packet of `got` bytes is for; NULL: it is nobody's, or not what it claims to be */
static struct vse_flow *flow_for(const struct vse_ipx *x, const struct ipx_hdr *h, size_t got, const struct sockaddr_in *in)
{
	size_t len = (size_t)(h->length[0] << 8 | h->length[1]);
	static const uint8_t unknown[4];
	struct vse_flow *f;
	uint8_t node[6];

	if (got < sizeof(*h) || len < sizeof(*h) || len > got || h->checksum[0] != 0xff || h->checksum[1] != 0xff ||
	    h->hops >= IPX_HOPS_MAX)
		return NULL;
	if (memcmp(h->to.network, x->network, 4) && memcmp(h->to.network, unknown, 4))
		return NULL;
	if (memcmp(h->to.node, x->node, 6) && memcmp(h->to.node, everybody, 6))
		return NULL;
	node_of(node, in);
	if ((memcmp(h->from.network, x->network, 4) && memcmp(h->from.network, unknown, 4)) || memcmp(h->from.node, node, 6))
		return NULL;
	f = flow_at(x, number_of(&h->to));
	return f && heard(x, f, node, in) ? f : NULL;
}

/* the packet that was looked at goes to its flow, in this chain. False: the chain was not used */
static bool deliver(struct vse_flow *f, struct vs_chain *c, const struct ipx_hdr *h)
{
	struct vse_engine *e = f->pair->e;
	struct vso_dgram dg = { .uri_len = IPX_URI_LEN, .ttl = h->hops, .tos = h->type };
	size_t len = (size_t)(h->length[0] << 8 | h->length[1]) - sizeof(*h), at = HEAD + IPX_URI_LEN;
	struct ipx_addr from = h->from;
	char uri[IPX_URI_LEN + 1];
	struct vso_hdr out;

	if (recv(e->ipx->fd, e->scratch, VSE_SCRATCH, MSG_DONTWAIT) < (ssize_t)(len + sizeof(*h)) || at + len > c->in_len ||
	    at - sizeof(out) + len > e->max_payload) {
		e->stats.dgrams_dropped++;
		return false;
	}
	memcpy(from.network, e->ipx->network, sizeof(from.network));
	format(uri, &from);
	out = vse_vso_hdr(f, VSO_DGRAM, 0, (uint32_t)(at - sizeof(out) + len));
	vs_chain_write(c, sizeof(out), &dg, sizeof(dg));
	vs_chain_write(c, HEAD, uri, IPX_URI_LEN);
	vs_chain_write(c, at, e->scratch + sizeof(*h), len);
	vse_rx_put(f->pair, c, &out, out.len);
	f->to_guest += len;
	e->stats.dgrams_to_guest++;
	return true;
}

static void poll_for(struct vse_engine *e, uint32_t events)
{
	struct epoll_event ev = { .events = events, .data.u64 = VSE_SLOT_IPX };

	epoll_ctl(e->ep, EPOLL_CTL_MOD, e->ipx->fd, &ev);
	e->ipx->waiting = !events;
}

void vse_ipx_resume(struct vse_engine *e)
{
	if (e->ipx && e->ipx->waiting)
		poll_for(e, EPOLLIN);
}

void vse_ipx_turn(struct vse_engine *e)
{
	struct vse_ipx *x = e->ipx;

	for (int i = 0; x && i < IPX_BATCH; i++) {
		struct sockaddr_in in = { 0 };
		struct ipx_hdr h = { 0 };
		struct iovec iov = { &h, sizeof(h) };
		struct msghdr msg = { .msg_name = &in, .msg_namelen = sizeof(in), .msg_iov = &iov, .msg_iovlen = 1 };
		ssize_t got = recvmsg(x->fd, &msg, MSG_DONTWAIT | MSG_PEEK | MSG_TRUNC);
		struct vs_chain *c;
		struct vse_flow *f;

		if (got < 0)
			return;
		f = flow_for(x, &h, (size_t)got, &in);
		if (!f || f->pair->rx.broken) {
			recv(x->fd, e->scratch, 0, MSG_DONTWAIT);
			e->stats.dgrams_dropped++;
			continue;
		}
		c = vse_ctl_empty(f->pair) ? vse_rx_get(f->pair) : NULL;	/* nothing overtakes what was said before */
		if (!c) {
			poll_for(e, 0);
			return;
		}
		if (!deliver(f, c, &h))
			vse_rx_unget(f->pair, c);
	}
}
