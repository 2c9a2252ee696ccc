// SPDX-License-Identifier: BSD-3-Clause
/*
 * stream_check PEER PORT CLOSED_PORT [DENIED_HOST DENIED_PORT DENIED_ERRNO] - what a TCP client may rely on.
 *
 * PEER PORT is tests/e2e/peer.py, CLOSED_PORT a port of the same host where nobody listens. DENIED_*: an address and the errno that
 * connect() must give for it.
 */
#include "check.h"
#include <pthread.h>

static struct addr peer, closed_peer, denied;
static int denied_errno;

static void blocking_connect_talks_and_knows_its_names(void)
{
	int fd = ask(&peer, "echo\n");
	struct addr a = { .len = sizeof(a.ss) };
	char buf[6];

	MUST(getpeername(fd, (void *)&a.ss, &a.len) == 0);
	SAME(a.len, peer.len);
	MUST(memcmp(&a.ss, &peer.ss, 8) == 0);		/* family, port, and all of an IPv4 address */
	a.len = sizeof(a.ss);
	MUST(getsockname(fd, (void *)&a.ss, &a.len) == 0);
	SAME(a.ss.ss_family, peer.ss.ss_family);
	MUST(port_of(&a) != 0);
	send_all(fd, "hello", 5);
	recv_exactly(fd, buf, 5);
	MUST(memcmp(buf, "hello", 5) == 0);
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), EISCONN);
}

static void getpeername_truncates_to_the_room_given_and_tells_the_real_length(void)
{
	int fd = open_connected(&peer);
	char small[4];
	socklen_t len = sizeof(small);

	MUST(getpeername(fd, (void *)small, &len) == 0);
	SAME(len, peer.len);
	MUST(memcmp(small, &peer.ss, sizeof(small)) == 0);
}

static void nonblocking_connect_reports_through_epoll_registered_before(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0), ep = epoll_create1(0), err = -1;
	struct epoll_event ev = { .events = EPOLLIN | EPOLLOUT | EPOLLET, .data.u32 = 7 }, out;
	socklen_t len = sizeof(err);
	int r;

	MUST(fd >= 0 && ep >= 0);
	MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev) == 0);
	r = connect(fd, (void *)&peer.ss, peer.len);
	MUST(r == 0 || errno == EINPROGRESS);
	for (;;) {
		SAME(epoll_wait(ep, &out, 1, CHECK_SECONDS * 1000), 1);
		SAME(out.data.u32, 7);
		if ((out.events & EPOLLOUT) && !(out.events & EPOLLHUP))	/* an unconnected TCP socket shows OUT|HUP */
			break;
	}
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) == 0);
	SAME(err, 0);
	r = connect(fd, (void *)&peer.ss, peer.len);
	MUST(r == 0 || errno == EISCONN);
	send_all(fd, "echo\nx", 6);
	do
		SAME(epoll_wait(ep, &out, 1, CHECK_SECONDS * 1000), 1);
	while (!(out.events & EPOLLIN));
	recv_exactly(fd, &(char){0}, 1);
	ERRNO(recv(fd, &(char){0}, 1, 0), EAGAIN);
}

static void refused_connect_says_so(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);

	ERRNO(connect(fd, (void *)&closed_peer.ss, closed_peer.len), ECONNREFUSED);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);	/* Linux lets a socket try again */
	send_all(fd, "echo\nx", 6);
	recv_exactly(fd, &(char){0}, 1);
}

static void refused_nonblocking_connect_sets_so_error_once(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0), err = -1;
	socklen_t len = sizeof(err);
	int r = connect(fd, (void *)&closed_peer.ss, closed_peer.len);

	if (r == -1 && errno == ECONNREFUSED)
		return;			/* a local stack may know at once */
	MUST(r == -1 && errno == EINPROGRESS);
	MUST(wait_for(fd, POLLOUT) & (POLLERR | POLLHUP));
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) == 0);
	SAME(err, ECONNREFUSED);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) == 0);
	SAME(err, 0);
}

static void denied_address_gives_the_policys_errno(void)
{
	int fd = socket(denied.ss.ss_family, SOCK_STREAM, 0);

	ERRNO(connect(fd, (void *)&denied.ss, denied.len), denied_errno);
}

static uint32_t crc32_step(uint32_t crc, uint8_t byte)
{
	crc ^= byte;
	for (int k = 0; k < 8; k++)
		crc = crc & 1 ? (crc >> 1) ^ 0xedb88320u : crc >> 1;
	return crc;
}

static void half_close_lets_the_answer_come(void)
{
	enum { N = 300000 };
	uint8_t *data = malloc(N);
	uint32_t crc = ~0u;
	char answer[64] = "", want[64];
	int fd = ask(&peer, "sink\n");
	size_t got = 0;
	ssize_t n;

	for (int i = 0; i < N; i++) {
		data[i] = pattern(i);
		crc = crc32_step(crc, data[i]);
	}
	send_all(fd, data, N);
	MUST(shutdown(fd, SHUT_WR) == 0);
	while ((n = recv(fd, answer + got, sizeof(answer) - 1 - got, 0)) > 0)
		got += n;
	SAME(n, 0);
	snprintf(want, sizeof(want), "%d %08x\n", N, ~crc);
	if (strcmp(answer, want))
		fail("the peer got \"%s\", not \"%s\"", answer, want);
}

static void peer_half_close_is_eof_after_all_data_and_sending_still_works(void)
{
	enum { N = 500000 };
	uint8_t *buf = malloc(N);
	int fd = ask(&peer, "source 500000\n");

	recv_exactly(fd, buf, N);
	for (int i = 0; i < N; i++)
		if (buf[i] != pattern(i))
			fail("byte %d is %02x, not %02x", i, buf[i], pattern(i));
	SAME(recv(fd, buf, 1, 0), 0);
	MUST(wait_for(fd, POLLIN | POLLRDHUP) & POLLRDHUP);
	MUST(!(wait_for(fd, POLLOUT) & POLLHUP));
	SAME(send(fd, "more", 4, MSG_NOSIGNAL), 4);
	MUST(shutdown(fd, SHUT_WR) == 0);
	MUST(wait_for(fd, POLLIN | POLLHUP) & POLLHUP);
}

static void data_before_a_reset_is_delivered_then_econnreset(void)
{
	uint8_t buf[1000];
	int fd = ask(&peer, "reset 1000\n"), err = -1;
	socklen_t len = sizeof(err);
	short ev;

	recv_exactly(fd, buf, sizeof(buf));
	send_all(fd, "!", 1);
	while (!((ev = wait_for(fd, POLLIN)) & (POLLERR | POLLHUP)))
		;
	MUST(ev & POLLERR);
	MUST(ev & POLLHUP);
	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) == 0)
		SAME(err, ECONNRESET);
	SAME(recv(fd, buf, 1, 0), 0);		/* the error was read: EOF from here, as natively */
	ERRNO(send(fd, "x", 1, MSG_NOSIGNAL), EPIPE);
}

static void recv_after_a_reset_gives_econnreset(void)
{
	uint8_t buf[10];
	int fd = ask(&peer, "reset 10\n");

	recv_exactly(fd, buf, sizeof(buf));
	send_all(fd, "!", 1);
	ERRNO(recv(fd, buf, 1, 0), ECONNRESET);
}

static volatile sig_atomic_t got_sigpipe;
static void on_sigpipe(int sig)
{
	got_sigpipe = sig;
}

static void sending_after_shutdown_is_epipe_and_sigpipe(void)
{
	int fd = ask(&peer, "echo\n");

	signal(SIGPIPE, on_sigpipe);
	MUST(shutdown(fd, SHUT_WR) == 0);
	ERRNO(send(fd, "x", 1, MSG_NOSIGNAL), EPIPE);
	MUST(!got_sigpipe);
	ERRNO(write(fd, "x", 1), EPIPE);
	SAME(got_sigpipe, SIGPIPE);
}

static void recv_flags_peek_dontwait_waitall_trunc(void)
{
	int fd = ask(&peer, "echo\n");
	char buf[16];

	ERRNO(recv(fd, buf, 1, MSG_DONTWAIT), EAGAIN);
	send_all(fd, "abcdefgh", 8);
	SAME(recv(fd, buf, 8, MSG_WAITALL | MSG_PEEK), 8);
	MUST(memcmp(buf, "abcdefgh", 8) == 0);
	SAME(recv(fd, buf, 2, MSG_PEEK), 2);
	SAME(recv(fd, buf, 3, 0), 3);
	MUST(memcmp(buf, "abc", 3) == 0);
	SAME(recv(fd, NULL, 2, MSG_TRUNC), 2);		/* tcp(7): discards */
	send_all(fd, "ij", 2);
	SAME(recv(fd, buf, 5, MSG_WAITALL), 5);
	MUST(memcmp(buf, "fghij", 5) == 0);
	ERRNO(recv(fd, buf, 0, MSG_DONTWAIT), EAGAIN);	/* asking for nothing still waits for something */
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

static void fionread_counts_what_waits(void)
{
	int fd = ask(&peer, "echo\n"), n = -1;
	char buf[100];

	MUST(ioctl(fd, FIONREAD, &n) == 0);
	SAME(n, 0);
	send_all(fd, "0123456789", 10);
	SAME(recv(fd, buf, 10, MSG_PEEK | MSG_WAITALL), 10);
	MUST(ioctl(fd, FIONREAD, &n) == 0);
	SAME(n, 10);
}

static void a_forked_child_closing_its_copy_changes_nothing(void)
{
	int fd = ask(&peer, "echo\n");
	pid_t pid = fork();

	if (pid == 0) {
		close(fd);
		_exit(0);
	}
	MUST(waitpid(pid, NULL, 0) == pid);
	send_all(fd, "z", 1);
	recv_exactly(fd, &(char){0}, 1);
}

static void close_with_a_dup_left_keeps_the_connection(void)
{
	int fd = ask(&peer, "echo\n"), fd2 = dup(fd);

	MUST(close(fd) == 0);
	send_all(fd2, "z", 1);
	recv_exactly(fd2, &(char){0}, 1);
}

static void sendfile_sends_a_file(void)
{
	int fd = ask(&peer, "echo\n"), file = open("/proc/self/exe", O_RDONLY);
	char a[4096], b[4096];
	off_t off = 0;

	MUST(file >= 0);
	SAME(sendfile(fd, file, &off, sizeof(a)), sizeof(a));
	SAME(off, sizeof(a));
	recv_exactly(fd, a, sizeof(a));
	SAME(pread(file, b, sizeof(b), 0), sizeof(b));
	MUST(memcmp(a, b, sizeof(a)) == 0);
}

static void splice_moves_bytes_both_ways(void)
{
	int fd = ask(&peer, "echo\n"), p[2];
	char buf[100];

	MUST(pipe(p) == 0);
	SAME(write(p[1], "through a pipe", 14), 14);
	SAME(splice(p[0], NULL, fd, NULL, 14, 0), 14);
	SAME(recv(fd, buf, 14, MSG_PEEK | MSG_WAITALL), 14);
	SAME(splice(fd, NULL, p[1], NULL, 14, 0), 14);
	SAME(read(p[0], buf, sizeof(buf)), 14);
	MUST(memcmp(buf, "through a pipe", 14) == 0);
}

static void scatter_and_gather_keep_the_order(void)
{
	int fd = ask(&peer, "echo\n");
	char a[3], b[4];
	struct iovec out[] = { { "ab", 2 }, { "", 0 }, { "cdefg", 5 } }, in[] = { { a, 3 }, { b, 4 } };
	struct msghdr m = { .msg_iov = out, .msg_iovlen = 3 };

	SAME(sendmsg(fd, &m, 0), 7);
	m = (struct msghdr){ .msg_iov = in, .msg_iovlen = 2 };
	SAME(recvmsg(fd, &m, MSG_WAITALL), 7);
	MUST(memcmp(a, "abc", 3) == 0 && memcmp(b, "defg", 4) == 0);
}

enum { BULK = 6 << 20 };
static int bulk_fd;

static void *bulk_writer(void *arg)
{
	static uint8_t buf[70000];
	uint64_t done = 0;

	while (done < BULK) {
		size_t n = BULK - done < sizeof(buf) ? BULK - done : sizeof(buf);

		for (size_t i = 0; i < n; i++)
			buf[i] = pattern(done + i);
		send_all(bulk_fd, buf, n);
		done += n;
	}
	MUST(shutdown(bulk_fd, SHUT_WR) == 0);
	return NULL;
}

static void a_long_echo_with_two_threads_loses_nothing(void)
{
	static uint8_t buf[50000];
	uint64_t done = 0;
	pthread_t t;
	ssize_t n;

	bulk_fd = ask(&peer, "echo\n");
	MUST(pthread_create(&t, NULL, bulk_writer, NULL) == 0);
	while ((n = recv(bulk_fd, buf, sizeof(buf), 0)) > 0) {
		for (ssize_t i = 0; i < n; i++)
			if (buf[i] != pattern(done + i))
				fail("byte %llu is %02x, not %02x", (unsigned long long)(done + i), buf[i], pattern(done + i));
		done += n;
	}
	SAME(n, 0);
	SAME(done, BULK);
	pthread_join(t, NULL);
}

static void a_peer_that_does_not_read_blocks_this_socket_only(void)
{
	static char buf[65536];
	int slow = ask(&peer, "hold\n"), other;
	size_t sent = 0;
	ssize_t n;

	MUST(fcntl(slow, F_SETFL, O_NONBLOCK) == 0);
	for (int idle = 0; idle < 3; ) {		/* until nothing moved three times in a row */
		n = send(slow, buf, sizeof(buf), MSG_NOSIGNAL);
		if (n > 0) {
			sent += n;
			idle = 0;
			MUST(sent < (512u << 20));
		} else {
			SAME(errno, EAGAIN);
			struct pollfd p = { .fd = slow, .events = POLLOUT };
			if (poll(&p, 1, 100) == 0)
				idle++;
		}
	}
	other = ask(&peer, "echo\n");
	send_all(other, "still here", 10);
	recv_exactly(other, buf, 10);
}

static void a_hundred_connections_one_after_another(void)
{
	for (int i = 0; i < 100; i++) {
		int fd = ask(&peer, "echo\nq");

		recv_exactly(fd, &(char){0}, 1);
		MUST(close(fd) == 0);
	}
}

static void sixty_connections_at_once(void)
{
	int fd[60];
	char c;

	for (int i = 0; i < 60; i++)
		fd[i] = ask(&peer, "echo\n");
	for (int i = 0; i < 60; i++) {
		c = i;
		send_all(fd[i], &c, 1);
	}
	for (int i = 59; i >= 0; i--) {
		recv_exactly(fd[i], &c, 1);
		SAME(c, i);
	}
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

static void shutdown_read_gives_eof(void)
{
	int fd = ask(&peer, "echo\n");

	MUST(shutdown(fd, SHUT_RD) == 0);
	SAME(recv(fd, &(char){0}, 1, 0), 0);
	MUST(wait_for(fd, POLLIN | POLLRDHUP) & POLLRDHUP);
}

static void *late_shutdown(void *arg)
{
	recv_exactly(*(int *)arg, &(char){0}, 1);		/* the other socket's answer: the main thread is on its way into recv */
	shutdown(bulk_fd, SHUT_RDWR);
	return NULL;
}

static void shutdown_from_another_thread_wakes_a_blocked_recv(void)
{
	int trigger = ask(&peer, "echo\n");
	pthread_t t;

	bulk_fd = ask(&peer, "echo\n");
	MUST(pthread_create(&t, NULL, late_shutdown, &trigger) == 0);
	send_all(trigger, "t", 1);
	SAME(recv(bulk_fd, &(char){0}, 1, 0), 0);
	pthread_join(t, NULL);
}

static void connect_on_a_listening_or_unix_address_is_refused_as_natively(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);
	struct sockaddr un = { .sa_family = AF_UNIX };

	ERRNO(connect(fd, &un, sizeof(un)), peer.ss.ss_family == AF_INET ? EAFNOSUPPORT : EINVAL);
	ERRNO(connect(fd, (void *)&peer.ss, 3), EINVAL);
	ERRNO(getpeername(fd, &un, &(socklen_t){ sizeof(un) }), ENOTCONN);
	ERRNO(send(fd, "x", 1, MSG_NOSIGNAL), EPIPE);
	ERRNO(recv(fd, &(char){0}, 1, 0), ENOTCONN);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
}

int main(int argc, char **argv)
{
	if (argc != 4 && argc != 7) {
		fprintf(stderr, "usage: %s PEER PORT CLOSED_PORT [DENIED_HOST DENIED_PORT DENIED_ERRNO]\n", argv[0]);
		return 2;
	}
	peer = address(argv[1], argv[2]);
	closed_peer = address(argv[1], argv[3]);
	if (argc == 7) {
		denied = address(argv[4], argv[5]);
		denied_errno = atoi(argv[6]);
		run_check("denied address gives the policy's errno", denied_address_gives_the_policys_errno);
	}
#define C(fn) run_check(#fn, fn)
	C(blocking_connect_talks_and_knows_its_names);
	C(getpeername_truncates_to_the_room_given_and_tells_the_real_length);
	C(nonblocking_connect_reports_through_epoll_registered_before);
	C(refused_connect_says_so);
	C(refused_nonblocking_connect_sets_so_error_once);
	C(half_close_lets_the_answer_come);
	C(peer_half_close_is_eof_after_all_data_and_sending_still_works);
	C(data_before_a_reset_is_delivered_then_econnreset);
	C(recv_after_a_reset_gives_econnreset);
	C(sending_after_shutdown_is_epipe_and_sigpipe);
	C(recv_flags_peek_dontwait_waitall_trunc);
	C(receive_timeout_is_eagain_and_does_not_lose_the_socket);
	C(options_are_kept_and_unknown_ones_refused);
	C(fionread_counts_what_waits);
	C(a_forked_child_closing_its_copy_changes_nothing);
	C(close_with_a_dup_left_keeps_the_connection);
	C(sendfile_sends_a_file);
	C(splice_moves_bytes_both_ways);
	C(scatter_and_gather_keep_the_order);
	C(a_long_echo_with_two_threads_loses_nothing);
	C(a_peer_that_does_not_read_blocks_this_socket_only);
	C(a_hundred_connections_one_after_another);
	C(sixty_connections_at_once);
	C(linger_zero_close_does_not_hang);
	C(shutdown_read_gives_eof);
	C(shutdown_from_another_thread_wakes_a_blocked_recv);
	C(connect_on_a_listening_or_unix_address_is_refused_as_natively);
	return finish_checks();
}
