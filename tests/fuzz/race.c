/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * race - a virtqueue whose driver changes everything while the device reads it: the double fetch.
 *
 * A thread writes without pause what the input lists: each entry is a place in the rings, tables or buffers and two values that
 * take turns there, as a rule one that is right and one that is not. Meanwhile the device pops, reads, writes, completes and, when
 * the ring breaks, starts anew. A value that is read a second time after it was checked shows as a chain that is not in memory
 * (guest.h), as a fault under ASan, or in the canary.
 */
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>

#include "guest.h"

enum { DESC = 0, AVAIL = 0x800, USED = 0xc00, TABLE = 0x1000, NUM = 8, PLACES = 16, ROUNDS = 100 };

struct wire_desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

/* what the thread writes: value[0] and value[1] in turn */
struct place {
	uint32_t at, bytes;
	uint64_t value[2];
};

static struct place places[PLACES];
static unsigned n_places;
static atomic_bool writing;		/* the thread writes until this is false */
static sem_t go, rested;

static void write_place(const struct place *p, uint64_t v)
{
	uint8_t *to = ram + p->at;

	switch (p->bytes) {
	case 2:
		__atomic_store_n((uint16_t *)to, (uint16_t)v, __ATOMIC_RELAXED);
		break;
	case 4:
		__atomic_store_n((uint32_t *)to, (uint32_t)v, __ATOMIC_RELAXED);
		break;
	default:
		__atomic_store_n((uint64_t *)to, v, __ATOMIC_RELAXED);
	}
}

static void *driver(void *unused)
{
	for (;;) {
		sem_wait(&go);
		for (unsigned turn = 0; atomic_load_explicit(&writing, memory_order_relaxed); turn++)
			for (unsigned i = 0; i < n_places; i++)
				write_place(&places[i], places[i].value[(turn + i) & 1]);
		sem_post(&rested);
	}
	return unused;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	pthread_t thread;

	guest_init();
	sem_init(&go, 0, 0);
	sem_init(&rested, 0, 0);
	MUST(!pthread_create(&thread, NULL, driver, NULL), "no thread");
	pthread_detach(thread);
	return 0;
}

/* some field of a descriptor, the value that is there and one from the input; or any two values anywhere */
static void choose(struct cursor *c, struct place *p)
{
	static const struct { uint32_t at, bytes; } field[] = { { 0, 8 }, { 8, 4 }, { 12, 2 }, { 14, 2 } };
	uint32_t kind = below(c, 4), f = below(c, 4), slot = below(c, kind == 1 ? 64 : NUM);

	if (kind < 2) {
		p->at = (kind ? TABLE : DESC) + 16 * slot + field[f].at;
		p->bytes = field[f].bytes;
	} else {
		p->at = kind == 2 ? AVAIL + 2 * below(c, NUM + 3) : 8 * below(c, CANARY_AT / 8);
		p->bytes = kind == 2 ? 2 : 8;
	}
	p->value[0] = 0;
	memcpy(&p->value[0], ram + p->at, p->bytes);
	if (p->bytes == 8)
		p->value[1] = guest_address(c);
	else
		p->value[1] = p->bytes == 4 && below(c, 2) ? 16 * take(c, 1) : odd_number(c);
	if (below(c, 4) == 0)
		p->value[0] = take(c, 8);
}

/* a ring full of chains that are right: two descriptors each, or one that refers to a table of eight */
static void fill_ring(struct cursor *c, bool packed)
{
	unsigned tables = (unsigned)take(c, 1);
	struct wire_desc d;

	for (int i = 0; i < NUM; i++) {
		if (tables & 1u << i)
			d = (struct wire_desc){ layout[0].gpa + TABLE + 128 * i, 128, 4, 0 };
		else
			d = (struct wire_desc){ layout[1].gpa + 256 * i, 128, i & 1 ? 2 : 1, (uint16_t)((i + 1) % NUM) };
		if (packed)
			d = (struct wire_desc){ d.addr, d.len, (uint16_t)(i & ~1), (uint16_t)(d.flags | 1 << 7) };
		memcpy(ram + DESC + 16 * i, &d, sizeof(d));
		for (int k = 0; k < 8; k++) {
			d = (struct wire_desc){ layout[2].gpa + 64 * k, 64, (uint16_t)((k > 3 ? 2 : 0) | (k < 7)), (uint16_t)(k + 1) };
			if (packed)
				d = (struct wire_desc){ d.addr, d.len, d.next, d.flags };
			memcpy(ram + TABLE + 128 * i + 16 * k, &d, sizeof(d));
		}
		if (!packed)
			((uint16_t *)(ram + AVAIL))[2 + i] = (uint16_t)(tables & 1u << i ? i : i & ~1);
	}
	if (!packed)
		((uint16_t *)(ram + AVAIL))[1] = NUM;
}

static void serve(struct vs_vq *vq, struct vs_chain **held)
{
	uint8_t data[256];
	struct vs_err err;
	int n;

	for (int round = 0; round < ROUNDS; round++) {
		n = vs_vq_pop_many(vq, held, 4);
		for (int i = 0; i < n; i++) {
			check_chain(vq, held[i]);
			vs_chain_read(held[i], 0, data, sizeof(data));
			vs_chain_write(held[i], 0, data, sizeof(data));
			vs_vq_push(vq, held[i], (uint32_t)held[i]->in_len);
		}
		vs_vq_flush(vq);
		vs_vq_enable_kick(vq);
		if (!vs_vq_broken(vq) && n > 0)
			continue;
		if (vs_vq_broken(vq))
			MUST(vs_vq_error(vq)->code && *vs_vq_error(vq)->text, "no evidence");
		vs_vq_stop(vq);
		/* where the driver is now, so that there is something to take */
		if (!vs_vq_feature(vq, VIRTIO_F_RING_PACKED))
			vs_vq_set_base(vq, (uint16_t)(((volatile uint16_t *)(ram + AVAIL))[1] - NUM));
		else
			vs_vq_set_base(vq, 0x80008000);
		MUST(vs_vq_start(vq, &err) == 0, "%s", err.text);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct cursor c = { data, data + size };
	struct vs_chain *held[4];
	struct vs_err err = { 0 };
	bool packed = take(&c, 1) & 1;
	struct vs_vq *vq = vs_vq_new(0);
	struct vs_mem *m = guest_map(0xf);

	memset(ram, 0, CANARY_AT);
	memset(ram + CANARY_AT, CANARY, RAM - CANARY_AT);
	vs_vq_set_features(vq, (uint64_t)packed << VIRTIO_F_RING_PACKED | (take(&c, 1) & 3) << 28);
	vs_vq_set_mem(vq, m);
	vs_mem_put(m);
	MUST(vs_vq_set_num(vq, NUM, &err) == 0, "%s", err.text);
	vs_vq_set_addr(vq, uva_of(0) + DESC, uva_of(0) + AVAIL, uva_of(0) + USED);
	vs_vq_set_base(vq, packed ? 0x80008000 : 0);
	fill_ring(&c, packed);
	n_places = 0;
	while (more(&c) && n_places < PLACES)
		choose(&c, &places[n_places++]);
	for (int i = 0; i < 4; i++)
		held[i] = vs_chain_new();
	MUST(vs_vq_start(vq, &err) == 0, "%s", err.text);
	atomic_store(&writing, true);
	sem_post(&go);
	serve(vq, held);
	atomic_store(&writing, false);
	sem_wait(&rested);
	vs_vq_stop(vq);
	for (int i = 0; i < 4; i++)
		vs_chain_free(held[i]);
	vs_vq_free(vq);
	check_canary();
	MUST(!vs_region_count_live(), "%d regions are still mapped", vs_region_count_live());
	return 0;
}
