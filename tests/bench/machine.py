# SPDX-License-Identifier: BSD-3-Clause
"""What a benchmark ran on, for its JSON, and whether it had that machine to itself."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

__all__ = ["Steady", "described"]

P = ParamSpec("P")
T = TypeVar("T")


def _times() -> tuple[int, int]:
    """Ticks of all processors since the start: those that the host of this machine gave to others, and all (proc(5))."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[-1], sum(ticks)  # user, nice, system, idle, iowait, irq, softirq, steal


class Steady:
    """Measures again what was measured while the host of this (virtual) machine gave its processors to others.

    From the inside such time looks like slow programs, and waking a processor takes several times as long; the figure is then
    about the neighbours. What is measured again is decided by that share of the time alone, never by the figure. On a
    machine of its own nothing is ever stolen.
    """

    def __init__(self, most: float = 0.02, tries: int = 5, times: Callable[[], tuple[int, int]] = _times) -> None:
        """``most``: the share of the time that may be stolen. After ``tries`` the one that had the least stolen is kept.

        ``times``: the stolen time so far, and all time, in one unit.
        """
        self.most, self.tries, self.times = most, tries, times
        self.kept: list[float] = []  # the shares
        self.again = 0

    def __call__(self, measure: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        results: list[tuple[float, T]] = []
        while not results or (results[-1][0] > self.most and len(results) < self.tries):
            stolen, whole = self.times()
            value = measure(*args, **kwargs)
            stolen_after, whole_after = self.times()
            results.append(((stolen_after - stolen) / max(whole_after - whole, 1), value))
        share, value = min(results, key=lambda result: result[0])
        self.kept.append(share)
        self.again += len(results) - 1
        return value

    def summary(self) -> dict[str, float]:
        """Shares of the processors' time that were stolen while what is kept was measured."""
        shares = self.kept or [0.0]
        return {
            "measurements": len(self.kept), "measured_again": self.again, "stolen_allowed": self.most,
            "stolen_median": statistics.median(shares), "stolen_most": max(shares),
            "above_allowed": sum(share > self.most for share in shares),
        }  # fmt: skip

    def told(self, but_for: str = "") -> list[str]:
        """As Markdown; nothing where nothing was measured. ``but_for``: what was measured without this."""
        if not self.kept:
            return []
        found = self.summary()
        words = (
            f"Of the processors' time the host of the machine gave to others {found['stolen_median']:.1%} in the median of "
            f"{found['measurements']} measurements and {found['stolen_most']:.1%} at most; {found['measured_again']} were "
            f"done again for having lost more than {self.most:.0%}, and {found['above_allowed']} that had are among those kept."
        )
        return [f"But for {but_for}: {words}" if but_for else words]


def described(steady: Steady) -> dict[str, str | int | float]:
    """Date, processor, cores, kernel, Python, the load before and during (of the last minute and of five), what was stolen."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    one, five, _ = os.getloadavg()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": one,
        "load_5min": five,
        **steady.summary(),
    }
