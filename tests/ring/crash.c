/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * crash - a device dies after each of its instructions in turn, and the next one must lose no request and double none.
 *
 *	crash PACKED IN_ORDER
 *
 * A child process serves a ring with an in-flight region, one instruction at a time (ptrace). After each the guest memory and the region
 * are copied: that is what a SIGKILL at this point leaves behind. On the copy a new virtqueue starts, takes what was in flight and
 * what is new, and completes it all. A driver that keeps count must then have each request back exactly once. Now and then the
 * new virtqueue is stepped as well, and dies after each of its instructions: recovering from a crash must survive a crash.
 * Prints how many deaths there were. Exit: 0 all well, 1 a request was lost, doubled or mangled, 77 nobody may be traced here.
 */
#include <endian.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vs_vq.h"

enum {
	GPA = 0x10000, NUM = 8, RAM = 0x8000, REGION = 0x1000,
	DESC = 0, AVAIL = 0x400, USED = 0x800, BUF = 0x1000,
	DESC_MAX = 3,			/* in a chain */
	NEXT = 1, F_AVAIL = 1 << 7, F_USED = 1 << 15,
	NESTED_EVERY = 3999		/* outer deaths per stepped recovery */
};

struct desc { uint64_t addr; uint32_t len; uint16_t a, b; };	/* split: flags, next; packed: id, flags */

/* one set of memory: what the front-end keeps when a back-end dies */
struct world {
	uint8_t *ram, *region;
	struct vs_mem *mem;
	struct vs_region *shared;
};

/* the driver's own memory */
struct driver {
	uint16_t avail, used;		/* split: indices; packed: places */
	bool avail_wrap, used_wrap;
	uint32_t serial;		/* of the next request */
	uint32_t pending[NUM];		/* by head or id: its serial plus 1, or 0 */
	uint8_t count[NUM];		/* its descriptors */
	bool taken[NUM];		/* split: descriptors */
};

static bool packed, in_order;
static long deaths, nested;

static void die(const char *what)
{
	fprintf(stderr, "%s, after %ld deaths\n", what, deaths);
	exit(1);
}

static void make_world(struct world *w)
{
	int ram = memfd_create("ram", 0), region = memfd_create("region", 0);
	struct vs_mem *empty = vs_mem_new();
	struct vs_err err = { 0 };
	struct vs_region *r;

	if (ftruncate(ram, RAM) < 0 || ftruncate(region, REGION) < 0)
		exit(2);
	w->ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, ram, 0);
	w->region = mmap(NULL, REGION, PROT_READ | PROT_WRITE, MAP_SHARED, region, 0);
	r = vs_region_map(ram, GPA, RAM, 0, 0, &err);
	w->shared = vs_region_map(region, 0, REGION, 0, 0, &err);
	w->mem = vs_mem_with(empty, r, &err);
	vs_region_put(r);
	vs_mem_put(empty);
	close(ram);
	close(region);
}

static void copy_world(struct world *to, const struct world *from)
{
	memcpy(to->ram, from->ram, RAM);
	memcpy(to->region, from->region, REGION);
}

static struct vs_vq *make_vq(const struct world *w, uint32_t base)
{
	struct vs_vq *vq = vs_vq_new(0);
	struct vs_err err = { 0 };

	vs_vq_set_features(vq, (packed ? 1ull << 34 : 0) | (in_order ? 1ull << 35 : 0));
	vs_vq_set_mem(vq, w->mem);
	vs_vq_set_num(vq, NUM, &err);
	vs_vq_set_addr(vq, DESC, AVAIL, USED);
	vs_vq_set_base(vq, base);
	vs_vq_set_inflight(vq, w->shared, NUM, &err);
	return vq;
}

/* ---- the driver */

static struct desc *desc_at(const struct world *w, uint32_t i)
{
	return (struct desc *)(w->ram + DESC) + i;
}

static uint16_t *word(const struct world *w, uint32_t at)
{
	return (uint16_t *)(w->ram + at);
}

static uint16_t marks(bool wrap, bool used)
{
	return (wrap ? F_AVAIL : 0) | (wrap == used ? F_USED : 0);
}

static void offer(struct world *w, struct driver *d, int count)
{
	uint16_t name = 0, at[DESC_MAX] = { 0 };
	uint64_t addr;

	if (packed) {
		while (d->pending[name])
			name++;
	} else {
		for (int i = 0, n = 0; n < count; i++)
			if (!d->taken[i]) {
				d->taken[i] = true;
				at[n++] = i;
			}
		name = at[0];
	}
	addr = BUF + 64 * name;
	memcpy(w->ram + addr, &d->serial, sizeof(d->serial));
	for (int i = 0; i < count; i++) {
		bool last = i == count - 1;
		struct desc x = { GPA + addr + 4 * (i > 0), i ? 1 : 4, 0, 0 };

		if (packed) {
			x.a = name;
			x.b = marks(d->avail_wrap, false) | (last ? 0 : NEXT);
			*desc_at(w, d->avail) = x;
			if (++d->avail == NUM) {
				d->avail = 0;
				d->avail_wrap = !d->avail_wrap;
			}
		} else {
			x.a = last ? 0 : NEXT;
			x.b = last ? 0 : at[i + 1];
			*desc_at(w, at[i]) = x;
		}
	}
	if (!packed) {
		*word(w, AVAIL + 4 + 2 * (d->avail % NUM)) = name;
		*word(w, AVAIL + 2) = ++d->avail;
	}
	d->pending[name] = ++d->serial;
	d->count[name] = count;
}

static void take_back(struct world *w, struct driver *d, uint16_t name)
{
	if (name >= NUM || !d->pending[name])
		die("a request was used that is not in flight");
	d->pending[name] = 0;
	if (packed) {
		d->used += d->count[name];
		if (d->used >= NUM) {
			d->used -= NUM;
			d->used_wrap = !d->used_wrap;
		}
		return;
	}
	d->used++;
	for (uint16_t i = name; ; i = desc_at(w, i)->b) {
		d->taken[i] = false;
		if (!(desc_at(w, i)->a & NEXT))
			break;
	}
}

/* the oldest request in flight: with IN_ORDER, a used element stands for all requests up to its own */
static uint16_t oldest(const struct driver *d)
{
	uint16_t found = NUM;

	for (uint16_t i = 0; i < NUM; i++)
		if (d->pending[i] && (found == NUM || d->pending[i] < d->pending[found]))
			found = i;
	return found;
}

static void collect(struct world *w, struct driver *d)
{
	for (;;) {
		uint16_t name, flags;

		if (packed) {
			flags = desc_at(w, d->used)->b;
			if (!!(flags & F_AVAIL) != d->used_wrap || !!(flags & F_USED) != d->used_wrap)
				return;
			name = desc_at(w, d->used)->a;
		} else {
			if (*word(w, USED + 2) == d->used)
				return;
			name = *word(w, USED + 4 + 8 * (d->used % NUM));
		}
		if (in_order) {
			uint16_t first;

			if (name >= NUM || !d->pending[name])
				die("a request was used that is not in flight");
			do {
				first = oldest(d);
				take_back(w, d, first);
			} while (first != name);
		} else {
			take_back(w, d, name);
		}
	}
}

/* ---- the device */

static uint32_t serial_of(const struct vs_chain *c)
{
	uint32_t serial;

	if (vs_chain_read(c, 0, &serial, sizeof(serial)) != sizeof(serial))
		die("a chain is too short");
	return serial;
}

static void push(struct vs_vq *vq, struct vs_chain *c)
{
	if (c->run)
		vs_vq_push(vq, c, 0);
}

/* what is watched: pops, completions in and out of order, one batch of two and of one, a pop that is taken back */
static void serve(struct vs_vq *vq, struct vs_chain **c)
{
	for (int i = 0; i < 3; i++)
		vs_vq_pop(vq, c[i]);
	push(vq, c[2]);
	push(vq, c[0]);
	vs_vq_flush(vq);
	if (vs_vq_pop(vq, c[0]) == 1)
		vs_vq_unpop(vq, c[0]);
	vs_vq_pop(vq, c[0]);
	vs_vq_pop(vq, c[2]);
	push(vq, c[0]);
	vs_vq_flush(vq);
}

/* a new back-end: all of what is in flight, oldest first, then what is new */
static void recover(struct world *w, struct driver *d, struct vs_chain **c, uint32_t base)
{
	struct vs_vq *vq = make_vq(w, base);
	struct vs_err err = { 0 };
	uint32_t before = 0;
	int n = 0;

	if (vs_vq_start(vq, &err) < 0)
		die(err.text);
	for (; n < NUM && vs_vq_pop(vq, c[n]) == 1; n++) {
		uint32_t serial = serial_of(c[n]);

		if (d && (c[n]->head >= NUM || d->pending[c[n]->head] != serial + 1))
			die("a chain came again that the driver has got back, or with another content");
		if (n && serial < before)
			die("chains came again in another order");
		before = serial;
	}
	if (vs_vq_broken(vq))
		die(vs_vq_error(vq)->text);
	while (n--)
		push(vq, c[n]);
	vs_vq_flush(vq);
	vs_vq_free(vq);
}

/* as if the process had died here */
static void check(const struct world *w, const struct driver *driver, struct world *scratch, struct vs_chain **c, uint32_t base)
{
	struct driver d = *driver;

	deaths++;
	copy_world(scratch, w);
	collect(scratch, &d);
	recover(scratch, &d, c, base);
	collect(scratch, &d);
	for (int i = 0; i < NUM; i++)
		if (d.pending[i])
			die("a request was lost");
}

/* run work() in a child, and call each() whenever it has stopped */
static void step(void (*work)(void *), void (*each)(void *), void *arg)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0)
			_exit(77);
		raise(SIGSTOP);
		work(arg);
		kill(getpid(), SIGKILL);
	}
	waitpid(pid, &status, 0);
	if (WIFEXITED(status))
		exit(WEXITSTATUS(status));
	while (WIFSTOPPED(status)) {
		each(arg);
		ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL);
		waitpid(pid, &status, 0);
	}
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
		die("the device failed");
}

struct scene {
	struct world live, before, copy, scratch;
	struct driver driver;
	struct vs_vq *vq;
	struct vs_chain *c[NUM], *mine[NUM];
	uint32_t base;
	long outer;
};

static void inner_work(void *arg)
{
	struct scene *s = arg;

	recover(&s->copy, NULL, s->mine, s->base);
}

static void inner_each(void *arg)
{
	struct scene *s = arg;

	nested++;
	check(&s->copy, &s->driver, &s->scratch, s->mine, s->base);
}

static void outer_work(void *arg)
{
	struct scene *s = arg;

	serve(s->vq, s->c);
}

static void outer_each(void *arg)
{
	struct scene *s = arg;

	check(&s->live, &s->driver, &s->scratch, s->mine, s->base);
	if (++s->outer % NESTED_EVERY)
		return;
	copy_world(&s->copy, &s->live);
	step(inner_work, inner_each, s);
}

int main(int argc, char **argv)
{
	static const int shapes[][5] = { { 1, 3, 1, 2, 1 }, { 2, 1, 2, 1, 2 }, { 1, 1, 1, 1, 3 } };
	struct vs_err err = { 0 };
	struct scene s = { 0 };

	if (argc != 3)
		return 2;
	packed = atoi(argv[1]);
	in_order = atoi(argv[2]);
	make_world(&s.live);
	make_world(&s.before);
	make_world(&s.copy);
	make_world(&s.scratch);
	for (int i = 0; i < NUM; i++) {
		s.c[i] = vs_chain_new();
		s.mine[i] = vs_chain_new();
	}
	s.base = packed ? 0x80008000 : 65530;	/* wraps on the way */
	s.driver.avail_wrap = s.driver.used_wrap = true;
	if (!packed)
		s.driver.avail = s.driver.used = *word(&s.live, USED + 2) = *word(&s.live, AVAIL + 2) = s.base;
	s.vq = make_vq(&s.live, s.base);
	if (vs_vq_start(s.vq, &err) < 0)
		die(err.text);
	/* each round another shape of chains, in places and entries that the rounds before left in another order */
	for (int round = 0; round < 2; round++) {
		for (int i = 0; i < 5; i++)
			offer(&s.live, &s.driver, shapes[round % 3][i]);
		copy_world(&s.before, &s.live);
		step(outer_work, outer_each, &s);
		copy_world(&s.live, &s.before);	/* the child's vq is gone, ours goes on from here */
		serve(s.vq, s.c);
		for (int i = NUM - 1; i >= 0; i--)
			push(s.vq, s.c[i]);
		for (int i = 0; vs_vq_pop(s.vq, s.c[i]) == 1; i++)
			;
		for (int i = NUM - 1; i >= 0; i--)
			push(s.vq, s.c[i]);
		vs_vq_flush(s.vq);
		collect(&s.live, &s.driver);
		if (oldest(&s.driver) != NUM)
			die("a request was lost without any death");
	}
	printf("%ld deaths, %ld of them in the recovery from another\n", deaths, nested);
	return 0;
}
