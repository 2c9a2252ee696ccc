// SPDX-License-Identifier: BSD-3-Clause
/*
 * stream_check PEER PORT - what a TCP client may rely on once it is connected: bytes, their end, many connections, threads.
 *
 * PEER PORT is tests/e2e/peer.py.
 */
#include "check.h"
#include <pthread.h>

static struct addr peer;

static void half_close_lets_the_answer_come(void)
{
	enum { N = 300000 };
	uint8_t *data = malloc(N);
	int fd = ask(&peer, "sink\n");

	for (int i = 0; i < N; i++)
		data[i] = pattern(i);
	send_all(fd, data, N);
	sink_has(fd, data, N);
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

/* read the pattern to its end. Return: its bytes */
static uint64_t bulk_read(void)
{
	static uint8_t buf[50000];
	uint64_t done = 0;
	ssize_t n;

	while ((n = recv(bulk_fd, buf, sizeof(buf), 0)) > 0) {
		for (ssize_t i = 0; i < n; i++)
			if (buf[i] != pattern(done + i))
				fail("byte %llu is %02x, not %02x", (unsigned long long)(done + i), buf[i], pattern(done + i));
		done += n;
	}
	SAME(n, 0);
	return done;
}

static void a_long_echo_with_two_threads_loses_nothing(void)
{
	pthread_t t;

	bulk_fd = ask(&peer, "echo\n");
	MUST(pthread_create(&t, NULL, bulk_writer, NULL) == 0);
	SAME(bulk_read(), BULK);
	pthread_join(t, NULL);
}

enum { SMALL_WRITES = 1 << 20 };

/* writes of 1 to 300 bytes, and now and then of some thousands */
static void *small_writer(void *arg)
{
	static uint8_t buf[6000];
	uint64_t done = 0;

	for (uint32_t i = 1; done < SMALL_WRITES; i++) {
		size_t n = i % 97 ? i * 2654435761u % 300 + 1 : sizeof(buf);

		for (size_t k = 0; k < n; k++)
			buf[k] = pattern(done + k);
		send_all(bulk_fd, buf, n);
		done += n;
	}
	MUST(shutdown(bulk_fd, SHUT_WR) == 0);
	*(uint64_t *)arg = done;
	return NULL;
}

static void small_writes_and_larger_ones_keep_their_order_and_the_fin_its_place(void)
{
	uint64_t done, sent = 0;
	pthread_t t;

	bulk_fd = ask(&peer, "echo\n");
	MUST(pthread_create(&t, NULL, small_writer, &sent) == 0);
	done = bulk_read();
	pthread_join(t, NULL);
	SAME(done, sent);
}

/* nothing of what was written waits for a further call on the socket */
static void small_writes_that_no_other_call_follows_arrive(void)
{
	int fd = ask(&peer, "echo\n"), there = 0, sent = 0;
	uint8_t byte = 0;

	for (int round = 0; round < 20; round++) {
		for (int i = 0; i < 50; i++, sent++) {
			byte = pattern(sent);
			send_all(fd, &byte, 1);
		}
		while (there < sent)	/* looks at the socket, and neither waits nor reads */
			MUST(ioctl(fd, FIONREAD, &there) == 0);
		SAME(there, sent);
	}
	for (int i = 0; i < sent; i++) {
		SAME(recv(fd, &byte, 1, 0), 1);
		SAME(byte, pattern(i));
	}
	close(fd);
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

int main(int argc, char **argv)
{
	peer = only_peer(argc, argv);
	C(half_close_lets_the_answer_come);
	C(peer_half_close_is_eof_after_all_data_and_sending_still_works);
	C(data_before_a_reset_is_delivered_then_econnreset);
	C(recv_after_a_reset_gives_econnreset);
	C(sending_after_shutdown_is_epipe_and_sigpipe);
	C(recv_flags_peek_dontwait_waitall_trunc);
	C(a_long_echo_with_two_threads_loses_nothing);
	C(small_writes_and_larger_ones_keep_their_order_and_the_fin_its_place);
	C(small_writes_that_no_other_call_follows_arrive);
	C(a_peer_that_does_not_read_blocks_this_socket_only);
	C(a_hundred_connections_one_after_another);
	C(sixty_connections_at_once);
	C(shutdown_read_gives_eof);
	C(shutdown_from_another_thread_wakes_a_blocked_recv);
	return finish_checks();
}
