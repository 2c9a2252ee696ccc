"""File I/O for devices: bytes between a file and a chain's guest memory, on C threads (csrc/core/vs_io.h has the rules).

Nothing of it runs under the GIL or on the event loop, and no byte passes through Python: the loop hands in jobs and hears of
the ended ones in batches. Jobs are started in order, run side by side on the pool's threads, and end in any order.

From submit() until its end is reported a job's chain must not be completed: the kernel may be reading or writing its memory. A
queue that stops therefore waits for the jobs under way, as long as they take: a read that a thread has begun cannot be called
back. Those that wait for a thread can be cancelled.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from vhostsock._core import ffi, lib
from vhostsock.errors import UsageError
from vhostsock.ring import Chain

__all__ = ["FileOp", "FilePool"]

REAP_MAX = 256  # ended jobs per wake-up of the loop, which then serves the others
T = TypeVar("T")


class FileOp(enum.IntEnum):
    """What a job does; ``chain`` says which part of it."""

    READ = lib.VS_IO_READ  # from the file into writable; zeros when it fails
    WRITE = lib.VS_IO_WRITE  # from readable into the file
    SYNC = lib.VS_IO_SYNC  # fdatasync
    DISCARD = lib.VS_IO_DISCARD  # the file does not need the range any more; no error where it cannot forget it
    ZERO = lib.VS_IO_ZERO  # the range reads as zeros, and keeps its space
    ZERO_UNMAP = lib.VS_IO_ZERO_UNMAP  # the range reads as zeros, and may lose its space
    CLEAR = lib.VS_IO_CLEAR  # zeros into writable; no file


class FilePool(Generic[T]):
    """Threads that do file I/O for one device, on the running event loop. ``close`` it on the same loop.

    ended: called on the loop with (what was given to submit, 0 or an errno value) of the jobs that ended since the last call.
    """

    def __init__(self, threads: int, ended: Callable[[list[tuple[T, int]]], None]) -> None:
        """UsageError unless ``threads`` is 1 to 64; OSError when they cannot be had."""
        if not 1 <= threads <= lib.VS_IO_THREADS_MAX:
            raise UsageError(f"{threads} threads; may be 1..{lib.VS_IO_THREADS_MAX}")
        self._ptr: Any = lib.vs_io_new(threads)
        if self._ptr == ffi.NULL:
            raise OSError(ffi.errno, f"cannot start {threads} threads: {os.strerror(ffi.errno)}")
        self._done = ffi.new("struct vs_io_done[]", REAP_MAX)
        self._ended = ended
        self._jobs: dict[int, T] = {}
        self._next = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(lib.vs_io_fd(self._ptr), self._reap)

    def submit(
        self, op: FileOp, job: T, fd: int = -1, *,
        chain: Chain | None = None, skip: int = 0, length: int = 0, offset: int = 0, durable: bool = False, group: int = 0,
    ) -> None:  # fmt: skip
        """Start a job on ``length`` bytes at ``offset`` of the file ``fd``, and at byte ``skip`` of the chain's part.

        ``job`` comes back when it ends, and is kept alive until then: let it hold the chain. A transfer that comes out short is
        an EIO. durable: what it changed is on stable storage when it ends. group: for ``cancel``. UsageError: the range is not
        in the chain.
        """
        ptr = chain.ptr if chain else ffi.NULL
        tag = self._next
        code = op | lib.VS_IO_DURABLE if durable else op
        rc = lib.vs_io_submit(self._ptr, code, fd, ptr, skip, length, offset, group, tag)
        if rc == -errno.ENOMEM:
            raise MemoryError("no memory for a job")
        if rc < 0:
            raise UsageError(f"{op.name}: {length} bytes at {offset} of the file and {skip} of {chain!r}")
        self._next += 1
        self._jobs[tag] = job

    def cancel(self, group: int) -> int:
        """End the jobs of ``group`` that no thread has taken yet, with ECANCELED; how many. The others go on."""
        return int(lib.vs_io_cancel(self._ptr, group))

    def _reap(self) -> None:
        count = lib.vs_io_reap(self._ptr, self._done, REAP_MAX)
        if count:
            self._ended([(self._jobs.pop(done.tag), done.error) for done in ffi.unpack(self._done, count)])

    def close(self) -> None:
        """Wait for the jobs under way, end the threads; jobs that were not reported are not any more. May be called again."""
        if self._ptr is not None:
            self._loop.remove_reader(lib.vs_io_fd(self._ptr))
            lib.vs_io_free(self._ptr)
            self._ptr = None
            self._jobs.clear()
