/* SPDX-License-Identifier: BSD-3-Clause */
/* give.h - for near.c: the ways in which a program gives the kernel what it sends, and takes what comes. */
#ifndef BENCH_GIVE_H
#define BENCH_GIVE_H

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#include "far.h"
#include "program.h"

enum { FILE_PIECES = 256 };

static uint8_t piece[FAR_PIECE];

static void put(int fd, const void *data, size_t len)
{
	while (len) {
		ssize_t n = write(fd, data, len);

		if (n < 0)
			die("write");
		data = (const uint8_t *)data + n;
		len -= (size_t)n;
	}
}

static void get(int fd, void *data, size_t len)
{
	while (len) {
		ssize_t n = read(fd, data, len);

		if (n <= 0)
			die("read");
		data = (uint8_t *)data + n;
		len -= (size_t)n;
	}
}

static void give_written(int fd, uint32_t size)
{
	put(fd, piece, size);
}

static void give_file(int fd, uint32_t size)
{
	static int file = -1;
	static off_t at;

	if (file < 0) {
		file = memfd_create("file", 0);
		if (file < 0)
			die("memfd_create");
		for (size_t i = 0; i < FILE_PIECES; i++)
			put(file, piece, sizeof(piece));
	}
	while (size) {
		ssize_t n = sendfile(fd, file, &at, size);

		if (n < 0)
			die("sendfile");
		if (!n)
			at = 0;
		size -= (uint32_t)n;
	}
}

/* one notification, of however many sends, if there is any */
static bool told(int fd)
{
	char control[256];
	struct msghdr m = { .msg_control = control, .msg_controllen = sizeof(control) };

	return recvmsg(fd, &m, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0;
}

static void give_zerocopy(int fd, uint32_t size)
{
	/* not every path has it: then the bytes are copied, and nobody is notified */
	bool asked = !setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &(int){1}, sizeof(int));
	struct pollfd p = { .fd = fd };
	size_t done = 0;

	while (done < size) {
		ssize_t n = send(fd, piece + done, size - done, asked ? MSG_ZEROCOPY : 0);

		if (n < 0 && errno != ENOBUFS)
			die("send");
		if (n < 0)
			poll(&p, 1, -1);	/* so many are not told of yet as it may be */
		else
			done += (size_t)n;
		while (asked && told(fd))
			;
	}
}

static void (*give)(int fd, uint32_t size) = give_written;

#endif
