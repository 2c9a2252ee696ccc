// SPDX-License-Identifier: GPL-2.0-only
/*
 * hook.c - our tables in the kernel's own protocol switch.
 *
 * socket(2) for AF_INET and AF_INET6 looks up a struct inet_protosw by type and protocol and copies its ops pointer into the socket. The
 * entries are writable data, on lists that an exported function extends: we register an entry of our own for a protocol that nobody
 * uses, walk from it to its neighbours, unregister it again, and exchange the ops pointer of the neighbours we know. From then on new
 * sockets start with our "undecided" table; sockets that exist already keep what they have. Creating a socket costs nothing more.
 *
 * The walk meets one node that is no entry: the list head, an element of the array inetsw[SOCK_MAX]. Read as an entry, its "type" would be
 * the low 16 bits of the list pointer in the next element: a multiple of eight, which neither SOCK_STREAM nor SOCK_DGRAM is. So checking
 * the type first is enough to tell it apart, and the read stays inside the array for these two types.
 *
 * One set of functions for each table (VSO_THUNKS): a wrapper must know its native table without asking sock->ops, because 6.1's MPTCP
 * calls the table of its inner socket with the outer one, and because another thread may exchange sock->ops at any time.
 */
#include <linux/module.h>
#include <net/inet_common.h>
#include <net/protocol.h>
#include <net/sock.h>
#include <net/tcp.h>

#include "vso.h"

#define VSO_PROBE_PROTOCOL	254	/* RFC 3692: for experiments */

static struct vso_row vso_rows[] = {
	{ .family = PF_INET,	.type = SOCK_STREAM,	.protocol = IPPROTO_TCP },
	{ .family = PF_INET6,	.type = SOCK_STREAM,	.protocol = IPPROTO_TCP },
	{ .family = PF_INET,	.type = SOCK_STREAM,	.protocol = IPPROTO_MPTCP },
	{ .family = PF_INET6,	.type = SOCK_STREAM,	.protocol = IPPROTO_MPTCP },
	{ .family = PF_INET,	.type = SOCK_DGRAM,	.protocol = IPPROTO_UDP },
	{ .family = PF_INET6,	.type = SOCK_DGRAM,	.protocol = IPPROTO_UDP },
	{ .family = PF_INET,	.type = SOCK_DGRAM,	.protocol = IPPROTO_ICMP },
	{ .family = PF_INET6,	.type = SOCK_DGRAM,	.protocol = IPPROTO_ICMPV6 },
};

#define VSO_THUNKS(i)											\
static int vso_connect_##i(struct socket *sock, vso_sockaddr *addr, int len, int flags)		\
{													\
	return vso_undecided_connect(&vso_rows[i], sock, addr, len, flags);				\
}													\
static int vso_trying_##i(struct socket *sock, vso_sockaddr *addr, int len, int flags)			\
{													\
	return vso_trying_connect(&vso_rows[i], sock, addr, len, flags);				\
}													\
static int vso_bind_##i(struct socket *sock, vso_sockaddr *addr, int len)				\
{													\
	return vso_undecided_bind(&vso_rows[i], sock, addr, len);					\
}													\
static int vso_listen_##i(struct socket *sock, int backlog)						\
{													\
	return vso_undecided_listen(&vso_rows[i], sock, backlog);					\
}													\
static int vso_sendmsg_##i(struct socket *sock, struct msghdr *msg, size_t len)			\
{													\
	return vso_undecided_sendmsg(&vso_rows[i], sock, msg, len);					\
}													\
static int vso_recvmsg_##i(struct socket *sock, struct msghdr *msg, size_t len, int flags)	\
{													\
	return vso_dgram_undecided_recvmsg(&vso_rows[i], sock, msg, len, flags);			\
}

VSO_THUNKS(0)
VSO_THUNKS(1)
VSO_THUNKS(2)
VSO_THUNKS(3)
VSO_THUNKS(4)
VSO_THUNKS(5)
VSO_THUNKS(6)
VSO_THUNKS(7)

#define VSO_THUNK(i)	{ vso_connect_##i, vso_trying_##i, vso_bind_##i, vso_listen_##i, vso_sendmsg_##i, vso_recvmsg_##i }

static const struct {
	int (*connect)(struct socket *sock, vso_sockaddr *addr, int len, int flags);
	int (*trying)(struct socket *sock, vso_sockaddr *addr, int len, int flags);
	int (*bind)(struct socket *sock, vso_sockaddr *addr, int len);
	int (*listen)(struct socket *sock, int backlog);
	int (*sendmsg)(struct socket *sock, struct msghdr *msg, size_t len);
	int (*recvmsg)(struct socket *sock, struct msghdr *msg, size_t len, int flags);	/* datagrams only */
} vso_thunks[] = {
	VSO_THUNK(0), VSO_THUNK(1), VSO_THUNK(2), VSO_THUNK(3), VSO_THUNK(4), VSO_THUNK(5), VSO_THUNK(6), VSO_THUNK(7),
};

static_assert(ARRAY_SIZE(vso_thunks) == ARRAY_SIZE(vso_rows));

/** vso_row_find() - the row of this kind of socket, NULL when it is not wrapped */
const struct vso_row *vso_row_find(int family, int type, int protocol)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(vso_rows); i++) {
		const struct vso_row *row = &vso_rows[i];

		if (row->entry && row->family == family && row->type == type && row->protocol == protocol)
			return row;
	}
	return NULL;
}

static void vso_row_match(int family, struct inet_protosw *entry)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(vso_rows); i++) {
		struct vso_row *row = &vso_rows[i];

		if (row->family == family && row->type == entry->type && row->protocol == entry->protocol &&
		    entry->ops && entry->ops->family == family && !row->entry)
			row->entry = entry;
	}
}

/* find the neighbours of an entry of ours on the list of this family and type */
static void vso_scan(int family, int type)
{
	struct inet_protosw probe = {
		.type = type, .protocol = VSO_PROBE_PROTOCOL, .prot = &tcp_prot, .ops = &inet_stream_ops,
		.flags = INET_PROTOSW_REUSE,
	};
	struct list_head *pos;

	if (family == PF_INET) {
		inet_register_protosw(&probe);
	} else if (inet6_register_protosw(&probe)) {
		return;
	}
	rcu_read_lock();
	/* registering refuses silently for IPv4: then the node was never linked */
	if (probe.list.next)
		for (pos = probe.list.next; pos != &probe.list; pos = rcu_dereference_raw(pos->next))
			vso_row_match(family, list_entry(pos, struct inet_protosw, list));
	rcu_read_unlock();
	if (!probe.list.next)
		return;
	if (family == PF_INET)
		inet_unregister_protosw(&probe);	/* waits for RCU: the probe may leave the stack */
	else
		inet6_unregister_protosw(&probe);
}

/**
 * vso_hook_install() - make new sockets start undecided
 *
 * Cannot be undone: sockets that carry our tables may live as long as the system. So it is the last step of module init.
 *
 * Return: 0, or -ENODEV when TCP over IPv4 was not found (all else is optional).
 */
int vso_hook_install(void)
{
	static const int families[] = { PF_INET, PF_INET6 }, types[] = { SOCK_STREAM, SOCK_DGRAM };
	size_t i, j;

	for (i = 0; i < ARRAY_SIZE(families); i++)
		for (j = 0; j < ARRAY_SIZE(types); j++)
			vso_scan(families[i], types[j]);
	if (!vso_rows[0].entry || vso_rows[0].entry->ops != &inet_stream_ops) {
		pr_err("virtio_socket: the TCP entry of the protocol switch is not where this kernel should have it\n");
		return -ENODEV;
	}
	for (i = 0; i < ARRAY_SIZE(vso_rows); i++) {
		struct vso_row *row = &vso_rows[i];

		if (!row->entry)
			continue;
		row->native = row->entry->ops;
		row->undecided = *row->native;
		row->undecided.owner = NULL;
		row->undecided.connect = vso_thunks[i].connect;
		row->undecided.bind = vso_thunks[i].bind;
		row->undecided.listen = vso_thunks[i].listen;
		row->undecided.sendmsg = vso_thunks[i].sendmsg;
		if (row->type == SOCK_DGRAM)
			row->undecided.recvmsg = vso_thunks[i].recvmsg;
		row->trying = *row->native;
		row->trying.owner = NULL;
		row->trying.connect = vso_thunks[i].trying;
		row->offloaded = *row->native;
		row->offloaded.owner = NULL;
		vso_ops_fill(row);
	}
	smp_wmb();	/* the tables before the pointers to them; paired by the address dependency of inet_create() */
	for (i = 0; i < ARRAY_SIZE(vso_rows); i++)
		if (vso_rows[i].entry)
			WRITE_ONCE(vso_rows[i].entry->ops, &vso_rows[i].undecided);
	return 0;
}
