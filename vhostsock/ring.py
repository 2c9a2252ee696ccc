"""Virtqueues and descriptor chains for Python devices: a thin face of the C core (csrc/core/vs_vq.h has the rules).

A :class:`Vring` is idle (being configured), running, or broken (the driver broke a rule; ``error`` says which). Chains are
completed in any order with :meth:`Chain.complete`, and the driver sees them after the next :meth:`Vring.flush`. A vring has no
lock: whoever owns it serialises the calls, on one thread or under a lock of his own.
"""

from __future__ import annotations

import errno
import os
from typing import Any, NoReturn

from vhostsock._core import ffi, lib
from vhostsock.errors import DriverError, FrontendError, UsageError
from vhostsock.memory import DirtyLog, InflightArea, MemoryMap

__all__ = ["Chain", "NotTranslated", "Vring"]

BATCH_MAX = 256  # chains per call of pop_batch; bounds what one vring keeps ready for reuse
_new_bytes = ffi.new_allocator(should_clear_after_alloc=False)


class NotTranslated(FrontendError):
    """The rings are not in the IOTLB yet; ``Vring.missing`` says what to ask for."""


class Chain:
    """One request of the driver: ``readable`` bytes from it, and room for ``writable`` bytes to it.

    Both are totals over all descriptors, however the driver cut them; :meth:`read` and :meth:`write` each advance a position of
    their own. The memory stays mapped until :meth:`complete`, or until the object is gone.
    """

    __slots__ = ("_consumed", "_ptr", "readable", "vring", "writable", "written")

    def __init__(self, vring: Vring, ptr: Any) -> None:
        self._ptr = ptr  # None once completed
        self._consumed = 0
        self.vring = vring
        self.readable: int = ptr.out_len
        self.writable: int = ptr.in_len
        self.written = 0

    def __repr__(self) -> str:
        state = "completed" if self._ptr is None else f"head {self._ptr.head}"
        return f"<Chain vring {self.vring.index} {state}: {self.readable} readable, {self.writable} writable>"

    @property
    def ptr(self) -> Any:
        """The ``struct vs_chain *``, for C calls. UsageError once completed."""
        if self._ptr is None:
            raise UsageError(f"this chain of vring {self.vring.index} is completed: its memory is the driver's again")
        return self._ptr

    @property
    def again(self) -> bool:
        """It was in flight already when the vring stopped, or the process that served it died: perhaps it was carried out."""
        return bool(self.ptr.again)

    @property
    def completed(self) -> bool:
        return self._ptr is None

    def read(self, n: int = -1) -> bytes:
        """The next ``n`` readable bytes, or all that are left (``n`` < 0). Shorter, at last empty, at the end."""
        left = self.readable - self._consumed
        n = left if n < 0 or n > left else n
        if n == 0:
            return b""
        buf = _new_bytes("char[]", n)
        done = lib.vs_chain_read(self.ptr, self._consumed, buf, n)
        self._consumed += done
        data: bytes = ffi.unpack(buf, done)
        return data

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Put ``data`` into the writable part, as much as fits; returns how many bytes did. They count as written."""
        with ffi.from_buffer(data) as view:
            done: int = lib.vs_chain_write(self.ptr, self.written, view, len(view))
        self.written += done
        return done

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Put ``data`` into the writable part from byte ``offset`` on, as much as fits; returns how many bytes did.

        For what stands behind other things, a status at the end, say. It does not count as ``written``: set that yourself.
        """
        with ffi.from_buffer(data) as view:
            return int(lib.vs_chain_write(self.ptr, offset, view, len(view)))

    def complete(self) -> None:
        """Give the chain back with what was written so far. The driver sees it after the next ``vring.flush()``.

        Only the first call counts. After the vring was stopped (and perhaps started anew) the driver is told nothing.
        """
        if self._ptr is not None:
            self.vring.push(self, self.written)

    def abandon(self) -> None:
        """Let go of the memory without completing: the driver is told nothing. With in-flight tracking it comes again later."""
        if self._ptr is not None:
            ptr, self._ptr = self._ptr, None
            lib.vs_chain_drop(ptr)


class Vring:
    """One virtqueue of a device. ``index`` is its number in the vhost-user protocol."""

    __slots__ = ("_pool", "_ptr", "index")

    def __init__(self, index: int) -> None:
        ptr = lib.vs_vq_new(index)
        if ptr == ffi.NULL:
            raise MemoryError("no memory for a virtqueue")
        self._ptr = ffi.gc(ptr, lib.vs_vq_free)
        self._pool: list[Any] = []  # chains ready for reuse, at most BATCH_MAX
        self.index = index

    def __repr__(self) -> str:
        state = "broken" if self.broken else "running" if self.running else "idle"
        return f"<Vring {self.index} {state}>"

    @property
    def ptr(self) -> Any:
        """The ``struct vs_vq *``, for C calls."""
        return self._ptr

    # Configuration. What cannot be is refused with FrontendError, here or at start(); it takes effect at the next start().

    def set_num(self, num: int) -> None:
        """The queue size, from 1 to 32768; a power of 2 unless the acknowledged features have RING_PACKED.

        FrontendError otherwise, and on a running vring.
        """
        err = ffi.new("struct vs_err *")
        if lib.vs_vq_set_num(self._ptr, num, err) < 0:
            self._refuse(err)

    def set_addr(self, desc: int, avail: int, used: int) -> None:
        """Where the three parts of the ring are, as front-end addresses (``uva``)."""
        lib.vs_vq_set_addr(self._ptr, desc, avail, used)

    def set_base(self, base: int) -> None:
        """The index of the first chain to take; packed: both places and wrap counters, as QEMU and as DPDK encode them."""
        lib.vs_vq_set_base(self._ptr, base)

    def set_features(self, features: int) -> None:
        """The acknowledged feature bits; EVENT_IDX, INDIRECT_DESC and RING_PACKED matter here."""
        lib.vs_vq_set_features(self._ptr, features)

    def set_inflight(self, area: InflightArea | None) -> None:
        """Track in ``area`` what is in flight; chains of an earlier run are found there. None: no more. Idle only."""
        err = ffi.new("struct vs_err *")
        ptr, entries = (area.ptr, area.queue_size) if area else (ffi.NULL, 0)
        if lib.vs_vq_set_inflight(self._ptr, ptr, entries, err) < 0:
            self._refuse(err)

    # Effective at once, in any state.

    def set_log(self, log: DirtyLog | None, *, data: bool = True, ring: bool = True, address: int = 0) -> None:
        """Mark pages in ``log``: those of chains (``data``), and those of the ring, whose used part it has at ``address``."""
        lib.vs_vq_set_log(self._ptr, log.ptr if log else ffi.NULL, data, ring, address)

    def set_call(self, fd: int | None) -> None:
        """Signal the driver through ``fd``: an eventfd, a socket or a pipe, which stays the caller's; None or -1: nowhere."""
        self._notify_result("call", lib.vs_vq_set_call(self._ptr, -1 if fd is None else fd))

    def set_err(self, fd: int | None) -> None:
        """Signal ``fd`` when the vring becomes broken; as :meth:`set_call`."""
        self._notify_result("error", lib.vs_vq_set_err(self._ptr, -1 if fd is None else fd))

    def set_memory(self, memory: MemoryMap) -> None:
        """Translate through ``memory`` from now on. FrontendError, and broken, when a running ring is not in it any more.

        Chains in flight keep the map they were popped with.
        """
        if lib.vs_vq_set_mem(self._ptr, memory.ptr) < 0:
            raise FrontendError(f"vring {self.index}: {self.error}")

    def start(self) -> None:
        """Check the whole configuration and run. FrontendError when it is incomplete, misaligned or not in guest memory.

        Chains may be waiting already: look for them before waiting for a kick. NotTranslated: behind an IOMMU, try again later.
        """
        err = ffi.new("struct vs_err *")
        rc = lib.vs_vq_start(self._ptr, err)
        if rc == -errno.EAGAIN:
            raise NotTranslated(f"vring {self.index}: {ffi.string(err.text).decode(errors='replace')}")
        if rc < 0:
            self._refuse(err)

    def stop(self) -> int:
        """Flush, and be idle from now on. Returns the base for GET_VRING_BASE; again the same when it was idle already.

        Chains in flight come again after the next start if the others were completed in order; complete them before otherwise.
        """
        return int(lib.vs_vq_stop(self._ptr))

    def close(self) -> None:
        """Stop, and let go of the fds and the memory map now instead of at garbage collection. May be called again."""
        self.stop()
        lib.vs_vq_set_call(self._ptr, -1)
        lib.vs_vq_set_err(self._ptr, -1)
        lib.vs_vq_set_mem(self._ptr, ffi.NULL)
        lib.vs_vq_set_inflight(self._ptr, ffi.NULL, 0, ffi.NULL)
        lib.vs_vq_set_log(self._ptr, ffi.NULL, False, False, 0)
        self._pool.clear()

    @property
    def running(self) -> bool:
        """Started and not stopped; a broken vring still counts."""
        return bool(lib.vs_vq_running(self._ptr))

    @property
    def broken(self) -> bool:
        return bool(lib.vs_vq_broken(self._ptr))

    @property
    def error(self) -> str:
        """Why the vring is (or before the last stop was) broken; empty otherwise."""
        text: bytes = ffi.string(lib.vs_vq_error(self._ptr).text)
        return text.decode(errors="replace")

    def fail(self, why: str) -> None:
        """The driver broke a rule of the device's own protocol: a running vring is broken from now on."""
        lib.vs_vq_break(self._ptr, errno.EPROTO, why.encode())

    @property
    def missing(self) -> tuple[int, int] | None:
        """What the last pop (or start) could not do without: an IOVA, and the permissions (1 read, 2 write) that it needs."""
        iova, perm = ffi.new("uint64_t *"), ffi.new("int *")
        return (int(iova[0]), int(perm[0])) if lib.vs_vq_missing(self._ptr, iova, perm) else None

    def fits(self, memory: MemoryMap) -> bool:
        """Whether a running ring would go on running with ``set_memory(memory)``."""
        return bool(lib.vs_vq_fits(self._ptr, memory.ptr))

    @property
    def num(self) -> int:
        return int(lib.vs_vq_num(self._ptr))

    # Data.

    def pop(self) -> Chain | None:
        """The next chain, or None. DriverError when the vring is broken, FrontendError when the memory under it is gone."""
        ptr = self._pool.pop() if self._pool else self._new_chain()
        got = lib.vs_vq_pop(self._ptr, ptr)
        if got > 0:
            return Chain(self, ptr)
        self._pool.append(ptr)
        if got < 0:
            self._raise_broken()
        return None

    def pop_batch(self, limit: int) -> list[Chain]:
        """Up to ``limit`` chains (at most 256) with one call into C. Errors as :meth:`pop`, after the chains before them."""
        limit = min(limit, BATCH_MAX)
        pool = self._pool
        while len(pool) < limit:
            pool.append(self._new_chain())
        ptrs = pool[:limit]
        got = lib.vs_vq_pop_many(self._ptr, ptrs, limit)
        if got < 0:
            self._raise_broken()
        del pool[:got]
        return [Chain(self, ptr) for ptr in ptrs[:got]]

    def push(self, chain: Chain, written: int) -> None:
        """Complete ``chain``, ``written`` bytes of its writable part being valid. Visible to the driver after :meth:`flush`."""
        if chain.vring is not self:
            raise UsageError(f"{chain!r} is not of vring {self.index}")
        if not 0 <= written <= chain.writable:
            raise UsageError(f"{chain!r}: cannot complete it with {written} bytes")
        ptr = chain.ptr
        chain._ptr = None
        lib.vs_vq_push(self._ptr, ptr, written)
        if len(self._pool) < BATCH_MAX:
            self._pool.append(ptr)

    def flush(self) -> bool:
        """Show the driver all completed chains, and call it if it asked for that; True if it was called."""
        return bool(lib.vs_vq_flush(self._ptr) > 0)

    @property
    def has_available(self) -> bool:
        return bool(lib.vs_vq_has_avail(self._ptr))

    def enable_kick(self) -> bool:
        """Ask for kicks. True: chains came meanwhile, for which no kick may follow; take them before waiting."""
        return bool(lib.vs_vq_enable_kick(self._ptr))

    def disable_kick(self) -> None:
        """Kicks are not needed for now, as a hint to the driver."""
        lib.vs_vq_disable_kick(self._ptr)

    def _new_chain(self) -> Any:
        ptr = lib.vs_chain_new()
        if ptr == ffi.NULL:
            raise MemoryError("no memory for a descriptor chain")
        return ffi.gc(ptr, lib.vs_chain_free)

    def _refuse(self, err: Any) -> NoReturn:
        raise FrontendError(f"vring {self.index}: {ffi.string(err.text).decode(errors='replace')}")

    def _raise_broken(self) -> NoReturn:
        if lib.vs_vq_error(self._ptr).code == errno.EFAULT:  # only ever the memory table or the memory itself
            raise FrontendError(f"vring {self.index}: {self.error}")
        raise DriverError(self.error, vring=self.index)

    def _notify_result(self, name: str, rc: int) -> None:
        if rc == -errno.EINVAL:
            raise FrontendError(f"vring {self.index}: the {name} fd must be an eventfd, a socket or a pipe")
        if rc < 0:
            raise FrontendError(f"vring {self.index}: {name} fd: {os.strerror(-rc)}")
