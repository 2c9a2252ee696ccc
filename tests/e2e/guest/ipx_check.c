// SPDX-License-Identifier: BSD-3-Clause
/*
 * ipx_check NETWORK OWN PEER DENIED - what a program that speaks IPX may rely on. All in hexadecimal: the network, this guest's node, a node
 * where `ipx_check echo` runs (this one will do), and one that the policy denies with EPERM.
 *
 * ipx_check echo - answers each datagram to socket 5000 with the same type and data, for ever.
 *
 * No kernel of today has AF_IPX of its own to run this on: the claims are what Linux' own did, as its last source had it (4.17).
 */
#include <netipx/ipx.h>

#include "check.h"

#define ECHO_SOCKET 0x5000

static uint32_t network;
static uint8_t own[6], peer[6], denied[6], everybody[6] = { 255, 255, 255, 255, 255, 255 };

static void read_node(uint8_t *node, const char *text)
{
	unsigned long long value = strtoull(text, NULL, 16);

	for (int i = 5; i >= 0; i--, value >>= 8)
		node[i] = (uint8_t)value;
}

static struct sockaddr_ipx at(const uint8_t *node, int number, int type)
{
	struct sockaddr_ipx a = { .sipx_family = AF_IPX, .sipx_network = htonl(network), .sipx_port = htons(number), .sipx_type = type };

	memcpy(a.sipx_node, node, 6);
	return a;
}

static int opened(void)
{
	int fd = socket(AF_IPX, SOCK_DGRAM, 0);

	MUST(fd >= 0);
	return fd;
}

static int bound(int number)
{
	struct sockaddr_ipx a = { .sipx_family = AF_IPX, .sipx_port = htons(number) };
	int fd = opened();

	MUST(bind(fd, (void *)&a, sizeof(a)) == 0);
	return fd;
}

static struct sockaddr_ipx name_of(int fd)
{
	struct sockaddr_ipx a;
	socklen_t len = sizeof(a);

	memset(&a, 0xee, sizeof(a));
	MUST(getsockname(fd, (void *)&a, &len) == 0);
	SAME(len, sizeof(a));
	SAME(a.sipx_family, AF_IPX);
	SAME(a.sipx_zero, 0);
	return a;
}

static ssize_t send_to(int fd, const void *data, size_t len, struct sockaddr_ipx to)
{
	return sendto(fd, data, len, 0, (void *)&to, sizeof(to));
}

/* the next datagram is this one */
static void expect(int fd, const void *data, size_t len, struct sockaddr_ipx from)
{
	static uint8_t got[70000];
	struct sockaddr_ipx source;
	socklen_t n = sizeof(source);

	memset(&source, 0xee, sizeof(source));
	SAME(recvfrom(fd, got, sizeof(got), 0, (void *)&source, &n), len);
	MUST(!memcmp(got, data, len));
	SAME(n, sizeof(source));
	MUST(!memcmp(&source, &from, sizeof(source)));
}

/* ---------------------------------------------------------------------------------------------------------------- names */

static void a_socket_gets_the_networks_address_and_a_free_dynamic_number(void)
{
	int first = bound(0), second = bound(0);
	struct sockaddr_ipx a = name_of(first), b = name_of(second);

	SAME(ntohl(a.sipx_network), network);
	MUST(!memcmp(a.sipx_node, own, 6));
	MUST(ntohs(a.sipx_port) >= 0x4000 && ntohs(a.sipx_port) <= 0x7fff);
	MUST(a.sipx_port != b.sipx_port);
}

static void a_socket_without_an_address_shows_none(void)
{
	struct sockaddr_ipx a = name_of(opened()), none = { .sipx_family = AF_IPX };

	MUST(!memcmp(&a, &none, sizeof(a)));
}

static void bind_says_what_is_wrong(void)
{
	struct sockaddr_ipx a = { .sipx_family = AF_IPX, .sipx_port = htons(0x4321) };
	int fd = opened(), other = opened();

	ERRNO(bind(fd, (void *)&a, sizeof(a) - 1), EINVAL);
	a.sipx_network = htonl(network + 1);
	ERRNO(bind(fd, (void *)&a, sizeof(a)), EADDRNOTAVAIL);
	a.sipx_network = htonl(network);
	MUST(bind(fd, (void *)&a, sizeof(a)) == 0);
	ERRNO(bind(fd, (void *)&a, sizeof(a)), EINVAL);
	ERRNO(bind(other, (void *)&a, sizeof(a)), EADDRINUSE);
	close(fd);
	MUST(bind(other, (void *)&a, sizeof(a)) == 0);
}

static void numbers_below_4000_are_for_the_privileged(void)
{
	struct sockaddr_ipx a = { .sipx_family = AF_IPX, .sipx_port = htons(0x452) };

	close(bound(0x452));
	MUST(setuid(65534) == 0);
	ERRNO(bind(opened(), (void *)&a, sizeof(a)), EACCES);
}

static void there_are_no_streams_and_no_listeners(void)
{
	int fd = bound(0);

	ERRNO(socket(AF_IPX, SOCK_STREAM, 0), ESOCKTNOSUPPORT);
	ERRNO(socket(AF_IPX, SOCK_SEQPACKET, 0), ESOCKTNOSUPPORT);
	ERRNO(listen(fd, 1), EOPNOTSUPP);
	ERRNO(accept(fd, NULL, NULL), EOPNOTSUPP);
}

/* ------------------------------------------------------------------------------------------------------------ datagrams */

static void a_datagram_is_answered_with_its_source_and_type(void)
{
	static uint8_t data[60000];
	static const size_t sizes[] = { 0, 1, 546, 1470, 16385, sizeof(data) };
	int fd = bound(0);

	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = pattern(i);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		SAME(send_to(fd, data, sizes[i], at(peer, ECHO_SOCKET, 4 + (int)i)), sizes[i]);
		expect(fd, data, sizes[i], at(peer, ECHO_SOCKET, 4 + (int)i));
	}
}

static void sending_and_receiving_give_a_socket_its_address(void)
{
	int fd = opened();
	char c;

	SAME(send_to(fd, "a", 1, at(peer, ECHO_SOCKET, 0)), 1);
	MUST(name_of(fd).sipx_port);
	expect(fd, "a", 1, at(peer, ECHO_SOCKET, 0));
	fd = opened();
	ERRNO(recv(fd, &c, 1, MSG_DONTWAIT), EAGAIN);
	MUST(name_of(fd).sipx_port);
}

static void network_0_is_the_sockets_own(void)
{
	struct sockaddr_ipx to = at(peer, ECHO_SOCKET, 17);
	int fd = bound(0);

	to.sipx_network = 0;
	SAME(send_to(fd, "a", 1, to), 1);
	expect(fd, "a", 1, at(peer, ECHO_SOCKET, 17));
}

static void two_sockets_of_a_guest_exchange_datagrams(void)
{
	int first = bound(0x4444), second = bound(0x4445);

	SAME(send_to(first, "there", 5, at(own, 0x4445, 1)), 5);
	expect(second, "there", 5, at(own, 0x4444, 1));
	SAME(send_to(second, "back", 4, at(own, 0x4444, 2)), 4);
	expect(first, "back", 4, at(own, 0x4445, 2));
}

static void a_broadcast_needs_leave_and_reaches_own_sockets_and_the_peer(void)
{
	struct sockaddr_ipx from;
	socklen_t n;
	int fd = bound(0x4666), on = 1;
	char data[8];

	ERRNO(send_to(fd, "x", 1, at(everybody, 0x4666, 0)), EACCES);
	MUST(setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &on, sizeof(on)) == 0);
	SAME(send_to(fd, "own", 3, at(everybody, 0x4666, 3)), 3);
	expect(fd, "own", 3, at(own, 0x4666, 3));
	SAME(send_to(fd, "all", 3, at(everybody, ECHO_SOCKET, 3)), 3);
	do {	/* whoever else answers */
		n = sizeof(from);
		SAME(recvfrom(fd, data, sizeof(data), 0, (void *)&from, &n), 3);
		MUST(!memcmp(data, "all", 3));
	} while (memcmp(from.sipx_node, peer, 6));
	SAME(ntohs(from.sipx_port), ECHO_SOCKET);
}

static void destinations_that_cannot_be_are_errors(void)
{
	struct sockaddr_ipx to = at(peer, ECHO_SOCKET, 0);
	static char big[65536];
	int fd = bound(0);

	ERRNO(sendto(fd, "x", 1, 0, (void *)&to, sizeof(to) - 1), EINVAL);
	to.sipx_family = AF_INET;
	ERRNO(send_to(fd, "x", 1, to), EINVAL);
	to = at(peer, ECHO_SOCKET, 0);
	to.sipx_network = htonl(network + 1);
	ERRNO(send_to(fd, "x", 1, to), ENETUNREACH);
	ERRNO(connect(fd, (void *)&to, sizeof(to)), ENETUNREACH);
	ERRNO(send_to(fd, "x", 1, at(denied, 1, 0)), EPERM);
	ERRNO(send_to(fd, "x", 1, at(denied, 1, 0)), EPERM);
	ERRNO(send_to(fd, big, 65505, at(peer, ECHO_SOCKET, 0)), EINVAL);
	ERRNO(send_to(fd, big, 65478, at(peer, ECHO_SOCKET, 0)), EMSGSIZE);
	to = at(peer, ECHO_SOCKET, 0);
	ERRNO(sendto(fd, "x", 1, MSG_OOB, (void *)&to, sizeof(to)), EINVAL);
	SAME(send_to(fd, "fine", 4, to), 4);
	expect(fd, "fine", 4, to);
}

static void a_connected_socket_sends_to_its_peer_and_hears_everybody(void)
{
	struct sockaddr_ipx to = at(peer, ECHO_SOCKET, 9), got, none = { .sipx_family = AF_UNSPEC };
	socklen_t n = sizeof(got);
	int fd = opened(), other = bound(0x4777);

	ERRNO(getpeername(fd, (void *)&got, &n), ENOTCONN);
	ERRNO(send(fd, "x", 1, 0), ENOTCONN);
	ERRNO(connect(fd, (void *)&to, sizeof(to) - 1), EINVAL);
	MUST(connect(fd, (void *)&to, sizeof(to)) == 0);
	MUST(getpeername(fd, (void *)&got, &n) == 0);
	SAME(n, sizeof(got));
	MUST(!memcmp(&got, &to, sizeof(to)));
	SAME(name_of(fd).sipx_type, 9);
	SAME(send(fd, "x", 1, 0), 1);
	expect(fd, "x", 1, to);
	SAME(send_to(other, "y", 1, name_of(fd)), 1);
	expect(fd, "y", 1, at(own, 0x4777, 9));
	MUST(connect(fd, (void *)&none, sizeof(none)) == 0);
	ERRNO(send(fd, "x", 1, 0), ENOTCONN);
}

static void the_type_is_an_option(void)
{
	struct sockaddr_ipx to = at(peer, ECHO_SOCKET, 0);
	int fd = opened(), type = 20, got = 0;
	socklen_t len = sizeof(got);

	MUST(setsockopt(fd, SOL_IPX, IPX_TYPE, &type, sizeof(type)) == 0);
	MUST(getsockopt(fd, SOL_IPX, IPX_TYPE, &got, &len) == 0);
	SAME(got, 20);
	SAME(name_of(fd).sipx_type, 20);
	MUST(connect(fd, (void *)&to, sizeof(to)) == 0);	/* which sets it, too */
	MUST(setsockopt(fd, SOL_IPX, IPX_TYPE, &type, sizeof(type)) == 0);
	SAME(send(fd, "x", 1, 0), 1);
	expect(fd, "x", 1, at(peer, ECHO_SOCKET, 20));
	ERRNO(setsockopt(fd, SOL_IPX, IPX_TYPE, &type, 1), EINVAL);
	ERRNO(setsockopt(fd, SOL_IPX, 2, &type, sizeof(type)), ENOPROTOOPT);
	ERRNO(getsockopt(fd, SOL_IP, IP_TOS, &got, &len), ENOPROTOOPT);
}

static void options_of_every_socket_work(void)
{
	struct timeval brief = { .tv_usec = 1000 };
	int fd = bound(0), got = 0;
	socklen_t len = sizeof(got);
	char c;

	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &brief, sizeof(brief)) == 0);
	ERRNO(recv(fd, &c, 1, 0), EAGAIN);
	MUST(getsockopt(fd, SOL_SOCKET, SO_TYPE, &got, &len) == 0);
	SAME(got, SOCK_DGRAM);
	MUST(getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &got, &len) == 0);
	SAME(got, AF_IPX);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &got, &len) == 0);
	SAME(got, 0);
}

static void poll_and_fionread_tell_of_a_datagram(void)
{
	int fd = bound(0), other = bound(0), n;
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT };

	SAME(poll(&p, 1, 0), 1);
	SAME(p.revents, POLLOUT);
	MUST(ioctl(fd, FIONREAD, &n) == 0);
	SAME(n, 0);
	SAME(send_to(other, "four", 4, name_of(fd)), 4);
	SAME(wait_for(fd, POLLIN), POLLIN);
	MUST(ioctl(fd, FIONREAD, &n) == 0);
	SAME(n, 4);
}

static void a_datagram_is_looked_at_and_cut(void)
{
	struct iovec iov;
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	int fd = bound(0), other = bound(0);
	char data[8];

	SAME(send_to(other, "first", 5, name_of(fd)), 5);
	SAME(send_to(other, "second", 6, name_of(fd)), 6);
	SAME(recv(fd, data, sizeof(data), MSG_PEEK), 5);
	iov = (struct iovec){ data, 2 };
	SAME(recvmsg(fd, &msg, 0), 2);
	MUST(msg.msg_flags & MSG_TRUNC);
	MUST(!memcmp(data, "fi", 2));
	SAME(recv(fd, data, sizeof(data), 0), 6);
	MUST(!memcmp(data, "second", 6));
}

static void a_socket_that_is_shut_down_neither_sends_nor_waits(void)
{
	int fd = bound(0);
	char c;

	ERRNO(shutdown(fd, 3), EINVAL);
	MUST(shutdown(fd, SHUT_WR) == 0);
	signal(SIGPIPE, SIG_IGN);
	ERRNO(send_to(fd, "x", 1, at(peer, ECHO_SOCKET, 0)), EPIPE);
	MUST(shutdown(fd, SHUT_RD) == 0);
	SAME(recv(fd, &c, 1, 0), 0);
}

static void a_number_is_free_again_when_its_process_was_killed(void)
{
	int ready[2], status;
	pid_t pid;
	char c;

	MUST(pipe(ready) == 0);
	pid = fork();
	MUST(pid >= 0);
	if (!pid) {
		bound(0x4888);
		MUST(write(ready[1], "x", 1) == 1);
		for (;;)
			pause();
	}
	SAME(read(ready[0], &c, 1), 1);
	kill(pid, SIGKILL);
	MUST(waitpid(pid, &status, 0) == pid);
	bound(0x4888);
}

static int echo(void)
{
	int fd = bound(ECHO_SOCKET);
	static char data[70000];

	printf("ready\n");
	fflush(stdout);
	for (;;) {
		struct sockaddr_ipx from;
		socklen_t len = sizeof(from);
		ssize_t n = recvfrom(fd, data, sizeof(data), 0, (void *)&from, &len);

		if (n < 0) {
			perror("recvfrom");
			return 1;
		}
		if (sendto(fd, data, (size_t)n, 0, (void *)&from, len) != n)
			perror("sendto");
	}
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "echo"))
		return echo();
	if (argc != 5) {
		fprintf(stderr, "usage: %s NETWORK OWN PEER DENIED | echo\n", argv[0]);
		return 2;
	}
	network = (uint32_t)strtoul(argv[1], NULL, 16);
	read_node(own, argv[2]);
	read_node(peer, argv[3]);
	read_node(denied, argv[4]);
	C(a_socket_gets_the_networks_address_and_a_free_dynamic_number);
	C(a_socket_without_an_address_shows_none);
	C(bind_says_what_is_wrong);
	C(numbers_below_4000_are_for_the_privileged);
	C(there_are_no_streams_and_no_listeners);
	C(a_datagram_is_answered_with_its_source_and_type);
	C(sending_and_receiving_give_a_socket_its_address);
	C(network_0_is_the_sockets_own);
	C(two_sockets_of_a_guest_exchange_datagrams);
	C(a_broadcast_needs_leave_and_reaches_own_sockets_and_the_peer);
	C(destinations_that_cannot_be_are_errors);
	C(a_connected_socket_sends_to_its_peer_and_hears_everybody);
	C(the_type_is_an_option);
	C(options_of_every_socket_work);
	C(poll_and_fionread_tell_of_a_datagram);
	C(a_datagram_is_looked_at_and_cut);
	C(a_socket_that_is_shut_down_neither_sends_nor_waits);
	C(a_number_is_free_again_when_its_process_was_killed);
	return finish_checks();
}
