/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_route - connections that need no word from Python.
 *
 * What a policy connects directly is known beforehand, so it is a table here (vhostsock/offload/routes.py makes it): of a new stream's
 * CONNECT from the guest's initial namespace, the first route that covers scheme, address and port decides.
 *
 *	no route, or ASK ---------------------------------------> CONNECT to Python, as ever
 *	DIAL: socket(), the request's options, connect()
 *	     connected at once ------> CONNECT_REPLY, and ROUTED to Python, for the log
 *	     under way, or failed ---> CONNECT to Python, which decides the same and takes what became of it: vse_dialed()
 *
 * So whatever takes time (the policy's timeout, a cancel), and whatever fails, has one place, which is Python. A request that says more
 * than an address (bound before, another namespace) is asked about, and so is a URI that is not what we would write for its address.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "vse_priv.h"

bool vse_routes_valid(const struct vse_config *c)
{
	if (c->nr_routes > VSE_ROUTES_MAX || c->nr_ports > VSE_ROUTES_MAX || c->ports_path[sizeof(c->ports_path) - 1])
		return false;
	for (uint32_t i = 0; i < c->nr_ports; i++)
		if (c->ports[i].target_len > sizeof(c->ports[i].target))
			return false;
	for (uint32_t i = 0; i < c->nr_routes; i++)
		if (c->routes[i].target_len > sizeof(c->routes[i].target))
			return false;
	return true;
}

static void *copy(const void *table, size_t size)
{
	void *own = size ? malloc(size) : NULL;

	return own ? memcpy(own, table, size) : NULL;
}

bool vse_routes_copy(struct vse_engine *e, const struct vse_config *c)
{
	e->config.routes = copy(c->routes, c->nr_routes * sizeof(*c->routes));
	e->config.ports = copy(c->ports, c->nr_ports * sizeof(*c->ports));
	return !c->nr_routes == !e->config.routes && !c->nr_ports == !e->config.ports;
}

void vse_routes_free(struct vse_engine *e)
{
	free((void *)e->config.routes);
	free((void *)e->config.ports);
}

union address {
	struct sockaddr sa;
	struct sockaddr_in in;
	struct sockaddr_in6 in6;
	struct sockaddr_un un;
	struct sockaddr_storage ss;
};

static socklen_t length(const union address *a)
{
	switch (a->sa.sa_family) {
	case AF_INET: return sizeof(a->in);
	case AF_INET6: return sizeof(a->in6);
	default: return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(a->un.sun_path) + 1);
	}
}

/* false: no tcp URI, or another text than the one that its address has */
static bool parse(const char *uri, union address *a)
{
	char text[INET6_ADDRSTRLEN], again[VSO_URI_MAX + 1];
	bool six = !strncmp(uri, "tcp6://", 7);
	const char *host = uri + (six ? 7 : 6), *end = strrchr(uri, six ? '/' : ':');
	unsigned port;

	memset(a, 0, sizeof(*a));
	if ((!six && strncmp(uri, "tcp://", 6)) || end <= host || (size_t)(end - host) >= sizeof(text) || sscanf(end + 1, "%u", &port) != 1)
		return false;
	memcpy(text, host, (size_t)(end - host));
	text[end - host] = '\0';
	a->sa.sa_family = six ? AF_INET6 : AF_INET;
	if (six)
		a->in6.sin6_port = htons((uint16_t)port);
	else
		a->in.sin_port = htons((uint16_t)port);
	if (inet_pton(a->sa.sa_family, text, six ? (void *)&a->in6.sin6_addr : &a->in.sin_addr) != 1)
		return false;
	vse_uri_format(again, "tcp", &a->ss);
	return !strcmp(uri, again);
}

static const struct vse_route *find(const struct vse_engine *e, const union address *a)
{
	uint8_t scheme = a->sa.sa_family == AF_INET6 ? VSO_HINT_TCP6 : VSO_HINT_TCP, addr[16] = { [10] = 0xff, [11] = 0xff };
	uint16_t port = ntohs(a->sa.sa_family == AF_INET6 ? a->in6.sin6_port : a->in.sin_port);

	if (a->sa.sa_family == AF_INET6)
		memcpy(addr, &a->in6.sin6_addr, sizeof(addr));
	else
		memcpy(addr + 12, &a->in.sin_addr, 4);
	for (uint32_t i = 0; i < e->config.nr_routes; i++) {
		const struct vse_route *r = &e->config.routes[i];

		if (r->schemes & scheme && port >= r->port_first && port <= r->port_last && memcmp(addr, r->first, sizeof(addr)) >= 0 &&
		    memcmp(addr, r->last, sizeof(addr)) <= 0)
			return r;
	}
	return NULL;
}

/* connect() without waiting: 0, -EINPROGRESS or -errno. On loopback the first call begins it and the second finds it done */
int vse_connect_now(int fd, const void *addr, uint32_t addr_len)
{
	if (!connect(fd, addr, addr_len))
		return 0;
	if (errno != EINPROGRESS)
		return -errno;
	if (!connect(fd, addr, addr_len))
		return 0;
	return errno == EALREADY ? -EINPROGRESS : -errno;
}

/* the socket's own address; -ECONNREFUSED when it met itself (RFC 9293, 3.5), since nobody listens */
static int name(int fd, const union address *peer, char *local)
{
	union address own = { 0 };
	socklen_t len = sizeof(own);

	local[0] = '\0';
	if (peer->sa.sa_family == AF_UNIX)
		return 0;
	if (getsockname(fd, &own.sa, &len))
		return -errno;
	vse_uri_format(local, "tcp", &own.ss);
	return len == length(peer) && !memcmp(&own, peer, len) ? -ECONNREFUSED : 0;
}

static int dial(struct vse_flow *f, const union address *to, int *fd, char *local)
{
	int rc;

	*fd = socket(to->sa.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (*fd < 0)
		return -errno;
	if (f->opts_len)
		vse_apply_opts(*fd, f->opts, f->opts_len);
	rc = vse_connect_now(*fd, to, length(to));
	if (!rc)
		rc = name(*fd, to, local);
	if (rc && rc != -EINPROGRESS) {
		close(*fd);
		*fd = -1;
	}
	return rc;
}

/*
 * Is there room in the log for one more flow? Telling Python wakes its thread, which then works on the same cores and asks for the same lock:
 * for one connection after another that was more than half of the back-end's CPU. So what the log would leave out is not told.
 */
static bool loggable(struct vse_engine *e)
{
	uint64_t second = vse_now_ms() / 1000;

	if (second != e->log_second) {
		e->log_second = second;
		e->log_flows = 0;
	}
	return e->nevents < VSE_EVENTS_LOG && (!e->config.log_flows || e->log_flows++ < e->config.log_flows);
}

/* connect the flow to an address, and tell the driver; else what became of it waits for Python. `said`: to the log */
static bool route(struct vse_flow *f, const union address *to, const char *peer, uint32_t rule, const void *said, uint32_t len)
{
	struct vse_engine *e = f->pair->e;
	char local[VSO_URI_MAX + 1];
	int fd, rc;

	rc = dial(f, to, &fd, local);
	if (!rc) {
		f->opts_len = 0;	/* they are set */
		f->shared = false;
		rc = vse_flow_connected(f, fd, local, peer);
		if (rc) {
			close(fd);
			fd = -1;
		}
	}
	if (rc && to->sa.sa_family != AF_UNIX) {
		f->dialed = fd;
		f->dial_error = rc == -EINPROGRESS ? 0 : rc;
	}
	if (rc)
		return false;	/* of a Unix socket the handler knows more: it tries again itself */
	f->routed = true;
	if (loggable(e)) {
		vse_event(e, VSE_EV_ROUTED, f, 0, rule, said, len);
	} else {
		f->counted = false;
		e->unlogged += 2;	/* its end, too */
	}
	return true;
}

bool vse_routed(struct vse_flow *f, const struct vso_open *o, const uint8_t *payload)
{
	char uri[VSO_URI_MAX + 1];
	const struct vse_route *r;
	union address to;

	if (!f->pair->e->config.nr_routes || f->state != ST_NEW || f->dgram || o->local_len || o->name_len || o->netns || o->flags)
		return false;
	memcpy(uri, payload + sizeof(*o), o->uri_len);
	uri[o->uri_len] = '\0';
	r = parse(uri, &to) ? find(f->pair->e, &to) : NULL;
	if (!r || !r->dial)
		return false;
	if (r->target_len) {
		memset(&to, 0, sizeof(to));
		memcpy(&to, r->target, r->target_len);
	}
	return route(f, &to, uri, r->rule, uri, o->uri_len);
}

bool vse_port_routed(struct vse_flow *f, const struct vsk_hdr *h)
{
	const struct vse_config *c = &f->pair->e->config;
	const struct vse_port *port = NULL;
	union address to = { .sa.sa_family = AF_UNIX };

	for (uint32_t i = 0; i < c->nr_ports && !port; i++)
		if (c->ports[i].port == h->dst_port)
			port = &c->ports[i];
	if (f->seq || (port ? !port->target_len : !c->ports_path[0]))
		return false;
	if (port)
		memcpy(&to, port->target, port->target_len);
	else
		snprintf(to.un.sun_path, sizeof(to.un.sun_path), "%s_%u", c->ports_path, h->dst_port);
	return route(f, &to, "", 0, h, sizeof(*h));
}

uint64_t vse_unlogged(struct vse_engine *e)
{
	uint64_t lines;

	vse_lock(e);
	lines = e->unlogged;
	e->unlogged = 0;
	vse_unlock(e);
	return lines;
}

int vse_dialed(struct vse_engine *e, uint64_t handle, int *fd)
{
	struct vse_flow *f;
	int rc = -ESTALE;

	vse_lock(e);
	f = vse_flow_of(e, handle);
	if (f) {
		rc = f->dial_error;
		*fd = f->dialed;
		f->dialed = -1;
		f->dial_error = 0;
	}
	vse_unlock(e);
	return rc;
}
