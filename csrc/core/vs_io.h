/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_io - bytes between files and descriptor chains, on threads of its own.
 *
 * File I/O has no readiness to wait for: a read from a disk blocks. So a pool of threads does it, and a finished job makes an
 * eventfd readable. Bytes go straight between the file and guest memory (preadv, pwritev on the chain's iovecs).
 *
 *              vs_io_submit            a thread takes it              its call returned             vs_io_reap
 *      (caller) ----------> waiting ---------------------> under way -------------------> done ------------------> (caller)
 *
 * From submit to reap a job's chain and fd must stay: the kernel may read or write through them at any moment. Nothing can take back
 * a job that a thread has; who wants the chain waits for it. One that waits can be cancelled, and is done at once (ECANCELED). Jobs
 * are taken in order and end in any order.
 *
 * Threads.  All functions but vs_io_free may be called from any thread.
 */
#ifndef VS_IO_H
#define VS_IO_H

#include "vs_vq.h"

/* cdef begin */

enum vs_io_op {
	VS_IO_READ,		/* file to the writable part of the chain, which is zeroed when the read fails */
	VS_IO_WRITE,		/* readable part of the chain to the file */
	VS_IO_SYNC,		/* fdatasync: what was written is on stable storage (all writes that ended before, of any job) */
	VS_IO_DISCARD,		/* the range is not needed; a file that cannot do that keeps it */
	VS_IO_ZERO,		/* the range reads as zeros and stays allocated */
	VS_IO_ZERO_UNMAP,	/* the range reads as zeros and may lose its space */
	VS_IO_CLEAR,		/* zeros into the writable part of the chain; no file */
	VS_IO_OPS,
	VS_IO_DURABLE = 0x100	/* with an op that changes the file: done means on stable storage */
};

enum { VS_IO_THREADS_MAX = 64 };

struct vs_io;

struct vs_io_done {
	uint64_t tag;
	int error;		/* errno value, 0: it worked, whole */
};

struct vs_io *vs_io_new(int threads);		/* 1 to VS_IO_THREADS_MAX; NULL with errno set */
void vs_io_free(struct vs_io *io);		/* finishes what was submitted, ends the threads; what was not reaped is dropped */
int vs_io_fd(const struct vs_io *io);		/* readable while there is something to reap; the pool's own */
/*
 * len bytes of the file fd from offset on; and, for what needs a chain, of its part from byte skip on. A short transfer is an
 * error (EIO). 0, -ENOMEM, or -EINVAL for what cannot be: an unknown op, no chain where one is needed, a range past the chain's end
 * or past 2^63. The caller bounds how many jobs there are.
 */
int vs_io_submit(struct vs_io *io, int op, int fd, struct vs_chain *c, uint64_t skip, uint64_t len, uint64_t offset, uint32_t group,
		 uint64_t tag);
int vs_io_cancel(struct vs_io *io, uint32_t group);		/* the jobs of a group that still wait; how many */
int vs_io_reap(struct vs_io *io, struct vs_io_done *done, int max);	/* how many; never blocks */

/* cdef end */

#endif
