// SPDX-License-Identifier: GPL-2.0-only
/*
 * window.c - a receive window grows for a flow that needs it.
 *
 * The window is what may wait for the reader of a stream. It also decides how often bytes cost more than their copy: the reader tells of
 * room, and the device comes with more, a quarter of a window at a time. So a flow begins with the parameter `window` and gets twice
 * as much, up to VSO_WINDOW_GROWN and net.ipv4.tcp_rmem, when it makes use of it:
 *
 *   - the device had no room left for a large message: without that a larger window would change nothing;
 *   - and the application has taken a whole window off within VSO_WINDOW_SOON: who reads slowly would only have more waiting.
 *
 * Not for an application that has set SO_RCVBUF, which means what it says, nor with net.ipv4.tcp_moderate_rcvbuf off: the same that decides
 * about TCP's. What flows have beyond `window` is bounded for all of a device together; a flow gives it back at a tick of the watchdog
 * when it has read less than a window's worth lately and nothing waits, and when its socket goes. The device hears of a smaller window at once,
 * and what it sent before that is no fault (vso_sock.promised).
 */
#include <linux/mm.h>
#include <net/sock.h>

#include "vso.h"

#define VSO_WINDOW_GROWN	(2u << 20)	/* as much as is posted to a pair's ring: more would not come at once */
#define VSO_WINDOW_SOON		(HZ / 4)
#define VSO_WINDOW_IDLE		HZ		/* since the last whole window was read */
#define VSO_GROWN_SHARE		32		/* of the guest's memory: what all flows have beyond `window` */

/** vso_window_set() - the window is @bytes, as somebody wants it. Called under vs->lock, or before there is a flow */
void vso_window_set(struct vso_sock *vs, u32 bytes)
{
	atomic_long_sub(vs->grown, &vs->dev->grown);
	vs->grown = 0;
	WRITE_ONCE(vs->buf_alloc, bytes);
	vs->promised = max(vs->promised, bytes);
}

/** vso_window_filled() - bytes came: do they leave no room for another large message? Called under vs->lock */
bool vso_window_filled(const struct vso_sock *vs)
{
	return vs->fwd_cnt + vs->rx_bytes - READ_ONCE(vs->fwd_told) + VSO_TX_MAX > vs->buf_alloc;
}

/* how far this socket's window may grow */
static u32 vso_window_most(const struct sock *sk)
{
	const struct net *net = sock_net(sk);

	if (sk->sk_userlocks & SOCK_RCVBUF_LOCK || !READ_ONCE(net->ipv4.sysctl_tcp_moderate_rcvbuf))
		return 0;
	return clamp_t(int, READ_ONCE(net->ipv4.sysctl_tcp_rmem[2]), 0, VSO_WINDOW_GROWN);
}

/* @more bytes for a flow, if all together may have them */
static bool vso_window_charge(struct vso_dev *dev, u32 more)
{
	if (atomic_long_add_return(more, &dev->grown) <= (long)(totalram_pages() / VSO_GROWN_SHARE) << PAGE_SHIFT)
		return true;
	atomic_long_sub(more, &dev->grown);
	return false;
}

/** vso_window_used() - bytes were handed to the application. Called without vs->lock */
void vso_window_used(struct vso_sock *vs, const struct sock *sk)
{
	u32 most, more;

	if (READ_ONCE(vs->fwd_cnt) - READ_ONCE(vs->window_mark) < READ_ONCE(vs->buf_alloc))
		return;
	spin_lock_bh(&vs->lock);
	most = vso_window_most(sk);
	if (vs->filled && vs->state == VSO_ST_CONNECTED && most > vs->buf_alloc && time_before(jiffies, vs->window_since + VSO_WINDOW_SOON)) {
		more = min(vs->buf_alloc, most - vs->buf_alloc);
		if (vso_window_charge(vs->dev, more)) {
			vs->grown += more;
			WRITE_ONCE(vs->buf_alloc, vs->buf_alloc + more);
			vs->promised = max(vs->promised, vs->buf_alloc);
		}
	}
	vs->filled = false;
	vs->window_since = jiffies;
	WRITE_ONCE(vs->window_mark, vs->fwd_cnt);
	spin_unlock_bh(&vs->lock);
}

/* give back what is not needed. Return: the device must hear of it */
static bool vso_window_age(struct vso_sock *vs)
{
	bool tell = false;

	spin_lock_bh(&vs->lock);
	if (vs->grown && !vs->rx_bytes && time_after(jiffies, vs->window_since + VSO_WINDOW_IDLE)) {
		vso_window_set(vs, vs->buf_alloc - vs->grown);
		tell = vs->state == VSO_ST_CONNECTED && !vs->peer_fin;
	}
	spin_unlock_bh(&vs->lock);
	return tell;
}

/** vso_windows_tick() - now and then: flows that do not need a grown window any more give it back */
void vso_windows_tick(struct vso_dev *dev)
{
	struct xarray *tables[] = { &dev->flows, &dev->accepted };
	struct vso_sock *vs;
	unsigned long id;
	size_t i;

	if (!atomic_long_read(&dev->grown))
		return;
	for (i = 0; i < ARRAY_SIZE(tables); i++) {
		rcu_read_lock();
		xa_for_each(tables[i], id, vs) {
			if (!READ_ONCE(vs->grown) || !refcount_inc_not_zero(&vs->ref))
				continue;
			if (vso_window_age(vs))
				vso_flow_send(vs, VSO_CREDIT, 0, NULL, 0, GFP_ATOMIC);
			vso_sock_put(vs);
		}
		rcu_read_unlock();
	}
}
