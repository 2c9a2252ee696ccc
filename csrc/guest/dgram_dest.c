// SPDX-License-Identifier: GPL-2.0-only
/*
 * dgram_dest.c - where the datagrams of an offloaded socket go: to the device, or natively.
 *
 * One socket sends to many, and the policy decides for each. The answer is remembered, so that each destination costs one round trip
 * (VSO_DEST): the device's, or native. A refusal is not remembered here; the device does, and says it again.
 *
 * An address of this guest is native without asking, unless a datagram came from it over the device: the host's loopback is not the
 * guest's, and the client of a published server may have an address that means something else here.
 *
 * The memory is a table of sets (vso_dests). The oldest of a full set is forgotten, and asked about again; only a client of a server with an
 * address of this guest is lost with it. The first destination of a client needs no table: it is vso_sock.target.
 */
#include <linux/jhash.h>
#include <linux/slab.h>
#include <net/ipv6.h>

#include "vso.h"

#define VSO_DEST_SETS	64	/* a power of 2 */
#define VSO_DEST_WAYS	4

struct vso_dests {
	struct {
		union vso_addr addr[VSO_DEST_WAYS];
		u8 where[VSO_DEST_WAYS];	/* enum vso_where, 0: free */
		u8 next;
	} set[VSO_DEST_SETS];
};

struct vso_dests *vso_dests_new(void)
{
	return kzalloc(sizeof(struct vso_dests), GFP_KERNEL_ACCOUNT);
}

bool vso_addr_equal(const union vso_addr *a, const union vso_addr *b)
{
	if (a->sa.sa_family != b->sa.sa_family || vso_addr_port(a) != vso_addr_port(b))
		return false;
	if (a->sa.sa_family == AF_IPX)
		return a->ipx.sipx_network == b->ipx.sipx_network && !memcmp(a->ipx.sipx_node, b->ipx.sipx_node, sizeof(a->ipx.sipx_node));
	return a->sa.sa_family == AF_INET6 ? ipv6_addr_equal(&a->v6.sin6_addr, &b->v6.sin6_addr)
					   : a->v4.sin_addr.s_addr == b->v4.sin_addr.s_addr;
}

static u32 vso_dest_set(const union vso_addr *a)
{
	if (a->sa.sa_family == AF_IPX)
		return jhash(a->ipx.sipx_node, sizeof(a->ipx.sipx_node), (__force u32)a->ipx.sipx_port) % VSO_DEST_SETS;
	if (a->sa.sa_family == AF_INET6)
		return jhash2((const u32 *)&a->v6.sin6_addr, 4, (__force u32)a->v6.sin6_port) % VSO_DEST_SETS;
	return jhash_2words((__force u32)a->v4.sin_addr.s_addr, (__force u32)a->v4.sin_port, 0) % VSO_DEST_SETS;
}

/* Called under vs->lock. Return: enum vso_where, 0 when it is not known */
static int vso_dest_find(struct vso_sock *vs, const union vso_addr *a)
{
	unsigned int set = vso_dest_set(a), i;

	if (!vs->was_bound && vso_addr_equal(a, &vs->target))
		return VSO_TO_DEVICE;
	if (vs->dests)
		for (i = 0; i < VSO_DEST_WAYS; i++)
			if (vs->dests->set[set].where[i] && vso_addr_equal(a, &vs->dests->set[set].addr[i]))
				return vs->dests->set[set].where[i];
	return 0;
}

/** vso_dest_add() - remember where it is. Called under vs->lock, from any context. */
void vso_dest_add(struct vso_sock *vs, const union vso_addr *a, enum vso_where where)
{
	unsigned int set = vso_dest_set(a), way;

	if (!vs->dests || vso_dest_find(vs, a))
		return;
	way = vs->dests->set[set].next++ % VSO_DEST_WAYS;
	vs->dests->set[set].addr[way] = *a;
	vs->dests->set[set].where[way] = where;
}

/* ask the device. Return: enum vso_where, or -errno as sendto() */
static int vso_dest_ask(struct vso_sock *vs, const union vso_addr *a)
{
	struct vso_dests *dests = READ_ONCE(vs->dests) ? NULL : vso_dests_new();
	char uri[VSO_URI_MAX + 1];
	int err, len = vso_uri_format(uri, sizeof(uri), a, vs->row->protocol);
	u32 verdict;

	if (mutex_lock_killable(&vs->req_mutex)) {
		kfree(dests);
		return -EINTR;
	}
	err = vso_flow_request(vs, VSO_DEST, 0, uri, len) ?: vso_flow_wait(vs);
	verdict = vs->verdict;
	if (!err)
		err = -(int)vs->error;
	spin_lock_bh(&vs->lock);
	if (!vs->dests)
		swap(vs->dests, dests);	/* without memory it is asked about each time */
	if (!err)
		vso_dest_add(vs, a, verdict == VSO_NATIVE ? VSO_TO_NATIVE : VSO_TO_DEVICE);
	spin_unlock_bh(&vs->lock);
	mutex_unlock(&vs->req_mutex);
	kfree(dests);
	if (err)
		return err == -ENODEV ? -ECONNRESET : err;
	return verdict == VSO_NATIVE ? VSO_TO_NATIVE : VSO_TO_DEVICE;
}

/**
 * vso_dest_where() - where does a datagram for this address go?
 *
 * Return: enum vso_where; or -errno: the policy refuses it, the device is gone (-ECONNRESET), -EINTR.
 */
int vso_dest_where(struct vso_sock *vs, struct sock *sk, const union vso_addr *a)
{
	int where;

	spin_lock_bh(&vs->lock);
	if (!vs->addr_only && vso_addr_equal(a, &vs->peer))
		where = VSO_TO_DEVICE;
	else
		where = vso_dest_find(vs, a);
	spin_unlock_bh(&vs->lock);
	if (where)
		return where;
	if (vs->row->family != AF_IPX && vso_addr_scope(sock_net(sk), a) != VSO_SCOPE_REMOTE)
		return VSO_TO_NATIVE;
	/* the clients of a server are its own, whatever else lives at their addresses */
	if (!vs->was_bound && vso_hinted_native(vs->row, sock_net(sk), a))
		return VSO_TO_NATIVE;
	return vs->dev->features & VSO_F_DGRAM_INFO ? vso_dest_ask(vs, a) : VSO_TO_DEVICE;
}
