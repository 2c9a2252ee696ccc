// SPDX-License-Identifier: BSD-3-Clause
/*
 * cgroup_check PEER PORT - which programs of a cgroup (BPF) are asked about offloaded sockets. PEER is tests/e2e/peer.py.
 *
 * For a guest with the module, run as root. The programs are two instructions long and refuse everything; a socket belongs to the cgroup of
 * the process that made it.
 */
#include "check.h"
#include "listed.h"
#include <linux/bpf.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>

static struct addr peer;

static long bpf(int cmd, union bpf_attr *attr)
{
	return syscall(SYS_bpf, cmd, attr, sizeof(*attr));
}

/* a cgroup with this process in it, whose program for @hook refuses */
static void enter_cgroup_that_refuses(enum bpf_attach_type hook)
{
	static const struct bpf_insn insns[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr load = {
		.prog_type = BPF_PROG_TYPE_CGROUP_SOCK_ADDR, .insn_cnt = 2, .insns = (uintptr_t)insns, .license = (uintptr_t)"BSD",
		.expected_attach_type = hook,
	}, attach = { .attach_type = hook };
	char name[] = "/tmp/cgroup.XXXXXX", path[64];
	int fd, prog;

	MUST(mkdtemp(name) && mount("none", name, "cgroup2", 0, NULL) == 0);
	snprintf(path, sizeof(path), "%s/%d", name, (int)getpid());
	MUST(mkdir(path, 0755) == 0);
	fd = open(path, O_RDONLY | O_DIRECTORY);
	prog = bpf(BPF_PROG_LOAD, &load);
	MUST(fd >= 0 && prog >= 0);
	attach.target_fd = fd;
	attach.attach_bpf_fd = prog;
	MUST(bpf(BPF_PROG_ATTACH, &attach) == 0);
	snprintf(path, sizeof(path), "%s/%d/cgroup.procs", name, (int)getpid());
	fd = open(path, O_WRONLY);
	MUST(fd >= 0 && write(fd, "0", 1) == 1);
}

static void a_cgroup_that_refuses_connect_is_obeyed(void)
{
	int before = socket(AF_INET, SOCK_STREAM, 0), fd, udp;

	enter_cgroup_that_refuses(BPF_CGROUP_INET4_CONNECT);
	fd = socket(AF_INET, SOCK_STREAM, 0);
	udp = socket(AF_INET, SOCK_DGRAM, 0);
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), EPERM);
	ERRNO(connect(udp, (void *)&peer.ss, peer.len), EPERM);
	MUST(!offloaded(fd) && !offloaded(udp));
	MUST(connect(before, (void *)&peer.ss, peer.len) == 0);	/* it is not of that cgroup */
	MUST(offloaded(before));
}

/* docs/guest-module.md says so: this is a limit, and not what happens natively */
static void a_cgroup_that_refuses_sendmsg_is_not_asked(void)
{
	int fd;

	enter_cgroup_that_refuses(BPF_CGROUP_UDP4_SENDMSG);
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	SAME(sendto(fd, "x", 1, 0, (void *)&peer.ss, peer.len), 1);
	MUST(offloaded(fd));
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: cgroup_check PEER PORT\n");
		return 2;
	}
	peer = address(argv[1], argv[2]);
	C(a_cgroup_that_refuses_connect_is_obeyed);
	C(a_cgroup_that_refuses_sendmsg_is_not_asked);
	return finish_checks();
}
