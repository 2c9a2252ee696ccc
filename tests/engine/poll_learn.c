/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * poll_learn - what vs_poll.c makes of traffic, told what its epochs came to: nothing here depends on time.
 *
 * Says "ok", or which claim is wrong.
 */
#include "vs_poll.c"

#include <stdio.h>
#include <stdlib.h>

enum { MANY = 4 * VSE_POLL_KEEP_MAX };

#define MUST(cond) do { if (!(cond)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond); exit(1); } } while (0)

/* messages and bytes of an epoch of a millisecond, asleep and awake */
struct traffic { uint64_t asleep[2], awake[2]; };

static const struct traffic
	answers = { { 100, 6400 }, { 200, 12800 } },		/* come twice as fast to who is awake */
	connections = { { 100, 0 }, { 200, 0 } },
	timed = { { 100, 6400 }, { 110, 7040 } },		/* come when they come */
	pieces = { { 100, 400000 }, { 300, 300000 } },		/* a stream that one who is awake reads in pieces */
	long_answers = { { 80, 640000 }, { 160, 1280000 } };

static void epoch(struct vse_poll *p, const struct traffic *t)
{
	const uint64_t *came = p->awake ? t->awake : t->asleep;

	p->ns = 1000000;
	p->msgs = came[0];
	p->bytes = came[1];
	learn(p);
}

/* epochs until it is (not) awake for more than a try, MANY + 1 if it never is */
static int settles(struct vse_poll *p, const struct traffic *t, bool awake)
{
	int in_a_row = 0, n;

	for (n = 0; n <= MANY && in_a_row < 3; n++) {
		epoch(p, t);
		in_a_row = p->awake == awake ? in_a_row + 1 : 0;
	}
	return n;
}

/* of the epochs of traffic that has been there for long, those awake */
static int awake_of(struct vse_poll *p, const struct traffic *t, int epochs)
{
	int n = 0;

	for (int i = 0; i < MANY; i++)
		epoch(p, t);
	for (int i = 0; i < epochs; i++) {
		n += p->awake;
		epoch(p, t);
	}
	return n;
}

int main(void)
{
	static const struct traffic *const all[] = { &answers, &connections, &timed, &pieces, &long_answers };
	static const bool better[] = { true, true, false, false, true };
	const int kinds = sizeof(all) / sizeof(*all);

	for (int i = 0; i < kinds; i++) {
		struct vse_poll p = { 0 };
		int n = awake_of(&p, all[i], 1000);

		MUST(better[i] ? n > 980 : n < 20);
		/* and no other that was there for long before it keeps it from that */
		for (int before = 0; before < kinds; before++) {
			struct vse_poll q = { 0 };

			awake_of(&q, all[before], 0);
			MUST(settles(&q, all[i], better[i]) <= VSE_POLL_KEEP_MAX + 10);
			n = awake_of(&q, all[i], 1000);
			MUST(better[i] ? n > 980 : n < 20);
		}
	}
	/* that messages are of another length is seen at once */
	struct vse_poll p = { 0 };

	awake_of(&p, &pieces, 0);
	MUST(settles(&p, &answers, true) <= 2 + 3 + 2);
	puts("ok");
	return 0;
}
