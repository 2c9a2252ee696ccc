"""The guest's memory as the front-end shares it: immutable snapshots of mapped regions. And two more files that it shares.

A change of the memory table makes a new :class:`MemoryMap`; the old one stays valid for whoever holds it. A region is unmapped
when the last map *and* the last descriptor chain in flight that use it are gone, so no request can lose its memory half-way.

The front-end can truncate a file while it is mapped. An access then finds zeros instead of killing the process, and
:attr:`MemoryMap.poisoned` becomes true: whoever owns the session ends it.
"""

from __future__ import annotations

import fcntl
import os
from typing import Any, NoReturn

from vhostsock._core import ffi, lib
from vhostsock.errors import FrontendError, UsageError

__all__ = ["DirtyLog", "InflightArea", "MemoryMap"]


def _refuse(err: Any) -> NoReturn:
    raise FrontendError(ffi.string(err.text).decode(errors="replace"))


class MemoryMap:
    """A sorted, immutable set of memory regions. Owns one reference of a C snapshot.

    Start from :meth:`empty`. Addresses and sizes are bytes, 0 <= value < 2**64. ``gpa`` is where the guest sees the region,
    ``uva`` where the front-end has it mapped (ring addresses in SET_VRING_ADDR are such addresses).
    """

    __slots__ = ("_ptr",)

    def __init__(self, ptr: Any) -> None:
        """Takes over one reference of ``struct vs_mem *`` ``ptr``. Use :meth:`empty` instead."""
        if ptr == ffi.NULL:
            raise MemoryError("no memory for a memory map")
        self._ptr = ffi.gc(ptr, lib.vs_mem_put)

    @classmethod
    def empty(cls) -> MemoryMap:
        """A map without regions."""
        return cls(lib.vs_mem_new())

    @property
    def ptr(self) -> Any:
        """The ``struct vs_mem *``, for C calls. UsageError after :meth:`close`."""
        if self._ptr is None:
            raise UsageError("this MemoryMap is closed")
        return self._ptr

    def with_region(self, fd: int, *, gpa: int, size: int, uva: int, offset: int = 0) -> MemoryMap:
        """A new map with bytes ``[offset, offset + size)`` of the file ``fd`` mapped in addition. ``fd`` stays the caller's.

        Neither ``offset`` nor ``size`` need be page-aligned. FrontendError when the region is empty, wraps around 2**64, is
        larger than the file, overlaps another one in ``gpa`` or ``uva``, cannot be mapped, or would be the 513th.
        """
        err = ffi.new("struct vs_err *")
        region = lib.vs_region_map(fd, gpa, size, uva, offset, err)
        if region == ffi.NULL:
            _refuse(err)
        try:
            new = lib.vs_mem_with(self.ptr, region, err)
        finally:
            lib.vs_region_put(region)  # the new map, if there is one, has its own reference
        if new == ffi.NULL:
            _refuse(err)
        return MemoryMap(new)

    def without_region(self, *, gpa: int, size: int, uva: int) -> MemoryMap:
        """A new map without the region that matches all three values. FrontendError when there is none."""
        err = ffi.new("struct vs_err *")
        new = lib.vs_mem_without(self.ptr, gpa, size, uva, err)
        if new == ffi.NULL:
            _refuse(err)
        return MemoryMap(new)

    def __len__(self) -> int:
        return int(lib.vs_mem_count(self.ptr))

    def __repr__(self) -> str:
        return "<MemoryMap closed>" if self._ptr is None else f"<MemoryMap of {len(self)} regions>"

    @property
    def poisoned(self) -> bool:
        """The front-end truncated a region of this map, and we noticed: what is read there is zeros."""
        return bool(lib.vs_mem_poisoned(self.ptr))

    def close(self) -> None:
        """Give the reference back now instead of at garbage collection. May be called again."""
        if self._ptr is not None:
            ffi.release(self._ptr)
            self._ptr = None


class InflightArea:
    """The file in which what is in flight survives us, mapped: a part for each queue (csrc/core/vs_inflight.c has the layouts).

    The front-end keeps the file, so it is hostile as guest memory is. ``num_queues`` parts of ``queue_size`` entries each.
    """

    __slots__ = ("_ptr", "num_queues", "queue_size", "size")

    def __init__(self, fd: int, *, size: int, num_queues: int, queue_size: int, packed: bool, offset: int = 0) -> None:
        """Map it; ``fd`` stays the caller's. FrontendError when the file or ``size`` is too small for this many queues."""
        needed = num_queues * lib.vs_inflight_size(packed, queue_size)
        if not num_queues or not queue_size or size < needed:
            raise FrontendError(
                f"in-flight region: {num_queues} queues of {queue_size} need {needed:#x} bytes, the message says {size:#x}"
            )
        err = ffi.new("struct vs_err *")
        ptr = lib.vs_region_map(fd, 0, size, 0, offset, err)
        if ptr == ffi.NULL:
            raise FrontendError(f"in-flight region: {ffi.string(err.text).decode(errors='replace')}")
        self._ptr = ffi.gc(ptr, lib.vs_region_put)
        self.size, self.num_queues, self.queue_size = size, num_queues, queue_size

    @classmethod
    def create(cls, *, num_queues: int, queue_size: int, packed: bool) -> tuple[int, int]:
        """A new file that nobody used yet, sealed against a change of its size: size and descriptor, the caller's to close."""
        page = os.sysconf("SC_PAGESIZE")
        size = (num_queues * lib.vs_inflight_size(packed, queue_size) + page - 1) // page * page
        fd = os.memfd_create("vhostsock-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return size, fd

    @property
    def ptr(self) -> Any:
        """The ``struct vs_region *``, for C calls."""
        return self._ptr

    def close(self) -> None:
        """Give our reference back now; vrings that use it have their own. May be called again."""
        if self._ptr is not None:
            ffi.release(self._ptr)
            self._ptr = None


class DirtyLog:
    """The dirty log of a migration, mapped: ``size`` bytes, a bit for each page of 4 KiB (csrc/core/vs_log.c)."""

    __slots__ = ("_ptr",)

    def __init__(self, fd: int, *, size: int, offset: int = 0) -> None:
        """Map it; ``fd`` stays the caller's. FrontendError when it is no file, or too small."""
        err = ffi.new("struct vs_err *")
        ptr = lib.vs_log_new(fd, size, offset, err)
        if ptr == ffi.NULL:
            raise FrontendError(f"dirty log: {ffi.string(err.text).decode(errors='replace')}")
        self._ptr = ffi.gc(ptr, lib.vs_log_put)

    @property
    def ptr(self) -> Any:
        """The ``struct vs_log *``, for C calls."""
        return self._ptr

    def set_notify(self, fd: int) -> None:
        """Signal ``fd`` after a batch of completions that marked pages; -1: nobody. FrontendError when it is no eventfd."""
        if lib.vs_log_set_notify(self._ptr, fd) < 0:
            raise FrontendError("SET_LOG_FD: the descriptor must be an eventfd, a socket or a pipe")

    def close(self) -> None:
        """Give our reference back now; vrings that use it have their own. May be called again."""
        if self._ptr is not None:
            ffi.release(self._ptr)
            self._ptr = None
