// SPDX-License-Identifier: BSD-3-Clause
/*
 * look_check PEER PORT - who waits looks at the ring before sleeping, and for who waits elsewhere an idle processor does.
 *
 * For a guest with the module, run as root; PEER is tests/e2e/peer.py. What depends on whether something else in the guest wanted the processor is tried until it did not.
 */
#include "check.h"
#include <ctype.h>
#include <dirent.h>
#include <sched.h>
#include <sys/resource.h>
#include <time.h>

enum { ROUNDS = 100, DEFAULT_US = 200, LONG_US = 1000000 };

#define POLL_US "/sys/module/virtio_socket/parameters/poll_us"

static struct addr peer;

static void look_for(int microseconds)
{
	FILE *f = fopen(POLL_US, "w");

	MUST(f && fprintf(f, "%d", microseconds) > 0 && fclose(f) == 0);
}

/* of this process, in nanoseconds */
static long long cpu_time(void)
{
	struct timespec t;

	MUST(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t) == 0);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void busy_poll(int fd, int microseconds)
{
	MUST(setsockopt(fd, SOL_SOCKET, SO_BUSY_POLL, &microseconds, sizeof(microseconds)) == 0);
}

/* tries until nothing else in the guest wanted the processor meanwhile: who looks gives way */
static void busy_poll_looks_before_it_sleeps(void)
{
	struct timeval soon = { .tv_usec = 1000 };
	int fd = ask(&peer, "hold\n");
	long long took;
	char c;

	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &soon, sizeof(soon)) == 0);
	busy_poll(fd, 50000);
	do {
		took = cpu_time();
		ERRNO(recv(fd, &c, 1, 0), EAGAIN);
		took = cpu_time() - took;
	} while (took < 25000000);
	busy_poll(fd, 0);
	do {
		took = cpu_time();
		ERRNO(recv(fd, &c, 1, 0), EAGAIN);
		took = cpu_time() - took;
	} while (took > 5000000);
}

static void nothing(int number)
{
	(void)number;
}

static void bytes_and_signals_end_a_look(void)
{
	struct itimerspec often = { .it_interval.tv_nsec = 20000000, .it_value.tv_nsec = 20000000 };
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1 };
	struct sigaction action = { .sa_handler = nothing };
	int fd = ask(&peer, "echo\n");
	timer_t timer;
	char c;

	busy_poll(fd, 2000000000);
	send_all(fd, "x", 1);
	recv_exactly(fd, &c, 1);
	SAME(c, 'x');
	ERRNO(recv(fd, &c, 1, MSG_DONTWAIT), EAGAIN);
	MUST(sigaction(SIGUSR1, &action, NULL) == 0);
	MUST(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0 && timer_settime(timer, 0, &often, NULL) == 0);
	ERRNO(recv(fd, &c, 1, 0), EINTR);
}

/* the device's calls that came as interrupts, of whatever device */
static long long interrupts(void)
{
	FILE *f = fopen("/proc/interrupts", "r");
	long long sum = 0, n;
	char line[4096];

	MUST(f);
	while (fgets(line, sizeof(line), f)) {
		char *at = strchr(line, ':'), *end;

		if (!at || !strstr(line, "virtio"))
			continue;
		for (at++; n = strtoll(at, &end, 10), end != at; at = end)
			sum += n;
	}
	fclose(f);
	return sum;
}

/* what the looking tasks of all processors did: time that they had, and how often they were let run */
struct looked { double seconds; long times; };

static FILE *of_task(const char *pid, const char *file)
{
	char path[300];

	snprintf(path, sizeof(path), "/proc/%s/%s", pid, file);
	return fopen(path, "r");
}

static struct looked looked(void)
{
	struct looked all = { 0 };
	struct dirent *entry;
	DIR *proc = opendir("/proc");
	int tasks = 0;

	MUST(proc);
	while ((entry = readdir(proc))) {
		char line[1024], *at;
		unsigned long ticks;
		FILE *f;

		if (!isdigit((unsigned char)entry->d_name[0]) || !(f = of_task(entry->d_name, "stat")))
			continue;
		at = fgets(line, sizeof(line), f);
		fclose(f);
		if (!at || !strstr(line, "(vso-idle/"))
			continue;
		/* behind the name: the state and 11 numbers, then utime and stime */
		MUST(sscanf(strrchr(line, ')') + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %lu", &ticks) == 1);
		all.seconds += (double)ticks / sysconf(_SC_CLK_TCK);
		f = of_task(entry->d_name, "status");
		MUST(f);
		while (fgets(line, sizeof(line), f))
			if ((at = strstr(line, "ctxt_switches:")))
				all.times += atol(strchr(at, ':') + 1);
		fclose(f);
		tasks++;
	}
	closedir(proc);
	SAME(tasks, sysconf(_SC_NPROCESSORS_ONLN));
	return all;
}

static long switches(void)
{
	struct rusage usage;

	MUST(getrusage(RUSAGE_SELF, &usage) == 0);
	return usage.ru_nvcsw;
}

static void who_waits_for_an_answer_does_not_sleep(void)
{
	int fd = ask(&peer, "echo\n");
	long slept;
	char c;

	look_for(LONG_US);
	do {
		slept = switches();
		for (int i = 0; i < ROUNDS; i++) {
			send_all(fd, "x", 1);
			recv_exactly(fd, &c, 1);
			SAME(c, 'x');
		}
		slept = switches() - slept;
	} while (slept > ROUNDS / 4);
}

/* a connection to @what that epoll watches, and that does not block */
static int watched(const char *what, int *ep)
{
	struct epoll_event event = { .events = EPOLLIN };
	int fd = ask(&peer, what);

	*ep = epoll_create1(0);
	MUST(*ep >= 0 && fcntl(fd, F_SETFL, O_NONBLOCK) == 0 && epoll_ctl(*ep, EPOLL_CTL_ADD, fd, &event) == 0);
	return fd;
}

static void rounds_by_epoll(int ep, int fd)
{
	struct epoll_event event;
	char c;

	for (int i = 0; i < ROUNDS; i++) {
		send_all(fd, "x", 1);
		SAME(epoll_wait(ep, &event, 1, -1), 1);
		SAME(recv(fd, &c, 1, 0), 1);
		SAME(c, 'x');
		ERRNO(recv(fd, &c, 1, 0), EAGAIN);
	}
}

static void for_who_waits_in_epoll_the_processor_looks(void)
{
	int ep, fd = watched("echo\n", &ep);
	long long called;

	look_for(LONG_US);
	do {
		called = interrupts();
		rounds_by_epoll(ep, fd);
		called = interrupts() - called;
	} while (called > ROUNDS / 4);
	MUST(looked().times > 0);
}

static void nobody_looks_when_told_not_to(void)
{
	int ep, fd = watched("echo\n", &ep);
	struct looked before;
	long long called;

	look_for(0);
	do {	/* one that began before that may have its time left */
		before = looked();
		called = interrupts();
		rounds_by_epoll(ep, fd);
	} while (looked().times != before.times || interrupts() == called);
}

static void a_connect_that_does_not_wait_is_looked_for(void)
{
	struct epoll_event event = { .events = EPOLLOUT };
	struct looked before;
	int ep = epoll_create1(0), error;
	socklen_t len = sizeof(error);

	look_for(LONG_US);
	before = looked();
	do {
		int fd = socket(peer.ss.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);

		ERRNO(connect(fd, (void *)&peer.ss, peer.len), EINPROGRESS);
		MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event) == 0);
		SAME(epoll_wait(ep, &event, 1, -1), 1);
		MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
		SAME(error, 0);
		close(fd);
	} while (looked().times == before.times);
}

/* who asks stays where it asked: elsewhere that processor would be idle, rightly look, and nobody would end its look by the next one */
static void stay_on_one_processor(void)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(0, &one);
	MUST(sched_setaffinity(0, sizeof(one), &one) == 0);
}

/* the look has its whole time left, and no answer comes */
static void a_program_that_works_is_not_kept_from_it(void)
{
	int ep, fd = watched("hold\n", &ep);
	struct looked before;
	long long end;

	stay_on_one_processor();
	look_for(100 * LONG_US);
	do {
		send_all(fd, "x", 1);
		before = looked();
		for (end = cpu_time() + 200000000; cpu_time() < end;)
			;
	} while (looked().seconds - before.seconds > 0.05);
}

static void looks_that_find_nothing_are_left_out(void)
{
	int ep, fd = watched("hold\n", &ep);
	struct epoll_event event;
	struct looked before;

	stay_on_one_processor();
	look_for(500);
	before = looked();
	for (int i = 0; i < ROUNDS; i++) {
		send_all(fd, "x", 1);
		SAME(epoll_wait(ep, &event, 1, 20), 0);		/* a look is over before the next send, also where a processor is slow */
	}
	MUST(looked().times - before.times < ROUNDS / 2);
}

int main(int argc, char **argv)
{
	peer = only_peer(argc, argv);
	C(busy_poll_looks_before_it_sleeps);
	C(bytes_and_signals_end_a_look);
	C(who_waits_for_an_answer_does_not_sleep);
	C(for_who_waits_in_epoll_the_processor_looks);
	C(nobody_looks_when_told_not_to);
	C(a_connect_that_does_not_wait_is_looked_for);
	C(a_program_that_works_is_not_kept_from_it);
	C(looks_that_find_nothing_are_left_out);
	look_for(DEFAULT_US);
	return finish_checks();
}
