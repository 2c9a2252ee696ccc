/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * ring - a virtqueue of either format against a driver and a front-end that do anything, in any order, one step at a time.
 *
 * The input is a list of steps: the driver writes descriptors, indices, whole valid chains or random bytes; the front-end starts,
 * stops, reconfigures and takes memory away; the device pops, completes, gives back and flushes. After each step of the device:
 *
 *   - a popped chain is wholly in memory that is mapped, and within the bounds of guest.h
 *   - nothing was written but the device's own part of the ring, and buffers through vs_chain_write()
 *   - a published used index (split) is what the device counts, and moved by what was pushed
 *   - a broken ring says why, and is not touched
 *   - what the in-flight region and the dirty log hold, which front-ends write and truncate, leads nowhere else
 *   - at the end no region is mapped and no descriptor open
 */
#include <errno.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "guest.h"

enum { AVAIL = 0x800, USED = 0xc00, TABLE = 0x1100, END = 0x3ff0, HELD = 8, NUM_MAX = 128 };

struct wire_desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

static struct {
	struct vs_vq *vq;
	struct vs_chain *held[HELD];
	uint8_t shadow[RAM];		/* the memory as it was before the device's step */
	bool stale;			/* somebody else has written since */
	uint32_t desc;			/* where the descriptors are: up to the end of their region, so that one too many is outside */
	uint16_t avail_idx;		/* the driver's place, split */
	uint16_t slot;			/* and packed, with its wrap counter */
	bool wrap;
	bool truncated;			/* the in-flight region and the log are gone */
} s;

/* the in-flight region, as large as the queue needs and not a byte more, and the dirty log, which is too short for the highest region */
static int inflight_fd, log_fd;
static uint8_t *inflight;

enum { INFLIGHT_SIZE = 0x2000, LOG_SIZE = 0x40 };

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	guest_init();
	inflight_fd = memfd_create("inflight", MFD_CLOEXEC);
	log_fd = memfd_create("log", MFD_CLOEXEC);
	MUST(ftruncate(inflight_fd, INFLIGHT_SIZE) == 0 && ftruncate(log_fd, LOG_SIZE) == 0, "no memfd");
	inflight = mmap(NULL, INFLIGHT_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, inflight_fd, 0);
	return inflight == MAP_FAILED;
}

static bool packed(void)
{
	return vs_vq_feature(s.vq, VIRTIO_F_RING_PACKED);
}

static void poke16(uint32_t at, uint16_t v)
{
	memcpy(ram + at, &v, sizeof(v));
}

static void write_desc(uint32_t at, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	struct wire_desc d = { addr, len, flags, next };

	if (packed()) {		/* id before flags */
		d.flags = next;
		d.next = flags;
	}
	memcpy(ram + at, &d, sizeof(d));
}

/* what is wrong with a chain; beyond these it is right, but for its addresses and lengths */
enum twist { WRONG_HEAD, WRONG_NEXT, WRONG_FLAGS, WRONG_TABLE, WRONG_IDX, TWISTS = 16 };

/* a chain made available; n descriptors, or one that refers to a table of n */
static void submit(struct cursor *c)
{
	uint32_t num = vs_vq_num(s.vq) ?: 1, n = 1 + below(c, 6), writable = below(c, n + 1);
	uint16_t avail = s.wrap ? 1 << 7 : 1 << 15, head = packed() ? s.slot : below(c, num), at = head, id = head % num;
	enum twist twist = below(c, TWISTS);
	bool indirect = take(c, 1) & 1;
	uint32_t table = twist == WRONG_TABLE ? END - 16 * below(c, n + 1) : TABLE;	/* perhaps over the end of its region */

	if (twist == WRONG_HEAD)
		id = (uint16_t)(num + below(c, 3));
	for (uint32_t i = 0; i < n; i++) {
		uint32_t len = below(c, 4) ? below(c, 200) : (uint32_t)odd_number(c);
		uint16_t flags = (i + writable >= n ? 2 : 0) | (i + 1 < n ? 1 : 0), next = indirect ? i + 1 : (at + 1) % num;

		if (twist == WRONG_NEXT && below(c, 2))
			next = (uint16_t)(below(c, 2) ? num + below(c, 3) : n + below(c, 3));
		if (twist == WRONG_FLAGS && below(c, 2))
			flags = (uint16_t)take(c, 1);
		if (indirect)
			write_desc(table + 16 * i, guest_address(c), len, flags, next);
		else
			write_desc(s.desc + 16 * at, guest_address(c), len, flags | (packed() ? avail : 0), packed() ? id : next);
		if (!indirect && ++at >= num) {
			at = 0;
			avail ^= 1 << 7 | 1 << 15;
		}
	}
	if (indirect) {
		uint32_t len = twist == WRONG_TABLE && below(c, 2) ? (uint32_t)odd_number(c) : 16 * n;

		write_desc(s.desc + 16 * at, layout[0].gpa + table, len, 4 | (packed() ? avail : 0), packed() ? id : 0);
		if (++at >= num)
			at = 0;
	}
	if (packed()) {
		s.wrap ^= at <= s.slot;
		s.slot = at;
		return;
	}
	poke16(AVAIL + 4 + 2 * (s.avail_idx % num), twist == WRONG_HEAD ? id : head);
	s.avail_idx += twist == WRONG_IDX ? 1 + below(c, 2 * num) : 1;
	poke16(AVAIL + 2, s.avail_idx);
}

static void scribble(struct cursor *c)
{
	uint32_t num = vs_vq_num(s.vq) ?: 1, area = below(c, 6), i, n;

	switch (area) {
	case 0:
		write_desc(s.desc + 16 * below(c, num), guest_address(c), (uint32_t)odd_number(c), (uint16_t)take(c, 2), below(c, num + 1));
		break;
	case 1:
		write_desc(TABLE + 16 * below(c, 64), guest_address(c), (uint32_t)odd_number(c), (uint16_t)take(c, 1), below(c, 66));
		break;
	case 2:
		write_desc(s.desc + 16 * below(c, num), layout[0].gpa + TABLE + below(c, 64), below(c, 2) ? 16 * below(c, 128) :
			   (uint32_t)odd_number(c), 4 | (uint16_t)take(c, 2), below(c, num + 1));
		break;
	case 3:
		i = below(c, 3);
		poke16(AVAIL + 2 * (i == 2 ? below(c, num + 3) : i), (uint16_t)(i == 1 ? s.avail_idx += below(c, 4) : take(c, 2)));
		break;
	case 4:
		i = 4 * below(c, 64);	/* the head and the first entries of either layout */
		n = below(c, 2) ? below(c, num + 2) : (uint32_t)take(c, 2);
		if (!s.truncated)
			memcpy(inflight + i + 2 * below(c, 2), &n, 2);
		break;
	default:
		i = below(c, CANARY_AT);
		for (n = 1 + below(c, 16); n && i < CANARY_AT; n--)
			ram[i++] = (uint8_t)take(c, 1);
	}
}

/* may the device have written this byte? its part of the ring only */
static bool devices_own(uint32_t at)
{
	uint32_t num = vs_vq_num(s.vq);

	if (packed())
		return (at >= s.desc && at < s.desc + 16 * num) || (at >= USED && at < USED + 4);
	return at >= USED && at < USED + 6 + 8 * num;
}

static void check_writes(void)
{
	if (!memcmp(s.shadow, ram, RAM))
		return;
	s.stale = true;
	for (uint32_t i = 0; i < RAM; i++)
		MUST(s.shadow[i] == ram[i] || devices_own(i), "the device wrote byte 0x%x", i);
}

static void check_broken(void)
{
	if (vs_vq_broken(s.vq))
		MUST(vs_vq_error(s.vq)->code && *vs_vq_error(s.vq)->text, "no evidence");
}

static struct vs_chain **some_held(struct cursor *c)
{
	return &s.held[below(c, HELD)];
}

static void fill(struct vs_chain *c, struct cursor *in)
{
	uint8_t data[64];
	size_t offset = below(in, 128), n, most;

	memset(data, (int)take(in, 1), sizeof(data));
	n = vs_chain_write(c, offset, data, sizeof(data));
	most = offset < c->in_len ? (size_t)(c->in_len - offset) : 0;
	MUST(n == (most < sizeof(data) ? most : sizeof(data)), "%zu bytes written of %zu", n, most);
	offset = below(in, 128);
	n = vs_chain_read(c, offset, data, sizeof(data));
	most = offset < c->out_len ? (size_t)(c->out_len - offset) : 0;
	MUST(n == (most < sizeof(data) ? most : sizeof(data)), "%zu bytes read of %zu", n, most);
}

/* the device's move: everything that vs_vq.h allows it */
static void device(struct cursor *c)
{
	struct vs_chain **held = some_held(c);
	uint32_t before = s.vq->in_flight;
	int n;

	if (s.stale)
		memcpy(s.shadow, ram, RAM);
	s.stale = false;
	switch (below(c, 9)) {
	case 0:
	case 1:
		for (n = 0; n < HELD && s.held[n]->mem; n++)
			;		/* what is in the device's hands stays there */
		if (n == HELD)
			break;
		if (vs_vq_pop(s.vq, s.held[n]) == 1)
			check_chain(s.vq, s.held[n]);
		else
			MUST(!s.held[n]->mem && !s.held[n]->run, "a chain without a chain");
		break;
	case 2:
		for (n = 0; n < HELD; n++)
			if (s.held[n]->mem)
				return;
		n = vs_vq_pop_many(s.vq, s.held, 1 + (int)below(c, HELD));
		for (int i = 0; i < n; i++)
			check_chain(s.vq, s.held[i]);
		break;
	case 3:
		vs_vq_push(s.vq, *held, (uint32_t)odd_number(c));
		MUST(!(*held)->mem && s.vq->in_flight <= before, "%u, were %u", s.vq->in_flight, before);
		break;
	case 4:
		vs_vq_unpop(s.vq, *held);
		MUST(!(*held)->mem && s.vq->in_flight <= before, "%u, were %u", s.vq->in_flight, before);
		break;
	case 5:
		if (vs_vq_flush(s.vq) >= 0 && s.vq->live && !packed()) {
			uint16_t idx;

			memcpy(&idx, ram + USED + 2, sizeof(idx));
			MUST(s.vq->split.used_next == s.vq->split.used_published, "flushed in part");
			MUST(idx == s.vq->split.used_published || !memcmp(s.shadow + USED + 2, &idx, 2), "used.idx %u", idx);
		}
		break;
	case 6:
		if (vs_vq_enable_kick(s.vq))
			MUST(vs_vq_has_avail(s.vq) || vs_vq_broken(s.vq), "nothing there");
		break;
	case 7:
		vs_vq_disable_kick(s.vq);
		break;
	default:
		if ((*held)->mem)
			fill(*held, c);
		s.stale = true;
		return;
	}
	check_writes();
	check_broken();
}

/* track what is in flight, perhaps; the queue is idle */
static void track(struct cursor *c)
{
	uint32_t entries = below(c, 8) ? vs_vq_num(s.vq) : below(c, NUM_MAX);
	uint64_t size = vs_inflight_size(packed(), entries);
	struct vs_err err = { 0 };
	struct vs_region *r;

	if (below(c, 3) == 0 || !entries) {
		vs_vq_set_inflight(s.vq, NULL, 0, &err);
		return;
	}
	r = vs_region_map(inflight_fd, 0, size, 0, 0, &err);
	MUST(!!r == !s.truncated, "%s", err.text);
	if (!r)
		return;
	ASAN_UNPOISON_MEMORY_REGION(r->map, r->map_len);
	ASAN_POISON_MEMORY_REGION(r->host + size, r->map_len - size);
	MUST(vs_vq_set_inflight(s.vq, r, entries, &err) == 0, "%s", err.text);
	vs_region_put(r);
	if (below(c, 2) && !s.truncated)
		memset(inflight, 0, INFLIGHT_SIZE);	/* new; else whatever a back-end before left, and the driver's scribbles */
}

static void set_log(struct cursor *c)
{
	struct vs_err err = { 0 };
	struct vs_log *log = below(c, 4) ? vs_log_new(log_fd, LOG_SIZE, 0, &err) : NULL;

	vs_vq_set_log(s.vq, log, take(c, 1) & 1, take(c, 1) & 1, below(c, 4) ? layout[0].gpa + USED : odd_number(c));
	vs_log_put(log);
}

/* the back-end is killed, and another one comes */
static void die(void)
{
	struct vs_vq *old = s.vq;

	s.vq = vs_vq_new(0);
	vs_vq_set_mem(s.vq, old->mem);
	vs_vq_set_features(s.vq, old->features);
	vs_vq_set_num(s.vq, old->num, &(struct vs_err){ 0 });
	vs_vq_set_addr(s.vq, old->desc_uva, old->avail_uva, old->used_uva);
	if (old->inflight)
		vs_vq_set_inflight(s.vq, old->inflight, old->inflight_entries, &(struct vs_err){ 0 });
	for (int i = 0; i < HELD; i++)
		vs_chain_drop(s.held[i]);
	vs_vq_free(old);
}

static void configure(struct cursor *c)
{
	struct vs_err err = { 0 };
	uint64_t features = (uint64_t)(take(c, 1) & 3) << VIRTIO_F_RING_PACKED | (uint64_t)(take(c, 1) & 3) << 28;
	uint32_t num = below(c, 2) ? 1u << below(c, 8) : 1 + below(c, NUM_MAX);

	if (vs_vq_running(s.vq)) {
		vs_vq_stop(s.vq);
		MUST(vs_vq_stop(s.vq) == s.vq->base, "stop is not idempotent");
	}
	if (below(c, 4) == 0)
		num = (uint32_t)odd_number(c);
	vs_vq_set_features(s.vq, features);
	if (vs_vq_set_num(s.vq, num, &err) == 0 && num > NUM_MAX)
		vs_vq_set_num(s.vq, NUM_MAX, &err);	/* more has no room in the memory; tests/ring has the large ones */
	track(c);
	s.desc = END - 16 * (vs_vq_num(s.vq) ?: 1);
	if (below(c, 8))
		vs_vq_set_addr(s.vq, uva_of(0) + s.desc, uva_of(0) + AVAIL, uva_of(0) + USED);
	else
		vs_vq_set_addr(s.vq, odd_number(c), uva_of(below(c, REGIONS)) + odd_number(c), odd_number(c));
	s.wrap = true;
	s.slot = s.avail_idx = 0;
	if (below(c, 4)) {
		vs_vq_set_base(s.vq, packed() ? 0x80008000 : 0);
	} else {
		vs_vq_set_base(s.vq, (uint32_t)odd_number(c));
		s.avail_idx = (uint16_t)s.vq->base;
	}
	poke16(AVAIL + 2, s.avail_idx);
	if (s.vq->desc_uva != uva_of(0) + s.desc || s.vq->used_uva != uva_of(0) + USED)
		return;		/* only to be refused: with the rings elsewhere devices_own() would be wrong */
	if (vs_vq_start(s.vq, &err) < 0)
		MUST(err.code && *err.text, "no reason");
}

static void front_end(struct cursor *c)
{
	struct vs_err err = { 0 };
	int fds[2] = { -1, -1 };
	struct vs_mem *m;

	switch (below(c, 9)) {
	case 0:
		configure(c);
		break;
	case 5:
		set_log(c);
		break;
	case 6:
	case 7:
		if (vs_vq_running(s.vq) && below(c, 2))
			vs_vq_stop(s.vq);
		die();
		if (vs_vq_start(s.vq, &err) < 0)
			MUST(err.code && *err.text, "no reason");
		break;
	case 8:
		if (below(c, 8) == 0 && !s.truncated) {
			s.truncated = true;
			MUST(ftruncate(inflight_fd, 0) == 0 && ftruncate(log_fd, 0) == 0, "cannot truncate");
		}
		break;
	case 1:
		m = guest_map((unsigned)take(c, 1) | (below(c, 4) ? 1 : 0));
		if (vs_vq_set_mem(s.vq, m) < 0)
			MUST(vs_vq_broken(s.vq), "not broken");
		vs_mem_put(m);
		break;
	case 2:
		vs_vq_stop(s.vq);
		if (vs_vq_start(s.vq, &err) < 0)
			MUST(err.code && *err.text, "no reason");
		break;
	case 3:
		switch (below(c, 4)) {
		case 0:
			fds[0] = eventfd((unsigned)take(c, 4), EFD_CLOEXEC);
			break;
		case 1:
			MUST(pipe2(fds, O_CLOEXEC) == 0, "no pipe");
			break;
		case 2:
			MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "no sockets");
			break;
		}
		if (take(c, 1) & 1)
			vs_vq_set_call(s.vq, fds[take(c, 1) & 1]);
		else
			vs_vq_set_err(s.vq, fds[take(c, 1) & 1]);
		for (int i = 0; i < 2; i++)
			if (fds[i] >= 0)
				close(fds[i]);
		break;
	default:
		vs_vq_break(s.vq, EPROTO, "the device found a fault");
		check_broken();
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct cursor c = { data, data + size };
	int fds = open_fds();
	struct vs_mem *m;

	MUST(ftruncate(inflight_fd, INFLIGHT_SIZE) == 0 && ftruncate(log_fd, LOG_SIZE) == 0, "cannot grow");
	s.truncated = false;
	memset(inflight, 0, INFLIGHT_SIZE);
	memset(ram, 0, CANARY_AT);
	memset(ram + CANARY_AT, CANARY, RAM - CANARY_AT);
	s.stale = true;
	s.vq = vs_vq_new(0);
	m = guest_map(0xf);
	vs_vq_set_mem(s.vq, m);
	vs_mem_put(m);
	for (int i = 0; i < HELD; i++)
		s.held[i] = vs_chain_new();
	configure(&c);
	while (more(&c)) {
		uint32_t step = below(&c, 16);

		if (step < 8) {
			device(&c);
			continue;
		}
		s.stale = true;
		if (step < 12)
			submit(&c);
		else if (step < 15)
			scribble(&c);
		else
			front_end(&c);
	}
	vs_vq_stop(s.vq);
	for (int i = 0; i < HELD; i++)
		vs_chain_free(s.held[i]);
	vs_vq_free(s.vq);
	check_canary();
	MUST(!vs_region_count_live(), "%d regions are still mapped", vs_region_count_live());
	MUST(open_fds() == fds, "%d descriptors are open, which were %d", open_fds(), fds);
	return 0;
}
