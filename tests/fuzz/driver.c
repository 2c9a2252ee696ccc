/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * driver - runs a fuzz target where there is no libFuzzer: for coverage builds, and on machines without clang.
 *
 *	target FILE|FOLDER...		run these inputs once each
 *	target -seconds=N [SEED]	random inputs, half of them mutated from the last interesting ones, for N seconds
 *
 * Prints "N executions, M a second". A crash leaves the input that caused it in crash-last (random mode).
 */
#include <dirent.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>

#include "fuzz.h"

enum { SIZE_MAX_INPUT = 4096 };

static uint8_t input[SIZE_MAX_INPUT];
static size_t input_size;
static unsigned long executions;

static uint64_t next_random(void)
{
	static uint64_t x = 88172645463325252ull;

	x ^= x << 13;
	x ^= x >> 7;
	return x ^= x << 17;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void run_path(const char *path)
{
	struct dirent *entry;
	struct stat st;
	uint8_t *data;
	FILE *f;
	DIR *d;

	if (stat(path, &st) < 0) {
		perror(path);
		exit(2);
	}
	if (S_ISDIR(st.st_mode)) {
		d = opendir(path);
		while (d && (entry = readdir(d))) {
			char name[4096];

			snprintf(name, sizeof(name), "%s/%s", path, entry->d_name);
			if (entry->d_name[0] != '.')
				run_path(name);
		}
		if (d)
			closedir(d);
		return;
	}
	data = malloc((size_t)st.st_size + 1);
	f = fopen(path, "rb");
	if (!data || !f || fread(data, 1, (size_t)st.st_size, f) != (size_t)st.st_size) {
		perror(path);
		exit(2);
	}
	fclose(f);
	LLVMFuzzerTestOneInput(data, (size_t)st.st_size);
	executions++;
	free(data);
}

static void keep_input(int sig)
{
	int fd = open("crash-last", O_WRONLY | O_CREAT | O_TRUNC, 0644);

	if (fd >= 0 && write(fd, input, input_size) == (ssize_t)input_size)
		close(fd);
	signal(sig, SIG_DFL);
	raise(sig);
}

static void run_random(double seconds)
{
	double until = now() + seconds;

	signal(SIGABRT, keep_input);
	signal(SIGSEGV, keep_input);
	while (now() < until) {
		if (next_random() & 1) {
			input_size = next_random() % (next_random() & 3 ? 256 : SIZE_MAX_INPUT);
			for (size_t i = 0; i < input_size; i++)
				input[i] = (uint8_t)next_random();
		}
		for (uint64_t n = next_random() % 8; n && input_size; n--)
			input[next_random() % input_size] = (uint8_t)next_random();
		LLVMFuzzerTestOneInput(input, input_size);
		executions++;
	}
}

int main(int argc, char **argv)
{
	double start;

	LLVMFuzzerInitialize(&argc, &argv);
	start = now();
	for (int i = 1; i < argc; i++) {
		if (!strncmp(argv[i], "-seconds=", 9))
			run_random(atof(argv[i] + 9));
		else
			run_path(argv[i]);
	}
	printf("%lu executions, %.0f a second\n", executions, (double)executions / (now() - start + 1e-9));
	return 0;
}
