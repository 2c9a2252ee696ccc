// SPDX-License-Identifier: BSD-3-Clause
/*
 * dgram_policy_check PEER PORT DENIED NATIVE - one UDP socket with several verdicts, in a guest only. PEER is tests/e2e/peer.py, DENIED an
 * address that the policy refuses with EACCES, NATIVE one that it leaves to a guest without a route.
 */
#include "check.h"
#include <netinet/udp.h>

static struct addr peer, denied, native;

static void echoed(int fd)
{
	char c = 0;

	SAME(sendto(fd, "e", 1, 0, (void *)&peer.ss, peer.len), 1);
	SAME(recv(fd, &c, 1, 0), 1);
	SAME(c, 'e');
}

static void each_destination_has_its_own_verdict(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	echoed(fd);
	for (int i = 0; i < 2; i++) {		/* the second time from memory */
		ERRNO(sendto(fd, "x", 1, 0, (void *)&denied.ss, denied.len), EACCES);
		ERRNO(sendto(fd, "x", 1, 0, (void *)&native.ss, native.len), ENETUNREACH);
		echoed(fd);
	}
}

static void the_guests_own_addresses_are_reached_natively(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), own = socket(AF_INET, SOCK_DGRAM, 0);
	struct addr a = address("127.0.0.1", "0"), from = { .len = sizeof(from.ss) };
	char c = 0;

	MUST(bind(own, (void *)&a.ss, a.len) == 0);
	MUST(getsockname(own, (void *)&a.ss, &a.len) == 0);
	echoed(fd);
	SAME(sendto(fd, "i", 1, 0, (void *)&a.ss, a.len), 1);
	SAME(recvfrom(own, &c, 1, 0, (void *)&from.ss, &from.len), 1);
	SAME(sendto(own, "o", 1, 0, (void *)&from.ss, from.len), 1);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	SAME(recv(fd, &c, 1, 0), 1);
	SAME(c, 'o');
	echoed(fd);
}

static void connecting_to_what_is_refused_fails_and_the_socket_lives_on(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	echoed(fd);
	ERRNO(connect(fd, (void *)&denied.ss, denied.len), EACCES);
	echoed(fd);
	ERRNO(connect(fd, (void *)&native.ss, native.len), ENETUNREACH);
	echoed(fd);
}

/* is it in the list of groups that the guest's loopback has joined? The list has an address as the machine reads its four bytes */
static bool joined(const char *group)
{
	char line[200], word[16];
	bool found = false, lo = false;
	struct in_addr in;
	FILE *f = fopen("/proc/net/igmp", "r");

	MUST(f && inet_pton(AF_INET, group, &in) == 1);
	snprintf(word, sizeof(word), "\t%08X ", in.s_addr);
	while (fgets(line, sizeof(line), f)) {
		if (line[0] >= '0' && line[0] <= '9')
			lo = strstr(line, "\tlo ") != NULL;
		found |= lo && strstr(line, word);
	}
	fclose(f);
	return found;
}

static void joining_a_group_on_an_offloaded_socket_joins_in_the_guest(void)
{
	struct ip_mreqn m = { .imr_ifindex = 1 };
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	echoed(fd);
	MUST(inet_pton(AF_INET, "224.0.0.251", &m.imr_multiaddr) == 1);
	MUST(!joined("224.0.0.251"));
	MUST(setsockopt(fd, SOL_IP, IP_ADD_MEMBERSHIP, &m, sizeof(m)) == 0);
	MUST(joined("224.0.0.251"));
	ERRNO(setsockopt(fd, SOL_IP, IP_ADD_MEMBERSHIP, &m, sizeof(m)), EADDRINUSE);
	MUST(setsockopt(fd, SOL_IP, IP_DROP_MEMBERSHIP, &m, sizeof(m)) == 0);
	MUST(!joined("224.0.0.251"));
	m.imr_ifindex = 4711;
	ERRNO(setsockopt(fd, SOL_IP, IP_ADD_MEMBERSHIP, &m, sizeof(m)), ENODEV);
	m.imr_multiaddr.s_addr = htonl(0x0a000005);
	ERRNO(setsockopt(fd, SOL_IP, IP_ADD_MEMBERSHIP, &m, sizeof(m)), EINVAL);
	echoed(fd);
}

static void an_offloaded_socket_sends_to_groups_natively(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), member = socket(AF_INET, SOCK_DGRAM, 0);
	struct addr any = address("0.0.0.0", "0"), group;
	struct ip_mreqn m = { .imr_ifindex = 1 };
	char c = 0, number[8];

	MUST(inet_pton(AF_INET, "224.0.0.251", &m.imr_multiaddr) == 1);
	MUST(bind(member, (void *)&any.ss, any.len) == 0);
	MUST(getsockname(member, (void *)&any.ss, &any.len) == 0);
	MUST(setsockopt(member, SOL_IP, IP_ADD_MEMBERSHIP, &m, sizeof(m)) == 0);
	snprintf(number, sizeof(number), "%d", port_of(&any));
	group = address("224.0.0.251", number);
	echoed(fd);
	MUST(setsockopt(fd, SOL_IP, IP_MULTICAST_IF, &m, sizeof(m)) == 0);
	SAME(sendto(fd, "g", 1, 0, (void *)&group.ss, group.len), 1);
	SAME(recv(member, &c, 1, 0), 1);
	SAME(c, 'g');
	echoed(fd);
}

static void what_the_device_cannot_do_is_refused(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	echoed(fd);
	ERRNO(sendto(fd, "x", 1, MSG_OOB, (void *)&peer.ss, peer.len), EOPNOTSUPP);
	ERRNO(setsockopt(fd, IPPROTO_UDP, UDP_ENCAP, &(int){ 1 }, sizeof(int)), ENOPROTOOPT);
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: %s PEER PORT DENIED NATIVE\n", argv[0]);
		return 2;
	}
	peer = address(argv[1], argv[2]);
	denied = address(argv[3], argv[2]);
	native = address(argv[4], argv[2]);
	C(each_destination_has_its_own_verdict);
	C(the_guests_own_addresses_are_reached_natively);
	C(connecting_to_what_is_refused_fails_and_the_socket_lives_on);
	C(joining_a_group_on_an_offloaded_socket_joins_in_the_guest);
	C(an_offloaded_socket_sends_to_groups_natively);
	C(what_the_device_cannot_do_is_refused);
	return finish_checks();
}
