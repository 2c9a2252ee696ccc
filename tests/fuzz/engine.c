/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * engine - the offload data plane against a driver, host peers and a Python that do anything that each can.
 *
 * There is no thread: the target is compiled together with vs_engine.c and makes its turns itself, so an input always does the same.
 * The input is a list of steps: messages of the driver with any field wrong, buffers posted, answers to events (also late, twice and
 * with the wrong kind of descriptor), destinations that are routed to a listener or to nobody, bytes, EOFs and resets of host peers, packets of
 * IPX with anything wrong, rings that go and come back, new epochs. After each turn:
 *
 *	- no chain stays popped; flows, buffered bytes, events and queued messages are within their bounds
 *	- what comes to the driver is a whole message of a type that the device sends
 *	- there is never more than one CLOSED for a CLOSE
 *	- at the end no region is mapped and no descriptor open
 */
#include "vs_engine.c"

#include <netinet/in.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/un.h>

#include "engine_driver.h"
#include "vs_vq_priv.h"

static int listener;
static struct sockaddr_in listens, refuses;	/* of loopback, for as long as the process lives */

/* a TCP socket of loopback at a port of the kernel's choice */
static int tcp_socket(struct sockaddr_in *at)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	*at = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	MUST(fd >= 0 && !bind(fd, (struct sockaddr *)at, sizeof(*at)), "no TCP");
	getsockname(fd, (struct sockaddr *)at, &(socklen_t){ sizeof(*at) });
	return fd;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	ram_fd = memfd_create("fuzz", MFD_CLOEXEC);
	MUST(ram_fd >= 0 && ftruncate(ram_fd, RAM) == 0, "no memfd");
	ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
	nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);
	signal(SIGPIPE, SIG_IGN);
	listener = tcp_socket(&listens);
	tcp_socket(&refuses);		/* bound, and nobody listens there */
	MUST(!listen(listener, 64), "no listener");
	return ram == MAP_FAILED;
}

/* ---------------------------------------------------------------------------------------------------- the host and Python */

static void keep_peer(int fd)
{
	for (int i = 0; i < PEERS; i++)
		if (s.peers[i] < 0) {
			s.peers[i] = fd;
			return;
		}
	close(s.peers[0]);
	s.peers[0] = fd;
}

/* the host's ends of routed connections. Closing one resets it: a state that lingers would use up the ports within a minute */
static void accept_routed(void)
{
	struct linger reset = { 1, 0 };
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		keep_peer(fd);
	}
}

static int some_socket(struct cursor *c, int type)
{
	int ends[2];

	if (below(c, 16) == 0)
		return below(c, 2) ? fcntl(nowhere, F_DUPFD_CLOEXEC, 0) : socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	MUST(socketpair(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0, "no sockets");
	keep_peer(ends[0]);
	return ends[1];
}

/* a Unix socket at an address of the kernel's choice; the peer table keeps a duplicate, to connect there later */
static int bound_socket(void)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	MUST(fd >= 0 && bind(fd, (struct sockaddr *)&name, sizeof(sa_family_t)) == 0, "no address");
	keep_peer(fcntl(fd, F_DUPFD_CLOEXEC, 0));
	return fd;
}

static void answer(struct cursor *c)
{
	struct vse_event *ev;
	char uri[VSE_PAYLOAD_MAX + 1];
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	bool dgram, ipx;
	int dialed = -1;

	s.nevents = s.nevents < EVENTS ? s.nevents : 0;
	s.nevents += (unsigned)vse_events(s.e, s.events + s.nevents, (int)(EVENTS - s.nevents));
	/* as a rule the youngest; an old one, or one that was answered, is late */
	ev = &s.events[below(c, 4) && s.nevents ? s.nevents - 1 : below(c, EVENTS)];
	dgram = ev->len > sizeof(struct vso_open) && strchr("ui", ev->payload[sizeof(struct vso_open)]);
	ipx = dgram && ev->payload[sizeof(struct vso_open) + 1] == 'p';
	memcpy(uri, ev->payload, ev->len);
	uri[ev->len] = 0;
	switch (ev->type) {
	case VSE_EV_CONNECT:
		if (below(c, 2))	/* what a route has begun */
			vse_dialed(s.e, ev->handle, &dialed);
		if (dialed >= 0 && below(c, 4)) {
			vse_connected(s.e, ev->handle, dialed, "tcp://1.2.3.4:5", "tcp://5.6.7.8:9");
			break;
		}
		if (dialed >= 0)
			close(dialed);
		if (below(c, 4))
			vse_connected(s.e, ev->handle, some_socket(c, dgram ? SOCK_DGRAM : SOCK_STREAM), "tcp://1.2.3.4:5", "tcp://5.6.7.8:9");
		else
			vse_refuse(s.e, ev->handle, below(c, 3), (uint32_t)take(c, 1));
		break;
	case VSE_EV_BIND:
		if (ipx && below(c, 4))
			vse_ipx_bound(s.e, ev->handle, (uint16_t)(below(c, 3) ? 0x4000 + below(c, 3) : 0), (char[VSO_URI_MAX + 1]){ 0 });
		else if (below(c, 4))
			vse_bound(s.e, ev->handle, dgram ? some_socket(c, SOCK_DGRAM) : bound_socket(), "tcp://0.0.0.0:80");
		else
			vse_refuse(s.e, ev->handle, below(c, 3), (uint32_t)take(c, 1));
		break;
	case VSE_EV_DGRAM_DEST:
		if (below(c, 2))
			getsockname(s.node, (struct sockaddr *)&to, &(socklen_t){ sizeof(to) });
		vse_dgram_dest(s.e, ev->handle, uri, &to, sizeof(to), below(c, 4) ? VSO_OFFLOAD : VSO_NATIVE, below(c, 4) ? 0 : EACCES);
		break;
	case VSE_EV_GROUP:
		vse_group(s.e, ev->handle, below(c, 2) ? VSO_OFFLOAD : VSO_NATIVE, (uint32_t)take(c, 1));
		break;
	}
	if (below(c, 16) == 0)
		vse_reset_flow(s.e, ev->handle, ECONNRESET);
}

/* a packet of IPX from the peer to the guest's node; as a rule with one thing wrong, or none */
static void send_packet(struct cursor *c)
{
	uint8_t packet[300] = { 0xff, 0xff, 0, (uint8_t)(30 + below(c, 200)), 0, 4 };
	struct sockaddr_in me = { 0 };
	size_t len = packet[3];

	getsockname(s.node, (struct sockaddr *)&me, &(socklen_t){ sizeof(me) });
	packet[9] = packet[21] = 0xa1;
	memcpy(packet + 10, &s.at.sin_port, 2);
	memcpy(packet + 12, &s.at.sin_addr, 4);
	if (below(c, 4) == 0)
		memset(packet + 10, 0xff, 6);
	packet[16] = 0x40;
	packet[17] = (uint8_t)below(c, 3);
	memcpy(packet + 22, &me.sin_port, 2);
	memcpy(packet + 24, &me.sin_addr, 4);
	if (below(c, 2))
		packet[below(c, 30)] = (uint8_t)take(c, 1);
	if (below(c, 4) == 0)
		len = below(c, sizeof(packet));
	sendto(s.node, packet, len, MSG_DONTWAIT, (struct sockaddr *)&s.at, sizeof(s.at));
}

/* the guest is a node of IPX, and so is the host */
static void make_node(void)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fds[2] = { socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0) };
	uint8_t peer[6];

	for (int i = 0; i < 2; i++)
		MUST(fds[i] >= 0 && !bind(fds[i], (struct sockaddr *)&any, sizeof(any)), "no UDP");
	s.node = fds[0];
	getsockname(fds[1], (struct sockaddr *)&s.at, &(socklen_t){ sizeof(s.at) });
	getsockname(fds[0], (struct sockaddr *)&any, &(socklen_t){ sizeof(any) });
	memcpy(peer, &any.sin_port, 2);
	memcpy(peer + 2, &any.sin_addr, 4);
	snprintf(s.peer_uri, sizeof(s.peer_uri), "ipx://000000a1.%02x%02x7f000001.4000", peer[0], peer[1]);
	MUST(vse_ipx_open(s.e, fds[1], 0xa1, peer, 1) == 0, "no node");
}

/* a connection to where a bound socket listens, or -1; *fd is any peer */
static int connect_to_bound(const int *fd)
{
	struct sockaddr_un name;
	socklen_t len = sizeof(name);
	int ours;

	if (*fd < 0 || getsockname(*fd, (struct sockaddr *)&name, &len) || len <= sizeof(sa_family_t))
		return -1;
	ours = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (connect(ours, (struct sockaddr *)&name, len) == 0)
		return ours;
	close(ours);
	return -1;
}

static void peer(struct cursor *c)
{
	static uint8_t bytes[4096];
	int *fd = &s.peers[below(c, PEERS)], ours;
	ssize_t n = 0;
	uint32_t len;

	if (*fd < 0)
		return;
	switch (below(c, 6)) {
	case 0:
	case 1:
		len = below(c, sizeof(bytes));
		n = send(*fd, bytes, len, MSG_DONTWAIT | MSG_NOSIGNAL | (len % 8 ? 0 : MSG_OOB));
		break;
	case 2:
		n = recv(*fd, bytes, 1 + below(c, sizeof(bytes)), MSG_DONTWAIT);
		break;
	case 3:
		n = shutdown(*fd, below(c, 2) ? SHUT_WR : SHUT_RDWR);
		break;
	case 4:
		close(*fd);
		*fd = -1;
		break;
	default:
		ours = connect_to_bound(fd);
		if (ours >= 0)
			keep_peer(ours);
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
	r->attached = true;
}

static void toggle_ring(struct cursor *c)
{
	int ring = (int)below(c, RINGS);
	struct ring *r = &s.rings[ring];
	bool broken;

	if (!r->attached) {
		attach(ring);
		return;
	}
	vse_ring_detach(s.e, (uint32_t)ring);
	MUST(!vs_vq_running(r->vq) || !r->vq->in_flight || vs_vq_broken(r->vq), "%u in flight", r->vq->in_flight);
	broken = vs_vq_broken(r->vq);
	r->base = vs_vq_stop(r->vq);
	r->attached = false;
	reap(ring);
	/* the driver resets it; a broken one it must, since nothing told it which of the last batch were served */
	if (below(c, 2) || broken) {
		memset(ram + ring * RING, 0, RING);
		r->avail = r->used = 0;
		r->base = 0;
	}
}

static void check_bounds(void)
{
	struct vse_stats stats;

	vse_get_stats(s.e, &stats);
	MUST(stats.flows <= MAX_FLOWS, "%lu flows", stats.flows);
	MUST(s.e->reserved <= s.e->config.buf_total, "%lu bytes reserved", s.e->reserved);
	MUST(stats.buffered <= s.e->config.buf_total, "%lu bytes buffered", stats.buffered);
	MUST(s.e->nevents <= VSE_EVENTS_PAUSE + 2 * VSE_BATCH + MAX_FLOWS, "%u events", s.e->nevents);
	for (int i = 0; i < PAIRS; i++)
		MUST(s.e->pairs[i].ctl_tail - s.e->pairs[i].ctl_head <= VSE_CTL_PAUSE + 2 * VSE_BATCH * 1024, "control queue of pair %d", i);
	MUST(s.closed <= s.closes, "%u CLOSED for %u CLOSE", s.closed, s.closes);
	for (int i = 0; i < RINGS; i++)
		MUST(!s.rings[i].vq->live || !s.rings[i].vq->in_flight, "ring %d: %u in flight", i, s.rings[i].vq->in_flight);
}

static void make_turn(void)
{
	struct epoll_event evs[VSE_EPOLL_BATCH];
	int n;

	for (int i = 0; i < RINGS; i++)
		vse_signal(s.rings[i].kick);
	n = epoll_wait(s.e->ep, evs, VSE_EPOLL_BATCH, 0);
	lock_in_turn(s.e);
	turn(s.e, evs, n > 0 ? n : 0);
	unlock(s.e);
	accept_routed();
	for (int i = 0; i < RINGS; i++)
		reap(i);
	check_bounds();
}

/* a flow as an honest guest has it, so that the rest of the input finds one to spoil: a stream, a datagram socket or a listener */
static void open_flow(struct cursor *c)
{
	static const char *const uris[] = { "tcp://10.0.0.1:80", "udp://10.0.0.1:53", "tcp://0.0.0.0:80", "icmp://10.0.0.1:0",
					    "ipx://00000000.000000000000.4000", "tcp://10.0.0.1:81", s.here_uri };
	uint32_t which = below(c, 7), kind = which < 5 ? which : 0, id = 1 + below(c, 3), n = 4;
	struct { struct vso_open open; char uri[40]; } open = { .open.uri_len = (uint16_t)strlen(uris[which]) };
	struct vse_event ev[8];
	int fd;

	while (n--)
		post_buffer(c);
	memcpy(open.uri, uris[which], open.open.uri_len);
	open.open.flags = kind % 2 && below(c, 2) ? VSO_OPEN_ADDR_ONLY : 0;
	say(kind && kind % 2 == 0 ? VSO_BIND : VSO_CONNECT, id, 0, 4096, &open, sizeof(open.open) + open.open.uri_len);
	make_turn();
	for (int i = 0, got = vse_events(s.e, ev, 8); i < got; i++) {
		if (ev[i].type == VSE_EV_BIND && kind == 4)
			vse_ipx_bound(s.e, ev[i].handle, 0x4000, (char[VSO_URI_MAX + 1]){ 0 });
		else if (ev[i].type == VSE_EV_BIND)
			vse_bound(s.e, ev[i].handle, bound_socket(), "tcp://0.0.0.0:80");
		else if (ev[i].type == VSE_EV_CONNECT)
			vse_connected(s.e, ev[i].handle, some_socket(c, kind % 2 ? SOCK_DGRAM : SOCK_STREAM), "tcp://1.2.3.4:5", "tcp://5.6.7.8:9");
	}
	if (kind == 2) {
		say(VSO_LISTEN, id, 4, 4, "", 0);
		make_turn();
		fd = s.rings[0].attached ? connect_to_bound(&s.peers[below(c, PEERS)]) : -1;
		if (fd >= 0)
			keep_peer(fd);
	} else if (kind == 4) {
		send_packet(c);
	} else {
		static const uint8_t bytes[256] = { [2] = 1 };

		say(kind ? VSO_DGRAM : VSO_DATA, id, 0, 4096, bytes, kind ? 40 : below(c, sizeof(bytes)));
	}
	make_turn();
}

enum { FEATURES = VSO_F_DGRAM | VSO_F_DGRAM_INFO | VSO_F_PING | VSO_F_IPX | VSO_F_URGENT | VSO_F_GROUP | VSO_F_HINTS | VSO_F_EARLY_DATA };

#define MAPPED(...)	{ [10] = 0xff, [11] = 0xff, [12] = __VA_ARGS__ }

static void set_up(struct cursor *c)
{
	struct vse_route routes[] = {
		{ MAPPED(10, 0, 0, 1), MAPPED(10, 0, 0, 1), 80, 80, VSO_HINT_TCP, .dial = 0 },
		{ MAPPED(10, 0, 0, 1), MAPPED(10, 0, 0, 9), 81, 81, VSO_HINT_TCP, .dial = 1, .target_len = sizeof(listens), .rule = 1 },
		{ MAPPED(10, 0, 0, 1), MAPPED(10, 0, 0, 1), 82, 82, VSO_HINT_TCP, .dial = 1, .target_len = sizeof(refuses), .rule = 2 },
		{ { 0xfd }, { 0xfd, [1 ... 15] = 0xff }, 1, 65535, VSO_HINT_TCP6, .dial = 1, .target_len = sizeof(listens), .rule = 3 },
		{ MAPPED(127, 0, 0, 1), MAPPED(127, 0, 0, 1), ntohs(listens.sin_port), ntohs(listens.sin_port), VSO_HINT_TCP, .dial = 1, .rule = 4 },
	};
	struct vse_config config = {
		.pairs = PAIRS, .max_flows = MAX_FLOWS, .buf_alloc = 4096, .buf_total = 10000, .grow_ns = 1,
		.features = FEATURES, .linger_ms = 1, .nr_routes = sizeof(routes) / sizeof(*routes), .routes = routes,
		.nr_hints = s.hints = 2, .hints = {
			{ MAPPED(192, 168, 0, 0), MAPPED(192, 168, 255, 255), 0, 65535, VSO_HINT_TCP, VSO_HINT_NATIVE, 0 },
			{ { 0 }, { [0 ... 15] = 0xff }, 0, 65535, VSO_HINT_TCP | VSO_HINT_TCP6, VSO_HINT_ASK, 0 },
		},
	};
	struct vs_mem *empty = vs_mem_new();
	struct vs_err err = { 0 };
	struct vs_region *r = vs_region_map(ram_fd, GPA, RAM, 0, 0, &err);

	for (size_t i = 0; i < config.nr_routes; i++)
		memcpy(routes[i].target, i == 2 ? &refuses : &listens, routes[i].target_len);
	snprintf(s.here_uri, sizeof(s.here_uri), "tcp://127.0.0.1:%u", ntohs(listens.sin_port));
	s.mem = vs_mem_with(empty, r, &err);
	vs_mem_put(empty);
	vs_region_put(r);
	s.e = vse_new(&config, &err);
	MUST(s.e && s.mem, "%s", err.text);
	make_node();
	memset(ram, 0, RINGS * RING);
	memset(s.rings, 0, sizeof(s.rings));
	memset(s.events, 0, sizeof(s.events));
	s.nevents = s.closes = s.closed = s.last_id = 0;
	for (int i = 0; i < PEERS; i++)
		s.peers[i] = -1;
	for (int i = 0; i < RINGS; i++) {
		s.rings[i].vq = vs_vq_new((uint16_t)i);
		s.rings[i].kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		vs_vq_set_mem(s.rings[i].vq, s.mem);
		vs_vq_set_num(s.rings[i].vq, NUM, &err);
		vs_vq_set_features(s.rings[i].vq, take(c, 1) & 1 ? 1u << 29 : 0);
		attach(i);
	}
	if (take(c, 1) & 7) {	/* nearly always */
		struct vso_hdr h = { .type = VSO_HELLO, .len = sizeof(struct vso_hello) };
		struct vso_hello hello = { .magic = VSO_MAGIC, .abi_major = VSO_ABI_MAJOR, .epoch = 1, .features = FEATURES, .pairs = PAIRS };
		struct desc d = { GPA + TX, sizeof(h) + sizeof(hello), 0, 0 };

		memcpy(ram + TX, &h, sizeof(h));
		memcpy(ram + TX + sizeof(h), &hello, sizeof(hello));
		submit(1, 0, &d, 1);
		make_turn();
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct cursor c = { data, data + size };
	int fds = open_fds();

	set_up(&c);
	while (more(&c)) {
		switch (below(&c, 16)) {
		case 0 ... 3:
			send_message(&c);
			break;
		case 4:
			open_flow(&c);
			break;
		case 5 ... 7:
			post_buffer(&c);
			break;
		case 8 ... 9:
			answer(&c);
			break;
		case 10:
			peer(&c);
			break;
		case 11:
			if (below(&c, 2))
				peer(&c);
			else
				send_packet(&c);
			break;
		case 12:
			toggle_ring(&c);
			break;
		case 13:
			if (below(&c, 16) == 0)
				vse_reset_all(s.e, take(&c, 1) & 1);
			break;
		default:
			make_turn();
		}
	}
	make_turn();
	vse_free(s.e);
	for (int i = 0; i < RINGS; i++) {
		vs_vq_stop(s.rings[i].vq);
		vs_vq_free(s.rings[i].vq);
		close(s.rings[i].kick);
	}
	accept_routed();		/* none is left waiting for the next input */
	for (int i = 0; i < PEERS; i++)
		if (s.peers[i] >= 0)
			close(s.peers[i]);
	close(s.node);
	vs_mem_put(s.mem);
	MUST(!vs_region_count_live(), "%d regions are still mapped", vs_region_count_live());
	MUST(open_fds() == fds, "%d descriptors are open, which were %d", open_fds(), fds);
	return 0;
}
