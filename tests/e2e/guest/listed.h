/* SPDX-License-Identifier: BSD-3-Clause */
/* listed.h - for those check programs that are about the module itself: is this socket offloaded? */
#ifndef LISTED_H
#define LISTED_H

#include "check.h"
#include <sys/stat.h>

/* the line of this socket in /proc/net/hwsock, "" if it is not offloaded */
__attribute__((unused))
static const char *listed(int fd)
{
	static char line[512];
	FILE *f = fopen("/proc/net/hwsock", "r");
	unsigned long inode;
	struct stat st;

	MUST(f && fstat(fd, &st) == 0);
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "%*s %*s %*s %*s %*s %*s %*s %lu", &inode) == 1 && inode == st.st_ino)
			break;
	if (feof(f))
		line[0] = 0;
	fclose(f);
	return line;
}

__attribute__((unused))
static int offloaded(int fd)
{
	return listed(fd)[0] != 0;
}

#endif
