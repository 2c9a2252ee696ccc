/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * race - a driver and a device on two threads that sleep whenever they may, and so hang when a notification is lost.
 *
 *	race ROUNDS NUM EVENT_IDX SPINNER
 *
 * The driver keeps up to NUM / 2 chains outstanding and waits for a call when none is completed; the device waits for a kick when
 * none is available. Every wait is preceded by the store-barrier-load of virtio 1.3, 2.7.7 and 2.7.10, so without one of the
 * full barriers in vs_split.c a wait comes along that nobody ends: poll() then times out and the program exits with 1. The
 * window is a few nanoseconds, too small to be hit between two sleepers. So one of them (SPINNER: driver, device, none) watches
 * the ring instead of sleeping, and acts a little random while after it saw the other one act, just as that one goes to sleep.
 * Each chain carries a number, which the device must see in order and which comes back in the writable part: that checks the
 * publication of descriptors and used elements too. Prints the notifications that were made. Exit: 0 all well, 1 lost or wrong.
 */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vs_vq.h"

enum { GPA = 0x10000, SIZE = 1 << 20, DESC = 0, AVAIL = 0x8000, USED = 0x10000, BUF = 0x20000, LOST_MS = 20000 };

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

static uint8_t *ram;
static uint32_t rounds, num;
static int event_idx, kick_fd, call_fd;
static bool driver_spins, device_spins;
static unsigned long kicks, calls;

static void die(const char *what, uint32_t at)
{
	fprintf(stderr, "%s at %u\n", what, at);
	_exit(1);
}

static void sleep_on(int fd, const char *who, uint32_t at)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	uint64_t n;

	if (poll(&p, 1, LOST_MS) != 1)
		die(who, at);
	if (read(fd, &n, sizeof(n)) != sizeof(n))
		die("read", at);
}

/* the random while; up to some 100 ns */
static void dawdle(void)
{
	static __thread uint32_t x = 2463534242u;

	x ^= x << 13;
	x ^= x >> 17;
	x ^= x << 5;
	for (volatile uint32_t i = x & 63; i; i--)
		;
}

static uint16_t *word(uint32_t at)
{
	return (uint16_t *)(ram + at);
}

static uint16_t load(uint32_t at)
{
	return __atomic_load_n(word(at), __ATOMIC_RELAXED);
}

static void *driver(void *unused)
{
	struct desc *desc = (struct desc *)(ram + DESC);
	uint32_t sent = 0, done = 0, kicked = 0;

	while (done < rounds) {
		/* two descriptors a chain; chain n has the pair n % (num / 2) */
		while (sent < rounds && sent - done < num / 2) {
			uint32_t slot = sent % (num / 2), at = BUF + 16 * slot;

			memcpy(ram + at, &sent, sizeof(sent));
			memset(ram + at + 8, 0xff, sizeof(sent));
			desc[2 * slot] = (struct desc){ GPA + at, 4, 1, 2 * slot + 1 };
			desc[2 * slot + 1] = (struct desc){ GPA + at + 8, 4, 2, 0 };
			*word(AVAIL + 4 + 2 * (sent % num)) = 2 * slot;
			sent++;
			__atomic_store_n(word(AVAIL + 2), sent, __ATOMIC_RELEASE);
			__atomic_thread_fence(__ATOMIC_SEQ_CST);
			if (event_idx ? (uint16_t)(sent - load(USED + 4 + 8 * num) - 1) < (uint16_t)(sent - kicked) :
			    !(load(USED) & 1)) {
				uint64_t one = 1;

				kicks++;
				if (write(kick_fd, &one, sizeof(one)) != sizeof(one))
					die("kick", sent);
			}
			kicked = sent;
		}
		if (driver_spins) {
			while (__atomic_load_n(word(USED + 2), __ATOMIC_ACQUIRE) == (uint16_t)done)
				;
			dawdle();
			goto collect;
		}
		if (event_idx)
			__atomic_store_n(word(AVAIL + 4 + 2 * num), (uint16_t)done, __ATOMIC_RELAXED);
		else
			__atomic_store_n(word(AVAIL), 0, __ATOMIC_RELAXED);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (__atomic_load_n(word(USED + 2), __ATOMIC_ACQUIRE) == (uint16_t)done)
			sleep_on(call_fd, "a call was lost", done);
		if (!event_idx)
			__atomic_store_n(word(AVAIL), 1, __ATOMIC_RELAXED);
collect:
		while (__atomic_load_n(word(USED + 2), __ATOMIC_ACQUIRE) != (uint16_t)done) {
			uint32_t slot = done % (num / 2), elem[2], answer;

			memcpy(elem, ram + USED + 4 + 8 * (done % num), sizeof(elem));
			memcpy(&answer, ram + BUF + 16 * slot + 8, sizeof(answer));
			if (elem[0] != 2 * slot || elem[1] != 4 || answer != done)
				die("a wrong used element or answer", done);
			done++;
		}
	}
	return unused;
}

static void device(struct vs_vq *vq, struct vs_chain *c)
{
	uint32_t done = 0, got;

	while (done < rounds) {
		vs_vq_disable_kick(vq);
		while (vs_vq_pop(vq, c) == 1) {
			if (vs_chain_read(c, 0, &got, sizeof(got)) != sizeof(got) || got != done)
				die("a wrong chain", done);
			vs_chain_write(c, 0, &got, sizeof(got));
			vs_vq_push(vq, c, sizeof(got));
			calls += vs_vq_flush(vq) == 1;
			done++;
		}
		if (vs_vq_broken(vq))
			die(vs_vq_error(vq)->text, done);
		if (device_spins) {
			while (done < rounds && !vs_vq_has_avail(vq))
				;
			dawdle();
			continue;
		}
		if (done < rounds && !vs_vq_enable_kick(vq))
			sleep_on(kick_fd, "a kick was lost", done);
	}
}

int main(int argc, char **argv)
{
	int fd = memfd_create("race", 0);
	struct vs_err err = { 0 };
	struct vs_region *region;
	struct vs_mem *empty, *mem;
	struct vs_vq *vq;
	struct vs_chain *c;
	pthread_t thread;

	if (argc != 5 || fd < 0 || ftruncate(fd, SIZE) < 0)
		return 2;
	rounds = atoi(argv[1]);
	num = atoi(argv[2]);
	event_idx = atoi(argv[3]);
	driver_spins = !strcmp(argv[4], "driver");
	device_spins = !strcmp(argv[4], "device");
	ram = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	kick_fd = eventfd(0, 0);
	call_fd = eventfd(0, 0);
	region = vs_region_map(fd, GPA, SIZE, 0, 0, &err);
	empty = vs_mem_new();
	mem = vs_mem_with(empty, region, &err);
	vq = vs_vq_new(0);
	vs_vq_set_mem(vq, mem);
	vs_vq_set_num(vq, num, &err);
	vs_vq_set_addr(vq, DESC, AVAIL, USED);
	vs_vq_set_features(vq, event_idx ? 1u << 29 : 0);
	vs_vq_set_call(vq, call_fd);
	if (vs_vq_start(vq, &err) < 0)
		die(err.text, 0);
	c = vs_chain_new();
	pthread_create(&thread, NULL, driver, NULL);
	device(vq, c);
	pthread_join(thread, NULL);
	printf("%lu kicks, %lu calls\n", kicks, calls);
	vs_chain_free(c);
	vs_vq_free(vq);
	vs_mem_put(mem);
	vs_mem_put(empty);
	vs_region_put(region);
	return vs_region_count_live() ? 1 : 0;
}
