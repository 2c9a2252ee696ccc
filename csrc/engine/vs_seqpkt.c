/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_seqpkt - messages of seqpacket flows: what vs_stream.c does for bytes, for messages whose bounds must be kept.
 *
 * To the host.  A message comes in any number of pieces and goes to the host in one sendmsg, so it waits in wbuf until it is whole;
 * one that comes whole and finds nothing before it goes straight out of guest memory. wbuf is no ring here but records, a 32-bit length
 * and the bytes each, of which the last may be incomplete (`partial`). Credit counts the bytes; lengths are overhead of ours. An honest
 * driver may send nothing but messages of one byte, so wbuf has room for 4 bytes more for each byte of the window. Empty messages take
 * no credit: EMPTY_MAX of them are held, one more resets the flow.
 *
 * A driver with part of a message out waits for credit to send the rest, and only the rest makes us forward anything. So while there is a
 * partial message, every byte of window that became free is told at once, and a message that fills the whole window without an end can
 * never have one: EMSGSIZE.
 *
 * To the guest.  A message that fits the window and the chain is read straight into it. Others are read into rmsg and sent piece by piece,
 * as window and chains come. One that is larger than all of the guest's buffer can never arrive: the flow is reset with EMSGSIZE.
 *
 * The end.  recv() gives 0 for an empty message as for the end. It is the end when the peer has shut down and nothing is left to read; so an
 * empty message is lost if nothing but the end follows it.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "vse_priv.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))

enum { EMPTY_MAX = 1024, LEN = sizeof(uint32_t) };

void vse_seq_begin(struct vse_flow *f)
{
	int have = 0, want = (int)f->buf_alloc;
	socklen_t len = sizeof(have);

	/* a message must fit the socket's send buffer as a whole; the kernel doubles what it is asked for and caps it (net.core.wmem_max) */
	if (!getsockopt(f->fd, SOL_SOCKET, SO_SNDBUF, &have, &len) && have < 2 * want)
		setsockopt(f->fd, SOL_SOCKET, SO_SNDBUF, &want, sizeof(want));
}

static void free_rmsg(struct vse_flow *f)
{
	if (!f->rmsg)
		return;
	f->pair->e->reserved -= f->rlen;
	free(f->rmsg);
	f->rmsg = NULL;
}

void vse_seq_free(struct vse_flow *f)
{
	free_rmsg(f);
	f->held = f->empties = 0;
	f->partial = false;
}

/* --------------------------------------------------------------------------------------------------------- to the host */

/* one message; true: the host took it. False: not now, or f->error. */
static bool host_take(struct vse_flow *f, struct iovec *iov, int cnt, size_t len)
{
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = (size_t)cnt };
	ssize_t n;

	do {
		n = sendmsg(f->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
	} while (n < 0 && errno == EINTR);
	if (n < 0) {
		f->writable = false;
		if (errno != EAGAIN)
			vse_stream_failed(f, errno);
		return false;
	}
	f->fwd_cnt += (uint32_t)len;
	f->to_host += len;
	f->pair->e->stats.to_host += len;
	return true;
}

/* room for len bytes at the end of wbuf; false: there may not be so much, or no memory */
static bool room(struct vse_flow *f, size_t len)
{
	struct vse_engine *e = f->pair->e;
	size_t most = (size_t)f->buf_alloc * (1 + LEN) + EMPTY_MAX * LEN, cap = f->wcap ? f->wcap : 4096;
	uint8_t *buf;

	if (f->wcap - f->whead >= f->wlen + len)
		return true;
	if (f->wlen + len > most)
		return false;
	while (cap < f->wlen + len)
		cap *= 2;
	if (cap == f->wcap && f->whead >= f->wlen) {	/* half of it is behind us: no byte moves more often than it was put */
		memmove(f->wbuf, f->wbuf + f->whead, f->wlen);
		f->whead = 0;
		return true;
	}
	if (cap == f->wcap)
		cap *= 2;
	if (e->reserved - f->wcap + cap > e->config.buf_total || !(buf = malloc(cap)))
		return false;
	if (f->wlen)
		memcpy(buf, f->wbuf + f->whead, f->wlen);
	free(f->wbuf);
	e->reserved += cap - f->wcap;
	f->wbuf = buf;
	f->wcap = (uint32_t)cap;
	f->whead = 0;
	return true;
}

static void append(struct vse_flow *f, const void *data, size_t len)
{
	if (len)
		memcpy(f->wbuf + f->whead + f->wlen, data, len);
	f->wlen += (uint32_t)len;
	f->pair->e->stats.buffered += len;
}

/* a piece to the end of wbuf; false: no room */
static bool hold(struct vse_flow *f, const struct iovec *iov, int cnt, size_t total, bool eom)
{
	const uint32_t none = 0;
	size_t need = total + (f->partial ? 0 : LEN);
	bool empty = !f->partial && eom && !total;

	if ((empty && f->empties == EMPTY_MAX) || !room(f, need))
		return false;
	f->empties += empty;
	if (!f->partial) {
		append(f, &none, LEN);
		f->part = 0;
		f->partial = true;
	}
	for (int i = 0; i < cnt; i++)
		append(f, iov[i].iov_base, iov[i].iov_len);
	f->part += (uint32_t)total;
	f->held += (uint32_t)total;
	if (eom) {
		memcpy(f->wbuf + f->whead + f->wlen - f->part - LEN, &f->part, LEN);
		f->partial = false;
	}
	return true;
}

void vse_seq_send(struct vse_flow *f)
{
	struct vse_engine *e = f->pair->e;

	while (f->writable && f->wlen && !(f->partial && f->wlen == LEN + f->part)) {
		struct iovec iov = { f->wbuf + f->whead + LEN, 0 };
		uint32_t len;

		memcpy(&len, f->wbuf + f->whead, LEN);
		iov.iov_len = len;
		if (!host_take(f, &iov, 1, len))
			break;		/* on an error wbuf is gone, and all of it counted as forwarded */
		f->held -= len;
		f->empties -= !len;
		f->whead += LEN + len;
		f->wlen -= LEN + len;
		e->stats.buffered -= LEN + len;
	}
	if (!f->wlen && f->wbuf)
		vse_stream_free_wbuf(f);
}

/* a piece of a message was counted in rx_cnt; the credit is right, and the host's side is whole */
void vse_seq_data(struct vse_flow *f, struct iovec *iov, int cnt, size_t total, bool eom)
{
	if (eom && !f->wlen && f->writable && cnt <= VSE_IOV_CALL && (host_take(f, iov, cnt, total) || f->error)) {
		if (f->error)
			f->fwd_cnt += (uint32_t)total;
		return;
	}
	if (!hold(f, iov, cnt, total, eom))
		vse_flow_reset(f, ENOBUFS);
	else if (f->partial && f->part >= f->buf_alloc)
		vse_flow_reset(f, EMSGSIZE);
	else
		vse_seq_send(f);
}

/* -------------------------------------------------------------------------------------------------------- to the guest */

/* len bytes are in the chain */
static void put(struct vse_flow *f, struct vs_chain *c, uint32_t len, bool last)
{
	struct vse_engine *e = f->pair->e;
	union vse_hdr h;

	e->dialect->data(f, &h, len, last);
	f->told = f->fwd_cnt;
	vse_rx_put(f->pair, c, &h, len);
	f->tx_cnt += len;
	f->to_guest += len;
	e->stats.to_guest += len;
}

/* the next piece of rmsg; bytes, 0: no window, -ENOSPC: no chain */
static ssize_t put_piece(struct vse_flow *f, uint32_t window)
{
	struct vse_engine *e = f->pair->e;
	uint32_t len = MIN(MIN(f->rlen - f->rat, window), e->max_payload);
	struct vs_chain *c;

	if (!len)
		return 0;
	c = vse_rx_get(f->pair);
	if (!c)
		return -ENOSPC;
	len = (uint32_t)MIN(len, c->in_len - e->dialect->hdr_len);
	vs_chain_write(c, e->dialect->hdr_len, f->rmsg + f->rat, len);
	f->rat += len;
	put(f, c, len, f->rat == f->rlen);
	if (f->rat == f->rlen)
		free_rmsg(f);
	return len;
}

/* is a recv() of nothing the end, or an empty message? */
static bool at_end(const struct vse_flow *f)
{
	struct pollfd p = { .fd = f->fd, .events = POLLRDHUP };
	int left = 0;

	return poll(&p, 1, 0) == 1 && p.revents & (POLLRDHUP | POLLHUP | POLLERR) && !(ioctl(f->fd, FIONREAD, &left) == 0 && left);
}

/* a message into a chain as a whole, or into rmsg; its bytes, -ENOSPC: no chain, or -errno. *empty: it has none. */
static ssize_t take(struct vse_flow *f, uint32_t window, bool *empty)
{
	struct vse_engine *e = f->pair->e;
	struct vs_chain *c;
	struct msghdr msg = { .msg_iov = e->iov };
	ssize_t size = recv(f->fd, e->scratch, 1, MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT), n;
	int cnt;

	if (size < 0)
		return -errno;
	if (!size && at_end(f))
		return 0;
	*empty = !size;
	if (size > f->peer_alloc)
		return -EMSGSIZE;
	c = vse_rx_get(f->pair);
	if (!c)
		return -ENOSPC;
	if (size <= window && size <= e->max_payload && (size_t)size <= c->in_len - e->dialect->hdr_len) {
		vse_payload_iov(c, true, e->dialect->hdr_len, (size_t)size, e->iov, &cnt);
		msg.msg_iovlen = (size_t)MIN(cnt, (int)VSE_IOV_CALL);
		n = recvmsg(f->fd, &msg, MSG_DONTWAIT);
		if (n < 0 || msg.msg_flags & MSG_TRUNC) {
			n = n < 0 ? -errno : -EMSGSIZE;		/* in more buffers than one call takes */
			vse_rx_unget(f->pair, c);
			return n;
		}
		put(f, c, (uint32_t)n, true);
		return n;
	}
	vse_rx_unget(f->pair, c);
	if (e->reserved + (uint64_t)size > e->config.buf_total || !(f->rmsg = malloc((size_t)size)))
		return -ENOBUFS;
	f->rlen = (uint32_t)size;
	f->rat = 0;
	e->reserved += (uint64_t)size;
	n = recv(f->fd, f->rmsg, (size_t)size, MSG_DONTWAIT);
	if (n != size) {
		n = n < 0 ? -errno : -EIO;
		free_rmsg(f);
	}
	return n;
}

enum vse_turn vse_seq_turn(struct vse_flow *f)
{
	int64_t budget = vse_budget(f);

	for (int msgs = 0; f->state == ST_STREAM; msgs++) {
		uint32_t window = vse_stream_window(f);
		bool empty = false;
		ssize_t n;

		if (budget <= 0 || msgs == VSE_TURN_MSGS)
			return TURN_AGAIN;
		if (f->shut & VSE_SHUT_RECV)
			free_rmsg(f);
		if (f->rmsg) {
			n = put_piece(f, window);
			if (!n)
				return TURN_DONE;	/* CREDIT puts it on the queue again */
		} else if (!f->readable || f->host_eof) {
			return TURN_DONE;
		} else if (f->shut & VSE_SHUT_RECV) {
			n = vse_stream_drop(f);
		} else {
			n = take(f, window, &empty);
		}
		if (n == -ENOSPC)
			return TURN_STARVED;
		if (n < 0 || (!n && !empty))
			vse_stream_quiet(f, n);
		budget -= n;
	}
	return TURN_DONE;
}
