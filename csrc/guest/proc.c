// SPDX-License-Identifier: GPL-2.0-only
/*
 * proc.c - /proc/net/hwsock: the sockets that /proc/net/tcp and ss cannot see.
 *
 * One line a socket, of the reader's network namespace; a header names the columns. Addresses are the URIs that the device speaks.
 * /proc/PID/fdinfo/FD of an offloaded socket has the flow, too.
 */
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <net/net_namespace.h>
#include <net/netns/generic.h>

#include "vso.h"

/** vso_state_name() - for people */
const char *vso_state_name(enum vso_state state)
{
	static const char * const names[] = {
		[VSO_ST_BINDING] = "BINDING",
		[VSO_ST_BOUND] = "BOUND",
		[VSO_ST_CONNECTING] = "CONNECTING",
		[VSO_ST_NATIVE] = "TO_NATIVE",
		[VSO_ST_CONNECTED] = "CONNECTED",
		[VSO_ST_LISTENING] = "LISTEN",
		[VSO_ST_EMBRYO] = "ANNOUNCED",
		[VSO_ST_CLOSED] = "CLOSED",
		[VSO_ST_GONE] = "GONE",
	};

	return state < ARRAY_SIZE(names) && names[state] ? names[state] : "?";
}

/* what the host's side is doing, as far as we were told. Called under vs->lock */
static const char *vso_host_state(const struct vso_sock *vs)
{
	switch (vs->state) {
	case VSO_ST_BINDING:
	case VSO_ST_CONNECTING:
		return "asked";
	case VSO_ST_CLOSED:
		return READ_ONCE(vs->dev->up) ? "reset" : "gone";
	case VSO_ST_NATIVE:
		return "-";
	default:
		return READ_ONCE(vs->dead) ? "gone" : vs->peer_fin ? "fin" : "open";
	}
}

/* which directions the application has shut: r, s, rs */
static const char *vso_shut(const struct vso_sock *vs)
{
	static const char * const names[] = { "-", "r", "s", "rs" };

	return names[(vs->state == VSO_ST_CONNECTED ? vs->rcv_shut + 2 * vs->snd_shut : 0)];
}

static void *vso_seq_start(struct seq_file *m, loff_t *pos)
{
	spin_lock_bh(&vso_all_lock);
	return seq_list_start_head(&vso_all, *pos);
}

static void *vso_seq_next(struct seq_file *m, void *v, loff_t *pos)
{
	return seq_list_next(v, &vso_all, pos);
}

static void vso_seq_stop(struct seq_file *m, void *v)
{
	spin_unlock_bh(&vso_all_lock);
}

static const char *vso_proto_name(const struct vso_row *row)
{
	if (row->family == PF_IPX)
		return "ipx";
	if (row->type == SOCK_DGRAM)
		return vso_is_ping(row->protocol) ? "icmp" : "udp";
	return row->protocol == IPPROTO_MPTCP ? "mptcp" : "tcp";
}

#define VSO_NAME_MAX	64	/* the URI of any address */

/* both addresses. Called under vs->lock */
static void vso_names(const struct vso_sock *vs, char *local, char *remote)
{
	int protocol = vs->row->protocol;

	vso_uri_format(local, VSO_NAME_MAX, &vs->local, protocol);
	if (vs->state == VSO_ST_CONNECTED && vs->peer.sa.sa_family)
		vso_uri_format(remote, VSO_NAME_MAX, &vs->peer, protocol);
	else if (vs->state == VSO_ST_CONNECTING)
		vso_uri_format(remote, VSO_NAME_MAX, &vs->target, protocol);
	else
		strscpy(remote, "-", VSO_NAME_MAX);
}

static void vso_seq_line(struct seq_file *m, struct vso_sock *vs)
{
	bool dgram = vs->row->type == SOCK_DGRAM;
	char local[VSO_NAME_MAX], remote[VSO_NAME_MAX], name[VSO_NETNS_MAX + 1];
	u32 rx, tx;

	if (!vs->attached || !net_eq(vs->net, seq_file_net(m)))
		return;
	vso_names(vs, local, remote);
	vso_netns_name(vs->net, name);
	rx = vs->state == VSO_ST_LISTENING ? vs->acceptq_len : vs->row->family == PF_IPX && vs->sk ? sk_rmem_alloc_get(vs->sk) : vs->rx_bytes;
	tx = vs->state == VSO_ST_LISTENING ? vs->buf_alloc : dgram ? 0 : vs->tx_cnt - vs->peer_fwd;
	seq_printf(m, "%-5s %-10s %-32s %-32s %8u %8u %5u %8lu %08x %4u %8u %-5s %-4s %u:%s\n",
		   vso_proto_name(vs->row), vso_state_name(vs->state), local, remote,
		   rx, tx, from_kuid_munged(seq_user_ns(m), vs->uid), vs->ino, vs->flow,
		   (unsigned int)(vs->pair - vs->dev->pair), vs->rx_drops, vso_host_state(vs), vso_shut(vs),
		   vs->net->ns.inum, name);
}

static int vso_seq_show(struct seq_file *m, void *v)
{
	struct vso_sock *vs;

	if (v == &vso_all) {
		seq_printf(m, "%-5s %-10s %-32s %-32s %8s %8s %5s %8s %8s %4s %8s %-5s %-4s %s\n", "proto", "state", "local", "remote",
			   "rx_queue", "tx_queue", "uid", "inode", "flow", "pair", "drops", "host", "shut", "netns");
		return 0;
	}
	vs = list_entry(v, struct vso_sock, all);
	spin_lock(&vs->lock);
	vso_seq_line(m, vs);
	spin_unlock(&vs->lock);
	return 0;
}

static const struct seq_operations vso_seq_ops = {
	.start = vso_seq_start,
	.next = vso_seq_next,
	.stop = vso_seq_stop,
	.show = vso_seq_show,
};

/** vso_show_fdinfo() - /proc/PID/fdinfo/FD */
void vso_show_fdinfo(struct seq_file *m, struct socket *sock)
{
	char local[VSO_NAME_MAX], remote[VSO_NAME_MAX];
	struct vso_sock *vs = vso_sock_get(sock);
	bool dev = false, mark = false;
	u32 window = 0;
	const char *host;

	if (!vs)
		return;
	spin_lock_bh(&vs->lock);
	if (vs->sk) {
		dev = READ_ONCE(vs->sk->sk_bound_dev_if);
		mark = READ_ONCE(vs->sk->sk_mark);
	}
	vso_names(vs, local, remote);
	host = vso_host_state(vs);
	if (vs->row->type == SOCK_STREAM && vs->state == VSO_ST_CONNECTED)
		window = vs->buf_alloc;
	spin_unlock_bh(&vs->lock);
	seq_printf(m, "hwsock-flow:\t%08x\nhwsock-state:\t%s\nhwsock-host:\t%s\nhwsock-local:\t%s\nhwsock-remote:\t%s\n", vs->flow,
		   vso_state_name(READ_ONCE(vs->state)), host, local, remote);
	if (window)
		seq_printf(m, "hwsock-window:\t%u\n", window);
	if (dev || mark)	/* set after the takeover, which Linux before 6.8 does not let us refuse */
		seq_printf(m, "hwsock-ignored:\t%s%s%s\n", dev ? "SO_BINDTODEVICE" : "", dev && mark ? " " : "", mark ? "SO_MARK" : "");
	vso_sock_put(vs);
}

static int __net_init vso_net_init(struct net *net)
{
	return proc_create_net("hwsock", 0444, net->proc_net, &vso_seq_ops, sizeof(struct seq_net_private)) ? 0 : -ENOMEM;
}

static void __net_exit vso_net_exit(struct net *net)
{
	remove_proc_entry("hwsock", net->proc_net);
}

static struct pernet_operations vso_net_ops = {
	.init = vso_net_init,
	.exit = vso_net_exit,
};

int vso_proc_init(void)
{
	return register_pernet_subsys(&vso_net_ops);
}

void vso_proc_exit(void)
{
	unregister_pernet_subsys(&vso_net_ops);
}
