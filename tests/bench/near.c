/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * near - a guest's end of the connections that tests/bench/guest.py measures; far.c is the other. The same program for whatever carries them. It
 * runs on the host where those into a guest are measured.
 *
 * near WHERE out SIZE MS	send for about MS, SIZE bytes in each write, until the far end has it all
 * near WHERE file SIZE MS	likewise, SIZE bytes in each sendfile() of a file in tmpfs, from its beginning to its end and again
 * near WHERE zerocopy SIZE MS	likewise, SIZE bytes of memory in each send(MSG_ZEROCOPY), as many at once as the kernel takes
 * near WHERE in SIZE MS	out the other way; SIZE is in each write there and each read here
 * near WHERE ask MS		64 bytes and their echo, one after the other
 * near WHERE cycle MS		connect, 64 bytes and their echo, close; one after the other
 * near WHERE many COUNT	COUNT connections opened, then asked in turn; all are open at once
 * near WHERE span-out SIZE MS	what is moved within MS, after a quarter of that: for several guests at once
 * near WHERE span-in SIZE MS
 * near WHERE held OUT IN TIMES	OUT bytes sent and IN received by one flow, TIMES times beside another one that the far end does not read, and as often
 *				without that; in turns
 * near WHERE unread OUT IN TIMES	the same, where it is this program that does not read the other one
 * near WHERE dgram-out SIZE MS	datagrams of SIZE bytes as fast as they go; then the far end is asked how many came
 * near WHERE dgram-in SIZE MS	bursts of FAR_BURST such datagrams, each asked for when the one before it has come or is given up
 * near - copy MS		no connection: what the kernel copies from a program and to it
 *
 * WHERE is tcp:ADDRESS:PORT, udp:ADDRESS:PORT, vsock:CID:PORT, unix:PATH, or into:PATH:PORT, where a vsock device has a Unix socket at PATH for
 * those who call its guest (Firecracker's convention: a line CONNECT PORT, and one with OK). Prints a line: for out, file, zerocopy and in, bytes, nanoseconds, and bytes of the runs that found
 * out how many that should be, too; for ask, nanoseconds of the median and the 99th percentile, and the number; for cycle and many, number
 * and nanoseconds; for datagrams, those that came, nanoseconds, and those that were sent; for span, bytes and nanoseconds; for held and
 * unread, a line each time: nanoseconds of sending beside it, without it, of receiving beside it, without it; for copy, bytes and nanoseconds from a program, and the same to it.
 *
 * The amount is found by doubling it until it takes a quarter of MS, twice: once may be an accident, on a machine that has other work. So the
 * measured run finds windows open and code translated. No option of a socket is set: what a program gets that asks for nothing.
 *
 * A copy is pwrite() and pread() of 64 KiB in tmpfs, always of the same pages: 16 look-ups and one copy, no allocation, nobody is woken.
 * A transport that copies once between the program and what the other side sees has that as its limit.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "far.h"
#include "give.h"
#include "program.h"

enum { MOST_ASKED = 1 << 16, WORDS = 64, GIVE_UP_MS = 200, ASK_AGAIN = 100, STUCK_MS = 50 /* of no room */ };

static union {
	struct sockaddr any;
	struct sockaddr_in in;
	struct sockaddr_un un;
	struct sockaddr_vm vm;
} where;
static socklen_t where_len;
static unsigned int call;	/* into: the guest's port */
static bool dgram;

static void usage(void)
{
	fputs("usage: near WHERE out SIZE MS | file SIZE MS | zerocopy SIZE MS | in SIZE MS | ask MS | cycle MS | many COUNT | span-out SIZE MS | span-in SIZE MS |\n"
	      "\theld OUT IN TIMES | unread OUT IN TIMES | dgram-out SIZE MS | dgram-in SIZE MS | copy MS\n", stderr);
	exit(2);
}

/* "-" leaves it without one */
static void set_where(char *text)
{
	char *rest = strchr(text, ':'), *port = rest ? strrchr(rest + 1, ':') : NULL;

	if (!strcmp(text, "-"))
		return;
	if (!strncmp(text, "unix:", 5)) {
		where.un.sun_family = AF_UNIX;
		snprintf(where.un.sun_path, sizeof(where.un.sun_path), "%s", rest + 1);
		where_len = sizeof(where.un);
		return;
	}
	if (!port)
		usage();
	*port++ = 0;
	if (!strncmp(text, "into:", 5)) {
		where.un.sun_family = AF_UNIX;
		snprintf(where.un.sun_path, sizeof(where.un.sun_path), "%s", rest + 1);
		where_len = sizeof(where.un);
		call = (unsigned int)strtoul(port, NULL, 10);
	} else if (!strncmp(text, "vsock:", 6)) {
		where.vm.svm_family = AF_VSOCK;
		where.vm.svm_cid = (unsigned int)strtoul(rest + 1, NULL, 10);
		where.vm.svm_port = (unsigned int)strtoul(port, NULL, 10);
		where_len = sizeof(where.vm);
	} else {
		dgram = !strncmp(text, "udp:", 4);
		where.in.sin_family = AF_INET;
		where.in.sin_port = htons((uint16_t)strtoul(port, NULL, 10));
		if (inet_pton(AF_INET, rest + 1, &where.in.sin_addr) != 1)
			usage();
		where_len = sizeof(where.in);
	}
}

static int connected(void)
{
	int fd = socket(where.any.sa_family, dgram ? SOCK_DGRAM : SOCK_STREAM, 0);
	char line[64] = "";

	if (fd < 0 || connect(fd, &where.any, where_len))
		die("connect");
	if (call) {
		put(fd, line, (size_t)snprintf(line, sizeof(line), "CONNECT %u\n", call));
		for (size_t i = 0; i < sizeof(line) && (!i || line[i - 1] != '\n'); i++)
			get(fd, line + i, 1);
		if (strncmp(line, "OK ", 3))
			die(line);
	}
	return fd;
}

/* nanoseconds */
static uint64_t move(int fd, uint32_t what, uint32_t size, uint64_t amount)
{
	struct far_request r = { what, size, amount };
	uint64_t start = now(), answer = amount;

	put(fd, &r, sizeof(r));
	if (what == FAR_SINK) {
		for (uint64_t left = amount; left; left -= size)
			give(fd, size);
		get(fd, &answer, sizeof(answer));
	} else {
		for (uint64_t left = amount; left;) {
			ssize_t n = read(fd, piece, left < size ? left : size);

			if (n <= 0)
				die("read");
			left -= (uint64_t)n;
		}
	}
	if (answer != amount) {
		fprintf(stderr, "%llu bytes of %llu\n", (unsigned long long)answer, (unsigned long long)amount);
		exit(1);
	}
	return now() - start;
}

static void bulk(uint32_t what, uint32_t size, uint64_t span)
{
	uint64_t amount = size, took, all = 0;
	int fd = connected(), slow = 0;
	double best = 0;

	while (slow < 2) {
		took = move(fd, what, size, amount);
		all += amount;
		if ((double)amount / (double)took > best)
			best = (double)amount / (double)took;
		if (took >= span / 4) {
			slow++;
		} else {
			slow = 0;
			amount *= 2;
		}
	}
	amount = (uint64_t)(best * (double)span) / size * size + size;
	took = move(fd, what, size, amount);
	printf("%llu %llu %llu\n", (unsigned long long)amount, (unsigned long long)took, (unsigned long long)(all + amount));
}

static void span_of(uint32_t what, uint32_t size, uint64_t length)
{
	struct far_request r = { what, size, (uint64_t)size << 32 };	/* more than there is time for */
	uint64_t start = 0, bytes = 0, begun, at;
	int fd = connected();

	put(fd, &r, sizeof(r));
	begun = now();
	do {
		ssize_t n = what == FAR_SINK ? write(fd, piece, size) : read(fd, piece, size);

		if (n <= 0)
			die("span");
		at = now();
		if (start)
			bytes += (uint64_t)n;
		else if (at - begun >= length / 4)
			start = at;
	} while (!start || at - start < length);
	printf("%llu %llu\n", (unsigned long long)bytes, (unsigned long long)(at - start));
}

/* a flow on which nothing moves any more */
static int stuck(bool held)
{
	struct far_request r = { held ? FAR_HOLD : FAR_SOURCE, sizeof(piece), (uint64_t)sizeof(piece) << 32 };
	int fd = connected();
	struct pollfd p = { .fd = fd, .events = held ? POLLOUT : 0 };

	put(fd, &r, sizeof(r));
	while (poll(&p, 1, STUCK_MS) == 1)
		if (send(fd, piece, sizeof(piece), MSG_DONTWAIT) < 0 && errno != EAGAIN)
			die("send");
	return fd;
}

/* aborted: nobody has to take what it holds */
static void drop(int fd)
{
	struct linger at_once = { 1, 0 };

	if (fd < 0)
		return;
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	close(fd);
}

static void beside(bool held, uint64_t out, uint64_t in, uint64_t times)
{
	uint64_t took[2][2];
	int fd = connected();

	for (uint64_t i = 0; i < times; i++) {
		for (int k = 0; k < 2; k++) {
			bool with = (i + (uint64_t)k) % 2;
			int other = with ? stuck(held) : -1;

			move(fd, FAR_SINK, sizeof(piece), sizeof(piece));	/* what the other one has cooled is not in the figures */
			move(fd, FAR_SOURCE, sizeof(piece), sizeof(piece));
			took[0][!with] = move(fd, FAR_SINK, sizeof(piece), out);
			took[1][!with] = move(fd, FAR_SOURCE, sizeof(piece), in);
			drop(other);
		}
		printf("%llu %llu %llu %llu\n", (unsigned long long)took[0][0], (unsigned long long)took[0][1],
		       (unsigned long long)took[1][0], (unsigned long long)took[1][1]);
	}
}

static void ask(int fd)
{
	struct {
		struct far_request r;
		uint8_t words[WORDS];
	} asked = { .r = { FAR_ECHO, WORDS, WORDS } };

	put(fd, &asked, sizeof(asked));
	get(fd, asked.words, WORDS);
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

/* one request for all of them: what goes to and fro is 64 bytes and no more */
static void asks(uint64_t span)
{
	struct far_request r = { FAR_ECHO, WORDS, (uint64_t)WORDS << 40 };
	uint64_t *times = calloc(MOST_ASKED, sizeof(*times)), end;
	int fd = connected();
	size_t n = 0;

	put(fd, &r, sizeof(r));
	for (int i = 0; i < 20; i++) {
		put(fd, piece, WORDS);
		get(fd, piece, WORDS);
	}
	end = now() + span;
	while (n < MOST_ASKED) {
		uint64_t start = now();

		if (start >= end && n)
			break;
		put(fd, piece, WORDS);
		get(fd, piece, WORDS);
		times[n++] = now() - start;
	}
	qsort(times, n, sizeof(*times), ascending);
	printf("%llu %llu %zu\n", (unsigned long long)times[n / 2], (unsigned long long)times[n * 99 / 100], n);
}

static void cycle(uint64_t span)
{
	uint64_t start = now(), n = 0;

	do {
		int fd = connected();

		ask(fd);
		close(fd);
		n++;
	} while (now() - start < span);
	printf("%llu %llu\n", (unsigned long long)n, (unsigned long long)(now() - start));
}

static void many(size_t count)
{
	struct rlimit limit = { count + 64, count + 64 };
	int *fds = calloc(count, sizeof(*fds));
	uint64_t start;

	if (setrlimit(RLIMIT_NOFILE, &limit))
		die("setrlimit");
	start = now();
	for (size_t i = 0; i < count; i++)
		fds[i] = connected();
	for (size_t i = 0; i < count; i++)
		ask(fds[i]);
	printf("%zu %llu\n", count, (unsigned long long)(now() - start));
}

/* one datagram of the far end, -1: none within GIVE_UP_MS */
static ssize_t heard(int fd, void *data, size_t len)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	return poll(&p, 1, GIVE_UP_MS) == 1 ? recv(fd, data, len, MSG_DONTWAIT) : -1;
}

/* asked until it is answered: what is asked and what is answered may be lost, too */
static uint32_t answered(int fd, uint32_t what)
{
	static uint32_t asked;
	struct far_dgram ask = { .magic = FAR_DGRAM, .what = what, .burst = ++asked }, answer;

	for (int i = 0; i < ASK_AGAIN; i++) {
		send(fd, &ask, sizeof(ask), 0);
		while (heard(fd, &answer, sizeof(answer)) >= 0)
			if (answer.magic == FAR_DGRAM && answer.burst == asked)
				return answer.number;
	}
	die("no answer");
	return 0;
}

static void dgram_out(int fd, size_t size, uint64_t span)
{
	uint64_t start, took, sent = 0;

	memset(piece, 0, size);
	answered(fd, FAR_ZERO);
	start = now();
	do {
		for (int i = 0; i < FAR_BURST; i++)
			sent += send(fd, piece, size, 0) == (ssize_t)size;
		took = now() - start;
	} while (took < span);
	printf("%u %llu %llu\n", answered(fd, FAR_COUNT), (unsigned long long)took, (unsigned long long)sent);
}

static void dgram_in(int fd, size_t size, uint64_t span)
{
	struct far_dgram ask = { .magic = FAR_DGRAM, .what = FAR_GIVE, .number = FAR_BURST, .size = (uint32_t)size };
	uint64_t start, came = 0;
	uint32_t head[2];

	answered(fd, FAR_ZERO);
	start = now();
	do {
		int left = FAR_BURST;

		ask.burst++;
		send(fd, &ask, sizeof(ask), 0);
		while (left && heard(fd, head, sizeof(head)) >= 0)
			left -= !head[0] && head[1] == ask.burst;
		came += FAR_BURST - left;
	} while (now() - start < span);
	printf("%llu %llu %llu\n", (unsigned long long)came, (unsigned long long)(now() - start), (unsigned long long)ask.burst * FAR_BURST);
}

static uint64_t copies(int fd, ssize_t (*copy)(int), uint64_t span, uint64_t *took)
{
	uint64_t start = now(), bytes = 0;

	do {
		for (int i = 0; i < 64; i++, bytes += sizeof(piece))
			if (copy(fd) != sizeof(piece))
				die("copy");
		*took = now() - start;
	} while (*took < span);
	return bytes;
}

static ssize_t copy_in(int fd)
{
	return pwrite(fd, piece, sizeof(piece), 0);
}

static ssize_t copy_out(int fd)
{
	return pread(fd, piece, sizeof(piece), 0);
}

static void copy(uint64_t span)
{
	int fd = memfd_create("copy", 0);
	uint64_t in, took_in, out, took_out;

	if (fd < 0)
		die("memfd_create");
	in = copies(fd, copy_in, span, &took_in);
	out = copies(fd, copy_out, span, &took_out);
	printf("%llu %llu %llu %llu\n", (unsigned long long)in, (unsigned long long)took_in, (unsigned long long)out,
	       (unsigned long long)took_out);
}

int main(int argc, char **argv)
{
	const char *kind = argc > 3 ? argv[2] : "";
	uint64_t last = argc > 3 ? strtoull(argv[argc - 1], NULL, 10) : 0, size = argc > 4 ? strtoull(argv[3], NULL, 10) : 0;

	if (!last)
		usage();
	set_where(argv[1]);
	memset(piece, 7, sizeof(piece));
	if (!strcmp(kind, "file"))
		give = give_file;
	else if (!strcmp(kind, "zerocopy"))
		give = give_zerocopy;
	if ((!strcmp(kind, "out") || give != give_written) && size && size <= FAR_PIECE)
		bulk(FAR_SINK, (uint32_t)size, last * 1000000);
	else if (!strcmp(kind, "in") && size && size <= FAR_PIECE)
		bulk(FAR_SOURCE, (uint32_t)size, last * 1000000);
	else if (!strcmp(kind, "span-out") && size && size <= FAR_PIECE)
		span_of(FAR_SINK, (uint32_t)size, last * 1000000);
	else if (!strcmp(kind, "span-in") && size && size <= FAR_PIECE)
		span_of(FAR_SOURCE, (uint32_t)size, last * 1000000);
	else if ((!strcmp(kind, "held") || !strcmp(kind, "unread")) && argc == 6)
		beside(!strcmp(kind, "held"), size, strtoull(argv[4], NULL, 10), last);
	else if (!strcmp(kind, "ask"))
		asks(last * 1000000);
	else if (!strcmp(kind, "cycle"))
		cycle(last * 1000000);
	else if (!strcmp(kind, "many"))
		many(last);
	else if (!strcmp(kind, "dgram-out") && size >= sizeof(struct far_dgram) && size <= FAR_PIECE && dgram)
		dgram_out(connected(), size, last * 1000000);
	else if (!strcmp(kind, "dgram-in") && size >= sizeof(struct far_dgram) && size <= FAR_PIECE && dgram)
		dgram_in(connected(), size, last * 1000000);
	else if (!strcmp(kind, "copy"))
		copy(last * 1000000);
	else
		usage();
	return 0;
}
