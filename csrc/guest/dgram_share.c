// SPDX-License-Identifier: GPL-2.0-only
/*
 * dgram_share.c - datagram servers that share a port (SO_REUSEADDR, SO_REUSEPORT): whose is what the host sends?
 *
 * The host spreads the datagrams of a port over the sockets that the device has for it, and does not know that one of them is connected here.
 * So what comes for one may be another's, and is handed over, by the rules of UDP's own lookup (net/ipv4/udp.c, compute_score): a socket
 * that is connected to the source has it; else, with SO_REUSEPORT, the one that the host chose, if it has no peer; else the one that was bound
 * last. This is how a server of UDP accepts: it connects the socket that a client's first datagram came to, and binds the next one.
 *
 * With hairpin the host's sockets are connected themselves, so nothing has to be handed over.
 */
#include "vso.h"

static LIST_HEAD(vso_servers);			/* those that share, the last bound first */
static DEFINE_SPINLOCK(vso_servers_lock);	/* bh off; a vs->lock nests inside */

/** vso_share_add() - a server was bound; does it share its port? */
void vso_share_add(struct vso_sock *vs, const struct sock *sk)
{
	if (!(sk->sk_reuse || sk->sk_reuseport) || vso_netns_hairpin(sock_net(sk)))
		return;
	spin_lock_bh(&vso_servers_lock);
	spin_lock(&vs->lock);
	if (vs->sk)			/* vso_detach() clears it before it removes */
		list_add(&vs->server, &vso_servers);
	spin_unlock(&vs->lock);
	spin_unlock_bh(&vso_servers_lock);
}

/** vso_share_remove() - the socket is no server any more */
void vso_share_remove(struct vso_sock *vs)
{
	if (list_empty_careful(&vs->server))	/* as most are, for good: without vs->sk it is not added any more */
		return;
	spin_lock_bh(&vso_servers_lock);
	list_del_init(&vs->server);
	spin_unlock_bh(&vso_servers_lock);
}

/**
 * vso_share_owner() - whose is a datagram that came for @vs?
 *
 * Return: the socket, with a reference. Called with bh off, without locks.
 */
struct vso_sock *vso_share_owner(struct vso_sock *vs, const union vso_addr *from)
{
	struct vso_sock *c, *owner = NULL;
	bool open, peer, chosen;

	spin_lock(&vso_servers_lock);
	list_for_each_entry(c, &vso_servers, server) {
		if (c->dev != vs->dev || c->row != vs->row || c->net != vs->net)
			continue;
		spin_lock(&c->lock);
		open = c->sk && c->state == VSO_ST_CONNECTED && vso_addr_equal(&c->local, &vs->local);
		peer = open && c->conn == VSO_TO_DEVICE && vso_addr_equal(&c->peer, from);
		open = open && !c->conn;
		chosen = open && c == vs && c->sk->sk_reuseport;
		spin_unlock(&c->lock);
		if (peer || chosen || (open && !owner))
			owner = c;
		if (peer)
			break;
	}
	if (!owner)
		owner = vs;
	refcount_inc(&owner->ref);	/* the socket's own reference goes after it left the list */
	spin_unlock(&vso_servers_lock);
	return owner;
}
