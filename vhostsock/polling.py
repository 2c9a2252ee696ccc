# SPDX-License-Identifier: BSD-3-Clause
"""Rings whose driver gives no kicks: SET_VRING_KICK without a descriptor asks to look at them instead.

A kick fd of ours stands in for the front-end's, and a timer writes to it when the ring has something; so no data plane knows
of it. The timer looks often while there is something, and ever less often while there is not: a request waits at most LONGEST
seconds, and idle rings cost 60 looks a second. A front-end that wants less latency gives an eventfd.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["LONGEST", "SHORTEST", "Poller"]

SHORTEST, LONGEST = 0.001, 0.016  # seconds between two looks


class Poller:
    """look: kicks the rings that have something, and says whether there were any; None when no ring is polled any more."""

    def __init__(self, look: Callable[[], bool | None]) -> None:
        self._look = look
        self._timer: asyncio.TimerHandle | None = None
        self._interval = SHORTEST

    def start(self) -> None:
        """Look now, and from now on. May be called again."""
        self.close()
        self._interval = SHORTEST
        self._run()

    def close(self) -> None:
        """Idempotent."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _run(self) -> None:
        self._timer = None
        found = self._look()
        if found is not None:
            self._interval = SHORTEST if found else min(2 * self._interval, LONGEST)
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._run)
