/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_order - completions in the order of popping, for VIRTIO_F_IN_ORDER (virtio 1.3, 2.7.9 and 2.8.9).
 *
 * A device may complete chains in any order. One that completes before an older one waits here, a slot for each chain in flight:
 *
 *   order of popping:   used | C - C C - - | not popped yet       C: completed and kept here, -: still open
 *                              ^ the oldest in flight; as soon as it is completed, it goes, and all C up to the next open one
 *
 * What is kept at a stop was never used: the base has it in flight still. So has the in-flight region.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "vs_vq_priv.h"

int vs_order_start(struct vs_vq *vq, struct vs_err *err)
{
	uint32_t slots = 1;

	free(vq->order);
	vq->order = NULL;
	if (!vs_vq_feature(vq, VIRTIO_F_IN_ORDER))
		return 0;
	while (slots < vq->num)		/* a power of 2, so that places go round with their 16 bits */
		slots *= 2;
	vq->order = calloc(slots, sizeof(*vq->order));
	if (!vq->order)
		return vs_err_set(err, ENOMEM, "no memory to keep %" PRIu32 " completions in order", vq->num);
	vq->order_mask = slots - 1;
	return 0;
}

void vs_order_push(struct vs_vq *vq, uint16_t pos, const struct vs_done *d)
{
	struct vs_done *slot = &vq->order[pos & vq->order_mask];

	*slot = *d;
	slot->ready = true;
	while (vq->in_flight && vq->live) {
		uint16_t oldest = vq->popped - vq->in_flight;

		slot = &vq->order[oldest & vq->order_mask];
		if (!slot->ready)
			break;
		slot->ready = false;
		vs_vq_use(vq, oldest, slot);
	}
}
