// SPDX-License-Identifier: BSD-3-Clause
/*
 * loop_check INTERFACE COUNT: sends COUNT frames of all sizes, 16 at a time, on an interface whose other end sends back what it gets,
 * and compares what comes back, in order. Says "COUNT frames came back"; exit status 1 says what did not.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum {
	TYPE = 0x88b5,		/* local experiments (IEEE 802) */
	WINDOW = 16,
	PATIENCE = 20000	/* ms until a frame counts as lost */
};

static unsigned char mac[ETH_ALEN];

static size_t make(unsigned char *frame, unsigned int number)
{
	size_t size = ETH_ZLEN + number * 37 % (ETH_FRAME_LEN - ETH_ZLEN + 1), i;

	memcpy(frame, mac, ETH_ALEN);	/* to ourselves, or we would not be given it */
	memcpy(frame + ETH_ALEN, mac, ETH_ALEN);
	frame[12] = TYPE >> 8;
	frame[13] = TYPE & 0xff;
	for (i = ETH_HLEN; i < size; i++)
		frame[i] = (unsigned char)(number * 31 + i);
	return size;
}

static int fail(const char *what, unsigned int number)
{
	printf("frame %u: %s: %s\n", number, what, strerror(errno));
	return 1;
}

/* the next frame that comes in, not one of ours on its way out */
static ssize_t take(int fd, unsigned char *frame, size_t room)
{
	struct pollfd poller = { .fd = fd, .events = POLLIN };
	struct sockaddr_ll from;
	ssize_t size;

	do {
		socklen_t len = sizeof(from);

		if (poll(&poller, 1, PATIENCE) <= 0) {
			errno = ETIMEDOUT;
			return -1;
		}
		size = recvfrom(fd, frame, room, 0, (struct sockaddr *)&from, &len);
	} while (size >= 0 && from.sll_pkttype == PACKET_OUTGOING);
	return size;
}

int main(int argc, char **argv)
{
	struct sockaddr_ll at = { .sll_family = AF_PACKET, .sll_protocol = htons(TYPE) };
	unsigned char want[ETH_FRAME_LEN], got[2 * ETH_FRAME_LEN];
	unsigned int count, sent = 0, back = 0;
	struct ifreq request = { 0 };
	size_t size;
	int fd;

	if (argc != 3)
		return fputs("usage: loop_check INTERFACE COUNT\n", stderr), 2;
	count = atoi(argv[2]);
	fd = socket(AF_PACKET, SOCK_RAW, htons(TYPE));
	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", argv[1]);
	if (fd < 0 || ioctl(fd, SIOCGIFHWADDR, &request) < 0)
		return fail(argv[1], 0);
	memcpy(mac, request.ifr_hwaddr.sa_data, ETH_ALEN);
	at.sll_ifindex = if_nametoindex(argv[1]);
	if (bind(fd, (struct sockaddr *)&at, sizeof(at)) < 0)
		return fail("bind", 0);
	while (back < count) {
		for (; sent < count && sent - back < WINDOW; sent++) {
			size = make(want, sent);
			if (send(fd, want, size, 0) != (ssize_t)size)
				return fail("send", sent);
		}
		size = make(want, back);
		if (take(fd, got, sizeof(got)) != (ssize_t)size || memcmp(got, want, size))
			return fail("did not come back as it was sent", back);
		back++;
	}
	printf("%u frames came back\n", back);
	return 0;
}
