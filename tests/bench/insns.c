/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * insns - a QEMU TCG plugin that counts how often each translated block is run, in a file that others read meanwhile: profile.py.
 *
 *	-plugin insns.so,out=FILE
 *
 * FILE holds struct block, the first of which says in `runs` how many follow. A block that is translated again finds its old place, so counts only
 * grow. One processor: where QEMU runs several in parallel, counts are lost.
 *
 * The interface is QEMU's qemu-plugin.h, of which Debian has no package; these are the few parts that are used. API_VERSION says with which
 * QEMU it may be loaded: 1 before 9.0, 2 before 11.0, 7 since. A function that has one argument less than it is given here ignores that.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

struct qemu_plugin_tb;
typedef uint64_t qemu_plugin_id_t;

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
#if API_VERSION < 7
#define TRANSLATED qemu_plugin_id_t id, struct qemu_plugin_tb *tb
#else
#define TRANSLATED struct qemu_plugin_tb *tb, void *id
#endif
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*cb)(TRANSLATED), void *data);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, void (*cb)(unsigned int cpu, void *data), int flags, void *data);

EXPORT int qemu_plugin_version = API_VERSION;

enum { MOST = 1 << 20, SLOTS = 4 * MOST, NO_REGISTERS = 0 };

struct block {
	uint64_t address, insns, runs;
};

static struct block *blocks;
static uint32_t slot_of[SLOTS];	/* by address and length; 0: free */

static void ran(unsigned int cpu, void *data)
{
	(void)cpu;
	((struct block *)data)->runs++;
}

static void translated(TRANSLATED)
{
	uint64_t address = qemu_plugin_tb_vaddr(tb), insns = qemu_plugin_tb_n_insns(tb);
	uint32_t at = (uint32_t)((address * 0x9e3779b97f4a7c15u) >> 42);
	struct block *b;

	(void)id;
	for (; slot_of[at]; at = (at + 1) % SLOTS) {
		b = &blocks[slot_of[at]];
		if (b->address == address && b->insns == insns)
			break;
	}
	if (!slot_of[at]) {
		if (blocks[0].runs + 1 == MOST)
			return;
		slot_of[at] = (uint32_t)++blocks[0].runs;
		blocks[slot_of[at]] = (struct block){ address, insns, 0 };
	}
	qemu_plugin_register_vcpu_tb_exec_cb(tb, ran, NO_REGISTERS, &blocks[slot_of[at]]);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv)
{
	int fd;

	(void)info;
	if (argc != 1 || strncmp(argv[0], "out=", 4)) {
		fputs("insns: give out=FILE\n", stderr);
		return -1;
	}
	fd = open(argv[0] + 4, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || ftruncate(fd, MOST * sizeof(*blocks))) {
		perror(argv[0] + 4);
		return -1;
	}
	blocks = mmap(NULL, MOST * sizeof(*blocks), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (blocks == MAP_FAILED) {
		perror("insns: mmap");
		return -1;
	}
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated, NULL);
	return 0;
}
