// SPDX-License-Identifier: GPL-2.0-only
/*
 * netns.c - network namespaces: whose sockets are offered to the device, and under which name.
 *
 * The initial namespace is always offered. Another one only when the administrator says so, lest a container without a network gain
 * one: all of them by the parameter all_netns, or this one by giving it a name (/proc/net/hwsock_netns, for who has CAP_NET_ADMIN in the
 * initial user namespace: a container's root does not choose the name that a policy of the host looks at). And only when the device
 * tells them apart (VSO_F_NETNS).
 *
 * Hairpin.  The device may name one namespace in HELLO_REPLY. All that is asked in there is the device's, the loopback and the namespace's
 * own addresses included, and nothing is bound natively: the device's side is that namespace's network.
 */
#include <linux/capability.h>
#include <linux/ctype.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <net/net_namespace.h>
#include <net/netns/generic.h>

#include "vso.h"

#define VSO_NETNS_INITIAL	"init"	/* the initial namespace's name; no other can have it */

struct vso_netns {
	char name[VSO_NETNS_MAX + 1];	/* empty: none. Guarded by vso_netns_lock */
};

static unsigned int vso_netns_id;
static DEFINE_SPINLOCK(vso_netns_lock);

bool vso_all_netns;

/**
 * vso_netns_name() - what the administrator called a namespace
 * @name: room for VSO_NETNS_MAX + 1 bytes
 *
 * Return: the length, 0 when it has no name.
 */
int vso_netns_name(struct net *net, char *name)
{
	struct vso_netns *ns = net_generic(net, vso_netns_id);
	int n;

	if (net_eq(net, &init_net))
		return strscpy(name, VSO_NETNS_INITIAL, VSO_NETNS_MAX + 1);
	spin_lock_bh(&vso_netns_lock);
	n = strscpy(name, ns->name, VSO_NETNS_MAX + 1);
	spin_unlock_bh(&vso_netns_lock);
	return n;
}

/** vso_netns_offered() - may the device be asked about sockets of this namespace? */
bool vso_netns_offered(struct net *net)
{
	struct vso_netns *ns;

	if (net_eq(net, &init_net))
		return true;
	ns = net_generic(net, vso_netns_id);
	return (READ_ONCE(vso_all_netns) || READ_ONCE(ns->name[0])) && vso_dev_knows_netns();
}

/** vso_netns_hairpin() - is even the loopback of this namespace the device's? */
bool vso_netns_hairpin(struct net *net)
{
	char name[VSO_NETNS_MAX + 1];

	return vso_dev_knows_netns() && vso_netns_name(net, name) > 0 && vso_dev_hairpin(name);
}

static int vso_netns_show(struct seq_file *m, void *v)
{
	char name[VSO_NETNS_MAX + 1];
	struct net *net = m->private;

	vso_netns_name(net, name);
	seq_printf(m, "%u %s%s%s\n", net->ns.inum, name[0] ? name : "-", vso_netns_offered(net) ? " offered" : "",
		   vso_netns_hairpin(net) ? " hairpin" : "");
	return 0;
}

/* a name, or an empty line to take it back: sockets that were offered stay so */
static int vso_netns_write(struct file *file, char *buf, size_t size)
{
	struct net *net = ((struct seq_file *)file->private_data)->private;
	struct vso_netns *ns = net_generic(net, vso_netns_id);
	char *name = strim(buf), *p;

	if (!capable(CAP_NET_ADMIN))
		return -EPERM;
	if (strlen(name) > VSO_NETNS_MAX)
		return -ENAMETOOLONG;
	for (p = name; *p; p++)
		if (!isascii(*p) || !isgraph(*p))
			return -EINVAL;
	if (net_eq(net, &init_net) || !strcmp(name, VSO_NETNS_INITIAL))
		return -EBUSY;
	spin_lock_bh(&vso_netns_lock);
	strscpy(ns->name, name, sizeof(ns->name));
	spin_unlock_bh(&vso_netns_lock);
	return 0;
}

static int __net_init vso_netns_init_net(struct net *net)
{
	return proc_create_net_single_write("hwsock_netns", 0644, net->proc_net, vso_netns_show, vso_netns_write, NULL) ? 0 : -ENOMEM;
}

static void __net_exit vso_netns_exit_net(struct net *net)
{
	remove_proc_entry("hwsock_netns", net->proc_net);
}

static struct pernet_operations vso_netns_ops = {
	.init = vso_netns_init_net,
	.exit = vso_netns_exit_net,
	.id = &vso_netns_id,
	.size = sizeof(struct vso_netns),
};

int vso_netns_init(void)
{
	return register_pernet_subsys(&vso_netns_ops);
}

void vso_netns_exit(void)
{
	unregister_pernet_subsys(&vso_netns_ops);
}
