/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * mem - the memory map against a front-end that sends any numbers and any descriptors, and truncates what it shared.
 *
 * The map is compared with a list that is searched the slow way, in 128-bit arithmetic: what is accepted, what is refused, and where
 * every address leads. A truncated file poisons the maps that hold it, and no other.
 */
#include <errno.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "fuzz.h"
#include "vs_mem_priv.h"

enum { FILE_SIZE = 0x8000, KNOWN = 24 };

typedef unsigned __int128 u128;

struct known {
	uint64_t gpa, size, uva;
	uint8_t *host;
};

static struct {
	struct vs_mem *mem;
	struct known known[KNOWN];
	int n;
	bool truncated;
} s;

/* fds that a front-end may send instead of a memfd; made once */
static int not_memory[7];

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	int ends[2];

	MUST(pipe2(ends, O_CLOEXEC) == 0, "no pipe");
	not_memory[0] = ends[0];
	not_memory[1] = ends[1];
	not_memory[2] = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	not_memory[3] = open("/dev/zero", O_RDWR | O_CLOEXEC);
	not_memory[4] = open("/proc/self/exe", O_PATH | O_CLOEXEC);
	not_memory[5] = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	not_memory[6] = eventfd(0, EFD_CLOEXEC);
	return 0;
}

static bool overlaps(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
	return (u128)a < (u128)b + b_size && (u128)b < (u128)a + a_size;
}

static bool should_map(uint64_t gpa, uint64_t size, uint64_t uva, uint64_t offset)
{
	return size && (u128)gpa + size <= UINT64_MAX && (u128)uva + size <= UINT64_MAX && (u128)offset + size <= FILE_SIZE;
}

static bool should_fit(uint64_t gpa, uint64_t size, uint64_t uva)
{
	for (int i = 0; i < s.n; i++)
		if (overlaps(gpa, size, s.known[i].gpa, s.known[i].size) || overlaps(uva, size, s.known[i].uva, s.known[i].size))
			return false;
	return true;
}

static void use(struct vs_mem *m)
{
	vs_mem_put(s.mem);
	s.mem = m;
}

static void add(struct cursor *c, int fd)
{
	uint64_t gpa = odd_number(c), size = odd_number(c), uva = odd_number(c), offset = below(c, 2) ? 0 : odd_number(c);
	bool memory = below(c, 8), fits = should_fit(gpa, size, uva);
	struct vs_err err = { 0 };
	struct vs_region *r;
	struct vs_mem *m;

	if (s.n == KNOWN)
		return;
	r = vs_region_map(memory ? fd : not_memory[below(c, 7)], gpa, size, uva, offset, &err);
	MUST(!!r == (memory && !s.truncated && should_map(gpa, size, uva, offset)), "gpa %#lx size %#lx uva %#lx offset %#lx: %s",
	     gpa, size, uva, offset, err.text);
	if (!r) {
		MUST(err.code && *err.text, "no reason");
		return;
	}
	m = vs_mem_with(s.mem, r, &err);
	MUST(!!m == fits, "gpa %#lx size %#lx uva %#lx: %s", gpa, size, uva, err.text);
	if (m) {
		use(m);
		s.known[s.n++] = (struct known){ gpa, size, uva, r->host };
	} else {
		MUST(err.code == EEXIST && *err.text, "no reason");
	}
	vs_region_put(r);
}

static void drop(struct cursor *c)
{
	struct known k = { odd_number(c), odd_number(c), odd_number(c), NULL };
	struct vs_err err = { 0 };
	struct vs_mem *m;
	int at = -1;

	if (s.n && below(c, 2))
		k = s.known[below(c, (uint32_t)s.n)];
	for (int i = 0; i < s.n; i++)
		if (s.known[i].gpa == k.gpa && s.known[i].size == k.size && s.known[i].uva == k.uva)
			at = i;
	m = vs_mem_without(s.mem, k.gpa, k.size, k.uva, &err);
	MUST(!!m == (at >= 0), "gpa %#lx: %s", k.gpa, err.text);
	if (m) {
		use(m);
		s.known[at] = s.known[--s.n];
	}
}

/* where [address, address + len) leads when it is wholly in one region */
static void *expect(uint64_t address, uint64_t len, bool gpa)
{
	for (int i = 0; i < s.n; i++) {
		const struct known *k = &s.known[i];
		uint64_t start = gpa ? k->gpa : k->uva;

		if (address >= start && address - start < k->size)
			return len <= k->size - (address - start) ? k->host + (address - start) : NULL;
	}
	return NULL;
}

static void look_up(struct cursor *c)
{
	uint64_t address = odd_number(c), len = odd_number(c);
	struct iovec iov[8];
	u128 at, end;
	int n;

	if (s.n && below(c, 2))
		address = s.known[below(c, (uint32_t)s.n)].gpa + odd_number(c);
	MUST(vs_mem_gpa(s.mem, address, len) == expect(address, len, true), "gpa %#lx len %#lx", address, len);
	MUST(vs_mem_uva(s.mem, address, len) == expect(address, len, false), "uva %#lx len %#lx", address, len);
	n = vs_mem_iov(s.mem, address, len, iov, 8);
	at = address;
	end = at + len;
	for (int i = 0; i < n; i++) {
		MUST(iov[i].iov_len && expect((uint64_t)at, iov[i].iov_len, true) == iov[i].iov_base, "piece %d", i);
		at += iov[i].iov_len;
	}
	MUST(n < 0 || at == end, "%d pieces are not %#lx bytes", n, len);
	if (n == -EFAULT && len) {	/* then some byte is really not there */
		bool hole = false;

		while (!hole && at < end) {
			int i;

			for (i = 0; i < s.n; i++)
				if (at >= s.known[i].gpa && at < (u128)s.known[i].gpa + s.known[i].size)
					break;
			hole = i == s.n;
			if (!hole)
				at = (u128)s.known[i].gpa + s.known[i].size;
		}
		MUST(hole, "gpa %#lx len %#lx is all there", address, len);
	}
}

static void touch(struct cursor *c)
{
	struct known *k = s.n ? &s.known[below(c, (uint32_t)s.n)] : NULL;
	volatile uint8_t *p;

	if (!k)
		return;
	p = k->host + odd_number(c) % k->size;
	*p = *p + 1;
	MUST(!s.truncated || vs_mem_poisoned(s.mem), "a fault was not noticed");
	MUST(s.truncated || !vs_mem_poisoned(s.mem), "poisoned for nothing");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct cursor c = { data, data + size };
	int fd = memfd_create("fuzz", MFD_CLOEXEC), fds = open_fds();

	MUST(fd >= 0 && ftruncate(fd, FILE_SIZE) == 0, "no memfd");
	s.mem = vs_mem_new();
	s.n = 0;
	s.truncated = false;
	while (more(&c)) {
		switch (below(&c, 12)) {
		case 0 ... 4:
			add(&c, fd);
			break;
		case 5:
			drop(&c);
			break;
		case 6 ... 9:
			look_up(&c);
			break;
		case 10:
			touch(&c);
			break;
		default:
			if (below(&c, 4) == 0 && !s.truncated) {
				s.truncated = true;
				MUST(ftruncate(fd, 0) == 0, "cannot truncate");
			}
		}
		MUST(vs_mem_count(s.mem) == s.n, "%d regions", vs_mem_count(s.mem));
	}
	vs_mem_put(s.mem);
	MUST(!vs_region_count_live(), "%d regions are still mapped", vs_region_count_live());
	MUST(!atomic_load(&vs_guards_poisoned), "a guard is still poisoned");
	MUST(open_fds() == fds, "%d descriptors are open, which were %d", open_fds(), fds);
	close(fd);
	return 0;
}
