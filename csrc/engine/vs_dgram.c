/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_dgram - datagram flows: destinations, and datagrams to the host. What comes back is in vs_dgram_in.c.
 *
 * Every datagram travels with a URI: its destination to the host, its source to the guest. Which host address a destination
 * URI stands for is Python's decision (policy, rewriting), asked once for each URI with VSE_EV_DGRAM_DEST and kept in a cache of the
 * flow, most recently used first:
 *
 *	ASKED    Python decides. Datagrams are held, within VSE_DEST_HELD bytes a flow: dropping the first would cost a DNS query
 *	         its whole timeout.
 *	READY    they go to addr.
 *	REFUSED  they are dropped.
 *
 * A driver that knows VSO_F_DGRAM_INFO asks with DEST before it sends to an address, and is answered with the verdict, so that sendto() can
 * fail or go elsewhere. The cache is then how the question becomes cheap; it stays what decides.
 *
 * The same cache names the source of an answer: what comes from the address of a READY entry shows that entry's URI, so the guest
 * sees a reply from where it sent to, whatever the rewriting. Other sources show their real address.
 *
 * A flow that BIND opened is a server of the guest, published by Python: the source of each datagram becomes a READY entry under
 * its real address, so that it may be answered, and nobody else may be sent to without Python's word.
 *
 * Datagrams have no credit: what finds the host's socket full is dropped and counted.
 */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "vse_priv.h"

#define HEAD (sizeof(struct vso_hdr) + sizeof(struct vso_dgram))

/* how one datagram shall be sent */
struct how {
	uint32_t flags;			/* VSO_DG_* */
	uint32_t segment;
	uint8_t ttl, tos;
	struct in6_addr local;
};

struct held {
	struct held *next;
	struct how how;
	uint32_t len;
	uint8_t data[];
};

struct vse_dest {
	TAILQ_ENTRY(vse_dest) entry;
	enum { ASKED, READY, REFUSED } state;
	bool client;			/* a datagram came from it */
	bool wanted;			/* DEST waits for the answer, under this cookie */
	uint32_t cookie;
	uint32_t verdict, error;	/* of REFUSED */
	socklen_t addr_len;
	struct sockaddr_storage addr;
	struct held *first, **last;
	uint16_t uri_len;
	char uri[];
};

/* ---------------------------------------------------------------------------------------------------------- the cache */

static void drop_held(struct vse_flow *f, struct vse_dest *d, bool count)
{
	struct held *h;

	while ((h = d->first)) {
		d->first = h->next;
		f->held -= h->len;
		f->pair->e->reserved -= h->len;
		f->pair->e->stats.dgrams_dropped += count;
		free(h);
	}
	d->last = &d->first;
}

static void dest_free(struct vse_flow *f, struct vse_dest *d)
{
	drop_held(f, d, true);
	f->nasked -= d->state == ASKED;
	f->ndests--;
	TAILQ_REMOVE(&f->dests, d, entry);
	free(d);
}

void vse_dgram_free(struct vse_flow *f)
{
	struct vse_dest *d;

	while ((d = TAILQ_FIRST(&f->dests)))
		dest_free(f, d);
}

static struct vse_dest *dest_find(struct vse_flow *f, const char *uri, uint16_t uri_len)
{
	struct vse_dest *d;

	TAILQ_FOREACH(d, &f->dests, entry) {
		if (d->uri_len != uri_len || memcmp(d->uri, uri, uri_len))
			continue;
		if (d != TAILQ_FIRST(&f->dests)) {
			TAILQ_REMOVE(&f->dests, d, entry);
			TAILQ_INSERT_HEAD(&f->dests, d, entry);
		}
		return d;
	}
	return NULL;
}

static struct vse_dest *dest_new(struct vse_flow *f, const char *uri, uint16_t uri_len)
{
	struct vse_dest *d, *old;

	if (f->ndests == (f->server ? VSE_PEERS_MAX : VSE_DEST_MAX)) {
		/* there are more entries than may be asked for at once: one is not */
		TAILQ_FOREACH_REVERSE(old, &f->dests, vse_destq, entry)
			if (old->state != ASKED)
				break;
		dest_free(f, old);
	}
	d = calloc(1, sizeof(*d) + uri_len);
	if (!d)
		return NULL;
	d->last = &d->first;
	d->uri_len = uri_len;
	memcpy(d->uri, uri, uri_len);
	TAILQ_INSERT_HEAD(&f->dests, d, entry);
	f->ndests++;
	f->nasked++;			/* state is ASKED */
	return d;
}

static bool same_addr(const struct sockaddr_storage *a, const struct sockaddr_storage *b)
{
	const struct sockaddr_in *a4 = (const void *)a, *b4 = (const void *)b;
	const struct sockaddr_in6 *a6 = (const void *)a, *b6 = (const void *)b;

	if (a->ss_family != b->ss_family)
		return false;
	if (a->ss_family == AF_INET)
		return a4->sin_port == b4->sin_port && a4->sin_addr.s_addr == b4->sin_addr.s_addr;
	return a->ss_family == AF_INET6 && a6->sin6_port == b6->sin6_port &&
	       !memcmp(&a6->sin6_addr, &b6->sin6_addr, sizeof(a6->sin6_addr));
}

bool vse_dgram_sent_to(const struct vse_flow *f, const struct sockaddr_storage *ss)
{
	const struct vse_dest *d;

	TAILQ_FOREACH(d, &f->dests, entry)
		if (d->state == READY && same_addr(&d->addr, ss))
			return true;
	return false;
}

/* DEST was asked for this destination: say what became of it */
static void dest_answer(struct vse_flow *f, struct vse_dest *d, uint32_t verdict, uint32_t error)
{
	if (d->wanted)
		vse_vso_reply(f->pair, f, VSO_DEST_REPLY, (uint32_t)f->id, d->cookie, verdict, error, NULL, NULL);
	d->wanted = false;
}

/* --------------------------------------------------------------------------------------------------------- to the host */

static void put_cmsg(struct msghdr *msg, int level, int type, const void *data, size_t len)
{
	struct cmsghdr *c = (struct cmsghdr *)((uint8_t *)msg->msg_control + msg->msg_controllen);

	c->cmsg_level = level;
	c->cmsg_type = type;
	c->cmsg_len = CMSG_LEN(len);
	memcpy(CMSG_DATA(c), data, len);
	msg->msg_controllen += CMSG_SPACE(len);
}

/* the control messages that say `how`, in the words of the protocol that the datagram will have */
static void put_how(struct msghdr *msg, const struct how *how, bool six)
{
	if (how->flags & VSO_DG_TTL)
		put_cmsg(msg, six ? IPPROTO_IPV6 : IPPROTO_IP, six ? IPV6_HOPLIMIT : IP_TTL, &(int){ how->ttl }, sizeof(int));
	if (how->flags & VSO_DG_TOS)
		put_cmsg(msg, six ? IPPROTO_IPV6 : IPPROTO_IP, six ? IPV6_TCLASS : IP_TOS, &(int){ how->tos }, sizeof(int));
	if (how->flags & VSO_DG_LOCAL && six) {
		put_cmsg(msg, IPPROTO_IPV6, IPV6_PKTINFO, &(struct in6_pktinfo){ .ipi6_addr = how->local }, sizeof(struct in6_pktinfo));
	} else if (how->flags & VSO_DG_LOCAL) {
		struct in_pktinfo info = { 0 };

		memcpy(&info.ipi_spec_dst, how->local.s6_addr + 12, 4);
		put_cmsg(msg, IPPROTO_IP, IP_PKTINFO, &info, sizeof(info));
	}
}

/* one call; twice where the first only delivered the error of an earlier datagram (ICMP) and sent nothing. 0 or errno */
static int host_call(struct vse_flow *f, const struct msghdr *msg)
{
	for (int i = 0; i < 2; i++) {
		ssize_t n = sendmsg(f->fd, msg, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n >= 0) {
			f->to_host += (uint64_t)n;
			return 0;
		}
		if (errno == EAGAIN)
			break;
		f->errq = f->readable = true;	/* the error queue may say more */
		vse_flow_run(f);
	}
	return errno;
}

/* the host cannot cut it (an interface without the means, a segment above the MTU): cut it here */
static int host_cut(struct vse_flow *f, struct msghdr *msg, uint32_t segment)
{
	uint8_t *at = f->pair->e->scratch;
	size_t left = 0, n;
	struct iovec iov;
	int error = 0;

	for (size_t i = 0; i < msg->msg_iovlen && left + msg->msg_iov[i].iov_len <= VSE_SCRATCH; i++) {
		memcpy(at + left, msg->msg_iov[i].iov_base, msg->msg_iov[i].iov_len);
		left += msg->msg_iov[i].iov_len;
	}
	msg->msg_iov = &iov;
	msg->msg_iovlen = 1;
	for (; left && !error; at += n, left -= n) {
		n = left < segment ? left : segment;
		iov = (struct iovec){ at, n };
		error = host_call(f, msg);
	}
	return error;
}

static void host_send(struct vse_flow *f, const struct vse_dest *d, const struct how *how, struct iovec *iov, int cnt)
{
	union {
		struct cmsghdr align;
		uint8_t bytes[3 * CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(struct in6_pktinfo))];
	} control = { .bytes = { 0 } };
	struct vse_stats *s = &f->pair->e->stats;
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = (size_t)cnt, .msg_control = &control };
	bool six = d ? vse_is_six(&d->addr) : f->six;
	size_t plain;
	int error = EMSGSIZE;

	if (f->ipx) {
		vse_ipx_send(f, d->uri, d->uri_len, how->tos, iov, cnt);
		return;
	}
	if (d) {
		msg.msg_name = (void *)&d->addr;
		msg.msg_namelen = d->addr_len;
	}
	if (how->flags)
		put_how(&msg, how, six);
	plain = msg.msg_controllen;
	if (how->flags & VSO_DG_SEGMENT)
		put_cmsg(&msg, IPPROTO_UDP, UDP_SEGMENT, &(uint16_t){ (uint16_t)how->segment }, sizeof(uint16_t));
	if (cnt <= VSE_IOV_CALL)
		error = host_call(f, &msg);
	if (how->flags & VSO_DG_SEGMENT && error && error != EAGAIN && cnt <= VSE_IOV_CALL) {
		msg.msg_controllen = plain;
		error = host_cut(f, &msg, how->segment);
	}
	if (!error) {
		s->dgrams_to_host++;
		return;
	}
	s->dgrams_dropped++;
	if (error != EAGAIN)
		vse_dgram_failed(f, d ? d->uri : f->peer, d ? d->uri_len : f->peer ? strlen(f->peer) : 0, error);
}

static void hold(struct vse_flow *f, struct vse_dest *d, const struct how *how, const struct vs_chain *c, size_t off, uint32_t len)
{
	struct vse_engine *e = f->pair->e;
	struct held *h = NULL;

	if (f->held + len <= VSE_DEST_HELD && e->reserved + len <= e->config.buf_total)
		h = malloc(sizeof(*h) + len);
	if (!h) {
		e->stats.dgrams_dropped++;
		return;
	}
	h->next = NULL;
	h->how = *how;
	h->len = len;
	vs_chain_read(c, off, h->data, len);
	*d->last = h;
	d->last = &h->next;
	f->held += len;
	e->reserved += len;
}

/* what the driver says of how to send, checked. False: it makes no sense */
static bool read_how(struct vse_flow *f, const struct vso_dgram *dg, const struct vs_chain *c, size_t at, size_t left, struct how *how)
{
	*how = (struct how){ .ttl = dg->ttl, .tos = dg->tos, .segment = dg->segment };
	if (!(f->pair->e->features & VSO_F_DGRAM_INFO))
		return true;
	how->flags = dg->flags & (VSO_DG_TTL | VSO_DG_TOS | VSO_DG_SEGMENT | VSO_DG_LOCAL);
	if (dg->flags & VSO_DG_SEGMENT && !dg->segment)
		return false;
	if (!(dg->flags & VSO_DG_LOCAL))
		return true;
	if (left < VSO_LOCAL_LEN || vs_chain_read(c, at, &how->local, VSO_LOCAL_LEN) != VSO_LOCAL_LEN)
		return false;
	/* only an address at which this flow was reached: the host's others are none of the guest's */
	if (!vse_local_known(f, &how->local))
		how->flags &= ~(uint32_t)VSO_DG_LOCAL;
	return true;
}

void vse_dgram_send(struct vse_flow *f, const struct vs_chain *c, const struct vso_hdr *h)
{
	struct vse_engine *e = f->pair->e;
	struct vse_dest *d = NULL;
	struct vso_dgram dg;
	struct how how;
	char uri[VSO_URI_MAX];
	size_t off, end = sizeof(*h) + h->len;
	int cnt;

	if (h->len < sizeof(dg) || vs_chain_read(c, sizeof(*h), &dg, sizeof(dg)) < sizeof(dg) || dg.uri_len > VSO_URI_MAX ||
	    dg.uri_len > h->len - sizeof(dg) || (f->ipx && !dg.uri_len) || !read_how(f, &dg, c, HEAD + dg.uri_len, h->len - sizeof(dg) - dg.uri_len, &how)) {
		vse_flow_reset(f, EPROTO);
		return;
	}
	off = HEAD + dg.uri_len;
	if (e->features & VSO_F_DGRAM_INFO && dg.flags & VSO_DG_LOCAL)
		off += VSO_LOCAL_LEN;
	vs_chain_read(c, HEAD, uri, dg.uri_len);
	if (dg.uri_len && !(f->connected && f->peer && strlen(f->peer) == dg.uri_len && !memcmp(f->peer, uri, dg.uri_len))) {
		d = dest_find(f, uri, dg.uri_len);
		if (!d && f->nasked < VSE_DEST_ASK_MAX && (d = dest_new(f, uri, dg.uri_len)))
			vse_event(e, VSE_EV_DGRAM_DEST, f, 0, 0, uri, dg.uri_len);
		if (!d || d->state == REFUSED) {
			e->stats.dgrams_dropped++;
			return;
		}
		if (d->state == ASKED) {
			hold(f, d, &how, c, off, (uint32_t)(end - off));
			return;
		}
	}
	vse_payload_iov(c, false, off, end - off, e->iov, &cnt);
	host_send(f, d, &how, e->iov, cnt);
}

void vse_dgram_ask(struct vse_flow *f, const struct vs_chain *c, const struct vso_hdr *h)
{
	uint32_t verdict = VSO_OFFLOAD, error = 0;
	struct vse_dest *d = NULL;
	char uri[VSO_URI_MAX];
	uint16_t len = (uint16_t)h->len;

	if (!h->len || h->len > VSO_URI_MAX || vs_chain_read(c, sizeof(*h), uri, h->len) != h->len || !vse_printable(uri, len)) {
		error = EINVAL;
	} else if (!(d = dest_find(f, uri, len))) {
		if (f->nasked < VSE_DEST_ASK_MAX && (d = dest_new(f, uri, len)))
			vse_event(f->pair->e, VSE_EV_DGRAM_DEST, f, 0, 0, uri, len);
		else
			error = ENOBUFS;
	}
	if (d && d->state == ASKED) {
		d->wanted = true;
		d->cookie = h->cookie;
		return;
	}
	if (d && d->state == REFUSED) {
		verdict = d->verdict;
		error = d->error;
	}
	vse_vso_reply(f->pair, f, VSO_DEST_REPLY, (uint32_t)f->id, h->cookie, verdict, error, NULL, NULL);
}

int vse_dgram_dest(struct vse_engine *e, uint64_t handle, const char *uri, const void *addr, uint32_t addr_len, uint32_t verdict,
		   uint32_t error)
{
	size_t len = strlen(uri);
	bool refused = verdict != VSO_OFFLOAD || error;
	struct vse_dest *d;
	struct vse_flow *f;
	int rc = 0;

	if (!len || len > VSO_URI_MAX || (!refused && (!addr_len || addr_len > sizeof(d->addr))))
		return -EINVAL;
	vse_lock(e);
	f = vse_flow_of(e, handle);
	if (!f || !f->dgram || f->state == ST_DEAD) {
		rc = -ESTALE;
		goto out;
	}
	d = dest_find(f, uri, (uint16_t)len);
	if (!d && !(d = dest_new(f, uri, (uint16_t)len))) {
		rc = -ENOMEM;
		goto out;
	}
	f->nasked -= d->state == ASKED;
	d->state = refused ? REFUSED : READY;
	d->verdict = verdict;
	d->error = error;
	dest_answer(f, d, verdict, error);
	if (!refused) {
		memset(&d->addr, 0, sizeof(d->addr));
		memcpy(&d->addr, addr, addr_len);
		d->addr_len = addr_len;
		for (struct held *h = d->first; h; h = h->next) {
			struct iovec iov = { h->data, h->len };

			host_send(f, d, &h->how, &iov, 1);
		}
	}
	drop_held(f, d, refused);
out:
	vse_unlock(e);
	return rc;
}

int vse_dgram_client(struct vse_engine *e, uint64_t handle, const char *uri, void *addr, uint32_t room)
{
	size_t len = strlen(uri);
	struct vse_dest *d;
	struct vse_flow *f;
	int rc = -ENOENT;

	vse_lock(e);
	f = vse_flow_of(e, handle);
	if (f && f->dgram && f->state != ST_DEAD && len <= VSO_URI_MAX && (d = dest_find(f, uri, (uint16_t)len)) && d->client &&
	    d->state == READY && d->addr_len <= room) {
		memcpy(addr, &d->addr, d->addr_len);
		rc = (int)d->addr_len;
	}
	vse_unlock(e);
	return rc;
}

/* ------------------------------------------------------------------------------------------------------ names of senders */

/* a client of the guest's server: it may be answered */
static void remember(struct vse_flow *f, const char *uri, const struct sockaddr_storage *ss, socklen_t ss_len)
{
	struct vse_dest *d = dest_find(f, uri, (uint16_t)strlen(uri));

	if (!d)
		d = dest_new(f, uri, (uint16_t)strlen(uri));
	if (!d || d->state == READY)
		return;		/* no memory, and the answer is Python's to allow; or the URI stands for another address */
	f->nasked -= d->state == ASKED;
	d->state = READY;
	d->client = true;
	d->addr = *ss;
	d->addr_len = ss_len;
	dest_answer(f, d, VSO_OFFLOAD, 0);
	drop_held(f, d, true);
}

const char *vse_dgram_name(struct vse_flow *f, const struct sockaddr_storage *ss, socklen_t ss_len, bool sent, char *buf, size_t *len)
{
	struct vse_dest *d;

	if (!f->connected) {
		TAILQ_FOREACH(d, &f->dests, entry) {
			if (d->state != READY || !same_addr(&d->addr, ss))
				continue;
			TAILQ_REMOVE(&f->dests, d, entry);
			TAILQ_INSERT_HEAD(&f->dests, d, entry);
			*len = d->uri_len;
			return d->uri;
		}
		vse_uri_format(buf, f->ping ? "icmp" : "udp", ss);
		if (f->server && buf[0] && !sent)
			remember(f, buf, ss, ss_len);
	}
	if (f->connected || !buf[0]) {
		*len = f->peer ? strlen(f->peer) : 0;
		return f->peer;
	}
	*len = strlen(buf);
	return buf;
}
