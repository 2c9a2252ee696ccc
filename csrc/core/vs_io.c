/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_io - a pool of threads for file I/O on descriptor chains. Rules and states are in vs_io.h.
 *
 * Two queues under one lock: jobs that wait for a thread, and jobs that are done. The eventfd is readable exactly while the second
 * one holds something, so it is written when that queue becomes non-empty and read when it becomes empty, under the lock.
 *
 * The threads take SIGBUS (vs_sigbus.c must see a fault of theirs) and the other signals of a thread's own doing; all else is for the
 * process and stays blocked here.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "vs_io.h"
#include "vs_mem_priv.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))

enum {
	IOV_CALL = 1024,		/* UIO_MAXIOV: what one preadv takes */
	ZEROS = 65536, ZEROS_CALL = 16	/* zeros are written in calls of 1 MiB */
};

struct job {
	struct job *next;
	struct vs_chain *c;
	uint64_t skip, len, offset, tag;
	uint32_t group;
	int op, fd, error;
	bool durable;
};

struct queue {
	struct job *first, **last;
};

struct vs_io {
	pthread_mutex_t lock;		/* guards waiting, done, ending, and the eventfd's being readable */
	pthread_cond_t work;		/* waiting is not empty, or ending */
	struct queue waiting, done;
	bool ending;
	int event;
	int n;
	pthread_t threads[];
};

static const uint8_t zeros[ZEROS];

static void queue_init(struct queue *q)
{
	q->first = NULL;
	q->last = &q->first;
}

static void queue_put(struct queue *q, struct job *j)
{
	j->next = NULL;
	*q->last = j;
	q->last = &j->next;
}

static struct job *queue_take(struct queue *q)
{
	struct job *j = q->first;

	if (j) {
		q->first = j->next;
		if (!q->first)
			q->last = &q->first;
	}
	return j;
}

/* ------------------------------------------------------------------------------------------------------ the operations */

/* what is left of a job's part of its chain */
struct cursor {
	const struct iovec *iov, *end;
	uint64_t skip;			/* of *iov */
	uint64_t len;
};

static struct cursor cursor_of(const struct job *j, bool writable)
{
	const struct iovec *iov = writable ? j->c->iov + j->c->n_out : j->c->iov;

	return (struct cursor){ iov, iov + (writable ? j->c->n_in : j->c->n_out), j->skip, j->len };
}

static void cursor_advance(struct cursor *k, uint64_t n)
{
	k->len -= n;
	k->skip += n;
	while (k->iov < k->end && k->skip >= k->iov->iov_len) {
		k->skip -= k->iov->iov_len;
		k->iov++;
	}
}

/* the next pieces, at most IOV_CALL */
static int cursor_iov(const struct cursor *k, struct iovec *out)
{
	uint64_t skip = k->skip, left = k->len;
	int n = 0;

	for (const struct iovec *v = k->iov; left && v < k->end && n < IOV_CALL; v++) {
		uint64_t part = MIN(v->iov_len - skip, left);

		out[n].iov_base = (uint8_t *)v->iov_base + skip;
		out[n].iov_len = part;
		n += part > 0;
		left -= part;
		skip = 0;
	}
	return n;
}

static void clear(const struct job *j)
{
	struct cursor k = cursor_of(j, true);

	cursor_advance(&k, 0);
	while (k.len && k.iov < k.end) {
		uint64_t part = MIN(k.iov->iov_len - k.skip, k.len);

		memset((uint8_t *)k.iov->iov_base + k.skip, 0, part);
		cursor_advance(&k, part);
	}
}

static int job_sync(const struct job *j)
{
	while (fdatasync(j->fd) < 0)
		if (errno != EINTR)
			return errno;
	return 0;
}

static int job_clear(const struct job *j)
{
	clear(j);
	return 0;
}

static int job_read(const struct job *j)
{
	struct cursor k = cursor_of(j, true);
	struct iovec iov[IOV_CALL];
	off_t at = (off_t)j->offset;
	int error = 0;

	cursor_advance(&k, 0);
	while (k.len && !error) {
		ssize_t n = preadv(j->fd, iov, cursor_iov(&k, iov), at);

		if (n > 0) {
			at += n;
			cursor_advance(&k, (uint64_t)n);
		} else if (n == 0) {
			error = EIO;		/* the file ends before the range does: it was truncated */
		} else if (errno != EINTR) {
			error = errno;
		}
	}
	/* the length that the driver gets covers the status behind the data: it must not find there what it had itself (2.7.8.2) */
	if (error)
		clear(j);
	return error;
}

static int job_write(const struct job *j)
{
	struct cursor k = cursor_of(j, false);
	struct iovec iov[IOV_CALL];
	off_t at = (off_t)j->offset;
	int flags = j->durable ? RWF_DSYNC : 0;
	bool sync = false;

	cursor_advance(&k, 0);
	while (k.len) {
		ssize_t n = pwritev2(j->fd, iov, cursor_iov(&k, iov), at, flags);

		if (n > 0) {
			at += n;
			cursor_advance(&k, (uint64_t)n);
		} else if (n == 0) {
			return EIO;
		} else if (flags && (errno == EOPNOTSUPP || errno == ENOSYS)) {
			flags = 0;
			sync = true;
		} else if (errno != EINTR) {
			return errno;
		}
	}
	return sync ? job_sync(j) : 0;
}

static bool unsupported(int error)
{
	/* EINVAL: a block device, and the range is not in whole blocks of it. ENODEV: no regular file */
	return error == EOPNOTSUPP || error == ENOSYS || error == EINVAL || error == ENODEV;
}

static int allocate(const struct job *j, int mode)
{
	while (fallocate(j->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)j->offset, (off_t)j->len) < 0)
		if (errno != EINTR)
			return errno;
	return 0;
}

static int job_discard(const struct job *j)
{
	int error = allocate(j, FALLOC_FL_PUNCH_HOLE);

	/* virtio 1.3, 5.2.6.2: the device may deallocate, and need not */
	if (error)
		return unsupported(error) ? 0 : error;
	return j->durable ? job_sync(j) : 0;
}

static int write_zeros(const struct job *j)
{
	uint64_t left = j->len, at = j->offset;

	while (left) {
		struct iovec iov[ZEROS_CALL];
		uint64_t part = 0;
		ssize_t n;
		int cnt = 0;

		for (; cnt < ZEROS_CALL && part < left; cnt++) {
			iov[cnt].iov_base = (void *)zeros;
			iov[cnt].iov_len = MIN((uint64_t)ZEROS, left - part);
			part += iov[cnt].iov_len;
		}
		n = pwritev(j->fd, iov, cnt, (off_t)at);
		if (n == 0)
			return EIO;
		if (n < 0 && errno != EINTR)
			return errno;
		if (n > 0) {
			at += (uint64_t)n;
			left -= (uint64_t)n;
		}
	}
	return 0;
}

static int job_zero(const struct job *j)
{
	int error = allocate(j, j->op == VS_IO_ZERO_UNMAP ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);

	if (error && unsupported(error))
		error = write_zeros(j);
	if (error)
		return error;
	return j->durable ? job_sync(j) : 0;
}

/* what an op is: the part of the chain it moves, and who does it */
static const struct {
	int (*run)(const struct job *j);	/* 0 or an errno value */
	bool reads, writes;			/* the chain's readable, its writable part */
} ops[VS_IO_OPS] = {
	[VS_IO_READ] = { job_read, .writes = true },
	[VS_IO_WRITE] = { job_write, .reads = true },
	[VS_IO_SYNC] = { job_sync },
	[VS_IO_DISCARD] = { job_discard },
	[VS_IO_ZERO] = { job_zero },
	[VS_IO_ZERO_UNMAP] = { job_zero },
	[VS_IO_CLEAR] = { job_clear, .writes = true },
};

/* ---------------------------------------------------------------------------------------------------------------- the pool */

/* under lock */
static void finish(struct vs_io *io, struct job *j)
{
	if (!io->done.first)
		eventfd_write(io->event, 1);
	queue_put(&io->done, j);
}

static void *work(void *arg)
{
	struct vs_io *io = arg;
	struct job *j;

	pthread_mutex_lock(&io->lock);
	for (;;) {
		while (!(j = queue_take(&io->waiting)) && !io->ending)
			pthread_cond_wait(&io->work, &io->lock);
		if (!j)
			break;
		pthread_mutex_unlock(&io->lock);
		j->error = ops[j->op].run(j);
		pthread_mutex_lock(&io->lock);
		finish(io, j);
	}
	pthread_mutex_unlock(&io->lock);
	return NULL;
}

static int start(struct vs_io *io, int threads)
{
	sigset_t blocked, before;
	int error = 0;

	sigfillset(&blocked);
	sigdelset(&blocked, SIGBUS);
	sigdelset(&blocked, SIGSEGV);
	sigdelset(&blocked, SIGFPE);
	sigdelset(&blocked, SIGILL);
	pthread_sigmask(SIG_SETMASK, &blocked, &before);
	for (; io->n < threads && !error; io->n += !error)
		error = pthread_create(&io->threads[io->n], NULL, work, io);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return error;
}

struct vs_io *vs_io_new(int threads)
{
	struct vs_io *io;
	int error;

	if (threads < 1 || threads > VS_IO_THREADS_MAX) {
		errno = EINVAL;
		return NULL;
	}
	io = calloc(1, sizeof(*io) + (size_t)threads * sizeof(io->threads[0]));
	if (!io)
		return NULL;
	io->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (io->event < 0) {
		error = errno;
		free(io);
		errno = error;
		return NULL;
	}
	pthread_mutex_init(&io->lock, NULL);
	pthread_cond_init(&io->work, NULL);
	queue_init(&io->waiting);
	queue_init(&io->done);
	error = start(io, threads);
	if (error) {
		vs_io_free(io);
		errno = error;
		return NULL;
	}
	return io;
}

void vs_io_free(struct vs_io *io)
{
	struct job *j;

	if (!io)
		return;
	pthread_mutex_lock(&io->lock);
	io->ending = true;
	pthread_cond_broadcast(&io->work);
	pthread_mutex_unlock(&io->lock);
	for (int i = 0; i < io->n; i++)
		pthread_join(io->threads[i], NULL);
	while ((j = queue_take(&io->done)))
		free(j);
	pthread_cond_destroy(&io->work);
	pthread_mutex_destroy(&io->lock);
	close(io->event);
	free(io);
}

int vs_io_fd(const struct vs_io *io)
{
	return io->event;
}

int vs_io_submit(struct vs_io *io, int op, int fd, struct vs_chain *c, uint64_t skip, uint64_t len, uint64_t offset, uint32_t group,
		 uint64_t tag)
{
	bool durable = op & VS_IO_DURABLE;
	struct job *j;

	op &= ~VS_IO_DURABLE;
	if (op < 0 || op >= VS_IO_OPS || len > INT64_MAX || offset > INT64_MAX - len)
		return -EINVAL;
	if (ops[op].reads || ops[op].writes) {
		uint64_t there = !c ? 0 : ops[op].reads ? c->out_len : c->in_len;

		if (!c || skip > there || len > there - skip)
			return -EINVAL;
	}
	j = malloc(sizeof(*j));
	if (!j)
		return -ENOMEM;
	*j = (struct job){
		.c = c, .skip = skip, .len = len, .offset = offset, .group = group, .tag = tag, .op = op, .fd = fd, .durable = durable,
	};
	pthread_mutex_lock(&io->lock);
	queue_put(&io->waiting, j);
	pthread_cond_signal(&io->work);
	pthread_mutex_unlock(&io->lock);
	return 0;
}

int vs_io_cancel(struct vs_io *io, uint32_t group)
{
	struct queue all;
	struct job *j;
	int n = 0;

	pthread_mutex_lock(&io->lock);
	all = io->waiting;
	if (!all.first)
		all.last = &all.first;
	queue_init(&io->waiting);
	while ((j = queue_take(&all))) {
		if (j->group != group) {
			queue_put(&io->waiting, j);
			continue;
		}
		j->error = ECANCELED;
		finish(io, j);
		n++;
	}
	pthread_mutex_unlock(&io->lock);
	return n;
}

int vs_io_reap(struct vs_io *io, struct vs_io_done *done, int max)
{
	struct job *j, *taken = NULL;
	eventfd_t value;
	int n = 0;

	pthread_mutex_lock(&io->lock);
	while (n < max && (j = queue_take(&io->done))) {
		done[n++] = (struct vs_io_done){ j->tag, j->error };
		j->next = taken;
		taken = j;
	}
	if (n && !io->done.first)
		eventfd_read(io->event, &value);
	pthread_mutex_unlock(&io->lock);
	while ((j = taken)) {
		taken = j->next;
		free(j);
	}
	return n;
}
