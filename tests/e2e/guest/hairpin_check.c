/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * hairpin_check - a program that talks to itself over the loopback addresses: what holds natively holds in a namespace whose loopback is
 * the device's (docs/hairpin.md).
 *
 * Usage: hairpin_check
 */
#include "check.h"

static struct addr loopback(int family, int port)
{
	char text[8];

	snprintf(text, sizeof(text), "%d", port);
	return address(family == AF_INET ? "127.0.0.1" : "::1", text);
}

static struct addr name_of(int fd)
{
	struct addr a = { .len = sizeof(a.ss) };

	MUST(getsockname(fd, (void *)&a.ss, &a.len) == 0);
	return a;
}

static struct addr peer_of(int fd)
{
	struct addr a = { .len = sizeof(a.ss) };

	MUST(getpeername(fd, (void *)&a.ss, &a.len) == 0);
	return a;
}

static bool same(const struct addr *a, const struct addr *b)
{
	return a->len == b->len && !memcmp(&a->ss, &b->ss, a->len);
}

static int bound(int family, int type, struct addr *a)
{
	int fd = socket(family, type, 0);

	*a = loopback(family, 0);
	MUST(fd >= 0);
	MUST(bind(fd, (void *)&a->ss, a->len) == 0);
	*a = name_of(fd);
	MUST(port_of(a) != 0);
	return fd;
}

static int listener(int family, struct addr *a)
{
	int fd = bound(family, SOCK_STREAM, a);

	MUST(listen(fd, 8) == 0);
	return fd;
}

static void stream_on(int family)
{
	struct addr a, from, peer, own;
	int listening = listener(family, &a), client = open_connected(&a), server;
	char buf[8];

	from = (struct addr){ .len = sizeof(from.ss) };
	server = accept(listening, (void *)&from.ss, &from.len);
	MUST(server >= 0);
	own = name_of(client);
	peer = peer_of(client);
	MUST(same(&peer, &a));
	MUST(same(&from, &own));
	peer = peer_of(server);
	MUST(same(&peer, &own));
	own = name_of(server);
	MUST(same(&own, &a));
	send_all(client, "hello", 5);
	recv_exactly(server, buf, 5);
	MUST(!memcmp(buf, "hello", 5));
	send_all(server, "world", 5);
	MUST(close(server) == 0);
	recv_exactly(client, buf, 5);
	SAME(recv(client, buf, 1, 0), 0);
}

static void stream(void) { stream_on(AF_INET); }
static void stream6(void) { stream_on(AF_INET6); }

static void port_in_use(void)
{
	struct addr a;
	int first = listener(AF_INET, &a), second = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	ERRNO(bind(second, (void *)&a.ss, a.len), EADDRINUSE);
	MUST(setsockopt(second, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0);
	ERRNO(bind(second, (void *)&a.ss, a.len), EADDRINUSE);	/* of a listener not even so */
	MUST(close(first) == 0);
	MUST(bind(second, (void *)&a.ss, a.len) == 0);
}

static void share_port(void)
{
	int first = socket(AF_INET, SOCK_STREAM, 0), second = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	struct addr a = loopback(AF_INET, 0);

	MUST(setsockopt(first, SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one)) == 0);
	MUST(setsockopt(second, SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one)) == 0);
	MUST(bind(first, (void *)&a.ss, a.len) == 0);
	a = name_of(first);
	MUST(bind(second, (void *)&a.ss, a.len) == 0);
}

static void refused(void)
{
	struct addr a;
	int closed = bound(AF_INET, SOCK_STREAM, &a), fd = socket(AF_INET, SOCK_STREAM, 0);

	ERRNO(connect(fd, (void *)&a.ss, a.len), ECONNREFUSED);
	MUST(close(closed) == 0);
	ERRNO(connect(fd, (void *)&a.ss, a.len), ECONNREFUSED);
}

static void bound_client(void)
{
	struct addr a, mine, from = { .len = sizeof(from.ss) };
	int listening = listener(AF_INET, &a), client = bound(AF_INET, SOCK_STREAM, &mine), server;

	MUST(connect(client, (void *)&a.ss, a.len) == 0);
	server = accept(listening, (void *)&from.ss, &from.len);
	MUST(server >= 0);
	MUST(same(&from, &mine));
}

static void nonblocking(void)
{
	struct addr a;
	int listening = listener(AF_INET, &a), client = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), error = -1;
	socklen_t len = sizeof(error);

	ERRNO(connect(client, (void *)&a.ss, a.len), EINPROGRESS);
	MUST(wait_for(client, POLLOUT) & POLLOUT);
	MUST(getsockopt(client, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
	SAME(error, 0);
	MUST(wait_for(listening, POLLIN) & POLLIN);
	MUST(accept(listening, NULL, NULL) >= 0);
}

static void dual_stack(void)
{
	struct addr any = address("::", "0"), a, peer, expected;
	int listening = socket(AF_INET6, SOCK_STREAM, 0), server;

	MUST(bind(listening, (void *)&any.ss, any.len) == 0 && listen(listening, 8) == 0);
	any = name_of(listening);
	a = loopback(AF_INET, port_of(&any));
	open_connected(&a);
	server = accept(listening, NULL, NULL);
	MUST(server >= 0);
	peer = peer_of(server);
	expected = address("::ffff:127.0.0.1", "0");
	MUST(!memcmp(&((struct sockaddr_in6 *)&peer.ss)->sin6_addr, &((struct sockaddr_in6 *)&expected.ss)->sin6_addr, 16));
}

static void datagrams_on(int family)
{
	struct addr a, b, from;
	int server = bound(family, SOCK_DGRAM, &a), client = socket(family, SOCK_DGRAM, 0);
	char buf[8];

	SAME(sendto(client, "ask", 3, 0, (void *)&a.ss, a.len), 3);
	from = (struct addr){ .len = sizeof(from.ss) };
	SAME(recvfrom(server, buf, sizeof(buf), 0, (void *)&from.ss, &from.len), 3);
	b = name_of(client);
	SAME(port_of(&from), port_of(&b));
	SAME(sendto(server, "answer", 6, 0, (void *)&from.ss, from.len), 6);
	from = (struct addr){ .len = sizeof(from.ss) };
	SAME(recvfrom(client, buf, sizeof(buf), 0, (void *)&from.ss, &from.len), 6);
	MUST(same(&from, &a));
}

static void datagrams(void) { datagrams_on(AF_INET); }
static void datagrams6(void) { datagrams_on(AF_INET6); }

static void connected_datagrams(void)
{
	struct addr a, b, peer;
	int one = bound(AF_INET, SOCK_DGRAM, &a), two = bound(AF_INET, SOCK_DGRAM, &b), stranger = socket(AF_INET, SOCK_DGRAM, 0);
	char buf[8];

	MUST(connect(one, (void *)&b.ss, b.len) == 0 && connect(two, (void *)&a.ss, a.len) == 0);
	peer = peer_of(one);
	MUST(same(&peer, &b));
	peer = name_of(two);
	MUST(same(&peer, &b));
	SAME(sendto(stranger, "no", 2, 0, (void *)&b.ss, b.len), 2);	/* from somebody else: dropped */
	SAME(send(one, "yes", 3, 0), 3);
	SAME(recv(two, buf, sizeof(buf), 0), 3);
	SAME(send(two, "and back", 8, 0), 8);
	SAME(recv(one, buf, sizeof(buf), 0), 8);
}

int main(void)
{
	run_check("a stream over 127.0.0.1 reaches its listener, and both ends show the real names", stream);
	run_check("a stream over ::1 reaches its listener, and both ends show the real names", stream6);
	run_check("a port that a listener has is in use at bind, and free when it is closed", port_in_use);
	run_check("two sockets that both say SO_REUSEPORT share a port", share_port);
	run_check("a port where nobody listens refuses", refused);
	run_check("a client connects from the address it was bound to", bound_client);
	run_check("a non-blocking connect is in progress, then succeeds", nonblocking);
	run_check("a listener on :: takes IPv4 connections and shows them v4-mapped", dual_stack);
	run_check("datagrams over 127.0.0.1 go both ways between sockets that are not connected", datagrams);
	run_check("datagrams over ::1 go both ways between sockets that are not connected", datagrams6);
	run_check("bound datagram sockets connect to one another and hear nobody else", connected_datagrams);
	return finish_checks();
}
