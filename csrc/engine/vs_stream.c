/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_stream - bytes of stream flows, whatever the dialect. Words in capitals are the offload protocol's; every dialect has its own.
 *
 * To the host.  A run of DATA is sent straight out of guest memory. What the host socket does not take is copied to wbuf, and
 * the chains complete at once, so a slow host peer holds no ring slot. fwd_cnt counts what the host socket took, and the
 * driver may have at most buf_alloc bytes beyond it under way, so wbuf never exceeds what buf_alloc has been. EPOLLOUT goes on with wbuf; while it
 * holds anything, new bytes queue behind it. SHUTDOWN(SEND) becomes a FIN when wbuf is empty.
 *
 * Window updates.  fwd_cnt rides on every message of the flow. CREDIT on its own is sent when half of the window, which may grow (vs_window.c), became free since the
 * driver last heard (`told`). That cannot stall: when all is forwarded, either the driver knows of more than half of its
 * window, or the other half is being told.
 *
 * To the guest.  A readable flow with window takes its turn on a run queue (vs_turn.c): chains, one read straight into them, at most
 * VSE_TURN_BYTES, then the next flow. Without chains the queue waits for the rx kick.
 *
 * The end.  In the order of TCP: data, then EOF (SHUTDOWN SEND, once) or the error (RESET). An error that a write meets is
 * kept in `error` while reading goes on until nothing is left, then RESET carries it, never a clean EOF. Meanwhile bytes from the
 * guest are dropped; a guest that keeps writing a whole window into this without reading gets its RESET at once.
 * With no window left, a hang-up is told from waiting data by a peek, so that EOF and errors need no credit.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "vse_priv.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))

enum { DISCARD_ROUNDS = 256 };		/* of VSE_SCRATCH bytes: more than the largest receive buffer tcp_rmem grants */

/* --------------------------------------------------------------------------------------------------- the driver's credit */

/* take the credit fields of a message; on a listening flow they count connections */
bool vse_stream_credit(struct vse_flow *f, uint32_t buf_alloc, uint32_t fwd_cnt)
{
	if (fwd_cnt - f->peer_fwd > f->tx_cnt - f->peer_fwd) {
		vse_flow_reset(f, EPROTO);
		return false;
	}
	if (fwd_cnt != f->peer_fwd || buf_alloc != f->peer_alloc) {
		f->peer_fwd = fwd_cnt;
		f->peer_alloc = buf_alloc;
		if (f->readable)
			vse_flow_run(f);
	}
	return true;
}

/* the application's send buffer bounds the window; a driver that knows a larger one hears with the next message */
void vse_stream_bound(struct vse_flow *f, uint32_t sndbuf)
{
	vse_window_fix(f);
	f->buf_alloc = MIN(sndbuf < VSE_WINDOW_MIN ? VSE_WINDOW_MIN : sndbuf, f->pair->e->config.buf_alloc);
	if (f->state != ST_STREAM || f->promised < f->buf_alloc)
		f->promised = f->buf_alloc;
}

uint32_t vse_stream_window(const struct vse_flow *f)
{
	uint32_t used = f->tx_cnt - f->peer_fwd;

	return used < f->peer_alloc ? f->peer_alloc - used : 0;
}

static bool update_due(const struct vse_flow *f)
{
	uint32_t freed = f->fwd_cnt - f->told, window = f->buf_alloc;

	if (f->pair->e->dialect->capped)
		window = MIN(window, f->peer_alloc);
	return freed && (freed >= window / 2 || f->partial);
}

/* --------------------------------------------------------------------------------------------------------- to the host */

/* the write side met an error: what is readable still goes to the guest, then RESET */
void vse_stream_failed(struct vse_flow *f, int error)
{
	if (!f->error)
		f->error = (uint32_t)error;
	f->fwd_cnt += f->seq ? f->held : f->wlen;
	f->held = f->empties = 0;
	f->partial = false;
	vse_stream_free_wbuf(f);
	f->readable = f->hup = true;
	vse_flow_run(f);
}

/*
 * Send as much as the host takes; uses up iov. Returns the bytes it took. With MSG_OOB in flags it is one byte: a peer that knows no
 * urgent data (a Unix socket of an old kernel) gets it as one of the stream, which loses less than the byte.
 */
static size_t host_send(struct vse_flow *f, struct iovec *iov, int cnt, int flags)
{
	struct msghdr msg = { 0 };
	size_t done = 0;
	ssize_t n;

	while (cnt && f->writable) {
		msg.msg_iov = iov;
		msg.msg_iovlen = (size_t)MIN(cnt, (int)VSE_IOV_CALL);
		n = sendmsg(f->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT | flags);
		if (n < 0) {
			if (errno == EINTR)
				continue;
			if (errno == EOPNOTSUPP && flags) {
				flags = 0;
				continue;
			}
			f->writable = false;
			/* EFAULT: the guest's memory is gone; the ring learns it from its own access */
			if (errno != EAGAIN)
				vse_stream_failed(f, errno);
			break;
		}
		done += (size_t)n;
		for (; cnt && (size_t)n >= iov->iov_len; iov++, cnt--)
			n -= (ssize_t)iov->iov_len;
		if (cnt) {
			iov->iov_base = (char *)iov->iov_base + n;
			iov->iov_len -= (size_t)n;
		}
	}
	f->to_host += done;
	f->pair->e->stats.to_host += done;
	return done;
}

void vse_stream_free_wbuf(struct vse_flow *f)
{
	struct vse_engine *e = f->pair->e;

	e->stats.buffered -= f->wlen;
	e->reserved -= f->wcap;
	free(f->wbuf);
	f->wbuf = NULL;
	f->wcap = f->whead = f->wlen = 0;
}

/* room for len more bytes, in powers of two up to what was promised; false: over buf_total, or no memory */
static bool wbuf_grow(struct vse_flow *f, uint32_t len)
{
	struct vse_engine *e = f->pair->e;
	uint32_t cap = f->wcap ? f->wcap : 4096, first;
	uint8_t *buf;

	while (cap < f->wlen + len)
		cap *= 2;
	cap = MIN(cap, f->promised);
	if (e->reserved - f->wcap + cap > e->config.buf_total || !(buf = malloc(cap)))
		return false;
	first = MIN(f->wlen, f->wcap - f->whead);
	if (f->wlen) {
		memcpy(buf, f->wbuf + f->whead, first);
		memcpy(buf + first, f->wbuf, f->wlen - first);
	}
	free(f->wbuf);
	e->reserved += cap - f->wcap;
	f->wbuf = buf;
	f->wcap = cap;
	f->whead = 0;
	return true;
}

static void wbuf_put(struct vse_flow *f, const struct iovec *iov, int cnt, size_t len)
{
	/* the credit check bounds wlen + len by promised */
	if (f->wcap < f->wlen + len && !wbuf_grow(f, (uint32_t)len)) {
		vse_flow_reset(f, ENOBUFS);
		return;
	}
	for (; cnt; iov++, cnt--) {
		uint32_t n = (uint32_t)iov->iov_len, tail = f->whead + f->wlen, first;

		tail = tail >= f->wcap ? tail - f->wcap : tail;
		first = MIN(n, f->wcap - tail);
		memcpy(f->wbuf + tail, iov->iov_base, first);
		memcpy(f->wbuf, (char *)iov->iov_base + first, n - first);
		f->wlen += n;
		f->pair->e->stats.buffered += n;
	}
}

static void send_fin(struct vse_flow *f)
{
	if (f->shut & VSE_SHUT_SEND && !f->wlen && !f->fin_sent && !f->error) {
		f->fin_sent = true;
		/* ENOTCONN: a reset came meanwhile, which reading reports */
		shutdown(f->fd, SHUT_WR);
	}
}

static void wbuf_send(struct vse_flow *f)
{
	if (f->seq)
		vse_seq_send(f);
	while (!f->seq && f->wlen && f->writable) {
		uint32_t ahead = f->urgent_out ? f->urgent_at - f->fwd_cnt : f->wlen;
		uint32_t len = ahead ? MIN(f->wlen, ahead) : 1, first = MIN(len, f->wcap - f->whead);
		struct iovec iov[2] = { { f->wbuf + f->whead, first }, { f->wbuf, len - first } };
		uint32_t n = (uint32_t)host_send(f, iov, iov[1].iov_len ? 2 : 1, ahead ? 0 : MSG_OOB);

		if (!n || f->error)
			break;		/* on an error wbuf is gone, and all of it counted as forwarded */
		if (!ahead)
			f->urgent_out = false;
		f->fwd_cnt += n;
		f->wlen -= n;
		f->whead += n;
		if (f->whead >= f->wcap)
			f->whead -= f->wcap;
		f->pair->e->stats.buffered -= n;
	}
	if (!f->wlen && f->wbuf)
		vse_stream_free_wbuf(f);
	if (f->state == ST_STREAM) {
		send_fin(f);
		if (update_due(f))
			vse_flow_run(f);
	}
}

void vse_stream_data(struct vse_flow *f, struct iovec *iov, int cnt, size_t total, bool last)
{
	size_t done = 0;

	f->rx_cnt += (uint32_t)total;
	if (f->shut & VSE_SHUT_SEND || f->rx_cnt - f->told > f->promised) {
		vse_flow_reset(f, EPROTO);
		return;
	}
	if (f->seq && !f->error) {
		vse_seq_data(f, iov, cnt, total, last);
		if (f->state == ST_STREAM && update_due(f))
			vse_flow_run(f);
		return;
	}
	if (!f->error && !f->wlen) {
		done = host_send(f, iov, cnt, f->urgent_out ? MSG_OOB : 0);
		if (done)
			f->urgent_out = false;
	}
	f->fwd_cnt += (uint32_t)done;
	if (f->error) {
		f->fwd_cnt += (uint32_t)(total - done);
		f->dropped += (uint32_t)(total - done);
		if (f->dropped >= f->promised)
			vse_flow_reset(f, f->error);
		else if (update_due(f))
			vse_flow_run(f);
		return;
	}
	if (done < total) {
		/* host_send() used up what it sent: the rest starts at the first iovec that is not empty */
		int skip = 0;
		size_t left = 0;

		for (int i = cnt; i > 0 && left < total - done; i--) {
			left += iov[i - 1].iov_len;
			skip = i - 1;
		}
		wbuf_put(f, iov + skip, cnt - skip, total - done);
		return;
	}
	if (update_due(f))
		vse_flow_run(f);
}

/* With nothing held back it is sent by itself now. Otherwise it waits in its place; a newer one before it is sent makes it one of many. */
void vse_stream_urgent(struct vse_flow *f, uint8_t byte)
{
	struct iovec iov = { &byte, 1 };

	f->urgent_out = !f->seq;
	f->urgent_at = f->rx_cnt;
	vse_stream_data(f, &iov, 1, 1, true);
}

void vse_stream_shutdown(struct vse_flow *f, uint32_t how)
{
	if (how & ~(uint32_t)(VSE_SHUT_SEND | VSE_SHUT_RECV)) {
		vse_flow_reset(f, EPROTO);
		return;
	}
	if (how & VSE_SHUT_SEND && f->partial) {
		vse_flow_reset(f, EPROTO);	/* the rest of a message never comes */
		return;
	}
	f->shut |= how;
	if (f->state != ST_STREAM)
		return;			/* NEW: vse_stream_begin() comes back to it */
	send_fin(f);
	if (f->shut & VSE_SHUT_RECV && f->readable)
		vse_flow_run(f);
}

/* -------------------------------------------------------------------------------------------------------- to the guest */

void vse_stream_begin(struct vse_flow *f)
{
	if (f->seq)
		vse_seq_begin(f);
	f->writable = true;		/* a socket that is not says EAGAIN; whether it is readable epoll says at once */
	send_fin(f);
}

static void host_eof(struct vse_flow *f)
{
	f->readable = false;
	f->host_eof = true;
	f->pair->e->dialect->eof(f);
}

/* read and forget: the guest shut down its receiving side */
ssize_t vse_stream_drop(struct vse_flow *f)
{
	ssize_t n = recv(f->fd, f->pair->e->scratch, VSE_SCRATCH, MSG_DONTWAIT);

	return n < 0 ? -errno : n;
}

/* one read into as many chains as the last one gives reason for, `*full` when it filled them; bytes, or -errno, or -ENOSPC: no chain */
static ssize_t host_read(struct vse_flow *f, uint32_t limit, bool *full)
{
	struct vse_engine *e = f->pair->e;
	struct msghdr msg = { .msg_iov = e->iov };
	size_t total;
	ssize_t n;
	int cnt;

	total = vse_rx_gather(f->pair, f->burst, limit, &cnt);
	if (!total)
		return -ENOSPC;
	msg.msg_iovlen = (size_t)cnt;
	n = recvmsg(f->fd, &msg, MSG_DONTWAIT);
	if (n <= 0) {
		n = n < 0 ? -errno : 0;
		vse_rx_gathered(f, 0);
		return n;
	}
	*full = (size_t)n == total;
	f->burst = (uint32_t)MIN(*full ? 2 * n : n, VSE_TURN_BYTES);
	vse_rx_gathered(f, (size_t)n);
	f->told = f->fwd_cnt;
	f->tx_cnt += (uint32_t)n;
	f->to_guest += (uint64_t)n;
	e->stats.to_guest += (uint64_t)n;
	return n;
}

/* with no window: is it the end (0 or -errno) or data that must wait (1)? */
static ssize_t host_peek(struct vse_flow *f)
{
	char byte;
	ssize_t n = recv(f->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);

	return n < 0 ? -errno : n;
}

/* after a read that gave no data: the end of the stream, its error, or nothing now */
void vse_stream_quiet(struct vse_flow *f, ssize_t rc)
{
	if (rc == -EINTR)
		return;
	f->readable = false;
	if (f->error)
		vse_flow_reset(f, f->error);
	else if (!rc)
		host_eof(f);
	else if (rc != -EAGAIN)
		vse_flow_reset(f, (uint32_t)-rc);
}

static enum vse_turn read_turn(struct vse_flow *f)
{
	int64_t budget = vse_budget(f);
	bool full = false;

	for (int msgs = 0; f->state == ST_STREAM && f->readable && !f->host_eof; msgs++) {
		bool discard = f->shut & VSE_SHUT_RECV;
		uint32_t limit;
		ssize_t n;

		if (budget <= 0 || msgs == VSE_TURN_MSGS)
			return TURN_AGAIN;
		if ((f->pri_seen || f->pri == PRI_TOLD) && !discard && vse_urgent_turn(f))
			break;		/* as below */
		limit = vse_stream_window(f);
		if (discard) {
			n = vse_stream_drop(f);
			full = n == VSE_SCRATCH;
		} else if (limit) {
			n = host_read(f, limit, &full);
			if (n == -ENOSPC)
				return TURN_STARVED;
		} else if ((f->hup || f->error) && (n = host_peek(f)) <= 0) {
			vse_stream_quiet(f, n);
			break;
		} else {
			break;		/* CREDIT puts it on the queue again */
		}
		if (f->pri == PRI_PASSING)
			f->pri = PRI_NONE;
		if (n <= 0) {
			vse_stream_quiet(f, n);
			continue;
		}
		budget -= n;
		/*
		 * A short read emptied the socket, or came to the mark; new bytes are a new edge. After a hang-up there may be none: read
		 * until the end.
		 */
		if (!full && !f->hup && !f->error && f->pri != PRI_TOLD)
			f->readable = false;
	}
	return TURN_DONE;
}

enum vse_turn vse_stream_turn(struct vse_flow *f)
{
	enum vse_turn rc = f->seq ? vse_seq_turn(f) : read_turn(f);

	if (rc != TURN_DONE)
		return rc;
	if (f->state == ST_STREAM && f->error && f->host_eof)
		vse_flow_reset(f, f->error);
	if (f->state == ST_STREAM && update_due(f)) {
		if (!f->pair->rx.vq || f->pair->rx.starved)
			return TURN_STARVED;	/* not into the control queue: it can wait here, and is one message however often */
		vse_window_adapt(f);
		f->pair->e->dialect->credit(f);
	}
	return TURN_DONE;
}

/* ----------------------------------------------------------------------------------------------------------- endings */

void vse_stream_discard(struct vse_flow *f)
{
	if (f->host_eof)
		return;
	for (int i = 0; i < DISCARD_ROUNDS && vse_stream_drop(f) > 0; i++)
		;
}

/* what epoll said about a connected socket */
void vse_stream_ready(struct vse_flow *f, uint32_t events)
{
	socklen_t len = sizeof(int);
	int error = 0;

	if (f->wlen && f->writable)
		wbuf_send(f);
	if (f->state == ST_LINGER) {
		/* a peer that waits for its own bytes to be taken would never read ours */
		if (f->wlen && f->readable)
			vse_stream_discard(f);
		if (f->error) {
			vse_flow_reset(f, f->error);
		} else if (!f->wlen) {
			vse_stream_discard(f);
			vse_flow_free(f);
		}
		return;
	}
	/* after EOF nothing is read any more, so nothing else would notice a reset */
	if (events & EPOLLERR && f->host_eof && !f->error &&
	    !getsockopt(f->fd, SOL_SOCKET, SO_ERROR, &error, &len) && error)
		f->error = (uint32_t)error;
	if (f->readable || f->error)
		vse_flow_run(f);
}

void vse_linger_expire(struct vse_engine *e, uint64_t now)
{
	struct vse_flow *f;

	while ((f = TAILQ_FIRST(&e->linger)) && f->linger_until <= now)
		vse_flow_reset(f, ETIMEDOUT);
}
