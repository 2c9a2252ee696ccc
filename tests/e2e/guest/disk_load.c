/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * disk_load - threads that write and read a disk with O_DIRECT until they are told to stop, and miss no wrong byte.
 *
 *	disk_load DISK THREADS STOP-FILE
 *
 * Each thread has a part of the disk to itself, in blocks of 4 KiB. What is in a block follows from the thread, the block, and how often
 * it was written. Each writes its part once; after that a step is one of
 *
 *	write	1 to 16 blocks, with new contents
 *	read	1 to 16 blocks into a buffer of a pool, and compare
 *	look	compare a buffer of the pool again with what was read into it, perhaps long ago
 *
 * One thread more does nothing but flush: a request that takes long, which the others overtake.
 *
 * The program does not write to a buffer of the pool: only the device does. A live migration that misses pages which a device wrote shows
 * at the next look, although every read was right when it was made. When STOP-FILE is there each thread looks at its whole pool, reads its
 * whole part of the disk, and the program prints "good" and how much it did; any error or wrong byte ends it at once with status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
	BLOCK = 4096, WORDS = BLOCK / 8,
	RUN = 16,			/* blocks a request, at most */
	BLOCKS = 512,			/* of a thread's part: 2 MiB */
	POOL = 64,			/* buffers of RUN blocks: 4 MiB a thread */
	THREADS_MAX = 16,
	STEPS = 64			/* of a thread between two looks for the stop file */
};

struct slot {
	int first, count;		/* blocks; count 0: nothing was read yet */
	uint32_t generation[RUN];
	uint64_t *data;
};

struct worker {
	pthread_t thread;
	int number;
	uint64_t random;
	uint32_t generation[BLOCKS];	/* how often each block was written */
	struct slot pool[POOL];
	uint64_t *out;
	unsigned long writes, reads, looks;
};

static int fd;
static const char *stop_file;
static struct worker workers[THREADS_MAX];

static void fail(const char *what, const struct worker *w, int block)
{
	printf("thread %d, block %d: %s (errno %d, %s)\n", w->number, block, what, errno, strerror(errno));
	fflush(stdout);
	_exit(1);
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

static unsigned int next(struct worker *w, unsigned int below)
{
	w->random = mix(w->random + 0x9e3779b97f4a7c15ULL);
	return (w->random >> 20) % below;
}

static void fill(uint64_t *data, const struct worker *w, int block, uint32_t generation)
{
	uint64_t seed = mix(((uint64_t)w->number << 56) + ((uint64_t)block << 32) + generation);

	for (int i = 0; i < WORDS; i++)
		data[i] = seed + (uint64_t)i * 0x9e3779b97f4a7c15ULL;
}

static void compare(const uint64_t *data, const struct worker *w, int block, uint32_t generation, const char *what)
{
	uint64_t want[WORDS];

	fill(want, w, block, generation);
	if (memcmp(data, want, BLOCK)) {
		errno = 0;
		fail(what, w, block);
	}
}

static off_t place(const struct worker *w, int block)
{
	return ((off_t)w->number * BLOCKS + block) * BLOCK;
}

static void put(struct worker *w, int first, int count)
{
	for (int i = 0; i < count; i++)
		fill(w->out + i * WORDS, w, first + i, w->generation[first + i] + 1);
	if (pwrite(fd, w->out, (size_t)count * BLOCK, place(w, first)) != (ssize_t)count * BLOCK)
		fail("write", w, first);
	for (int i = 0; i < count; i++)
		w->generation[first + i]++;
	w->writes++;
}

static void look(struct worker *w, const struct slot *s, const char *what)
{
	for (int i = 0; i < s->count; i++)
		compare(s->data + i * WORDS, w, s->first + i, s->generation[i], what);
	w->looks++;
}

static void get(struct worker *w, struct slot *s, int first, int count)
{
	if (pread(fd, s->data, (size_t)count * BLOCK, place(w, first)) != (ssize_t)count * BLOCK)
		fail("read", w, first);
	s->first = first;
	s->count = count;
	memcpy(s->generation, w->generation + first, (size_t)count * sizeof(s->generation[0]));
	look(w, s, "a read gave wrong bytes");
	w->reads++;
}

static void *work(void *arg)
{
	struct worker *w = arg;

	for (int block = 0; block < BLOCKS; block += RUN)
		put(w, block, RUN);
	for (unsigned long step = 0; step % STEPS || access(stop_file, F_OK); step++) {
		int count = 1 + (int)next(w, RUN), first = (int)next(w, BLOCKS - RUN);
		struct slot *s = &w->pool[next(w, POOL)];

		switch (next(w, 4)) {
		case 0:
			put(w, first, count);
			break;
		case 1:
			look(w, s, "a buffer that was read into has changed");
			break;
		default:
			look(w, s, "a buffer that was read into has changed");
			get(w, s, first, count);
		}
	}
	for (int i = 0; i < POOL; i++)
		look(w, &w->pool[i], "a buffer that was read into has changed");
	for (int block = 0; block < BLOCKS; block += RUN)
		get(w, &w->pool[0], block, RUN);
	return NULL;
}

static void *flush(void *arg)
{
	while (access(stop_file, F_OK))
		if (fdatasync(fd) < 0)
			fail("flush", arg, 0);
	return NULL;
}

static void *pages(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	return p;
}

int main(int argc, char **argv)
{
	unsigned long writes = 0, reads = 0, looks = 0;
	pthread_t flusher;
	int threads = argc == 4 ? atoi(argv[2]) : 0;

	if (threads < 1 || threads > THREADS_MAX) {
		fprintf(stderr, "usage: disk_load DISK THREADS STOP-FILE\n");
		return 2;
	}
	fd = open(argv[1], O_RDWR | O_DIRECT);
	if (fd < 0) {
		perror(argv[1]);
		return 1;
	}
	stop_file = argv[3];
	for (int i = 0; i < threads; i++) {
		struct worker *w = &workers[i];

		w->number = i;
		w->random = (uint64_t)i + 1;
		w->out = pages((size_t)RUN * BLOCK);
		for (int j = 0; j < POOL; j++)
			w->pool[j].data = pages((size_t)RUN * BLOCK);
	}
	for (int i = 0; i < threads; i++)
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			return 1;
	if (pthread_create(&flusher, NULL, flush, &workers[0]))
		return 1;
	pthread_join(flusher, NULL);
	for (int i = 0; i < threads; i++)
		pthread_join(workers[i].thread, NULL);
	for (int i = 0; i < threads; i++) {
		writes += workers[i].writes;
		reads += workers[i].reads;
		looks += workers[i].looks;
	}
	printf("good: %lu writes, %lu reads, %lu looks\n", writes, reads, looks);
	return 0;
}
