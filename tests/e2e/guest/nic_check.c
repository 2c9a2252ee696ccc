// SPDX-License-Identifier: BSD-3-Clause
/*
 * nic_check PEER PORT HOST HOST_PORT CLOSED OWN OWN6 - a guest with a NIC beside the device: who gets which socket.
 *
 * Run as root. PEER is offloaded to tests/e2e/peer.py; the policy does not name HOST, where the NIC leads to the same program on HOST_PORT
 * and to nobody on CLOSED. OWN and OWN6 are the addresses of the NIC, eth0.
 *
 * Two ways lead from the guest to its own servers and around the host: through the device to PEER 7004 (TCP) and 7005 (UDP), and through the
 * NIC to HOST on the ports of NIC_TCP and NIC_UDP in the environment. The servers are those on ports 8080 and 8090 of any address.
 */
#include "check.h"
#include "listed.h"

static struct addr peer, host, closed, own, own6, around_tcp, around_udp, around_nic_tcp, around_nic_udp;

static struct addr with_port(struct addr a, int port)
{
	((struct sockaddr_in *)&a.ss)->sin_port = htons(port);	/* the same place in sockaddr_in6 */
	return a;
}

static in_addr_t ip(const struct addr *a)
{
	return ((const struct sockaddr_in *)&a->ss)->sin_addr.s_addr;
}

static struct addr local_name(int fd)
{
	struct addr a = { .len = sizeof(a.ss) };

	MUST(getsockname(fd, (void *)&a.ss, &a.len) == 0);
	return a;
}

static in_addr_t local_ip(int fd)
{
	struct addr a = local_name(fd);

	return ip(&a);
}

static void echo_once(int fd)
{
	char c = 0;

	send_all(fd, "echo\nx", 6);
	recv_exactly(fd, &c, 1);
	SAME(c, 'x');
}

static int listener(struct addr at)
{
	int fd = socket(at.ss.ss_family, SOCK_STREAM, 0);

	MUST(fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) == 0);
	MUST(bind(fd, (void *)&at.ss, at.len) == 0 && listen(fd, 5) == 0);
	return fd;
}

/* one connection through the listener: a byte each way. Returns the server's side */
static int visit(int l, const struct addr *at)
{
	struct addr from = { .len = sizeof(from.ss) };
	int c = open_connected(at), s = accept(l, (void *)&from.ss, &from.len);
	char byte = 0;

	MUST(s >= 0);
	send_all(c, "?", 1);
	recv_exactly(s, &byte, 1);
	SAME(byte, '?');
	send_all(s, "!", 1);
	recv_exactly(c, &byte, 1);
	SAME(byte, '!');
	close(c);
	return s;
}

/* --------------------------------------------------------------------------------------------------------- connections */

static void each_socket_is_offered_to_the_device_first(void)
{
	int fds[20];

	for (int i = 0; i < 20; i++) {
		fds[i] = open_connected(i & 1 ? &host : &peer);
		SAME(offloaded(fds[i]), !(i & 1));
	}
	for (int i = 0; i < 20; i++)
		echo_once(fds[i]);
}

static void both_kinds_wake_one_epoll(void)
{
	int ep = epoll_create1(0), fds[2] = { open_connected(&peer), open_connected(&host) }, seen = 0;

	MUST(ep >= 0);
	for (int i = 0; i < 2; i++) {
		struct epoll_event ev = { .events = EPOLLIN, .data.u32 = i };

		MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fds[i], &ev) == 0);
		send_all(fds[i], "echo\nx", 6);
	}
	while (seen != 3) {
		struct epoll_event ev;

		SAME(epoll_wait(ep, &ev, 1, CHECK_SECONDS * 1000), 1);
		recv_exactly(fds[ev.data.u32], &(char){0}, 1);
		seen |= 1 << ev.data.u32;
	}
}

static void a_socket_that_the_nic_could_not_connect_is_offered_again(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	ERRNO(connect(fd, (void *)&closed.ss, closed.len), ECONNREFUSED);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(offloaded(fd));
	echo_once(fd);
}

/* natively, too, it takes a call of its own to hear that it is over */
static void one_whose_nonblocking_connect_failed_on_the_nic_is_offered_again(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), err = 0;

	ERRNO(connect(fd, (void *)&closed.ss, closed.len), EINPROGRESS);
	MUST(wait_for(fd, POLLOUT) & POLLERR);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &(socklen_t){ sizeof(err) }) == 0);
	SAME(err, ECONNREFUSED);
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), ECONNABORTED);
	MUST(fcntl(fd, F_SETFL, 0) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(offloaded(fd));
	echo_once(fd);
}

static void a_socket_that_the_device_could_not_connect_may_use_the_nic(void)
{
	struct addr refused = address("10.66.0.2", "80");	/* site.py: by the policy */
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	ERRNO(connect(fd, (void *)&refused.ss, refused.len), ECONNREFUSED);
	MUST(connect(fd, (void *)&host.ss, host.len) == 0);
	MUST(!offloaded(fd));
	SAME(local_ip(fd), ip(&own));
	echo_once(fd);
}

static void a_nonblocking_connect_ends_as_the_nic_says(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), err = 0;

	ERRNO(connect(fd, (void *)&host.ss, host.len), EINPROGRESS);
	SAME(wait_for(fd, POLLOUT), POLLOUT);
	MUST(connect(fd, (void *)&host.ss, host.len) == 0 || errno == EISCONN);
	MUST(!offloaded(fd));
	MUST(fcntl(fd, F_SETFL, 0) == 0);
	echo_once(fd);

	fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	ERRNO(connect(fd, (void *)&closed.ss, closed.len), EINPROGRESS);
	MUST(wait_for(fd, POLLOUT) & POLLERR);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &(socklen_t){ sizeof(err) }) == 0);
	SAME(err, ECONNREFUSED);
}

static void a_socket_that_is_tied_to_the_nic_is_native(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct addr any = with_port(own, 0);

	MUST(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "eth0", 5) == 0);
	MUST(connect(fd, (void *)&host.ss, host.len) == 0);
	MUST(!offloaded(fd));
	echo_once(fd);
	fd = socket(AF_INET, SOCK_STREAM, 0);
	MUST(bind(fd, (void *)&any.ss, any.len) == 0);
	MUST(!offloaded(fd));
	MUST(connect(fd, (void *)&host.ss, host.len) == 0);
	echo_once(fd);
}

/* ------------------------------------------------------------------------------------------------------------- servers */

static void a_listener_on_any_address_is_reached_from_every_side(void)
{
	struct addr lo = address("127.0.0.1", "8080"), mine = with_port(own, 8080), here;
	int l = listener(address("0.0.0.0", "8080")), s;

	MUST(offloaded(l));
	s = visit(l, &lo);
	MUST(!offloaded(s));
	s = visit(l, &mine);
	MUST(!offloaded(s));
	SAME(local_ip(s), ip(&own));
	s = visit(l, &around_nic_tcp);
	MUST(!offloaded(s));
	SAME(local_ip(s), ip(&own));
	s = visit(l, &around_tcp);
	MUST(offloaded(s));
	here = local_name(s);
	SAME(port_of(&here), 8080);
}

static void connections_from_every_side_wait_in_one_queue(void)
{
	const struct addr ways[] = { around_tcp, address("127.0.0.1", "8080"), around_nic_tcp, with_port(own, 8080), around_tcp };
	int l = listener(address("0.0.0.0", "8080")), clients[5], served = 0;

	for (int i = 0; i < 5; i++) {
		clients[i] = open_connected(&ways[i]);
		send_all(clients[i], &(char){ 'a' + i }, 1);
	}
	while (served != 31) {
		int s = accept(l, NULL, NULL);
		char c = 0;

		MUST(s >= 0);
		recv_exactly(s, &c, 1);
		MUST(c >= 'a' && c < 'a' + 5 && !(served & 1 << (c - 'a')));
		served |= 1 << (c - 'a');
		send_all(s, &c, 1);
	}
	for (int i = 0; i < 5; i++) {
		char c = 0;

		recv_exactly(clients[i], &c, 1);
		SAME(c, 'a' + i);
	}
}

static void a_listener_on_the_nics_address_is_native(void)
{
	struct addr mine = with_port(own, 8080);
	int l = listener(mine);

	MUST(!offloaded(l));
	close(visit(l, &mine));
	close(visit(l, &around_nic_tcp));
}

static void the_nics_own_addresses_stay_in_the_guest(void)
{
	const struct addr ours[] = { own, own6 };

	for (int i = 0; i < 2; i++) {
		int l = listener(with_port(ours[i], 0)), c, s;
		struct addr at = local_name(l);

		c = open_connected(&at);
		s = accept(l, NULL, NULL);
		MUST(s >= 0 && !offloaded(l) && !offloaded(c) && !offloaded(s));
	}
}

/* ----------------------------------------------------------------------------------------------------------- datagrams */

static void ask_datagram(int fd, const struct addr *to)
{
	struct addr from = { .len = sizeof(from.ss) };
	char c = 0;

	SAME(sendto(fd, "d", 1, 0, (void *)&to->ss, to->len), 1);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	SAME(recvfrom(fd, &c, 1, 0, (void *)&from.ss, &from.len), 1);
	SAME(c, 'd');
	SAME(ip(&from), ip(to));
	SAME(port_of(&from), port_of(to));
}

static void one_datagram_socket_uses_both_ways(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	for (int i = 0; i < 5; i++) {
		ask_datagram(fd, &peer);
		MUST(offloaded(fd));
		ask_datagram(fd, &host);
	}
}

static void a_connected_datagram_socket_follows_its_peer(void)
{
	const struct addr *to[] = { &host, &peer, &host };

	for (int i = 0; i < 3; i++) {
		int fd = socket(AF_INET, SOCK_DGRAM, 0);

		MUST(connect(fd, (void *)&to[i]->ss, to[i]->len) == 0);
		SAME(offloaded(fd), to[i] == &peer);
		SAME(send(fd, "d", 1, 0), 1);
		MUST(wait_for(fd, POLLIN) & POLLIN);
		SAME(recv(fd, &(char){0}, 1, 0), 1);
	}
}

static void a_datagram_server_answers_every_side_by_the_way_it_came(void)
{
	const struct addr ways[] = { address("127.0.0.1", "8090"), with_port(own, 8090), around_nic_udp, around_udp };
	int server = socket(AF_INET, SOCK_DGRAM, 0), fds[4];
	struct addr any = address("0.0.0.0", "8090");

	MUST(bind(server, (void *)&any.ss, any.len) == 0);
	MUST(offloaded(server));
	for (int i = 0; i < 4; i++) {
		char c = 'a' + i;

		fds[i] = socket(AF_INET, SOCK_DGRAM, 0);
		MUST(connect(fds[i], (void *)&ways[i].ss, ways[i].len) == 0);
		SAME(offloaded(fds[i]), i == 3);
		SAME(send(fds[i], &c, 1, 0), 1);
	}
	for (int i = 0; i < 4; i++) {
		struct addr from = { .len = sizeof(from.ss) };
		char c = 0;

		MUST(wait_for(server, POLLIN) & POLLIN);
		SAME(recvfrom(server, &c, 1, 0, (void *)&from.ss, &from.len), 1);
		MUST(c >= 'a' && c < 'a' + 4);
		SAME(sendto(server, &c, 1, 0, (void *)&from.ss, from.len), 1);
	}
	for (int i = 0; i < 4; i++) {
		char c = 0;

		MUST(wait_for(fds[i], POLLIN) & POLLIN);
		SAME(recv(fds[i], &c, 1, 0), 1);
		SAME(c, 'a' + i);
	}
}

int main(int argc, char **argv)
{
	if (argc != 8 || !getenv("NIC_TCP") || !getenv("NIC_UDP")) {
		fprintf(stderr, "usage: NIC_TCP=PORT NIC_UDP=PORT nic_check PEER PORT HOST HOST_PORT CLOSED OWN OWN6\n");
		return 2;
	}
	peer = address(argv[1], argv[2]);
	host = address(argv[3], argv[4]);
	closed = address(argv[3], argv[5]);
	own = address(argv[6], "0");
	own6 = address(argv[7], "0");
	around_tcp = address(argv[1], "7004");
	around_udp = address(argv[1], "7005");
	around_nic_tcp = address(argv[3], getenv("NIC_TCP"));
	around_nic_udp = address(argv[3], getenv("NIC_UDP"));
	C(each_socket_is_offered_to_the_device_first);
	C(both_kinds_wake_one_epoll);
	C(a_socket_that_the_nic_could_not_connect_is_offered_again);
	C(one_whose_nonblocking_connect_failed_on_the_nic_is_offered_again);
	C(a_socket_that_the_device_could_not_connect_may_use_the_nic);
	C(a_nonblocking_connect_ends_as_the_nic_says);
	C(a_socket_that_is_tied_to_the_nic_is_native);
	C(a_listener_on_any_address_is_reached_from_every_side);
	C(connections_from_every_side_wait_in_one_queue);
	C(a_listener_on_the_nics_address_is_native);
	C(the_nics_own_addresses_stay_in_the_guest);
	C(one_datagram_socket_uses_both_ways);
	C(a_connected_datagram_socket_follows_its_peer);
	C(a_datagram_server_answers_every_side_by_the_way_it_came);
	return finish_checks();
}
