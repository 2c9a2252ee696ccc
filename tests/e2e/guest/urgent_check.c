// SPDX-License-Identifier: BSD-3-Clause
/*
 * urgent_check PEER PORT - urgent data of TCP (tcp(7), "out of band"), which telnet, rlogin and ftp speak. PEER PORT is tests/e2e/peer.py.
 *
 * "urgent N" makes the peer send N bytes of the pattern, 'U' as urgent data, and "after". "mark" makes it say what it gets before the
 * mark, as urgent data, and after it.
 */
#include "check.h"
#include <linux/sockios.h>

enum { BEFORE = 1000 };

static struct addr peer;

/* a connection on which all of that has arrived */
static int urgent(void)
{
	int fd = ask(&peer, "urgent 1000\n");

	MUST(wait_for(fd, POLLPRI) & POLLPRI);
	return fd;
}

static int at_mark(int fd)
{
	int v = -1;

	MUST(ioctl(fd, SIOCATMARK, &v) == 0);
	return v;
}

static void read_to_the_mark(int fd)
{
	uint8_t buf[2 * BEFORE];

	SAME(at_mark(fd), 0);
	SAME(recv(fd, buf, sizeof(buf), MSG_WAITALL), BEFORE);	/* a read never goes past it */
	for (int i = 0; i < BEFORE; i++)
		SAME(buf[i], pattern(i));
	SAME(at_mark(fd), 1);
}

static void read_the_rest(int fd)
{
	char buf[5];

	recv_exactly(fd, buf, sizeof(buf));
	MUST(memcmp(buf, "after", 5) == 0);
	SAME(at_mark(fd), 0);
}

static void an_urgent_byte_is_told_and_read_out_of_band(void)
{
	int fd = urgent(), n = -1;
	struct pollfd p = { .fd = fd, .events = POLLPRI };
	uint8_t before[BEFORE];
	char c = 0;

	SAME(recv(fd, &c, 1, MSG_OOB | MSG_PEEK), 1);
	SAME(c, 'U');
	SAME(recv(fd, before, BEFORE, MSG_PEEK | MSG_WAITALL), BEFORE);	/* word of it may be ahead of them */
	c = 0;
	SAME(recv(fd, &c, 1, MSG_OOB), 1);
	SAME(c, 'U');
	SAME(poll(&p, 1, 0), 0);
	ERRNO(recv(fd, &c, 1, MSG_OOB), EINVAL);	/* once */
	MUST(ioctl(fd, FIONREAD, &n) == 0);
	SAME(n, BEFORE);				/* up to the mark */
	read_to_the_mark(fd);
	read_the_rest(fd);
}

static void an_urgent_byte_that_nobody_reads_is_not_in_the_stream(void)
{
	int fd = urgent();

	read_to_the_mark(fd);
	read_the_rest(fd);
	ERRNO(recv(fd, &(char){0}, 1, MSG_OOB), EINVAL);
}

static void in_line_it_is_the_byte_behind_the_mark(void)
{
	int fd = urgent();
	char c = 0;

	MUST(setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &(int){1}, sizeof(int)) == 0);
	ERRNO(recv(fd, &c, 1, MSG_OOB), EINVAL);
	read_to_the_mark(fd);
	MUST(wait_for(fd, POLLIN) & POLLIN);
	recv_exactly(fd, &c, 1);
	SAME(c, 'U');
	read_the_rest(fd);
}

static void peeking_does_not_move_the_mark(void)
{
	int fd = urgent();
	char buf[2 * BEFORE];

	SAME(recv(fd, buf, sizeof(buf), MSG_PEEK), BEFORE);
	SAME(recv(fd, buf, BEFORE, 0), BEFORE);
	SAME(at_mark(fd), 1);
	SAME(recv(fd, buf, 5, MSG_PEEK | MSG_WAITALL), 5);
	MUST(memcmp(buf, "after", 5) == 0);
	SAME(at_mark(fd), 1);
	read_the_rest(fd);
}

static void sigurg_goes_to_the_owner(void)
{
	int fd = open_connected(&peer), sig;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGURG);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
	MUST(fcntl(fd, F_SETOWN, getpid()) == 0);
	send_all(fd, "urgent 1000\n", 12);
	MUST(sigwait(&set, &sig) == 0);
	SAME(sig, SIGURG);
}

static void without_urgent_data_there_is_none(void)
{
	int fd = ask(&peer, "echo\nq");

	recv_exactly(fd, &(char){0}, 1);
	SAME(at_mark(fd), 0);
	ERRNO(recv(fd, &(char){0}, 1, MSG_OOB), EINVAL);
	ERRNO(recv(fd, &(char){0}, 1, MSG_OOB | MSG_DONTWAIT), EINVAL);
}

static void the_last_byte_of_an_urgent_send_is_urgent_for_the_peer(void)
{
	int fd = ask(&peer, "mark\n");
	char answer[32] = "";
	size_t got = 0;
	ssize_t n;

	recv_exactly(fd, answer, 3);		/* "go\n": it reads byte by byte from here on */
	send_all(fd, "abc", 3);
	SAME(send(fd, "dX", 2, MSG_OOB | MSG_NOSIGNAL), 2);
	send_all(fd, "efg", 3);
	MUST(shutdown(fd, SHUT_WR) == 0);
	while ((n = recv(fd, answer + got, sizeof(answer) - 1 - got, 0)) > 0)
		got += n;
	SAME(n, 0);
	if (strcmp(answer, "abcd X efg\n"))
		fail("the peer got \"%s\"", answer);
}

int main(int argc, char **argv)
{
	peer = only_peer(argc, argv);
	C(an_urgent_byte_is_told_and_read_out_of_band);
	C(an_urgent_byte_that_nobody_reads_is_not_in_the_stream);
	C(in_line_it_is_the_byte_behind_the_mark);
	C(peeking_does_not_move_the_mark);
	C(sigurg_goes_to_the_owner);
	C(without_urgent_data_there_is_none);
	C(the_last_byte_of_an_urgent_send_is_urgent_for_the_peer);
	return finish_checks();
}
