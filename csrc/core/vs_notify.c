/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_notify - a notification to the front-end through whatever fd it gave us, without blocking and without SIGPIPE.
 *
 * Normally that is an eventfd. A front-end may also give a socket or a pipe; then each notification is 8 bytes of the same value.
 * A full pipe (EAGAIN) means that one waits already; a reader that is gone (EPIPE) is the session's business, not ours.
 *
 * Not blocking is a property of the open file, which the front-end shares: for an eventfd and a pipe it is set there, once; for a
 * socket it is asked for at each send. A saturated eventfd (2^64 - 2) would block otherwise.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "vs_vq_priv.h"

static const uint64_t ONE = 1;

static void write_eventfd(int fd)
{
	while (write(fd, &ONE, sizeof(ONE)) < 0 && errno == EINTR)
		;
}

static void write_socket(int fd)
{
	while (send(fd, &ONE, sizeof(ONE), MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno == EINTR)
		;
}

/* There is no MSG_NOSIGNAL for pipes: block SIGPIPE in this thread, and take it off again if this write (and nobody before) raised it */
static void write_pipe(int fd)
{
	const struct timespec now = { 0 };
	sigset_t pipe_only, before, pending;

	sigemptyset(&pipe_only);
	sigaddset(&pipe_only, SIGPIPE);
	sigpending(&pending);
	pthread_sigmask(SIG_BLOCK, &pipe_only, &before);
	write_eventfd(fd);
	if (!sigismember(&pending, SIGPIPE))
		while (sigtimedwait(&pipe_only, NULL, &now) < 0 && errno == EINTR)
			;
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* by type of file. An eventfd is an anonymous inode, which has none. */
static const struct {
	mode_t type;
	void (*write)(int fd);
} kinds[] = {
	{ 0, write_eventfd },
	{ S_IFSOCK, write_socket },
	{ S_IFIFO, write_pipe },
};

void vs_notify_init(struct vs_notify *n)
{
	n->fd = -1;
}

int vs_notify_set(struct vs_notify *n, int fd)
{
	void (*how)(int fd) = NULL;
	struct stat st;
	int flags;

	if (fd >= 0) {
		if (fstat(fd, &st) < 0)
			return -errno;
		for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
			if ((st.st_mode & S_IFMT) == kinds[i].type)
				how = kinds[i].write;
		if (!how)
			return -EINVAL;
		if (how != write_socket) {
			flags = fcntl(fd, F_GETFL);
			if (flags < 0 || (!(flags & O_NONBLOCK) && fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0))
				return -errno;
		}
		fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
		if (fd < 0)
			return -errno;
	} else {
		fd = -1;
	}
	if (n->fd >= 0)
		close(n->fd);
	n->fd = fd;
	n->write = how;
	return 0;
}

bool vs_notify_signal(const struct vs_notify *n)
{
	int saved = errno;

	if (n->fd < 0)
		return false;
	n->write(n->fd);
	errno = saved;
	return true;
}
