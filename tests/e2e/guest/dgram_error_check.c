// SPDX-License-Identifier: BSD-3-Clause
/*
 * dgram_error_check PEER PORT CLOSED - what a UDP client hears of its datagrams. tests/e2e/peer.py serves on PORT, nobody on CLOSED.
 */
#include "check.h"
#include <time.h>
#include <linux/errqueue.h>

static struct addr peer, closed;

struct heard {
	struct sock_extended_err ee;
	struct sockaddr_storage offender;
	struct sockaddr_storage to;
	char data[64];
	ssize_t len;
	int flags;
};

static int opened(bool recverr)
{
	bool six = peer.ss.ss_family == AF_INET6;
	int fd = socket(peer.ss.ss_family, SOCK_DGRAM, 0);

	MUST(fd >= 0);
	if (recverr)
		MUST(setsockopt(fd, six ? SOL_IPV6 : SOL_IP, six ? IPV6_RECVERR : IP_RECVERR, &(int){ 1 }, sizeof(int)) == 0);
	return fd;
}

/* the next entry of the error queue, once there is one */
static struct heard error_of(int fd)
{
	struct heard h = { .len = 0 };
	char control[512];
	struct iovec iov = { h.data, sizeof(h.data) };
	struct msghdr m = {
		.msg_name = &h.to, .msg_namelen = sizeof(h.to), .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
		.msg_controllen = sizeof(control),
	};
	int found = 0;

	MUST(wait_for(fd, 0) & POLLERR);
	h.len = recvmsg(fd, &m, MSG_ERRQUEUE);
	MUST(h.len >= 0);
	h.flags = m.msg_flags;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		if ((c->cmsg_level != SOL_IP || c->cmsg_type != IP_RECVERR) && (c->cmsg_level != SOL_IPV6 || c->cmsg_type != IPV6_RECVERR))
			continue;
		memcpy(&h.ee, CMSG_DATA(c), sizeof(h.ee));
		memcpy(&h.offender, SO_EE_OFFENDER((struct sock_extended_err *)CMSG_DATA(c)),
		       c->cmsg_len - CMSG_LEN(sizeof(struct sock_extended_err)));
		found++;
	}
	SAME(found, 1);
	return h;
}

static void check_refusal(const struct heard *h)
{
	struct addr to = { .ss = h->to };
	bool six = peer.ss.ss_family == AF_INET6;

	SAME(h->ee.ee_errno, ECONNREFUSED);
	SAME(h->ee.ee_origin, six ? SO_EE_ORIGIN_ICMP6 : SO_EE_ORIGIN_ICMP);
	SAME(h->ee.ee_type, six ? 1 : 3);
	SAME(h->ee.ee_code, six ? 4 : 3);
	SAME(h->offender.ss_family, peer.ss.ss_family);
	MUST(h->flags & MSG_ERRQUEUE);
	SAME(h->to.ss_family, peer.ss.ss_family);
	SAME(port_of(&to), port_of(&closed));
	SAME(h->len, 8);
	MUST(memcmp(h->data, "anybody?", 8) == 0);
}

static void a_connected_socket_is_refused_on_the_next_call(void)
{
	int fd = opened(false), error = 0;
	socklen_t len = sizeof(error);

	MUST(connect(fd, (void *)&closed.ss, closed.len) == 0);
	SAME(send(fd, "anybody?", 8, 0), 8);
	MUST(wait_for(fd, POLLIN) & POLLERR);
	ERRNO(recv(fd, &(char){0}, 1, 0), ECONNREFUSED);
	ERRNO(recv(fd, &(char){0}, 1, MSG_DONTWAIT), EAGAIN);
	SAME(send(fd, "anybody?", 8, 0), 8);
	MUST(wait_for(fd, POLLIN) & POLLERR);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
	SAME(error, ECONNREFUSED);
	SAME(send(fd, "anybody?", 8, 0), 8);
	MUST(wait_for(fd, POLLIN) & POLLERR);
	ERRNO(send(fd, "anybody?", 8, 0), ECONNREFUSED);
}

static void a_blocked_reader_hears_of_it(void)
{
	int fd = opened(false);

	MUST(connect(fd, (void *)&closed.ss, closed.len) == 0);
	SAME(send(fd, "anybody?", 8, 0), 8);
	ERRNO(recv(fd, &(char){0}, 1, 0), ECONNREFUSED);
}

static void an_unconnected_socket_that_did_not_ask_hears_nothing(void)
{
	int fd = opened(false), error = 1;
	socklen_t len = sizeof(error);
	char buf[16];

	SAME(sendto(fd, "anybody?", 8, 0, (void *)&closed.ss, closed.len), 8);
	SAME(sendto(fd, "hello", 5, 0, (void *)&peer.ss, peer.len), 5);
	SAME(recv(fd, buf, sizeof(buf), 0), 5);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
	SAME(error, 0);
	ERRNO(recv(fd, buf, sizeof(buf), MSG_ERRQUEUE), EAGAIN);
}

static void one_that_asked_finds_it_in_the_error_queue(void)
{
	int fd = opened(true), error = 0;
	socklen_t len = sizeof(error);
	struct heard h;

	SAME(sendto(fd, "anybody?", 8, 0, (void *)&closed.ss, closed.len), 8);
	h = error_of(fd);
	check_refusal(&h);
	ERRNO(recv(fd, &(char){0}, 1, MSG_ERRQUEUE), EAGAIN);
	MUST(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
	MUST(error == 0 || error == ECONNREFUSED);	/* reading the queue may have cleared it */
}

static void so_does_a_connected_one_and_the_queue_keeps_several(void)
{
	int fd = opened(true);
	struct heard h;

	MUST(connect(fd, (void *)&closed.ss, closed.len) == 0);
	SAME(send(fd, "anybody?", 8, 0), 8);
	MUST(wait_for(fd, 0) & POLLERR);
	ERRNO(send(fd, "x", 1, 0), ECONNREFUSED);
	h = error_of(fd);
	check_refusal(&h);
	SAME(send(fd, "anybody?", 8, 0), 8);
	h = error_of(fd);
	check_refusal(&h);
}

static void the_option_may_be_set_later_and_the_socket_lives_on(void)
{
	bool six = peer.ss.ss_family == AF_INET6;
	int fd = opened(false);
	char buf[16];
	struct heard h;

	SAME(sendto(fd, "hello", 5, 0, (void *)&peer.ss, peer.len), 5);
	SAME(recv(fd, buf, sizeof(buf), 0), 5);
	MUST(setsockopt(fd, six ? SOL_IPV6 : SOL_IP, six ? IPV6_RECVERR : IP_RECVERR, &(int){ 1 }, sizeof(int)) == 0);
	SAME(sendto(fd, "anybody?", 8, 0, (void *)&closed.ss, closed.len), 8);
	h = error_of(fd);
	check_refusal(&h);
	getsockopt(fd, SOL_SOCKET, SO_ERROR, &(int){ 0 }, &(socklen_t){ sizeof(int) });
	SAME(sendto(fd, "again", 5, 0, (void *)&peer.ss, peer.len), 5);
	SAME(recv(fd, buf, sizeof(buf), 0), 5);
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: %s PEER PORT CLOSED\n", argv[0]);
		return 2;
	}
	peer = address(argv[1], argv[2]);
	closed = address(argv[1], argv[3]);
	C(a_connected_socket_is_refused_on_the_next_call);
	C(a_blocked_reader_hears_of_it);
	C(an_unconnected_socket_that_did_not_ask_hears_nothing);
	C(one_that_asked_finds_it_in_the_error_queue);
	C(so_does_a_connected_one_and_the_queue_keeps_several);
	C(the_option_may_be_set_later_and_the_socket_lives_on);
	return finish_checks();
}
