// SPDX-License-Identifier: BSD-3-Clause
/*
 * dgram_server_check PORT SERVED - what a UDP server may rely on. On SERVED it serves tests/e2e/peer.py's drive_datagram_server().
 */
#include <ctype.h>
#include "check.h"

static const char *port, *served;

static int bound(const char *host, const char *at)
{
	struct addr a = address(host, at);
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	MUST(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){ 1 }, sizeof(int)) == 0);
	MUST(bind(fd, (void *)&a.ss, a.len) == 0);
	return fd;
}

static void a_bound_socket_has_a_name_and_no_peer(void)
{
	struct addr name = { .len = sizeof(name.ss) };
	int fd = bound("0.0.0.0", port);

	MUST(getsockname(fd, (void *)&name.ss, &name.len) == 0);
	SAME(port_of(&name), atoi(port));
	ERRNO(getpeername(fd, (void *)&name.ss, &name.len), ENOTCONN);
	ERRNO(send(fd, "x", 1, 0), EDESTADDRREQ);
	ERRNO(bind(fd, (void *)&name.ss, sizeof(struct sockaddr_in)), EINVAL);
}

static void it_talks_over_loopback_too(void)
{
	struct addr to = address("127.0.0.1", port), from = { .len = sizeof(from.ss) };
	int server = bound("0.0.0.0", port), client = socket(AF_INET, SOCK_DGRAM, 0);
	char buf[16];

	SAME(sendto(client, "inside", 6, 0, (void *)&to.ss, to.len), 6);
	MUST(wait_for(server, POLLIN) & POLLIN);
	SAME(recvfrom(server, buf, sizeof(buf), 0, (void *)&from.ss, &from.len), 6);
	MUST(((struct sockaddr_in *)&from.ss)->sin_addr.s_addr == htonl(INADDR_LOOPBACK));
	SAME(sendto(server, "back", 4, 0, (void *)&from.ss, from.len), 4);
	SAME(recv(client, buf, sizeof(buf), 0), 4);
	MUST(memcmp(buf, "back", 4) == 0);
}

static void it_may_send_to_itself(void)
{
	struct addr to = address("127.0.0.1", port);
	int fd = bound("0.0.0.0", port);
	char c = 0;

	SAME(sendto(fd, "s", 1, 0, (void *)&to.ss, to.len), 1);
	SAME(recv(fd, &c, 1, 0), 1);
	SAME(c, 's');
}

/* a client that asked for it is the only one heard, until it says otherwise */
static void serve_connected(int fd, const struct addr *client)
{
	struct addr name = { .len = sizeof(name.ss) };
	char buf[100];
	ssize_t n;

	MUST(connect(fd, (void *)&client->ss, client->len) == 0);
	MUST(getpeername(fd, (void *)&name.ss, &name.len) == 0);
	SAME(port_of(&name), port_of(client));
	SAME(send(fd, "CONNECTED", 9, 0), 9);
	n = recv(fd, buf, sizeof(buf), 0);
	MUST(n == 5 && !memcmp(buf, "again", 5));
	SAME(send(fd, "AGAIN", 5, 0), 5);
	n = recv(fd, buf, sizeof(buf), 0);
	MUST(n == 10 && !memcmp(buf, "disconnect", 10));
	MUST(connect(fd, &(struct sockaddr){ .sa_family = AF_UNSPEC }, sizeof(struct sockaddr)) == 0);
	ERRNO(getpeername(fd, (void *)&name.ss, &name.len), ENOTCONN);
	name.len = sizeof(name.ss);
	MUST(getsockname(fd, (void *)&name.ss, &name.len) == 0);
	SAME(port_of(&name), atoi(served));
	SAME(sendto(fd, "DISCONNECTED", 12, 0, (void *)&client->ss, client->len), 12);
}

/* what a server does that serves each client on a socket of its own: connect this one, bind the next */
static void serve_accepted(int fd, const struct addr *client)
{
	char buf[100];
	ssize_t n;
	int next;

	MUST(connect(fd, (void *)&client->ss, client->len) == 0);
	next = bound("0.0.0.0", served);
	SAME(send(fd, "ACCEPTED", 8, 0), 8);
	for (;;) {
		struct pollfd both[] = { { .fd = fd, .events = POLLIN }, { .fd = next, .events = POLLIN } };
		struct addr from = { .len = sizeof(from.ss) };

		MUST(poll(both, 2, 60000) > 0);
		if (both[1].revents) {
			n = recvfrom(next, buf, sizeof(buf), MSG_DONTWAIT, (void *)&from.ss, &from.len);
			MUST(n == 5 && !memcmp(buf, "other", 5));
			MUST(port_of(&from) != port_of(client));
			SAME(sendto(next, "OTHER", 5, 0, (void *)&from.ss, from.len), 5);
		}
		if (!both[0].revents)
			continue;
		n = recv(fd, buf, sizeof(buf), MSG_DONTWAIT);
		if (n == 5 && !memcmp(buf, "leave", 5))
			break;
		MUST(n == 4 && !memcmp(buf, "mine", 4));
		SAME(send(fd, "MINE", 4, 0), 4);
	}
	MUST(close(next) == 0);
	MUST(connect(fd, &(struct sockaddr){ .sa_family = AF_UNSPEC }, sizeof(struct sockaddr)) == 0);
	SAME(sendto(fd, "LEFT", 4, 0, (void *)&client->ss, client->len), 4);
}

static void each_client_gets_its_own_answer_in_capitals(void)
{
	static char buf[65536];
	int fd = bound("0.0.0.0", served);
	bool last = false;

	while (!last) {
		struct addr from = { .len = sizeof(from.ss) };
		ssize_t n;

		MUST(wait_for(fd, POLLIN) & POLLIN);
		n = recvfrom(fd, buf, sizeof(buf), MSG_DONTWAIT, (void *)&from.ss, &from.len);
		MUST(n >= 0 && from.len == sizeof(struct sockaddr_in));
		last = n == 4 && !memcmp(buf, "quit", 4);
		if (n == 7 && !memcmp(buf, "connect", 7)) {
			serve_connected(fd, &from);
			continue;
		}
		if (n == 6 && !memcmp(buf, "accept", 6)) {
			serve_accepted(fd, &from);
			continue;
		}
		for (ssize_t i = 0; i < n; i++)
			if (buf[i] >= 'a' && buf[i] <= 'z')
				buf[i] = toupper(buf[i]);
		SAME(sendto(fd, buf, n, 0, (void *)&from.ss, from.len), n);
	}
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: dgram_server_check PORT SERVED\n");
		return 2;
	}
	port = argv[1];
	served = argv[2];
	C(a_bound_socket_has_a_name_and_no_peer);
	C(it_talks_over_loopback_too);
	C(it_may_send_to_itself);
	C(each_client_gets_its_own_answer_in_capitals);
	return finish_checks();
}
