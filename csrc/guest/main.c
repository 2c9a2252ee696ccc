// SPDX-License-Identifier: GPL-2.0-only
/*
 * main.c - module init, and what it promises.
 *
 * The module stays until the system goes down: it has no exit. Its tables are in sockets, in the kernel's protocol switch, and may have been
 * copied (kTLS keeps a copy of its first user's table), so there is no moment at which its text could safely go away. Splitting
 * the driver from these tables, so that it could be unloaded, is possible: hook.c, sock_open.c and sock_common.c need only what vso.h
 * says of transport.c.
 *
 * The hook is the last step of init, since it cannot be undone.
 */
#include <linux/module.h>

#include "vso.h"

module_param_named(all_netns, vso_all_netns, bool, 0644);
MODULE_PARM_DESC(all_netns, "offer the sockets of all network namespaces to the device (default: only the initial one's)");
module_param_named(window, vso_window, uint, 0444);
MODULE_PARM_DESC(window, "bytes that a stream socket may hold for its reader to begin with (64 KiB to 16 MiB, default 512 KiB)");

static int __init vso_init(void)
{
	int err;

	vso_window = clamp_t(unsigned int, vso_window, 64 * 1024, 16 * 1024 * 1024);
	err = vso_flow_init();
	if (err)
		return err;
	err = vso_idle_init();
	if (err)
		goto flow;
	err = vso_netns_init();
	if (err)
		goto idle;
	err = vso_proc_init();
	if (err)
		goto netns;
	err = vso_transport_register();
	if (err)
		goto proc;
	vso_ipx_register();
	err = vso_hook_install();
	if (err)
		goto transport;
	return 0;

transport:
	vso_transport_unregister();
proc:
	vso_proc_exit();
netns:
	vso_netns_exit();
idle:
	vso_idle_exit();
flow:
	vso_flow_exit();
	return err;
}
module_init(vso_init);

MODULE_DESCRIPTION("Socket offload: hands connect() and its kin to a virtio device");
MODULE_AUTHOR("The vhostsock authors");
MODULE_LICENSE("GPL");
