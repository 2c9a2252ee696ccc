// SPDX-License-Identifier: BSD-3-Clause
/*
 * memory_check PEER PORT GO - what a program sends is charged to its memory cgroup while it waits for the device.
 *
 * For a guest with the module, run as root. Prints "ready" once it has its connections to tests/e2e/peer.py; then the back-end is stopped, and the file
 * GO is made.
 */
#include "check.h"
#include <sys/mount.h>
#include <sys/stat.h>

enum { CONNECTIONS = 16 };

static struct addr peer;
static const char *go, *folder;

/* below @folder */
static FILE *control(const char *file, const char *mode)
{
	char path[128];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", folder, file);
	f = fopen(path, mode);
	if (!f)
		fail("%s: %s", path, strerror(errno));
	return f;
}

static void put(const char *file, const char *value)
{
	FILE *f = control(file, "w");

	MUST(fputs(value, f) >= 0);
	MUST(fclose(f) == 0);
}

static long long charged(void)
{
	FILE *f = control("own/memory.current", "r");
	long long bytes;

	MUST(fscanf(f, "%lld", &bytes) == 1);
	fclose(f);
	return bytes;
}

static void what_waits_for_the_device_is_charged(void)
{
	char name[] = "/tmp/memory.XXXXXX", own[64];
	static char data[65536];
	int fds[CONNECTIONS];
	long long before, sent = 0;

	folder = mkdtemp(name);
	MUST(folder && mount("none", folder, "cgroup2", 0, NULL) == 0);
	put("cgroup.subtree_control", "+memory");
	snprintf(own, sizeof(own), "%s/own", folder);
	MUST(mkdir(own, 0755) == 0);
	put("own/cgroup.procs", "0");
	memset(data, 'x', sizeof(data));
	for (int i = 0; i < CONNECTIONS; i++) {
		fds[i] = ask(&peer, "sink\n");
		MUST(fcntl(fds[i], F_SETFL, O_NONBLOCK) == 0);
	}
	fprintf(stderr, "ready\n");
	while (access(go, F_OK))
		usleep(10000);
	before = charged();
	for (int i = 0; i < CONNECTIONS; i++) {
		ssize_t n;

		while ((n = send(fds[i], data, sizeof(data), MSG_NOSIGNAL)) > 0)
			sent += n;
		SAME(errno, EAGAIN);
	}
	MUST(sent >= 2 << 20);		/* much more than the kernel charges ahead */
	MUST(charged() - before >= sent / 2);
}

int main(int argc, char **argv)
{
	peer = only_peer(argc == 4 ? 3 : 0, argv);
	go = argv[3];
	C(what_waits_for_the_device_is_charged);
	return finish_checks();
}
