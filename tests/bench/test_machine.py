# SPDX-License-Identifier: BSD-3-Clause
"""What a benchmark does when the machine is not its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tests.bench.machine import Steady


def clock(*stolen: int) -> Iterator[tuple[int, int]]:
    """Before and after each measurement of 100 ticks, of which so many are stolen."""
    lost = 0
    for number, ticks in enumerate(stolen):
        yield lost, 100 * number
        lost += ticks
        yield lost, 100 * (number + 1)


def test_what_lost_its_processors_is_measured_again_until_it_has_them() -> None:
    steady, figures = Steady(times=clock(2, 30, 3, 0).__next__), itertools.count()
    assert [steady(figures.__next__) for _ in range(2)] == [0, 3]
    assert steady.kept == [0.02, 0]
    assert steady.again == 2
    assert "0 that had" in steady.told()[0]


def test_what_never_has_them_is_kept_from_when_it_had_most_of_them_and_said_to_be_so() -> None:
    steady, figures = Steady(tries=3, times=clock(30, 10, 20).__next__), itertools.count()
    assert steady(figures.__next__) == 1
    assert steady.summary() == {
        "measurements": 1, "measured_again": 2, "stolen_allowed": 0.02, "stolen_median": 0.1, "stolen_most": 0.1,
        "above_allowed": 1,
    }  # fmt: skip


def test_this_machine_says_how_much_is_stolen() -> None:
    steady = Steady(tries=1)
    assert steady(lambda: "figure") == "figure"
    [share] = steady.kept
    assert 0 <= share <= 1
