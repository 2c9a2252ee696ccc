# SPDX-License-Identifier: BSD-3-Clause
"""Notifications of a ring as messages instead of eventfds (the vhost-user document, "In-band notifications").

The rings know nothing of it: they signal an eventfd of ours, and what that says is passed on as a message; a kick message is
written to another one. It costs a pass through the event loop each way, which is why a device has to ask for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

__all__ = ["Signal", "new_eventfd"]


def new_eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Signal:
    """An eventfd, and a function that is called on the event loop when it was written to."""

    def __init__(self, signalled: Callable[[], None]) -> None:
        self._signalled = signalled
        self.fd = new_eventfd()
        asyncio.get_running_loop().add_reader(self.fd, self._read)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
            self._signalled()

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            asyncio.get_running_loop().remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1
