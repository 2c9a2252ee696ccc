// SPDX-License-Identifier: GPL-2.0-only
/*
 * uri.c - socket addresses as URIs, and which of them are the guest's own.
 *
 * The scheme names the address on the wire, not the family of the socket: an AF_INET6 socket that talks to ::ffff:192.0.2.1 says
 * tcp://192.0.2.1:80, and an answer with tcp:// becomes v4-mapped again for it.
 *
 *   tcp://192.0.2.1:80   udp://192.0.2.1:53   tcp6://2001:db8::1/80   udp6://fe80::1%2/53   ipx://000000a1.00000a000001.4000
 */
#include <linux/inet.h>
#include <linux/kernel.h>
#include <net/addrconf.h>
#include <net/ipv6.h>
#include <net/route.h>

#include "vso.h"

/**
 * vso_addr_copy() - take a socket address from the application
 * @family: the family of the socket
 *
 * An AF_INET address of an AF_INET6 socket (legal for datagrams and for connect) becomes v4-mapped.
 *
 * Return: the length of the address, or -EINVAL, -EAFNOSUPPORT as the native calls have it.
 */
int vso_addr_copy(union vso_addr *to, const struct sockaddr *from, int len, int family)
{
	memset(to, 0, sizeof(*to));
	if (len < (int)sizeof(sa_family_t))
		return -EINVAL;
	if (from->sa_family == AF_INET6 && family == AF_INET6) {
		if (len < SIN6_LEN_RFC2133)
			return -EINVAL;
		memcpy(&to->v6, from, min_t(size_t, len, sizeof(to->v6)));
		to->v6.sin6_flowinfo = 0;
		return sizeof(to->v6);
	}
	if (from->sa_family != AF_INET)
		return -EAFNOSUPPORT;
	if (len < (int)sizeof(struct sockaddr_in))
		return -EINVAL;
	if (family == AF_INET) {
		memcpy(&to->v4, from, sizeof(to->v4));
		memset(to->v4.sin_zero, 0, sizeof(to->v4.sin_zero));
		return sizeof(to->v4);
	}
	to->v6.sin6_family = AF_INET6;
	to->v6.sin6_port = ((const struct sockaddr_in *)from)->sin_port;
	ipv6_addr_set_v4mapped(((const struct sockaddr_in *)from)->sin_addr.s_addr, &to->v6.sin6_addr);
	return sizeof(to->v6);
}

int vso_addr_len(const union vso_addr *addr)
{
	return addr->sa.sa_family == AF_INET6 ? sizeof(addr->v6) : sizeof(addr->v4);
}

__be16 vso_addr_port(const union vso_addr *addr)
{
	return addr->sa.sa_family == AF_INET6 ? addr->v6.sin6_port : addr->v4.sin_port;
}

/**
 * vso_uri_format() - write an address as a URI
 *
 * Return: its length, without the NUL that is written too.
 */
int vso_uri_format(char *buf, size_t size, const union vso_addr *addr, int protocol)
{
	const char *scheme = protocol == IPPROTO_UDP ? "udp" : vso_is_ping(protocol) ? "icmp" : "tcp";

	if (addr->sa.sa_family == AF_IPX)
		return scnprintf(buf, size, "ipx://%08x.%6phN.%04x", ntohl(addr->ipx.sipx_network), addr->ipx.sipx_node,
				 ntohs(addr->ipx.sipx_port));
	if (addr->sa.sa_family == AF_INET)
		return scnprintf(buf, size, "%s://%pI4:%u", scheme, &addr->v4.sin_addr, ntohs(addr->v4.sin_port));
	if (ipv6_addr_v4mapped(&addr->v6.sin6_addr))
		return scnprintf(buf, size, "%s://%pI4:%u", scheme, &addr->v6.sin6_addr.s6_addr32[3],
				 ntohs(addr->v6.sin6_port));
	if (addr->v6.sin6_scope_id)
		return scnprintf(buf, size, "%s6://%pI6c%%%u/%u", scheme, &addr->v6.sin6_addr, addr->v6.sin6_scope_id,
				 ntohs(addr->v6.sin6_port));
	return scnprintf(buf, size, "%s6://%pI6c/%u", scheme, &addr->v6.sin6_addr, ntohs(addr->v6.sin6_port));
}

/* the number from @p to @end, all digits */
static int vso_uri_number(const char *p, const char *end, u32 max, u32 *out)
{
	u64 value = 0;

	if (p == end)
		return -EINVAL;
	for (; p < end; p++) {
		if (*p < '0' || *p > '9')
			return -EINVAL;
		value = value * 10 + (*p - '0');
		if (value > max)
			return -EINVAL;
	}
	*out = value;
	return 0;
}

/* network, node and socket number, in digits that are all there */
static int vso_uri_ipx(const char *p, size_t len, struct vso_sockaddr_ipx *addr)
{
	if (len != 6 + 8 + 1 + 12 + 1 + 4 || memcmp(p, "ipx://", 6) || p[14] != '.' || p[27] != '.' ||
	    hex2bin((u8 *)&addr->sipx_network, p + 6, 4) || hex2bin(addr->sipx_node, p + 15, 6) ||
	    hex2bin((u8 *)&addr->sipx_port, p + 28, 2))
		return -EINVAL;
	addr->sipx_family = AF_IPX;
	return 0;
}

/**
 * vso_uri_parse() - read an address from the device
 * @family: of the socket that shall have it
 *
 * Return: 0, -EINVAL when it is no address, -EAFNOSUPPORT when an AF_INET socket cannot have it.
 */
int vso_uri_parse(const char *uri, size_t len, int family, union vso_addr *addr)
{
	const char *p = uri, *end = uri + len, *rest;
	struct in6_addr in6;
	__be32 in4;
	u32 port, scope = 0;
	bool six;

	memset(addr, 0, sizeof(*addr));
	if (family == AF_IPX)
		return vso_uri_ipx(uri, len, &addr->ipx);
	if (len < 7)
		return -EINVAL;
	if (!memcmp(p, "icmp", 4))
		p += 4;
	else if (!memcmp(p, "tcp", 3) || !memcmp(p, "udp", 3))
		p += 3;
	else
		return -EINVAL;
	six = *p == '6';
	p += six;
	if (end - p < 3 || memcmp(p, "://", 3))
		return -EINVAL;
	p += 3;
	if (!six) {
		if (!in4_pton(p, end - p, (u8 *)&in4, ':', &rest) || rest == end || *rest != ':' ||
		    vso_uri_number(rest + 1, end, 65535, &port))
			return -EINVAL;
		if (family == AF_INET) {
			addr->v4.sin_family = AF_INET;
			addr->v4.sin_port = htons(port);
			addr->v4.sin_addr.s_addr = in4;
			return 0;
		}
		ipv6_addr_set_v4mapped(in4, &in6);
	} else {
		const char *slash = memchr(p, '/', end - p), *pct;

		if (!slash || vso_uri_number(slash + 1, end, 65535, &port))
			return -EINVAL;
		pct = memchr(p, '%', slash - p);
		if (pct && vso_uri_number(pct + 1, slash, INT_MAX, &scope))
			return -EINVAL;
		if (!in6_pton(p, (pct ?: slash) - p, in6.s6_addr, -1, &rest) || rest != (pct ?: slash))
			return -EINVAL;
		if (family == AF_INET)
			return -EAFNOSUPPORT;
	}
	addr->v6.sin6_family = AF_INET6;
	addr->v6.sin6_port = htons(port);
	addr->v6.sin6_addr = in6;
	addr->v6.sin6_scope_id = scope;
	return 0;
}

static enum vso_scope vso_scope4(struct net *net, __be32 addr)
{
	if (addr == htonl(INADDR_ANY))
		return VSO_SCOPE_ANY;
	if (ipv4_is_loopback(addr))
		return VSO_SCOPE_LOCAL;
	if (ipv4_is_multicast(addr) || ipv4_is_lbcast(addr))
		return VSO_SCOPE_GROUP;
	switch (inet_addr_type(net, addr)) {
	case RTN_LOCAL:
		return VSO_SCOPE_LOCAL;
	case RTN_BROADCAST:
		/* so says a namespace that has no table yet, of everything; with one, no loopback address is broadcast */
		return inet_addr_type(net, htonl(INADDR_LOOPBACK)) == RTN_BROADCAST ? VSO_SCOPE_REMOTE : VSO_SCOPE_GROUP;
	case RTN_MULTICAST:
		return VSO_SCOPE_GROUP;
	default:
		return VSO_SCOPE_REMOTE;
	}
}

static enum vso_scope vso_scope(struct net *net, const union vso_addr *addr)
{
	const struct in6_addr *in6 = &addr->v6.sin6_addr;

	if (addr->sa.sa_family == AF_INET)
		return vso_scope4(net, addr->v4.sin_addr.s_addr);
	if (ipv6_addr_v4mapped(in6))
		return vso_scope4(net, in6->s6_addr32[3]);
	if (ipv6_addr_any(in6))
		return VSO_SCOPE_ANY;
	if (ipv6_addr_loopback(in6) || ipv6_chk_addr(net, in6, NULL, 0))
		return VSO_SCOPE_LOCAL;
	return ipv6_addr_is_multicast(in6) ? VSO_SCOPE_GROUP : VSO_SCOPE_REMOTE;
}

/** vso_addr_scope() - whose address is this? With hairpin, what is this namespace's own is the device's. */
enum vso_scope vso_addr_scope(struct net *net, const union vso_addr *addr)
{
	enum vso_scope scope = vso_scope(net, addr);

	return scope <= VSO_SCOPE_ANY && vso_netns_hairpin(net) ? VSO_SCOPE_REMOTE : scope;
}
