// SPDX-License-Identifier: BSD-3-Clause
/*
 * io_check PEER PORT - the ways in which a program moves bytes and hears that it may: files, pipes, io_uring, zero-copy, signals, edges.
 *
 * PEER PORT is tests/e2e/peer.py.
 */
#include "check.h"
#include <linux/errqueue.h>
#include <linux/io_uring.h>
#include <linux/sockios.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>

static struct addr peer;

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

/* @len bytes of the pattern in memory, and in a file that shares it */
static uint8_t *patterned(size_t len, int *file)
{
	uint8_t *data;

	*file = memfd_create("patterned", 0);
	MUST(*file >= 0 && ftruncate(*file, len) == 0);
	data = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, *file, 0);
	MUST(data != MAP_FAILED);
	for (size_t i = 0; i < len; i++)
		data[i] = pattern(i);
	return data;
}

static void a_long_file_arrives_as_it_is_from_any_place_on(void)
{
	static const size_t from[] = { 0, 777, 4096 }, upto[] = { 0, 1, 300001 };	/* how much of it a call shall send; 0: all */
	size_t len = (1 << 20) + 1234;
	int file;
	uint8_t *data = patterned(len, &file);

	for (size_t i = 0; i < 3; i++) {
		int fd = ask(&peer, "sink\n");
		off_t at = from[i];

		for (size_t n = 0; at < (off_t)len; n++)
			MUST(sendfile(fd, file, &at, upto[i] && n < 100 ? upto[i] : len - at) > 0);
		sink_has(fd, data + from[i], len - from[i]);
		close(fd);
	}
}

static void pieces_of_files_and_memory_keep_their_order_in_a_pipe(void)
{
	static const size_t size[] = { 1, 4096, 2048, 2049, 60000, 3, 5000, 4095 };
	size_t len = 1 << 20, sent = 0;
	int file, p[2], fd = ask(&peer, "sink\n");
	uint8_t *data = patterned(len, &file);

	MUST(pipe(p) == 0);
	for (size_t i = 0; sent < len; i++) {
		size_t n = size[i % 8] < len - sent ? size[i % 8] : len - sent;
		off_t at = sent;
		ssize_t in;
		int waits;

		if (i % 3)
			in = splice(file, &at, p[1], NULL, n, 0);
		else
			in = write(p[1], data + sent, n < 4096 ? n : 4096);
		MUST(in > 0);
		sent += in;
		if (i % 4 != 3 && sent < len && in <= 4096)
			continue;
		do {
			MUST(splice(p[0], NULL, fd, NULL, 1 << 20, i % 2 ? SPLICE_F_MORE : 0) > 0);
			MUST(ioctl(p[0], FIONREAD, &waits) == 0);
		} while (waits);
	}
	sink_has(fd, data, len);
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

/* those who wait in "gate" read from here on */
static void open_the_gate(void)
{
	char answer[3];
	int fd = ask(&peer, "open\n");

	recv_exactly(fd, answer, sizeof(answer));
	close(fd);
}

/* write without waiting until nothing moves any more; the bytes that went */
static size_t fill(int fd)
{
	static char data[65536];
	struct pollfd p = { .fd = fd, .events = POLLOUT };
	size_t sent = 0;

	MUST(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0);
	do {
		ssize_t n;

		while ((n = send(fd, data, sizeof(data), MSG_NOSIGNAL)) > 0)
			sent += n;
		SAME(errno, EAGAIN);
		MUST(sent < (512u << 20));
	} while (poll(&p, 1, 200) > 0);
	return sent;
}

static void outq_counts_down_to_nothing_when_the_peer_has_all(void)
{
	int fd = ask(&peer, "sink\n"), n = -1;

	send_all(fd, "0123456789", 10);
	do {
		sched_yield();
		MUST(ioctl(fd, SIOCOUTQ, &n) == 0);
	} while (n);
	MUST(ioctl(fd, SIOCOUTQNSD, &n) == 0);
	SAME(n, 0);
	fd = ask(&peer, "gate\n");
	fill(fd);
	MUST(ioctl(fd, SIOCOUTQ, &n) == 0);
	MUST(n > 0);
	open_the_gate();
	do {
		sched_yield();
		MUST(ioctl(fd, SIOCOUTQ, &n) == 0);
	} while (n);
}

static void each_arrival_is_one_edge(void)
{
	int fd = ask(&peer, "echo\n"), ep = epoll_create1(0);
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET }, out;
	char buf[4];

	MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev) == 0);
	for (int i = 0; i < 3; i++) {		/* nothing is read in between: level-triggered it would stay ready */
		send_all(fd, "e", 1);
		SAME(epoll_wait(ep, &out, 1, CHECK_SECONDS * 1000), 1);
		MUST(out.events & EPOLLIN);
		SAME(epoll_wait(ep, &out, 1, 0), 0);
	}
	recv_exactly(fd, buf, 3);
	MUST(shutdown(fd, SHUT_WR) == 0);	/* the echo ends, which is an edge, too */
	do
		SAME(epoll_wait(ep, &out, 1, CHECK_SECONDS * 1000), 1);
	while (!(out.events & EPOLLIN));
	SAME(recv(fd, buf, 1, 0), 0);
}

static void a_writer_that_found_no_room_gets_an_edge_and_a_signal_when_there_is(void)
{
	int fd = ask(&peer, "gate\n"), ep = epoll_create1(0);
	struct epoll_event ev = { .events = EPOLLOUT | EPOLLET }, out;
	siginfo_t info;
	sigset_t set;
	size_t sent;

	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
	sent = fill(fd);
	MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev) == 0);
	while (epoll_wait(ep, &out, 1, 0) == 1)		/* something moved after all */
		sent += fill(fd);
	MUST(fcntl(fd, F_SETOWN, getpid()) == 0 && fcntl(fd, F_SETSIG, SIGRTMIN) == 0);
	MUST(fcntl(fd, F_SETFL, O_NONBLOCK | O_ASYNC) == 0);
	sent += fill(fd);			/* the signal is for who found no room, as the edge is */
	open_the_gate();
	SAME(epoll_wait(ep, &out, 1, CHECK_SECONDS * 1000), 1);
	MUST(out.events & EPOLLOUT);
	do
		MUST(sigwaitinfo(&set, &info) == SIGRTMIN);
	while (!(info.si_band & POLLOUT));
	MUST(sent > 0 && send(fd, "x", 1, MSG_NOSIGNAL) == 1);
}

static volatile pid_t closer;
static volatile bool closed;

static void *lingering_close(void *arg)
{
	closer = gettid();
	close(*(int *)arg);
	closed = true;
	return NULL;
}

static void a_timed_linger_closes_when_the_peer_has_all_or_the_time_is_over(void)
{
	struct linger l = { .l_onoff = 1, .l_linger = CHECK_SECONDS };
	char path[64], state = 0;
	pthread_t thread;
	int fd = ask(&peer, "gate\n");

	fill(fd);
	MUST(fcntl(fd, F_SETFL, 0) == 0);
	MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof(l)) == 0);
	MUST(pthread_create(&thread, NULL, lingering_close, &fd) == 0);
	while (!closer)
		sched_yield();
	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", closer);
	while (state != 'S' && !closed) {
		FILE *f = fopen(path, "r");

		MUST(f && fscanf(f, "%*d (%*[^)]) %c", &state) == 1);
		fclose(f);
	}
	MUST(!closed);
	open_the_gate();
	MUST(pthread_join(thread, NULL) == 0);

	fd = ask(&peer, "hold\n");		/* which reads nothing */
	fill(fd);
	MUST(fcntl(fd, F_SETFL, 0) == 0);
	l.l_linger = 1;
	MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof(l)) == 0);
	MUST(close(fd) == 0);
}

static void sigio_tells_of_the_connection_and_of_data(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	siginfo_t info;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN);
	sigaddset(&set, SIGIO);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
	MUST(fcntl(fd, F_SETOWN, getpid()) == 0 && fcntl(fd, F_SETSIG, SIGRTMIN) == 0);
	MUST(fcntl(fd, F_SETFL, O_NONBLOCK | O_ASYNC) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0 || errno == EINPROGRESS);
	do
		MUST(sigwaitinfo(&set, &info) == SIGRTMIN);
	while (!(info.si_band & POLLOUT));
	SAME(info.si_fd, fd);
	MUST(wait_for(fd, POLLOUT) == POLLOUT);
	MUST(fcntl(fd, F_SETSIG, 0) == 0 && fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
	MUST(ioctl(fd, FIOASYNC, &(int){1}) == 0);
	MUST(fcntl(fd, F_GETFL) & O_ASYNC);
	send_all(fd, "echo\ns", 6);
	SAME(sigwaitinfo(&set, &info), SIGIO);
	MUST(wait_for(fd, POLLIN) & POLLIN);
}

static int tick_fd, ticks;

static void on_tick(int sig)
{
	(void)sig;
	if (++ticks == 3 && tick_fd >= 0)
		send(tick_fd, "r", 1, MSG_NOSIGNAL);	/* what comes back ends the recv() that was not interrupted */
}

static void a_signal_interrupts_recv_unless_it_restarts(void)
{
	struct itimerval every = { { 0, 20000 }, { 0, 20000 } };
	struct sigaction sa = { .sa_handler = on_tick };
	struct timeval tv = { .tv_sec = CHECK_SECONDS };
	int fd = ask(&peer, "echo\n");
	char c = 0;

	tick_fd = -1;
	MUST(sigaction(SIGALRM, &sa, NULL) == 0 && setitimer(ITIMER_REAL, &every, NULL) == 0);
	ERRNO(recv(fd, &c, 1, 0), EINTR);
	sa.sa_flags = SA_RESTART;
	MUST(sigaction(SIGALRM, &sa, NULL) == 0);
	ticks = 0;
	tick_fd = fd;
	SAME(recv(fd, &c, 1, 0), 1);
	SAME(c, 'r');
	tick_fd = -1;
	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)) == 0);
	ERRNO(recv(fd, &c, 1, 0), EINTR);	/* signal(7): with a timeout never restarted */
}

static void a_descriptor_passed_to_another_process_works_there(void)
{
	union { char buf[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = { { 0 } };
	struct iovec iov = { "p", 1 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof(control.buf) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	int fd = ask(&peer, "echo\n"), pair[2], got, status;
	pid_t pid;

	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	*c = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA(c), &fd, sizeof(int));
	SAME(sendmsg(pair[0], &m, 0), 1);
	MUST(close(fd) == 0);			/* the only reference is on its way */
	pid = fork();
	if (pid == 0) {
		m.msg_controllen = sizeof(control.buf);
		iov.iov_base = &(char){0};
		SAME(recvmsg(pair[1], &m, 0), 1);
		memcpy(&got, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(int));
		send_all(got, "z", 1);
		recv_exactly(got, &(char){0}, 1);
		_exit(0);
	}
	MUST(waitpid(pid, &status, 0) == pid);
	SAME(status, 0);
}

static void msg_more_and_cork_delay_and_lose_nothing(void)
{
	int fd = ask(&peer, "echo\n");
	char buf[6];

	SAME(send(fd, "ab", 2, MSG_MORE), 2);
	SAME(send(fd, "c", 1, 0), 1);
	recv_exactly(fd, buf, 3);
	MUST(memcmp(buf, "abc", 3) == 0);
	MUST(setsockopt(fd, IPPROTO_TCP, TCP_CORK, &(int){1}, sizeof(int)) == 0);
	send_all(fd, "d", 1);
	send_all(fd, "ef", 2);
	MUST(setsockopt(fd, IPPROTO_TCP, TCP_CORK, &(int){0}, sizeof(int)) == 0);
	recv_exactly(fd, buf, 3);
	MUST(memcmp(buf, "def", 3) == 0);
}

/* so many sends with MSG_ZEROCOPY are notified of, in their order, after @first others; and no more are */
static void await_notifications(int fd, uint32_t first, uint32_t count)
{
	uint32_t next = first;

	while (next < first + count) {
		char control[256];
		struct msghdr m = { .msg_control = control, .msg_controllen = sizeof(control) };
		struct sock_extended_err *e;

		MUST(wait_for(fd, 0) & POLLERR);
		SAME(recvmsg(fd, &m, MSG_ERRQUEUE), 0);
		MUST(m.msg_flags & MSG_ERRQUEUE);
		MUST(CMSG_FIRSTHDR(&m));
		e = (void *)CMSG_DATA(CMSG_FIRSTHDR(&m));
		SAME(e->ee_origin, SO_EE_ORIGIN_ZEROCOPY);
		SAME(e->ee_errno, 0);
		SAME(e->ee_info, next);
		MUST(e->ee_data >= next && e->ee_data < first + count);
		next = e->ee_data + 1;
	}
	ERRNO(recvmsg(fd, &(struct msghdr){ 0 }, MSG_ERRQUEUE | MSG_DONTWAIT), EAGAIN);
}

static void zero_copy_sends_are_notified_of_in_the_error_queue(void)
{
	static char data[50000];
	int fd = ask(&peer, "gate\n"), err = -1;
	struct pollfd p = { .fd = fd };
	char answer[32], want[32];
	size_t sent = 1 + 3 * sizeof(data);
	uint32_t sends;
	ssize_t n;

	SAME(send(fd, data, 1, MSG_ZEROCOPY), 1);	/* without SO_ZEROCOPY the flag means nothing, and nothing is notified of */
	MUST(setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &(int){1}, sizeof(int)) == 0);
	SAME(poll(&p, 1, 0), 0);
	open_the_gate();
	for (int i = 0; i < 3; i++)
		SAME(send(fd, data, sizeof(data), MSG_ZEROCOPY), sizeof(data));
	await_notifications(fd, 0, 3);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &(socklen_t){ sizeof(err) }) == 0);
	SAME(err, 0);

	shutdown(fd, SHUT_WR);
	n = recv(fd, answer, sizeof(answer) - 1, MSG_WAITALL);
	MUST(n > 0);
	answer[n] = 0;
	snprintf(want, sizeof(want), "%zu ", sent);
	MUST(strncmp(answer, want, strlen(want)) == 0);

	/* a send that fails has no number */
	fd = ask(&peer, "gate\n");
	MUST(setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &(int){1}, sizeof(int)) == 0);
	fill(fd);
	for (sends = 0; (n = send(fd, data, sizeof(data), MSG_ZEROCOPY)) > 0; sends++)
		;
	SAME(errno, EAGAIN);
	open_the_gate();
	while (!(wait_for(fd, POLLOUT) & POLLOUT))
		;			/* POLLERR: some are notified of before there is room */
	MUST(send(fd, data, sizeof(data), MSG_ZEROCOPY) > 0);
	await_notifications(fd, 0, sends + 1);
}

/* sends of all sizes, from memory and from a file's; and once they are notified of, the memory is the program's again */
static void bytes_that_are_sent_zero_copy_arrive_as_they_were(void)
{
	static const size_t size[] = { 65536, 1, 300001, 2049, 4096, 100000 };
	int file, fd = ask(&peer, "sink\n");
	size_t len = 2 << 20, sent = 0;
	uint8_t *shared = patterned(len, &file), *data = malloc(len + 5), *was = malloc(len);
	uint32_t sends = 0;

	data += 5;
	memcpy(data, shared, len);
	memcpy(was, shared, len);
	MUST(setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &(int){1}, sizeof(int)) == 0);
	while (sent < len) {
		size_t n = size[sends % 6] < len - sent ? size[sends % 6] : len - sent;
		ssize_t done = send(fd, (sends % 2 ? shared : data) + sent, n, MSG_ZEROCOPY);

		MUST(done > 0);
		sent += done;
		sends++;
	}
	await_notifications(fd, 0, sends);
	memset(data, 0, len);
	memset(shared, 0, len);
	sink_has(fd, was, len);
}

static void what_a_program_sent_zero_copy_outlives_it(void)
{
	int file, fd = ask(&peer, "gate\n");
	size_t len = 100000;
	uint8_t *shared = patterned(len, &file), *was = malloc(len);
	pid_t pid;

	memcpy(was, shared, len);
	MUST(setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &(int){1}, sizeof(int)) == 0);
	pid = fork();
	if (!pid) {
		uint8_t *own = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		memcpy(own, was, len);
		SAME(send(fd, own, len, MSG_ZEROCOPY), len);
		MUST(munmap(own, len) == 0);
		_exit(0);
	}
	MUST(waitpid(pid, NULL, 0) == pid);
	open_the_gate();
	await_notifications(fd, 0, 1);
	sink_has(fd, was, len);
}

static void zero_copy_datagrams_are_notified_of_in_the_error_queue(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);
	char data[1000] = "zero", buf[1000];

	MUST(setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &(int){1}, sizeof(int)) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	for (uint32_t i = 0; i < 2; i++) {
		SAME(send(fd, data, sizeof(data), MSG_ZEROCOPY), sizeof(data));
		MUST(wait_for(fd, POLLIN) & (POLLIN | POLLERR));
		await_notifications(fd, i, 1);
		SAME(recv(fd, buf, sizeof(buf), 0), sizeof(buf));
		MUST(memcmp(data, buf, sizeof(buf)) == 0);
	}
}

/* ------------------------------------------------------------------------------------------------------------ io_uring */

static struct ring {
	int fd;
	uint32_t *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
} ring;

static void ring_open(void)
{
	struct io_uring_params p = { 0 };
	char *map;

	ring.fd = syscall(__NR_io_uring_setup, 8, &p);
	if (ring.fd < 0 && (errno == ENOSYS || errno == EPERM))
		skip("this kernel has no io_uring, or forbids it here");
	MUST(ring.fd >= 0 && p.features & IORING_FEAT_SINGLE_MMAP);
	map = mmap(NULL, p.sq_off.array + p.sq_entries * 4 > p.cq_off.cqes + p.cq_entries * sizeof(*ring.cqes) ?
		   p.sq_off.array + p.sq_entries * 4 : p.cq_off.cqes + p.cq_entries * sizeof(*ring.cqes),
		   PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQ_RING);
	ring.sqes = mmap(NULL, p.sq_entries * sizeof(*ring.sqes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQES);
	MUST(map != MAP_FAILED && ring.sqes != MAP_FAILED);
	ring.sq_tail = (void *)(map + p.sq_off.tail);
	ring.sq_mask = (void *)(map + p.sq_off.ring_mask);
	ring.sq_array = (void *)(map + p.sq_off.array);
	ring.cq_head = (void *)(map + p.cq_off.head);
	ring.cq_tail = (void *)(map + p.cq_off.tail);
	ring.cq_mask = (void *)(map + p.cq_off.ring_mask);
	ring.cqes = (void *)(map + p.cq_off.cqes);
}

static void ring_submit(uint8_t op, int fd, const void *addr, uint32_t len, uint64_t off, uint32_t flags, uint64_t name)
{
	uint32_t tail = *ring.sq_tail, i = tail & *ring.sq_mask;

	ring.sqes[i] = (struct io_uring_sqe){ .opcode = op, .fd = fd, .addr = (uintptr_t)addr, .len = len, .off = off, .msg_flags = flags,
		.user_data = name };
	ring.sq_array[i] = i;
	__atomic_store_n(ring.sq_tail, tail + 1, __ATOMIC_RELEASE);
	SAME(syscall(__NR_io_uring_enter, ring.fd, 1, 0, 0, NULL, 0), 1);
}

/* the next completion: its result; whose it is */
static int ring_wait(uint64_t *name)
{
	uint32_t head = *ring.cq_head;
	struct io_uring_cqe cqe;

	while (__atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE) == head)
		MUST(syscall(__NR_io_uring_enter, ring.fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) >= 0 || errno == EINTR);
	cqe = ring.cqes[head & *ring.cq_mask];
	__atomic_store_n(ring.cq_head, head + 1, __ATOMIC_RELEASE);
	*name = cqe.user_data;
	return cqe.res;
}

static void io_uring_connects_sends_receives_and_polls(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);
	char buf[8] = "";
	uint64_t name;

	ring_open();
	ring_submit(IORING_OP_CONNECT, fd, &peer.ss, 0, peer.len, 0, 1);
	SAME(ring_wait(&name), 0);
	ring_submit(IORING_OP_RECV, fd, buf, 5, 0, MSG_WAITALL, 2);	/* before there is anything */
	ring_submit(IORING_OP_POLL_ADD, fd, NULL, 0, 0, POLLRDHUP, 3);
	ring_submit(IORING_OP_SEND, fd, "echo\nrings", 10, 0, MSG_NOSIGNAL, 4);
	for (int left = 2; left; left--) {
		int got = ring_wait(&name);

		MUST(name == 2 || name == 4);
		SAME(got, name == 2 ? 5 : 10);
	}
	MUST(memcmp(buf, "rings", 5) == 0);
	ring_submit(IORING_OP_SHUTDOWN, fd, NULL, SHUT_WR, 0, 0, 5);
	for (int left = 2; left; left--) {
		int got = ring_wait(&name);

		MUST(name == 3 || name == 5);
		if (name == 5)
			SAME(got, 0);
		else
			MUST(got & POLLRDHUP);
	}
	ring_submit(IORING_OP_RECV, fd, buf, 1, 0, 0, 6);
	SAME(ring_wait(&name), 0);
	ring_submit(IORING_OP_CLOSE, fd, NULL, 0, 0, 0, 7);
	SAME(ring_wait(&name), 0);
}

static void io_uring_accepts_on_loopback(void)
{
	struct addr a = address(peer.ss.ss_family == AF_INET ? "0.0.0.0" : "::", "0"), to;
	int l = socket(peer.ss.ss_family, SOCK_STREAM, 0), fd, conn;
	char port[8];
	uint64_t name;

	ring_open();
	MUST(bind(l, (void *)&a.ss, a.len) == 0 && listen(l, 5) == 0 && getsockname(l, (void *)&a.ss, &a.len) == 0);
	snprintf(port, sizeof(port), "%d", port_of(&a));
	to = address(peer.ss.ss_family == AF_INET ? "127.0.0.1" : "::1", port);
	ring_submit(IORING_OP_ACCEPT, l, NULL, 0, 0, 0, 1);
	fd = open_connected(&to);
	conn = ring_wait(&name);
	MUST(conn >= 0);
	send_all(fd, "a", 1);
	recv_exactly(conn, &(char){0}, 1);
}

int main(int argc, char **argv)
{
	peer = only_peer(argc, argv);
	C(fionread_counts_what_waits);
	C(outq_counts_down_to_nothing_when_the_peer_has_all);
	C(scatter_and_gather_keep_the_order);
	C(msg_more_and_cork_delay_and_lose_nothing);
	C(sendfile_sends_a_file);
	C(a_long_file_arrives_as_it_is_from_any_place_on);
	C(pieces_of_files_and_memory_keep_their_order_in_a_pipe);
	C(splice_moves_bytes_both_ways);
	C(zero_copy_sends_are_notified_of_in_the_error_queue);
	C(bytes_that_are_sent_zero_copy_arrive_as_they_were);
	C(what_a_program_sent_zero_copy_outlives_it);
	C(zero_copy_datagrams_are_notified_of_in_the_error_queue);
	C(io_uring_connects_sends_receives_and_polls);
	C(io_uring_accepts_on_loopback);
	C(each_arrival_is_one_edge);
	C(a_writer_that_found_no_room_gets_an_edge_and_a_signal_when_there_is);
	C(sigio_tells_of_the_connection_and_of_data);
	C(a_timed_linger_closes_when_the_peer_has_all_or_the_time_is_over);
	C(a_signal_interrupts_recv_unless_it_restarts);
	C(a_forked_child_closing_its_copy_changes_nothing);
	C(close_with_a_dup_left_keeps_the_connection);
	C(a_descriptor_passed_to_another_process_works_there);
	return finish_checks();
}
