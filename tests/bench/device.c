/* SPDX-License-Identifier: BSD-3-Clause */
/* See device.h. */
#include "device.h"

#include <poll.h>
#include <string.h>
#include <unistd.h>

static int drain(const struct ring_calls *f, struct vs_vq *vq, struct vs_chain **chains, int max)
{
	int n;

	while ((n = f->pop_many(vq, chains, max)) > 0) {
		for (int i = 0; i < n; i++) {
			struct vs_chain *c = chains[i];

			for (int k = c->n_out; k < c->n_out + c->n_in; k++)
				memset(c->iov[k].iov_base, 0, c->iov[k].iov_len);
			f->push(vq, c, c->in_len);
		}
		if (f->flush(vq) < 0)
			return -1;
	}
	return n;
}

int null_serve(const struct ring_calls *f, struct vs_vq *vq, struct vs_chain **chains, int max, int kick_fd, int stop_fd)
{
	struct pollfd p[] = { { .fd = kick_fd, .events = POLLIN }, { .fd = stop_fd, .events = POLLIN } };
	uint64_t n;

	for (;;) {
		f->disable_kick(vq);
		do {
			if (drain(f, vq, chains, max) < 0)
				return -1;
		} while (f->enable_kick(vq));
		if (poll(p, 2, -1) < 0 || p[1].revents)
			return 0;
		if (read(kick_fd, &n, sizeof(n)) < 0)
			continue;
	}
}
