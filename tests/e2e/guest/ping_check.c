// SPDX-License-Identifier: BSD-3-Clause
/*
 * ping_check ADDRESS - what an unprivileged ping may rely on (SOCK_DGRAM, IPPROTO_ICMP or IPPROTO_ICMPV6). ADDRESS answers.
 */
#include "check.h"

static struct addr peer;
static bool six;

struct echo {
	uint8_t type, code;
	uint16_t checksum, id, sequence;
	char data[8];
};

static int opened(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, six ? IPPROTO_ICMPV6 : IPPROTO_ICMP);

	MUST(fd >= 0);
	return fd;
}

static void check_answer(int fd, uint16_t sequence)
{
	struct addr name = { .len = sizeof(name.ss) }, from = { .len = sizeof(from.ss) };
	struct echo e;

	SAME(recvfrom(fd, &e, sizeof(e), 0, (void *)&from.ss, &from.len), sizeof(e));
	SAME(e.type, six ? 129 : 0);
	SAME(ntohs(e.sequence), sequence);
	MUST(memcmp(e.data, "payload", 8) == 0);
	MUST(getsockname(fd, (void *)&name.ss, &name.len) == 0);
	SAME(ntohs(e.id), port_of(&name));
	SAME(from.len, peer.len);
	if (six)
		MUST(!memcmp(&((struct sockaddr_in6 *)&from.ss)->sin6_addr, &((struct sockaddr_in6 *)&peer.ss)->sin6_addr, 16));
	else
		SAME(((struct sockaddr_in *)&from.ss)->sin_addr.s_addr, ((struct sockaddr_in *)&peer.ss)->sin_addr.s_addr);
}

static void an_echo_request_is_answered_with_the_sockets_identifier(void)
{
	struct echo e = { .type = six ? 128 : 8, .data = "payload" };
	int fd = opened();

	for (uint16_t i = 1; i <= 3; i++) {
		e.sequence = htons(i);
		SAME(sendto(fd, &e, sizeof(e), 0, (void *)&peer.ss, peer.len), sizeof(e));
		check_answer(fd, i);
	}
}

static void a_connected_one_is_answered_too(void)
{
	struct echo e = { .type = six ? 128 : 8, .data = "payload", .sequence = htons(7) };
	int fd = opened();

	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	SAME(send(fd, &e, sizeof(e), 0), sizeof(e));
	check_answer(fd, 7);
}

static void less_than_a_header_is_einval(void)
{
	struct echo e = { .type = six ? 128 : 8, .data = "payload" };
	int fd = opened();

	SAME(sendto(fd, &e, sizeof(e), 0, (void *)&peer.ss, peer.len), sizeof(e));
	ERRNO(sendto(fd, &e, 7, 0, (void *)&peer.ss, peer.len), EINVAL);
}

int main(int argc, char **argv)
{
	if (argc != 2) {
		fprintf(stderr, "usage: %s ADDRESS\n", argv[0]);
		return 2;
	}
	peer = address(argv[1], "0");
	six = peer.ss.ss_family == AF_INET6;
	C(an_echo_request_is_answered_with_the_sockets_identifier);
	C(a_connected_one_is_answered_too);
	C(less_than_a_header_is_einval);
	return finish_checks();
}
