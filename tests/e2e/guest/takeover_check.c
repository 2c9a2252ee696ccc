// SPDX-License-Identifier: BSD-3-Clause
/*
 * takeover_check PEER PORT PEER6 PORT6 NATIVE_HOST - which sockets the module takes, and what it gives back.
 *
 * For a guest with the module, without a NIC, run as root. PEER and PEER6 are offloaded to tests/e2e/peer.py; NATIVE_HOST is an address that
 * the policy does not name and the guest has no route to. Unlike the other programs this one looks into /proc/net/hwsock.
 */
#include "check.h"
#include "listed.h"
#include <linux/filter.h>
#include <pthread.h>
#include <sched.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

static struct addr peer, peer6, native;

static int loopback_listener(int family, int protocol, struct addr *a)
{
	int fd = socket(family, SOCK_STREAM, protocol);

	*a = address(family == AF_INET ? "127.0.0.1" : "::1", "0");
	MUST(fd >= 0);
	MUST(bind(fd, (void *)&a->ss, a->len) == 0 && listen(fd, 5) == 0);
	MUST(getsockname(fd, (void *)&a->ss, &a->len) == 0);
	return fd;
}

static void talk(int a, int b)
{
	char c = 0;

	send_all(a, "x", 1);
	recv_exactly(b, &c, 1);
	SAME(c, 'x');
}

/* what /proc/PID/fdinfo says of a socket of ours */
static const char *fdinfo(int fd)
{
	static char text[1024];
	char path[64];
	FILE *f;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	f = fopen(path, "r");
	MUST(f);
	text[fread(text, 1, sizeof(text) - 1, f)] = 0;
	fclose(f);
	return text;
}

static void an_offloaded_socket_is_listed_with_its_peer(void)
{
	int fd = open_connected(&peer);
	char uri[64];

	snprintf(uri, sizeof(uri), "tcp://%s:%d ", inet_ntoa(((struct sockaddr_in *)&peer.ss)->sin_addr), port_of(&peer));
	MUST(strstr(listed(fd), uri) && strstr(listed(fd), "CONNECTED"));
	MUST(strstr(fdinfo(fd), "hwsock-flow:"));
}

static void loopback_stays_native(void)
{
	static const int families[] = { AF_INET, AF_INET6 };

	for (int i = 0; i < 2; i++) {
		struct addr a;
		int l = loopback_listener(families[i], 0, &a), c = open_connected(&a), s = accept(l, NULL, NULL);

		MUST(s >= 0);
		MUST(!offloaded(l) && !offloaded(c) && !offloaded(s));
		talk(c, s);
		talk(s, c);
	}
}

static void a_refusing_loopback_port_leaves_the_socket_undecided(void)
{
	struct addr closed;
	int l = loopback_listener(AF_INET, 0, &closed), fd = socket(AF_INET, SOCK_STREAM, 0);

	close(l);
	ERRNO(connect(fd, (void *)&closed.ss, closed.len), ECONNREFUSED);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(offloaded(fd));
	fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	ERRNO(connect(fd, (void *)&closed.ss, closed.len), EINPROGRESS);
	MUST(wait_for(fd, POLLOUT) & POLLERR);
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), ECONNREFUSED);	/* natively, too, a call of its own says so */
	MUST(fcntl(fd, F_SETFL, 0) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(offloaded(fd));
}

static void what_the_device_refuses_fails_as_natively(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	ERRNO(connect(fd, (void *)&native.ss, native.len), ENETUNREACH);
	MUST(!offloaded(fd));
	ERRNO(send(fd, "x", 1, MSG_NOSIGNAL), EPIPE);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);	/* and may try elsewhere */
	MUST(offloaded(fd));
}

static void what_the_device_refuses_fails_through_so_error_when_nonblocking(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), err = 0;
	socklen_t len = sizeof(err);

	ERRNO(connect(fd, (void *)&native.ss, native.len), EINPROGRESS);
	MUST(wait_for(fd, POLLOUT) & POLLERR);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) == 0);
	SAME(err, ENETUNREACH);
	MUST(!offloaded(fd));
}

static void ipv6_and_v4_mapped_peers_are_served(void)
{
	char port[8], mapped[INET6_ADDRSTRLEN + 8], v4[INET_ADDRSTRLEN];
	struct addr a, name = { .len = sizeof(name.ss) };
	int fd = open_connected(&peer6);

	MUST(offloaded(fd));
	send_all(fd, "echo\n!", 6);
	recv_exactly(fd, &(char){0}, 1);

	inet_ntop(AF_INET, &((struct sockaddr_in *)&peer.ss)->sin_addr, v4, sizeof(v4));
	snprintf(mapped, sizeof(mapped), "::ffff:%s", v4);
	snprintf(port, sizeof(port), "%d", port_of(&peer));
	a = address(mapped, port);
	fd = open_connected(&a);
	MUST(offloaded(fd));
	MUST(getpeername(fd, (void *)&name.ss, &name.len) == 0);
	SAME(name.len, sizeof(struct sockaddr_in6));
	MUST(memcmp(&((struct sockaddr_in6 *)&name.ss)->sin6_addr, &((struct sockaddr_in6 *)&a.ss)->sin6_addr, 16) == 0);
	name.len = sizeof(name.ss);
	MUST(getsockname(fd, (void *)&name.ss, &name.len) == 0);
	SAME(name.ss.ss_family, AF_INET6);
}

static void binding_before_connecting_is_no_obstacle(void)
{
	struct addr any = address("0.0.0.0", "0"), name = { .len = sizeof(name.ss) };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	MUST(bind(fd, (void *)&any.ss, any.len) == 0);
	MUST(getsockname(fd, (void *)&name.ss, &name.len) == 0);
	MUST(port_of(&name) != 0);
	ERRNO(bind(fd, (void *)&any.ss, any.len), EINVAL);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(offloaded(fd));
}

static void a_listener_without_bind_gets_a_port(void)
{
	struct addr name = { .len = sizeof(name.ss) }, lo;
	int fd = socket(AF_INET, SOCK_STREAM, 0), c;
	char port[8];

	MUST(listen(fd, 5) == 0);
	MUST(getsockname(fd, (void *)&name.ss, &name.len) == 0 && port_of(&name));
	snprintf(port, sizeof(port), "%d", port_of(&name));
	lo = address("127.0.0.1", port);
	c = open_connected(&lo);
	talk(c, accept(fd, NULL, NULL));
}

static void connecting_to_af_unspec_frees_the_socket(void)
{
	struct sockaddr none = { .sa_family = AF_UNSPEC };
	int fd = open_connected(&peer);

	MUST(connect(fd, &none, sizeof(none)) == 0);
	MUST(!offloaded(fd));
	ERRNO(getpeername(fd, (void *)&(struct sockaddr_storage){0}, &(socklen_t){ sizeof(none) }), ENOTCONN);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(offloaded(fd));
}

static void one_datagram_socket_may_connect_to_address_after_address(void)
{
	static const struct sockaddr none = { .sa_family = AF_UNSPEC };
	struct addr lo = address("127.0.0.1", "9");
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	char c = 0;

	/* as getaddrinfo() does to sort what it found */
	for (int i = 0; i < 3; i++) {
		MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
		MUST(offloaded(fd));
		MUST(connect(fd, &none, sizeof(none)) == 0);
		MUST(!offloaded(fd));
		ERRNO(connect(fd, (void *)&native.ss, native.len), ENETUNREACH);
		MUST(connect(fd, (void *)&lo.ss, lo.len) == 0);
		MUST(!offloaded(fd));
		MUST(connect(fd, &none, sizeof(none)) == 0);
	}
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	SAME(send(fd, "y", 1, 0), 1);
	SAME(recv(fd, &c, 1, 0), 1);
	SAME(c, 'y');
}

static void an_offloaded_datagram_socket_still_talks_inside_the_guest(void)
{
	struct addr any = address("0.0.0.0", "0"), me = { .len = sizeof(me.ss) }, lo = address("127.0.0.1", "0"), name;
	int fd = socket(AF_INET, SOCK_DGRAM, 0), other = socket(AF_INET, SOCK_DGRAM, 0);
	char c = 0, port[8];

	MUST(bind(fd, (void *)&any.ss, any.len) == 0);
	MUST(bind(other, (void *)&lo.ss, lo.len) == 0);
	name.len = sizeof(name.ss);
	MUST(getsockname(other, (void *)&name.ss, &name.len) == 0);
	SAME(sendto(fd, "a", 1, 0, (void *)&peer.ss, peer.len), 1);
	MUST(offloaded(fd));
	SAME(recv(fd, &c, 1, 0), 1);
	SAME(c, 'a');
	SAME(sendto(fd, "b", 1, 0, (void *)&name.ss, name.len), 1);
	me.len = sizeof(me.ss);
	SAME(recvfrom(other, &c, 1, 0, (void *)&me.ss, &me.len), 1);
	SAME(c, 'b');
	snprintf(port, sizeof(port), "%d", port_of(&me));
	SAME(sendto(other, "c", 1, 0, (void *)&me.ss, me.len), 1);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	SAME(recv(fd, &c, 1, 0), 1);
	SAME(c, 'c');
}

/* on a port that the policy publishes, with an option; 0: none */
static int published_listener(int option)
{
	struct addr a = address("0.0.0.0", "8081");
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	MUST(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0);
	if (option)
		MUST(setsockopt(fd, option == IP_TRANSPARENT ? IPPROTO_IP : SOL_SOCKET, option, &one, sizeof(one)) == 0);
	MUST(bind(fd, (void *)&a.ss, a.len) == 0 && listen(fd, 1) == 0);
	return fd;
}

static void sockets_tied_to_the_guests_own_stack_stay_native(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), mark = 7;

	MUST(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "lo", 3) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == -1);	/* on its way to nowhere, over loopback */
	MUST(!offloaded(fd));
	fd = socket(AF_INET, SOCK_STREAM, 0);
	MUST(setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)) == 0);
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), ENETUNREACH);
	fd = socket(AF_INET, SOCK_STREAM, 0);
	MUST(setsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &(int){1}, sizeof(int)) == 0);
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), ENETUNREACH);
	fd = published_listener(IP_TRANSPARENT);
	MUST(!offloaded(fd));
	close(fd);
	fd = published_listener(0);		/* the same without it is the device's */
	MUST(offloaded(fd));
}

static void an_address_that_the_guest_has_not_got_yet_is_bound_by_its_own_stack(void)
{
	struct addr nobodys = address("192.0.2.77", "0");
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	ERRNO(bind(fd, (void *)&nobodys.ss, nobodys.len), EADDRNOTAVAIL);
	MUST(setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &(int){1}, sizeof(int)) == 0);
	MUST(bind(fd, (void *)&nobodys.ss, nobodys.len) == 0 && listen(fd, 1) == 0);
	MUST(!offloaded(fd));
	for (int i = 0; i < 2; i++) {
		static const int types[] = { SOCK_STREAM, SOCK_DGRAM };

		fd = socket(AF_INET, types[i], 0);
		MUST(setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &(int){1}, sizeof(int)) == 0);
		MUST(bind(fd, (void *)&nobodys.ss, nobodys.len) == 0);
		ERRNO(connect(fd, (void *)&peer.ss, peer.len), ENETUNREACH);
		fd = socket(AF_INET, types[i], 0);
		MUST(setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &(int){1}, sizeof(int)) == 0);
		MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);	/* not bound: it may be the device's */
		MUST(offloaded(fd));
	}
}

static const struct sock_fprog everything = { .len = 1, .filter = (struct sock_filter[]){ { BPF_RET | BPF_K, 0, 0, 0xffffffff } } };

/* nothing of the device's passes a filter here: with one a socket is native, and later it gets none */
static void a_filter_keeps_a_socket_native_or_is_refused(void)
{
	static const int attach[] = { SO_ATTACH_FILTER, SO_ATTACH_REUSEPORT_CBPF };
	static const struct sockaddr none = { .sa_family = AF_UNSPEC };
	int fd = socket(AF_INET, SOCK_STREAM, 0), c, s, v = 0;
	struct addr a;

	MUST(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &everything, sizeof(everything)) == 0);
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), ENETUNREACH);
	MUST(setsockopt(fd, SOL_SOCKET, SO_DETACH_FILTER, &v, sizeof(v)) == 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(offloaded(fd));
	for (int i = 0; i < 2; i++) {
		MUST(setsockopt(fd, SOL_SOCKET, attach[i], &everything, sizeof(everything)) == -1);
		MUST(errno == ENOPROTOOPT || errno == EPERM);	/* EPERM: as if it were locked (SO_LOCK_FILTER), before 6.8 */
	}
	send_all(fd, "echo\nf", 6);
	recv_exactly(fd, &(char){0}, 1);
	MUST(connect(fd, &none, sizeof(none)) == 0);
	MUST(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &everything, sizeof(everything)) == 0);

	fd = published_listener(SO_REUSEPORT);
	MUST(offloaded(fd));
	for (int i = 0; i < 2; i++)
		MUST(setsockopt(fd, SOL_SOCKET, attach[i], &everything, sizeof(everything)) == -1);
	a = address("127.0.0.1", "8081");
	c = open_connected(&a);
	s = accept(fd, NULL, NULL);
	MUST(s >= 0 && !offloaded(s));
	MUST(setsockopt(s, SOL_SOCKET, SO_ATTACH_FILTER, &everything, sizeof(everything)) == 0);
	talk(c, s);
}

static void a_mark_is_not_made_on_what_the_host_sends(void)
{
	int fd = open_connected(&peer), mark = 7, v = 0;
	bool seen = setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)) == -1;

	if (seen)		/* else the kernel does not let us see the option: before 6.8 */
		SAME(errno, EPERM);
	MUST(getsockopt(fd, SOL_SOCKET, SO_MARK, &v, &(socklen_t){ sizeof(v) }) == 0);
	SAME(v, seen ? 0 : mark);
	/* what cannot be refused, and does nothing, is at least told */
	MUST(!strstr(fdinfo(fd), "hwsock-ignored:\tSO_MARK\n") == seen);
	send_all(fd, "echo\nm", 6);
	recv_exactly(fd, &(char){0}, 1);
}

/* somebody else, whom the peer owes bytes without end: this end takes what it has room for and no more */
static void what_nobody_reads_is_bounded_by_the_window(void)
{
	FILE *f = fopen("/sys/module/virtio_socket/parameters/window", "r");
	int fd = ask(&peer, "source 4194304\n"), window = 0, n = 0;

	MUST(f && fscanf(f, "%d", &window) == 1 && window > 0);
	while (n < window) {
		MUST(ioctl(fd, FIONREAD, &n) == 0);
		sched_yield();
	}
	for (int i = 0; i < 2; i++) {		/* the device has answered meanwhile, and sent what it may before that */
		struct tcp_info info;

		MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &(socklen_t){ sizeof(info) }) == 0);
		MUST(ioctl(fd, FIONREAD, &n) == 0);
		SAME(n, window);
	}
}

static void another_network_namespace_gains_nothing(void)
{
	int fd;

	MUST(unshare(CLONE_NEWNET) == 0);
	fd = socket(AF_INET, SOCK_STREAM, 0);
	ERRNO(connect(fd, (void *)&peer.ss, peer.len), ENETUNREACH);
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	ERRNO(sendto(fd, "x", 1, 0, (void *)&peer.ss, peer.len), ENETUNREACH);
}

static void multipath_tcp_sockets_are_served_and_native_ones_work(void)
{
	struct addr a;
	int fd = socket(AF_INET, SOCK_STREAM, IPPROTO_MPTCP), l, s;

	if (fd < 0 && errno == EPROTONOSUPPORT)
		return;
	MUST(fd >= 0);
	MUST(connect(fd, (void *)&peer.ss, peer.len) == 0);
	MUST(offloaded(fd));
	send_all(fd, "echo\nm", 6);
	recv_exactly(fd, &(char){0}, 1);
	close(fd);
	l = loopback_listener(AF_INET, IPPROTO_MPTCP, &a);
	fd = socket(AF_INET, SOCK_STREAM, IPPROTO_MPTCP);
	MUST(connect(fd, (void *)&a.ss, a.len) == 0);
	s = accept(l, NULL, NULL);
	MUST(s >= 0);
	talk(fd, s);
	close(fd);
	close(s);
	fd = open_connected(&a);		/* plain TCP to a multipath listener */
	s = accept(l, NULL, NULL);
	talk(fd, s);
	talk(s, fd);
}

static void ulp_and_repair_are_refused(void)
{
	int fd = open_connected(&peer);

	MUST(setsockopt(fd, IPPROTO_TCP, TCP_ULP, "tls", 3) == -1);
	MUST(setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &(int){1}, sizeof(int)) == -1);
	send_all(fd, "echo\n!", 6);
	recv_exactly(fd, &(char){0}, 1);
}

static void fast_open_sends_with_the_connect(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	char c = 0;

	SAME(sendto(fd, "echo\nf", 6, MSG_FASTOPEN, (void *)&peer.ss, peer.len), 6);
	recv_exactly(fd, &c, 1);
	SAME(c, 'f');
}

/* many threads decide about one socket at once: one connection comes of it, and every call returns */
static int race_fd;
static pthread_barrier_t race_start;

static void *race_thread(void *arg)
{
	struct addr lo = address("127.0.0.1", "9");
	char c;

	pthread_barrier_wait(&race_start);
	switch ((long)arg % 5) {
	case 0: connect(race_fd, (void *)&peer.ss, peer.len); break;
	case 1: connect(race_fd, (void *)&native.ss, native.len); break;
	case 2: connect(race_fd, (void *)&lo.ss, lo.len); break;
	case 3: recv(race_fd, &c, 1, MSG_DONTWAIT); listen(race_fd, 1); break;
	case 4: shutdown(race_fd, SHUT_RDWR); send(race_fd, "x", 1, MSG_NOSIGNAL | MSG_DONTWAIT); break;
	}
	return NULL;
}

static void threads_that_race_for_one_socket_all_return(void)
{
	MUST(pthread_barrier_init(&race_start, NULL, 10) == 0);
	for (int round = 0; round < 150; round++) {
		pthread_t t[10];

		race_fd = socket(AF_INET, SOCK_STREAM | (round & 1 ? SOCK_NONBLOCK : 0), 0);
		MUST(race_fd >= 0);
		for (long i = 0; i < 10; i++)
			MUST(pthread_create(&t[i], NULL, race_thread, (void *)(i + round)) == 0);
		for (int i = 0; i < 10; i++)
			pthread_join(t[i], NULL);
		close(race_fd);
	}
}

/*
 * A listen() that waits behind another one, while a shutdown() and a connect() change what the socket is: it may not leave the guest's own
 * socket listening behind a connection of the device. The kernel would complain on the console when such a socket is freed.
 */
static void *relisten_thread(void *arg)
{
	pthread_barrier_wait(&race_start);
	switch ((long)arg % 4) {
	case 0: case 1: listen(race_fd, 1); break;
	case 2: shutdown(race_fd, SHUT_RDWR); break;
	case 3: connect(race_fd, (void *)&peer.ss, peer.len); break;
	}
	return NULL;
}

static void a_listener_that_changes_hands_is_connected_or_listening(void)
{
	struct addr any = address("0.0.0.0", "0"), name;

	MUST(pthread_barrier_init(&race_start, NULL, 8) == 0);
	for (int round = 0; round < 150; round++) {
		int listens, connected;
		pthread_t t[8];

		race_fd = socket(AF_INET, SOCK_STREAM, 0);
		MUST(race_fd >= 0);
		MUST(bind(race_fd, (void *)&any.ss, any.len) == 0);
		for (long i = 0; i < 8; i++)
			MUST(pthread_create(&t[i], NULL, relisten_thread, (void *)(i + round)) == 0);
		for (int i = 0; i < 8; i++)
			pthread_join(t[i], NULL);
		name.len = sizeof(name.ss);
		connected = getpeername(race_fd, (void *)&name.ss, &name.len) == 0;
		MUST(getsockopt(race_fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &(socklen_t){ sizeof(listens) }) == 0);
		MUST(!(listens && connected));
		close(race_fd);
	}
}

static void closing_while_connecting_leaves_nothing_behind(void)
{
	char line[512];
	FILE *f;
	int n;

	for (int i = 0; i < 200; i++) {
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

		ERRNO(connect(fd, i & 1 ? (void *)&peer.ss : (void *)&native.ss, peer.len), EINPROGRESS);
		close(fd);
	}
	f = fopen("/proc/net/hwsock", "r");
	for (n = 0; fgets(line, sizeof(line), f); n++)
		;
	SAME(n, 1);		/* the heading */
}

int main(int argc, char **argv)
{
	if (argc != 6) {
		fprintf(stderr, "usage: takeover_check PEER PORT PEER6 PORT6 NATIVE_HOST\n");
		return 2;
	}
	peer = address(argv[1], argv[2]);
	peer6 = address(argv[3], argv[4]);
	native = address(argv[5], "80");
	C(an_offloaded_socket_is_listed_with_its_peer);
	C(loopback_stays_native);
	C(a_refusing_loopback_port_leaves_the_socket_undecided);
	C(what_the_device_refuses_fails_as_natively);
	C(what_the_device_refuses_fails_through_so_error_when_nonblocking);
	C(ipv6_and_v4_mapped_peers_are_served);
	C(binding_before_connecting_is_no_obstacle);
	C(a_listener_without_bind_gets_a_port);
	C(connecting_to_af_unspec_frees_the_socket);
	C(one_datagram_socket_may_connect_to_address_after_address);
	C(an_offloaded_datagram_socket_still_talks_inside_the_guest);
	C(sockets_tied_to_the_guests_own_stack_stay_native);
	C(an_address_that_the_guest_has_not_got_yet_is_bound_by_its_own_stack);
	C(a_filter_keeps_a_socket_native_or_is_refused);
	C(a_mark_is_not_made_on_what_the_host_sends);
	C(what_nobody_reads_is_bounded_by_the_window);
	C(another_network_namespace_gains_nothing);
	C(multipath_tcp_sockets_are_served_and_native_ones_work);
	C(ulp_and_repair_are_refused);
	C(fast_open_sends_with_the_connect);
	C(threads_that_race_for_one_socket_all_return);
	C(a_listener_that_changes_hands_is_connected_or_listening);
	C(closing_while_connecting_leaves_nothing_behind);
	return finish_checks();
}
