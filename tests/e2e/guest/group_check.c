// SPDX-License-Identifier: BSD-3-Clause
/*
 * group_check PORT GROUP OTHER - multicast groups of a server on PORT, which is published with GROUP. Its client on the host says what to do.
 */
#include "check.h"

static const char *port, *group, *other;

static int bound(void)
{
	struct addr any = address("0.0.0.0", port);
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	MUST(fd >= 0);
	MUST(bind(fd, (void *)&any.ss, any.len) == 0);
	return fd;
}

static struct ip_mreqn member(const char *of, int ifindex)
{
	struct ip_mreqn m = { .imr_ifindex = ifindex };

	MUST(inet_pton(AF_INET, of, &m.imr_multiaddr) == 1);
	return m;
}

static int join(int fd, struct ip_mreqn m)
{
	return setsockopt(fd, SOL_IP, IP_ADD_MEMBERSHIP, &m, sizeof(m));
}

static int leave(int fd, struct ip_mreqn m)
{
	return setsockopt(fd, SOL_IP, IP_DROP_MEMBERSHIP, &m, sizeof(m));
}

/* is anybody in this kernel in the group? */
static bool joined_here(const char *of)
{
	FILE *f = fopen("/proc/net/igmp", "r");
	char line[200], word[12];
	struct in_addr in;
	bool found = false;

	MUST(f && inet_pton(AF_INET, of, &in) == 1);
	snprintf(word, sizeof(word), "%08X", in.s_addr);
	while (fgets(line, sizeof(line), f))
		found |= strstr(line, word) != NULL;
	fclose(f);
	return found;
}

static void a_group_that_the_policy_names_is_joined_on_the_host_and_heard_until_it_is_left(void)
{
	struct ip_mreq old = { .imr_multiaddr = member(group, 0).imr_multiaddr };	/* without an interface number */
	struct addr from;
	bool heard = false, left = false;
	char data[100];
	int fd = bound();

	MUST(setsockopt(fd, SOL_IP, IP_ADD_MEMBERSHIP, &old, sizeof(old)) == 0);
	MUST(!joined_here(group));
	ERRNO(join(fd, member(group, 0)), EADDRINUSE);
	for (;;) {
		ssize_t n;

		from.len = sizeof(from.ss);
		n = recvfrom(fd, data, sizeof(data) - 1, 0, (void *)&from.ss, &from.len);
		MUST(n > 0);
		data[n] = 0;
		if (!strcmp(data, "quit"))
			break;
		if (!strcmp(data, "leave") && !left) {
			MUST(leave(fd, member(group, 0)) == 0);
			left = true;
		}
		if (!strcmp(data, "to the group")) {
			MUST(!left);
			heard = true;
		}
		SAME(sendto(fd, data, (size_t)n, 0, (void *)&from.ss, from.len), n);
	}
	MUST(heard && left);
	ERRNO(leave(fd, member(group, 0)), ENODEV);	/* it is the guest's to answer again, which has no interface */
}

static void a_group_that_it_does_not_name_is_the_guests_or_an_error(void)
{
	int fd = bound();

	ERRNO(join(fd, member(other, 0)), ENODEV);	/* there is no interface with a route to groups */
	MUST(join(fd, member(other, 1)) == 0);
	MUST(joined_here(other));
	MUST(leave(fd, member(other, 1)) == 0);
	MUST(!joined_here(other));
}

static void an_interface_of_the_guest_joins_in_the_guest(void)
{
	int fd = bound();

	MUST(join(fd, member(group, 1)) == 0);
	MUST(joined_here(group));
	MUST(leave(fd, member(group, 1)) == 0);
}

static void nothing_but_a_group_is_joined(void)
{
	int fd = bound();

	ERRNO(join(fd, member("10.0.0.5", 0)), EINVAL);
	ERRNO(setsockopt(fd, SOL_IP, IP_ADD_MEMBERSHIP, "", 1), EINVAL);
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: %s PORT GROUP OTHER\n", argv[0]);
		return 2;
	}
	port = argv[1];
	group = argv[2];
	other = argv[3];
	C(a_group_that_the_policy_names_is_joined_on_the_host_and_heard_until_it_is_left);
	C(a_group_that_it_does_not_name_is_the_guests_or_an_error);
	C(an_interface_of_the_guest_joins_in_the_guest);
	C(nothing_but_a_group_is_joined);
	return finish_checks();
}
