// SPDX-License-Identifier: GPL-2.0-only
/*
 * gather.c - small writes of a stream become one message while the device has not read those before them.
 *
 * A message costs the same however small it is: an allocation, a descriptor, often a kick, and for the device a chain. So a small write
 * that need not go at once is added to its flow's *held* message, which is in no ring yet and grows by what is written. It is
 * TCP's automatic corking: who writes faster than the other side reads gets larger messages, and everybody else notices nothing.
 *
 *   fewer than VSO_GATHER_AHEAD unread messages of the flow    the write goes at once, whatever TCP_NODELAY says. So does a head and its body
 *   so many, or more                                           the write is held
 *
 * Nothing is left lying.  A held message is released, to the end of txq, by whichever comes first:
 *
 *   - the device has read so much that the flow has fewer unread messages than that (vso_tx_reclaim()). While anything is held the ring's
 *     callback is enabled, behind a last look as ever (vso_tx_drain()): there is an unread message, so there will be an interrupt;
 *   - it is full;
 *   - another message of the flow is sent: it goes behind (vso_tx_submit()), so FIN, CLOSE, options and urgent bytes keep their place;
 *   - the application waits on this socket, for room or for bytes, or polls it: it has said what it had to say.
 *
 * No timer, and no wait for the peer's or the host's word. Credit is taken when bytes are written, so that a release needs none.
 *
 * Who adds bytes leaves completed messages to the interrupt, which is on its way: an interrupt that finds nothing is one for nothing.
 *
 * Bytes are copied to pages of the task's fragment without any lock, or are lent pages (lend.c: before Linux 6.5 a file comes page by page), and the order of writers is the order of tx_lock, as it is
 * for messages. Successive writes lie one behind the other in a page, so a held message is one descriptor or two, however many writes it is.
 */
#include <linux/slab.h>
#include <net/sock.h>

#include "vso.h"

#define VSO_GATHER_AHEAD	2
#define VSO_GATHER_MAX		32768	/* bytes of a held message: more would only let the device wait for it */
#define VSO_GATHER_FRAGS	18
#define VSO_GATHER_PIECE	MAX(VSO_TX_INLINE, PAGE_SIZE)	/* one write */

static_assert(VSO_GATHER_FRAGS <= VSO_TX_FRAGS);

/**
 * vso_gather_wanted() - shall a write of @n bytes be held? A guess, without a lock: vso_gather() looks again, and the order is kept either way
 * @pages: where they lie, if it is in pages that may be lent (lend.c); else NULL
 */
bool vso_gather_wanted(const struct vso_sock *vs, const struct iov_iter *pages, u32 n)
{
	struct page *page;
	u32 off;

	if (!READ_ONCE(vs->held) && READ_ONCE(vs->unread) < VSO_GATHER_AHEAD)
		return false;
	return n <= VSO_TX_INLINE || (pages && vso_lend_piece(pages, &page, &off) >= n);
}

/** vso_gather_due() - may what is held go? Called under tx_lock */
bool vso_gather_due(const struct vso_sock *vs)
{
	return vs->held && vs->unread < VSO_GATHER_AHEAD;
}

/** vso_gather_release() - what is held takes its place in txq, if anything is. Called under tx_lock; then drain */
void vso_gather_release(struct vso_pair *pair, struct vso_sock *vs)
{
	struct vso_tx *tx = vs->held;

	if (!tx)
		return;
	WRITE_ONCE(vs->held, NULL);
	atomic_add(tx->truesize, &vs->queued);
	list_move_tail(&tx->list, &pair->txq);
}

/** vso_gather_flush() - the application waits: what is held goes now */
void vso_gather_flush(struct vso_sock *vs)
{
	struct vso_pair *pair = vs->pair;
	bool kick = false;

	if (!READ_ONCE(vs->held))
		return;
	spin_lock_bh(&pair->tx_lock);
	if (pair->run) {
		vso_gather_release(pair, vs);
		kick = vso_tx_drain(pair) && virtqueue_kick_prepare(pair->tx);
	}
	spin_unlock_bh(&pair->tx_lock);
	if (kick)
		virtqueue_notify(pair->tx);
}

static struct vso_tx *vso_gather_new(struct vso_sock *vs)
{
	struct vso_tx *tx = kzalloc(sizeof(*tx) + VSO_GATHER_FRAGS * sizeof(struct vso_frag), GFP_KERNEL_ACCOUNT);

	if (!tx)
		return NULL;
	INIT_LIST_HEAD(&tx->list);
	tx->truesize = sizeof(*tx) + VSO_GATHER_FRAGS * sizeof(struct vso_frag);
	tx->hdr.type = cpu_to_le16(VSO_DATA);
	tx->hdr.flow = cpu_to_le32(vs->flow);
	refcount_inc(&vs->ref);
	tx->vs = vs;
	return tx;
}

/* the next @n bytes of the held message; @lend: in a page of somebody else. Called under tx_lock. Return: it takes no more */
static bool vso_gather_add(struct vso_tx *tx, struct page *page, u32 off, u32 n, bool lend)
{
	struct vso_frag *frag = (struct vso_frag *)tx->body, *last = tx->frags ? &frag[tx->frags - 1] : NULL;
	u32 len = le32_to_cpu(tx->hdr.len) + n;

	if (last && last->page == page && last->off + last->len == off) {
		last->len += n;
	} else {
		get_page(page);
		if (lend)
			vso_lend_page(&frag[tx->frags++], page, off, n);
		else
			frag[tx->frags++] = (struct vso_frag){ .page = page, .off = off, .len = n };
	}
	tx->hdr.len = cpu_to_le32(len);
	tx->truesize += n;
	return len + VSO_GATHER_PIECE > min_t(u32, VSO_GATHER_MAX, tx->vs->dev->max_payload) || tx->frags == VSO_GATHER_FRAGS;
}

/**
 * vso_gather() - send the next @n bytes of the caller, for which credit is reserved; held, if others are unread
 * @pages: they are in one page that may be lent; else they are VSO_TX_INLINE at most
 *
 * Return: 0; -EFAULT or -ENOBUFS: nothing was sent; -EPIPE: this direction is over.
 */
int vso_gather(struct vso_sock *vs, struct msghdr *msg, u32 n, bool pages)
{
	bool lend = pages && n > VSO_TX_INLINE;
	struct page_frag *pfrag = &current->task_frag;
	struct page *page;
	u32 off;
	struct vso_pair *pair = vs->pair;
	bool first, full, kick = false;
	struct vso_tx *fresh = NULL;
	int err = 0;

	if (!lend && !vso_frag_refill(&pair->pool[VSO_POOL_OUT], pfrag, n))
		return -ENOBUFS;
	if (!READ_ONCE(vs->held)) {
		fresh = vso_gather_new(vs);
		if (!fresh)
			return -ENOBUFS;
	}
	if (lend) {
		vso_lend_piece(&msg->msg_iter, &page, &off);
		iov_iter_advance(&msg->msg_iter, n);
	} else if (copy_page_from_iter(pfrag->page, pfrag->offset, n, &msg->msg_iter) != n) {
		if (fresh)
			vso_tx_free(fresh);
		return -EFAULT;
	} else {
		page = pfrag->page;
		off = pfrag->offset;
	}
	spin_lock_bh(&pair->tx_lock);
	while (!vs->held && !fresh) {
		spin_unlock_bh(&pair->tx_lock);
		vso_race();
		fresh = vso_gather_new(vs);
		if (!fresh)
			return -ENOBUFS;
		spin_lock_bh(&pair->tx_lock);
	}
	if (!pair->run || !pair->dev->up || READ_ONCE(vs->dead) || vs->fin_queued) {
		err = -EPIPE;
		goto unlock;
	}
	first = !vs->held;
	if (first) {
		list_add_tail(&fresh->list, &pair->held);
		WRITE_ONCE(vs->held, fresh);
		fresh = NULL;
	}
	full = vso_gather_add(vs->held, page, off, n, lend);
	if (!lend)
		pfrag->offset += n;
	if (full || vso_gather_due(vs))
		vso_gather_release(pair, vs);
	if (first || !vs->held)
		kick = vso_tx_drain(pair) && virtqueue_kick_prepare(pair->tx);
unlock:
	spin_unlock_bh(&pair->tx_lock);
	if (kick)
		virtqueue_notify(pair->tx);
	if (fresh)
		vso_tx_free(fresh);
	return err;
}
