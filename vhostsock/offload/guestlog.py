"""Log lines that a guest causes, bounded: each connection is a line or two, and a guest can make as many as it likes.

In any second at most ``LIMIT`` lines are written; what is left out is counted, and the count is a line of its own as soon as
there is room. Errors are not counted: they end something, which bounds them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

__all__ = ["LIMIT", "GuestLog"]

LIMIT: Final = 500  # lines a second: far above what a person reads, and some 5 GB a day at worst

log = logging.getLogger("vhostsock.offload")


class GuestLog:
    """The log of one device; every line starts with its name. ``clock`` gives seconds."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic, logger: logging.Logger = log) -> None:
        self._name = name
        self._logger = logger
        self._clock = clock
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def __call__(self, level: int, text: str, *arguments: object) -> None:
        """One line, if there is room for it."""
        if not self._logger.isEnabledFor(level):
            return
        second = int(self._clock())
        if second != self._second:
            self.flush()
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines > LIMIT and level < logging.ERROR:
            self._left_out += 1
        else:
            self._logger.log(level, "%s " + text, self._name, *arguments)

    def left_out(self, lines: int) -> None:
        """So many more, of level INFO, were not even made."""
        if self._logger.isEnabledFor(logging.INFO):
            self._left_out += lines

    def flush(self) -> None:
        """Tell what was left out, if anything."""
        if self._left_out:
            self._logger.warning("%s %d lines left out: more than can be written", self._name, self._left_out)
            self._left_out = 0
