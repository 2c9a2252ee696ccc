/* SPDX-License-Identifier: GPL-2.0-only */
/* addr.h - addresses as the socket calls know them, as the wire writes them, and whose they are: uri.c. */
#ifndef VSO_ADDR_H
#define VSO_ADDR_H

#include <linux/in.h>
#include <linux/in6.h>
#include <linux/socket.h>
#include <net/net_namespace.h>

/* struct sockaddr_ipx: the kernels that have no IPX have no header for it either */
struct vso_sockaddr_ipx {
	sa_family_t sipx_family;
	__be16 sipx_port;
	__be32 sipx_network;
	u8 sipx_node[6];
	u8 sipx_type;
	u8 sipx_zero;
};

static_assert(sizeof(struct vso_sockaddr_ipx) == 16);

/* an address as the socket calls know it */
union vso_addr {
	struct sockaddr sa;
	struct vso_sockaddr_ipx ipx;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

enum vso_scope {
	VSO_SCOPE_LOCAL,	/* loopback, or an address of this guest; with hairpin there are none of its own */
	VSO_SCOPE_ANY,		/* 0.0.0.0 or :: */
	VSO_SCOPE_GROUP,	/* multicast or broadcast */
	VSO_SCOPE_REMOTE,
};

/* sockets of ICMP echo: datagrams without ports */
static inline bool vso_is_ping(int protocol)
{
	return protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6;
}

int vso_uri_format(char *buf, size_t size, const union vso_addr *addr, int protocol);
int vso_uri_parse(const char *uri, size_t len, int family, union vso_addr *addr);
int vso_addr_copy(union vso_addr *to, const struct sockaddr *from, int len, int family);
int vso_addr_len(const union vso_addr *addr);
__be16 vso_addr_port(const union vso_addr *addr);
enum vso_scope vso_addr_scope(struct net *net, const union vso_addr *addr);

#endif
