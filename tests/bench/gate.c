/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * gate - a fixed workload for the engine, to count what it costs: instructions and system calls. See gate.py.
 *
 * One thread makes the driver's part, the engine's turns and the host peers' part, one after another; the peers are socket pairs, since
 * a TCP of the kernel's own has timers. Each row does some of its work uncounted, and then a whole number of units. Under callgrind each row
 * is a dump of its own under its name; a line each goes to stdout: name units unit
 */
#include "vs_engine.c"

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "gate_driver.h"

enum { WARM = 4, BURST = 128 << 10, DGRAMS = 16, DGRAM = 1024 };

static uint8_t bytes[1 << 20];

/* ------------------------------------------------------------------------------------------------------------------ flows */

/* Python's part: the request's handle */
static uint64_t asked(uint32_t type)
{
	struct vse_event ev[4];
	int n;

	count_begin();
	n = vse_events(g.e, ev, 4);
	count_end();
	for (int i = 0; i < n; i++)
		if (ev[i].type == type)
			g.handle = ev[i].handle;
		else
			MUST(ev[i].type == VSE_EV_ENDED || ev[i].type == VSE_EV_HELLO || ev[i].type == VSE_EV_ACCEPTED);
	return g.handle;
}

static struct flow *opened(int type)
{
	struct flow *f = add_flow(++g.next_id);
	uint64_t handle;
	int ends[2], rc;

	say_open(f, VSO_CONNECT, type == SOCK_STREAM ? "tcp://10.0.0.1:80" : "udp://10.0.0.1:53");
	turns();
	handle = asked(VSE_EV_CONNECT);
	MUST(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends));
	f->host = ends[0];
	count_begin();
	rc = vse_connected(g.e, handle, ends[1], "tcp://10.0.0.2:40000", "tcp://10.0.0.1:80");
	count_end();
	MUST(!rc);
	turns();
	MUST(f->open);
	return f;
}

static void drain(struct flow *f, uint32_t len)
{
	for (uint32_t left = len; left;) {
		ssize_t n = recv(f->host, bytes, left, 0);

		/* what the socket did not take at first follows when it may */
		if (n < 0 && errno == EAGAIN) {
			turns();
			continue;
		}
		MUST(n > 0);
		left -= (uint32_t)n;
	}
}

static void fill(struct flow *f, uint32_t len)
{
	MUST(send(f->host, bytes, len, 0) == (ssize_t)len);
}

static void await(struct flow *f, uint32_t got)
{
	while (f->got != got) {
		uint32_t before = f->got;

		say_credit_if_due(f);
		turns();
		MUST(f->got != before);
	}
	say_credit_if_due(f);
}

/* the rows: one unit of work, or one step of several units, each */

static void out_bulk(void)		/* 128 KiB on each flow, in messages of 64 KiB that alternate */
{
	for (int i = 0; i < BURST >> 16; i++)
		for (uint32_t k = 0; k < g.nflows; k++)
			say_data(&g.flows[k], 1 << 16);
	turns();
	for (uint32_t k = 0; k < g.nflows; k++)
		drain(&g.flows[k], BURST);
}

static void out_small(void)		/* 32 KiB in messages of 1 KiB */
{
	for (int i = 0; i < 32; i++)
		say_data(&g.flows[(uint32_t)i % g.nflows], 1024);
	turns();
	for (uint32_t k = 0; k < g.nflows; k++)
		drain(&g.flows[k], 32768 / g.nflows);
}

static void in_bulk(void)		/* 128 KiB on each flow */
{
	uint32_t got[FLOWS];

	for (uint32_t k = 0; k < g.nflows; k++) {
		got[k] = g.flows[k].got + BURST;
		fill(&g.flows[k], BURST);
	}
	for (uint32_t k = 0; k < g.nflows; k++)
		await(&g.flows[k], got[k]);
}

static void in_small(void)		/* 1 KiB on each flow, which is seen before the next comes */
{
	uint32_t got[FLOWS];

	for (uint32_t k = 0; k < g.nflows; k++) {
		got[k] = g.flows[k].got + 1024;
		fill(&g.flows[k], 1024);
	}
	for (uint32_t k = 0; k < g.nflows; k++)
		await(&g.flows[k], got[k]);
}

static void round_trip(void)		/* 64 bytes there and back, on each flow */
{
	for (uint32_t k = 0; k < g.nflows; k++)
		say_data(&g.flows[k], 64);
	turns();
	for (uint32_t k = 0; k < g.nflows; k++) {
		drain(&g.flows[k], 64);
		fill(&g.flows[k], 64);
	}
	for (uint32_t k = 0; k < g.nflows; k++)
		await(&g.flows[k], g.flows[k].sent);
}

static void ended(struct flow *f)
{
	say_close(f);
	turns();
	asked(VSE_EV_ENDED);
	MUST(f->closed);
	close(f->host);
	g.nflows--;
}

static void connect_close(void)
{
	ended(opened(SOCK_STREAM));
}

static struct sockaddr_un listening;

static void accept_close(void)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct flow *f;

	MUST(fd >= 0 && !connect(fd, (struct sockaddr *)&listening, sizeof(listening)));
	turns();
	MUST(g.nflows == 2);
	f = &g.flows[1];
	f->host = fd;
	g.flows[0].got++;	/* a listener's window counts connections */
	say_credit(&g.flows[0]);
	say_credit(f);
	ended(f);
}

static void out_dgrams(void)
{
	static const struct vso_dgram head;
	struct flow *f = &g.flows[0];

	memcpy(bytes, &head, sizeof(head));
	for (int i = 0; i < DGRAMS; i++)
		say_vso(f, VSO_DGRAM, 0, bytes, sizeof(head) + DGRAM);
	turns();
	for (int i = 0; i < DGRAMS; i++) {
		struct pollfd one = { .fd = f->host, .events = POLLIN };

		MUST(poll(&one, 1, 10000) == 1 && recv(f->host, bytes, DGRAM, 0) == DGRAM);
	}
}

static int dgram_ours;			/* the engine's socket */

static void in_dgrams(void)
{
	struct flow *f = &g.flows[0];
	uint32_t want = g.dgrams + DGRAMS, memory[16];	/* SO_MEMINFO: the first is what the receive queue takes (linux/sock_diag.h) */
	uint32_t each = 0;

	for (uint32_t i = 1; i <= DGRAMS; i++) {
		MUST(send(f->host, bytes, DGRAM, 0) == DGRAM);
		/* all are there before the engine looks, however late the kernel delivers */
		do {
			MUST(!getsockopt(dgram_ours, SOL_SOCKET, SO_MEMINFO, memory, &(socklen_t){ sizeof(memory) }));
		} while (memory[0] < (each ? i * each : 1));
		each = each ? each : memory[0];
	}
	turns();
	MUST(g.dgrams == want);
}

/* ------------------------------------------------------------------------------------------------------------------- rows */

static void make_streams(uint32_t n)
{
	while (n--)
		opened(SOCK_STREAM);
}

static void make_dgrams(uint32_t n)
{
	struct sockaddr_in at[2] = { { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) } };
	struct flow *f = add_flow(++g.next_id);
	int fds[2];

	at[1] = at[0];
	for (int i = 0; i < 2; i++) {
		fds[i] = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
		MUST(fds[i] >= 0 && !bind(fds[i], (struct sockaddr *)&at[i], sizeof(at[i])));
		MUST(!getsockname(fds[i], (struct sockaddr *)&at[i], &(socklen_t){ sizeof(at[i]) }));
	}
	for (int i = 0; i < 2; i++)
		MUST(!connect(fds[i], (struct sockaddr *)&at[!i], sizeof(at[i])));
	say_open(f, VSO_CONNECT, "udp://10.0.0.1:53");
	turns();
	f->host = fds[0];
	dgram_ours = fds[1];
	MUST(!vse_connected(g.e, asked(VSE_EV_CONNECT), fds[1], "udp://10.0.0.2:40000", "udp://10.0.0.1:53"));
	turns();
	MUST(f->open);
}

static void make_listener(uint32_t n)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct flow *f = add_flow(++g.next_id);

	listening = (struct sockaddr_un){ .sun_family = AF_UNIX };
	/* an abstract name, of the same length for each process that runs this */
	snprintf(listening.sun_path + 1, sizeof(listening.sun_path) - 1, "vhostsock-gate-%08x", (unsigned)getpid());
	MUST(fd >= 0 && !bind(fd, (struct sockaddr *)&listening, sizeof(listening)));
	say_open(f, VSO_BIND, "tcp://0.0.0.0:80");
	turns();
	MUST(!vse_bound(g.e, asked(VSE_EV_BIND), fd, "tcp://0.0.0.0:80"));
	turns();
	MUST(f->open);
	say_vso(f, VSO_LISTEN, 128, NULL, 0);
	turns();
}

static const struct row {
	const char *name;
	bool vsock;
	void (*make)(uint32_t flows);
	uint32_t flows;
	void (*step)(void);
	uint32_t steps;
	double units;			/* of a step */
	const char *unit;
} rows[] = {
	{ "out, 64 KiB messages", 0, make_streams, 1, out_bulk, 64, 0.125, "MiB" },
	{ "out, 64 KiB messages, 8 flows", 0, make_streams, 8, out_bulk, 8, 1, "MiB" },
	{ "out, 1 KiB messages", 0, make_streams, 1, out_small, 32, 0.03125, "MiB" },
	{ "out, 1 KiB messages, 8 flows", 0, make_streams, 8, out_small, 32, 0.03125, "MiB" },
	{ "in, bulk", 0, make_streams, 1, in_bulk, 64, 0.125, "MiB" },
	{ "in, bulk, 8 flows", 0, make_streams, 8, in_bulk, 8, 1, "MiB" },
	{ "in, 1 KiB at a time", 0, make_streams, 1, in_small, 512, 1. / 1024, "MiB" },
	{ "in, 1 KiB at a time, 8 flows", 0, make_streams, 8, in_small, 64, 8. / 1024, "MiB" },
	{ "request and response", 0, make_streams, 1, round_trip, 256, 1, "round" },
	{ "request and response, 8 flows", 0, make_streams, 8, round_trip, 32, 8, "round" },
	{ "connect and close", 0, make_streams, 0, connect_close, 128, 1, "connection" },
	{ "accept and close", 0, make_listener, 1, accept_close, 128, 1, "connection" },
	{ "datagrams out", 0, make_dgrams, 1, out_dgrams, 32, DGRAMS, "datagram" },
	{ "datagrams in", 0, make_dgrams, 1, in_dgrams, 32, DGRAMS, "datagram" },
	{ "vsock: out, 64 KiB packets", 1, make_streams, 1, out_bulk, 64, 0.125, "MiB" },
	{ "vsock: out, 1 KiB packets", 1, make_streams, 1, out_small, 32, 0.03125, "MiB" },
	{ "vsock: in, bulk", 1, make_streams, 1, in_bulk, 64, 0.125, "MiB" },
	{ "vsock: in, 1 KiB at a time", 1, make_streams, 1, in_small, 512, 1. / 1024, "MiB" },
	{ "vsock: request and response", 1, make_streams, 1, round_trip, 256, 1, "round" },
	{ "vsock: request and response, 8 flows", 1, make_streams, 8, round_trip, 32, 8, "round" },
	{ "vsock: connect and close", 1, make_streams, 0, connect_close, 128, 1, "connection" },
};

int main(void)
{
	for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
		const struct row *row = &rows[i];

		set_up(row->vsock);
		row->make(row->flows);
		for (uint32_t k = 0; k < WARM; k++)
			row->step();
		g.counting = true;
		VALGRIND_PRINTF("gate: row %s\n", row->name);
		CALLGRIND_ZERO_STATS;
		for (uint32_t k = 0; k < row->steps; k++)
			row->step();
		g.counting = false;
		CALLGRIND_DUMP_STATS_AT(row->name);
		tear_down();
		printf("%s: %.6f %s\n", row->name, row->steps * row->units, row->unit);
	}
	return 0;
}
