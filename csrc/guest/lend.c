// SPDX-License-Identifier: GPL-2.0-only
/*
 * lend.c - bytes of a stream that the device reads where they are, instead of from a copy.
 *
 * Two kinds of senders say that their bytes may be taken so, and what they are promised is what TCP promises them:
 *
 *   sendfile, splice	the pages are somebody's already (the page cache, a pipe). Who changes the file before the other side has read sees it change
 *			there. The kernel gives them to sendmsg() with MSG_SPLICE_PAGES since 6.5, before that page by page to sendpage()
 *   MSG_ZEROCOPY	the pages are the program's, which leaves them alone until it is notified, in the error queue of the carrier. A
 *			part that was copied after all makes the notification say SO_EE_CODE_ZEROCOPY_COPIED; it waits its turn all the same, so
 *			that they come in order. The kernel counts what is not read of them, and so a send may fail. io_uring (msg_ubuf) has its own notifications, and its bytes are copied
 *
 * How long.  Each page has a reference from when it is put into a message until the device has read that (vso_tx_reclaim()), or was reset
 * (vso_pair_stop()): never shorter, so nothing that the device may still read can be anything else. Nor much longer: the device takes bytes
 * off the ring whether the host reads or not, and a sender has at most its window under way. Messages that nobody is notified
 * of are collected as all are, with the next one or by the watchdog; for the others an interrupt is asked for (vso_tx_drain()).
 *
 * What is not lent.  Messages up to VSO_TX_INLINE, which cost less copied; pieces below that; what has no reference to give (slab). Those
 * go the way of all bytes.
 */
#include <linux/bvec.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/net.h>
#include <linux/skbuff.h>
#include <linux/uio.h>
#include <net/sock.h>

#include "vso.h"

static atomic_t vso_lent_now;
static atomic_long_t vso_lent_ever;

static int vso_lent_show(char *buf, const struct kernel_param *param)
{
	return scnprintf(buf, PAGE_SIZE, "now %d ever %ld\n", atomic_read(&vso_lent_now), atomic_long_read(&vso_lent_ever));
}

static const struct kernel_param_ops vso_lent_param = { .get = vso_lent_show };

module_param_cb(lent, &vso_lent_param, NULL, 0444);
MODULE_PARM_DESC(lent, "(read only) pieces of pages that the device reads where they are: now, and since the module was loaded");

/** vso_lend_piece() - the piece at the head of @it, which is an ITER_BVEC: its bytes in one page; 0: it is not to be lent */
u32 vso_lend_piece(const struct iov_iter *it, struct page **page, u32 *off)
{
	const struct bio_vec *bv = it->bvec;
	size_t at = bv->bv_offset + it->iov_offset;

	*page = bv->bv_page + at / PAGE_SIZE;
	*off = offset_in_page(at);
	if (!sendpage_ok(*page))
		return 0;
	return min3(iov_iter_count(it), bv->bv_len - it->iov_offset, PAGE_SIZE - offset_in_page(at));
}

/** vso_lend_page() - @page is in a message from here on; its reference goes with vso_lend_back() */
void vso_lend_page(struct vso_frag *frag, struct page *page, u32 off, u32 len)
{
	*frag = (struct vso_frag){ .page = page, .off = off, .len = len, .lent = true };
	atomic_inc(&vso_lent_now);
	atomic_long_inc(&vso_lent_ever);
}

/** vso_lend_back() - the device reads it no more */
void vso_lend_back(const struct vso_frag *frag)
{
	put_page(frag->page);
	atomic_dec(&vso_lent_now);
}

static int vso_lend_pieces(struct vso_tx *tx, struct iov_iter *it, u32 n)
{
	struct vso_frag *frag = (struct vso_frag *)tx->body;
	struct page *page;
	u32 done = 0, off;

	if (iov_iter_single_seg_count(it) <= VSO_TX_INLINE)
		return 0;
	while (done < n && tx->frags < VSO_TX_FRAGS) {
		u32 part = min(vso_lend_piece(it, &page, &off), n - done);

		if (!part)
			break;
		get_page(page);
		vso_lend_page(&frag[tx->frags++], page, off, part);
		iov_iter_advance(it, part);
		done += part;
	}
	return done;
}

static int vso_lend_user(struct vso_tx *tx, struct iov_iter *it, u32 n)
{
	struct vso_frag *frag = (struct vso_frag *)tx->body;
	struct page *pages[VSO_TX_FRAGS];
	u32 done = 0;

	while (done < n && tx->frags < VSO_TX_FRAGS) {
		size_t off;
		ssize_t got = iov_iter_get_pages2(it, pages, n - done, VSO_TX_FRAGS - tx->frags, &off);

		if (got <= 0)
			return done ?: got ?: -EFAULT;
		done += got;
		for (unsigned int i = 0; got; i++, off = 0) {
			u32 part = min_t(size_t, got, PAGE_SIZE - off);

			vso_lend_page(&frag[tx->frags++], pages[i], off, part);
			got -= part;
		}
	}
	return done;
}

/**
 * vso_lend() - fill a message with the caller's own pages, up to @n bytes of them
 * @note: MSG_ZEROCOPY's; NULL: they are in an ITER_BVEC, for splice
 *
 * Return: the bytes; 0: they are to be copied; -EFAULT and other errors of get_user_pages()
 */
int vso_lend(struct vso_tx *tx, struct msghdr *msg, u32 n, struct ubuf_info *note)
{
	if (!note)
		return vso_lend_pieces(tx, &msg->msg_iter, n);
	return user_backed_iter(&msg->msg_iter) ? vso_lend_user(tx, &msg->msg_iter, n) : 0;
}

/**
 * vso_zerocopy_begin() - MSG_ZEROCOPY, for who has asked for notifications by SO_ZEROCOPY
 *
 * Return: 0, with @note for vso_zerocopy_end(), NULL where nobody is to be notified; -ENOBUFS
 */
int vso_zerocopy_begin(struct sock *sk, const struct msghdr *msg, size_t len, struct ubuf_info **note)
{
	*note = NULL;
	if (likely(!(msg->msg_flags & MSG_ZEROCOPY)) || !len || msg->msg_ubuf || !sock_flag(sk, SOCK_ZEROCOPY))
		return 0;
	*note = vso_msg_zerocopy(sk, len);
	return *note ? 0 : -ENOBUFS;
}

/** vso_zerocopy_copied() - a part was, so the notification says so. @note may be NULL */
void vso_zerocopy_copied(struct ubuf_info *note)
{
	if (note)
		uarg_to_msgzc(note)->zerocopy = 0;
}

/** vso_zerocopy_end() - notify when nothing of it is lent any more; or not, when nothing was sent: the number goes to the next. @note may be NULL */
void vso_zerocopy_end(struct ubuf_info *note, bool sent)
{
	if (sent)
		net_zcopy_put(note);
	else
		net_zcopy_put_abort(note, true);
}
