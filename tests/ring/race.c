/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * race - a driver and a device on two threads that sleep whenever they may, and so hang when a notification is lost.
 *
 *	race ROUNDS NUM EVENT_IDX SPINNER PACKED
 *
 * The driver keeps up to NUM / 2 chains outstanding and waits for a call when none is completed; the device waits for a kick when
 * none is available. Every wait is preceded by the store-barrier-load of virtio 1.3, 2.7.7 and 2.7.10, so without one of the
 * full barriers in vs_split.c or vs_packed.c a wait comes along that nobody ends: poll() times out, the program exits with 1. The
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
enum { F_AVAIL = 1 << 7, F_USED = 1 << 15, EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_DESC = 2 };

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };	/* packed: id, flags */

static uint8_t *ram;
static uint32_t rounds, num;
static int event_idx, packed, kick_fd, call_fd;
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

/*
 * One format's part of the driver. Chain n has two descriptors, for which there is room n % (num / 2): readable, then writable.
 * In the packed format that is also where they are in the ring, so the wrap counter flips each num / 2 chains.
 */
struct format {
	void (*offer)(uint32_t n);			/* make chain n available */
	bool (*kick_wanted)(uint32_t n);		/* after it; full barrier done */
	void (*want_call)(uint32_t done, bool on);	/* for the next used one; no barrier */
	bool (*is_used)(uint32_t done);			/* an acquire */
	bool (*right)(uint32_t done);			/* the used element is that of chain `done` */
};

static uint32_t slot_of(uint32_t n)
{
	return n % (num / 2);
}

static void split_offer(uint32_t n)
{
	struct desc *desc = (struct desc *)(ram + DESC);
	uint32_t slot = slot_of(n), at = BUF + 16 * slot;

	desc[2 * slot] = (struct desc){ GPA + at, 4, 1, 2 * slot + 1 };
	desc[2 * slot + 1] = (struct desc){ GPA + at + 8, 4, 2, 0 };
	*word(AVAIL + 4 + 2 * (n % num)) = 2 * slot;
	__atomic_store_n(word(AVAIL + 2), n + 1, __ATOMIC_RELEASE);
}

static bool split_kick_wanted(uint32_t n)
{
	return event_idx ? load(USED + 4 + 8 * num) == (uint16_t)n : !(load(USED) & 1);
}

static void split_want_call(uint32_t done, bool on)
{
	if (!event_idx)
		__atomic_store_n(word(AVAIL), !on, __ATOMIC_RELAXED);
	else if (on)
		__atomic_store_n(word(AVAIL + 4 + 2 * num), (uint16_t)done, __ATOMIC_RELAXED);
}

static bool split_is_used(uint32_t done)
{
	return __atomic_load_n(word(USED + 2), __ATOMIC_ACQUIRE) != (uint16_t)done;
}

static bool split_right(uint32_t done)
{
	uint32_t elem[2];

	memcpy(elem, ram + USED + 4 + 8 * (done % num), sizeof(elem));
	return elem[0] == 2 * slot_of(done) && elem[1] == 4;
}

static bool wrap_of(uint32_t n)
{
	return !(n / (num / 2) & 1);
}

static uint16_t marks(bool wrap, bool used)
{
	return (wrap ? F_AVAIL : 0) | (wrap == used ? F_USED : 0);
}

/* place and wrap counter, as event areas have them */
static uint16_t place_of(uint32_t n)
{
	return 2 * slot_of(n) | wrap_of(n) << 15;
}

static void packed_offer(uint32_t n)
{
	struct desc *desc = (struct desc *)(ram + DESC) + 2 * slot_of(n);
	uint32_t at = BUF + 16 * slot_of(n);
	uint16_t mark = marks(wrap_of(n), false);

	desc[1] = (struct desc){ GPA + at + 8, 4, slot_of(n), 2 | mark };
	desc[0].addr = GPA + at;
	desc[0].len = 4;
	desc[0].flags = slot_of(n);
	__atomic_store_n(&desc[0].next, 1 | mark, __ATOMIC_RELEASE);
}

static bool packed_kick_wanted(uint32_t n)
{
	uint32_t event = __atomic_load_n((uint32_t *)(ram + USED), __ATOMIC_RELAXED);

	/* each chain is decided on alone, and the device asks at a chain's first descriptor */
	return event >> 16 == EVENT_DESC ? (uint16_t)event == place_of(n) : event >> 16 == EVENT_ENABLE;
}

static void packed_want_call(uint32_t done, bool on)
{
	uint32_t event = !on ? EVENT_DISABLE << 16 : event_idx ? EVENT_DESC << 16 | place_of(done) : EVENT_ENABLE << 16;

	__atomic_store_n((uint32_t *)(ram + AVAIL), event, __ATOMIC_RELAXED);
}

static bool packed_is_used(uint32_t done)
{
	uint16_t flags = __atomic_load_n(&((struct desc *)(ram + DESC))[2 * slot_of(done)].next, __ATOMIC_ACQUIRE);

	return (flags & (F_AVAIL | F_USED)) == marks(wrap_of(done), true);
}

static bool packed_right(uint32_t done)
{
	const struct desc *desc = (struct desc *)(ram + DESC) + 2 * slot_of(done);

	return desc->flags == slot_of(done) && desc->len == 4;
}

static const struct format formats[] = {
	{ split_offer, split_kick_wanted, split_want_call, split_is_used, split_right },
	{ packed_offer, packed_kick_wanted, packed_want_call, packed_is_used, packed_right },
};
static const struct format *format;

static void *driver(void *unused)
{
	uint32_t sent = 0, done = 0;

	while (done < rounds) {
		while (sent < rounds && sent - done < num / 2) {
			uint32_t at = BUF + 16 * slot_of(sent);

			memcpy(ram + at, &sent, sizeof(sent));
			memset(ram + at + 8, 0xff, sizeof(sent));
			format->offer(sent);
			__atomic_thread_fence(__ATOMIC_SEQ_CST);
			if (format->kick_wanted(sent)) {
				uint64_t one = 1;

				kicks++;
				if (write(kick_fd, &one, sizeof(one)) != sizeof(one))
					die("kick", sent);
			}
			sent++;
		}
		if (driver_spins) {
			while (!format->is_used(done))
				;
			dawdle();
		} else {
			format->want_call(done, true);
			__atomic_thread_fence(__ATOMIC_SEQ_CST);
			if (!format->is_used(done))
				sleep_on(call_fd, "a call was lost", done);
			format->want_call(done, false);
		}
		while (done < sent && format->is_used(done)) {
			uint32_t answer;

			memcpy(&answer, ram + BUF + 16 * slot_of(done) + 8, sizeof(answer));
			if (!format->right(done) || answer != done)
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

	if (argc != 6 || fd < 0 || ftruncate(fd, SIZE) < 0)
		return 2;
	rounds = atoi(argv[1]);
	num = atoi(argv[2]);
	event_idx = atoi(argv[3]);
	driver_spins = !strcmp(argv[4], "driver");
	device_spins = !strcmp(argv[4], "device");
	packed = atoi(argv[5]);
	format = &formats[packed];
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
	vs_vq_set_features(vq, (event_idx ? 1u << 29 : 0) | (packed ? 1ull << 34 : 0));
	vs_vq_set_base(vq, packed ? 0x80008000 : 0);
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
