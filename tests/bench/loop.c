/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * loop - the ring core alone: a driver and csrc/core take turns on one thread.
 *
 *	loop ROUNDS MILLISECONDS
 *
 * A turn: the driver offers a batch of requests of two descriptors (16 bytes each way), the device pops, completes and publishes all
 * of them, the driver collects. "polled": neither side wants notifications. "notified": both want one a batch, each is made with a
 * write to an eventfd and taken with a read, as between two peers that sleep. Both sides' work is in the time. Configurations take
 * turns in each round. Time is the thread's CPU time. A line each: format event_idx batch notified chains-per-second
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "driver.h"
#include "vs_vq.h"

enum { GPA = 0x100000, SIZE = 4 << 20, NUM = 1024, BATCH = 256, AVAIL_AT = 0x8000, USED_AT = 0x10000, BUFFERS_AT = 0x100000 };

static void die(const char *what)
{
	fprintf(stderr, "loop: %s\n", what);
	exit(1);
}

static double now(void)		/* of this thread's work: there is one, which never sleeps */
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void take(int fd)
{
	uint64_t n;

	if (read(fd, &n, sizeof(n)) != sizeof(n))
		die("a notification is missing");
}

static double rate(int packed, int event_idx, uint32_t batch, int notified, double seconds)
{
	int fd = memfd_create("loop", MFD_CLOEXEC), kick = eventfd(0, EFD_NONBLOCK), call = eventfd(0, EFD_NONBLOCK);
	struct vs_chain *chains[BATCH];
	struct vs_vq *vq = vs_vq_new(0);
	struct vs_region *region;
	struct vs_mem *none, *mem;
	struct vs_err err = { 0 };
	uint64_t done = 0;
	double start, took;

	if (fd < 0 || ftruncate(fd, SIZE) || kick < 0 || call < 0)
		die("no memory or descriptors");
	region = vs_region_map(fd, GPA, SIZE, GPA, 0, &err);
	none = vs_mem_new();
	mem = region ? vs_mem_with(none, region, &err) : NULL;
	if (!mem)
		die(err.text);
	struct drv d = {
		.ram = vs_mem_gpa(mem, GPA, SIZE), .gpa = GPA, .desc = GPA, .avail = GPA + AVAIL_AT, .used = GPA + USED_AT,
		.buffers = GPA + BUFFERS_AT, .num = NUM, .depth = BATCH, .descs = 2, .n_out = 1, .len = { 16, 16 },
		.packed = packed, .event_idx = event_idx, .kick_fd = kick, .call_fd = call,
	};
	drv_init(&d);
	vs_vq_set_features(vq, 1ull << 32 | (uint64_t)packed << 34 | (uint64_t)event_idx << 29);
	vs_vq_set_addr(vq, d.desc, d.avail, d.used);
	vs_vq_set_base(vq, packed ? 0x80008000 : 0);
	vs_vq_set_call(vq, call);
	vs_vq_set_mem(vq, mem);
	if (vs_vq_set_num(vq, NUM, &err) || vs_vq_start(vq, &err))
		die(err.text);
	for (uint32_t i = 0; i < BATCH; i++)
		if (!(chains[i] = vs_chain_new()))
			die("no memory");
	vs_vq_disable_kick(vq);
	drv_no_calls(&d);
	start = now();
	do {
		for (int turn = 0; turn < 64; turn++) {
			if (notified && (vs_vq_enable_kick(vq) || drv_want_calls(&d)))
				die("the ring was not empty");
			drv_offer(&d, batch);
			drv_kick(&d);
			if (notified) {
				take(kick);
				vs_vq_disable_kick(vq);
			}
			if (vs_vq_pop_many(vq, chains, batch) != (int)batch)
				die("requests are missing");
			for (uint32_t i = 0; i < batch; i++)
				vs_vq_push(vq, chains[i], 16);
			if (vs_vq_flush(vq) != notified)
				die("a call too many, or one too few");
			if (notified)
				take(call);
			drv_no_calls(&d);
			if (drv_collect(&d) != batch)
				die("completions are missing");
			done += batch;
		}
		took = now() - start;
	} while (took < seconds);
	vs_vq_stop(vq);
	for (uint32_t i = 0; i < BATCH; i++)
		vs_chain_free(chains[i]);
	vs_vq_free(vq);
	vs_mem_put(mem);
	vs_mem_put(none);
	vs_region_put(region);
	close(fd);
	close(kick);
	close(call);
	return done / took;
}

int main(int argc, char **argv)
{
	static const uint32_t batches[] = { 1, 32, 256 };
	int rounds = argc == 3 ? atoi(argv[1]) : 0;
	double seconds = argc == 3 ? atof(argv[2]) / 1000 : 0;

	if (rounds < 1 || seconds <= 0)
		die("usage: loop ROUNDS MILLISECONDS");
	while (rounds--)
		for (int packed = 0; packed < 2; packed++)
			for (int event_idx = 0; event_idx < 2; event_idx++)
				for (int b = 0; b < 3; b++)
					for (int notified = 0; notified < 2; notified++)
						printf("%s %d %u %d %.0f\n", packed ? "packed" : "split", event_idx, batches[b],
						       notified, rate(packed, event_idx, batches[b], notified, seconds));
	return 0;
}
