/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_event - what Python hears: a queue of events and an eventfd that is readable while it holds any.
 *
 * Events are rare (set-up and end of flows), so each is an allocation. Python may be slow: while VSE_EVENTS_PAUSE of them wait, no
 * pair reads its driver and no listener accepts, so a guest cannot make the queue grow further.
 *
 * What is for the log alone (the flows of routes) may come VSE_EVENTS_MS late: Python's thread, once awake, takes a core from the connection
 * that it is told of, so it is woken for many of them at once. Whatever else happens tells of these, too.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vse_priv.h"

struct vse_evnode {
	struct vse_evnode *next;
	struct vse_event ev;		/* allocated only up to ev.len bytes of payload */
};

void vse_signal(int fd)
{
	uint64_t one = 1;

	/* EAGAIN: the counter is at its maximum, so the reader is awake already */
	if (write(fd, &one, sizeof(one)) < 0)
		return;
}

void vse_tell(struct vse_engine *e)
{
	e->tell_at = 0;
	e->told = true;
	vse_signal(e->event_fd);
}

void vse_event(struct vse_engine *e, uint32_t type, const struct vse_flow *f, uint32_t flow, uint32_t error,
	       const void *payload, uint32_t len)
{
	/* the thread itself looks at tell_at before it sleeps; another one tells at once */
	bool late = (type == VSE_EV_ROUTED || (type == VSE_EV_ENDED && f->routed)) && vse_may_be_late(e);
	struct vse_evnode *n;

	if (len > VSE_PAYLOAD_MAX)
		len = VSE_PAYLOAD_MAX;
	n = malloc(offsetof(struct vse_evnode, ev.payload) + len);
	if (!n) {
		/* nobody will answer: say so to the driver, or it waits for ever */
		if (type == VSE_EV_CONNECT || type == VSE_EV_BIND)
			vse_flow_reset(vse_flow_of(e, f->handle), ENOMEM);
		return;
	}
	n->next = NULL;
	n->ev.type = type;
	n->ev.flow = f ? f->id : flow;
	n->ev.handle = f ? f->handle : 0;
	n->ev.error = error;
	n->ev.len = len;
	n->ev.to_host = f ? f->to_host : 0;
	n->ev.to_guest = f ? f->to_guest : 0;
	if (len)
		memcpy(n->ev.payload, payload, len);
	*e->ev_last = n;
	e->ev_last = &n->next;
	e->stats.events++;
	e->nevents++;
	if (e->told)
		return;
	if (!late || e->nevents >= VSE_EVENTS_LOG / 2)
		vse_tell(e);
	else if (!e->tell_at)
		e->tell_at = vse_now_ms() + VSE_EVENTS_MS;
}

int vse_events(struct vse_engine *e, struct vse_event *out, int max)
{
	struct vse_evnode *n;
	uint64_t count;
	int i;

	vse_lock(e);
	for (i = 0; i < max && (n = e->ev_first); i++) {
		memcpy(&out[i], &n->ev, offsetof(struct vse_event, payload) + n->ev.len);
		e->ev_first = n->next;
		if (!e->ev_first)
			e->ev_last = &e->ev_first;
		e->nevents--;
		free(n);
	}
	if (!e->nevents) {
		e->told = false;
		e->tell_at = 0;
		if (read(e->event_fd, &count, sizeof(count)) < 0)
			count = 0;	/* EAGAIN: there were none */
	}
	vse_unlock(e);
	return i;
}

int vse_event_fd(const struct vse_engine *e)
{
	return e->event_fd;
}


void vse_events_free(struct vse_engine *e)
{
	struct vse_evnode *n;

	while ((n = e->ev_first)) {
		e->ev_first = n->next;
		free(n);
	}
	e->ev_last = &e->ev_first;
	e->nevents = 0;
}
