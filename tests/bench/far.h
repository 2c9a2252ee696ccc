/* SPDX-License-Identifier: BSD-3-Clause */
/* far.h - what the load generator (load.c) asks of the far end (far.c), at the start of each job on a connection. */
#ifndef BENCH_FAR_H
#define BENCH_FAR_H

#include <stdint.h>

enum {
	FAR_SINK = 1,	/* take `amount` bytes, then answer with their number, 8 bytes */
	FAR_SOURCE,	/* give `amount` bytes, `size` in each write */
	FAR_ECHO,	/* give back `amount` bytes as they come; no more than a socket holds at once */
	FAR_HOLD,	/* read nothing any more */
	FAR_PIECE = 65536	/* bytes of a read, and the most in a write */
};

struct far_request {
	uint32_t what, size;
	uint64_t amount;
};

/* datagrams: those that begin with FAR_DGRAM ask or answer, all others are payload, which is counted */
enum {
	FAR_DGRAM = 0x66617264,
	FAR_ZERO = 1,	/* count from here on; the answer is the same again */
	FAR_COUNT,	/* how many were there? The answer has the number */
	FAR_GIVE,	/* send `number` of `size` bytes, each of which begins with 0 and `burst` */
	FAR_BURST = 32	/* most in one go */
};

struct far_dgram {
	uint32_t magic, what, number, size, burst;
};

#endif
