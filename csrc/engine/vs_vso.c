/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_vso - the offload protocol as a dialect of the engine: its messages, both ways. vso_abi.h says what they are.
 *
 * What the driver may do wrong, and what then happens. "Ring broken": its err fd is signalled, VSE_EV_BROKEN says why, and
 * nothing more is read from it until it is attached again; messages before the bad one were served, chains are given back.
 *
 *	chain shorter than the header, or than hdr.len says; hdr.len above VSO_PAYLOAD_MAX	ring broken
 *	chain from the driver with a writable buffer, chain to the driver with a readable one	ring broken
 *	chain to the driver with less than VSO_RX_MIN writable bytes				ring broken
 *	unknown type, or a type only the device sends						ring broken
 *	anything but HELLO before the first HELLO; HELLO off pair 0, too short, wrong magic	ring broken
 *	CONNECT or BIND with id 0 or one of the device's ids					ring broken
 *	HELLO with another ABI major								HELLO_REPLY EPROTONOSUPPORT
 *	CONNECT or BIND with lengths that do not add up, a URI with odd bytes, bad options	refused with EINVAL
 *	... beyond max_flows									refused with ENFILE
 *	a message that its flow may not get in this state (the table `messages`), wrong pair	RESET EPROTO on the flow
 *	URGENT without its feature bit, or with other than one byte				RESET EPROTO on the flow
 *	credit exceeded, fwd_cnt beyond what was sent or going back				RESET EPROTO on the flow
 *	bytes beyond hdr.len in a chain; hdr.flags and reserved fields				ignored
 *	a message for a flow that is not there							ignored: it crossed
 *	a message for a flow that got RESET							ignored; options: ENOTCONN
 *	CLOSE for a flow that is not there (its open was refused meanwhile)			CLOSED
 *
 * So every CLOSE gets exactly one CLOSED.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vse_priv.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* --------------------------------------------------------------------------------------------------------- to the driver */

struct vso_hdr vse_vso_hdr(const struct vse_flow *f, uint32_t type, uint32_t arg, uint32_t len)
{
	bool stream = f->state == ST_STREAM;

	return (struct vso_hdr){
		.type = (uint16_t)type, .flow = (uint32_t)f->id, .len = len, .arg = arg,
		.buf_alloc = stream ? f->buf_alloc : 0, .fwd_cnt = stream ? f->fwd_cnt : 0,
	};
}

static void send_flow(struct vse_flow *f, uint32_t type, uint32_t arg)
{
	struct vso_hdr h = vse_vso_hdr(f, type, arg, 0);

	f->told = f->fwd_cnt;
	vse_send(f->pair, &h, NULL, 0);
}

void vse_vso_reply(struct vse_pair *p, struct vse_flow *f, uint32_t type, uint32_t id, uint32_t cookie, uint32_t verdict,
		   uint32_t error, const char *local, const char *peer)
{
	uint8_t buf[sizeof(struct vso_reply) + 2 * VSO_URI_MAX];
	size_t local_len = local ? strlen(local) : 0, peer_len = peer ? strlen(peer) : 0;
	struct vso_reply r = { .verdict = verdict, .error = error, .local_len = (uint16_t)local_len, .peer_len = (uint16_t)peer_len };
	struct vso_hdr h = { .type = (uint16_t)type, .flow = id, .cookie = cookie };

	memcpy(buf, &r, sizeof(r));
	memcpy(buf + sizeof(r), local ? local : "", local_len);
	memcpy(buf + sizeof(r) + local_len, peer ? peer : "", peer_len);
	h.len = (uint32_t)(sizeof(r) + local_len + peer_len);
	if (f && f->state == ST_STREAM) {
		h.buf_alloc = f->buf_alloc;
		h.fwd_cnt = f->told = f->fwd_cnt;
	}
	vse_send(p, &h, buf, h.len);
}

static uint32_t payload_len(const union vse_hdr *hdr)
{
	return hdr->vso.len;
}

static void say_data(const struct vse_flow *f, union vse_hdr *hdr, uint32_t len, bool last)
{
	hdr->vso = vse_vso_hdr(f, VSO_DATA, 0, len);
}

static void say_credit(struct vse_flow *f)
{
	send_flow(f, VSO_CREDIT, 0);
}

static void say_eof(struct vse_flow *f)
{
	send_flow(f, VSO_SHUTDOWN, VSO_SHUT_SEND);
}

static void say_urgent(struct vse_flow *f, bool here)
{
	struct vso_hdr h = vse_vso_hdr(f, VSO_URGENT, f->urgent, here);

	f->told = f->fwd_cnt;
	vse_send(f->pair, &h, &f->urgent, here);
}

static void say_reset(struct vse_flow *f, uint32_t error)
{
	send_flow(f, VSO_RESET, error);
}

static void say_answer(struct vse_flow *f, uint32_t asked, uint32_t verdict, uint32_t error, const char *local, const char *peer)
{
	vse_vso_reply(f->pair, f, asked == VSE_EV_BIND ? VSO_BIND_REPLY : VSO_CONNECT_REPLY, (uint32_t)f->id, f->cookie, verdict,
		      error, local, peer);
}

/* ------------------------------------------------------------------------------------------------------- from the driver */

static void on_hello(struct vse_pair *p, const struct vso_hdr *h, const struct vs_chain *c)
{
	struct vse_engine *e = p->e;
	struct vso_hdr out = { .type = VSO_HELLO_REPLY, .cookie = h->cookie, .len = sizeof(struct vso_hello) };
	struct vso_hello hello, reply;
	uint8_t buf[sizeof(reply) + VSO_NETNS_MAX];

	if (p != e->pairs || h->len < sizeof(hello) || vs_chain_read(c, sizeof(*h), &hello, sizeof(hello)) != sizeof(hello) ||
	    hello.magic != VSO_MAGIC) {
		vse_ring_break(e, &p->tx, "HELLO off pair 0, shorter than %zu bytes or without the magic",
			       sizeof(hello));
		return;
	}
	reply = (struct vso_hello){
		.magic = VSO_MAGIC, .abi_major = VSO_ABI_MAJOR, .abi_minor = MIN(hello.abi_minor, VSO_ABI_MINOR),
		.epoch = hello.epoch, .features = hello.features & e->config.features,
		.pairs = hello.pairs ? MIN(hello.pairs, e->config.pairs) : 1,
		.max_payload = VSO_PAYLOAD_MAX, .max_flows = e->config.max_flows,
	};
	if (hello.abi_major != VSO_ABI_MAJOR) {
		out.arg = EPROTONOSUPPORT;
		vse_send(p, &out, &reply, sizeof(reply));
		return;
	}
	if (!e->hello || e->epoch != hello.epoch) {
		/* the driver started anew: its old flows, and what was on its way to them, mean nothing to it */
		vse_flows_forget(e, false);
		for (uint32_t i = 0; i < e->config.pairs; i++)
			e->pairs[i].ctl_head = e->pairs[i].ctl_tail = 0;
		e->hello = true;
		e->epoch = hello.epoch;
		e->features = reply.features;
		e->max_payload = hello.max_payload ? MIN(hello.max_payload, (uint32_t)VSO_PAYLOAD_MAX) : VSO_PAYLOAD_MAX;
		vse_event(e, VSE_EV_HELLO, NULL, 0, 0, &hello, sizeof(hello));
	}
	if (reply.features & VSO_F_NETNS)
		reply.hairpin_len = (uint16_t)strlen(e->config.hairpin);
	memcpy(buf, &reply, sizeof(reply));
	memcpy(buf + sizeof(reply), e->config.hairpin, reply.hairpin_len);
	out.len += reply.hairpin_len;
	vse_send(p, &out, buf, out.len);
	if (reply.features & VSO_F_HINTS) {
		struct vso_hdr hints = { .type = VSO_HINTS, .len = e->config.nr_hints * sizeof(struct vso_hint) };

		vse_send(p, &hints, e->config.hints, hints.len);
	}
}

static void on_ping(struct vse_pair *p, const struct vso_hdr *h, const struct vs_chain *c)
{
	struct vso_hdr out = { .type = VSO_PONG, .cookie = h->cookie };

	vse_send(p, &out, NULL, 0);
}

static void on_pong(struct vse_pair *p, const struct vso_hdr *h, const struct vs_chain *c)
{
}

bool vse_printable(const void *text, uint32_t len)
{
	const uint8_t *s = text;

	for (uint32_t i = 0; i < len; i++)
		if (s[i] <= ' ' || s[i] > '~')
			return false;
	return true;
}

/* 0, or the errno to refuse with */
static int check_open(const struct vso_hdr *h, const uint8_t *payload, struct vso_open *o)
{
	const uint8_t *uri = payload + sizeof(*o);

	if (h->len < sizeof(*o) || h->len > VSE_PAYLOAD_MAX)
		return EINVAL;
	memcpy(o, payload, sizeof(*o));
	if (!o->uri_len || o->uri_len > VSO_URI_MAX || o->local_len > VSO_URI_MAX || o->opts_len > VSO_OPTS_MAX ||
	    o->name_len > VSO_NETNS_MAX || sizeof(*o) + o->uri_len + o->local_len + o->opts_len + o->name_len != h->len ||
	    (h->type == VSO_BIND && o->local_len))
		return EINVAL;
	if (!vse_printable(uri, o->uri_len + o->local_len) || !vse_opts_valid(uri + o->uri_len + o->local_len, o->opts_len) ||
	    !vse_printable(uri + o->uri_len + o->local_len + o->opts_len, o->name_len))
		return EINVAL;
	return 0;
}

static void on_open(struct vse_pair *p, const struct vso_hdr *h, const struct vs_chain *c)
{
	bool connect = h->type == VSO_CONNECT, dgram, ping, ipx;
	uint32_t reply = connect ? VSO_CONNECT_REPLY : VSO_BIND_REPLY, opts_off;
	struct vse_engine *e = p->e;
	struct vse_flow *f = vse_flow_find(e, h->flow);
	uint8_t payload[VSE_PAYLOAD_MAX];
	struct vso_open o;
	int error;

	if (!h->flow || h->flow & VSO_FLOW_DEVICE) {
		vse_ring_break(e, &p->tx, "the driver opens flow %#x: ids 1..0x7fffffff are its own", h->flow);
		return;
	}
	if (f && f->state == ST_DEAD)
		return;
	if (f && (f->pair != p || !connect || f->pending || (f->state != ST_BOUND && f->state != ST_DGRAM))) {
		vse_flow_reset(f, EPROTO);
		return;
	}
	vs_chain_read(c, sizeof(*h), payload, MIN(h->len, sizeof(payload)));
	error = check_open(h, payload, &o);
	ping = !error && o.uri_len >= 4 && !memcmp(payload + sizeof(o), "icmp", 4);
	ipx = !error && o.uri_len >= 4 && !memcmp(payload + sizeof(o), "ipx:", 4);
	dgram = ping || ipx || (!error && o.uri_len >= 3 && !memcmp(payload + sizeof(o), "udp", 3));
	if (!error && ((f && (f->dgram != dgram || f->ipx != ipx)) || (o.flags & VSO_OPEN_ADDR_ONLY && !(dgram && connect)) ||
		       (ipx && connect && e->features & VSO_F_IPX)))
		error = EINVAL;
	if (error) {
		vse_vso_reply(p, NULL, reply, h->flow, h->cookie, VSO_OFFLOAD, (uint32_t)error, NULL, NULL);
		return;
	}
	if ((dgram && !(e->features & VSO_F_DGRAM)) || (ipx && !(e->features & VSO_F_IPX))) {
		vse_vso_reply(p, NULL, reply, h->flow, h->cookie, VSO_NATIVE, 0, NULL, NULL);
		return;
	}
	if (!f && !(f = vse_flow_new(e, p, h->flow))) {
		vse_vso_reply(p, NULL, reply, h->flow, h->cookie, VSO_OFFLOAD, ENFILE, NULL, NULL);
		return;
	}
	f->dgram = dgram;
	if (o.sndbuf)	/* the window is the application's send buffer: what it bounds, we do not take beyond */
		vse_stream_bound(f, o.sndbuf);
	f->ping = ping;
	f->ipx = ipx;
	f->addr_only = o.flags & VSO_OPEN_ADDR_ONLY;
	f->pending = connect ? VSE_EV_CONNECT : VSE_EV_BIND;
	f->cookie = h->cookie;
	if (connect && !dgram) {
		f->peer_alloc = h->buf_alloc;
		f->peer_fwd = h->fwd_cnt;
	}
	if (o.opts_len) {
		opts_off = (uint32_t)sizeof(o) + o.uri_len + o.local_len;
		free(f->opts);
		f->opts = malloc(o.opts_len);
		f->opts_len = f->opts ? o.opts_len : 0;
		if (f->opts)
			memcpy(f->opts, payload + opts_off, o.opts_len);
	}
	if (!connect || !vse_routed(f, &o, payload))
		vse_event(e, connect ? VSE_EV_CONNECT : VSE_EV_BIND, f, 0, 0, payload, h->len);
}

static void on_close(struct vse_pair *p, const struct vso_hdr *h, const struct vs_chain *c)
{
	struct vse_flow *f = vse_flow_find(p->e, h->flow);
	struct vso_hdr out = { .type = VSO_CLOSED, .flow = h->flow };

	if (f && f->pair != p) {
		vse_flow_reset(f, EPROTO);
		return;
	}
	if (p->e->features & VSO_F_LATE_CLOSED)
		vse_send_late(p, &out);
	else
		vse_send(p, &out, NULL, 0);
	if (f)
		vse_flow_close(f, h->arg & VSO_CLOSE_ABORT);
}

static void on_credit(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c)
{
	if (f->state == ST_LISTEN)
		vse_stream_credit(f, h->buf_alloc, h->fwd_cnt);
}

static void on_shutdown(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c)
{
	vse_stream_shutdown(f, h->arg);
}

static void on_dgram(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c)
{
	vse_dgram_send(f, c, h);
}

static void on_dest(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c)
{
	vse_dgram_ask(f, c, h);
}

static void on_group(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c)
{
	struct vse_engine *e = f->pair->e;
	uint32_t verdict = VSO_OFFLOAD, error = 0;
	char uri[VSO_URI_MAX];

	if (!(e->features & VSO_F_GROUP))
		verdict = VSO_NATIVE;
	else if (!h->len || h->len > VSO_URI_MAX || vs_chain_read(c, sizeof(*h), uri, h->len) != h->len || !vse_printable(uri, h->len) ||
		 (h->arg != VSO_GROUP_JOIN && h->arg != VSO_GROUP_LEAVE))
		error = EINVAL;
	else if (f->group_asked)
		error = ENOBUFS;	/* one at a time */
	if (verdict || error) {
		vse_vso_reply(f->pair, f, VSO_DEST_REPLY, (uint32_t)f->id, h->cookie, verdict, error, NULL, NULL);
		return;
	}
	f->group_asked = true;
	f->group_cookie = h->cookie;
	vse_event(e, VSE_EV_GROUP, f, 0, h->arg, uri, h->len);
}

int vse_group(struct vse_engine *e, uint64_t handle, uint32_t verdict, uint32_t error)
{
	struct vse_flow *f;
	int rc = -ESTALE;

	vse_lock(e);
	f = vse_flow_of(e, handle);
	if (f && f->group_asked && f->state == ST_DGRAM) {
		f->group_asked = false;
		vse_vso_reply(f->pair, f, VSO_DEST_REPLY, (uint32_t)f->id, f->group_cookie, verdict, error, NULL, NULL);
		rc = 0;
	}
	vse_unlock(e);
	return rc;
}

static void on_listen(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c)
{
	if (f->pending)
		vse_flow_reset(f, EPROTO);
	else
		vse_listen(f, h);
}

#define IN(state) (1u << ST_##state)

/*
 * One row for each message the driver may send. on_pair: about no flow that must exist. on_flow: served in the `legal` states,
 * dropped in the `ignored` ones, RESET EPROTO in the others. DATA is served by data_run(), which takes several at once.
 */
static const struct message {
	void (*on_pair)(struct vse_pair *p, const struct vso_hdr *h, const struct vs_chain *c);
	void (*on_flow)(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c);
	unsigned legal, ignored;
} messages[] = {
	[VSO_HELLO] = { .on_pair = on_hello },
	[VSO_PING] = { .on_pair = on_ping },
	[VSO_PONG] = { .on_pair = on_pong },
	[VSO_CONNECT] = { .on_pair = on_open },
	[VSO_BIND] = { .on_pair = on_open },
	[VSO_CLOSE] = { .on_pair = on_close },
	[VSO_DATA] = { .legal = IN(STREAM), .ignored = IN(DEAD) },
	[VSO_CREDIT] = { .on_flow = on_credit, .legal = IN(NEW) | IN(STREAM) | IN(LISTEN),
			 .ignored = IN(BOUND) | IN(DGRAM) | IN(DEAD) },
	[VSO_SHUTDOWN] = { .on_flow = on_shutdown, .legal = IN(NEW) | IN(STREAM),
			   .ignored = IN(BOUND) | IN(LISTEN) | IN(DGRAM) | IN(DEAD) },
	[VSO_URGENT] = { .on_flow = vse_urgent_said, .legal = IN(STREAM), .ignored = IN(DEAD) },
	[VSO_DGRAM] = { .on_flow = on_dgram, .legal = IN(DGRAM), .ignored = IN(DEAD) },
	[VSO_DEST] = { .on_flow = on_dest, .legal = IN(DGRAM), .ignored = IN(DEAD) },
	[VSO_GROUP] = { .on_flow = on_group, .legal = IN(DGRAM), .ignored = IN(DEAD) },
	[VSO_LISTEN] = { .on_flow = on_listen, .legal = IN(BOUND) | IN(LISTEN), .ignored = IN(DEAD) },
	[VSO_SETSOCKOPT] = { .on_flow = vse_sockopt_said, .legal = IN(NEW) | IN(BOUND) | IN(LISTEN) | IN(STREAM) | IN(DGRAM) | IN(DEAD) },
	[VSO_GETSOCKOPT] = { .on_flow = vse_sockopt_said, .legal = IN(NEW) | IN(BOUND) | IN(LISTEN) | IN(STREAM) | IN(DGRAM) | IN(DEAD) },
};

static const struct message *message_of(uint16_t type)
{
	const struct message *m = type < sizeof(messages) / sizeof(*messages) ? &messages[type] : NULL;

	return m && (m->on_pair || m->legal) ? m : NULL;
}

/* the flow of a message if it may have it now, credit fields taken; NULL: dropped, or the flow was reset */
static struct vse_flow *admit(struct vse_pair *p, const struct message *m, const struct vso_hdr *h)
{
	struct vse_flow *f = vse_flow_find(p->e, h->flow);

	if (!f || m->ignored & 1u << f->state)
		return NULL;
	if (f->pair != p || !(m->legal & 1u << f->state)) {
		vse_flow_reset(f, EPROTO);
		return NULL;
	}
	vse_window_heard(f);
	if ((f->state == ST_STREAM || (f->state == ST_NEW && f->pending == VSE_EV_CONNECT && !f->dgram)) && !vse_stream_credit(f, h->buf_alloc, h->fwd_cnt))
		return NULL;
	return f;
}

/* DATA of one flow goes to the host in one call, up to a message that may be about more than another flow's bytes */
static void data_run(struct vse_pair *p, int first, int n)
{
	struct vse_engine *e = p->e;
	const struct vso_hdr *h = &e->hdrs[first].vso, *next;
	struct vse_flow *f = admit(p, &messages[VSO_DATA], h);
	int i, cnt, iovs = 0, last = first;
	size_t total = 0;

	if (!f)
		return;
	for (i = first; i < n && i - last <= VSE_RUN_GAP; i++) {
		next = &e->hdrs[i].vso;
		if (next->type != VSO_DATA && (next->type != VSO_CREDIT || next->flow == h->flow))
			break;
		if (next->flow != h->flow)
			continue;
		if (i > first && iovs + e->batch[i]->n_out > VSE_IOV)
			break;
		e->served |= 1ull << i;
		if (i > first && !vse_stream_credit(f, next->buf_alloc, next->fwd_cnt))
			return;
		total += vse_payload_iov(e->batch[i], false, sizeof(*h), next->len, e->iov + iovs, &cnt);
		iovs += cnt;
		last = i;
	}
	vse_stream_data(f, e->iov, iovs, total, false);
}

static bool well_formed(const struct vse_engine *e, int i)
{
	const struct vs_chain *c = e->batch[i];
	const struct vso_hdr *h = &e->hdrs[i].vso;

	return h->len <= VSO_PAYLOAD_MAX && h->len <= c->out_len - sizeof(*h) && message_of(h->type);
}

static bool plain(const struct vse_engine *e, int i, uint64_t *flow, uint32_t *len)
{
	const struct vso_hdr *h = &e->hdrs[i].vso;

	*flow = h->flow;
	*len = h->type == VSO_DATA ? h->len : 0;
	return h->type == VSO_DATA || h->type == VSO_CREDIT;
}

static void complain(struct vse_pair *p, int i)
{
	const struct vs_chain *c = p->e->batch[i];
	const struct vso_hdr *h = &p->e->hdrs[i].vso;

	if (!message_of(h->type))
		vse_ring_break(p->e, &p->tx, "chain %u has message type %u, which no driver sends", c->head, h->type);
	else
		vse_ring_break(p->e, &p->tx, "chain %u has %llu bytes, its header announces %u of payload (at most %u)",
			       c->head, (unsigned long long)c->out_len, h->len, VSO_PAYLOAD_MAX);
}

static void serve(struct vse_pair *p, int first, int end)
{
	struct vse_engine *e = p->e;
	const struct vso_hdr *h = &e->hdrs[first].vso;
	const struct message *m = message_of(h->type);
	struct vse_flow *f;

	if (!e->hello && h->type != VSO_HELLO)
		vse_ring_break(e, &p->tx, "message type %u before HELLO", h->type);
	else if (h->type == VSO_DATA)
		data_run(p, first, end);
	else if (m->on_pair)
		m->on_pair(p, h, e->batch[first]);
	else if ((f = admit(p, m, h)))
		m->on_flow(f, h, e->batch[first]);
}

const struct vse_dialect vse_vso = {
	.hdr_len = sizeof(struct vso_hdr),
	.rx_min = VSO_RX_MIN,
	.well_formed = well_formed,
	.plain = plain,
	.complain = complain,
	.serve = serve,
	.payload_len = payload_len,
	.data = say_data,
	.credit = say_credit,
	.eof = say_eof,
	.urgent = say_urgent,
	.reset = say_reset,
	.answer = say_answer,
};

_Static_assert((int)VSE_SHUT_SEND == (int)VSO_SHUT_SEND && (int)VSE_SHUT_RECV == (int)VSO_SHUT_RECV, "SHUTDOWN's arg is taken as it is");
