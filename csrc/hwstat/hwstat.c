// SPDX-License-Identifier: BSD-3-Clause
/*
 * hwstat.c - offloaded sockets as ss shows others.
 *
 * The kernel's list is /proc/net/hwsock, a line a socket under a heading that names its columns: columns are found by name, so that this
 * program and a newer or older module understand each other. Who has a socket open is told by the links /proc/PID/fd/N to "socket:[INODE]".
 * Both are snapshots, taken one after the other: a socket that went between them shows no process.
 *
 * Nothing is trusted to fit: what is too long for its column pushes the line out, as with ss.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char help[] =
	"hwstat - show the sockets that the host serves\n"
	"\n"
	"Usage: hwstat [-t] [-u] [-l | -a] [-n] [-p] [-e] [-H]\n"
	"\n"
	"Lists the offloaded sockets of this network namespace, one line each, in the columns of ss(8). Those are not in ss and /proc/net/tcp.\n"
	"Without -l or -a: connections and datagram sockets with a peer.\n"
	"\n"
	"  -t, --tcp        TCP and MPTCP\n"
	"  -u, --udp        UDP and ping; with -t: both, as without either\n"
	"  -l, --listening  listeners and datagram servers\n"
	"  -a, --all        those and the others\n"
	"  -n, --numeric    ports as numbers, not as /etc/services calls them\n"
	"  -p, --processes  who has the socket open; of other users' processes only root is told\n"
	"  -e, --extended   uid, inode, the flow's number in the back-end's log, its ring pair, datagrams dropped\n"
	"  -H, --no-header  no heading\n"
	"  -h, --help       this text\n"
	"\n"
	"Columns\n"
	"  State   as ss: ESTAB; SYN-SENT while the host connects; LISTEN; UNCONN; CLOSE-WAIT after the peer's end of file; FIN-WAIT after our own;\n"
	"          CLOSING after both; CLOSE after an error, until the program closes the socket\n"
	"  Recv-Q  bytes that the program has not read; of a listener: connections that it has not accepted\n"
	"  Send-Q  bytes that the host has not passed on; of a listener: its backlog\n"
	"  Host    the host's side: open; asked, while its answer is due; fin: it sent end of file; reset: it failed;\n"
	"          gone: the device went away\n"
	"\n"
	"Files\n"
	"  /proc/net/hwsock, /proc/PID/fd, /etc/services. PROC_ROOT in the environment stands for /proc, as with ss.\n"
	"\n"
	"Exit status: 0; 1 if the list cannot be read (is virtio_socket loaded?); 2 for a wrong argument.\n";

static struct {
	bool tcp, udp, listening, all, numeric, processes, extended, no_header;
} opt;

static const char *proc_root = "/proc";

__attribute__((noreturn, format(printf, 2, 3)))
static void die(int status, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fputs("hwstat: ", stderr);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	exit(status);
}

static void *must_have(void *memory)
{
	if (!memory)
		die(1, "out of memory");
	return memory;
}

/* ------------------------------------------------------------------------------------------------- /proc/net/hwsock */

enum column { PROTO, STATE, LOCAL, REMOTE, RX_QUEUE, TX_QUEUE, UID, INODE, FLOW, PAIR, DROPS, HOST, SHUT, COLUMNS };

static const char * const column_names[COLUMNS] = {
	"proto", "state", "local", "remote", "rx_queue", "tx_queue", "uid", "inode", "flow", "pair", "drops", "host", "shut",
};

struct line {
	const char *cell[COLUMNS];	/* "-" where the module does not say */
};

static int split(char *text, char **words, int most)
{
	int n = 0;

	for (char *word = strtok(text, " \t\n"); word && n < most; word = strtok(NULL, " \t\n"))
		words[n++] = word;
	return n;
}

/* ---------------------------------------------------------------------------------------------------------- processes */

struct holder {
	unsigned long inode;
	char *text;		/* ("program",pid=1,fd=3) */
};

static struct holder *holders;
static size_t nr_holders;

static void read_comm(char *comm, size_t size, const char *pid)
{
	char path[512];
	FILE *f;

	snprintf(comm, size, "?");
	snprintf(path, sizeof(path), "%s/%s/comm", proc_root, pid);
	f = fopen(path, "r");
	if (!f)
		return;
	if (fgets(comm, size, f))
		comm[strcspn(comm, "\n")] = 0;
	fclose(f);
}

static void read_process(const char *pid)
{
	char path[1024], target[64], comm[64] = "";
	struct dirent *entry;
	DIR *dir;

	snprintf(path, sizeof(path), "%s/%s/fd", proc_root, pid);
	dir = opendir(path);
	if (!dir)
		return;		/* another user's, or gone */
	while ((entry = readdir(dir))) {
		unsigned long inode;
		ssize_t n;

		snprintf(path, sizeof(path), "%s/%s/fd/%s", proc_root, pid, entry->d_name);
		n = readlink(path, target, sizeof(target) - 1);
		if (n < 0)
			continue;
		target[n] = 0;
		if (sscanf(target, "socket:[%lu]", &inode) != 1)
			continue;
		if (!comm[0])
			read_comm(comm, sizeof(comm), pid);
		if (!(nr_holders & (nr_holders + 1)))	/* full at 0, 1, 3, 7, ... */
			holders = must_have(realloc(holders, (2 * nr_holders + 1) * sizeof(*holders)));
		holders[nr_holders].inode = inode;
		if (asprintf(&holders[nr_holders].text, "(\"%s\",pid=%s,fd=%s)", comm, pid, entry->d_name) < 0)
			must_have(NULL);
		nr_holders++;
	}
	closedir(dir);
}

static void read_processes(void)
{
	DIR *dir = opendir(proc_root);
	struct dirent *entry;

	if (!dir)
		die(1, "cannot read %s: %s", proc_root, strerror(errno));
	while ((entry = readdir(dir)))
		if (isdigit((unsigned char)entry->d_name[0]))
			read_process(entry->d_name);
	closedir(dir);
}

static void print_processes(unsigned long inode)
{
	const char *before = " users:(";

	for (size_t i = 0; i < nr_holders; i++) {
		if (holders[i].inode != inode)
			continue;
		printf("%s%s", before, holders[i].text);
		before = ",";
	}
	if (*before == ',')
		putchar(')');
}

/* ---------------------------------------------------------------------------------------------------------- addresses */

/* the name of a port in /etc/services, or NULL. By hand: a static program cannot use the C library's name services */
static const char *service(const char *port, const char *proto)
{
	static char name[64];
	char line[512], number[32];
	FILE *f = fopen("/etc/services", "r");
	bool found = false;

	if (!f)
		return NULL;
	snprintf(number, sizeof(number), "%s/%s", port, proto);
	while (!found && fgets(line, sizeof(line), f)) {
		char *words[2];

		line[strcspn(line, "#")] = 0;
		found = split(line, words, 2) == 2 && !strcmp(words[1], number);
		if (found)
			snprintf(name, sizeof(name), "%s", words[0]);
	}
	fclose(f);
	return found ? name : NULL;
}

/* tcp://192.0.2.1:80 or tcp6://::1/80 becomes 192.0.2.1:80 or [::1]:80, as ss writes them; "-" becomes *:* */
static const char *address(char *out, size_t size, const char *uri)
{
	const char *rest = strstr(uri, "://"), *port, *name = NULL;
	bool v6 = rest && rest > uri && rest[-1] == '6';
	int host;

	if (!rest)
		return "*:*";
	rest += 3;
	port = strrchr(rest, v6 ? '/' : ':');
	if (!port)
		return uri;
	host = port++ - rest;
	if (!opt.numeric)
		name = service(port, uri[0] == 'u' ? "udp" : "tcp");
	if (!strcmp(port, "0"))
		name = "*";
	snprintf(out, size, v6 ? "[%.*s]:%s" : "%.*s:%s", host, rest, name ? name : port);
	return out;
}

/* UDP or ping, rather than TCP or MPTCP */
static bool sends_datagrams(const struct line *line)
{
	return line->cell[PROTO][0] == 'u' || line->cell[PROTO][0] == 'i';
}

static const char *state(const struct line *line)
{
	const char *s = line->cell[STATE];
	bool sent = strchr(line->cell[SHUT], 's'), fin = !strcmp(line->cell[HOST], "fin");

	if (!strcmp(s, "CONNECTING") || !strcmp(s, "TO_NATIVE"))
		return "SYN-SENT";
	if (!strcmp(s, "BINDING") || !strcmp(s, "BOUND"))
		return "UNCONN";
	if (!strcmp(s, "CLOSED"))
		return "CLOSE";
	if (strcmp(s, "CONNECTED"))
		return s;
	if (sends_datagrams(line) && !strcmp(line->cell[REMOTE], "-"))
		return "UNCONN";
	return sent && fin ? "CLOSING" : sent ? "FIN-WAIT" : fin ? "CLOSE-WAIT" : "ESTAB";
}

/* --------------------------------------------------------------------------------------------------------------- main */

static bool wanted(const struct line *line)
{
	bool udp = sends_datagrams(line);
	bool listens = !strcmp(line->cell[STATE], "LISTEN") || !strcmp(state(line), "UNCONN");

	if (opt.tcp != opt.udp && udp != opt.udp)
		return false;
	return opt.all || listens == opt.listening;
}

static void print(const struct line *line)
{
	char local[128], remote[128];

	printf("%-5s %-10s %-6s %-6s %26s %26s  %-5s", line->cell[PROTO], state(line), line->cell[RX_QUEUE], line->cell[TX_QUEUE],
	       address(local, sizeof(local), line->cell[LOCAL]), address(remote, sizeof(remote), line->cell[REMOTE]), line->cell[HOST]);
	if (opt.processes)
		print_processes(strtoul(line->cell[INODE], NULL, 10));
	if (opt.extended)
		printf(" uid:%s ino:%s flow:%s pair:%s drops:%s", line->cell[UID], line->cell[INODE], line->cell[FLOW], line->cell[PAIR],
		       line->cell[DROPS]);
	putchar('\n');
}

static void list(void)
{
	char path[512], text[1024], *words[32];
	int place[COLUMNS], n;
	FILE *f;

	snprintf(path, sizeof(path), "%s/net/hwsock", proc_root);
	f = fopen(path, "r");
	if (!f)
		die(1, "cannot read %s: %s%s", path, strerror(errno), errno == ENOENT ? "; is virtio_socket loaded?" : "");
	if (!fgets(text, sizeof(text), f))
		die(1, "%s has no heading", path);
	n = split(text, words, 32);
	for (int c = 0; c < COLUMNS; c++) {
		place[c] = -1;
		for (int i = 0; i < n; i++)
			if (!strcmp(words[i], column_names[c]))
				place[c] = i;
		if (place[c] < 0 && c <= INODE)
			die(1, "%s has no column \"%s\": it is of another version", path, column_names[c]);
	}
	if (!opt.no_header)
		printf("%-5s %-10s %-6s %-6s %26s %26s  %-5s%s\n", "Netid", "State", "Recv-Q", "Send-Q", "Local Address:Port",
		       "Peer Address:Port", "Host", opt.processes ? " Process" : "");
	while (fgets(text, sizeof(text), f)) {
		struct line line;

		n = split(text, words, 32);
		for (int c = 0; c < COLUMNS; c++)
			line.cell[c] = place[c] >= 0 && place[c] < n ? words[place[c]] : "-";
		if (wanted(&line))
			print(&line);
	}
	fclose(f);
}

static void option(char letter)
{
	switch (letter) {
	case 't': opt.tcp = true; break;
	case 'u': opt.udp = true; break;
	case 'l': opt.listening = true; break;
	case 'a': opt.all = true; break;
	case 'n': opt.numeric = true; break;
	case 'p': opt.processes = true; break;
	case 'e': opt.extended = true; break;
	case 'H': opt.no_header = true; break;
	case 'h': fputs(help, stdout); exit(0);
	default: die(2, "unknown option -%c; hwstat --help tells those there are", letter);
	}
}

int main(int argc, char **argv)
{
	static const char * const names[] = {
		"tcp", "udp", "listening", "all", "numeric", "processes", "extended", "no-header", "help",
	};

	for (int i = 1; i < argc; i++) {
		const char *word = argv[i];
		size_t k;

		if (word[0] != '-' || !word[1])
			die(2, "takes options only, not \"%s\"; see hwstat --help", word);
		if (word[1] != '-') {
			while (*++word)
				option(*word);
			continue;
		}
		for (k = 0; k < sizeof(names) / sizeof(*names) && strcmp(names[k], word + 2); k++)
			;
		if (k == sizeof(names) / sizeof(*names))
			die(2, "unknown option %s; hwstat --help tells those there are", word);
		option(names[k][0] == 'n' && names[k][1] == 'o' ? 'H' : names[k][0]);
	}
	if (getenv("PROC_ROOT"))
		proc_root = getenv("PROC_ROOT");
	if (opt.processes)
		read_processes();
	list();
	if (fflush(stdout) || ferror(stdout))
		die(1, "cannot write: %s", strerror(errno));
	return 0;
}
