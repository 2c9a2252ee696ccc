// SPDX-License-Identifier: BSD-3-Clause
/*
 * pages_check PEER PORT - pages of messages are used again, by whom they may be, and let go when nobody needs them; those of others are lent.
 *
 * For a guest with the module, run as root, when nobody else sends. The parameter `pages` of the module says what it keeps and used again, `lent`
 * what of others the device may read. PEER is tests/e2e/peer.py.
 */
#include "check.h"
#include <linux/errqueue.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>

enum { PIECE = 65536, PIECES = 128, LIVES = 100, TRIES = 5, KEPT_MOST = 64 };

static struct addr peer;
static uint8_t piece[PIECE];

/* of one direction, from the line that begins with its name */
struct pages { long kept, again, fresh; };

static struct pages pages(const char *way)
{
	FILE *f = fopen("/sys/module/virtio_socket/parameters/pages", "r");
	struct pages p = { -1, -1, -1 };
	char name[8];
	long kept, again, fresh;

	MUST(f);
	while (fscanf(f, "%7s kept %ld again %ld fresh %ld", name, &kept, &again, &fresh) == 4)
		if (!strcmp(name, way))
			p = (struct pages){ kept, again, fresh };
	fclose(f);
	MUST(p.kept >= 0);
	return p;
}

/* ---------------------------------------------------------------------------------------------------------------- cgroups */

static const char *folder;

static FILE *control(const char *group, const char *file, const char *mode)
{
	char path[128];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s/%s", folder, group, file);
	f = fopen(path, mode);
	if (!f)
		fail("%s: %s", path, strerror(errno));
	return f;
}

static void put(const char *group, const char *file, const char *value)
{
	FILE *f = control(group, file, "w");

	MUST(fputs(value, f) >= 0);
	MUST(fclose(f) == 0);
}

static void make_group(const char *group)
{
	char path[64];

	snprintf(path, sizeof(path), "%s/%s", folder, group);
	MUST(mkdir(path, 0755) == 0 || errno == EEXIST);
}

static void with_cgroups(void)
{
	static char name[] = "/tmp/pages.XXXXXX";

	folder = mkdtemp(name);
	MUST(folder && mount("none", folder, "cgroup2", 0, NULL) == 0);
	put(".", "cgroup.subtree_control", "+memory");
}

static long charged(const char *group)
{
	FILE *f = control(group, "memory.current", "r");
	long bytes;

	MUST(fscanf(f, "%ld", &bytes) == 1);
	fclose(f);
	return bytes;
}

/* ------------------------------------------------------------------------------------------------------------------ claims */

/* what the peer has counted */
static void all_came(int fd, long sent)
{
	char answer[64];

	sink_says(fd, answer, sizeof(answer));
	SAME(atol(answer), sent);
	close(fd);
}

static void pages_that_were_sent_are_used_again(void)
{
	struct pages before = pages("out"), after;
	int fd = ask(&peer, "sink\n");

	for (int i = 0; i < PIECES; i++)
		send_all(fd, piece, sizeof(piece));
	all_came(fd, (long)PIECES * PIECE);
	after = pages("out");
	MUST(after.again - before.again > after.fresh - before.fresh);
	MUST(after.kept <= KEPT_MOST);
}

static void pages_that_were_read_are_used_again(void)
{
	struct pages before = pages("in"), after;
	char line[32];
	int fd;

	snprintf(line, sizeof(line), "source %d\n", PIECES * PIECE);
	fd = ask(&peer, line);
	for (int i = 0; i < PIECES; i++) {
		recv_exactly(fd, piece, sizeof(piece));
		for (int j = 0; j < PIECE; j++)
			if (piece[j] != pattern((uint64_t)i * PIECE + j))
				fail("byte %d of piece %d is %d", j, i, piece[j]);
	}
	after = pages("in");
	MUST(after.again - before.again > after.fresh - before.fresh);
	MUST(after.kept <= KEPT_MOST);
}

static struct lent { long now, ever; } lent(void)
{
	FILE *f = fopen("/sys/module/virtio_socket/parameters/lent", "r");
	struct lent lent;

	MUST(f && fscanf(f, "now %ld ever %ld", &lent.now, &lent.ever) == 2);
	fclose(f);
	return lent;
}

/* they are collected with what is sent next, or by the watchdog */
static void await_all_given_back(void)
{
	while (lent().now)
		poll(NULL, 0, 10);
}

static void pages_of_a_file_are_lent_and_given_back(void)
{
	int fd = ask(&peer, "sink\n"), file = memfd_create("lent", 0);
	long before = lent().ever;

	for (int i = 0; i < PIECES; i++)
		MUST(write(file, piece, sizeof(piece)) == sizeof(piece));
	for (off_t at = 0; at < (off_t)PIECES * PIECE; )
		MUST(sendfile(fd, file, &at, (size_t)PIECES * PIECE - at) > 0);
	MUST(lent().ever - before >= (long)PIECES * PIECE / getpagesize() / 2);
	all_came(fd, (long)PIECES * PIECE);
	await_all_given_back();
}

/* from the notification alone, which must come though nothing more is sent */
static void what_is_sent_zero_copy_is_lent_until_it_is_notified_of(void)
{
	char control[256];
	struct msghdr m = { .msg_control = control, .msg_controllen = sizeof(control) };
	struct sock_extended_err *e;
	int fd = ask(&peer, "sink\n");
	long before;

	await_all_given_back();
	before = lent().ever;
	MUST(setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &(int){1}, sizeof(int)) == 0);
	SAME(send(fd, piece, sizeof(piece), MSG_ZEROCOPY), sizeof(piece));
	MUST(lent().ever - before >= PIECE / getpagesize());
	MUST(wait_for(fd, 0) & POLLERR);
	SAME(lent().now, 0);
	SAME(recvmsg(fd, &m, MSG_ERRQUEUE), 0);
	e = (void *)CMSG_DATA(CMSG_FIRSTHDR(&m));
	SAME(e->ee_origin, SO_EE_ORIGIN_ZEROCOPY);
	SAME(e->ee_code, 0);		/* not SO_EE_CODE_ZEROCOPY_COPIED */
	all_came(fd, PIECE);
}

/* a program of @group sends one piece. Return: pages that were used again for it; -1: none were kept */
static long sent_by(const char *group)
{
	int way[2];
	long again = -2;
	pid_t pid;

	make_group(group);
	MUST(pipe(way) == 0);
	pid = fork();
	MUST(pid >= 0);
	if (!pid) {
		struct pages before, after;
		int fd;

		put(group, "cgroup.procs", "0");
		fd = ask(&peer, "sink\n");
		before = pages("out");
		send_all(fd, piece, sizeof(piece));
		after = pages("out");
		again = before.kept ? after.again - before.again : -1;
		all_came(fd, PIECE);
		MUST(write(way[1], &again, sizeof(again)) == sizeof(again));
		_exit(0);
	}
	close(way[1]);
	MUST(read(way[0], &again, sizeof(again)) == sizeof(again));
	close(way[0]);
	MUST(waitpid(pid, NULL, 0) == pid);
	return again;
}

/* a page stays charged to the cgroup that it was sent by */
static void a_page_is_used_again_by_its_cgroup_alone(void)
{
	char group[24];
	long again;
	int others = 0;

	with_cgroups();
	while (others < TRIES) {
		sent_by("own");		/* so that some are kept */
		snprintf(group, sizeof(group), "other%d", others);
		again = sent_by(group);
		others += again != -1;	/* or the watchdog has let them go meanwhile */
		if (again != -1)
			SAME(again, 0);
	}
	do
		sent_by("own");
	while (sent_by("own") < 1);
}

static uint8_t mine(int who, size_t i)
{
	return pattern(i) ^ (uint8_t)(who * 0x55 + 1);
}

/* what it sends comes back, by writes of all sizes */
static void echoes(int who)
{
	static uint8_t out[1 << 20], in[1 << 20];
	size_t sent = 0, got = 0;
	unsigned int size = 1 + who;
	int fd = ask(&peer, "echo\n");

	for (size_t i = 0; i < sizeof(out); i++)
		out[i] = mine(who, i);
	while (got < sizeof(in)) {
		struct pollfd p = { .fd = fd, .events = POLLIN | (sent < sizeof(out) ? POLLOUT : 0) };
		ssize_t n;

		MUST(poll(&p, 1, -1) == 1);
		if (p.revents & POLLOUT) {
			size = (size * 5 + 7) % 70000 + 1;
			n = send(fd, out + sent, sent + size > sizeof(out) ? sizeof(out) - sent : size, MSG_DONTWAIT | MSG_NOSIGNAL);
			MUST(n > 0 || errno == EAGAIN);
			sent += n > 0 ? n : 0;
		}
		if (p.revents & POLLIN) {
			n = recv(fd, in + got, sizeof(in) - got, 0);
			MUST(n > 0);
			got += n;
		}
	}
	for (size_t i = 0; i < sizeof(in); i++)
		if (in[i] != out[i])
			fail("byte %zu of program %d is %d, not %d", i, who, in[i], out[i]);
}

static void what_programs_say_at_once_is_not_mixed(void)
{
	static const char * const group[] = { "one", "one", "two", "two" };
	int status;

	with_cgroups();
	for (int who = 0; who < 4; who++) {
		make_group(group[who]);
		if (fork())
			continue;
		put(group[who], "cgroup.procs", "0");
		echoes(who);
		_exit(0);
	}
	while (wait(&status) > 0)
		SAME(status, 0);
}

static void what_a_cgroup_was_charged_comes_back(void)
{
	long before = 0, after = 0;

	with_cgroups();
	make_group("own");
	put("own", "cgroup.procs", "0");
	for (int i = -1; i < LIVES; i++) {
		int fd = ask(&peer, i % 2 ? "hold\n" : "sink\n");

		send_all(fd, piece, sizeof(piece));
		send_all(fd, piece, sizeof(piece));
		close(fd);
		if (i < 0)
			before = charged("own");
	}
	for (;;) {	/* until the alarm: pages that are kept go at a tick, and the kernel counts by batches */
		after = charged("own");
		if (after <= before + (1 << 20))
			return;
		usleep(50000);
	}
}

static void nothing_is_kept_when_nobody_sends(void)
{
	while (pages("out").kept || pages("in").kept)
		usleep(50000);
}

int main(int argc, char **argv)
{
	peer = only_peer(argc, argv);
	for (size_t i = 0; i < sizeof(piece); i++)
		piece[i] = pattern(i);
	C(pages_that_were_sent_are_used_again);
	C(pages_that_were_read_are_used_again);
	C(pages_of_a_file_are_lent_and_given_back);
	C(what_is_sent_zero_copy_is_lent_until_it_is_notified_of);
	C(a_page_is_used_again_by_its_cgroup_alone);
	C(what_programs_say_at_once_is_not_mixed);
	C(what_a_cgroup_was_charged_comes_back);
	C(nothing_is_kept_when_nobody_sends);
	return finish_checks();
}
