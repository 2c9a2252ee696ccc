/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_log - the dirty log of a migration (the vhost-user document, "Migration"): a bit for each page of 4 KiB that we wrote to.
 *
 *   page = gpa / 4096;  log[page / 8] |= 1 << page % 8
 *
 * The front-end takes bits out with an atomic exchange while we put them in, hence the atomic OR. It is done even where the bit
 * is set already: the read-modify-write is the barrier between our store in the page and the front-end's taking the bit. Who takes
 * it later sees the store; who took it before finds the bit again. A bit is set after its page was written, never before.
 *
 * What is logged. Of a chain the bytes that were written, as its completion says, or as far as vs_chain_write() got if that is
 * further. Of a ring every store of ours, while VRING_F_LOG is set for it: the front-end gives the used ring's place in the log
 * (log_guest_addr; for a packed ring that is the device event area), and the descriptors of a packed ring are where the memory
 * map says. A store outside of the log would be lost to the destination without a trace, so it breaks the ring, and the session.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "vs_vq_priv.h"

enum { PAGE_SHIFT = 12 };

struct vs_log {
	atomic_uint refs;
	struct vs_region *region;
	struct vs_notify notify;
};

struct vs_log *vs_log_new(int fd, uint64_t size, uint64_t offset, struct vs_err *err)
{
	struct vs_log *log = calloc(1, sizeof(*log));

	if (!log) {
		vs_err_set(err, ENOMEM, "no memory for a dirty log");
		return NULL;
	}
	log->region = vs_region_map(fd, 0, size, 0, offset, err);
	if (!log->region) {
		free(log);
		return NULL;
	}
	atomic_init(&log->refs, 1);
	vs_notify_init(&log->notify);
	return log;
}

struct vs_log *vs_log_get(struct vs_log *log)
{
	atomic_fetch_add_explicit(&log->refs, 1, memory_order_relaxed);
	return log;
}

void vs_log_put(struct vs_log *log)
{
	if (!log || atomic_fetch_sub_explicit(&log->refs, 1, memory_order_acq_rel) != 1)
		return;
	vs_notify_set(&log->notify, -1);
	vs_region_put(log->region);
	free(log);
}

int vs_log_set_notify(struct vs_log *log, int fd)
{
	return vs_notify_set(&log->notify, fd);
}

bool vs_log_poisoned(const struct vs_log *log)
{
	return vs_region_poisoned(log->region);
}

void vs_log_write(struct vs_vq *vq, uint64_t gpa, uint64_t len)
{
	const struct vs_region *r = vq->log->region;
	uint64_t page = gpa >> PAGE_SHIFT, last = (gpa + len - 1) >> PAGE_SHIFT;

	if (!len)
		return;
	if (vs_unlikely(gpa + len - 1 < gpa || last / 8 >= r->size)) {
		if (vq->live)
			vs_vq_fail(vq, EFAULT, "a write at gpa 0x%" PRIx64 ", size 0x%" PRIx64 ", is past the end of the dirty log, which "
				   "has 0x%" PRIx64 " bytes", gpa, len, r->size);
		return;
	}
	while (page <= last) {
		uint64_t byte = page / 8, end = last / 8 == byte ? last % 8 : 7;
		uint8_t bits = (0xff << page % 8) & (0xff >> (7 - end));

		__atomic_fetch_or(&r->host[byte], bits, __ATOMIC_SEQ_CST);
		page = (byte + 1) * 8;
	}
	vq->logged = true;
}

void vs_log_chain(struct vs_vq *vq, const struct vs_chain *c, uint64_t written)
{
	const struct iovec *iov = c->iov + c->n_out;

	for (; written && vq->live; iov++) {
		uint64_t part = iov->iov_len < written ? iov->iov_len : written;

		/* the chain's own snapshot: the table may have changed since it was popped, its addresses have not */
		vs_log_write(vq, vs_mem_gpa_of(c->mem, iov->iov_base), part);
		written -= part;
	}
}

void vs_log_signal(struct vs_vq *vq)
{
	vq->logged = false;
	if (vq->log)
		vs_notify_signal(&vq->log->notify);
}
