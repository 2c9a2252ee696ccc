// SPDX-License-Identifier: BSD-3-Clause
/*
 * window_check PEER PORT - the receive window of a stream: it grows for who reads what fills it, and for nobody else.
 *
 * For a guest with the module, run as root. `hwsock-window` in fdinfo says what a window is. PEER is tests/e2e/peer.py.
 */
#include "check.h"

enum { WINDOW = 512 << 10, MOST = 2 << 20, FLOWS = 8, SHARE = 32 };

#define MODERATE "/proc/sys/net/ipv4/tcp_moderate_rcvbuf"

static struct addr peer;
static char buf[256 << 10];

static long number_after(const char *path, const char *key)
{
	FILE *f = fopen(path, "r");
	char line[256];
	long found = -1;

	MUST(f);
	while (found < 0 && fgets(line, sizeof(line), f))
		if (!strncmp(line, key, strlen(key)))
			found = atol(line + strlen(key));
	fclose(f);
	MUST(found >= 0);
	return found;
}

static long window(int fd)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	return number_after(path, "hwsock-window:");
}

static void get(int fd, size_t bytes)
{
	while (bytes) {
		ssize_t n = recv(fd, buf, bytes < sizeof(buf) ? bytes : sizeof(buf), 0);

		MUST(n > 0);
		bytes -= n;
	}
}

/* how fast this machine is nobody knows: it reads until the window has grown, and the alarm says that it never does */
static int grown_flow(void)
{
	int fd;

	for (;;) {
		fd = ask(&peer, "source 8388608\n");
		for (int i = 0; i < 7; i++) {
			get(fd, 1 << 20);
			if (window(fd) > WINDOW)
				return fd;
		}
		close(fd);
	}
}

static void a_window_grows_for_who_reads_what_fills_it(void)
{
	int fd = grown_flow();

	get(fd, 1 << 20);
	MUST(window(fd) <= MOST);
}

static void a_window_that_nobody_reads_does_not_grow(void)
{
	int fd = ask(&peer, "source 4194304\n"), queued = 0;

	while (queued < WINDOW) {
		MUST(ioctl(fd, FIONREAD, &queued) == 0);
		usleep(10000);
	}
	SAME(queued, WINDOW);
	SAME(window(fd), WINDOW);
}

static void one_that_the_program_has_chosen_stays(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0), half = 64 << 10, set;
	socklen_t len = sizeof(set);

	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &half, sizeof(half)) == 0);
	MUST(getsockopt(fd, SOL_SOCKET, SO_RCVBUF, &set, &len) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	send_all(fd, "source 4194304\n", 15);
	for (int i = 0; i < 4; i++) {
		get(fd, 1 << 20);
		SAME(window(fd), set);
	}
}

static void one_that_the_program_chooses_later_is_that(void)
{
	int fd = grown_flow(), half = 64 << 10, set;
	socklen_t len = sizeof(set);

	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &half, sizeof(half)) == 0);
	MUST(getsockopt(fd, SOL_SOCKET, SO_RCVBUF, &set, &len) == 0);
	get(fd, 1);		/* before Linux 6.8 the module hears of it with the next call */
	SAME(window(fd), set);
	get(fd, 512 << 10);
	SAME(window(fd), set);
}

static void moderate(const char *on)
{
	FILE *f = fopen(MODERATE, "w");

	MUST(f && fputs(on, f) >= 0 && fclose(f) == 0);
}

static void none_grows_when_the_system_says_so(void)
{
	int fd;

	moderate("0");
	fd = ask(&peer, "source 4194304\n");
	for (int i = 0; i < 4; i++) {
		get(fd, 1 << 20);
		if (window(fd) != WINDOW) {
			moderate("1");
			fail("it is %ld", window(fd));
		}
	}
	moderate("1");
}

static void all_together_are_bounded(void)
{
	long share = (number_after("/proc/meminfo", "MemTotal:") << 10) / SHARE, more = 0;
	int fds[FLOWS];

	for (int i = 0; i < FLOWS; i++)
		fds[i] = ask(&peer, "source 4194304\n");
	for (int round = 0; round < 4; round++) {
		more = 0;
		for (int i = 0; i < FLOWS; i++) {
			get(fds[i], 1 << 20);
			more += window(fds[i]) - WINDOW;
		}
		MUST(more <= share);
	}
}

static void who_does_not_need_it_any_more_gives_it_back(void)
{
	int fd = grown_flow(), queued;

	do	/* all that the peer sends, so that nothing waits */
		MUST(recv(fd, buf, sizeof(buf), 0) >= 0);
	while (ioctl(fd, FIONREAD, &queued) == 0 && queued);
	while (window(fd) != WINDOW) {
		if (recv(fd, buf, sizeof(buf), MSG_DONTWAIT) < 0)
			MUST(errno == EAGAIN);
		usleep(10000);
	}
}

int main(int argc, char **argv)
{
	peer = only_peer(argc, argv);
	C(a_window_grows_for_who_reads_what_fills_it);
	C(a_window_that_nobody_reads_does_not_grow);
	C(one_that_the_program_has_chosen_stays);
	C(one_that_the_program_chooses_later_is_that);
	C(none_grows_when_the_system_says_so);
	C(all_together_are_bounded);
	C(who_does_not_need_it_any_more_gives_it_back);
	return finish_checks();
}
