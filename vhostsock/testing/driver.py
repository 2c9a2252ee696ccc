"""A guest without a guest: shared memory, and the driver side of a split virtqueue (virtio 1.3, 2.7).

:class:`GuestMemory` (memory.py) is the guest's RAM. :class:`DriverQueue` puts a ring into it, offers requests, kicks
and collects what the device has used, with notification suppression in both directions. It is written from the specification
and shares no code with the device side, so that each checks the other; what a device may not do raises :class:`DeviceFault`.

Alone, against a :class:`~vhostsock.ring.Vring`::

    with GuestMemory(1 << 20) as memory, DriverQueue(memory, 64) as queue:
        vring = Vring(0)
        queue.attach(vring)                        # what a front-end does with SET_VRING_*
        request = queue.submit([b"ping"], [64])    # 4 bytes for the device, 64 bytes of room
        ...                                        # the device pops, completes and flushes
        [done] = queue.wait()                      # done is request; done.data is what the device wrote

The packed format has the same face: :class:`vhostsock.testing.packed.PackedQueue`.

With a back-end process, hand ``memory.regions``, ``queue.addresses`` and the fds to a front-end
(``vhostsock.testing.frontend``).

Hostile drivers are made from the raw part: :meth:`DriverQueue.write_desc`, :meth:`DriverQueue.offer` and the ``*_idx``,
``*_event`` and ``*_flags`` properties write whatever they are told.
"""

from __future__ import annotations

import asyncio
import os
import select
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from vhostsock._core import lib
from vhostsock.errors import VhostsockError
from vhostsock.memory import MemoryMap
from vhostsock.ring import Vring
from vhostsock.testing.memory import GuestMemory, Region

__all__ = ["DeviceFault", "DriverQueue", "GuestMemory", "Region", "Request", "RingFull"]

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_IN_ORDER = 1 << 35

DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4
NO_INTERRUPT = 1  # avail.flags: the driver wants no calls
NO_NOTIFY = 1  # used.flags: the device wants no kicks

_DESC = struct.Struct("<QIHH")  # addr, len, flags, next
_ELEM = struct.Struct("<II")  # id, len


class DeviceFault(VhostsockError):
    """The device broke the virtqueue rules."""


class RingFull(VhostsockError):
    """There are too few free descriptors for this request. Collect used ones first."""


@dataclass(eq=False)
class Request:
    """One chain of the driver. ``written`` and ``data`` are valid once the device has used it."""

    head: int
    readable: list[tuple[int, int]]  # (gpa, size) of each buffer
    writable: list[tuple[int, int]]
    written: int | None = None
    data: bytes = b""
    _descs: list[int] = field(default_factory=list, repr=False)  # descriptors of the ring that it takes
    _table: tuple[int, int] | None = field(default=None, repr=False)  # indirect table: (gpa, size)

    @property
    def room(self) -> int:
        return sum(size for _, size in self.writable)


class DriverQueue:
    """The driver side of one split virtqueue of ``num`` descriptors in ``memory``.

    ``base`` is where the indices start, for wrap-around and for resumed rings. ``kick_fd``, ``call_fd`` and ``err_fd`` are
    eventfds, non-blocking, closed by :meth:`close`. ``features`` are the ring features it uses, with VERSION_1. ``in_order``:
    a used element may stand for a batch of requests (2.7.9), and one out of order is a DeviceFault.
    """

    def __init__(
        self,
        memory: GuestMemory,
        num: int = 256,
        *,
        base: int = 0,
        event_idx: bool = True,
        indirect: bool = True,
        in_order: bool = False,
    ) -> None:
        self.memory = memory
        self.num = num
        self.base = base
        self.event_idx = event_idx
        self.indirect = indirect
        self.in_order = in_order
        self.features = F_VERSION_1 | (F_EVENT_IDX if event_idx else 0) | (F_INDIRECT_DESC if indirect else 0)
        self.features |= F_IN_ORDER if in_order else 0
        self._pending: dict[int, Request] = {}
        self._make_ring()
        self.kick_fd = self.call_fd = self.err_fd = -1
        try:
            self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except BaseException:
            self.close()
            raise

    def _make_ring(self) -> None:
        num, base = self.num, self.base
        # virtio 1.3, 2.7: sizes of the three parts; alloc() aligns better than is asked for
        self.desc = self._ring_part(16 * num)
        self.avail = self._ring_part(6 + 2 * num)
        self.used = self._ring_part(6 + 8 * num)
        self._used_event_at = self.avail + 4 + 2 * num
        self._avail_event_at = self.used + 4 + 8 * num
        self._free = list(range(num - 1, -1, -1))
        self._avail_next = base  # where the next head goes; the device sees it after publish()
        self._kicked = base  # avail.idx at the last kick decision
        self._used_next = base
        self.avail_idx = base
        self.used_idx = base
        self.used_event = base

    def _ring_part(self, size: int) -> int:
        gpa = self.memory.alloc(size)
        self.memory.write(gpa, bytes(size))
        return gpa

    def __enter__(self) -> DriverQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the eventfds. May be called again."""
        for name in ("kick_fd", "call_fd", "err_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)

    # What a front-end tells the back-end

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Front-end addresses of descriptor table, available ring and used ring."""
        return self.memory.uva(self.desc), self.memory.uva(self.avail), self.memory.uva(self.used)

    def attach(self, vring: Vring, memory: MemoryMap | None = None) -> None:
        """Configure and start ``vring`` on this ring, as a front-end's messages would. FrontendError as Vring.start()."""
        own = memory or self.memory.map()
        vring.set_memory(own)
        vring.set_features(self.features)
        vring.set_num(self.num)
        vring.set_addr(*self.addresses)
        vring.set_base(self.base)
        vring.set_call(self.call_fd)
        vring.set_err(self.err_fd)
        vring.start()

    # Requests

    @property
    def in_flight(self) -> int:
        """Requests that were added and that used() has not returned yet."""
        return len(self._pending)

    @property
    def free(self) -> int:
        """Free descriptors."""
        return len(self._free)

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), *, indirect: bool | None = None) -> Request:
        """Put one request into the ring: a descriptor for each item, ``writable`` giving the room in bytes.

        ``indirect``: through an indirect table; by default when it has more than one descriptor and the feature is there.
        The device sees it after :meth:`publish`. RingFull, MemoryError.
        """
        count = len(readable) + len(writable)
        if not count:
            raise ValueError("a request needs at least one descriptor")
        if indirect is None:
            indirect = self.indirect and count > 1
        if (1 if indirect else count) > self.free:
            raise RingFull(f"{count} descriptors needed, {self.free} free")
        out = [(self.memory.alloc(len(data)), len(data)) for data in readable]
        for (gpa, _), data in zip(out, readable, strict=True):
            self.memory.write(gpa, data)
        room = [(self.memory.alloc(size), size) for size in writable]
        buffers = [(gpa, size, 0) for gpa, size in out] + [(gpa, size, DESC_WRITE) for gpa, size in room]
        table = None
        if indirect:
            table = (self.memory.alloc(16 * count), 16 * count)
            self.memory.write(table[0], b"".join(self._table_entry(i, count, *buffer) for i, buffer in enumerate(buffers)))
            buffers = [(*table, DESC_INDIRECT)]
        head, descs = self._link(buffers)
        self._pending[head] = request = Request(head, out, room, _descs=descs, _table=table)
        return request

    def _table_entry(self, i: int, count: int, gpa: int, size: int, flags: int) -> bytes:
        """Entry ``i`` of ``count`` of an indirect table."""
        last = i == count - 1
        return _DESC.pack(gpa, size, flags if last else flags | DESC_NEXT, 0 if last else i + 1)

    def _link(self, buffers: list[tuple[int, int, int]]) -> tuple[int, list[int]]:
        """Put a chain of (gpa, size, flags) into the ring: its name in used elements, and the descriptors it takes."""
        descs = [self._free.pop() for _ in buffers]
        for i, (gpa, size, flags) in enumerate(buffers):
            last = i == len(buffers) - 1
            self.write_desc(descs[i], gpa, size, flags if last else flags | DESC_NEXT, 0 if last else descs[i + 1])
        self.offer(descs[0])
        return descs[0], descs

    def publish(self) -> None:
        """Show the device everything that was added."""
        lib.vs_mb()  # pairs with the device's acquire of avail.idx (2.7.13.3.1)
        self.avail_idx = self._avail_next

    def kick(self) -> bool:
        """Signal kick_fd if the device asked for it (2.7.10); whether it did."""
        lib.vs_mb()  # pairs with the device's barrier between avail_event (or flags) and avail.idx (2.7.13.4.1)
        old, new = self._kicked, self._avail_next
        self._kicked = new
        if self.event_idx:
            wanted = (new - self.avail_event - 1) % 65536 < (new - old) % 65536
        else:
            wanted = not self.used_flags & NO_NOTIFY
        if wanted:
            os.eventfd_write(self.kick_fd, 1)
        return wanted

    def submit(self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), *, indirect: bool | None = None) -> Request:
        """add(), publish() and kick()."""
        request = self.add(readable, writable, indirect=indirect)
        self.publish()
        self.kick()
        return request

    # Completions

    def collect(self) -> list[Request]:
        """What the device has used since the last time, in its order. Never blocks. DeviceFault if that cannot be."""
        idx = self.used_idx
        lib.vs_mb()  # pairs with the device's release of used.idx: the elements are read after it (2.7.14)
        if (idx - self._used_next) % 65536 > len(self._pending):
            raise DeviceFault(f"used.idx moved from {self._used_next} to {idx} with {len(self._pending)} requests in flight")
        done: list[Request] = []
        while self._used_next != idx:
            head, written = _ELEM.unpack(self.memory.read(self.used + 4 + 8 * (self._used_next % self.num), 8))
            batch = self._finish_batch(f"used.ring[{self._used_next % self.num}]: head", head, written)
            if len(batch) > (idx - self._used_next) % 65536:
                raise DeviceFault(f"used.idx is {idx}, in the middle of a batch of {len(batch)} from {self._used_next} on")
            self._used_next = (self._used_next + len(batch)) % 65536
            done += batch
        return done

    def _finish_batch(self, where: str, name: int, written: int) -> list[Request]:
        """What one used element stands for: with IN_ORDER all requests up to the one it names, the others written whole."""
        done = []
        if self.in_order and name in self._pending:
            while (oldest := next(iter(self._pending.values()))).head != name:
                done.append(self._finish(where, oldest.head, oldest.room))
        return [*done, self._finish(where, name, written)]

    def _finish(self, where: str, head: int, written: int) -> Request:
        request = self._pending.pop(head, None)
        if request is None:
            raise DeviceFault(f"{where} {head} is not in flight")
        if written > request.room:
            raise DeviceFault(f"{where} {head}: {written} bytes written, there was room for {request.room}")
        data = b"".join(self.memory.read(gpa, size) for gpa, size in request.writable if size)
        request.written, request.data = written, data[:written]
        for gpa, size in request.readable + request.writable + ([request._table] if request._table else []):
            self.memory.free(gpa, size)
        self._release(request)
        return request

    def _release(self, request: Request) -> None:
        self._free.extend(reversed(request._descs))

    def enable_calls(self) -> bool:
        """Ask for a call at the next completion. True: something was completed already, collect it before waiting."""
        if self.event_idx:
            self.used_event = self._used_next
        else:
            self.avail_flags = 0
        lib.vs_mb()  # pairs with the device's barrier between used.idx and used_event (or flags) (2.7.7)
        return self.used_idx != self._used_next

    def disable_calls(self) -> None:
        """Ask for no calls. With EVENT_IDX that is a used_event which was passed already (2.7.7.1 keeps flags 0)."""
        if self.event_idx:
            self.used_event = (self._used_next - 1) % 65536
        else:
            self.avail_flags = NO_INTERRUPT

    def take_call(self) -> bool:
        """Was there a call since the last time? Never blocks."""
        return self._take(self.call_fd)

    def take_kick(self) -> bool:
        """As the device would: was there a kick since the last time? Never blocks."""
        return self._take(self.kick_fd)

    @staticmethod
    def _take(fd: int) -> bool:
        try:
            return os.eventfd_read(fd) > 0
        except BlockingIOError:
            return False

    def wait(self, count: int = 1, timeout: float = 30.0) -> list[Request]:
        """Collect until there are ``count`` requests, waiting for calls. TimeoutError after ``timeout`` seconds without one."""
        done = self.collect()
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        while len(done) < count:
            if not self.enable_calls():
                if not poll.poll(timeout * 1000):
                    raise TimeoutError(f"the device completed {len(done)} of {count} requests, then made no call")
                self.take_call()
            done += self.collect()
        return done

    async def wait_async(self, count: int = 1) -> list[Request]:
        """As :meth:`wait`, on the running asyncio loop, and for as long as it takes (``asyncio.timeout`` bounds it)."""
        loop = asyncio.get_running_loop()
        called = asyncio.Event()
        done = self.collect()
        loop.add_reader(self.call_fd, called.set)
        try:
            while len(done) < count:
                if not self.enable_calls():
                    await called.wait()
                    called.clear()
                    self.take_call()
                done += self.collect()
        finally:
            loop.remove_reader(self.call_fd)
        return done

    # Raw access: whatever it is told, legal or not

    def write_desc(self, index: int, addr: int, size: int, flags: int = 0, next: int = 0) -> None:
        """Overwrite descriptor ``index`` of the table."""
        self.memory.write(self.desc + 16 * index, _DESC.pack(addr, size, flags, next))

    def offer_chain(self, *buffers: tuple[int, int, int]) -> int:
        """Put a chain of (gpa, size, flags) into the ring, a descriptor each, with NEXT between them. Its head, or buffer id.

        The device sees it after publish(). Nobody remembers it: collect() does not expect it back.
        """
        return self._link(list(buffers))[0]

    def make_table(self, *buffers: tuple[int, int, int]) -> tuple[int, int, int]:
        """An indirect table of them in guest memory; a buffer for offer_chain() that refers to it."""
        entries = [self._table_entry(i, len(buffers), *buffer) for i, buffer in enumerate(buffers)]
        gpa = self.memory.alloc(16 * len(entries))
        self.memory.write(gpa, b"".join(entries))
        return gpa, 16 * len(entries), DESC_INDIRECT

    def offer(self, head: int) -> None:
        """Put ``head`` into the available ring; the device sees it after publish()."""
        self._store(self.avail + 4 + 2 * (self._avail_next % self.num), head)
        self._avail_next = (self._avail_next + 1) % 65536

    # One 2-byte load or store: memoryview makes it that. struct goes byte by byte, and zeroes the place before it packs.

    def _load(self, gpa: int) -> int:
        view, off = self.memory.at(gpa, 2)
        with memoryview(view) as words, words.cast("H") as words:
            return words[off // 2]

    def _store(self, gpa: int, value: int) -> None:
        view, off = self.memory.at(gpa, 2)
        with memoryview(view) as words, words.cast("H") as words:
            words[off // 2] = value

    @property
    def avail_flags(self) -> int:
        return self._load(self.avail)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._store(self.avail, value)

    @property
    def avail_idx(self) -> int:
        return self._load(self.avail + 2)

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self._store(self.avail + 2, value)

    @property
    def used_event(self) -> int:
        return self._load(self._used_event_at)

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._store(self._used_event_at, value)

    @property
    def used_flags(self) -> int:
        return self._load(self.used)

    @property
    def used_idx(self) -> int:
        return self._load(self.used + 2)

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self._store(self.used + 2, value)

    @property
    def avail_event(self) -> int:
        return self._load(self._avail_event_at)
