/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_chain - a popped descriptor chain: storage that is reused from pop to pop, and copies in and out of guest memory.
 *
 * A chain is empty (run 0, mem NULL) or holds the memory snapshot that its iovecs point into. The iovecs stay valid until the
 * chain is given back, whatever happens to the memory table or the vq meanwhile.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vs_iotlb.h"
#include "vs_vq_priv.h"

enum {
	IOV_FIRST = 16,			/* most chains have fewer buffers */
	IOV_MAX_CHAIN = 2 * VS_CHAIN_MAX	/* a buffer may cross into an adjacent region; twice the descriptors is plenty */
};

struct vs_chain *vs_chain_new(void)
{
	struct vs_chain *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->iov = calloc(IOV_FIRST, sizeof(*c->iov));
	if (!c->iov) {
		free(c);
		return NULL;
	}
	c->cap = IOV_FIRST;
	return c;
}

void vs_chain_drop(struct vs_chain *c)
{
	vs_mem_put(c->mem);
	c->mem = NULL;
	c->run = 0;
	c->n_out = c->n_in = 0;
	c->out_len = c->in_len = c->touched = 0;
	c->descs = 0;
}

void vs_chain_free(struct vs_chain *c)
{
	if (!c)
		return;
	vs_chain_drop(c);
	free(c->iov);
	free(c);
}

static int chain_grow(struct vs_chain *c)
{
	uint32_t cap = c->cap * 4 < IOV_MAX_CHAIN ? c->cap * 4 : IOV_MAX_CHAIN;
	struct iovec *iov;

	if (c->cap >= IOV_MAX_CHAIN)
		return -E2BIG;
	iov = realloc(c->iov, cap * sizeof(*iov));
	if (!iov)
		return -ENOMEM;
	c->iov = iov;
	c->cap = cap;
	return 0;
}

int vs_chain_add(struct vs_chain *c, const struct vs_mem *mem, uint64_t gpa, uint32_t len, bool writable)
{
	uint32_t used = (uint32_t)c->n_out + c->n_in;
	const struct vs_range *r;
	int n, rc;

	if (vs_unlikely(vs_mem_is_view(mem))) {
		uint64_t at;

		if (vs_mem_missing(mem, gpa, len, writable ? VS_PERM_WRITE : VS_PERM_READ, &at))
			return -EFAULT;
	}
	/* a buffer in one region is one piece: the usual case, here without a call */
	r = vs_range_find(mem->by_gpa, mem->n, gpa);
	if (vs_likely(r && len && len <= r->size - (gpa - r->start) && used < c->cap)) {
		c->iov[used] = (struct iovec){ r->host + (gpa - r->start), len };
		n = 1;
	} else {
		while ((n = vs_mem_iov(mem, gpa, len, c->iov + used, c->cap - used)) < 0) {
			if (n != -E2BIG)
				return n;
			rc = chain_grow(c);
			if (rc < 0)
				return rc;
		}
	}
	if (writable) {
		c->n_in += n;
		c->in_len += len;
	} else {
		c->n_out += n;
		c->out_len += len;
	}
	return 0;
}

/* copy between buf and the bytes [offset, offset + len) of iov; to_guest gives the direction */
static size_t iov_copy(const struct iovec *iov, int n, size_t offset, uint8_t *buf, size_t len, bool to_guest)
{
	size_t done = 0;

	for (; n && done < len; iov++, n--) {
		size_t part = iov->iov_len;
		uint8_t *guest = iov->iov_base;

		if (offset >= part) {
			offset -= part;
			continue;
		}
		guest += offset;
		part -= offset;
		offset = 0;
		if (part > len - done)
			part = len - done;
		if (to_guest)
			memcpy(guest, buf + done, part);
		else
			memcpy(buf + done, guest, part);
		done += part;
	}
	return done;
}

size_t vs_chain_read(const struct vs_chain *c, size_t offset, void *dst, size_t len)
{
	return iov_copy(c->iov, c->n_out, offset, dst, len, false);
}

size_t vs_chain_write(struct vs_chain *c, size_t offset, const void *src, size_t len)
{
	size_t done = iov_copy(c->iov + c->n_out, c->n_in, offset, (uint8_t *)src, len, true);

	if (done && offset + done > c->touched)
		c->touched = offset + done;
	return done;
}
