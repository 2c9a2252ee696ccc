# SPDX-License-Identifier: BSD-3-Clause
"""Checks of front-ends that come, go and come again."""

from __future__ import annotations

import asyncio

from .check import Check, NotApplicable, Probe
from .connection import POLL, Failed
from .target import Gone, ProcessTarget

__all__ = ["CHECKS"]

SESSIONS = 5


def _needs_one_that_goes_on(probe: Probe) -> None:
    if probe.target.ends_with_its_front_end:
        raise NotApplicable("it ends when its front-end leaves")


async def a_front_end_may_come_again(probe: Probe) -> None:
    """Five sessions one after the other, each with running rings, each left without a word."""
    _needs_one_that_goes_on(probe)
    for _ in range(SESSIONS):
        connection = await probe.running()
        await probe.exchange(connection)
        connection.close()


async def a_session_knows_nothing_of_the_one_before(probe: Probe) -> None:
    """After a session with running rings, a new one that has said nothing about rings gets base 0 for each."""
    _needs_one_that_goes_on(probe)
    connection = await probe.running()
    await probe.exchange(connection, 3)
    connection.close()
    connection = await probe.negotiated()
    await connection.set_features()
    base = await connection.stop_ring(probe.traffic.queue)
    if base:
        raise Failed(f"GET_VRING_BASE says {base}, which is the last session's")


async def a_second_front_end_does_not_disturb_the_first(probe: Probe) -> None:
    """Somebody connects to a socket that is in use: whatever becomes of that, the first one is served as before."""
    connection = await probe.running()
    await probe.exchange(connection)
    try:
        second = await probe.target.connect(patient=False)
    except Gone:
        raise NotApplicable("it does not listen while it serves") from None
    with second:
        await probe.exchange(connection)
    await probe.exchange(connection)


async def what_a_session_opened_is_closed_with_it(probe: Probe) -> None:
    """The back-end has as many descriptors open after five sessions as after one."""
    _needs_one_that_goes_on(probe)
    counts = []
    for _ in range(SESSIONS):
        connection = await probe.running()
        await probe.exchange(connection)
        connection.close()
        # the next one is served, so the last one's end was seen
        idle = await probe.connect()
        await idle.settled()
        counts.append(probe.open_files())
        idle.close()
    # it may close them a moment after it has accepted the next one
    probe.transcript.note(f"descriptors open after each session: {counts}")
    try:
        async with asyncio.timeout(probe.target.limit / 2):
            while probe.open_files() > counts[0]:  # noqa: ASYNC110  (/proc does not tell when it changes)
                await asyncio.sleep(POLL)
    except TimeoutError:
        raise Failed(f"open descriptors after {SESSIONS} sessions: {counts}") from None


async def it_ends_when_it_is_told_to(probe: Probe) -> None:
    """SIGTERM ends the program, while a front-end is connected."""
    if not isinstance(probe.target, ProcessTarget):
        raise NotApplicable("the probe has not started it (--exec)")
    await probe.negotiated()
    probe.target.terminate()
    if await probe.target.ended() is None:
        raise Failed("it is still there")


CHECKS = (
    Check(a_front_end_may_come_again, "Communication (reconnection is optional)", traffic=True),
    Check(a_session_knows_nothing_of_the_one_before, "Ring states", traffic=True),
    Check(a_second_front_end_does_not_disturb_the_first, "Communication", traffic=True),
    Check(what_a_session_opened_is_closed_with_it, "what it takes, it gives back", traffic=True),
    Check(it_ends_when_it_is_told_to, "Backend program conventions"),
)
