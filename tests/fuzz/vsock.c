/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vsock - the engine's vsock dialect against a driver, host peers and a Python that do anything that each can.
 *
 * There is no thread: the target is compiled together with vs_engine.c and makes its turns itself, so an input always does the same.
 * The input is a list of steps: packets with any field wrong, buffers posted, answers to events (also late and twice), connections of the
 * host, bytes, EOFs and resets of host peers, a reset. The first bytes say whether ports of the host lead somewhere without asking: to a
 * listener of Unix or TCP, to nobody, or beside a path (vs_route.c). After each turn:
 *
 *	- no chain stays popped; flows, bytes held and queued packets are within their bounds
 *	- what comes to the driver is a whole packet with an op that a device sends, from the host to the guest
 *	- at the end no region is mapped and no descriptor open
 */
#include "vs_engine.c"

#include <stddef.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/un.h>

#include "fuzz.h"
#include "vs_vq_priv.h"

enum {
	CID = 5, NUM = 16, RAM = 1 << 20, GPA = 0x100000, RING = 0x1000, AVAIL = 0x200, USED = 0x400,	/* ring r is at r * RING */
	TX = 0x10000, TX_SIZE = 0x2000, RX = 0x80000, RX_SIZE = 0x1100, PEERS = 12, EVENTS = 16, MAX_FLOWS = 5, BUF = 4096
};

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

static uint8_t *ram;
static int ram_fd;

/* where routed ports lead, for as long as the process lives; connections to both are the host's peers */
enum { ASKED = 52, TO_UNIX, BESIDE_PATH, TO_TCP, TO_NOBODY, TO_NO_FILE };

static int listeners[2];
static struct sockaddr_in listens, refuses;
static struct sockaddr_un found, missing;
static char folder[40] = "/tmp/vhostsock-fuzz-XXXXXX", path[48];

static struct {
	struct vse_engine *e;
	struct ring { struct vs_vq *vq; int kick; uint16_t avail, used; uint32_t base; } rings[2];
	struct vs_mem *mem;
	int peers[PEERS];		/* host ends, -1: none */
	uint64_t asked[EVENTS], handle;	/* requests of the engine with their types, answered or not; the last call's handle */
	bool seq[EVENTS];
	unsigned nasked;
	uint32_t called;		/* the host's port of the last call that the driver heard of */
	bool routed;
} s;

static int bound(void *at, socklen_t len)
{
	int fd = socket(((struct sockaddr *)at)->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	MUST(fd >= 0 && !bind(fd, at, len), "no address");
	getsockname(fd, at, &len);
	return fd;
}

static void tidy(void)
{
	unlink(found.sun_path);
	unlink(strcat(path, "_54"));
	rmdir(folder);
}

static void make_listeners(void)
{
	const char *given = getenv("FUZZ_FOLDER");	/* which the caller removes, also when we are aborted */
	char beside[sizeof(found.sun_path)];

	if (given)
		snprintf(folder, sizeof(folder), "%s", given);
	else
		MUST(mkdtemp(folder), "no folder");
	snprintf(path, sizeof(path), "%s/v", folder);
	snprintf(beside, sizeof(beside), "%s_%d", path, BESIDE_PATH);
	found.sun_family = missing.sun_family = AF_UNIX;
	snprintf(found.sun_path, sizeof(found.sun_path), "%s/found", folder);
	snprintf(missing.sun_path, sizeof(missing.sun_path), "%s/missing", folder);
	listens = refuses = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	unlink(found.sun_path);		/* of one that was aborted */
	unlink(beside);
	listeners[0] = bound(&found, sizeof(found));
	listeners[1] = bound(&listens, sizeof(listens));
	bound(&refuses, sizeof(refuses));	/* and nobody listens there */
	MUST(!link(found.sun_path, beside), "no second name");
	for (int i = 0; i < 2; i++)
		MUST(!listen(listeners[i], 64), "no listener");
	atexit(tidy);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	ram_fd = memfd_create("fuzz", MFD_CLOEXEC);
	MUST(ram_fd >= 0 && ftruncate(ram_fd, RAM) == 0, "no memfd");
	ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
	signal(SIGPIPE, SIG_IGN);
	make_listeners();
	return ram == MAP_FAILED;
}

static uint16_t *word(int ring, uint32_t at)
{
	return (uint16_t *)(ram + ring * RING + at);
}

/* ----------------------------------------------------------------------------------------------------------- the driver */

/* one chain of two descriptors at most; false: the ring is full */
static void submit(int ring, const struct desc *d, unsigned n)
{
	struct ring *r = &s.rings[ring];
	uint32_t slot = 2 * (r->avail % (NUM / 2));

	memcpy(ram + ring * RING + 16 * slot, d, n * sizeof(*d));
	*word(ring, AVAIL + 4 + 2 * (r->avail % NUM)) = (uint16_t)slot;
	*word(ring, AVAIL + 2) = ++r->avail;
}

static bool full(int ring)
{
	return (uint16_t)(s.rings[ring].avail - s.rings[ring].used) >= NUM / 2;
}

static void post_buffer(struct cursor *c)
{
	uint32_t slot = 2 * (s.rings[0].avail % (NUM / 2)), size = below(c, 8) ? RX_SIZE : below(c, 64) ? 45 + below(c, 100) : below(c, 64);
	uint64_t at = GPA + RX + (uint64_t)slot * RX_SIZE;
	struct desc d[2] = { { at, size, 2, 0 } };

	if (full(0))
		return;
	if (below(c, 2) && size > 44) {		/* as Linux until 6.2 */
		d[0] = (struct desc){ at, 44, 3, (uint16_t)(slot + 1) };
		d[1] = (struct desc){ at + 44, size - 44, 2, 0 };
	}
	submit(0, d, d[0].flags & 1 ? 2 : 1);
}

/* a port of the host that the guest calls, or that of the host's last call */
static uint32_t host_port(struct cursor *c)
{
	static const uint32_t ports[] = { ASKED, ASKED, TO_UNIX, TO_UNIX, BESIDE_PATH, TO_TCP, TO_NOBODY, TO_NO_FILE };
	uint32_t which = (uint32_t)take(c, 1);

	return which % 3 ? ports[which / 3 % 8] : s.called;
}

static void send_packet(struct cursor *c, uint16_t op, bool honest)
{
	uint32_t slot = 2 * (s.rings[1].avail % (NUM / 2)), len = op == VSK_OP_RW ? below(c, 5000) : 0, cut;
	uint8_t *to = ram + TX + slot * TX_SIZE;
	uint64_t at = GPA + (uint64_t)(to - ram);
	struct vsk_hdr h = {
		.src_cid = CID, .dst_cid = VSK_CID_HOST, .src_port = 1 + below(c, 3), .dst_port = host_port(c),
		.len = len, .type = 1 + (below(c, 3) == 0), .op = op, .flags = below(c, 4), .buf_alloc = BUF,
	};
	struct desc d[2] = { { at, 44 + len, 0, 0 } };

	if (full(1))
		return;
	if (!honest) {
		h.src_cid = below(c, 16) ? h.src_cid : odd_number(c);
		h.dst_cid = below(c, 16) ? h.dst_cid : odd_number(c);
		h.len = below(c, 32) ? h.len : (uint32_t)odd_number(c);
		h.type = below(c, 16) ? h.type : (uint16_t)take(c, 1);
		h.buf_alloc = below(c, 4) ? h.buf_alloc : (uint32_t)odd_number(c);
		h.fwd_cnt = below(c, 4) ? 0 : below(c, 4) ? below(c, 5000) : (uint32_t)odd_number(c);
	}
	memcpy(to, &h, sizeof(h));
	if (below(c, 2)) {
		cut = below(c, 2) ? 44 : below(c, 100);
		cut = cut < d[0].len ? cut : d[0].len;
		d[1] = (struct desc){ at + cut, d[0].len - cut, 0, 0 };
		d[0] = (struct desc){ at, cut, 1, (uint16_t)(slot + 1) };
	}
	submit(1, d, d[0].flags & 1 ? 2 : 1);
}

static void check_packet(const uint8_t *at, uint32_t len)
{
	struct vsk_hdr h;

	MUST(len >= sizeof(h), "%u bytes", len);
	memcpy(&h, at, sizeof(h));
	MUST(h.len == len - sizeof(h), "op %u announces %u bytes of %u", h.op, h.len, len);
	MUST(h.op >= VSK_OP_REQUEST && h.op <= VSK_OP_CREDIT_UPDATE, "op %u", h.op);
	MUST(h.dst_cid == CID && (h.src_cid == VSK_CID_HOST || h.op == VSK_OP_RST), "from %lu to %lu", h.src_cid, h.dst_cid);
	MUST(h.len == 0 || h.op == VSK_OP_RW, "op %u with %u bytes", h.op, h.len);
	if (h.op == VSK_OP_REQUEST)
		s.called = h.src_port;
}

/* take what is used */
static void reap(int ring)
{
	struct ring *r = &s.rings[ring];

	while (r->used != *word(ring, USED + 2)) {
		uint32_t elem[2];
		struct desc d;

		memcpy(elem, ram + ring * RING + USED + 4 + 8 * (r->used % NUM), sizeof(elem));
		MUST(elem[0] < NUM, "id %u", elem[0]);
		memcpy(&d, ram + ring * RING + 16 * elem[0], sizeof(d));
		if (ring)
			MUST(!elem[1], "%u bytes written to a packet from the driver", elem[1]);
		else if (elem[1])	/* both descriptors of a buffer lie one behind the other */
			check_packet(ram + (d.addr - GPA), elem[1]);
		r->used++;
		MUST((uint16_t)(r->avail - r->used) <= NUM, "used more than there was");
	}
}

/* ---------------------------------------------------------------------------------------------------- the host and Python */

static void keep_peer(int fd)
{
	int i = 0;

	while (i < PEERS - 1 && s.peers[i] >= 0)
		i++;
	if (s.peers[i] >= 0)
		close(s.peers[i]);
	s.peers[i] = fd;
}

static int some_socket(int type)
{
	int ends[2];

	MUST(socketpair(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0, "no sockets");
	keep_peer(ends[0]);
	return ends[1];
}

/* the host's ends of routed connections. Closing one resets it: a state that lingers would use up the ports of TCP within a minute */
static void accept_routed(void)
{
	struct linger reset = { 1, 0 };
	int fd;

	for (int i = 0; i < 2; i++)
		while ((fd = accept4(listeners[i], NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
			setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
			keep_peer(fd);
		}
}

static void answer(struct cursor *c)
{
	static struct vse_event ev[8];
	int dialed = -1;
	unsigned i;

	for (int k = 0, n = vse_events(s.e, ev, 8); k < n; k++)
		if (ev[k].type == VSE_EV_CONNECT || ev[k].type == VSE_EV_ROUTED) {	/* what is routed is answered, too */
			struct vsk_hdr h;

			memcpy(&h, ev[k].payload, sizeof(h));
			i = s.nasked++ % EVENTS;
			s.asked[i] = ev[k].handle;
			s.seq[i] = h.type == VSK_TYPE_SEQPACKET;
		}
	/* as a rule the youngest; an old one, or one that was answered, is late */
	i = below(c, 4) && s.nasked ? (s.nasked - 1) % EVENTS : below(c, EVENTS);
	if (s.routed && below(c, 2) && !vse_dialed(s.e, s.asked[i], &dialed) && dialed >= 0)	/* what a route has begun */
		vse_connected(s.e, s.asked[i], dialed, "", "");
	else if (below(c, 8) == 0)
		vse_refuse(s.e, s.asked[i], VSO_DENY, ECONNREFUSED);
	else
		vse_connected(s.e, s.asked[i], some_socket(s.seq[i] != (below(c, 16) == 0) ? SOCK_SEQPACKET : SOCK_STREAM), NULL, NULL);
	if (below(c, 16) == 0)
		vse_reset_flow(s.e, below(c, 2) ? s.asked[i] : s.handle, ECONNRESET);
}

static void peer(struct cursor *c)
{
	static uint8_t bytes[9000];
	int *fd = &s.peers[below(c, PEERS)];
	ssize_t n = 0;

	if (*fd < 0)
		return;
	switch (below(c, 6)) {
	case 0 ... 1: n = send(*fd, bytes, below(c, sizeof(bytes)), MSG_DONTWAIT | MSG_NOSIGNAL); break;
	case 2 ... 3: n = recv(*fd, bytes, 1 + below(c, sizeof(bytes)), MSG_DONTWAIT); break;
	case 4: n = shutdown(*fd, below(c, 2) ? SHUT_WR : SHUT_RDWR); break;
	default:
		close(*fd);
		*fd = -1;
	}
	(void)n;	/* whatever became of it */
}

/* ------------------------------------------------------------------------------------------------------------ the engine */

static void attach(int ring)
{
	struct ring *r = &s.rings[ring];
	uint64_t at = (uint64_t)ring * RING;
	struct vs_err err = { 0 };

	vs_vq_set_addr(r->vq, at, at + AVAIL, at + USED);
	vs_vq_set_base(r->vq, r->base);
	MUST(vs_vq_start(r->vq, &err) == 0, "%s", err.text);
	MUST(vse_ring_attach(s.e, (uint32_t)ring, r->vq, r->kick, &err) == 0, "%s", err.text);
}

/* stop and start; a broken ring comes back new, as after a reset by the driver */
static void renew_ring(struct cursor *c)
{
	int ring = (int)below(c, 2);
	struct ring *r = &s.rings[ring];
	bool anew = vs_vq_broken(r->vq) || below(c, 2);

	vse_ring_detach(s.e, (uint32_t)ring);
	r->base = vs_vq_stop(r->vq);
	reap(ring);
	if (anew) {
		memset(ram + ring * RING, 0, RING);
		r->avail = r->used = 0;
		r->base = 0;
	}
	attach(ring);
}

static void make_turn(void)
{
	struct epoll_event evs[VSE_EPOLL_BATCH];
	struct vse_stats stats;
	int n;

	for (int i = 0; i < 2; i++)
		vse_signal(s.rings[i].kick);
	n = epoll_wait(s.e->ep, evs, VSE_EPOLL_BATCH, 0);
	lock_in_turn(s.e);
	turn(s.e, evs, n > 0 ? n : 0);
	unlock(s.e);
	accept_routed();
	vse_get_stats(s.e, &stats);
	MUST(stats.flows <= MAX_FLOWS, "%lu flows", stats.flows);
	MUST(TAILQ_EMPTY(&s.e->gone), "a flow that is gone is still there");
	MUST(s.e->reserved <= s.e->config.buf_total, "%lu bytes reserved", s.e->reserved);
	MUST(stats.buffered <= s.e->config.buf_total, "%lu bytes buffered", stats.buffered);
	MUST(s.e->pairs->ctl_tail - s.e->pairs->ctl_head <= VSE_CTL_PAUSE + 2 * VSE_BATCH * 44, "control queue");
	for (int i = 0; i < 2; i++) {
		reap(i);
		MUST(!s.rings[i].vq->live || !s.rings[i].vq->in_flight, "ring %d: %u in flight", i, s.rings[i].vq->in_flight);
	}
}

/* a connection as an honest guest has it, so that the rest of the input finds one to spoil */
static void open_connection(struct cursor *c)
{
	for (int i = 0; i < 3; i++)
		post_buffer(c);
	send_packet(c, VSK_OP_REQUEST, true);
	make_turn();
	answer(c);
	make_turn();
}

static void set_up(struct cursor *c)
{
	struct vse_port ports[] = {
		{ ASKED, 0, "" }, { TO_UNIX, sizeof(found), "" }, { TO_TCP, sizeof(listens), "" }, { TO_NOBODY, sizeof(refuses), "" },
		{ TO_NO_FILE, sizeof(missing), "" },
	};
	const void *targets[] = { NULL, &found, &listens, &refuses, &missing };
	struct vse_config config = { .pairs = 1, .max_flows = MAX_FLOWS, .buf_alloc = BUF, .buf_total = 30000, .grow_ns = 1, .linger_ms = 1,
				     .dialect = VSE_VSOCK, .guest_cid = CID, .ports = ports };
	uint64_t chosen[2] = { take(c, 1), take(c, 1) };	/* features of each ring; of the first one, ports too */
	struct vs_mem *empty = vs_mem_new();
	struct vs_err err = { 0 };
	struct vs_region *r = vs_region_map(ram_fd, GPA, RAM, 0, 0, &err);

	memset(&s, 0, sizeof(s));
	s.routed = chosen[0] & 2;
	config.nr_ports = s.routed ? sizeof(ports) / sizeof(*ports) : 0;
	for (uint32_t i = 1; i < config.nr_ports; i++)
		memcpy(ports[i].target, targets[i], ports[i].target_len);
	if (s.routed && chosen[0] & 4)
		memcpy(config.ports_path, path, sizeof(path));
	config.log_flows = chosen[0] & 8 ? 2 : 0;
	s.mem = vs_mem_with(empty, r, &err);
	vs_mem_put(empty);
	vs_region_put(r);
	s.e = vse_new(&config, &err);
	MUST(s.e && s.mem, "%s", err.text);
	memset(ram, 0, 2 * RING);
	for (int i = 0; i < PEERS; i++)
		s.peers[i] = -1;
	for (int i = 0; i < 2; i++) {
		s.rings[i].vq = vs_vq_new((uint16_t)i);
		s.rings[i].kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		vs_vq_set_mem(s.rings[i].vq, s.mem);
		vs_vq_set_num(s.rings[i].vq, NUM, &err);
		vs_vq_set_features(s.rings[i].vq, chosen[i] & 1 ? 1u << 29 : 0);
		attach(i);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint16_t ops[] = { VSK_OP_RW, VSK_OP_RW, VSK_OP_RW, VSK_OP_REQUEST, VSK_OP_RESPONSE, VSK_OP_RST, VSK_OP_SHUTDOWN,
					VSK_OP_CREDIT_UPDATE, VSK_OP_CREDIT_REQUEST };
	struct cursor c = { data, data + size };
	int fds = open_fds();
	uint32_t op;

	set_up(&c);
	while (more(&c)) {
		switch (below(&c, 16)) {
		case 0 ... 4:
			op = below(&c, 40);
			send_packet(&c, op < 36 ? ops[op / 4] : (uint16_t)take(&c, 1), below(&c, 2));
			break;
		case 5: open_connection(&c); break;
		case 6 ... 7: post_buffer(&c); break;
		case 8: answer(&c); break;
		case 9: vse_call(s.e, some_socket(below(&c, 2) ? SOCK_STREAM : SOCK_SEQPACKET), 1 + below(&c, 3), below(&c, 2), &s.handle); break;
		case 10 ... 11: peer(&c); break;
		case 12:
			if (below(&c, 4) == 0)
				renew_ring(&c);
			break;
		case 13:
			if (below(&c, 16) == 0)
				vse_reset_all(s.e, take(&c, 1) & 1);
			break;
		default: make_turn();
		}
	}
	make_turn();
	vse_free(s.e);
	for (int i = 0; i < 2; i++) {
		vs_vq_stop(s.rings[i].vq);
		vs_vq_free(s.rings[i].vq);
		close(s.rings[i].kick);
	}
	accept_routed();		/* none is left waiting for the next input */
	for (int i = 0; i < PEERS; i++)
		if (s.peers[i] >= 0)
			close(s.peers[i]);
	vs_mem_put(s.mem);
	MUST(!vs_region_count_live(), "%d regions are still mapped", vs_region_count_live());
	MUST(open_fds() == fds, "%d descriptors are open, which were %d", open_fds(), fds);
	return 0;
}
