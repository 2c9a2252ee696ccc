// SPDX-License-Identifier: BSD-3-Clause
/*
 * connect_check PEER PORT CLOSED_PORT STUCK_PORT [DENIED_HOST DENIED_PORT DENIED_ERRNO] - what a TCP client may rely on until it is connected.
 *
 * PEER PORT is tests/e2e/peer.py, CLOSED_PORT a port of the same host where nobody listens, STUCK_PORT one where connects hang from "stick" to
 * "unstick". DENIED_*: an address and the errno that connect() must give for it.
 */
#include "check.h"

#ifndef TCP_FASTOPEN_CONNECT
#define TCP_FASTOPEN_CONNECT 30
#endif

static struct addr peer, closed_peer, stuck, denied;
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

/* connects to the stuck port hang from here on, or go on */
static void tell_peer(const char *line)
{
	char answer[3];
	int fd = ask(&peer, line);

	recv_exactly(fd, answer, sizeof(answer));
	MUST(memcmp(answer, "ok\n", 3) == 0);
	close(fd);
}

static int so_error(int fd)
{
	int err = -1;

	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &(socklen_t){ sizeof(err) }) == 0);
	return err;
}

static void talk_to_echo(int fd)
{
	char c = 0;

	send_all(fd, "echo\nt", 6);
	recv_exactly(fd, &c, 1);
	SAME(c, 't');
}

static void a_second_connect_meanwhile_is_ealready(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT };
	struct addr a = { .len = sizeof(a.ss) };

	tell_peer("stick\n");
	ERRNO(connect(fd, (void *)&stuck.ss, stuck.len), EINPROGRESS);
	ERRNO(connect(fd, (void *)&stuck.ss, stuck.len), EALREADY);
	SAME(poll(&p, 1, 0), 0);
	SAME(so_error(fd), 0);
	ERRNO(getpeername(fd, (void *)&a.ss, &a.len), ENOTCONN);
	ERRNO(send(fd, "x", 1, MSG_NOSIGNAL), EAGAIN);
	ERRNO(recv(fd, &(char){0}, 1, 0), EAGAIN);
	tell_peer("unstick\n");
	SAME(wait_for(fd, POLLOUT), POLLOUT);
	SAME(so_error(fd), 0);
	MUST(connect(fd, (void *)&stuck.ss, stuck.len) == 0);	/* once, then */
	ERRNO(connect(fd, (void *)&stuck.ss, stuck.len), EISCONN);
	MUST(fcntl(fd, F_SETFL, 0) == 0);
	talk_to_echo(fd);
}

static void on_tick(int sig)
{
	(void)sig;
}

static void a_connect_that_is_interrupted_goes_on(void)
{
	struct itimerval ticks = { { 0, 20000 }, { 0, 20000 } }, none = { { 0, 0 }, { 0, 0 } };
	struct sigaction sa = { .sa_handler = on_tick };	/* no SA_RESTART */
	struct timeval tv = { .tv_usec = 50000 };
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);

	tell_peer("stick\n");
	MUST(sigaction(SIGALRM, &sa, NULL) == 0 && setitimer(ITIMER_REAL, &ticks, NULL) == 0);
	ERRNO(connect(fd, (void *)&stuck.ss, stuck.len), EINTR);
	MUST(setitimer(ITIMER_REAL, &none, NULL) == 0);
	signal(SIGALRM, SIG_DFL);
	alarm(CHECK_SECONDS);
	MUST(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)) == 0);
	ERRNO(connect(fd, (void *)&stuck.ss, stuck.len), EALREADY);	/* waited as long as SO_SNDTIMEO says */
	tell_peer("unstick\n");
	tv = (struct timeval){ .tv_sec = CHECK_SECONDS };
	MUST(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)) == 0);
	MUST(connect(fd, (void *)&stuck.ss, stuck.len) == 0);
	talk_to_echo(fd);
}

static void sndtimeo_bounds_a_connect_and_af_unspec_gives_it_up(void)
{
	struct sockaddr none = { .sa_family = AF_UNSPEC };
	struct timeval tv = { .tv_usec = 50000 };
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);

	tell_peer("stick\n");
	MUST(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)) == 0);
	ERRNO(connect(fd, (void *)&stuck.ss, stuck.len), EINPROGRESS);
	MUST(connect(fd, &none, sizeof(none)) == 0);
	tv = (struct timeval){ .tv_sec = CHECK_SECONDS };
	MUST(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	talk_to_echo(fd);
	tell_peer("unstick\n");
}

static void fast_open_as_an_option_changes_nothing_that_shows(void)
{
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);

	MUST(setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &(int){1}, sizeof(int)) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	talk_to_echo(fd);
}

static void a_socket_may_connect_to_itself(void)
{
	struct addr me = address(peer.ss.ss_family == AF_INET ? "127.0.0.1" : "::1", "0");
	int fd = socket(peer.ss.ss_family, SOCK_STREAM, 0);
	char c = 0;

	MUST(bind(fd, (void *)&me.ss, me.len) == 0);
	MUST(getsockname(fd, (void *)&me.ss, &me.len) == 0);
	MUST(connect(fd, (void *)&me.ss, me.len) == 0);
	send_all(fd, "s", 1);
	recv_exactly(fd, &c, 1);
	SAME(c, 's');
}

int main(int argc, char **argv)
{
	if (argc != 5 && argc != 8) {
		fprintf(stderr, "usage: %s PEER PORT CLOSED_PORT STUCK_PORT [DENIED_HOST DENIED_PORT DENIED_ERRNO]\n", argv[0]);
		return 2;
	}
	peer = address(argv[1], argv[2]);
	closed_peer = address(argv[1], argv[3]);
	stuck = address(argv[1], argv[4]);
	if (argc == 8) {
		denied = address(argv[5], argv[6]);
		denied_errno = atoi(argv[7]);
		C(denied_address_gives_the_policys_errno);
	}
	C(blocking_connect_talks_and_knows_its_names);
	C(getpeername_truncates_to_the_room_given_and_tells_the_real_length);
	C(nonblocking_connect_reports_through_epoll_registered_before);
	C(refused_connect_says_so);
	C(refused_nonblocking_connect_sets_so_error_once);
	C(connect_on_a_listening_or_unix_address_is_refused_as_natively);
	C(a_second_connect_meanwhile_is_ealready);
	C(a_connect_that_is_interrupted_goes_on);
	C(sndtimeo_bounds_a_connect_and_af_unspec_gives_it_up);
	C(fast_open_as_an_option_changes_nothing_that_shows);
	C(a_socket_may_connect_to_itself);
	return finish_checks();
}
