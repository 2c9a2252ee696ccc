/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * engine_driver - the guest's side for the engine target: rings in shared memory, messages with and without faults, and what may be
 * said of the messages that come back.
 */
#ifndef ENGINE_DRIVER_H
#define ENGINE_DRIVER_H

#include "fuzz.h"
#include "vse_priv.h"

enum {
	PAIRS = 2, RINGS = 2 * PAIRS, NUM = 16, RAM = 1 << 20, GPA = 0x100000,
	RING = 0x1000, AVAIL = 0x200, USED = 0x400,		/* ring r is at r * RING */
	TX = 0x10000, TX_SIZE = 0x1000, RX = 0x80000, RX_SIZE = 0x1800,	/* a buffer for each descriptor of each ring */
	PEERS = 16, EVENTS = 16, MAX_FLOWS = 6
};

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

struct ring {
	struct vs_vq *vq;
	int kick;
	uint16_t avail, used;		/* the driver's places */
	uint32_t base;
	bool attached;
};

static uint8_t *ram;
static int ram_fd, nowhere;

static struct {
	struct vse_engine *e;
	struct ring rings[RINGS];
	struct vs_mem *mem;
	int peers[PEERS];		/* host ends, -1: none */
	struct vse_event events[EVENTS];	/* requests of the engine, answered or not */
	unsigned nevents, closes, closed;
	uint32_t last_id;		/* of a flow that the device announced */
	int node;			/* a UDP socket, peer of the guest's node of IPX */
	struct sockaddr_in at;		/* where the guest's is */
	char peer_uri[40];		/* socket 4000 of the peer's */
	char here_uri[40];		/* where the host listens, by its own address: a route leads there */
	uint32_t hints;			/* of the device's configuration */
} s;

static uint16_t *word(int ring, uint32_t at)
{
	return (uint16_t *)(ram + ring * RING + at);
}

/* ----------------------------------------------------------------------------------------------------------- the driver */

static void submit(int ring, uint32_t slot, const struct desc *d, unsigned n)
{
	struct ring *r = &s.rings[ring];

	for (unsigned i = 0; i < n; i++)
		memcpy(ram + ring * RING + 16 * ((slot + i) % NUM), &d[i], sizeof(*d));
	*word(ring, AVAIL + 4 + 2 * (r->avail % NUM)) = (uint16_t)slot;
	*word(ring, AVAIL + 2) = ++r->avail;
}

static void post_buffer(struct cursor *c)
{
	int ring = 2 * (int)below(c, PAIRS);
	uint32_t slot = 2 * (s.rings[ring].avail % (NUM / 2)), size = below(c, 8) ? RX_SIZE : below(c, 2) ? 2048 : (uint32_t)take(c, 2);
	uint64_t at = GPA + RX + ((uint64_t)ring * NUM + slot) * RX_SIZE;
	struct desc d[2] = { { at, size, 2, 0 } };

	if ((uint16_t)(s.rings[ring].avail - s.rings[ring].used) >= NUM / 2)
		return;		/* a slot that is posted twice would hold two messages: tests/fuzz/ring.c does such things */
	if (below(c, 4) == 0 && size > 8) {
		d[0] = (struct desc){ at, 8, below(c, 16) ? 3 : 1, (uint16_t)(slot + 1) };
		d[1] = (struct desc){ at + 8, size - 8, 2, 0 };
	}
	submit(ring, slot, d, d[0].flags & 1 ? 2 : 1);
}

static uint32_t some_id(struct cursor *c)
{
	uint32_t i = below(c, 8);

	return i < 5 ? 1 + i % 3 : i == 5 ? s.last_id : i == 6 ? (uint32_t)odd_number(c) : 0;
}

/* what the payload of a message looks like; returns its length */
static uint32_t payload(struct cursor *c, uint16_t type, uint8_t *to)
{
	const char *const uris[] = { "tcp://10.0.0.1:80", "udp://10.0.0.1:53", "tcp6://::1/80", "x", "udp://10.0.0.2:53",
				     "icmp://10.0.0.1:0", "ipx://00000000.ffffffffffff.4000", s.peer_uri,
				     "tcp://10.0.0.1:81", "tcp://10.0.0.1:82", "tcp6://fd00::1/81", "tcp://10.0.0.001:81", s.here_uri };
	const char *uri = uris[below(c, sizeof(uris) / sizeof(*uris))];
	uint16_t uri_len = (uint16_t)strlen(uri);
	uint32_t n = 0;

	switch (type) {
	case VSO_HELLO:
		*(struct vso_hello *)to = (struct vso_hello){
			.magic = below(c, 16) ? VSO_MAGIC : 0, .abi_major = below(c, 16) ? VSO_ABI_MAJOR : 2, .epoch = below(c, 3),
			.features = take(c, 1), .pairs = below(c, 4), .max_payload = below(c, 2) ? 0 : (uint32_t)odd_number(c),
		};
		n = sizeof(struct vso_hello);
		break;
	case VSO_CONNECT:
	case VSO_BIND:
		*(struct vso_open *)to = (struct vso_open){
			.uri_len = below(c, 16) ? uri_len : (uint16_t)odd_number(c), .flags = below(c, 8) ? 0 : (uint16_t)take(c, 1),
			.opts_len = below(c, 4) ? 0 : 24,
		};
		memcpy(to + sizeof(struct vso_open), uri, uri_len);
		n = sizeof(struct vso_open) + uri_len;
		if (((struct vso_open *)to)->opts_len == 24) {
			struct vso_sockopt o = { 1, below(c, 64), below(c, 8) ? 4 : (uint32_t)odd_number(c), 0 };

			memcpy(to + n, &o, sizeof(o));
			memset(to + n + sizeof(o), (int)take(c, 1), 8);
			n += 24;
		}
		break;
	case VSO_SETSOCKOPT:
	case VSO_GETSOCKOPT:
		*(struct vso_sockopt *)to = (struct vso_sockopt){ below(c, 2) ? 1 : 6, below(c, 64), below(c, 8) ? 4 : (uint32_t)odd_number(c), 0 };
		n = sizeof(struct vso_sockopt) + 4;
		break;
	case VSO_DGRAM:
		*(struct vso_dgram *)to = (struct vso_dgram){
			.uri_len = below(c, 4) ? uri_len : (uint16_t)odd_number(c), .flags = below(c, 4) ? 0 : (uint16_t)take(c, 1),
			.ttl = (uint8_t)below(c, 256), .tos = (uint8_t)below(c, 256), .segment = (uint16_t)below(c, 200),
		};
		memcpy(to + sizeof(struct vso_dgram), uri, uri_len);
		n = sizeof(struct vso_dgram) + uri_len + below(c, 300);
		break;
	case VSO_DEST:
	case VSO_GROUP:
		memcpy(to, uri, uri_len);
		n = uri_len;
		break;
	case VSO_DATA:
		n = below(c, 3000);
		break;
	case VSO_URGENT:
		n = below(c, 16) > 0;
		break;
	}
	return n;
}

/* room for a message from the driver on this ring: where it goes, and *slot; NULL: the ring is full */
static uint8_t *room(int ring, uint32_t *slot)
{
	struct ring *r = &s.rings[ring];

	*slot = 2 * (r->avail % (NUM / 2));
	return (uint16_t)(r->avail - r->used) < NUM / 2 ? ram + TX + (ring * NUM + (int)*slot) * TX_SIZE : NULL;
}

static void send_message(struct cursor *c)
{
	static const uint16_t types[] = { VSO_DATA, VSO_DATA, VSO_CREDIT, VSO_SHUTDOWN, VSO_DGRAM, VSO_PING, VSO_PONG, VSO_HELLO,
					  VSO_CONNECT, VSO_CONNECT, VSO_BIND, VSO_LISTEN, VSO_CLOSE, VSO_SETSOCKOPT, VSO_GETSOCKOPT, VSO_DEST };
	uint32_t kind = below(c, 64), other = below(c, 8) ? 0 : below(c, PAIRS), slot, len;
	struct vso_hdr h = {
		.type = kind == 62 ? (uint16_t)VSO_GROUP : kind == 61 ? (uint16_t)VSO_URGENT : kind < 62 ? types[kind / 4] : (uint16_t)take(c, 1),
		.flow = some_id(c), .arg = below(c, 4),
		.buf_alloc = below(c, 4) ? 4096 : (uint32_t)odd_number(c), .fwd_cnt = below(c, 4) ? 0 : (uint32_t)odd_number(c),
		.cookie = (uint32_t)take(c, 1),
	};
	int ring = h.type == VSO_HELLO ? 1 : 1 + 2 * (int)other;
	uint8_t *to = room(ring, &slot);
	struct desc d[2];
	uint64_t at;

	if (!to)
		return;
	len = payload(c, h.type, to + sizeof(h));
	h.len = below(c, 16) ? len : (uint32_t)odd_number(c);
	memcpy(to, &h, sizeof(h));
	len += sizeof(h);
	at = GPA + (uint64_t)(to - ram);
	d[0] = (struct desc){ at, len, below(c, 32) ? 0 : 2, 0 };
	if (below(c, 3) == 0) {
		uint32_t cut = below(c, 64);

		cut = cut < len ? cut : len;
		d[0] = (struct desc){ at, cut, 1, (uint16_t)(slot + 1) };
		d[1] = (struct desc){ at + cut, len - cut, 0, 0 };
	}
	s.closes += h.type == VSO_CLOSE;
	submit(ring, slot, d, d[0].flags & 1 ? 2 : 1);
}

/* a message without a fault, on pair 0 */
static void say(uint16_t type, uint32_t flow, uint32_t arg, uint32_t buf_alloc, const void *data, uint32_t len)
{
	struct vso_hdr h = { .type = type, .flow = flow, .arg = arg, .buf_alloc = buf_alloc, .len = len };
	struct desc d = { .len = sizeof(h) + len };
	uint32_t slot;
	uint8_t *to = room(1, &slot);

	if (!to)
		return;
	memcpy(to, &h, sizeof(h));
	memcpy(to + sizeof(h), data, len);
	d.addr = GPA + (uint64_t)(to - ram);
	submit(1, slot, &d, 1);
}

static void check_message(int ring, const uint8_t *at, uint32_t len)
{
	struct vso_hdr h;

	MUST(len >= sizeof(h), "%u bytes", len);
	memcpy(&h, at, sizeof(h));
	MUST(h.len == len - sizeof(h), "type %u announces %u bytes of %u", h.type, h.len, len);
	MUST((h.type >= VSO_DATA && h.type <= VSO_URGENT) || (h.type >= VSO_HELLO_REPLY && h.type <= VSO_ERROR) ||
	     h.type == VSO_HINTS, "type %u", h.type);
	MUST(h.type != VSO_HINTS || (!h.flow && h.len == s.hints * sizeof(struct vso_hint)), "%u bytes of hints", h.len);
	MUST(h.type == VSO_HELLO_REPLY || h.type == VSO_PONG || h.flow || h.type >= VSO_CONNECT_REPLY, "type %u for flow 0", h.type);
	if (h.type == VSO_ACCEPT) {
		MUST(h.len >= sizeof(struct vso_accept), "%u bytes", h.len);
		s.last_id = ((const struct vso_accept *)(at + sizeof(h)))->new_flow;
		MUST(s.last_id & VSO_FLOW_DEVICE, "announced flow %#x", s.last_id);
	}
	s.closed += h.type == VSO_CLOSED;
}

/* take what is used; the buffers of a to-driver ring hold messages */
static void reap(int ring)
{
	struct ring *r = &s.rings[ring];

	while (r->used != *word(ring, USED + 2)) {
		uint32_t elem[2];
		struct desc d;

		memcpy(elem, ram + ring * RING + USED + 4 + 8 * (r->used % NUM), sizeof(elem));
		MUST(elem[0] < NUM, "id %u", elem[0]);
		memcpy(&d, ram + ring * RING + 16 * elem[0], sizeof(d));
		if (ring & 1)
			MUST(!elem[1], "%u bytes written to a message from the driver", elem[1]);
		else if (elem[1])	/* both descriptors of a buffer lie one behind the other */
			check_message(ring, ram + (d.addr - GPA), elem[1]);
		r->used++;
		MUST((uint16_t)(r->avail - r->used) <= NUM, "used more than there was");
	}
}

#endif
