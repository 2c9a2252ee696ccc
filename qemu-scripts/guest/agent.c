// SPDX-License-Identifier: BSD-3-Clause
/*
 * agent.c - runs the host's commands in the guest, over a virtio-serial port, apart from the console.
 *
 * The host sends requests at any time, many at once; each is answered when its command has ended, in whatever order they end:
 *
 *	request:	<id> <limit> <command length> <input length>\n  command  input
 *	answer:		<id> <status> <output length> <errors length>\n  output  errors
 *
 * `limit` is in milliseconds. The command is run by /bin/sh -c in a process group of its own, its standard input is `input`. `status` is
 * what a shell would show: the exit code, or 128 + the signal's number; past its limit the group is killed (137). What the command left
 * running in the background goes on; only its output up to the end of the command itself is told.
 *
 * States of the port: while nobody is connected on the host side the driver answers read() with 0 and poll() with POLLHUP at once, so we
 * look again every 50 ms. QEMU takes nothing from the host's socket before we have opened the port, so no request is ever lost. A host that
 * goes away in the middle of a request leaves a part of it here, which must not be taken for the start of the next host's: drop it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_JOBS = 64, HEADER_MAX = 96, DATA_MAX = 64 << 20 };

struct job {
	pid_t pid;		/* 0: free */
	unsigned long id;
	long long deadline;	/* ms, monotonic */
	int out, err;		/* memfds that collect */
};

static struct job jobs[MAX_JOBS];

static void die(const char *what)
{
	fprintf(stderr, "agent: %s: %s\n", what, strerror(errno));
	exit(1);
}

static long long now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* Reads exactly n bytes; false when the host went away. */
static bool read_full(int fd, char *buf, size_t n)
{
	while (n) {
		ssize_t got = read(fd, buf, n);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			die("read from the port");
		if (got == 0)
			return false;
		buf += got;
		n -= got;
	}
	return true;
}

static void write_full(int fd, const char *buf, size_t n)
{
	while (n) {
		ssize_t put = write(fd, buf, n);

		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0 && (errno == EPIPE || errno == EAGAIN))
			return;		/* the host is gone, and with it the wish for this answer */
		if (put < 0)
			die("write to the port");
		buf += put;
		n -= put;
	}
}

static int collector(void)
{
	int fd = memfd_create("agent", 0);

	if (fd < 0)
		die("memfd_create");
	return fd;
}

static void answer(int port, unsigned long id, int status, int out, int err)
{
	struct stat so, se;
	char *text;
	int n;

	if (fstat(out, &so) || fstat(err, &se))
		die("fstat");
	text = malloc(HEADER_MAX + so.st_size + se.st_size);
	if (!text)
		die("malloc");
	n = snprintf(text, HEADER_MAX, "%lu %d %lld %lld\n", id, status, (long long)so.st_size, (long long)se.st_size);
	if (pread(out, text + n, so.st_size, 0) != so.st_size || pread(err, text + n + so.st_size, se.st_size, 0) != se.st_size)
		die("pread");
	write_full(port, text, n + so.st_size + se.st_size);
	free(text);
}

static void start(int port, unsigned long id, long limit, char *command, const char *input, size_t input_len)
{
	int in = collector(), out = collector(), err = collector();
	struct job *job = jobs;

	while (job < jobs + MAX_JOBS && job->pid)
		job++;
	if (job == jobs + MAX_JOBS) {
		dprintf(err, "agent: %d commands are running already\n", MAX_JOBS);
		answer(port, id, 126, out, err);
		close(in), close(out), close(err);
		return;
	}
	write_full(in, input, input_len);
	lseek(in, 0, SEEK_SET);
	*job = (struct job){ .id = id, .deadline = now_ms() + limit, .out = out, .err = err };
	job->pid = fork();
	if (job->pid < 0)
		die("fork");
	if (job->pid == 0) {
		sigset_t none;

		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		setpgid(0, 0);
		dup2(in, 0), dup2(out, 1), dup2(err, 2);
		closefrom(3);
		execl("/bin/sh", "sh", "-c", command, (char *)NULL);
		_exit(127);
	}
	setpgid(job->pid, job->pid);
	close(in);
}

/* Reads one request and starts it; false when the host went away meanwhile. */
static bool request(int port)
{
	char header[HEADER_MAX], *command, *input;
	unsigned long id, command_len, input_len;
	size_t n = 0;
	long limit;
	bool ok;

	do {
		if (n == sizeof(header) - 1 || !read_full(port, header + n, 1))
			return false;
	} while (header[n++] != '\n');
	header[n] = 0;
	if (sscanf(header, "%lu %ld %lu %lu", &id, &limit, &command_len, &input_len) != 4 || command_len > DATA_MAX || input_len > DATA_MAX) {
		fprintf(stderr, "agent: no request: %s", header);
		return false;
	}
	command = calloc(1, command_len + 1);
	input = malloc(input_len + 1);
	if (!command || !input)
		die("malloc");
	ok = read_full(port, command, command_len) && read_full(port, input, input_len);
	if (ok)
		start(port, id, limit, command, input, input_len);
	free(command);
	free(input);
	return ok;
}

static void reap(int port)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		for (struct job *job = jobs; job < jobs + MAX_JOBS; job++) {
			if (job->pid != pid)
				continue;
			answer(port, job->id, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), job->out, job->err);
			close(job->out), close(job->err);
			job->pid = 0;
		}
	}
}

int main(int argc, char **argv)
{
	struct signalfd_siginfo info;
	int port, children;
	sigset_t set;

	if (argc != 2) {
		fprintf(stderr, "usage: agent PORT\n");
		return 2;
	}
	port = open(argv[1], O_RDWR | O_CLOEXEC);
	if (port < 0)
		die(argv[1]);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	children = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (children < 0)
		die("signalfd");

	for (;;) {
		struct pollfd fds[] = { { children, POLLIN, 0 }, { port, POLLIN, 0 } };
		long long wait = -1, now = now_ms();

		for (struct job *job = jobs; job < jobs + MAX_JOBS; job++) {
			if (!job->pid)
				continue;
			if (job->deadline <= now) {
				kill(-job->pid, SIGKILL);
				job->deadline = now + 1000;
			}
			if (wait < 0 || job->deadline - now < wait)
				wait = job->deadline - now;
		}
		if (poll(fds, 2, wait > 1000000 ? 1000000 : (int)wait) < 0 && errno != EINTR)
			die("poll");
		if (fds[0].revents) {
			while (read(children, &info, sizeof(info)) > 0)
				;
			reap(port);
		}
		if ((fds[1].revents & POLLIN) && request(port))
			continue;
		if (fds[1].revents & (POLLIN | POLLHUP))
			poll(fds, 1, 50);	/* nobody is connected; children are still served */
	}
}
