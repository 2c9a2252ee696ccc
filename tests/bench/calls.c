/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * calls COUNT - what the first calls of a socket's life cost, in this system: nanoseconds, least and median and most of COUNT, for
 *
 *	socket		socket(AF_INET, SOCK_STREAM)
 *	loopback	connect() to a port of 127.0.0.1 where nobody listens: an address that is never the device's
 *	hinted		connect() to 192.0.2.2, to which there is no route: refused at once, by whoever decides
 *	elsewhere	connect() to 192.0.2.1, likewise
 *
 * One kind after the other: a call that sleeps leaves cold caches to the next, which would be counted to it.
 */
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "program.h"

enum { SOCKET, LOOPBACK, HINTED, ELSEWHERE, CALLS };

static const char *const names[CALLS] = { "socket", "loopback", "hinted", "elsewhere" };

static uint64_t socket_call(int *fd)
{
	uint64_t t = now();

	*fd = socket(AF_INET, SOCK_STREAM, 0);
	t = now() - t;
	if (*fd < 0)
		die("socket");
	return t;
}

static uint64_t connect_call(uint32_t host, uint16_t port, int expected)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(host) };
	uint64_t t;
	int fd;

	socket_call(&fd);
	t = now();
	if (!connect(fd, (struct sockaddr *)&to, sizeof(to)) || errno != expected)
		die("connect");
	t = now() - t;
	close(fd);
	return t;
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	size_t count = argc == 2 ? strtoul(argv[1], NULL, 10) : 0;
	uint64_t *times[CALLS];

	if (!count) {
		fprintf(stderr, "usage: %s COUNT\n", argv[0]);
		return 2;
	}
	for (int c = 0; c < CALLS; c++)
		times[c] = calloc(count, sizeof(*times[c]));
	for (size_t i = 0; i < count; i++) {
		int fd;

		times[SOCKET][i] = socket_call(&fd);
		close(fd);
	}
	for (size_t i = 0; i < count; i++)
		times[LOOPBACK][i] = connect_call(INADDR_LOOPBACK, 9, ECONNREFUSED);
	for (size_t i = 0; i < count; i++)
		times[HINTED][i] = connect_call(0xc0000202, 80, ENETUNREACH);
	for (size_t i = 0; i < count; i++)
		times[ELSEWHERE][i] = connect_call(0xc0000201, 80, ENETUNREACH);
	for (int c = 0; c < CALLS; c++) {
		qsort(times[c], count, sizeof(*times[c]), ascending);
		printf("%s %llu %llu %llu\n", names[c], (unsigned long long)times[c][0], (unsigned long long)times[c][count / 2],
		       (unsigned long long)times[c][count - 1]);
	}
	return 0;
}
