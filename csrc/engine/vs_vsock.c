/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_vsock - virtio-vsock as a dialect of the engine (virtio 1.3, 5.10). vsock_abi.h says what the packets are.
 *
 * A flow is a connection between a port of the guest and a port of the host (CID 2); its id is both ports. There are no listeners: for
 * each REQUEST of the guest Python is asked, and what comes from the host Python announces with vse_call().
 *
 *	         REQUEST                vse_connected: RESPONSE
 *	(none) -----------------> NEW ----------------------------> STREAM ---------> gone: RST was sent or received
 *	   |     vse_call: REQUEST          RESPONSE                ^    |
 *	   +--------------------> CALLING --------------------------+    | SHUTDOWN of both halves: RST, and while wbuf is not empty
 *	                                                                 +---------> LINGER
 *
 * RST ends a connection at once, whoever says it: its ports may be used again, so the id is given back with it. The flow itself lives
 * until the end of the turn (engine->gone), since whoever met the error still holds it. A guest that closes says SHUTDOWN of both
 * halves and waits for our RST, up to 8 seconds in Linux. It has it at once: bytes for a slow host peer linger without the guest.
 *
 * What the driver may do wrong, and what then happens:
 *
 *	chain shorter than the header, or than hdr.len says; a writable buffer			ring broken
 *	chain to the driver with a readable buffer, or without room for header and one byte	ring broken
 *	unknown type; a CID that is not the guest's or ours; anything about no connection	RST
 *	unknown op, an op that its connection may not get now (the table `ops`), other type	RST, the connection is reset
 *	REQUEST for a connection that is there							RST, the connection is reset
 *	REQUEST beyond max_flows								RST
 *	credit exceeded, fwd_cnt beyond what was sent or going back				RST, the connection is reset
 *	RST for what is not there								nothing: it crossed ours
 *	unknown flags; bytes beyond hdr.len in a chain						ignored
 *
 * Credit is the engine's own (vs_stream.c). A CREDIT_REQUEST is answered; we make none, since an update comes by itself from every
 * driver that has anything to tell, and asking again and again is what others stall on.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vse_priv.h"

enum { FIRST_PORT = 1 << 30 };		/* host ports of vse_call(): up to 2^31, where users of Firecracker expect them */

static uint64_t id_of(uint32_t guest_port, uint32_t host_port)
{
	return (uint64_t)guest_port << 32 | host_port;
}

/* --------------------------------------------------------------------------------------------------------- to the driver */

static struct vsk_hdr hdr_of(const struct vse_flow *f, uint32_t op, uint32_t flags, uint32_t len)
{
	return (struct vsk_hdr){
		.src_cid = VSK_CID_HOST, .dst_cid = f->pair->e->config.guest_cid,
		.src_port = (uint32_t)f->id, .dst_port = (uint32_t)(f->id >> 32),
		.len = len, .type = f->seq ? VSK_TYPE_SEQPACKET : VSK_TYPE_STREAM, .op = (uint16_t)op, .flags = flags,
		.buf_alloc = f->buf_alloc, .fwd_cnt = f->fwd_cnt,
	};
}

static void say(struct vse_flow *f, uint32_t op, uint32_t flags)
{
	struct vsk_hdr h = hdr_of(f, op, flags, 0);

	f->told = f->fwd_cnt;
	vse_send(f->pair, &h, NULL, 0);
}

static uint32_t payload_len(const union vse_hdr *hdr)
{
	return hdr->vsock.len;
}

static void say_data(const struct vse_flow *f, union vse_hdr *hdr, uint32_t len, bool last)
{
	hdr->vsock = hdr_of(f, VSK_OP_RW, last ? VSK_SEQ_EOM : 0, len);
}

static void say_credit(struct vse_flow *f)
{
	say(f, VSK_OP_CREDIT_UPDATE, 0);
}

static void say_eof(struct vse_flow *f)
{
	say(f, VSK_OP_SHUTDOWN, VSK_SHUTDOWN_SEND);
}

static void say_reset(struct vse_flow *f, uint32_t error)
{
	say(f, VSK_OP_RST, 0);
	vse_flow_gone(f);
}

static void say_answer(struct vse_flow *f, uint32_t asked, uint32_t verdict, uint32_t error, const char *local, const char *peer)
{
	say(f, verdict == VSO_OFFLOAD && !error ? VSK_OP_RESPONSE : VSK_OP_RST, 0);
}

/* the answer to what belongs to no connection of ours */
static void say_no(struct vse_pair *p, const struct vsk_hdr *h)
{
	struct vsk_hdr out = {
		.src_cid = h->dst_cid, .dst_cid = p->e->config.guest_cid, .src_port = h->dst_port, .dst_port = h->src_port,
		.type = h->type, .op = VSK_OP_RST,
	};

	if (h->op != VSK_OP_RST)
		vse_send(p, &out, NULL, 0);
}

/* ------------------------------------------------------------------------------------------------------- from the driver */

static void on_request(struct vse_pair *p, const struct vsk_hdr *h)
{
	struct vse_engine *e = p->e;
	struct vse_flow *f = vse_flow_find(e, id_of(h->src_port, h->dst_port));

	if (f) {
		vse_flow_reset(f, EPROTO);	/* which also is the answer */
		return;
	}
	f = vse_flow_new(e, p, id_of(h->src_port, h->dst_port));
	if (!f) {
		say_no(p, h);
		return;
	}
	f->seq = h->type == VSK_TYPE_SEQPACKET;
	f->pending = VSE_EV_CONNECT;
	f->peer_alloc = h->buf_alloc;
	f->peer_fwd = h->fwd_cnt;
	f->tx_cnt = h->fwd_cnt;		/* 0 from any driver in its senses */
	if (!vse_port_routed(f, h))
		vse_event(e, VSE_EV_CONNECT, f, 0, 0, h, sizeof(*h));
}

static void on_response(struct vse_flow *f, const struct vsk_hdr *h)
{
	char line[24];
	int rc, len;

	rc = vse_flow_poll(f);
	if (rc) {
		vse_flow_reset(f, (uint32_t)-rc);
		return;
	}
	f->state = ST_STREAM;
	vse_event(f->pair->e, VSE_EV_TAKEN, f, 0, 0, NULL, 0);
	len = f->greet ? snprintf(line, sizeof(line), "OK %u\n", (uint32_t)f->id) : 0;
	/* the first bytes into a socket that has taken none always fit; if not, nobody is there to read them */
	if (len && send(f->fd, line, (size_t)len, MSG_NOSIGNAL | MSG_DONTWAIT) != len) {
		vse_flow_reset(f, EPIPE);
		return;
	}
	vse_stream_begin(f);
}

static void on_rst(struct vse_flow *f, const struct vsk_hdr *h)
{
	/* after both ends were told it is no abort: the driver may say so first */
	bool orderly = f->state == ST_STREAM && f->shut & VSE_SHUT_SEND && f->host_eof;

	if (f->state == ST_CALLING)
		f->error = ECONNREFUSED;
	vse_flow_close(f, !orderly);
}

static void on_shutdown(struct vse_flow *f, const struct vsk_hdr *h)
{
	uint32_t how = (h->flags & VSK_SHUTDOWN_SEND ? VSE_SHUT_SEND : 0) | (h->flags & VSK_SHUTDOWN_RECEIVE ? VSE_SHUT_RECV : 0);

	bool both = ((f->shut | how) & (VSE_SHUT_SEND | VSE_SHUT_RECV)) == (VSE_SHUT_SEND | VSE_SHUT_RECV);

	if (both && f->state == ST_STREAM && !f->shared && !f->wlen)
		f->fin_sent = true;	/* by close(), below: nobody else holds the socket open */
	vse_stream_shutdown(f, how);
	if (f->state != ST_DEAD && both) {
		say(f, VSK_OP_RST, 0);
		vse_flow_close(f, false);
	}
}

static void on_credit_update(struct vse_flow *f, const struct vsk_hdr *h)
{
}

static void on_credit_request(struct vse_flow *f, const struct vsk_hdr *h)
{
	say_credit(f);
}

#define IN(state) (1u << ST_##state)

/* one row for each op: in which states its connection may get it. RW is served by data_run(), which takes several at once. */
static const struct op {
	void (*serve)(struct vse_flow *f, const struct vsk_hdr *h);
	unsigned legal;
} ops[] = {
	[VSK_OP_RESPONSE] = { on_response, IN(CALLING) },
	[VSK_OP_RST] = { on_rst, IN(NEW) | IN(CALLING) | IN(STREAM) },
	[VSK_OP_SHUTDOWN] = { on_shutdown, IN(NEW) | IN(STREAM) },
	[VSK_OP_RW] = { NULL, IN(STREAM) },
	[VSK_OP_CREDIT_UPDATE] = { on_credit_update, IN(NEW) | IN(STREAM) },
	[VSK_OP_CREDIT_REQUEST] = { on_credit_request, IN(STREAM) },
};

/* the connection of a packet if it may have it now, credit taken; NULL: it was answered */
static struct vse_flow *admit(struct vse_pair *p, const struct vsk_hdr *h)
{
	struct vse_engine *e = p->e;
	struct vse_flow *f = NULL;

	if (h->dst_cid == VSK_CID_HOST && h->src_cid == e->config.guest_cid)
		f = vse_flow_find(e, id_of(h->src_port, h->dst_port));
	if (!f) {
		say_no(p, h);
		return NULL;
	}
	if (h->op >= sizeof(ops) / sizeof(*ops) || !(ops[h->op].legal & 1u << f->state) ||
	    h->type != (f->seq ? VSK_TYPE_SEQPACKET : VSK_TYPE_STREAM)) {
		vse_flow_reset(f, EPROTO);
		return NULL;
	}
	if (h->op != VSK_OP_RST && !vse_stream_credit(f, h->buf_alloc, h->fwd_cnt))
		return NULL;
	return f;
}

static bool same_flow(const struct vsk_hdr *a, const struct vsk_hdr *b)
{
	return a->src_port == b->src_port && a->dst_port == b->dst_port && a->src_cid == b->src_cid && a->dst_cid == b->dst_cid;
}

/* RW of one connection goes to the host in one call, up to a packet that may be about more than another one's bytes */
static void data_run(struct vse_pair *p, int first, int n)
{
	struct vse_engine *e = p->e;
	const struct vsk_hdr *h = &e->hdrs[first].vsock, *next;
	struct vse_flow *f = admit(p, h);
	int i, cnt, iovs = 0, last = first;
	size_t total = 0;

	if (!f)
		return;
	for (i = first; i < n && i - last <= VSE_RUN_GAP; i++) {
		bool same;

		next = &e->hdrs[i].vsock;
		same = same_flow(next, h);
		if (next->op != VSK_OP_RW && (next->op != VSK_OP_CREDIT_UPDATE || same))
			break;
		if (!same)
			continue;
		if (i > first && (f->seq || next->type != h->type || iovs + e->batch[i]->n_out > VSE_IOV))
			break;
		e->served |= 1ull << i;
		if (i > first && !vse_stream_credit(f, next->buf_alloc, next->fwd_cnt))
			return;
		total += vse_payload_iov(e->batch[i], false, sizeof(*h), next->len, e->iov + iovs, &cnt);
		iovs += cnt;
		/* counters are 32 bits wide, a chain may be larger: what cannot be within credit must not wrap around to it */
		if (total > f->promised) {
			vse_flow_reset(f, EPROTO);
			return;
		}
		last = i;
	}
	vse_stream_data(f, e->iov, iovs, total, h->flags & VSK_SEQ_EOM);
}

static bool well_formed(const struct vse_engine *e, int i)
{
	return e->hdrs[i].vsock.len <= e->batch[i]->out_len - sizeof(struct vsk_hdr);
}

static bool plain(const struct vse_engine *e, int i, uint64_t *flow, uint32_t *len)
{
	const struct vsk_hdr *h = &e->hdrs[i].vsock;

	*flow = id_of(h->src_port, h->dst_port);
	*len = h->op == VSK_OP_RW ? h->len : 0;
	return h->op == VSK_OP_RW || h->op == VSK_OP_CREDIT_UPDATE;
}

static void complain(struct vse_pair *p, int i)
{
	const struct vs_chain *c = p->e->batch[i];

	vse_ring_break(p->e, &p->tx, "chain %u has %llu bytes, its header of %zu announces %u of payload", c->head,
		       (unsigned long long)c->out_len, sizeof(struct vsk_hdr), p->e->hdrs[i].vsock.len);
}

static bool is_request(const struct vse_engine *e, const struct vsk_hdr *h)
{
	return h->op == VSK_OP_REQUEST && h->dst_cid == VSK_CID_HOST && h->src_cid == e->config.guest_cid &&
	       (h->type == VSK_TYPE_STREAM || h->type == VSK_TYPE_SEQPACKET);
}

static void serve(struct vse_pair *p, int first, int end)
{
	const struct vsk_hdr *h = &p->e->hdrs[first].vsock;
	struct vse_flow *f;

	if (h->op == VSK_OP_RW)
		data_run(p, first, end);
	else if (is_request(p->e, h))
		on_request(p, h);
	else if ((f = admit(p, h)))
		ops[h->op].serve(f, h);
}

const struct vse_dialect vse_vsock = {
	.hdr_len = sizeof(struct vsk_hdr),
	.capped = true,
	.rx_min = sizeof(struct vsk_hdr) + 1,
	.well_formed = well_formed,
	.plain = plain,
	.complain = complain,
	.serve = serve,
	.payload_len = payload_len,
	.data = say_data,
	.credit = say_credit,
	.eof = say_eof,
	.reset = say_reset,
	.answer = say_answer,
};

/* -------------------------------------------------------------------------------------------------------- from the host */

static uint32_t free_port(struct vse_engine *e, uint32_t guest_port)
{
	uint32_t port;

	/* there are fewer flows than ports */
	do {
		port = FIRST_PORT + e->next_port++ % FIRST_PORT;
	} while (vse_flow_find(e, id_of(guest_port, port)));
	return port;
}

int vse_call(struct vse_engine *e, int fd, uint32_t guest_port, bool greet, uint64_t *handle)
{
	struct vse_pair *p = e->pairs;
	socklen_t len = sizeof(int);
	struct vse_flow *f = NULL;
	int type = 0, rc = 0, fl;

	vse_lock(e);
	fl = fcntl(fd, F_GETFL);
	if (e->dialect != &vse_vsock)
		rc = -EOPNOTSUPP;
	else if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) || fl < 0 || fcntl(fd, F_SETFL, fl | O_NONBLOCK))
		rc = -errno;
	else if (type != SOCK_STREAM && type != SOCK_SEQPACKET)
		rc = -EPROTOTYPE;
	else if (!p->rx.vq || p->rx.broken || !p->tx.vq || p->tx.broken)
		rc = -ENOTCONN;		/* no driver that could answer */
	else if (p->ctl_tail - p->ctl_head >= VSE_CTL_PAUSE || vse_paused(e))
		rc = -EAGAIN;
	else if (!(f = vse_flow_new(e, p, id_of(guest_port, free_port(e, guest_port)))))
		rc = -ENFILE;
	if (rc) {
		close(fd);
	} else {
		f->fd = fd;
		f->state = ST_CALLING;
		f->counted = true;
		f->seq = type == SOCK_SEQPACKET;
		f->greet = greet;
		*handle = f->handle;
		say(f, VSK_OP_REQUEST, 0);
	}
	vse_unlock(e);
	return rc;
}
