/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_listen - listening flows: listen(2), accepting, and the addresses the guest sees.
 *
 * The credit fields of LISTEN and CREDIT count connections here: the flow accepts while announced (tx_cnt) less accepted by
 * the application (peer_fwd) is below the backlog (peer_alloc). What is beyond waits in the host's own backlog. A chain is taken
 * before accept4, so a connection is never accepted that cannot be announced.
 *
 * Out of file descriptors, of free flows, or with Python behind on its events, a listener stalls: the edge that woke it will not come
 * again, so it stands on engine->stalled and tries again when a flow ends or VSE_RETRY_MS later. It never spins.
 *
 * Addresses.  The peer is who really connected. The local address is the one the guest bound, with the host side's address in place
 * of a wildcard, and always the guest's port: the host's port may be another one. A connection without an address that fits
 * the guest's socket (Unix socket; IPv6 on an IPv4 listener) shows documentation addresses (RFC 5737, RFC 3849): nobody has
 * them, so no application mistakes them for a host it trusts, such as its own loopback.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vse_priv.h"

enum { BACKLOG_MAX = 4096 };		/* net.core.somaxconn's default; the kernel takes the lower of both */

/* ---------------------------------------------------------------------------------------------------------- addresses */

static void format_v4(char *buf, const char *scheme, const void *addr, unsigned port)
{
	char text[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, addr, text, sizeof(text));
	snprintf(buf, VSO_URI_MAX + 1, "%s://%s:%u", scheme, text, port);
}

/* as a URI; a v4-mapped address is an IPv4 one on the wire. Empty if it is no IP address. */
void vse_uri_format(char *buf, const char *scheme, const struct sockaddr_storage *ss)
{
	const struct sockaddr_in *in = (const void *)ss;
	const struct sockaddr_in6 *in6 = (const void *)ss;
	char text[INET6_ADDRSTRLEN], scope[16] = "";

	buf[0] = '\0';
	if (ss->ss_family == AF_INET) {
		format_v4(buf, scheme, &in->sin_addr, ntohs(in->sin_port));
	} else if (ss->ss_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr)) {
		format_v4(buf, scheme, &in6->sin6_addr.s6_addr[12], ntohs(in6->sin6_port));
	} else if (ss->ss_family == AF_INET6) {
		inet_ntop(AF_INET6, &in6->sin6_addr, text, sizeof(text));
		if (in6->sin6_scope_id)
			snprintf(scope, sizeof(scope), "%%%u", in6->sin6_scope_id);
		snprintf(buf, VSO_URI_MAX + 1, "%s6://%s%s/%u", scheme, text, scope, ntohs(in6->sin6_port));
	}
}

static bool is_v6(const char *uri)
{
	return !strncmp(uri, "tcp6:", 5);
}

static bool is_wildcard(const char *uri)
{
	return !strncmp(uri, "tcp://0.0.0.0:", 14) || !strncmp(uri, "tcp6://::/", 10);
}

static const char *port_of(const char *uri)
{
	const char *at = strrchr(uri, is_v6(uri) ? '/' : ':');

	return at ? at + 1 : "0";
}

/* an IPv4 socket cannot show an IPv6 address; the other way round it shows it v4-mapped */
static bool fits(const char *bound, const char *uri)
{
	return uri[0] && (is_v6(bound) || !is_v6(uri));
}

static void name_peer(struct vse_flow *f, const struct sockaddr_storage *ss, char *buf)
{
	vse_uri_format(buf, "tcp", ss);
	if (fits(f->local, buf))
		return;
	snprintf(buf, VSO_URI_MAX + 1, is_v6(f->local) ? "tcp6://2001:db8::1/%u" : "tcp://192.0.2.1:%u",
		 49152 + f->pair->e->next_port++ % 16384);
}

static void name_local(const struct vse_flow *f, int fd, char *buf)
{
	struct sockaddr_storage ss = { 0 };
	socklen_t len = sizeof(ss);
	char host[VSO_URI_MAX + 1] = "";
	size_t keep;

	if (!is_wildcard(f->local)) {
		snprintf(buf, VSO_URI_MAX + 1, "%s", f->local);
		return;
	}
	if (!getsockname(fd, (struct sockaddr *)&ss, &len))
		vse_uri_format(host, "tcp", &ss);
	if (!fits(f->local, host))
		snprintf(host, sizeof(host), is_v6(f->local) ? "tcp6://2001:db8::2/0" : "tcp://192.0.2.2:0");
	keep = (size_t)(port_of(host) - host);
	snprintf(buf, VSO_URI_MAX + 1, "%.*s%s", (int)keep, host, port_of(f->local));
}

/* ------------------------------------------------------------------------------------------------------------ stalling */

static enum vse_turn stall(struct vse_flow *f)
{
	struct vse_engine *e = f->pair->e;

	if (!f->stalled) {
		f->stalled = true;
		TAILQ_INSERT_TAIL(&e->stalled, f, aux);
	}
	if (!e->retry_at)
		e->retry_at = vse_now_ms() + VSE_RETRY_MS;
	return TURN_DONE;
}

void vse_listen_unstall(struct vse_flow *f)
{
	struct vse_engine *e = f->pair->e;

	if (!f->stalled)
		return;
	f->stalled = false;
	TAILQ_REMOVE(&e->stalled, f, aux);
	if (TAILQ_EMPTY(&e->stalled))
		e->retry_at = 0;
}

void vse_listen_retry(struct vse_engine *e, uint64_t now)
{
	struct vse_flow *f;

	if (!e->retry_at || e->retry_at > now)
		return;
	e->retry_at = 0;
	while ((f = TAILQ_FIRST(&e->stalled))) {
		vse_listen_unstall(f);
		vse_flow_run(f);
	}
}

/* ----------------------------------------------------------------------------------------------------------- the flow */

void vse_listen(struct vse_flow *f, const struct vso_hdr *h)
{
	int backlog = h->arg < BACKLOG_MAX ? (int)h->arg : BACKLOG_MAX, error = 0;

	if (f->state == ST_BOUND)
		f->tx_cnt = f->peer_fwd = f->peer_alloc = 0;
	if (!vse_stream_credit(f, h->buf_alloc, h->fwd_cnt))
		return;
	if (listen(f->fd, backlog))
		error = errno;
	else if (f->state == ST_BOUND)
		error = -vse_flow_poll(f);
	if (!error && f->state == ST_BOUND)
		f->state = ST_LISTEN;
	vse_vso_reply(f->pair, f, VSO_LISTEN_REPLY, (uint32_t)f->id, h->cookie, VSO_OFFLOAD, (uint32_t)error, f->local, NULL);
}

static uint32_t device_id(struct vse_engine *e)
{
	uint32_t id;

	/* there are fewer flows than ids */
	do {
		id = VSO_FLOW_DEVICE | ++e->next_device_id;
	} while (id == VSO_FLOW_DEVICE || vse_flow_find(e, id));
	return id;
}

/* make the flow of an accepted connection and put ACCEPT into the chain; false: no room, the connection is reset */
static bool announce(struct vse_flow *f, int fd, const struct sockaddr_storage *ss, struct vs_chain *c)
{
	struct vse_engine *e = f->pair->e;
	struct vse_flow *n = vse_flow_new(e, f->pair, device_id(e));
	uint8_t buf[sizeof(struct vso_accept) + 2 * (VSO_URI_MAX + 1)];
	char local[VSO_URI_MAX + 1], peer[VSO_URI_MAX + 1];
	struct vso_accept a;
	struct vso_hdr h;

	if (!n) {
		close(fd);
		return false;
	}
	n->fd = fd;
	n->state = ST_STREAM;
	n->buf_alloc = n->promised = f->buf_alloc;	/* SO_SNDBUF is inherited */
	n->fixed = f->fixed;
	n->peer_alloc = e->features & VSO_F_EARLY_DATA ? VSO_EARLY_MAX : 0;
	if (vse_flow_poll(n)) {
		vse_flow_free(n);
		return false;
	}
	n->counted = true;
	vse_stream_begin(n);
	name_local(f, fd, local);
	name_peer(f, ss, peer);
	a = (struct vso_accept){ .new_flow = (uint32_t)n->id, .local_len = (uint16_t)strlen(local), .peer_len = (uint16_t)strlen(peer),
				 .buf_alloc = n->buf_alloc };
	memcpy(buf, &a, sizeof(a));
	memcpy(buf + sizeof(a), local, a.local_len);
	memcpy(buf + sizeof(a) + a.local_len, peer, a.peer_len);
	h = vse_vso_hdr(f, VSO_ACCEPT, 0, (uint32_t)sizeof(a) + a.local_len + a.peer_len);
	vs_chain_write(c, sizeof(h), buf, h.len);
	vse_rx_put(f->pair, c, &h, h.len);
	f->tx_cnt++;
	vse_event(e, VSE_EV_ACCEPTED, f, 0, 0, peer, a.peer_len);
	return true;
}

enum vse_turn vse_listen_turn(struct vse_flow *f)
{
	struct vse_engine *e = f->pair->e;

	for (int n = 0; f->readable && f->tx_cnt - f->peer_fwd < f->peer_alloc; n++) {
		struct sockaddr_storage ss = { 0 };
		socklen_t len = sizeof(ss);
		struct vs_chain *c;
		int fd;

		if (n == VSE_TURN_MSGS)
			return TURN_AGAIN;
		if (!e->nfree || vse_paused(e))
			return stall(f);
		c = vse_rx_get(f->pair);
		if (!c)
			return TURN_STARVED;
		fd = accept4(f->fd, (struct sockaddr *)&ss, &len, SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (fd >= 0) {
			if (announce(f, fd, &ss, c))
				continue;
			vse_rx_unget(f->pair, c);
			return stall(f);
		}
		vse_rx_unget(f->pair, c);
		switch (errno) {
		case EAGAIN:
			f->readable = false;
			break;
		case EMFILE: case ENFILE: case ENOBUFS: case ENOMEM:
			return stall(f);
		case EINVAL: case EBADF: case ENOTSOCK: case EOPNOTSUPP:
			vse_flow_reset(f, (uint32_t)errno);	/* not listening any more: somebody else shut the socket down */
			break;
		default:
			break;		/* an error of that one connection (accept(2)): the next may be well */
		}
	}
	return TURN_DONE;
}
