// SPDX-License-Identifier: GPL-2.0-only
/*
 * hints.c - destinations that the device named native beforehand (VSO_HINTS).
 *
 * A connect there costs no round trip and no takeover: it is the native one. The device sends the table after HELLO_REPLY, whole, and may
 * send another at any time. It holds for the initial namespace; the first hint that covers scheme, address and port decides, and what
 * none covers is asked about. Readers look under RCU; the table belongs to its device and goes with it.
 */
#include <linux/slab.h>
#include <net/ipv6.h>
#include <net/net_namespace.h>

#include "vso.h"

struct vso_hints {
	struct rcu_head rcu;
	u32 nr;
	struct vso_hint hint[];
};

/**
 * vso_hints_set() - a new table, for the one that was
 * @payload: struct vso_hint, as many as fit into @len; no bytes: all is asked about
 *
 * Called by the tasklet of the first pair, or when nobody else can see the device. Without memory all is asked about, too.
 */
void vso_hints_set(struct vso_dev *dev, const void *payload, u32 len)
{
	struct vso_hints *hints = NULL, *old;
	u32 nr = len / sizeof(struct vso_hint);

	if (nr)
		hints = kmalloc(struct_size(hints, hint, nr), GFP_ATOMIC);
	if (hints) {
		hints->nr = nr;
		memcpy(hints->hint, payload, nr * sizeof(struct vso_hint));
	}
	old = rcu_replace_pointer(dev->hints, hints, true);
	if (old)
		kfree_rcu(old, rcu);
}

/* Called under RCU */
static bool vso_hints_native(const struct vso_hints *hints, u8 scheme, const struct in6_addr *addr, u16 port)
{
	u32 i;

	for (i = 0; i < hints->nr; i++) {
		const struct vso_hint *h = &hints->hint[i];

		if (h->schemes & scheme && port >= le16_to_cpu(h->port_first) && port <= le16_to_cpu(h->port_last) &&
		    memcmp(addr, h->first, sizeof(*addr)) >= 0 && memcmp(addr, h->last, sizeof(*addr)) <= 0)
			return h->verdict == VSO_HINT_NATIVE;
	}
	return false;
}

/** vso_hinted_native() - did the device say beforehand that this destination is native? */
bool vso_hinted_native(const struct vso_row *row, struct net *net, const union vso_addr *addr)
{
	const struct vso_hints *hints;
	struct in6_addr in6;
	struct vso_dev *dev;
	bool native = false;
	u8 scheme;

	if (!net_eq(net, &init_net) || row->family == PF_IPX || vso_is_ping(row->protocol))
		return false;
	if (addr->sa.sa_family == AF_INET6)
		in6 = addr->v6.sin6_addr;
	else
		ipv6_addr_set_v4mapped(addr->v4.sin_addr.s_addr, &in6);
	if (ipv6_addr_v4mapped(&in6))
		scheme = row->type == SOCK_STREAM ? VSO_HINT_TCP : VSO_HINT_UDP;
	else
		scheme = row->type == SOCK_STREAM ? VSO_HINT_TCP6 : VSO_HINT_UDP6;
	dev = vso_dev_get();
	if (!dev)
		return false;
	rcu_read_lock();
	hints = rcu_dereference(dev->hints);
	if (hints)
		native = vso_hints_native(hints, scheme, &in6, ntohs(vso_addr_port(addr)));
	rcu_read_unlock();
	vso_dev_put(dev);
	return native;
}
