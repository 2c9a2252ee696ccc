/* SPDX-License-Identifier: BSD-3-Clause */
/* program.h - what every program here needs: the time, and an end with a word on why. */
#ifndef BENCH_PROGRAM_H
#define BENCH_PROGRAM_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* nanoseconds of a clock that only goes forward */
static inline int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static inline void die(const char *what)
{
	perror(what);
	exit(1);
}

#endif
