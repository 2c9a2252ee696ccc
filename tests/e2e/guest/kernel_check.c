// SPDX-License-Identifier: BSD-3-Clause
/*
 * kernel_check PEER PORT [landlock] - what of the guest's kernel is not changed by offloading, and what is not asked any more.
 *
 * For a guest with the module, without a NIC, run as root. PEER PORT is offloaded to tests/e2e/peer.py. With "landlock" the kernel must know rules
 * of Landlock for the network (6.7).
 */
#include "check.h"
#include "listed.h"
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4/ip_tables.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static struct addr peer;

static void module(const char *name, const char *path)
{
	char command[64];

	snprintf(command, sizeof(command), "modprobe -q %s", name);
	if (system(command) && (!path || access(path, F_OK)))
		skip(command);
}

/* nvme-tcp connects a socket of its own, and reads it by means that an offloaded one has not */
static void a_socket_of_the_kernel_is_native(void)
{
	char options[128];
	int fd;

	module("nvme-tcp", "/dev/nvme-fabrics");
	fd = open("/dev/nvme-fabrics", O_RDWR);
	MUST(fd >= 0);
	snprintf(options, sizeof(options), "transport=tcp,traddr=%s,trsvcid=%d,nqn=nqn.2014-08.org.nvmexpress.discovery",
		 inet_ntoa(((struct sockaddr_in *)&peer.ss)->sin_addr), port_of(&peer));
	ERRNO(write(fd, options, strlen(options)), ENETUNREACH);
}

/* the verdict on all that no rule of the guest's firewall is about, when it leaves */
static void set_output_policy(int verdict)
{
	struct ipt_getinfo info = { .name = "filter" };
	struct ipt_get_entries *entries;
	struct ipt_replace *replace;
	struct xt_standard_target *target;
	struct ipt_entry *policy;
	int fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);
	socklen_t len = sizeof(info);

	MUST(fd >= 0);
	MUST(getsockopt(fd, IPPROTO_IP, IPT_SO_GET_INFO, &info, &len) == 0);
	len = sizeof(*entries) + info.size;
	entries = calloc(1, len);
	replace = calloc(1, sizeof(*replace) + info.size);
	MUST(entries && replace);
	strcpy(entries->name, "filter");
	entries->size = info.size;
	MUST(getsockopt(fd, IPPROTO_IP, IPT_SO_GET_ENTRIES, entries, &len) == 0);
	policy = (void *)((char *)entries->entrytable + info.underflow[NF_INET_LOCAL_OUT]);
	target = (void *)((char *)policy + policy->target_offset);
	target->verdict = -verdict - 1;
	memcpy(replace->entries, entries->entrytable, info.size);
	strcpy(replace->name, "filter");
	replace->valid_hooks = info.valid_hooks;
	replace->num_entries = replace->num_counters = info.num_entries;
	replace->size = info.size;
	memcpy(replace->hook_entry, info.hook_entry, sizeof(info.hook_entry));
	memcpy(replace->underflow, info.underflow, sizeof(info.underflow));
	replace->counters = calloc(info.num_entries, sizeof(struct xt_counters));
	MUST(setsockopt(fd, IPPROTO_IP, IPT_SO_SET_REPLACE, replace, sizeof(*replace) + info.size) == 0);
	close(fd);
}

static void a_firewall_that_drops_all_output_is_not_asked_about_offloaded_sockets(void)
{
	struct addr lo = address("127.0.0.1", "9");
	int native = socket(AF_INET, SOCK_DGRAM, 0), fd = socket(AF_INET, SOCK_STREAM, 0), error, connected;
	ssize_t sent;

	module("iptable_filter", NULL);
	set_output_policy(NF_DROP);
	sent = sendto(native, "x", 1, 0, (void *)&lo.ss, lo.len);
	error = errno;
	connected = connect(fd, (void *)&peer.ss, peer.len);
	set_output_policy(NF_ACCEPT);		/* whatever comes of this claim */
	SAME(sent, -1);
	SAME(error, EPERM);			/* it is asked about native ones */
	SAME(connected, 0);
	MUST(offloaded(fd));
}

#define LANDLOCK_BIND_TCP	1ull
#define LANDLOCK_CONNECT_TCP	2ull

/* the hooks of security modules are in the system calls, before ours; Landlock is one that a program can ask something of itself */
static void a_security_module_that_refuses_connect_or_bind_is_obeyed(void)
{
	struct {
		uint64_t files, network;
	} handled = { .network = LANDLOCK_BIND_TCP | LANDLOCK_CONNECT_TCP };
	struct addr any = address("0.0.0.0", "8081");
	int before = open_connected(&peer), fd = socket(AF_INET, SOCK_STREAM, 0), rules;

	MUST(offloaded(before));
	rules = syscall(__NR_landlock_create_ruleset, &handled, sizeof(handled), 0);
	MUST(rules >= 0);
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	MUST(syscall(__NR_landlock_restrict_self, rules, 0) == 0);
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), EACCES);
	ERRNO(bind(fd, (void *)&any.ss, any.len), EACCES);
	MUST(!offloaded(fd));
	send_all(before, "echo\nl", 6);		/* and what was connected before is not concerned */
	recv_exactly(before, &(char){0}, 1);
}

int main(int argc, char **argv)
{
	bool landlock = argc == 4 && !strcmp(argv[3], "landlock");

	peer = only_peer(landlock ? 3 : argc, argv);
	C(a_socket_of_the_kernel_is_native);
	C(a_firewall_that_drops_all_output_is_not_asked_about_offloaded_sockets);
	if (landlock)
		C(a_security_module_that_refuses_connect_or_bind_is_obeyed);
	return finish_checks();
}
