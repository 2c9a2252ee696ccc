/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_vq - what virtqueues of every format share. States and rules are in vs_vq.h; the formats are tables of functions.
 *
 *            start             driver breaks a rule, or rings leave the map
 *      idle --------> running ----------------------------------------------> broken
 *        ^               | stop                                                  | stop
 *        +---------------+-------------------------------------------------------+
 *
 * A broken ring is not touched any more: what was popped before can be pushed, which gives its memory back and tells the driver
 * nothing. Each start has a number that is unique in the process. A chain carries the number of its run, so a completion that
 * comes after the stop, or after the next start, is recognised and only dropped.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>

#include "vs_vq_priv.h"

static _Atomic uint64_t runs;

struct vs_vq *vs_vq_new(uint16_t index)
{
	struct vs_vq *vq = calloc(1, sizeof(*vq));

	if (!vq)
		return NULL;
	vq->ops = &vs_split_ops;
	vq->index = index;
	vs_notify_init(&vq->call);
	vs_notify_init(&vq->error);
	return vq;
}

void vs_vq_free(struct vs_vq *vq)
{
	if (!vq)
		return;
	vs_inflight_close(vq);
	free(vq->order);
	vs_region_put(vq->inflight);
	vs_log_put(vq->log);
	vs_notify_set(&vq->call, -1);
	vs_notify_set(&vq->error, -1);
	vs_mem_put(vq->mem);
	free(vq);
}

int vs_vq_set_num(struct vs_vq *vq, uint32_t num, struct vs_err *err)
{
	if (vq->running)
		return vs_err_set(err, EBUSY, "the queue size cannot change while the ring runs");
	/* virtio 1.3, 2.8.10.1: a packed ring has any size to 32768 */
	if (vs_vq_feature(vq, VIRTIO_F_RING_PACKED)) {
		if (!num || num > VS_VQ_SIZE_MAX)
			return vs_err_set(err, EINVAL, "queue size %" PRIu32 " is not from 1 to %d", num, VS_VQ_SIZE_MAX);
	/* virtio 1.3, 2.7: a power of 2, at most 32768 */
	} else if (!num || num > VS_VQ_SIZE_MAX || (num & (num - 1)))
		return vs_err_set(err, EINVAL, "queue size %" PRIu32 " is not a power of 2 from 1 to %d", num, VS_VQ_SIZE_MAX);
	vq->num = num;
	return 0;
}

void vs_vq_set_addr(struct vs_vq *vq, uint64_t desc_uva, uint64_t avail_uva, uint64_t used_uva)
{
	vq->desc_uva = desc_uva;
	vq->avail_uva = avail_uva;
	vq->used_uva = used_uva;
}

void vs_vq_set_base(struct vs_vq *vq, uint32_t base)
{
	vq->base = base;
}

void vs_vq_set_features(struct vs_vq *vq, uint64_t features)
{
	vq->features = features;
}

static void call(struct vs_vq *vq)
{
	vq->call_due = !vs_notify_signal(&vq->call);
}

int vs_vq_set_call(struct vs_vq *vq, int fd)
{
	int rc = vs_notify_set(&vq->call, fd);

	if (rc == 0 && fd >= 0 && vq->call_due)
		call(vq);
	return rc;
}

int vs_vq_set_err(struct vs_vq *vq, int fd)
{
	int rc = vs_notify_set(&vq->error, fd);

	if (rc == 0 && vq->broken)
		vs_notify_signal(&vq->error);
	return rc;
}

int vs_vq_fail(struct vs_vq *vq, int code, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vs_err_vset(&vq->err, code, fmt, ap);
	va_end(ap);
	atomic_store_explicit(&vq->broken, true, memory_order_release);
	vq->live = false;
	vs_notify_signal(&vq->error);
	return -1;
}

void vs_vq_break(struct vs_vq *vq, int code, const char *text)
{
	if (vq->live)
		vs_vq_fail(vq, code, "%s", text);
}

int vs_vq_set_mem(struct vs_vq *vq, struct vs_mem *mem)
{
	struct vs_mem *old = vq->mem;
	struct vs_err err;
	int rc = 0;

	vq->mem = mem ? vs_mem_get(mem) : NULL;
	if (vq->live && vq->ops->map(vq, &err) < 0)
		rc = vs_vq_fail(vq, err.code, "after a change of the memory table: %.150s", err.text);
	vs_mem_put(old);
	return rc;
}

int vs_vq_set_inflight(struct vs_vq *vq, struct vs_region *r, uint32_t entries, struct vs_err *err)
{
	struct vs_region *old = vq->inflight;

	if (vq->running)
		return vs_err_set(err, EBUSY, "the in-flight region cannot change while the ring runs");
	vq->inflight = r ? vs_region_get(r) : NULL;
	vq->inflight_entries = entries;
	vs_region_put(old);
	return 0;
}

void vs_vq_set_log(struct vs_vq *vq, struct vs_log *log, bool data, bool ring, uint64_t log_addr)
{
	struct vs_log *old = vq->log;

	vq->log = log ? vs_log_get(log) : NULL;
	vq->log_data = log && data;
	vq->log_ring = log && ring;
	vq->log_addr = log_addr;
	vs_log_put(old);
}

bool vs_vq_fits(struct vs_vq *vq, struct vs_mem *mem)
{
	struct vs_vq probe = { .mem = mem, .num = vq->num, .desc_uva = vq->desc_uva, .avail_uva = vq->avail_uva,
			       .used_uva = vq->used_uva };

	return vq->ops->map(&probe, NULL) == 0;
}

bool vs_vq_missing(const struct vs_vq *vq, uint64_t *iova, int *perm)
{
	*iova = vq->miss;
	*perm = vq->miss_perm;
	return vq->miss_perm;
}

int vs_vq_start(struct vs_vq *vq, struct vs_err *err)
{
	int rc;

	vq->miss_perm = 0;
	if (vq->running)
		return vs_err_set(err, EBUSY, "the ring runs already");
	if (!vq->num)
		return vs_err_set(err, EINVAL, "the queue size was never set");
	vq->ops = vs_vq_feature(vq, VIRTIO_F_RING_PACKED) ? &vs_packed_ops : &vs_split_ops;
	rc = vq->ops->check(vq, err);
	if (rc == 0)
		rc = vq->ops->map(vq, err);
	if (rc == 0)
		rc = vs_order_start(vq, err);
	if (rc == 0)
		rc = vs_inflight_open(vq, err);
	if (rc < 0)
		return rc;
	vq->chain_max = vq->num < VS_CHAIN_MAX ? vq->num : VS_CHAIN_MAX;
	vq->in_flight = 0;
	vq->popped = 0;
	vq->holes = vq->logged = false;
	vq->err = (struct vs_err){ 0 };
	vq->run = atomic_fetch_add(&runs, 1) + 1;
	vq->running = vq->live = true;
	/* the process that served this ring before may have died between showing a batch and calling; one too many is harmless */
	if (vq->ops->start(vq))
		call(vq);
	return 0;
}

uint32_t vs_vq_stop(struct vs_vq *vq)
{
	/* what was completed and not yet shown would be lost: neither used nor to be found again at the base */
	vs_vq_flush(vq);
	if (vq->running)
		vq->base = vq->ops->base(vq);
	vq->running = vq->live = false;
	atomic_store_explicit(&vq->broken, false, memory_order_relaxed);
	vq->run = 0;
	vs_inflight_close(vq);
	return vq->base;
}

bool vs_vq_running(const struct vs_vq *vq)
{
	return vq->running;
}

bool vs_vq_broken(const struct vs_vq *vq)
{
	return atomic_load_explicit(&vq->broken, memory_order_acquire);
}

const struct vs_err *vs_vq_error(const struct vs_vq *vq)
{
	return &vq->err;
}

uint32_t vs_vq_num(const struct vs_vq *vq)
{
	return vq->num;
}

bool vs_vq_poisoned(const struct vs_vq *vq)
{
	if (vs_likely(!atomic_load_explicit(&vs_guards_poisoned, memory_order_relaxed)))
		return false;
	return vs_mem_poisoned(vq->mem) || (vq->inflight && vs_region_poisoned(vq->inflight)) ||
	       (vq->log && vs_log_poisoned(vq->log));
}

static inline bool is_again(const struct vs_vq *vq)
{
	return vs_unlikely(vq->track.again_at < vq->track.n_again);
}

int vs_vq_pop(struct vs_vq *vq, struct vs_chain *c)
{
	bool again;
	int rc;

	if (vs_unlikely(!vq->live))
		return vq->broken ? -1 : 0;
	if (vs_unlikely(c->mem != NULL))
		vs_chain_drop(c);	/* the caller lost track of it; its ring slots stay taken, its memory need not */
	c->n_out = c->n_in = 0;
	c->out_len = c->in_len = c->touched = 0;
	vq->miss_perm = 0;
	again = is_again(vq);
	rc = again ? vq->ops->pop_again(vq, c) : vq->ops->pop(vq, c);
	if (vs_unlikely(rc <= 0)) {
		if (rc < 0)
			vs_chain_drop(c);
		return rc < 0 && vq->miss_perm ? 0 : rc;	/* a miss: nothing has moved */
	}
	if (again)
		vq->track.again_at++;
	else if (vs_unlikely(vs_inflight_on(vq)))
		vq->ops->inflight->popped(vq, c);
	c->again = again;
	c->pos = vq->popped++;
	c->run = vq->run;
	c->mem = vs_mem_get(vq->mem);
	vq->in_flight++;
	return 1;
}

int vs_vq_pop_many(struct vs_vq *vq, struct vs_chain **c, int max)
{
	int n, rc = 1;

	for (n = 0; n < max; n++) {
		rc = vs_vq_pop(vq, c[n]);
		if (rc <= 0)
			break;
	}
	return n ? n : rc < 0 ? -1 : 0;
}

static void unpop(struct vs_vq *vq, const struct vs_chain *c)
{
	if (c->pos != (uint16_t)(vq->popped - 1)) {
		vs_vq_fail(vq, EINVAL, "device error: the chain with head %u was given back out of order", c->head);
		return;
	}
	vq->popped--;
	vq->in_flight--;
	vq->ops->unpop(vq, c);
	if (c->again)
		vq->track.again_at--;
	else if (vs_inflight_on(vq))
		vq->ops->inflight->unpopped(vq, c);
}

void vs_vq_unpop(struct vs_vq *vq, struct vs_chain *c)
{
	if (vq->live && c->run == vq->run)
		unpop(vq, c);
	vs_chain_drop(c);
}

void vs_vq_use(struct vs_vq *vq, uint16_t pos, const struct vs_done *d)
{
	vq->ops->push(vq, d);
	if (vs_unlikely(vs_inflight_on(vq)))
		vq->track.batch[vq->track.n_batch++] = d->entry;
	if (pos != (uint16_t)(vq->popped - vq->in_flight))
		vq->holes = true;
	if (--vq->in_flight == 0)
		vq->holes = false;
}

void vs_vq_push(struct vs_vq *vq, struct vs_chain *c, uint32_t written)
{
	/* never tell the driver of more bytes than there is room for: it would hand on what it finds there */
	if (vs_unlikely(written > c->in_len))
		written = c->in_len;
	if (vs_unlikely(vq->log_data) && vq->live && c->run == vq->run)
		vs_log_chain(vq, c, written > c->touched ? written : c->touched);
	if (vs_likely(vq->live && c->run == vq->run)) {
		const struct vs_done d = {
			.written = written, .descs = c->descs, .head = c->head, .entry = c->entry,
			.writable = c->in_len, .whole = written == c->in_len,
		};

		if (vs_unlikely(vq->order != NULL))
			vs_order_push(vq, c->pos, &d);
		else
			vs_vq_use(vq, c->pos, &d);
	}
	vs_chain_drop(c);
}

int vs_vq_flush(struct vs_vq *vq)
{
	bool wanted;

	if (vs_unlikely(!vq->live))
		return vq->broken ? -1 : 0;
	wanted = vq->ops->publish(vq);
	if (vs_unlikely(vq->logged))
		vs_log_signal(vq);
	if (!wanted)
		return 0;
	call(vq);
	return !vq->call_due;
}

void vs_vq_disable_kick(struct vs_vq *vq)
{
	if (vq->live)
		vq->ops->disable_kick(vq);
}

bool vs_vq_enable_kick(struct vs_vq *vq)
{
	return vq->live && (vq->ops->enable_kick(vq) || is_again(vq));
}

bool vs_vq_has_avail(struct vs_vq *vq)
{
	return vq->live && (is_again(vq) || vq->ops->has_avail(vq));
}
