/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * check.h - what the in-guest check programs share: claims printed as TAP, addresses, a connection to the peer.
 *
 * The programs know nothing of offloading. They must pass natively on the host against tests/e2e/peer.py (a test shows that) and pass
 * unchanged in a guest: what they claim is what an application may rely on. Each check runs in a child process with an alarm, so one that
 * hangs or crashes is one failed claim and not a hung run.
 */
#ifndef CHECK_H
#define CHECK_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK_SECONDS 150		/* for one claim, under TCG on a busy machine */

struct addr {
	struct sockaddr_storage ss;
	socklen_t len;
};

__attribute__((noreturn, format(printf, 1, 2), unused))
static void fail(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vfprintf(stdout, fmt, ap);
	va_end(ap);
	fflush(stdout);
	_exit(1);
}

/* this kernel lacks what the claim is about; where it must not, the one who runs the program looks for "# SKIP" */
__attribute__((noreturn, unused))
static void skip(const char *why)
{
	printf("%s", why);
	fflush(stdout);
	_exit(77);
}

#define MUST(cond) do { if (!(cond)) fail("%s:%d: %s (errno %d %s)", __FILE_NAME__, __LINE__, #cond, errno, strerror(errno)); } while (0)
#define SAME(a, b) do { long long a_ = (a), b_ = (b); \
	if (a_ != b_) fail("%s:%d: %s is %lld, not %s = %lld (errno %d)", __FILE_NAME__, __LINE__, #a, a_, #b, b_, errno); } while (0)
/* the call must fail with exactly this errno */
#define ERRNO(call, e) do { errno = 0; long long r_ = (call); \
	if (r_ != -1 || errno != (e)) fail("%s:%d: %s gave %lld, errno %d (%s), not -1 and %s", __FILE_NAME__, __LINE__, #call, r_, errno, \
		strerror(errno), #e); } while (0)

/* "1.2.3.4 80" or "::1 80" */
__attribute__((unused))
static struct addr address(const char *host, const char *port)
{
	struct addr a = { .len = 0 };
	struct sockaddr_in *in = (void *)&a.ss;
	struct sockaddr_in6 *in6 = (void *)&a.ss;

	if (inet_pton(AF_INET, host, &in->sin_addr) == 1) {
		in->sin_family = AF_INET;
		in->sin_port = htons(atoi(port));
		a.len = sizeof(*in);
	} else if (inet_pton(AF_INET6, host, &in6->sin6_addr) == 1) {
		in6->sin6_family = AF_INET6;
		in6->sin6_port = htons(atoi(port));
		a.len = sizeof(*in6);
	} else {
		fail("not an address: %s", host);
	}
	return a;
}

__attribute__((unused))
static int port_of(const struct addr *a)
{
	return ntohs(((const struct sockaddr_in *)&a->ss)->sin_port);	/* the same place in sockaddr_in6 */
}

__attribute__((unused))
static int open_connected(const struct addr *a)
{
	int fd = socket(a->ss.ss_family, SOCK_STREAM, 0);

	MUST(fd >= 0);
	MUST(connect(fd, (const void *)&a->ss, a->len) == 0);
	return fd;
}

__attribute__((unused))
static void send_all(int fd, const void *data, size_t len)
{
	const char *p = data;

	while (len) {
		ssize_t n = send(fd, p, len, MSG_NOSIGNAL);

		MUST(n > 0);
		p += n;
		len -= n;
	}
}

/* the peer obeys one line: see tests/e2e/peer.py */
__attribute__((unused))
static int ask(const struct addr *peer, const char *line)
{
	int fd = open_connected(peer);

	send_all(fd, line, strlen(line));
	return fd;
}

__attribute__((unused))
static void recv_exactly(int fd, void *buf, size_t len)
{
	char *p = buf;

	while (len) {
		ssize_t n = recv(fd, p, len, 0);

		MUST(n > 0);
		p += n;
		len -= n;
	}
}

__attribute__((unused))
static short wait_for(int fd, short events)
{
	struct pollfd p = { .fd = fd, .events = events };

	SAME(poll(&p, 1, CHECK_SECONDS * 1000), 1);
	return p.revents;
}

/* a byte of the pattern that both ends know, so that lost, doubled and swapped bytes all show */
__attribute__((unused))
static uint8_t pattern(uint64_t i)
{
	return (uint8_t)(i ^ (i >> 8) ^ (i >> 16) ^ 0x5a);
}

/* the end of a "sink": what it says of what it got, of @size bytes at most with the 0 behind it */
__attribute__((unused))
static void sink_says(int fd, char *answer, size_t size)
{
	size_t got = 0;
	ssize_t n;

	MUST(shutdown(fd, SHUT_WR) == 0);
	while ((n = recv(fd, answer + got, size - 1 - got, 0)) > 0)
		got += n;
	SAME(n, 0);
	answer[got] = 0;
}

/* the end of a "sink": it has got just these bytes */
__attribute__((unused))
static void sink_has(int fd, const uint8_t *data, size_t len)
{
	char answer[64], want[64];
	uint32_t crc = ~0u;

	for (size_t i = 0; i < len; i++) {
		crc ^= data[i];
		for (int k = 0; k < 8; k++)
			crc = crc & 1 ? (crc >> 1) ^ 0xedb88320u : crc >> 1;
	}
	sink_says(fd, answer, sizeof(answer));
	snprintf(want, sizeof(want), "%zu %08x\n", len, ~crc);
	if (strcmp(answer, want))
		fail("the peer got \"%s\", not \"%s\"", answer, want);
}

static int check_count, check_failed;

/* run one claim in a child; print it as TAP */
__attribute__((unused))
static void run_check(const char *claim, void (*fn)(void))
{
	const char *only = getenv("CHECK_ONLY");	/* part of a name: to look at one claim again and again */
	char why[512] = "";
	int pipefd[2], status;
	size_t got = 0;
	ssize_t n;
	pid_t pid;

	if (only && !strstr(claim, only))
		return;
	MUST(pipe(pipefd) == 0);
	fflush(stdout);
	pid = fork();
	MUST(pid >= 0);
	if (pid == 0) {
		dup2(pipefd[1], 1);
		close(pipefd[0]);
		close(pipefd[1]);
		alarm(CHECK_SECONDS);
		fn();
		_exit(0);
	}
	close(pipefd[1]);
	while (got < sizeof(why) - 1 && (n = read(pipefd[0], why + got, sizeof(why) - 1 - got)) > 0)
		got += n;
	why[got] = 0;
	close(pipefd[0]);
	MUST(waitpid(pid, &status, 0) == pid);
	check_count++;
	if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
		printf("ok %d - %s\n", check_count, claim);
	} else if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
		printf("ok %d - %s # SKIP %s\n", check_count, claim, why);
	} else {
		check_failed++;
		if (WIFSIGNALED(status))
			printf("not ok %d - %s: %s (signal %d) %s\n", check_count, claim,
			       WTERMSIG(status) == SIGALRM ? "hung" : "died", WTERMSIG(status), why);
		else
			printf("not ok %d - %s: %s\n", check_count, claim, why);
	}
	fflush(stdout);
}

#define C(fn) run_check(#fn, fn)

/* the peer of a program that is called with PEER PORT and no more; who calls it otherwise is told */
__attribute__((unused))
static struct addr only_peer(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: %s PEER PORT\n", argv[0]);
		exit(2);
	}
	return address(argv[1], argv[2]);
}

__attribute__((unused))
static int finish_checks(void)
{
	printf("1..%d\n", check_count);
	return check_failed != 0;
}

#endif
