// SPDX-License-Identifier: BSD-3-Clause
/*
 * life_check PEER PORT CLOSED LOOP NATIVE_HOST CYCLES - lives of sockets, and what they leave behind: nothing.
 *
 * For a guest with the module, run as root. Each claim lives one kind of life CYCLES times and then looks at the kernel's memory: the
 * slab caches that sockets are made of, all of unreclaimable slab, per-CPU memory, and /proc/net/hwsock, which must be empty. What is freed
 * after an RCU grace period or by the device's answer is waited for; what never comes back fails. With LIVES_UNCOUNTED in the environment only
 * /proc/net/hwsock is looked at: KASAN keeps freed objects for a while, and kmemleak knows better what is lost.
 *
 * PEER: tests/e2e/peer.py; CLOSED: a port of its that refuses; LOOP: a port that leads through the host to this guest's listener on
 * port 8080; NATIVE_HOST: an address that the policy does not name and the guest has no route to.
 */
#include "check.h"
#include <sched.h>

static struct addr peer, closed, loop, native;
static int cycles;

/* ------------------------------------------------------------------------------------------------------------- counting */

#define CACHES 256

struct count {
	int caches;
	struct { char name[32]; long objects, slack; } cache[CACHES];
	long unreclaimable, percpu;	/* KiB */
	int sockets;			/* lines of /proc/net/hwsock */
};

static long meminfo(const char *key)
{
	FILE *f = fopen("/proc/meminfo", "r");
	char line[128];
	long kib = -1;

	MUST(f);
	while (fgets(line, sizeof(line), f))
		if (!strncmp(line, key, strlen(key)))
			kib = atol(line + strlen(key));
	fclose(f);
	MUST(kib >= 0);
	return kib;
}

/* what is freed after a grace period waits seconds for company, unless memory is asked for */
static void reclaim(void)
{
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);

	MUST(fd >= 0 && write(fd, "2", 1) == 1);
	close(fd);
}

static void count(struct count *c)
{
	char line[512];
	FILE *f;

	reclaim();
	f = fopen("/proc/slabinfo", "r");
	memset(c, 0, sizeof(*c));
	MUST(f);
	while (c->caches < CACHES && fgets(line, sizeof(line), f)) {
		char *name = c->cache[c->caches].name;
		long active, per_slab;

		if (sscanf(line, "%31s %ld %*d %*d %ld", name, &active, &per_slab) != 3)
			continue;
		c->cache[c->caches].objects = active;
		/* slabs that processors and the node keep at hand count as if they were full */
		c->cache[c->caches].slack = 16 * per_slab;
		c->caches++;
	}
	fclose(f);
	c->unreclaimable = meminfo("SUnreclaim:");
	c->percpu = meminfo("Percpu:");
	f = fopen("/proc/net/hwsock", "r");
	MUST(f);
	for (c->sockets = -1; fgets(line, sizeof(line), f); c->sockets++)
		;
	fclose(f);
}

/* what grew by more than chance: in a run of any length that is a leak of more than one object in a hundred lives */
static const char *grown(const struct count *before, const struct count *after)
{
	static char what[256];

	if (after->sockets) {
		snprintf(what, sizeof(what), "%d sockets in /proc/net/hwsock", after->sockets);
		return what;
	}
	if (getenv("LIVES_UNCOUNTED"))
		return NULL;
	for (int i = 0; i < after->caches; i++) {
		const char *name = after->cache[i].name;
		long was = 0, is = after->cache[i].objects, slack = after->cache[i].slack;

		for (int j = 0; j < before->caches; j++)
			if (!strcmp(before->cache[j].name, name))
				was = before->cache[j].objects;
		if (is - was > slack + cycles / 100) {
			snprintf(what, sizeof(what), "%s: %ld objects became %ld (%ld are chance)", name, was, is, slack + cycles / 100);
			return what;
		}
	}
	if (after->unreclaimable - before->unreclaimable > 1024 + cycles / 20) {
		snprintf(what, sizeof(what), "SUnreclaim: %ld KiB became %ld", before->unreclaimable, after->unreclaimable);
		return what;
	}
	if (after->percpu - before->percpu > 64) {
		snprintf(what, sizeof(what), "Percpu: %ld KiB became %ld", before->percpu, after->percpu);
		return what;
	}
	return NULL;
}

/* live the life some times, so that caches are warm, then many times */
static void lives(void (*one)(int i))
{
	struct count before, after;
	const char *what = NULL;

	alarm(0);		/* as many as somebody asked for */
	for (int i = 0; i < 100; i++)
		one(i);
	count(&before);
	for (int i = 0; i < cycles; i++)
		one(i);
	for (int tries = 0; tries < 1200; tries++) {	/* a minute */
		count(&after);
		what = grown(&before, &after);
		if (!what)
			return;
		usleep(50000);
	}
	fail("%s", what);
}

/* --------------------------------------------------------------------------------------------------------------- lives */

static void connect_and_close(int i)
{
	(void)i;
	close(open_connected(&peer));
}

static void talk_and_close(int i)
{
	int fd = ask(&peer, "echo\nhello");
	char buf[5];

	recv_exactly(fd, buf, i & 1 ? 5 : 1);	/* with unread bytes: a reset */
	close(fd);
}

static void be_refused(int i)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	(void)i;
	ERRNO(connect(fd, (void *)&closed.ss, closed.len), ECONNREFUSED);
	close(fd);
}

static void go_native(int i)
{
	int fd = socket(AF_INET, SOCK_STREAM | (i & 1 ? SOCK_NONBLOCK : 0), 0);

	ERRNO(connect(fd, (void *)&native.ss, native.len), i & 1 ? EINPROGRESS : ENETUNREACH);
	close(fd);
}

static void give_up(int i)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

	(void)i;
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), EINPROGRESS);
	close(fd);
}

static void listen_accept_and_close(int i)
{
	static const struct linger reset = { 1, 0 };	/* the host shall not run out of ports */
	struct addr any = address("0.0.0.0", "8080");
	int l = socket(AF_INET, SOCK_STREAM, 0), c, s;

	(void)i;
	MUST(setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) == 0);
	MUST(bind(l, (void *)&any.ss, any.len) == 0 && listen(l, 5) == 0);
	c = open_connected(&loop);
	s = accept(l, NULL, NULL);
	MUST(s >= 0);
	MUST(setsockopt(c, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)) == 0);
	close(c);
	close(s);
	close(l);
}

static void leave_a_connection_unaccepted(int i)
{
	struct addr any = address("0.0.0.0", "8080");
	int l = socket(AF_INET, SOCK_STREAM, 0), c;

	(void)i;
	MUST(setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) == 0);
	MUST(bind(l, (void *)&any.ss, any.len) == 0 && listen(l, 5) == 0);
	c = open_connected(&loop);
	close(l);
	recv(c, &(char){0}, 1, 0);
	close(c);
}

static void exchange_datagrams(int i)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	if (i & 1) {
		MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
		SAME(send(fd, "x", 1, 0), 1);
	} else {
		SAME(sendto(fd, "x", 1, 0, (void *)&peer.ss, peer.len), 1);
	}
	if (i & 2)
		recv_exactly(fd, &(char){0}, 1);
	close(fd);
}

static void die_in_the_middle(int i)
{
	int status;
	pid_t pid = fork();

	(void)i;
	MUST(pid >= 0);
	if (pid == 0) {
		int fd = ask(&peer, "source 100000\n");

		recv_exactly(fd, &(char){0}, 1);
		raise(SIGKILL);
	}
	MUST(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
}

static void connections_leave_nothing_behind(void)
{
	lives(connect_and_close);
}

static void closed_and_reset_conversations_leave_nothing_behind(void)
{
	lives(talk_and_close);
}

static void refused_connects_leave_nothing_behind(void)
{
	lives(be_refused);
}

static void connects_that_became_native_leave_nothing_behind(void)
{
	lives(go_native);
}

static void connects_given_up_leave_nothing_behind(void)
{
	lives(give_up);
}

static void listeners_leave_nothing_behind(void)
{
	lives(listen_accept_and_close);
}

static void connections_nobody_accepted_leave_nothing_behind(void)
{
	lives(leave_a_connection_unaccepted);
}

static void datagram_sockets_leave_nothing_behind(void)
{
	lives(exchange_datagrams);
}

static void killed_programs_leave_nothing_behind(void)
{
	lives(die_in_the_middle);
}

int main(int argc, char **argv)
{
	if (argc != 7) {
		fprintf(stderr, "usage: life_check PEER PORT CLOSED LOOP NATIVE_HOST CYCLES\n");
		return 2;
	}
	peer = address(argv[1], argv[2]);
	closed = address(argv[1], argv[3]);
	loop = address(argv[1], argv[4]);
	native = address(argv[5], "80");
	cycles = atoi(argv[6]);
	C(connections_leave_nothing_behind);
	C(closed_and_reset_conversations_leave_nothing_behind);
	C(refused_connects_leave_nothing_behind);
	C(connects_that_became_native_leave_nothing_behind);
	C(connects_given_up_leave_nothing_behind);
	C(listeners_leave_nothing_behind);
	C(connections_nobody_accepted_leave_nothing_behind);
	C(datagram_sockets_leave_nothing_behind);
	C(killed_programs_leave_nothing_behind);
	return finish_checks();
}
