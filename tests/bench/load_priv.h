/* SPDX-License-Identifier: BSD-3-Clause */
/* load_priv.h - what load.c, load_mix.c and load_rings.c share. Functions return 0 unless said otherwise, and -1 when `why` says what it was. */
#ifndef BENCH_LOAD_PRIV_H
#define BENCH_LOAD_PRIV_H

#include "load.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))

enum { LOAD_PATIENCE = 30000 /* ms */, LOAD_BOTH = 3 /* VSK_SHUTDOWN_RECEIVE and SEND */ };

static inline uint32_t load_index(const struct load *l, const struct load_flow *f)
{
	return (uint32_t)(f - l->flows);
}

/* load.c */
int load_fail(struct load *l, const char *fmt, ...) __attribute__((format(printf, 2, 3)));	/* the first failure is kept; -1 */
int load_got(struct load *l, struct load_flow *f, const uint8_t *data, size_t len);	/* bytes came */
int load_pump(struct load *l, int wait);		/* as load_pump_rings(), for any kind */
ssize_t load_put(struct load *l, struct load_flow *f, const void *data, size_t len);	/* one message (NULL: whatever); bytes taken, or -1 */
int load_put_all(struct load *l, struct load_flow *f, const void *data, size_t len);
int load_request(struct load *l, struct load_flow *f, uint32_t what, uint32_t size, uint64_t amount);	/* of the far end (far.h) */
int load_await(struct load *l, struct load_flow *f, uint64_t upto);	/* until so many bytes of the job came; nothing else is served meanwhile */
int load_all_got(struct load *l, uint32_t first, uint32_t count);	/* until each has all that it wants */

/* load_rings.c */
uint32_t load_tx_room(struct load *l, const struct load_flow *f);	/* messages that can be sent now */
void load_kick(struct load *l);						/* after messages */
int load_say_vso(struct load *l, struct load_flow *f, uint32_t type, uint32_t arg, const void *payload, uint32_t len);
int load_say_vsock(struct load *l, struct load_flow *f, uint32_t op, uint32_t flags, const void *payload, uint32_t len);
int load_pump_rings(struct load *l, int wait);	/* take what there is; wait: if there is nothing, until there is. Messages, or -1 */

#endif
