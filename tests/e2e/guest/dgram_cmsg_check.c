// SPDX-License-Identifier: BSD-3-Clause
/*
 * dgram_cmsg_check PEER PORT - what a UDP client may say and hear about single datagrams. PEER is tests/e2e/peer.py.
 */
#include "check.h"
#include <linux/net_tstamp.h>
#include <net/if.h>
#include <netinet/udp.h>
#include <time.h>

static struct addr peer;
static bool six;
static int level;

static int opened(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);

	MUST(fd >= 0);
	return fd;
}

static void on(int fd, int lev, int name)
{
	MUST(setsockopt(fd, lev, name, &(int){ 1 }, sizeof(int)) == 0);
}

/* control messages under construction, or received */
struct control {
	_Alignas(struct cmsghdr) char buf[512];
	size_t len;
};

static void put(struct control *c, int lev, int type, const void *data, size_t len)
{
	struct cmsghdr *h = (struct cmsghdr *)(c->buf + c->len);

	*h = (struct cmsghdr){ .cmsg_level = lev, .cmsg_type = type, .cmsg_len = CMSG_LEN(len) };
	memcpy(CMSG_DATA(h), data, len);
	c->len += CMSG_SPACE(len);
}

static ssize_t send_with(int fd, const void *data, size_t len, struct control *c)
{
	struct iovec iov = { (void *)data, len };
	struct msghdr m = {
		.msg_name = &peer.ss, .msg_namelen = peer.len, .msg_iov = &iov, .msg_iovlen = 1, .msg_control = c->len ? c->buf : NULL,
		.msg_controllen = c->len,
	};

	return sendmsg(fd, &m, 0);
}

static ssize_t recv_with(int fd, void *buf, size_t size, struct control *c)
{
	struct iovec iov = { buf, size };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = c->buf, .msg_controllen = sizeof(c->buf) };
	ssize_t n = recvmsg(fd, &m, 0);

	MUST(n >= 0);
	c->len = m.msg_controllen;
	return n;
}

/* the data of the one control message of this kind, NULL: there is none */
static const void *find(struct control *c, int lev, int type, size_t len)
{
	struct msghdr m = { .msg_control = c->buf, .msg_controllen = c->len };

	for (struct cmsghdr *h = CMSG_FIRSTHDR(&m); h; h = CMSG_NXTHDR(&m, h))
		if (h->cmsg_level == lev && h->cmsg_type == type && h->cmsg_len >= CMSG_LEN(len))
			return CMSG_DATA(h);
	return NULL;
}

static void nothing_is_told_unasked(void)
{
	struct control c = { .len = 0 };
	int fd = opened();
	char buf[16];

	SAME(send_with(fd, "hello", 5, &c), 5);
	SAME(recv_with(fd, buf, sizeof(buf), &c), 5);
	SAME(c.len, 0);
}

static void ttl_and_tos_of_what_comes_are_told(void)
{
	struct control c = { .len = 0 };
	int fd = opened();
	const void *found;
	char buf[16];

	on(fd, level, six ? IPV6_RECVHOPLIMIT : IP_RECVTTL);
	SAME(send_with(fd, "set 9 16", 8, &c), 8);
	SAME(recv_with(fd, buf, sizeof(buf), &c), 8);
	found = find(&c, level, six ? IPV6_HOPLIMIT : IP_TTL, sizeof(int));
	MUST(found && *(const int *)found == 9);
	MUST(!find(&c, level, six ? IPV6_TCLASS : IP_TOS, 1));
	on(fd, level, six ? IPV6_RECVTCLASS : IP_RECVTOS);	/* after the first datagram */
	c.len = 0;
	SAME(send_with(fd, "set 8 40", 8, &c), 8);
	SAME(recv_with(fd, buf, sizeof(buf), &c), 8);
	found = find(&c, level, six ? IPV6_TCLASS : IP_TOS, six ? sizeof(int) : 1);
	MUST(found && *(const uint8_t *)found == 40);
	found = find(&c, level, six ? IPV6_HOPLIMIT : IP_TTL, sizeof(int));
	MUST(found && *(const int *)found == 8);
}

static void ttl_and_tos_of_one_datagram_can_be_chosen(void)
{
	struct control c = { .len = 0 }, none = { .len = 0 };
	int fd = opened();
	char buf[16] = "", usual[16] = "";

	SAME(send_with(fd, "how", 3, &none), 3);
	MUST(recv(fd, usual, sizeof(usual) - 1, 0) > 0);
	put(&c, level, six ? IPV6_HOPLIMIT : IP_TTL, &(int){ 7 }, sizeof(int));
	put(&c, level, six ? IPV6_TCLASS : IP_TOS, &(int){ 40 }, sizeof(int));
	SAME(send_with(fd, "how", 3, &c), 3);
	SAME(recv(fd, buf, sizeof(buf), 0), 4);
	MUST(memcmp(buf, "7 40", 4) == 0);
	SAME(send_with(fd, "how", 3, &none), 3);
	SAME(recv(fd, buf, sizeof(buf), 0), (long)strlen(usual));
	MUST(memcmp(buf, usual, strlen(usual)) == 0);
}

static void ttl_and_tos_of_the_socket_can_be_set_before_and_after(void)
{
	int fd = opened();
	char buf[16];

	MUST(setsockopt(fd, level, six ? IPV6_TCLASS : IP_TOS, &(int){ 16 }, sizeof(int)) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(setsockopt(fd, level, six ? IPV6_UNICAST_HOPS : IP_TTL, &(int){ 33 }, sizeof(int)) == 0);
	SAME(send(fd, "how", 3, 0), 3);
	SAME(recv(fd, buf, sizeof(buf), 0), 5);
	MUST(memcmp(buf, "33 16", 5) == 0);
}

static void pktinfo_names_an_interface_and_an_address_to_answer_from(void)
{
	struct control c = { .len = 0 }, back = { .len = 0 };
	int fd = opened();
	char buf[16], name[IF_NAMESIZE];
	struct in6_pktinfo info6;
	struct in_pktinfo info;
	const void *found;

	on(fd, level, six ? IPV6_RECVPKTINFO : IP_PKTINFO);
	SAME(send_with(fd, "hello", 5, &c), 5);
	SAME(recv_with(fd, buf, sizeof(buf), &c), 5);
	found = find(&c, level, six ? IPV6_PKTINFO : IP_PKTINFO, six ? sizeof(info6) : sizeof(info));
	MUST(found);
	if (six) {
		memcpy(&info6, found, sizeof(info6));
		MUST(if_indextoname(info6.ipi6_ifindex, name));
		MUST(!IN6_IS_ADDR_UNSPECIFIED(&info6.ipi6_addr));
		put(&back, level, IPV6_PKTINFO, &info6, sizeof(info6));
	} else {
		memcpy(&info, found, sizeof(info));
		MUST(if_indextoname(info.ipi_ifindex, name));
		MUST(info.ipi_addr.s_addr);
		SAME(info.ipi_spec_dst.s_addr, info.ipi_addr.s_addr);
		put(&back, level, IP_PKTINFO, &info, sizeof(info));
	}
	SAME(send_with(fd, "again", 5, &back), 5);
	SAME(recv_with(fd, buf, sizeof(buf), &c), 5);
}

static void an_address_that_nobody_has_cannot_be_sent_from(void)
{
	struct in6_pktinfo info6 = { .ipi6_ifindex = 0 };
	struct in_pktinfo info = { .ipi_ifindex = 0 };
	struct control c = { .len = 0 }, none = { .len = 0 };
	int fd = opened();
	char buf[16];

	SAME(send_with(fd, "hello", 5, &none), 5);
	SAME(recv(fd, buf, sizeof(buf), 0), 5);
	if (six) {
		MUST(inet_pton(AF_INET6, "2001:db8::77", &info6.ipi6_addr) == 1);
		put(&c, level, IPV6_PKTINFO, &info6, sizeof(info6));
	} else {
		MUST(inet_pton(AF_INET, "203.0.113.77", &info.ipi_spec_dst) == 1);
		put(&c, level, IP_PKTINFO, &info, sizeof(info));
	}
	SAME(send_with(fd, "x", 1, &c), -1);
	MUST(errno == EINVAL || errno == ENETUNREACH);	/* as the route to the peer is */
}

static void nonsense_is_einval(void)
{
	static const struct { int type, value; } bad[] = { { IP_TTL, 0 }, { IP_TTL, 256 }, { IP_TOS, 256 }, { 200, 1 } };
	static const struct { int type, value; } bad6[] = { { IPV6_HOPLIMIT, 256 }, { IPV6_TCLASS, 256 }, { 200, 1 } };
	struct control none = { .len = 0 }, segment = { .len = 0 };
	static char buf[65536];
	int fd = opened();

	SAME(send_with(fd, "hello", 5, &none), 5);
	SAME(recv(fd, buf, sizeof(buf), 0), 5);
	for (size_t i = 0; i < (six ? sizeof(bad6) : sizeof(bad)) / sizeof(*bad); i++) {
		struct control c = { .len = 0 };

		put(&c, level, six ? bad6[i].type : bad[i].type, six ? &bad6[i].value : &bad[i].value, sizeof(int));
		ERRNO(send_with(fd, "x", 1, &c), EINVAL);
	}
	put(&segment, SOL_UDP, UDP_SEGMENT, &(uint16_t){ 10 }, sizeof(uint16_t));
	ERRNO(send_with(fd, buf, 10 * 300, &segment), EINVAL);	/* more than 128 parts */
}

static void the_time_of_arrival_is_told(void)
{
	struct control c = { .len = 0 };
	struct timespec before, after, at;
	int fd = opened();
	const void *found;
	char buf[16];

	MUST(setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &(int){ 1 }, sizeof(int)) == 0);
	MUST(clock_gettime(CLOCK_REALTIME, &before) == 0);
	SAME(send_with(fd, "hello", 5, &c), 5);
	SAME(recv_with(fd, buf, sizeof(buf), &c), 5);
	MUST(clock_gettime(CLOCK_REALTIME, &after) == 0);
	found = find(&c, SOL_SOCKET, SO_TIMESTAMPNS, sizeof(at));
	MUST(found);
	memcpy(&at, found, sizeof(at));
	MUST(at.tv_sec > before.tv_sec || (at.tv_sec == before.tv_sec && at.tv_nsec >= before.tv_nsec));
	MUST(at.tv_sec < after.tv_sec || (at.tv_sec == after.tv_sec && at.tv_nsec <= after.tv_nsec));
	MUST(setsockopt(fd, SOL_SOCKET, SO_TIMESTAMP, &(int){ 1 }, sizeof(int)) == 0);
	c.len = 0;
	SAME(send_with(fd, "hello", 5, &c), 5);
	SAME(recv_with(fd, buf, sizeof(buf), &c), 5);
	MUST(find(&c, SOL_SOCKET, SO_TIMESTAMP, sizeof(struct timeval)));
	MUST(setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPING, &(int){ SOF_TIMESTAMPING_RX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE }, sizeof(int)) == 0);
	c.len = 0;
	SAME(send_with(fd, "hello", 5, &c), 5);
	SAME(recv_with(fd, buf, sizeof(buf), &c), 5);
	MUST(find(&c, SOL_SOCKET, SO_TIMESTAMPING, 3 * sizeof(struct timespec)));
}

static void one_call_sends_several_datagrams(void)
{
	struct control c = { .len = 0 };
	static char out[2500], in[65536];
	int fd = opened();

	for (size_t i = 0; i < sizeof(out); i++)
		out[i] = pattern(i);
	put(&c, SOL_UDP, UDP_SEGMENT, &(uint16_t){ 1000 }, sizeof(uint16_t));
	SAME(send_with(fd, out, sizeof(out), &c), 2500);
	for (int i = 0; i < 3; i++) {
		SAME(recv(fd, in, sizeof(in), 0), i < 2 ? 1000 : 500);
		MUST(memcmp(in, out + 1000 * i, i < 2 ? 1000 : 500) == 0);
	}
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(setsockopt(fd, SOL_UDP, UDP_SEGMENT, &(int){ 2000 }, sizeof(int)) == 0);
	SAME(send(fd, out, sizeof(out), 0), 2500);
	SAME(recv(fd, in, sizeof(in), 0), 2000);
	SAME(recv(fd, in, sizeof(in), 0), 500);
}

static void joined_datagrams_tell_the_size_of_their_parts(void)
{
	struct control c = { .len = 0 };
	static uint8_t in[65536];
	size_t got = 0;
	int fd = opened();

	MUST(setsockopt(fd, SOL_UDP, UDP_GRO, &(int){ 1 }, sizeof(int)) == 0);
	SAME(send_with(fd, "split 5 1000", 12, &c), 12);
	while (got < 5000) {
		ssize_t n = recv_with(fd, in, sizeof(in), &c);
		const int *size = find(&c, SOL_UDP, UDP_GRO, sizeof(int));

		for (ssize_t i = 0; i < n; i++)
			SAME(in[i], pattern(got + i));
		got += n;
		if (n != 1000 && (!size || *size != 1000))
			fail("%zd bytes, parts of %d", n, size ? *size : -1);
	}
	SAME(got, 5000);
}

int main(int argc, char **argv)
{
	peer = only_peer(argc, argv);
	six = peer.ss.ss_family == AF_INET6;
	level = six ? SOL_IPV6 : SOL_IP;
	C(nothing_is_told_unasked);
	C(ttl_and_tos_of_what_comes_are_told);
	C(ttl_and_tos_of_one_datagram_can_be_chosen);
	C(ttl_and_tos_of_the_socket_can_be_set_before_and_after);
	C(pktinfo_names_an_interface_and_an_address_to_answer_from);
	C(an_address_that_nobody_has_cannot_be_sent_from);
	C(nonsense_is_einval);
	C(the_time_of_arrival_is_told);
	C(one_call_sends_several_datagrams);
	C(joined_datagrams_tell_the_size_of_their_parts);
	return finish_checks();
}
