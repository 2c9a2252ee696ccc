// SPDX-License-Identifier: GPL-2.0-only
/*
 * pool.c - pages of payload are used again.
 *
 * A kernel with init_on_alloc writes each page once before anybody may write to it, so a fresh page costs nearly a copy of its bytes. Hence
 * each pair keeps some for either direction: those whose bytes the device has read (out), and those whose bytes an application has
 * read (in). Pieces of 32 KiB only; what memory was too fragmented for, and got smaller pages, is not kept.
 *
 * Whose page.  Who holds the last reference decides: a page that something else still refers to (a task's fragment, a pipe it was spliced
 * to) is put as ever, and is kept by nobody or by whoever puts it last. A page that is sent is charged to a memory cgroup for as long as it
 * lives, so it is given to senders of that cgroup alone; its page_private() says which, and that it is one of ours: a
 * task's fragment may hold pages of TCP, too. Cgroups are only compared. Received pages are charged to nobody.
 *
 * Bounds.  VSO_POOL_MAX pages of each direction, then the oldest makes room. At each tick of the watchdog those go that were not needed
 * since the last one, so that nothing is left two ticks after the last byte. A pair that is stopped keeps nothing, and takes nothing.
 *
 * What was in a page does not go anywhere: a message is as long as the bytes that were written to it, and of received ones only those are
 * shown which the device says it wrote, as of a buffer that was posted again at once.
 */
#include <linux/cgroup.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>

#include "vso.h"

#define VSO_POOL_SIZE		(PAGE_SIZE << VSO_POOL_ORDER)

static struct vso_pool_count {
	atomic_t kept;
	atomic_long_t again, fresh;
} vso_pool_counts[VSO_POOLS];

static int vso_pool_show(char *buf, const struct kernel_param *param)
{
	static const char * const name[VSO_POOLS] = { [VSO_POOL_OUT] = "out", [VSO_POOL_IN] = "in" };
	int i, n = 0;

	for (i = 0; i < VSO_POOLS; i++)
		n += scnprintf(buf + n, PAGE_SIZE - n, "%s kept %d again %ld fresh %ld\n", name[i], atomic_read(&vso_pool_counts[i].kept),
			       atomic_long_read(&vso_pool_counts[i].again), atomic_long_read(&vso_pool_counts[i].fresh));
	return n;
}

static const struct kernel_param_ops vso_pool_param = { .get = vso_pool_show };

module_param_cb(pages, &vso_pool_param, NULL, 0444);
MODULE_PARM_DESC(pages, "(read only) pieces of 32 KiB: kept for the next message, how many were used again, how many were new");

void vso_pool_init(struct vso_pool *pool, enum vso_way way)
{
	spin_lock_init(&pool->lock);
	pool->count = &vso_pool_counts[way];
}

/** vso_pool_open() - pages may be kept from here on */
void vso_pool_open(struct vso_pool *pool)
{
	spin_lock_bh(&pool->lock);
	pool->open = true;
	spin_unlock_bh(&pool->lock);
}

/* take the oldest page out. Called under the lock */
static struct page *vso_pool_oldest(struct vso_pool *pool)
{
	struct page *page = pool->kept[0].page;

	memmove(&pool->kept[0], &pool->kept[1], --pool->nr * sizeof(pool->kept[0]));
	atomic_dec(&pool->count->kept);
	return page;
}

static void vso_page_free(struct page *page)
{
	set_page_private(page, 0);	/* ours alone: nobody looks at it any more */
	put_page(page);
}

/* let go of up to @n pages, and begin to count anew what is not needed */
static void vso_pool_shrink(struct vso_pool *pool, unsigned int n)
{
	struct page *page;

	do {
		spin_lock_bh(&pool->lock);
		page = n && pool->nr ? vso_pool_oldest(pool) : NULL;
		pool->low = pool->nr;
		spin_unlock_bh(&pool->lock);
		if (page)
			vso_page_free(page);
	} while (page && --n);
}

/** vso_pool_age() - a tick has passed */
void vso_pool_age(struct vso_pool *pool)
{
	vso_pool_shrink(pool, READ_ONCE(pool->low));
}

/** vso_pool_close() - what is kept goes, and nothing is kept from here on */
void vso_pool_close(struct vso_pool *pool)
{
	spin_lock_bh(&pool->lock);
	pool->open = false;
	spin_unlock_bh(&pool->lock);
	vso_pool_shrink(pool, VSO_POOL_MAX);
}

/**
 * vso_pool_put() - drop a reference of a page; the last one gives it to the pool
 * @payer: what it is charged to; 0: it is not one that may be kept
 */
void vso_pool_put(struct vso_pool *pool, struct page *page, unsigned long payer)
{
	struct page *full = NULL;
	bool kept = false;

	if (!payer || page_ref_count(page) != 1 || page_size(page) != VSO_POOL_SIZE) {
		put_page(page);
		return;
	}
	spin_lock_bh(&pool->lock);
	if (pool->open) {
		if (pool->nr == VSO_POOL_MAX)
			full = vso_pool_oldest(pool);
		pool->kept[pool->nr++] = (struct vso_kept){ page, payer };
		atomic_inc(&pool->count->kept);
		kept = true;
	}
	spin_unlock_bh(&pool->lock);
	if (full)
		vso_page_free(full);
	if (!kept)
		vso_page_free(page);
}

/** vso_pool_take() - the page that was kept last of those with this payer, or NULL. Its one reference is the caller's */
struct page *vso_pool_take(struct vso_pool *pool, unsigned long payer)
{
	struct page *page = NULL;
	unsigned int i;

	spin_lock_bh(&pool->lock);
	for (i = pool->nr; i--; ) {
		if (pool->kept[i].payer != payer)
			continue;
		page = pool->kept[i].page;
		memmove(&pool->kept[i], &pool->kept[i + 1], (--pool->nr - i) * sizeof(pool->kept[0]));
		pool->low = min(pool->low, pool->nr);
		atomic_dec(&pool->count->kept);
		break;
	}
	spin_unlock_bh(&pool->lock);
	atomic_long_inc(page ? &pool->count->again : &pool->count->fresh);
	return page;
}

/* the memory cgroup that pays for what the caller allocates; not 0 */
static unsigned long vso_payer(void)
{
	unsigned long payer = 1;

#ifdef CONFIG_MEMCG
	rcu_read_lock();
	payer = (unsigned long)task_css(current, memory_cgrp_id);
	rcu_read_unlock();
#endif
	return payer;
}

/**
 * vso_frag_refill() - make room for @n bytes in the task's page fragment, as skb_page_frag_refill() does, with pages of the pool first
 *
 * Return: false without memory.
 */
bool vso_frag_refill(struct vso_pool *pool, struct page_frag *frag, u32 n)
{
	struct page *old = frag->page, *page;
	unsigned long payer;

	if (old && (page_ref_count(old) == 1 || frag->offset + n <= frag->size))
		return skb_page_frag_refill(n, frag, GFP_KERNEL_ACCOUNT);	/* has nothing to allocate */
	payer = vso_payer();
	page = vso_pool_take(pool, payer);
	if (page) {
		frag->page = page;
		frag->offset = 0;
		frag->size = VSO_POOL_SIZE;
		if (old)
			vso_pool_put(pool, old, page_private(old));
		return true;
	}
	if (!skb_page_frag_refill(n, frag, GFP_KERNEL_ACCOUNT))
		return false;
	if (frag->page != old && page_size(frag->page) == VSO_POOL_SIZE)
		set_page_private(frag->page, payer);
	return true;
}
