/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * load - the near end of tests/bench/flows.py, scale.py and fair.py: makes connections and moves bytes over them, from C, to the far end (far.c).
 *
 * A flow is one connection, of one of three kinds: a socket of the host, a flow of the offload protocol, or a connection of virtio-vsock; of
 * the last two this is the driver, on rings that a front-end has set up, and copies no payload: a guest would, at its own cost. It behaves
 * as the guests do: it waits for its calls instead of polling, keeps EVENT_IDX, opens a window of LOAD_WINDOW and tells of it as they do.
 * It trusts the device. Every wait is bounded; a job that waits 30 s for nothing, or meets an error, returns -1 and `why` says what it was.
 *
 * Jobs take flows [first, first + count) and return nanoseconds. All bytes are counted at both ends: what is sent is answered by the far end
 * with the number that it got, what is received ends the job at exactly the number asked for.
 */
#ifndef BENCH_LOAD_H
#define BENCH_LOAD_H

#include <stddef.h>
#include <sys/types.h>

#include "driver.h"

/* cdef begin */

enum { LOAD_SOCKETS, LOAD_OFFLOAD, LOAD_VSOCK };
enum { LOAD_PAIRS = 2, LOAD_PIECE = 65536, LOAD_WINDOW = 262144, LOAD_HEAD = 64 };
enum { LOAD_NONE, LOAD_OPENING, LOAD_OPEN, LOAD_ENDED, LOAD_CLOSING };

struct load_flow {
	int state, fd;
	uint32_t id;			/* offload: of the flow; vsock: the guest's port */
	uint32_t port;			/* vsock: the host's */
	uint32_t tx_cnt, peer_alloc, peer_fwd, fwd_cnt, told;
	uint64_t left;			/* bytes still to be sent */
	uint64_t want, got;		/* to be received in this job, and received */
	uint64_t answer;		/* what it was, if not more than that */
	int watched;			/* sockets: for what in epoll */
};

struct load {
	/* given by the caller */
	int kind;
	uint32_t pairs;			/* flow i is on pair i % pairs */
	struct { struct drv rx, tx; } pair[LOAD_PAIRS];
	struct load_flow *flows;
	uint32_t n_flows;		/* at most 65536 */
	uint32_t cid, features;
	uint8_t address[112];		/* sockets: where to connect, and its length */
	uint32_t address_len;
	uint8_t open[512];		/* offload: the payload of CONNECT */
	uint32_t open_len;
	uint32_t port;			/* vsock: where to connect */
	/* kept here */
	int ep;
	uint32_t serial, cookie, reply, reply_seen;
	uint64_t messages_in, messages_out;
	char why[128];
};

/* several things at once; see load_mix() */
struct load_mix {
	uint32_t first, count;		/* the bulk flows; count 0: none */
	int to_host;
	uint64_t amount;		/* bytes of each, in messages of size */
	uint32_t size;
	uint32_t asker;			/* another flow, which asks; count and this one are all that there is. n_flows: nobody asks */
	uint32_t question, most;	/* bytes of a question, and of its answer; questions, at most */
	int *over;			/* 0 at first. What is measured ends when it is not; several mixes in several threads may share it */
	/* found */
	uint32_t asked;
	uint32_t *each;			/* ns, of every question that was answered before it was over */
	uint64_t *moved;		/* bytes of each bulk flow by then */
	int64_t took;			/* ns, by then */
	uint32_t turn;			/* whose turn it is to send, of count */
};

int load_init(struct load *l);			/* 0, or -1 */
void load_end(struct load *l);			/* gives back what load_init() took; sockets that are open are closed */
int load_hello(struct load *l, const void *payload, uint32_t len);	/* offload: 0, or the errno of the answer, or -1 */

int64_t load_connect(struct load *l, uint32_t first, uint32_t count);
int64_t load_close(struct load *l, uint32_t first, uint32_t count);
int64_t load_abort(struct load *l, uint32_t flow);	/* close without a thought for what is on its way */
int64_t load_send(struct load *l, uint32_t first, uint32_t count, uint64_t amount, uint32_t size);	/* each flow that much */
int64_t load_receive(struct load *l, uint32_t first, uint32_t count, uint64_t amount, uint32_t size);
/* on one flow, one after another: `size` bytes there and back, `times` times; what each took */
int64_t load_ask(struct load *l, uint32_t flow, uint32_t times, uint32_t size, uint32_t *each);
/* connections to a far end that closes what it accepts, `parallel` at once: made, ended by it, closed */
int64_t load_cycle(struct load *l, uint32_t first, uint32_t parallel, uint32_t total);
/* from now on the far end reads nothing of this flow; sends what is taken. Bytes, or -1 */
int64_t load_stuff(struct load *l, uint32_t flow);
/*
 * Bulk flows, and one that asks small questions meanwhile, one after another. It is over when the first bulk flow (of any mix that shares
 * `over`) has moved all of its bytes, or the last question is answered where there is no bulk; then the others move the rest. ns in all.
 */
int64_t load_mix(struct load *l, struct load_mix *m);
int64_t load_cpu(int pid);			/* nanoseconds that a process, all its threads, has used */

/* cdef end */

#endif
