/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_urgent - urgent data of TCP (RFC 9293, 3.8.5; tcp(7), "out of band"): from the host, and what the driver says of its own.
 *
 * The kernel keeps one urgent byte beside the stream, tells of it as soon as the byte is there (EPOLLPRI), and lets no read go past the
 * mark, which is the byte's place. The guest hears twice: at once, however much lies before the mark and however small its window is,
 * that there is a byte and which; and, when all before the mark is sent, the byte itself, which is a byte of the stream.
 *
 *	NONE	   nothing is known of any
 *	TOLD	   the guest knows the byte; the mark is not reached
 *	PASSING	   the byte is sent; the next read of the socket leaves it out
 *
 * `pri_seen` says that epoll has reported one since the last look. It does so again with every event until the byte is passed, so the same byte
 * is not told twice. Newer urgent data replace those that were not reached: the older byte becomes one like any other, here as there.
 */
#include <errno.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "vse_priv.h"

void vse_urgent_seen(struct vse_flow *f)
{
	const struct vse_engine *e = f->pair->e;

	if (f->state != ST_STREAM)
		return;
	if (e->dialect->urgent && e->features & VSO_F_URGENT)
		f->pri_seen = true;
	else
		f->hup = true;	/* the guest hears nothing of it, but no read goes past the mark: a short one does not mean empty */
}

/* before each read: 0, read on; -EAGAIN: the byte's turn has come, and the guest has no room for it */
int vse_urgent_turn(struct vse_flow *f)
{
	const struct vse_dialect *dialect = f->pair->e->dialect;
	int at_mark = 0;
	uint8_t byte;

	if (f->pri_seen && f->pri != PRI_PASSING) {
		f->pri_seen = false;
		if (recv(f->fd, &byte, 1, MSG_OOB | MSG_PEEK | MSG_DONTWAIT) != 1) {
			f->pri = PRI_NONE;	/* it was passed meanwhile */
		} else if (f->pri == PRI_NONE || byte != f->urgent) {
			f->urgent = byte;
			f->pri = PRI_TOLD;
			dialect->urgent(f, false);
		}
	}
	if (f->pri != PRI_TOLD || ioctl(f->fd, SIOCATMARK, &at_mark) || !at_mark)
		return 0;
	if (!vse_stream_window(f))
		return -EAGAIN;
	f->pri = PRI_PASSING;
	dialect->urgent(f, true);
	f->tx_cnt++;
	f->to_guest++;
	f->pair->e->stats.to_guest++;
	return 0;
}

void vse_urgent_said(struct vse_flow *f, const struct vso_hdr *h, const struct vs_chain *c)
{
	uint8_t byte;

	if (!(f->pair->e->features & VSO_F_URGENT) || h->len != 1 || vs_chain_read(c, sizeof(*h), &byte, 1) != 1)
		vse_flow_reset(f, EPROTO);
	else
		vse_stream_urgent(f, byte);
}
