/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_sockopt - which socket options of the guest reach the host socket.
 *
 * One whitelist for the options that ride in CONNECT and BIND and for SETSOCKOPT and GETSOCKOPT: those that act on the connection
 * itself. What acts on the application's side (timeouts, SO_RCVLOWAT, SO_ERROR, SO_LINGER, ...) is the driver's business; what would
 * act on the host (SO_MARK, SO_BINDTODEVICE, IP_TRANSPARENT, filters, ...) is nobody's. The rest is ENOPROTOOPT, as Linux says.
 *
 * The numbers on the wire are those of asm-generic. They are used as they are: the assertions below hold on every Linux
 * architecture but alpha, hppa, mips and sparc, where this needs a translation.
 */
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "vse_priv.h"

_Static_assert(SOL_SOCKET == 1 && SO_REUSEADDR == 2 && SO_KEEPALIVE == 9 && SO_REUSEPORT == 15, "asm-generic socket options");

enum { SET = 1, GET = 2, BOTH = 3 };

static const struct {
	int level, name;
	unsigned how;
} whitelist[] = {
	{ SOL_SOCKET, SO_REUSEADDR, BOTH },
	{ SOL_SOCKET, SO_REUSEPORT, BOTH },
	{ SOL_SOCKET, SO_KEEPALIVE, BOTH },
	{ SOL_SOCKET, SO_OOBINLINE, BOTH },
	{ SOL_SOCKET, SO_SNDBUF, BOTH },
	{ SOL_SOCKET, SO_RCVBUF, BOTH },
	{ SOL_SOCKET, SO_PRIORITY, BOTH },		/* 0..6; more needs CAP_NET_ADMIN */
	{ SOL_SOCKET, SO_MAX_PACING_RATE, BOTH },
	{ IPPROTO_TCP, TCP_NODELAY, BOTH },
	{ IPPROTO_TCP, TCP_CORK, BOTH },
	{ IPPROTO_TCP, TCP_MAXSEG, BOTH },
	{ IPPROTO_TCP, TCP_KEEPIDLE, BOTH },
	{ IPPROTO_TCP, TCP_KEEPINTVL, BOTH },
	{ IPPROTO_TCP, TCP_KEEPCNT, BOTH },
	{ IPPROTO_TCP, TCP_SYNCNT, BOTH },
	{ IPPROTO_TCP, TCP_DEFER_ACCEPT, BOTH },
	{ IPPROTO_TCP, TCP_WINDOW_CLAMP, BOTH },
	{ IPPROTO_TCP, TCP_QUICKACK, BOTH },
	{ IPPROTO_TCP, TCP_USER_TIMEOUT, BOTH },
	{ IPPROTO_TCP, TCP_CONGESTION, BOTH },
	{ IPPROTO_TCP, TCP_NOTSENT_LOWAT, BOTH },
	{ IPPROTO_TCP, TCP_INFO, GET },
	{ IPPROTO_IP, IP_TOS, BOTH },
	{ IPPROTO_IP, IP_TTL, BOTH },
	{ IPPROTO_IP, IP_MTU_DISCOVER, BOTH },
	{ IPPROTO_IP, IP_MTU, GET },
	{ IPPROTO_UDP, UDP_GRO, BOTH },
	{ IPPROTO_IPV6, IPV6_V6ONLY, BOTH },
	{ IPPROTO_IPV6, IPV6_TCLASS, BOTH },
	{ IPPROTO_IPV6, IPV6_UNICAST_HOPS, BOTH },
	{ IPPROTO_IPV6, IPV6_MTU_DISCOVER, BOTH },
	{ IPPROTO_IPV6, IPV6_MTU, GET },
};

static bool allowed(uint32_t level, uint32_t name, unsigned how)
{
	for (size_t i = 0; i < sizeof(whitelist) / sizeof(*whitelist); i++)
		if ((uint32_t)whitelist[i].level == level && (uint32_t)whitelist[i].name == name)
			return whitelist[i].how & how;
	return false;
}

/* a socket without this level (a Unix socket in place of TCP) says EOPNOTSUPP; the guest's own would never */
static int host_error(int error)
{
	return error == EOPNOTSUPP ? ENOPROTOOPT : error;
}

/* the option at *off: false when there is none or it does not fit; *off moves behind it */
static bool next_opt(const uint8_t *opts, uint32_t len, uint32_t *off, struct vso_sockopt *o)
{
	if (len - *off < sizeof(*o))
		return false;
	memcpy(o, opts + *off, sizeof(*o));
	if (o->len > VSO_OPTVAL_MAX || ((o->len + 7) & ~7u) > len - *off - sizeof(*o))
		return false;
	*off += (uint32_t)sizeof(*o) + ((o->len + 7) & ~7u);
	return true;
}

bool vse_opts_valid(const void *opts, uint32_t len)
{
	struct vso_sockopt o;
	uint32_t off = 0;

	while (off < len && next_opt(opts, len, &off, &o))
		;
	return off == len;
}

/*
 * SO_REUSEADDR lets any user's datagram socket take over the port (for streams it does not): the guest may have it on its own socket, the
 * host's stays ours alone.
 */
static bool shares_port(int fd, const struct vso_sockopt *o)
{
	socklen_t len = sizeof(int);
	int type;

	return o->level == SOL_SOCKET && o->name == SO_REUSEADDR && !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) &&
	       type == SOCK_DGRAM;
}

int vse_apply_opts(int fd, const void *opts, uint32_t len)
{
	struct vso_sockopt o;
	uint32_t off = 0, at;
	int rc = 0, error;

	while (at = off, off < len) {
		if (!next_opt(opts, len, &off, &o))
			return rc ? rc : -EINVAL;
		if (!allowed(o.level, o.name, SET))
			error = ENOPROTOOPT;
		else if (shares_port(fd, &o))
			continue;
		else if (setsockopt(fd, (int)o.level, (int)o.name, (const uint8_t *)opts + at + sizeof(o), o.len))
			error = host_error(errno);
		else
			continue;
		rc = rc ? rc : -error;		/* the first failure is told, the rest still applies */
	}
	return rc;
}

/* keep an option for the socket that Python is still connecting */
static int remember(struct vse_flow *f, const struct vso_sockopt *o, const void *value)
{
	uint32_t padded = (o->len + 7) & ~7u;
	uint8_t *opts;

	if (f->opts_len + sizeof(*o) + padded > 4 * VSO_OPTS_MAX)
		return ENOBUFS;
	opts = realloc(f->opts, f->opts_len + sizeof(*o) + padded);
	if (!opts)
		return ENOMEM;
	memcpy(opts + f->opts_len, o, sizeof(*o));
	memset(opts + f->opts_len + sizeof(*o), 0, padded);
	memcpy(opts + f->opts_len + sizeof(*o), value, o->len);
	f->opts = opts;
	f->opts_len += (uint32_t)sizeof(*o) + padded;
	return 0;
}

static void answer(struct vse_flow *f, const struct vso_hdr *req, int error, const struct vso_sockopt *o, const void *value)
{
	uint8_t buf[sizeof(*o) + VSO_OPTVAL_MAX];
	struct vso_hdr h = vse_vso_hdr(f, VSO_SOCKOPT_REPLY, (uint32_t)error, (uint32_t)sizeof(*o) + o->len);

	h.cookie = req->cookie;
	f->told = f->fwd_cnt;
	memcpy(buf, o, sizeof(*o));
	if (o->len)
		memcpy(buf + sizeof(*o), value, o->len);
	vse_send(f->pair, &h, buf, h.len);
}

static void set_option(struct vse_flow *f, const struct vso_hdr *h, const void *payload)
{
	const uint8_t *value = (const uint8_t *)payload + sizeof(struct vso_sockopt);
	struct vso_sockopt o;
	uint32_t room;
	int error = 0;

	memcpy(&o, payload, sizeof(o));
	if (h->len < sizeof(o) || o.len > VSO_OPTVAL_MAX || h->len - sizeof(o) < o.len)
		error = EINVAL;
	else if (f->state == ST_DEAD)
		error = ENOTCONN;
	else if (!allowed(o.level, o.name, SET))
		error = ENOPROTOOPT;
	else if (f->fd >= 0 && !shares_port(f->fd, &o) && setsockopt(f->fd, (int)o.level, (int)o.name, value, o.len))
		error = host_error(errno);
	else if (f->pending)
		error = remember(f, &o, value);
	if (!error && o.level == SOL_SOCKET && o.name == SO_SNDBUF && o.len >= sizeof(room) && !f->dgram) {
		memcpy(&room, value, sizeof(room));
		vse_stream_bound(f, room < UINT32_MAX / 2 ? 2 * room : UINT32_MAX);	/* as Linux counts it, and vso_open.sndbuf */
	}
	o.len = 0;
	answer(f, h, error, &o, NULL);
}

/* getsockopt() of VSO_SOL_QUEUE; 0 or an errno */
static int host_queue(const struct vse_flow *f, uint32_t name, void *value, socklen_t *len)
{
	int bytes = 0;

	if (f->state != ST_STREAM || (name != VSO_QUEUE_OUT && name != VSO_QUEUE_UNSENT))
		return ENOPROTOOPT;
	if (ioctl(f->fd, name == VSO_QUEUE_OUT ? SIOCOUTQ : SIOCOUTQNSD, &bytes))
		bytes = 0;	/* a Unix socket sends what it has at once */
	*len = *len < sizeof(bytes) ? *len : sizeof(bytes);
	memcpy(value, &bytes, *len);
	return 0;
}

static void get_option(struct vse_flow *f, const struct vso_hdr *h, const void *payload)
{
	uint8_t value[VSO_OPTVAL_MAX];
	struct vso_sockopt o;
	socklen_t len;
	int error = 0;

	memcpy(&o, payload, sizeof(o));
	len = o.len;
	if (h->len < sizeof(o) || len > sizeof(value))
		error = EINVAL;
	else if (o.level == VSO_SOL_QUEUE)
		error = host_queue(f, o.name, value, &len);
	else if (!allowed(o.level, o.name, GET))
		error = ENOPROTOOPT;
	else if (f->fd < 0)
		error = ENOTCONN;
	else if (getsockopt(f->fd, (int)o.level, (int)o.name, value, &len))
		error = host_error(errno);
	o.len = error ? 0 : len;
	answer(f, h, error, &o, value);
}

void vse_sockopt_said(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c)
{
	uint8_t payload[sizeof(struct vso_sockopt) + VSO_OPTVAL_MAX] = { 0 };

	vs_chain_read(c, sizeof(*h), payload, h->len < sizeof(payload) ? h->len : sizeof(payload));
	if (h->type == VSO_SETSOCKOPT)
		set_option(f, h, payload);
	else
		get_option(f, h, payload);
}
