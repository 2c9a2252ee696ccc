// SPDX-License-Identifier: BSD-3-Clause
/*
 * dgram_check PEER PORT PEER2 PORT2 - what a UDP client may rely on. Both peers are tests/e2e/peer.py, at different addresses.
 */
#include "check.h"

static struct addr peer, peer2;

static void connected_datagrams_keep_their_boundaries(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);
	char buf[100];

	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	SAME(send(fd, "one", 3, 0), 3);
	SAME(recv(fd, buf, sizeof(buf), 0), 3);
	SAME(send(fd, "three", 5, 0), 5);
	SAME(recv(fd, buf, sizeof(buf), 0), 5);
	MUST(memcmp(buf, "three", 5) == 0);
}

static void connected_socket_knows_its_names(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);
	struct addr a = { .len = sizeof(a.ss) };

	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(getpeername(fd, (void *)&a.ss, &a.len) == 0);
	SAME(a.len, peer.len);
	SAME(port_of(&a), port_of(&peer));
	a.len = sizeof(a.ss);
	MUST(getsockname(fd, (void *)&a.ss, &a.len) == 0);
	SAME(a.ss.ss_family, peer.ss.ss_family);
	MUST(port_of(&a) != 0);
}

static void sendto_shows_the_source_it_was_sent_to(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);
	struct addr a = { .len = sizeof(a.ss) };
	char buf[100];

	SAME(sendto(fd, "question", 8, 0, (void *)&peer.ss, peer.len), 8);
	SAME(recvfrom(fd, buf, sizeof(buf), 0, (void *)&a.ss, &a.len), 8);
	SAME(a.len, peer.len);
	SAME(port_of(&a), port_of(&peer));
	if (memcmp(&a.ss, &peer.ss, peer.ss.ss_family == AF_INET ? 8 : 24))
		fail("the answer does not come from where the question went");
}

static void one_socket_talks_to_two_peers(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);
	struct addr a;
	char buf[100];

	for (int i = 0; i < 4; i++) {
		const struct addr *to = i % 2 ? &peer2 : &peer;

		a.len = sizeof(a.ss);
		SAME(sendto(fd, "q", 1, 0, (void *)&to->ss, to->len), 1);
		SAME(recvfrom(fd, buf, sizeof(buf), 0, (void *)&a.ss, &a.len), 1);
		SAME(port_of(&a), port_of(to));
	}
}

static void a_short_buffer_truncates_and_msg_trunc_tells_the_real_length(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);
	char buf[4];
	struct iovec iov = { buf, sizeof(buf) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	SAME(send(fd, "0123456789", 10, 0), 10);
	SAME(recvmsg(fd, &m, 0), 4);
	MUST(m.msg_flags & MSG_TRUNC);
	SAME(send(fd, "0123456789", 10, 0), 10);
	SAME(recv(fd, buf, sizeof(buf), MSG_TRUNC), 10);
}

static void zero_length_datagrams_arrive(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);

	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	SAME(send(fd, "", 0, 0), 0);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	SAME(recv(fd, &(char){0}, 1, 0), 0);
}

static void large_datagrams_arrive_whole(void)
{
	static uint8_t buf[65536];
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);

	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	SAME(send(fd, "big 60000", 9, 0), 9);
	SAME(recv(fd, buf, sizeof(buf), 0), 60000);
	for (int i = 0; i < 60000; i++)
		SAME(buf[i], pattern(i));
}

static void recv_without_data_is_eagain(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM | SOCK_NONBLOCK, 0);

	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	ERRNO(recv(fd, &(char){0}, 1, 0), EAGAIN);
	SAME(send(fd, "a", 1, 0), 1);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	SAME(recv(fd, &(char){0}, 1, 0), 1);
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: %s PEER PORT PEER2 PORT2\n", argv[0]);
		return 2;
	}
	peer = address(argv[1], argv[2]);
	peer2 = address(argv[3], argv[4]);
#define C(fn) run_check(#fn, fn)
	C(connected_datagrams_keep_their_boundaries);
	C(connected_socket_knows_its_names);
	C(sendto_shows_the_source_it_was_sent_to);
	C(one_socket_talks_to_two_peers);
	C(a_short_buffer_truncates_and_msg_trunc_tells_the_real_length);
	C(zero_length_datagrams_arrive);
	C(large_datagrams_arrive_whole);
	C(recv_without_data_is_eagain);
	return finish_checks();
}
