/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_dgram - datagram flows.
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
 * The same cache names the source of an answer: what comes from the address of a READY entry shows that entry's URI, so the guest
 * sees a reply from where it sent to, whatever the rewriting. Other sources show their real address.
 *
 * A flow that BIND opened is a server of the guest, published by Python: the source of each datagram becomes a READY entry under
 * its real address, so that it may be answered, and nobody else may be sent to without Python's word.
 *
 * Datagrams have no credit. What finds no room is dropped and counted: towards the host when its socket is full, towards the
 * guest when the chain is too small for the datagram and its URI (a part of a datagram is worth nothing, and the protocol cannot
 * say that it is one). While the guest has no chain at all, datagrams wait in the host socket's own buffer.
 */
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "vse_priv.h"

#define HEAD (sizeof(struct vso_hdr) + sizeof(struct vso_dgram))

enum dest_state { ASKED, READY, REFUSED };

struct held {
	struct held *next;
	uint32_t len;
	uint8_t data[];
};

struct vse_dest {
	TAILQ_ENTRY(vse_dest) entry;
	enum dest_state state;
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

/* --------------------------------------------------------------------------------------------------------- to the host */

static void host_send(struct vse_flow *f, const struct vse_dest *d, struct iovec *iov, int cnt)
{
	struct vse_stats *s = &f->pair->e->stats;
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = (size_t)cnt };
	ssize_t n = -1;

	if (d) {
		msg.msg_name = (void *)&d->addr;
		msg.msg_namelen = d->addr_len;
	}
	/* twice: the first may only deliver the error of an earlier datagram (ICMP), and then sends nothing */
	for (int i = 0; i < 2 && n < 0 && cnt <= VSE_IOV_CALL; i++) {
		n = sendmsg(f->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n < 0 && errno == EAGAIN)
			break;
	}
	if (n < 0)
		s->dgrams_dropped++;
	else
		s->dgrams_to_host++;
	f->to_host += n > 0 ? (uint64_t)n : 0;
}

static void hold(struct vse_flow *f, struct vse_dest *d, const struct vs_chain *c, size_t off, uint32_t len)
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
	h->len = len;
	vs_chain_read(c, off, h->data, len);
	*d->last = h;
	d->last = &h->next;
	f->held += len;
	e->reserved += len;
}

void vse_dgram_send(struct vse_flow *f, const struct vs_chain *c, const struct vso_hdr *h)
{
	struct vse_engine *e = f->pair->e;
	struct vse_dest *d = NULL;
	struct vso_dgram dg;
	char uri[VSO_URI_MAX];
	size_t off;
	int cnt;

	if (h->len < sizeof(dg) || vs_chain_read(c, sizeof(*h), &dg, sizeof(dg)) < sizeof(dg) || dg.uri_len > VSO_URI_MAX ||
	    dg.uri_len > h->len - sizeof(dg)) {
		vse_flow_reset(f, EPROTO);
		return;
	}
	off = HEAD + dg.uri_len;
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
			hold(f, d, c, off, h->len - (uint32_t)(off - sizeof(*h)));
			return;
		}
	}
	vse_payload_iov(c, false, off, h->len - (off - sizeof(*h)), e->iov, &cnt);
	host_send(f, d, e->iov, cnt);
}

int vse_dgram_dest(struct vse_engine *e, uint64_t handle, const char *uri, const void *addr, uint32_t addr_len, uint32_t error)
{
	size_t len = strlen(uri);
	struct vse_dest *d;
	struct vse_flow *f;
	int rc = 0;

	if (!len || len > VSO_URI_MAX || (!error && (!addr_len || addr_len > sizeof(d->addr))))
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
	d->state = error ? REFUSED : READY;
	if (!error) {
		memset(&d->addr, 0, sizeof(d->addr));
		memcpy(&d->addr, addr, addr_len);
		d->addr_len = addr_len;
		for (struct held *h = d->first; h; h = h->next) {
			struct iovec iov = { h->data, h->len };

			host_send(f, d, &iov, 1);
		}
	}
	drop_held(f, d, error != 0);
out:
	vse_unlock(e);
	return rc;
}

/* -------------------------------------------------------------------------------------------------------- to the guest */

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
	d->addr = *ss;
	d->addr_len = ss_len;
	drop_held(f, d, true);
}

/* the URI that the guest knows the sender by; NULL: it has none */
static const char *source(struct vse_flow *f, const struct sockaddr_storage *ss, socklen_t ss_len, char *buf, size_t *len)
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
		vse_uri_format(buf, "udp", ss);
		if (f->server && buf[0])
			remember(f, buf, ss, ss_len);
	}
	if (f->connected || !buf[0]) {
		*len = f->peer ? strlen(f->peer) : 0;
		return f->peer;
	}
	*len = strlen(buf);
	return buf;
}

enum vse_turn vse_dgram_turn(struct vse_flow *f)
{
	struct vse_pair *p = f->pair;
	struct vse_engine *e = p->e;

	for (int n = 0, errors = 0; f->readable; n++) {
		struct sockaddr_storage ss = { 0 };
		socklen_t ss_len = sizeof(ss);
		char buf[VSO_URI_MAX + 1];
		struct vs_chain *c;
		const char *uri;
		size_t uri_len;
		ssize_t got;

		if (n == VSE_TURN_MSGS)
			return TURN_AGAIN;
		c = vse_rx_get(p);
		if (!c)
			return TURN_STARVED;
		got = recvfrom(f->fd, e->scratch, VSE_SCRATCH, MSG_DONTWAIT, (struct sockaddr *)&ss, &ss_len);
		if (got < 0) {
			vse_rx_unget(p, c);
			/* others report a datagram that was sent before (ICMP), one each; what was received is behind them */
			if (errno == EAGAIN || ++errors == VSE_TURN_MSGS)
				f->readable = false;
			continue;
		}
		uri = source(f, &ss, ss_len, buf, &uri_len);
		if (uri && HEAD + uri_len + (size_t)got <= c->in_len &&
		    sizeof(struct vso_dgram) + uri_len + (size_t)got <= e->max_payload) {
			struct vso_dgram dg = { .uri_len = (uint16_t)uri_len };
			struct vso_hdr h = vse_vso_hdr(f, VSO_DGRAM, 0, (uint32_t)(sizeof(dg) + uri_len + (size_t)got));

			vs_chain_write(c, sizeof(h), &dg, sizeof(dg));
			vs_chain_write(c, HEAD, uri, uri_len);
			vs_chain_write(c, HEAD + uri_len, e->scratch, (size_t)got);
			vse_rx_put(p, c, &h, h.len);
			f->to_guest += (uint64_t)got;
			e->stats.dgrams_to_guest++;
		} else {
			vse_rx_unget(p, c);
			e->stats.dgrams_dropped++;
		}
	}
	return TURN_DONE;
}
