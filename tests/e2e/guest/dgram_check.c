// SPDX-License-Identifier: BSD-3-Clause
/*
 * dgram_check PEER PORT PEER2 PORT2 - what a UDP client may rely on. Both peers are tests/e2e/peer.py, at different addresses.
 */
#include "check.h"
#include <pthread.h>

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

static void the_largest_datagram_passes_and_one_byte_more_is_emsgsize(void)
{
	static char buf[65536], back[65536];
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	for (int i = 0; i < 65507; i++)
		buf[i] = pattern(i);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	SAME(send(fd, buf, 65507, 0), 65507);
	SAME(recv(fd, back, sizeof(back), 0), 65507);
	MUST(memcmp(buf, back, 65507) == 0);
	ERRNO(send(fd, buf, 65508, 0), EMSGSIZE);
	ERRNO(sendto(fd, buf, 65536, 0, (void *)&peer2.ss, peer2.len), EMSGSIZE);
}

static void peek_leaves_the_datagram_where_it_is(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), waiting = 0;
	struct addr a = { .len = sizeof(a.ss) };
	char buf[16];

	SAME(sendto(fd, "peek", 4, 0, (void *)&peer.ss, peer.len), 4);
	SAME(recvfrom(fd, buf, 2, MSG_PEEK | MSG_TRUNC, (void *)&a.ss, &a.len), 4);
	SAME(port_of(&a), port_of(&peer));
	MUST(ioctl(fd, FIONREAD, &waiting) == 0);
	SAME(waiting, 4);
	SAME(recv(fd, buf, sizeof(buf), 0), 4);
	ERRNO(recv(fd, buf, sizeof(buf), MSG_DONTWAIT), EAGAIN);
}

static void sendmmsg_and_recvmmsg_move_several_with_their_addresses(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), got = 0;
	const struct addr *to[4] = { &peer, &peer2, &peer, &peer2 };
	char out[4], in[4][8];
	struct sockaddr_storage from[4];
	struct iovec iov[4];
	struct mmsghdr m[4];

	memset(m, 0, sizeof(m));
	for (int i = 0; i < 4; i++) {
		out[i] = 'a' + i;
		iov[i] = (struct iovec){ &out[i], 1 };
		m[i].msg_hdr = (struct msghdr){ .msg_name = (void *)&to[i]->ss, .msg_namelen = to[i]->len, .msg_iov = &iov[i], .msg_iovlen = 1 };
	}
	SAME(sendmmsg(fd, m, 4, 0), 4);
	while (got < 4) {
		int n;

		for (int i = got; i < 4; i++) {
			iov[i] = (struct iovec){ in[i], sizeof(in[i]) };
			m[i].msg_hdr = (struct msghdr){ .msg_name = &from[i], .msg_namelen = sizeof(from[i]), .msg_iov = &iov[i], .msg_iovlen = 1 };
		}
		n = recvmmsg(fd, m + got, 4 - got, MSG_WAITFORONE, NULL);
		MUST(n > 0);
		got += n;
	}
	for (int i = 0; i < 4; i++) {
		int which = in[i][0] - 'a';

		SAME(m[i].msg_len, 1);
		MUST(which >= 0 && which < 4);
		SAME(((struct sockaddr_in *)&from[i])->sin_port, ((struct sockaddr_in *)&to[which]->ss)->sin_port);
		SAME(((struct sockaddr_in *)&from[i])->sin_addr.s_addr, ((struct sockaddr_in *)&to[which]->ss)->sin_addr.s_addr);
	}
}

static void a_connected_socket_hears_its_peer_only(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), other = socket(AF_INET, SOCK_DGRAM, 0);
	char c;

	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	SAME(sendto(fd, "2", 1, 0, (void *)&peer2.ss, peer2.len), 1);
	SAME(sendto(other, "3", 1, 0, (void *)&peer2.ss, peer2.len), 1);
	SAME(recv(other, &c, 1, 0), 1);		/* by now peer2 has answered the first, too */
	SAME(send(fd, "1", 1, 0), 1);
	SAME(recv(fd, &c, 1, 0), 1);
	SAME(c, '1');
	ERRNO(recv(fd, &c, 1, MSG_DONTWAIT), EAGAIN);
}

static void connecting_later_keeps_the_port_and_filters(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	struct addr before = { .len = sizeof(before.ss) }, after = { .len = sizeof(after.ss) };
	char c;

	SAME(sendto(fd, "1", 1, 0, (void *)&peer.ss, peer.len), 1);
	SAME(recv(fd, &c, 1, 0), 1);
	ERRNO(getpeername(fd, (void *)&after.ss, &after.len), ENOTCONN);
	ERRNO(send(fd, "x", 1, 0), EDESTADDRREQ);
	MUST(getsockname(fd, (void *)&before.ss, &before.len) == 0);
	MUST(connect(fd, (void *)&peer2.ss, peer2.len) == 0);
	MUST(getsockname(fd, (void *)&after.ss, &after.len) == 0);
	SAME(port_of(&after), port_of(&before));
	after.len = sizeof(after.ss);
	MUST(getpeername(fd, (void *)&after.ss, &after.len) == 0);
	SAME(port_of(&after), port_of(&peer2));
	SAME(sendto(fd, "1", 1, 0, (void *)&peer.ss, peer.len), 1);
	SAME(send(fd, "2", 1, 0), 1);
	SAME(recv(fd, &c, 1, 0), 1);
	SAME(c, '2');
}

static void overflow_drops_and_blocks_nobody(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), other = socket(AF_INET, SOCK_DGRAM, 0), got = 0;
	static char buf[65536];

	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &(int){ 40000 }, sizeof(int)) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(connect(other, (void *)&peer.ss, peer.len) == 0);
	SAME(send(fd, "flood 100 20000", 15, 0), 15);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	for (int i = 0; i < 20; i++) {		/* the peer serves one after the other: the flood is over with the first answer */
		SAME(send(other, "b", 1, 0), 1);
		SAME(recv(other, buf, sizeof(buf), 0), 1);
	}
	while (recv(fd, buf, sizeof(buf), MSG_DONTWAIT) == 20000)
		got++;
	MUST(got > 0 && got < 100);
	SAME(send(fd, "after", 5, 0), 5);
	do {
		got = recv(fd, buf, sizeof(buf), 0);
	} while (got == 20000);
	SAME(got, 5);
}

static int shared;

static void *read_one(void *got)
{
	*(ssize_t *)got = recv(shared, &(char){0}, 1, 0);
	return NULL;
}

/* both know no event for "it waits now"; if the other thread is late they show less, and hold */
static void a_reader_that_waits_before_the_first_sendto_is_answered(void)
{
	pthread_t reader;
	ssize_t got = -1;

	shared = socket(AF_INET, SOCK_DGRAM, 0);
	MUST(pthread_create(&reader, NULL, read_one, &got) == 0);
	poll(NULL, 0, 100);
	SAME(sendto(shared, "q", 1, 0, (void *)&peer.ss, peer.len), 1);
	MUST(pthread_join(reader, NULL) == 0);
	SAME(got, 1);
}

static void shutdown_wakes_a_reader_though_it_is_not_connected(void)
{
	pthread_t reader;
	ssize_t got = -1;
	char c;

	shared = socket(AF_INET, SOCK_DGRAM, 0);
	SAME(sendto(shared, "q", 1, 0, (void *)&peer.ss, peer.len), 1);
	SAME(recv(shared, &c, 1, 0), 1);
	MUST(pthread_create(&reader, NULL, read_one, &got) == 0);
	poll(NULL, 0, 100);
	ERRNO(shutdown(shared, SHUT_RDWR), ENOTCONN);
	MUST(pthread_join(reader, NULL) == 0);
	SAME(got, 0);
}

static void a_priority_is_the_sockets_before_and_after_connecting(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);
	char answer = 0;

	for (int priority = 3; priority < 6; priority++) {
		MUST(setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &priority, sizeof(priority)) == 0);
		MUST(priority > 3 || connect(fd, (void *)&peer.ss, peer.len) == 0);
		SAME(send(fd, "priority", 8, 0), 8);
		SAME(recv(fd, &answer, 1, 0), 1);
		SAME(answer - '0', priority);
	}
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: %s PEER PORT PEER2 PORT2\n", argv[0]);
		return 2;
	}
	peer = address(argv[1], argv[2]);
	peer2 = address(argv[3], argv[4]);
	C(connected_datagrams_keep_their_boundaries);
	C(connected_socket_knows_its_names);
	C(sendto_shows_the_source_it_was_sent_to);
	C(one_socket_talks_to_two_peers);
	C(a_short_buffer_truncates_and_msg_trunc_tells_the_real_length);
	C(zero_length_datagrams_arrive);
	C(large_datagrams_arrive_whole);
	C(recv_without_data_is_eagain);
	C(the_largest_datagram_passes_and_one_byte_more_is_emsgsize);
	C(peek_leaves_the_datagram_where_it_is);
	C(sendmmsg_and_recvmmsg_move_several_with_their_addresses);
	C(a_connected_socket_hears_its_peer_only);
	C(connecting_later_keeps_the_port_and_filters);
	C(overflow_drops_and_blocks_nobody);
	C(a_reader_that_waits_before_the_first_sendto_is_answered);
	C(shutdown_wakes_a_reader_though_it_is_not_connected);
	C(a_priority_is_the_sockets_before_and_after_connecting);
	return finish_checks();
}
