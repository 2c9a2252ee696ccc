// SPDX-License-Identifier: BSD-3-Clause
/*
 * vsock_check stream               what a program may rely on that connects to the host over AF_VSOCK
 * vsock_check seqpacket            the same for messages
 * vsock_check echo PORT            serve: echo every connection to PORT, one process each, until killed; prints "ready"
 * vsock_check cid                  print the guest's own context id
 * vsock_check hold                 connect to port 7002, send "hi\n", print what recv() and then send() say when the other end is gone
 *
 * On the host: peer.py at port 7000 (it obeys the first line), nobody at 7001, an echo of messages at 7100.
 */
#include "check.h"
#include <linux/vm_sockets.h>
#include <pthread.h>

enum { PEER = 7000, NOBODY = 7001, OWN = 7002, MESSAGES = 7100, BIG = 16 << 20 };

static int vsock(int type)
{
	int fd = socket(AF_VSOCK, type, 0);

	MUST(fd >= 0);
	return fd;
}

static struct sockaddr_vm host_port(unsigned port)
{
	return (struct sockaddr_vm){ .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
}

static int connected(int type, unsigned port)
{
	struct sockaddr_vm a = host_port(port);
	int fd = vsock(type);

	MUST(connect(fd, (void *)&a, sizeof(a)) == 0);
	return fd;
}

static int ask_peer(const char *line)
{
	int fd = connected(SOCK_STREAM, PEER);

	send_all(fd, line, strlen(line));
	return fd;
}

static void expect_eof(int fd)
{
	char c;

	SAME(recv(fd, &c, 1, 0), 0);
}

/* ------------------------------------------------------------------------------------------------------------- streams */

static void what_is_sent_comes_back_and_addresses_are_right(void)
{
	struct sockaddr_vm local, peer;
	socklen_t len = sizeof(local);
	char buf[5] = "";
	int fd = ask_peer("echo\n");

	send_all(fd, "hello", 5);
	recv_exactly(fd, buf, 5);
	MUST(!memcmp(buf, "hello", 5));
	MUST(getsockname(fd, (void *)&local, &len) == 0);
	MUST(getpeername(fd, (void *)&peer, &len) == 0);
	SAME(peer.svm_cid, VMADDR_CID_HOST);
	SAME(peer.svm_port, PEER);
	MUST(local.svm_cid >= 3);
}

static void a_port_where_nobody_listens_is_refused(void)
{
	struct sockaddr_vm a = host_port(NOBODY);

	ERRNO(connect(vsock(SOCK_STREAM), (void *)&a, sizeof(a)), ECONNRESET);
}

static void another_context_is_refused(void)
{
	struct sockaddr_vm a = host_port(PEER);

	a.svm_cid = 77;
	ERRNO(connect(vsock(SOCK_STREAM), (void *)&a, sizeof(a)), ECONNRESET);
}

static void *send_pattern(void *arg)
{
	static uint8_t buf[65536];
	int fd = *(int *)arg;

	for (uint64_t at = 0; at < BIG; at += sizeof(buf)) {
		for (unsigned i = 0; i < sizeof(buf); i++)
			buf[i] = pattern(at + i);
		send_all(fd, buf, sizeof(buf));
	}
	MUST(shutdown(fd, SHUT_WR) == 0);
	return NULL;
}

static void recv_pattern(int fd, uint64_t size)
{
	static uint8_t buf[65536];
	uint64_t at = 0;
	ssize_t n;

	while ((n = recv(fd, buf, sizeof(buf), 0)) > 0)
		for (ssize_t i = 0; i < n; i++, at++)
			if (buf[i] != pattern(at))
				fail("byte %llu is %#x, not %#x", (unsigned long long)at, buf[i], pattern(at));
	SAME(n, 0);
	SAME(at, size);
}

static void sixteen_mebibytes_echo_unharmed_in_both_directions_at_once(void)
{
	int fd = ask_peer("echo\n");
	pthread_t t;

	MUST(pthread_create(&t, NULL, send_pattern, &fd) == 0);
	recv_pattern(fd, BIG);
	MUST(pthread_join(t, NULL) == 0);
}

static void a_download_arrives_unharmed(void)
{
	char line[32];

	snprintf(line, sizeof(line), "source %d\n", 4 << 20);
	recv_pattern(ask_peer(line), 4 << 20);
}

static void writes_of_any_size_are_counted_right_at_the_host(void)
{
	static const int sizes[] = { 1, 43, 44, 45, 4051, 4052, 4053, 65535, 65536, 65537, 100000, 262144, 300000 };
	static uint8_t buf[300000];
	int fd = ask_peer("sink\n"), total = 0;
	char answer[64] = "", want[64];
	ssize_t n, got = 0;

	for (unsigned i = 0; i < sizeof(sizes) / sizeof(*sizes); total += sizes[i++])
		send_all(fd, buf, sizes[i]);
	MUST(shutdown(fd, SHUT_WR) == 0);
	while (got < (ssize_t)sizeof(answer) - 1 && (n = recv(fd, answer + got, sizeof(answer) - 1 - got, 0)) > 0)
		got += n;
	snprintf(want, sizeof(want), "%d ", total);
	if (strncmp(answer, want, strlen(want)))
		fail("%d bytes were sent, the host says %s", total, answer);
}

static void half_close_ends_the_stream_at_the_host_and_its_answer_arrives(void)
{
	char buf[64] = "";
	int fd = ask_peer("sink\nabc");

	MUST(shutdown(fd, SHUT_WR) == 0);
	ERRNO(send(fd, "x", 1, MSG_NOSIGNAL), EPIPE);
	MUST(recv(fd, buf, sizeof(buf) - 1, MSG_WAITALL) > 0);
	MUST(!strncmp(buf, "3 ", 2));
	expect_eof(fd);
}

static void after_the_hosts_half_close_the_guest_can_still_send(void)
{
	uint8_t buf[1000];
	int fd = ask_peer("source 1000\n");

	recv_exactly(fd, buf, sizeof(buf));
	expect_eof(fd);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	for (int i = 0; i < 100; i++)
		SAME(send(fd, buf, sizeof(buf), MSG_NOSIGNAL), sizeof(buf));
}

static void a_reset_of_the_host_ends_the_connection(void)
{
	uint8_t buf[1000];
	int fd = ask_peer("reset 1000\n");
	ssize_t n;

	recv_exactly(fd, buf, sizeof(buf));
	SAME(send(fd, "x", 1, MSG_NOSIGNAL), 1);
	n = recv(fd, buf, 1, 0);	/* which errors a RST shows is the kernel's own affair; that it is over is not */
	MUST(n == 0 || (n < 0 && errno == ECONNRESET));
	n = send(fd, "x", 1, MSG_NOSIGNAL);
	MUST(n < 0 && (errno == EPIPE || errno == ECONNRESET));
}

static void a_host_that_does_not_read_stalls_its_own_connection_alone(void)
{
	static char buf[65536];
	int fd = ask_peer("hold\n"), other = ask_peer("echo\n");
	long sent = 0;
	ssize_t n;

	MUST(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
	/* stalled: nothing more was taken while the other connection made 20 rounds */
	for (int rounds = 0; rounds < 20;) {
		n = send(fd, buf, sizeof(buf), MSG_NOSIGNAL);
		if (n > 0) {
			sent += n;
			rounds = 0;
			continue;
		}
		MUST(errno == EAGAIN);
		send_all(other, buf, 1000);
		recv_exactly(other, buf, 1000);
		rounds++;
	}
	MUST(sent > 262144);
}

static void a_guest_that_does_not_read_loses_nothing(void)
{
	int fd = ask_peer("source 2000000\n"), other = ask_peer("echo\n");
	char c;

	for (int i = 0; i < 50; i++) {
		send_all(other, "x", 1);
		recv_exactly(other, &c, 1);
	}
	recv_pattern(fd, 2000000);
}

static void two_hundred_connections_one_after_the_other(void)
{
	char c;

	for (int i = 0; i < 200; i++) {
		int fd = ask_peer("echo\n");

		c = (char)i;
		send_all(fd, &c, 1);
		recv_exactly(fd, &c, 1);
		SAME(c, (char)i);
		close(fd);
	}
}

static void a_hundred_connections_at_once(void)
{
	int fds[100];
	char c;

	for (int i = 0; i < 100; i++)
		fds[i] = ask_peer("echo\n");
	for (int i = 0; i < 100; i++) {
		c = (char)i;
		send_all(fds[i], &c, 1);
	}
	for (int i = 99; i >= 0; i--) {
		recv_exactly(fds[i], &c, 1);
		SAME(c, (char)i);
	}
}

static void connect_without_blocking_becomes_writable(void)
{
	struct sockaddr_vm a = host_port(PEER);
	int fd = vsock(SOCK_STREAM | SOCK_NONBLOCK), error = -1;
	socklen_t len = sizeof(error);

	ERRNO(connect(fd, (void *)&a, sizeof(a)), EINPROGRESS);
	MUST(wait_for(fd, POLLOUT) & POLLOUT);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
	SAME(error, 0);
}

static void what_was_sent_before_close_is_delivered(void)
{
	static char buf[200000];
	int fd = connected(SOCK_STREAM, OWN);	/* the test counts what arrives, and reads slowly */

	send_all(fd, buf, sizeof(buf));
	SAME(close(fd), 0);
}

/* ------------------------------------------------------------------------------------------------------------ messages */

static void messages_keep_their_bounds(void)
{
	static const int sizes[] = { 1, 2, 1000, 4052, 4053, 65536, 70000, 150000 };
	static uint8_t out[150000], in[150001];
	int fd = connected(SOCK_SEQPACKET, MESSAGES);

	for (unsigned i = 0; i < sizeof(out); i++)
		out[i] = pattern(i);
	for (unsigned i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
		SAME(send(fd, out, sizes[i], MSG_NOSIGNAL), sizes[i]);
	for (unsigned i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		SAME(recv(fd, in, sizeof(in), 0), sizes[i]);
		MUST(!memcmp(in, out, sizes[i]));
	}
	MUST(shutdown(fd, SHUT_WR) == 0);
	expect_eof(fd);
}

static void a_thousand_messages_come_back_in_order(void)
{
	int fd = connected(SOCK_SEQPACKET, MESSAGES), n;

	for (int i = 0; i < 1000; i += 10) {
		for (n = i; n < i + 10; n++)
			SAME(send(fd, &n, sizeof(n), MSG_NOSIGNAL), sizeof(n));
		for (int j = i; j < i + 10; j++) {
			SAME(recv(fd, &n, sizeof(n), 0), sizeof(n));
			SAME(n, j);
		}
	}
}

static void messages_to_a_port_of_streams_are_refused(void)
{
	struct sockaddr_vm a = host_port(PEER);

	ERRNO(connect(vsock(SOCK_SEQPACKET), (void *)&a, sizeof(a)), ECONNRESET);
}

/* --------------------------------------------------------------------------------------------------------------- modes */

static int echo(unsigned port)
{
	struct sockaddr_vm a = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port };
	static char buf[65536];
	int fd = vsock(SOCK_STREAM), conn;
	ssize_t n;

	MUST(bind(fd, (void *)&a, sizeof(a)) == 0);
	MUST(listen(fd, 128) == 0);
	signal(SIGCHLD, SIG_IGN);
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		conn = accept(fd, NULL, NULL);
		MUST(conn >= 0);
		if (fork() == 0) {
			while ((n = recv(conn, buf, sizeof(buf), 0)) > 0)
				send_all(conn, buf, n);
			_exit(0);
		}
		close(conn);
	}
}

static int hold(void)
{
	int fd = connected(SOCK_STREAM, OWN);
	char c;
	ssize_t n;

	send_all(fd, "hi\n", 3);
	n = recv(fd, &c, 1, 0);
	printf("recv %s\n", n < 0 ? strerrorname_np(errno) : n ? "data" : "EOF");
	n = send(fd, "x", 1, MSG_NOSIGNAL);
	printf("send %s\n", n < 0 ? strerrorname_np(errno) : "ok");
	return 0;
}

static int cid(void)
{
	int fd = open("/dev/vsock", O_RDONLY);
	unsigned id;

	MUST(fd >= 0);
	MUST(ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &id) == 0);
	printf("%u\n", id);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "echo"))
		return echo(atoi(argv[2]));
	if (argc == 2 && !strcmp(argv[1], "cid"))
		return cid();
	if (argc == 2 && !strcmp(argv[1], "hold"))
		return hold();
	if (argc == 2 && !strcmp(argv[1], "stream")) {
		C(what_is_sent_comes_back_and_addresses_are_right);
		C(a_port_where_nobody_listens_is_refused);
		C(another_context_is_refused);
		C(sixteen_mebibytes_echo_unharmed_in_both_directions_at_once);
		C(a_download_arrives_unharmed);
		C(writes_of_any_size_are_counted_right_at_the_host);
		C(half_close_ends_the_stream_at_the_host_and_its_answer_arrives);
		C(after_the_hosts_half_close_the_guest_can_still_send);
		C(a_reset_of_the_host_ends_the_connection);
		C(a_host_that_does_not_read_stalls_its_own_connection_alone);
		C(a_guest_that_does_not_read_loses_nothing);
		C(two_hundred_connections_one_after_the_other);
		C(a_hundred_connections_at_once);
		C(connect_without_blocking_becomes_writable);
		C(what_was_sent_before_close_is_delivered);
		return finish_checks();
	}
	if (argc == 2 && !strcmp(argv[1], "seqpacket")) {
		C(messages_keep_their_bounds);
		C(a_thousand_messages_come_back_in_order);
		C(messages_to_a_port_of_streams_are_refused);
		return finish_checks();
	}
	fprintf(stderr, "usage: %s stream | seqpacket | echo PORT | cid | hold\n", argv[0]);
	return 2;
}
