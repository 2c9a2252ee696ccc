/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * fuzz - what the fuzz targets share: the input as a stream of choices, and a check that leaves evidence.
 *
 * A target is one C file with the two functions of libFuzzer's interface. Its input is read through a cursor; when the input is
 * used up the cursor gives zeros, and the target stops at the next step: so every input ends, and a longer one goes on where a
 * shorter one stopped. A broken invariant aborts with its text: libFuzzer (or driver.c) then keeps the input in a file.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MUST(what, fmt, ...) do { \
	if (!(what)) { \
		fprintf(stderr, "%s:%d: broken: %s: " fmt "\n", __FILE__, __LINE__, #what, ##__VA_ARGS__); \
		abort(); \
	} \
} while (0)

struct cursor {
	const uint8_t *at, *end;
};

static inline bool more(const struct cursor *c)
{
	return c->at < c->end;
}

static inline uint64_t take(struct cursor *c, size_t bytes)
{
	uint64_t v = 0;
	size_t n = (size_t)(c->end - c->at) < bytes ? (size_t)(c->end - c->at) : bytes;

	memcpy(&v, c->at, n);
	c->at += n;
	return v;
}

static inline uint32_t below(struct cursor *c, uint32_t n)
{
	return (uint32_t)(take(c, n > 256 ? 2 : 1) % n);
}

/* a number at which things break, or any */
static inline uint64_t odd_number(struct cursor *c)
{
	static const uint64_t at[] = {
		0, 1, 2, 15, 16, 17, 0xfff, 0x1000, 0x1001, 0x3b10, 0x7fff, 0x8000, 0xffff, 0x10000, 0x7fffffff, 0x80000000,
		0xfffffff0, 0xffffffff, 0x100000000, INT64_MAX, (uint64_t)INT64_MAX + 1, UINT64_MAX - 0xfff, UINT64_MAX - 15, UINT64_MAX,
	};
	uint32_t i = below(c, sizeof(at) / sizeof(*at) + 4);

	return i < sizeof(at) / sizeof(*at) ? at[i] : take(c, 8);
}

/* how many of the first descriptors are open, in one system call; more than these an input does not have at once */
static inline int open_fds(void)
{
	struct pollfd fds[256];
	int n = 0;

	for (int i = 0; i < 256; i++)
		fds[i] = (struct pollfd){ .fd = i };
	MUST(poll(fds, 256, 0) >= 0, "no poll");
	for (int i = 0; i < 256; i++)
		n += !(fds[i].revents & POLLNVAL);
	return n;
}

#endif
