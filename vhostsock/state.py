# SPDX-License-Identifier: BSD-3-Clause
"""A device's state on its way through migration: the streams that a device writes and reads, and the transfer that runs them.

The front-end brings a pipe (SET_DEVICE_STATE_FD), the bytes go through it to their end of file, and then it asks how it went
(CHECK_DEVICE_STATE). In between the device is suspended: no ring runs, and the session goes on serving messages, so the hooks
run as a task of their own.

    idle -- SET_DEVICE_STATE_FD --> under way -- hook returned, or failed --> over -- CHECK_DEVICE_STATE --> idle
                                        |
                                        +-- a ring starts, reset, the front-end goes: the task is cancelled, the transfer failed

Nothing waits for ever: a stream on which no byte moves for STALL seconds fails, and so does a state larger than the device's
``state_limit``.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from typing import Any

from .errors import FrontendError

__all__ = ["STALL", "StateReader", "StateWriter", "Transfer"]

log = logging.getLogger("vhostsock.server")

STALL = 60.0  # seconds without a byte; QEMU moves the stream through its own migration connection, which may be slow
PIECE = 1 << 16  # bytes a system call: what a pipe holds


class _Stream:
    def __init__(self, fd: int, limit: int) -> None:
        self._fd = fd
        self._left = limit
        self._limit = limit
        self._loop = asyncio.get_running_loop()

    def _count(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise OSError(errno.EFBIG, f"the device's state has more than {self._limit} bytes (its state_limit)")

    async def _ready(self, watch: Callable[[int, Callable[[], None]], None], unwatch: Callable[[int], Any]) -> None:
        ready = asyncio.Event()
        watch(self._fd, ready.set)
        try:
            async with asyncio.timeout(STALL):
                await ready.wait()
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"the front-end moved no byte of the device's state for {STALL:g} s") from None
        finally:
            unwatch(self._fd)


class StateWriter(_Stream):
    """Where ``Device.save_state`` puts the state."""

    async def write(self, data: bytes) -> None:
        """All of ``data``. OSError when the front-end does not take it."""
        self._count(len(data))
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view[:PIECE]) :]
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)


class StateReader(_Stream):
    """Where ``Device.load_state`` finds it."""

    async def read(self, size: int = -1) -> bytes:
        """``size`` bytes, fewer at the end of the state; all that is left for -1."""
        pieces = []
        while size:
            try:
                piece = os.read(self._fd, PIECE if size < 0 else min(size, PIECE))
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
                continue
            if not piece:
                break
            self._count(len(piece))
            pieces.append(piece)
            size -= len(piece) if size > 0 else 0
        return b"".join(pieces)


class Transfer:
    """The state's transfers of one connection, one at a time."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def save(self, fd: int, hook: Callable[[StateWriter], Awaitable[None]], limit: int) -> None:
        """Begin. Takes over ``fd``, a pipe's writing end (or what behaves like one), unless this raises FrontendError."""
        self._begin(fd, os.O_WRONLY, lambda: hook(StateWriter(fd, limit)))

    def load(self, fd: int, hook: Callable[[StateReader], Awaitable[None]], limit: int) -> None:
        """Begin. Takes over ``fd``, a pipe's reading end, unless this raises FrontendError."""

        async def load() -> None:
            stream = StateReader(fd, limit)
            await hook(stream)
            rest = len(await stream.read())  # the reading end must come to the end of file
            if rest:
                raise OSError(errno.EBADMSG, f"load_state left {rest} bytes of the state unread")

        self._begin(fd, os.O_RDONLY, load)

    def _begin(self, fd: int, mode: int, work: Callable[[], Awaitable[None]]) -> None:
        if self._task and not self._task.done():
            raise FrontendError("a transfer of the device's state is under way already")
        if stat.S_IFMT(os.fstat(fd).st_mode) not in (stat.S_IFIFO, stat.S_IFSOCK):
            raise FrontendError("the device's state goes through a pipe or a socket, the descriptor is neither")
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE not in (mode, os.O_RDWR):
            raise FrontendError(f"the descriptor for the device's state cannot be {'written' if mode else 'read'}")
        os.set_blocking(fd, False)
        self._forget()
        self._task = asyncio.get_running_loop().create_task(self._run(fd, work))

    @staticmethod
    async def _run(fd: int, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        finally:
            os.close(fd)  # which is the end of file, also for what was cut short: CHECK_DEVICE_STATE tells the two apart

    async def check(self) -> None:
        """Wait for the end of the transfer. FrontendError with the reason when it failed, or when there was none."""
        task = self._task
        if task is None:
            raise FrontendError("CHECK_DEVICE_STATE without a transfer before")
        await asyncio.wait([task])  # cancelled here, the transfer is still close()'s to end
        self._task = None
        if task.cancelled():
            raise FrontendError("the transfer of the device's state was cut short")
        error = task.exception()
        if error is None:
            return
        if not isinstance(error, OSError):
            log.error("the device failed to move its state", exc_info=error)
        raise FrontendError(f"the device's state was not moved: {error}")

    async def cancel(self, why: str) -> None:
        """End a transfer that is under way; a later check says so."""
        if self._task and not self._task.done():
            log.warning("the transfer of the device's state is cut short: %s", why)
            self._task.cancel()
            await asyncio.wait([self._task])

    async def close(self) -> None:
        await self.cancel("the front-end went")
        self._forget()

    def _forget(self) -> None:
        """Drop a transfer that is over and whose outcome nobody asked for."""
        if self._task and not self._task.cancelled():
            self._task.exception()  # or asyncio complains that nobody looked at it
        self._task = None
