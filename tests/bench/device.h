/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * device - a null device in C on the library's rings: fills what is device-writable with zeros and completes, on a thread of its own.
 *
 * What a data plane in C costs, as that of the offload device is one: the rings are the library's, reached through its extension module.
 */
#ifndef BENCH_DEVICE_H
#define BENCH_DEVICE_H

#include "vs_vq.h"

/* cdef begin */

struct ring_calls {
	int (*pop_many)(struct vs_vq *vq, struct vs_chain **c, int max);
	void (*push)(struct vs_vq *vq, struct vs_chain *c, uint32_t written);
	int (*flush)(struct vs_vq *vq);
	void (*disable_kick)(struct vs_vq *vq);
	bool (*enable_kick)(struct vs_vq *vq);
};

/* until stop_fd is readable. 0, or -1 when the ring broke */
int null_serve(const struct ring_calls *f, struct vs_vq *vq, struct vs_chain **chains, int max, int kick_fd, int stop_fd);

/* cdef end */

#endif
