"""A guest cannot fill the host's disk with log lines, and what is left out is told."""

from __future__ import annotations

import logging

import pytest

from vhostsock.offload.guestlog import LIMIT, GuestLog


def test_lines_beyond_the_limit_are_counted_and_told_in_the_next_second(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vhostsock.offload")
    now = [10.0]
    write = GuestLog("vm1", lambda: now[0])
    for number in range(LIMIT + 3):
        write(logging.INFO, "line %d", number)
    assert caplog.messages == [f"vm1 line {number}" for number in range(LIMIT)]
    now[0] = 11.0
    write(logging.INFO, "next")
    assert caplog.messages[LIMIT:] == ["vm1 3 lines left out: more than can be written", "vm1 next"]


def test_errors_are_always_written(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vhostsock.offload")
    write = GuestLog("vm1", lambda: 0.0)
    for _ in range(LIMIT):
        write(logging.INFO, "x")
    write(logging.ERROR, "broken")
    assert caplog.messages[-1] == "vm1 broken"


def test_lines_of_a_disabled_level_take_no_room(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vhostsock.offload")
    write = GuestLog("vm1", lambda: 0.0)
    for _ in range(LIMIT):
        write(logging.DEBUG, "x")
    write(logging.INFO, "y")
    write.flush()
    assert caplog.messages == ["vm1 y"]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_lines_that_were_not_made_are_told_where_they_would_be_written(caplog: pytest.LogCaptureFixture, level: int) -> None:
    caplog.set_level(level, "vhostsock.offload")
    write = GuestLog("vm1", lambda: 0.0)
    write.left_out(4)
    write.flush()
    assert caplog.messages == (["vm1 4 lines left out: more than can be written"] if level == logging.INFO else [])
