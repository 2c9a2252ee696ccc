// SPDX-License-Identifier: BSD-3-Clause
/*
 * option_check PEER PORT - socket options of a TCP client, set before and after it is connected. PEER PORT is tests/e2e/peer.py.
 */
#include "check.h"
#include <sched.h>

#ifndef SO_COOKIE
#define SO_COOKIE 57
#endif

static struct addr peer;

static void options_are_kept_and_unknown_ones_refused(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0), v = 1;
	socklen_t len = sizeof(v);

	MUST(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &v, sizeof(v)) == 0);	/* before the takeover */
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	v = 0;
	MUST(getsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &v, &len) == 0);
	SAME(v, 1);
	v = 0;
	MUST(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &v, sizeof(v)) == 0);
	v = 1;
	MUST(getsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &v, &len) == 0);
	SAME(v, 0);
	v = 1;
	MUST(setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &v, sizeof(v)) == 0);
	v = 33;
	MUST(setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &v, sizeof(v)) == 0);
	v = 0;
	MUST(getsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &v, &len) == 0);
	SAME(v, 33);
	ERRNO(setsockopt(fd, IPPROTO_TCP, 9999, &v, sizeof(v)), ENOPROTOOPT);
	ERRNO(getsockopt(fd, IPPROTO_TCP, 9999, &v, &len), ENOPROTOOPT);
	MUST(getsockopt(fd, SOL_SOCKET, SO_TYPE, &v, &len) == 0);
	SAME(v, SOCK_STREAM);
	MUST(getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &v, &len) == 0);
	SAME(v, peer.ss.ss_family);
	MUST(getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &v, &len) == 0);
	SAME(v, IPPROTO_TCP);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &v, &len) == 0);
	SAME(v, 0);
}

static void linger_zero_close_does_not_hang(void)
{
	int fd = ask(&peer, "source 100000\n");
	struct linger l = { .l_onoff = 1, .l_linger = 0 };

	recv_exactly(fd, &(char){0}, 1);
	MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof(l)) == 0);
	MUST(close(fd) == 0);
	fd = ask(&peer, "echo\nq");
	recv_exactly(fd, &(char){0}, 1);
}

static void receive_timeout_is_eagain_and_does_not_lose_the_socket(void)
{
	int fd = ask(&peer, "echo\n");
	struct timeval tv = { .tv_usec = 50000 };

	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)) == 0);
	ERRNO(recv(fd, &(char){0}, 1, 0), EAGAIN);
	tv = (struct timeval){ .tv_sec = CHECK_SECONDS };
	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)) == 0);
	send_all(fd, "y", 1);
	recv_exactly(fd, &(char){0}, 1);
}

static int get(int fd, int level, int name)
{
	int v = -1;
	socklen_t len = sizeof(v);

	if (getsockopt(fd, level, name, &v, &len))
		fail("getsockopt(%d, %d): %s", level, name, strerror(errno));
	SAME(len, sizeof(v));
	return v;
}

static void set(int fd, int level, int name, int v)
{
	if (setsockopt(fd, level, name, &v, sizeof(v)))
		fail("setsockopt(%d, %d, %d): %s", level, name, v, strerror(errno));
}

static void what_is_set_is_what_is_read_before_and_after_connecting(void)
{
	static const struct { int level, name, before, after; } options[] = {
		{ IPPROTO_TCP, TCP_NODELAY, 1, 0 }, { IPPROTO_TCP, TCP_KEEPIDLE, 100, 101 }, { IPPROTO_TCP, TCP_KEEPINTVL, 20, 21 },
		{ IPPROTO_TCP, TCP_KEEPCNT, 4, 5 }, { IPPROTO_TCP, TCP_USER_TIMEOUT, 30000, 31000 }, { IPPROTO_TCP, TCP_SYNCNT, 3, 4 },
		{ SOL_SOCKET, SO_KEEPALIVE, 1, 0 }, { SOL_SOCKET, SO_OOBINLINE, 1, 0 },
		{ SOL_SOCKET, SO_RCVLOWAT, 1, 7 }, { IPPROTO_IP, IP_TOS, 0x10, 0x08 }, { IPPROTO_IP, IP_TTL, 60, 61 },
	};
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);

	for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++)
		set(fd, options[i].level, options[i].name, options[i].before);
	if (peer.ss.ss_family == AF_INET6)
		set(fd, IPPROTO_IPV6, IPV6_TCLASS, 0x20);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++) {
		SAME(get(fd, options[i].level, options[i].name), options[i].before);
		set(fd, options[i].level, options[i].name, options[i].after);
		SAME(get(fd, options[i].level, options[i].name), options[i].after);
	}
	if (peer.ss.ss_family == AF_INET6) {
		SAME(get(fd, IPPROTO_IPV6, IPV6_TCLASS), 0x20);
		set(fd, IPPROTO_IPV6, IPV6_TCLASS, 0x30);
		SAME(get(fd, IPPROTO_IPV6, IPV6_TCLASS), 0x30);
	}
	set(fd, SOL_SOCKET, SO_RCVLOWAT, 1);
	send_all(fd, "echo\no", 6);
	recv_exactly(fd, &(char){0}, 1);
}

static void wrong_values_are_refused_as_natively(void)
{
	int fd = open_connected(&peer), v = 0;
	struct timeval tv = { .tv_usec = 2000000 };

	ERRNO(setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &v, sizeof(v)), EINVAL);
	v = -1;
	ERRNO(setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &v, sizeof(v)), EINVAL);
	v = 1000;
	ERRNO(setsockopt(fd, IPPROTO_IP, IP_TTL, &v, sizeof(v)), EINVAL);
	ERRNO(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &v, 1), EINVAL);
	ERRNO(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, (void *)8, sizeof(v)), EFAULT);
	ERRNO(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)), EDOM);
	ERRNO(setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "nonsense", 8), ENOENT);
	ERRNO(setsockopt(fd, SOL_SOCKET, 9999, &v, sizeof(v)), ENOPROTOOPT);
	ERRNO(getsockopt(fd, SOL_SOCKET, 9999, &v, &(socklen_t){ sizeof(v) }), ENOPROTOOPT);
	ERRNO(setsockopt(fd, 12345, 1, &v, sizeof(v)), ENOPROTOOPT);
	ERRNO(getsockopt(fd, 12345, 1, &v, &(socklen_t){ sizeof(v) }), peer.ss.ss_family == AF_INET ? EOPNOTSUPP : ENOPROTOOPT);
}

static void tcp_info_tells_of_the_connection(void)
{
	int fd = ask(&peer, "source 10\n");
	struct tcp_info info = { 0 };
	socklen_t len = sizeof(info);
	char buf[10];

	MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0);
	MUST(len > 100);
	MUST(info.tcpi_state == TCP_ESTABLISHED || info.tcpi_state == TCP_CLOSE_WAIT);
	MUST(info.tcpi_snd_mss > 500);
	MUST(info.tcpi_rtt > 0);
	recv_exactly(fd, buf, 10);
	SAME(recv(fd, buf, 1, 0), 0);
	MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0);
	SAME(info.tcpi_state, TCP_CLOSE_WAIT);
	len = 1;			/* a program built for an older kernel has a shorter one */
	info.tcpi_state = info.tcpi_ca_state = 77;
	MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0);
	SAME(len, 1);
	SAME(info.tcpi_state, TCP_CLOSE_WAIT);
	SAME(info.tcpi_ca_state, 77);
	len = -1;
	ERRNO(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len), EINVAL);
}

static void congestion_control_is_by_name(void)
{
	int fd = open_connected(&peer);
	char name[16] = "";
	socklen_t len = sizeof(name);

	MUST(setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4) == 0);
	MUST(getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &len) == 0);
	if (strcmp(name, "reno"))
		fail("congestion control is \"%s\"", name);
}

static void a_cookie_is_the_sockets_for_life(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0), other = open_connected(&peer);
	uint64_t before = 0, after = 0, another = 0;
	socklen_t len = sizeof(before);

	MUST(getsockopt(fd, SOL_SOCKET, SO_COOKIE, &before, &len) == 0 && before);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(getsockopt(fd, SOL_SOCKET, SO_COOKIE, &after, &len) == 0);
	MUST(getsockopt(other, SOL_SOCKET, SO_COOKIE, &another, &len) == 0);
	MUST(after == before && another != before);
}

/* until so many bytes wait: what the peer sends has no event of its own while poll() may not tell */
static void await_queued(int fd, int want)
{
	int n = 0;

	while (ioctl(fd, FIONREAD, &n) == 0 && n < want)
		sched_yield();
	SAME(n, want);
}

static void rcvlowat_holds_back_poll_and_recv(void)
{
	int fd = ask(&peer, "echo\n");
	struct pollfd p = { .fd = fd, .events = POLLIN };
	char buf[10];

	set(fd, SOL_SOCKET, SO_RCVLOWAT, 5);
	send_all(fd, "abc", 3);
	await_queued(fd, 3);
	SAME(poll(&p, 1, 0), 0);
	SAME(recv(fd, buf, sizeof(buf), MSG_DONTWAIT), 3);	/* who does not wait gets what there is */
	send_all(fd, "def", 3);
	await_queued(fd, 3);
	SAME(poll(&p, 1, 0), 0);
	send_all(fd, "gh", 2);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	SAME(recv(fd, buf, sizeof(buf), 0), 5);
	send_all(fd, "ijkl", 4);
	await_queued(fd, 4);
	set(fd, SOL_SOCKET, SO_RCVLOWAT, 4);
	SAME(recv(fd, buf, sizeof(buf), 0), 4);
	send_all(fd, "mn", 2);
	await_queued(fd, 2);
	SAME(recv(fd, buf, 1, 0), 1);				/* never more than was asked for */
}

/* the peer says so when it sees that timer at the other end of its connection */
static void keepalive_that_is_set_after_connecting_is_kept(void)
{
	int fd = open_connected(&peer);
	char answer[3];

	set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	send_all(fd, "keepalive\n", 10);
	recv_exactly(fd, answer, sizeof(answer));
	MUST(memcmp(answer, "ok\n", 3) == 0);
}

/* the peer says so when it sees that priority at the other end of its connection */
static void await_priority(int fd, int priority)
{
	char line[32], answer[3];

	send_all(fd, line, snprintf(line, sizeof(line), "priority %d\n", priority));
	recv_exactly(fd, answer, sizeof(answer));
	MUST(memcmp(answer, "ok\n", 3) == 0);
}

static void a_priority_is_the_connections_before_and_after_connecting(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);

	set(fd, SOL_SOCKET, SO_PRIORITY, 4);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	await_priority(fd, 4);
	fd = open_connected(&peer);
	set(fd, SOL_SOCKET, SO_PRIORITY, 5);
	await_priority(fd, 5);
	SAME(get(fd, SOL_SOCKET, SO_PRIORITY), 5);
}

/* a peer that does not read has a buffer, too: what it and the smaller one hold is far less than this socket would have taken */
static void a_send_buffer_that_is_made_smaller_after_connecting_holds_less(void)
{
	static char buf[1 << 20];
	int fd = ask(&peer, "hold\n");
	ssize_t n;

	set(fd, SOL_SOCKET, SO_SNDBUF, 4096);
	n = send(fd, buf, sizeof(buf), MSG_DONTWAIT);
	if (n <= 0 || n > 200000)
		fail("%zd bytes were taken", n);
}

static void a_receive_buffer_that_is_made_smaller_after_connecting_holds_less(void)
{
	int fd = open_connected(&peer), n = 0;
	struct tcp_info info;

	set(fd, SOL_SOCKET, SO_RCVBUF, 8192);
	send_all(fd, "source 2097152\n", 15);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	for (int i = 0; i < 100; i++) {			/* rounds in which more would come */
		MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &(socklen_t){ sizeof(info) }) == 0);
		MUST(ioctl(fd, FIONREAD, &n) == 0);
		if (n > 200000)
			fail("%d bytes wait", n);
		sched_yield();
	}
}

static uint64_t max_pacing_rate(int fd)
{
	struct {
		struct tcp_info info;		/* as glibc has it: up to tcpi_total_retrans */
		uint64_t pacing_rate, max_pacing_rate;
	} __attribute__((packed)) told;
	socklen_t len = sizeof(told);

	_Static_assert(sizeof(told.info) == 104, "linux/tcp.h has tcpi_pacing_rate there");
	MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &told, &len) == 0);
	SAME(len, sizeof(told));
	return told.max_pacing_rate;
}

static void a_pacing_rate_is_the_connections_before_and_after_connecting(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);
	uint64_t large = 12345678901;

	set(fd, SOL_SOCKET, SO_MAX_PACING_RATE, 123456789);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	SAME(max_pacing_rate(fd), 123456789);
	set(fd, SOL_SOCKET, SO_MAX_PACING_RATE, 234567890);
	SAME(max_pacing_rate(fd), 234567890);
	MUST(setsockopt(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &large, sizeof(large)) == 0);
	SAME(max_pacing_rate(fd), large);
	set(fd, SOL_SOCKET, SO_MAX_PACING_RATE, -1);
	MUST(max_pacing_rate(fd) == ~0ull);
}

static void peek_off_moves_with_what_is_seen_and_read(void)
{
	int fd = ask(&peer, "echo\n"), fresh = socket(peer.ss.ss_family, SOCK_STREAM, 0), v = 2;
	char buf[10];

	if (setsockopt(fresh, SOL_SOCKET, SO_PEEK_OFF, &v, sizeof(v))) {
		SAME(errno, EOPNOTSUPP);			/* TCP before 6.9 */
		ERRNO(setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &v, sizeof(v)), EOPNOTSUPP);
		return;
	}
	set(fd, SOL_SOCKET, SO_PEEK_OFF, 2);
	send_all(fd, "abcdefgh", 8);
	await_queued(fd, 8);
	SAME(recv(fd, buf, 3, MSG_PEEK), 3);
	MUST(memcmp(buf, "cde", 3) == 0);
	SAME(get(fd, SOL_SOCKET, SO_PEEK_OFF), 5);
	SAME(recv(fd, buf, 1, MSG_PEEK), 1);
	SAME(buf[0], 'f');
	SAME(recv(fd, buf, 2, 0), 2);				/* reading takes from the front, and the offset with it */
	MUST(memcmp(buf, "ab", 2) == 0);
	SAME(get(fd, SOL_SOCKET, SO_PEEK_OFF), 4);
	SAME(recv(fd, buf, 9, MSG_PEEK), 2);
	MUST(memcmp(buf, "gh", 2) == 0);
	ERRNO(recv(fd, buf, 1, MSG_PEEK | MSG_DONTWAIT), EAGAIN);
	set(fd, SOL_SOCKET, SO_PEEK_OFF, -1);
	SAME(recv(fd, buf, 9, MSG_PEEK), 6);
}

int main(int argc, char **argv)
{
	peer = only_peer(argc, argv);
	C(options_are_kept_and_unknown_ones_refused);
	C(what_is_set_is_what_is_read_before_and_after_connecting);
	C(wrong_values_are_refused_as_natively);
	C(tcp_info_tells_of_the_connection);
	C(congestion_control_is_by_name);
	C(a_cookie_is_the_sockets_for_life);
	C(receive_timeout_is_eagain_and_does_not_lose_the_socket);
	C(rcvlowat_holds_back_poll_and_recv);
	C(keepalive_that_is_set_after_connecting_is_kept);
	C(a_priority_is_the_connections_before_and_after_connecting);
	C(a_pacing_rate_is_the_connections_before_and_after_connecting);
	C(a_send_buffer_that_is_made_smaller_after_connecting_holds_less);
	C(a_receive_buffer_that_is_made_smaller_after_connecting_holds_less);
	C(peek_off_moves_with_what_is_seen_and_read);
	C(linger_zero_close_does_not_hang);
	return finish_checks();
}
