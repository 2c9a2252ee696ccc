/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Decode golden vectors the way a C program does: by the structs of vso_abi.h. Reads messages from stdin, a line "hex" each, and
 * prints for each "member=number" of its header, those of its payload's struct, then "part=hex" for each variable part.
 * Numbers are decimal, comm is hexadecimal with its padding.
 */
#include <stdio.h>
#include <string.h>

#include "vso_abi.h"

static unsigned char msg[2 * VSO_RX_MIN];
static size_t pos, len;

#define NUM(s, member) printf(" " #member "=%llu", (unsigned long long)(s).member)

static void part(const char *name, size_t n)
{
	size_t i;

	printf(" %s=", name);
	for (i = 0; i < n && pos < len; i++)
		printf("%02x", msg[pos++]);
	if (i < n)
		printf("<%zu bytes missing>", n - i);
}

static void take(void *out, size_t n)
{
	memset(out, 0, n);
	if (len - pos < n) {
		printf(" <struct of %zu bytes in %zu>", n, len - pos);
		return;
	}
	memcpy(out, msg + pos, n);
	pos += n;
}

static void hello(void)
{
	struct vso_hello h;

	take(&h, sizeof(h));
	NUM(h, magic), NUM(h, abi_major), NUM(h, abi_minor), NUM(h, epoch), NUM(h, features), NUM(h, pairs), NUM(h, max_payload);
	NUM(h, max_flows), NUM(h, hairpin_len), NUM(h, reserved0), NUM(h, reserved1);
	part("hairpin", h.hairpin_len);
}

static void open_request(void)
{
	struct vso_open o;
	size_t i;

	take(&o, sizeof(o));
	NUM(o, uri_len), NUM(o, local_len), NUM(o, opts_len), NUM(o, flags), NUM(o, netns), NUM(o, uid), NUM(o, pid);
	printf(" comm=");
	for (i = 0; i < sizeof(o.comm); i++)
		printf("%02x", (unsigned char)o.comm[i]);
	NUM(o, sndbuf), NUM(o, rcvbuf), NUM(o, name_len), NUM(o, reserved0), NUM(o, reserved1);
	part("uri", o.uri_len), part("local", o.local_len), part("opts", o.opts_len), part("name", o.name_len);
}

static void reply(void)
{
	struct vso_reply r;

	take(&r, sizeof(r));
	NUM(r, verdict), NUM(r, error), NUM(r, local_len), NUM(r, peer_len), NUM(r, reserved);
	part("local", r.local_len), part("peer", r.peer_len);
}

static void accepted(void)
{
	struct vso_accept a;

	take(&a, sizeof(a));
	NUM(a, new_flow), NUM(a, local_len), NUM(a, peer_len), NUM(a, buf_alloc), NUM(a, reserved);
	part("local", a.local_len), part("peer", a.peer_len);
}

static void sockopt(int with_value)
{
	struct vso_sockopt o;

	take(&o, sizeof(o));
	NUM(o, level), NUM(o, name), NUM(o, len), NUM(o, reserved);
	if (with_value)
		part("value", len - pos);
}

static void dgram(void)
{
	struct vso_dgram d;

	take(&d, sizeof(d));
	NUM(d, uri_len), NUM(d, flags), NUM(d, ttl), NUM(d, tos), NUM(d, segment);
	part("uri", d.uri_len), part("data", len - pos);
}

static void error(void)
{
	struct vso_error e;

	take(&e, sizeof(e));
	NUM(e, error), NUM(e, origin), NUM(e, icmp_type), NUM(e, icmp_code), NUM(e, reserved0), NUM(e, info), NUM(e, reserved1);
	NUM(e, uri_len), NUM(e, offender_len), NUM(e, reserved2);
	part("uri", e.uri_len), part("offender", e.offender_len), part("data", len - pos);
}

static void decode(void)
{
	struct vso_hdr h;

	take(&h, sizeof(h));
	printf("type=%u", h.type);
	NUM(h, flags), NUM(h, flow), NUM(h, len), NUM(h, arg), NUM(h, buf_alloc), NUM(h, fwd_cnt), NUM(h, cookie), NUM(h, reserved);
	switch (h.type) {
	case VSO_HELLO: case VSO_HELLO_REPLY: hello(); break;
	case VSO_CONNECT: case VSO_BIND: open_request(); break;
	case VSO_CONNECT_REPLY: case VSO_BIND_REPLY: case VSO_LISTEN_REPLY: case VSO_DEST_REPLY: reply(); break;
	case VSO_ACCEPT: accepted(); break;
	case VSO_SETSOCKOPT: case VSO_SOCKOPT_REPLY: sockopt(1); break;
	case VSO_GETSOCKOPT: sockopt(0); break;
	case VSO_DGRAM: dgram(); break;
	case VSO_ERROR: error(); break;
	case VSO_DEST: case VSO_GROUP: part("uri", len - pos); break;
	case VSO_HINTS: part("hints", len - pos); break;
	case VSO_DATA: case VSO_URGENT: part("data", len - pos); break;
	case VSO_CREDIT: case VSO_SHUTDOWN: case VSO_PING: case VSO_PONG: case VSO_LISTEN: case VSO_CLOSE: case VSO_CLOSED:
	case VSO_RESET: break;
	default: printf(" <unknown type>");
	}
	if (pos != len)
		printf(" <%zu bytes left>", len - pos);
	printf("\n");
}

int main(void)
{
	char line[2 * sizeof(msg) + 2];

	while (fgets(line, sizeof(line), stdin)) {
		unsigned int byte;

		pos = len = 0;
		while (len < sizeof(msg) && sscanf(line + 2 * len, "%2x", &byte) == 1)
			msg[len++] = byte;
		decode();
	}
	return 0;
}
