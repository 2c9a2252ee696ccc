// SPDX-License-Identifier: GPL-2.0-only
/*
 * pair.c - a pair of rings: messages in and out.
 *
 * Sending.  Any context that may take tx_lock puts its message into the ring, or on txq when the ring is full; so order is the order of
 * tx_lock, and close() never waits. Writers are held back by credit and by VSO_TXQ_LIMIT, not here. Completed messages are collected when the
 * next one is sent and by the tasklet; interrupts for them are asked for only while txq waits.
 *
 * Receiving.  An interrupt schedules the pair's tasklet, which is the only reader of the to-driver ring. Big payloads keep their pages (the
 * socket queue takes them, fresh ones are posted), small ones are copied and the same pages are posted again.
 *
 * A pair is started with rings, closed to senders, and stopped, in this order and by transport.c alone.
 */
#include <linux/scatterlist.h>
#include <linux/skbuff.h>
#include <linux/slab.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#include "vso.h"

#define VSO_RX_BUDGET		128	/* messages before the tasklet lets others run */

static_assert(PAGE_SIZE >= VSO_RX_MIN);	/* so each control message lies in the first page of its chain */

/* ------------------------------------------------------------------------------------------------------------- sending */

/**
 * vso_tx_new() - a message with its payload copied in
 * @vs: its flow, or NULL
 *
 * Return: the message, NULL without memory.
 */
struct vso_tx *vso_tx_new(struct vso_sock *vs, u16 type, u32 arg, const void *payload, u32 len, gfp_t gfp)
{
	struct vso_tx *tx = kzalloc(sizeof(*tx) + len, gfp);

	if (!tx)
		return NULL;
	INIT_LIST_HEAD(&tx->list);
	tx->truesize = sizeof(*tx) + len;
	tx->hdr.type = cpu_to_le16(type);
	tx->hdr.arg = cpu_to_le32(arg);
	tx->hdr.len = cpu_to_le32(len);
	if (len && payload)
		memcpy(tx->body, payload, len);
	if (vs) {
		refcount_inc(&vs->ref);
		tx->vs = vs;
		tx->hdr.flow = cpu_to_le32(vs->flow);
	}
	return tx;
}

void vso_tx_free(struct vso_tx *tx)
{
	struct vso_frag *frag = (struct vso_frag *)tx->body;
	struct vso_sock *vs = tx->vs;
	int i;

	for (i = 0; i < tx->frags; i++) {
		if (frag[i].lent)
			vso_lend_back(&frag[i]);
		else if (vs)
			vso_pool_put(&vs->pair->pool[VSO_POOL_OUT], frag[i].page, page_private(frag[i].page));
		else
			put_page(frag[i].page);		/* it was never sent */
	}
	net_zcopy_put(tx->note);
	if (!tx->embedded)
		kfree(tx);
	if (vs)
		vso_sock_put(vs);
}

/* put one message into the ring; the credit fields say what holds at this moment. Called under tx_lock. */
static int vso_tx_add(struct vso_pair *pair, struct vso_tx *tx)
{
	struct vso_frag *frag = (struct vso_frag *)tx->body;
	struct scatterlist sg[VSO_TX_FRAGS + 1];
	struct vso_sock *vs = tx->vs;
	u32 fwd = 0;
	int i, err;

	if (vs) {
		fwd = READ_ONCE(vs->fwd_cnt);
		tx->hdr.buf_alloc = cpu_to_le32(READ_ONCE(vs->buf_alloc));
		tx->hdr.fwd_cnt = cpu_to_le32(fwd);
	}
	if (!tx->frags) {
		sg_init_one(sg, &tx->hdr, sizeof(tx->hdr) + le32_to_cpu(tx->hdr.len));
	} else {
		sg_init_table(sg, tx->frags + 1);
		sg_set_buf(sg, &tx->hdr, sizeof(tx->hdr));
		for (i = 0; i < tx->frags; i++)
			sg_set_page(&sg[i + 1], frag[i].page, frag[i].len, frag[i].off);
	}
	err = virtqueue_add_outbuf(pair->tx, sg, tx->frags + 1, tx, GFP_ATOMIC);
	pair->notes += !err && tx->note;
	if (!err && vs) {
		WRITE_ONCE(vs->fwd_told, fwd);
		tx->counted = tx->hdr.type == cpu_to_le16(VSO_DATA);
		WRITE_ONCE(vs->unread, vs->unread + tx->counted);
	}
	return err;
}

/* collect what the device has read; what waited for that goes on txq. Called under tx_lock. */
static void vso_tx_reclaim(struct vso_pair *pair)
{
	struct vso_tx *tx;
	unsigned int len;

	while ((tx = virtqueue_get_buf(pair->tx, &len))) {
		pair->notes -= !!tx->note;
		if (tx->counted) {
			WRITE_ONCE(tx->vs->unread, tx->vs->unread - 1);
			if (vso_gather_due(tx->vs))
				vso_gather_release(pair, tx->vs);
		}
		vso_tx_free(tx);
	}
}

/** vso_tx_drain() - move messages from txq to the ring. Called under tx_lock. Return: some were, so a kick may be due */
bool vso_tx_drain(struct vso_pair *pair)
{
	bool added = false;
	struct vso_tx *tx;

	vso_tx_reclaim(pair);
	for (;;) {
		while ((tx = list_first_entry_or_null(&pair->txq, struct vso_tx, list))) {
			struct vso_sock *vs = tx->vs;	/* stays: only vso_tx_reclaim() frees, under our lock */

			if (vso_tx_add(pair, tx))
				break;
			list_del_init(&tx->list);
			added = true;
			if (vs && atomic_sub_return(tx->truesize, &vs->queued) < VSO_TXQ_LIMIT)
				vso_write_space(vs);
		}
		if (!tx && !pair->notes && list_empty(&pair->held)) {
			virtqueue_disable_cb(pair->tx);
			return added;
		}
		/* an interrupt shall say when something has been read or, of a full ring or of what is notified of, a good part of it */
		if (list_empty(&pair->held) ? virtqueue_enable_cb_delayed(pair->tx) : virtqueue_enable_cb(pair->tx))
			return added;
		vso_tx_reclaim(pair);
	}
}

/**
 * vso_tx_submit() - send a message, in order
 *
 * Takes the message in every case. Return: 0; -EPIPE for DATA or URGENT behind a SHUTDOWN or CLOSE of its flow; -ENODEV when the
 * device or the flow is gone.
 */
int vso_tx_submit(struct vso_pair *pair, struct vso_tx *tx)
{
	struct vso_sock *vs = tx->vs;
	u16 type = le16_to_cpu(tx->hdr.type);
	bool kick = false;
	int err = 0;

	spin_lock_bh(&pair->tx_lock);
	if (!pair->run || (!pair->dev->up && type != VSO_HELLO) || (vs && READ_ONCE(vs->dead))) {
		err = -ENODEV;
	} else if (vs && vs->fin_queued && (type == VSO_DATA || type == VSO_URGENT)) {
		err = -EPIPE;
	} else {
		if (type == VSO_SHUTDOWN || type == VSO_CLOSE)
			vs->fin_queued = true;
		if (vs) {
			vso_gather_release(pair, vs);
			atomic_add(tx->truesize, &vs->queued);
		}
		list_add_tail(&tx->list, &pair->txq);
		if (vso_tx_drain(pair))
			kick = virtqueue_kick_prepare(pair->tx);
	}
	spin_unlock_bh(&pair->tx_lock);
	if (kick)
		virtqueue_notify(pair->tx);
	if (err)
		vso_tx_free(tx);
	return err;
}

/** vso_pong() - answer a PING, or send one */
void vso_pong(struct vso_pair *pair, u16 type, u32 cookie)
{
	struct vso_tx *tx = vso_tx_new(NULL, type, 0, NULL, 0, GFP_ATOMIC);

	if (!tx)
		return;		/* the next one may have more luck; three in a row are needed to matter */
	tx->hdr.cookie = cpu_to_le32(cookie);
	vso_tx_submit(pair, tx);
}

/** vso_txq_purge() - forget what waits for ring space, or is held: the device is gone */
void vso_txq_purge(struct vso_pair *pair)
{
	struct vso_tx *tx, *next;
	LIST_HEAD(purge);

	spin_lock_bh(&pair->tx_lock);
	list_splice_init(&pair->txq, &purge);
	list_for_each_entry(tx, &pair->held, list)
		WRITE_ONCE(tx->vs->held, NULL);
	list_splice_init(&pair->held, &purge);
	spin_unlock_bh(&pair->tx_lock);
	list_for_each_entry_safe(tx, next, &purge, list) {
		list_del_init(&tx->list);
		vso_tx_free(tx);
	}
}

/* ----------------------------------------------------------------------------------------------------------- receiving */

static const u8 vso_rx_order[VSO_RX_PAGES] = { VSO_POOL_ORDER, VSO_POOL_ORDER, 0 };

static struct page *vso_rx_page(struct vso_pair *pair, unsigned int order)
{
	struct page *page = NULL;

	if (order)
		page = vso_pool_take(&pair->pool[VSO_POOL_IN], VSO_PAYER_NONE) ?:
		       alloc_pages(GFP_ATOMIC | __GFP_COMP | __GFP_NOWARN | __GFP_NORETRY, order);
	return page ?: alloc_page(GFP_ATOMIC | __GFP_NOWARN);
}

static void vso_rx_free(struct vso_rxbuf *buf)
{
	unsigned int i;

	for (i = 0; i < VSO_RX_PAGES; i++)
		if (buf->page[i])
			put_page(buf->page[i]);
	kfree(buf);
}

/* post a chain, new (NULL) or used, with fresh pages where they were taken. Return: false without memory, and the chain is gone */
static bool vso_rx_post(struct vso_pair *pair, struct vso_rxbuf *buf)
{
	struct scatterlist sg[VSO_RX_PAGES];
	unsigned int i;

	if (!buf)
		buf = kzalloc(sizeof(*buf), GFP_ATOMIC | __GFP_NOWARN);
	if (!buf)
		return false;
	sg_init_table(sg, VSO_RX_PAGES);
	for (i = 0; i < VSO_RX_PAGES; i++) {
		if (!buf->page[i])
			buf->page[i] = vso_rx_page(pair, vso_rx_order[i]);
		if (!buf->page[i])
			goto fail;
		sg_set_page(&sg[i], buf->page[i], page_size(buf->page[i]), 0);
	}
	if (virtqueue_add_inbuf(pair->rx, sg, VSO_RX_PAGES, buf, GFP_ATOMIC))
		goto fail;
	pair->rx_posted++;
	return true;
fail:
	vso_rx_free(buf);
	return false;
}

static bool vso_rx_fill(struct vso_pair *pair)
{
	bool posted = false;

	while (pair->rx_posted < pair->rx_target) {
		if (!vso_rx_post(pair, NULL)) {
			/* the watchdog's next tick tries again; with buffers left, so does the next message */
			WRITE_ONCE(pair->dev->starved, true);
			break;
		}
		posted = true;
	}
	return posted;
}

static void vso_pair_serve(struct tasklet_struct *tasklet)
{
	struct vso_pair *pair = from_tasklet(pair, tasklet, tasklet);
	unsigned int used, budget = VSO_RX_BUDGET;
	bool kick = false, again = false;
	struct vso_rxbuf *buf;

	virtqueue_disable_cb(pair->rx);
	for (;;) {
		while (budget && (buf = virtqueue_get_buf(pair->rx, &used))) {
			budget--;
			pair->rx_posted--;
			WRITE_ONCE(pair->came, pair->came + 1);
			vso_rx(pair, buf, used);
			kick |= vso_rx_post(pair, buf);
		}
		if (!budget) {
			again = true;
			break;
		}
		if (atomic_read(&pair->lookers) || virtqueue_enable_cb(pair->rx))
			break;
		virtqueue_disable_cb(pair->rx);
	}
	kick |= vso_rx_fill(pair);
	if (kick)
		virtqueue_kick(pair->rx);

	kick = false;
	spin_lock(&pair->tx_lock);
	if (pair->run && vso_tx_drain(pair))
		kick = virtqueue_kick_prepare(pair->tx);
	spin_unlock(&pair->tx_lock);
	if (kick)
		virtqueue_notify(pair->tx);
	if (again)
		tasklet_schedule(&pair->tasklet);
}

/* -------------------------------------------------------------------------------------------------------- start, stop */

void vso_pair_init(struct vso_pair *pair, struct vso_dev *dev)
{
	pair->dev = dev;
	spin_lock_init(&pair->tx_lock);
	INIT_LIST_HEAD(&pair->txq);
	INIT_LIST_HEAD(&pair->held);
	tasklet_setup(&pair->tasklet, vso_pair_serve);
	vso_pool_init(&pair->pool[VSO_POOL_OUT], VSO_POOL_OUT);
	vso_pool_init(&pair->pool[VSO_POOL_IN], VSO_POOL_IN);
}

/** vso_pair_start() - the rings are found, the device is not ready yet */
void vso_pair_start(struct vso_pair *pair, struct virtqueue *rx, struct virtqueue *tx)
{
	pair->rx = rx;
	pair->tx = tx;
	pair->rx_posted = 0;
	pair->notes = 0;
	vso_pool_open(&pair->pool[VSO_POOL_OUT]);
	vso_pool_open(&pair->pool[VSO_POOL_IN]);
	pair->rx_target = min_t(unsigned int, virtqueue_get_vring_size(rx) / VSO_RX_PAGES, VSO_RX_BUFFERS);
	vso_rx_fill(pair);	/* nothing runs the tasklet before virtio_device_ready() */
	spin_lock_bh(&pair->tx_lock);
	virtqueue_disable_cb(tx);
	pair->run = true;
	spin_unlock_bh(&pair->tx_lock);
}

/** vso_pair_idle() - has the device read all that was sent? */
bool vso_pair_idle(struct vso_pair *pair)
{
	bool idle;

	spin_lock_bh(&pair->tx_lock);
	vso_tx_reclaim(pair);
	idle = list_empty(&pair->txq) && pair->tx->num_free == virtqueue_get_vring_size(pair->tx);
	spin_unlock_bh(&pair->tx_lock);
	return idle;
}

/** vso_pair_tick() - now and then: what the device has read goes, also when nothing follows it, and pages that nobody needed */
void vso_pair_tick(struct vso_pair *pair)
{
	bool kick;

	spin_lock_bh(&pair->tx_lock);
	kick = pair->run && vso_tx_drain(pair) && virtqueue_kick_prepare(pair->tx);
	spin_unlock_bh(&pair->tx_lock);
	if (kick)
		virtqueue_notify(pair->tx);
	vso_pool_age(&pair->pool[VSO_POOL_OUT]);
	vso_pool_age(&pair->pool[VSO_POOL_IN]);
}

/** vso_pair_close() - no sender touches the ring from here on */
void vso_pair_close(struct vso_pair *pair)
{
	spin_lock_bh(&pair->tx_lock);
	pair->run = false;
	spin_unlock_bh(&pair->tx_lock);
}

/** vso_pair_stop() - the device was reset: take everything back */
void vso_pair_stop(struct vso_pair *pair)
{
	struct vso_rxbuf *buf;
	struct vso_tx *tx;

	tasklet_kill(&pair->tasklet);
	while ((buf = virtqueue_detach_unused_buf(pair->rx)))
		vso_rx_free(buf);
	while ((tx = virtqueue_detach_unused_buf(pair->tx)))
		vso_tx_free(tx);
	vso_txq_purge(pair);
	vso_pool_close(&pair->pool[VSO_POOL_OUT]);
	vso_pool_close(&pair->pool[VSO_POOL_IN]);
}
