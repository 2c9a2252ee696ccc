# SPDX-License-Identifier: BSD-3-Clause
"""The end of a migration in which the guest runs here already and its memory is still on the way (postcopy).

    idle -- POSTCOPY_ADVISE --> advised -- POSTCOPY_LISTEN --> listening -- POSTCOPY_END --> idle

From ADVISE on there is a userfaultfd, of which the front-end has a copy. From LISTEN on all guest memory, what is known and
what is still to come, is registered with it: whoever here touches a page that has not arrived waits in the kernel while the
front-end fetches it. The event loop's thread may be such a one, so nothing of this can depend on the loop: a thread watches the
connection, and closes our copy of the userfaultfd when the front-end is gone. Its own is closed by its death, and that lets
everybody go on (with zeros; the session is over). A front-end that lives and does not deliver pages holds its device up.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import threading

from vhostsock._core import ffi, lib
from vhostsock.errors import FrontendError
from vhostsock.memory import MemoryMap
from vhostsock.proto import events

__all__ = ["Postcopy"]


class Postcopy:
    """One connection's; ``sock`` is the one to the front-end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._uffd = -1
        self._lock = threading.Lock()  # of _uffd: the watcher closes it at any time
        self._watcher: threading.Thread | None = None
        self._wake = -1

    def advise(self) -> events.OwnedFd:
        """A userfaultfd for the front-end, of which we keep a copy. FrontendError when there is none to be had."""
        self.end(None)
        err = ffi.new("struct vs_err *")
        uffd = lib.vs_uffd_open(err)
        if uffd < 0:
            raise FrontendError(f"POSTCOPY_ADVISE: {ffi.string(err.text).decode(errors='replace')}")
        self._uffd = uffd
        return events.OwnedFd(os.dup(uffd))

    def listen(self, memory: MemoryMap) -> None:
        """Register all of ``memory``."""
        if self._uffd < 0:
            raise FrontendError("POSTCOPY_LISTEN without POSTCOPY_ADVISE")
        if not self._watcher:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            hangup = os.dup(self._sock.fileno())
            watch = functools.partial(self._watch, hangup, self._wake)
            self._watcher = threading.Thread(target=watch, name="vhostsock postcopy", daemon=True)
            self._watcher.start()
        self.register(memory)

    def register(self, memory: MemoryMap) -> None:
        """``memory`` is what the session uses next; nothing of it is touched before this."""
        err = ffi.new("struct vs_err *")
        with self._lock:
            if self._uffd >= 0 and lib.vs_mem_uffd_register(memory.ptr, self._uffd, err) < 0:
                raise FrontendError(f"postcopy: {ffi.string(err.text).decode(errors='replace')}")

    def end(self, memory: MemoryMap | None) -> None:
        """All pages are there, or nobody sends them any more. Idempotent."""
        with self._lock:
            if self._uffd >= 0:
                if memory:
                    lib.vs_mem_uffd_unregister(memory.ptr, self._uffd)
                os.close(self._uffd)
                self._uffd = -1
        if self._watcher:
            os.eventfd_write(self._wake, 1)
            self._watcher.join()
            os.close(self._wake)
            self._watcher = None

    def _watch(self, hangup: int, wake: int) -> None:
        poll = select.poll()
        poll.register(hangup, select.POLLRDHUP)
        poll.register(wake, select.POLLIN)
        try:
            ready = {fd for fd, _ in poll.poll()}
        finally:
            os.close(hangup)
        if wake not in ready:
            with self._lock, contextlib.suppress(OSError):
                if self._uffd >= 0:
                    os.close(self._uffd)
                    self._uffd = -1

    @staticmethod
    def base(memory: MemoryMap, region: events.Region) -> int:
        """Where a region is in this process, which is how the front-end tells faults apart."""
        return int(ffi.cast("uintptr_t", lib.vs_mem_gpa(memory.ptr, region.gpa, 1)))
