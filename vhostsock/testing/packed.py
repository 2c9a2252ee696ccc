"""The driver side of a packed virtqueue (virtio 1.3, 2.8), with the face of :class:`~vhostsock.testing.driver.DriverQueue`.

A descriptor's AVAIL and USED flags say whose it is, compared with a wrap counter that starts as 1 and flips at each end of the
ring. ``add`` writes a chain with its flags, but those of the first head since the last ``publish`` are kept back: the device
stops in front of it. The parts are the descriptor ring, the driver's event area and the device's, in the places that a split
ring has for its three. ``head`` of a request is its buffer id.
"""

from __future__ import annotations

import os
import struct

from vhostsock._core import lib
from vhostsock.testing.driver import DESC_NEXT, DeviceFault, DriverQueue, GuestMemory, Request

__all__ = ["AVAIL", "DISABLE", "ENABLE", "FRESH_BASE", "USED", "PackedQueue"]

F_RING_PACKED = 1 << 34
AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2  # flags of an event area (2.8.10)
FRESH_BASE = 0x8000_8000  # both places 0, both wrap counters 1, as QEMU gives it

_DESC = struct.Struct("<QIHH")  # addr, len, id, flags


def marks(wrap: int, *, used: bool) -> int:
    """AVAIL and USED of a descriptor on the lap with this wrap counter."""
    return (AVAIL if wrap else 0) | (USED if wrap == used else 0)


class PackedQueue(DriverQueue):
    """As DriverQueue; ``num`` need not be a power of two. ``base``: place and wrap counter, in both halves."""

    def __init__(
        self,
        memory: GuestMemory,
        num: int = 256,
        *,
        base: int = FRESH_BASE,
        event_idx: bool = True,
        indirect: bool = True,
        in_order: bool = False,
    ) -> None:
        super().__init__(memory, num, base=base, event_idx=event_idx, indirect=indirect, in_order=in_order)
        self.features |= F_RING_PACKED

    def _make_ring(self) -> None:
        at, wrap = self.base & 0x7FFF, self.base >> 15 & 1
        self.desc, self.avail, self.used = self._ring_part(16 * self.num), self._ring_part(4), self._ring_part(4)
        # the ring as if it had been used up to here: this lap's marks before the place, those of the last lap behind it
        for i in range(self.num):
            self.write_desc(i, 0, 0, marks(wrap if i < at else 1 - wrap, used=True))
        self._avail_at, self._avail_wrap = at, wrap
        self._used_at, self._used_wrap = at, wrap
        self._held: tuple[int, int] | None = None  # descriptor and flags that publish() stores
        self._slots = self.num
        self._ids = list(range(self.num - 1, -1, -1))
        self._unkicked = 0  # slots published since the last kick decision
        self._unpublished = 0

    @property
    def free(self) -> int:
        return self._slots

    def _table_entry(self, i: int, count: int, gpa: int, size: int, flags: int) -> bytes:
        return _DESC.pack(gpa, size, 0, flags)

    def _link(self, buffers: list[tuple[int, int, int]]) -> tuple[int, list[int]]:
        name, descs, first = self._ids.pop(), [], None
        for i, (gpa, size, flags) in enumerate(buffers):
            flags |= marks(self._avail_wrap, used=False) | (DESC_NEXT if i < len(buffers) - 1 else 0)
            at = self._avail_at
            self.write_desc(at, gpa, size, self.desc_flags(at) if i == 0 else flags, name)
            first = first or (at, flags)
            descs.append(at)
            self._avail_at += 1
            if self._avail_at == self.num:
                self._avail_at, self._avail_wrap = 0, 1 - self._avail_wrap
        assert first
        self._slots -= len(descs)
        self._unpublished += len(descs)
        if self._held is None:
            self._held = first
        else:
            self.set_desc_flags(*first)
        return name, descs

    def _release(self, request: Request) -> None:
        self._slots += len(request._descs)
        self._ids.append(request.head)

    def publish(self) -> None:
        lib.vs_mb()  # pairs with the device's acquire of the head's flags (2.8.21.1)
        if self._held:
            self.set_desc_flags(*self._held)
        self._held = None
        self._unkicked += self._unpublished
        self._unpublished = 0

    def kick(self) -> bool:
        lib.vs_mb()  # pairs with the device's barrier between its event area and the head's flags (2.8.21.3.1)
        place, flags = self.device_event
        slots, self._unkicked = self._unkicked, 0
        if flags == DESC and self.event_idx:
            since = self._avail_at - (place & 0x7FFF) + (self.num if place >> 15 != self._avail_wrap else 0)
            wanted = 0 < since <= slots
        else:
            wanted = flags != DISABLE
        if wanted:
            os.eventfd_write(self.kick_fd, 1)
        return wanted

    def _is_used(self) -> bool:
        flags = self.desc_flags(self._used_at)
        return bool(flags & AVAIL) == bool(flags & USED) == bool(self._used_wrap)

    def collect(self) -> list[Request]:
        done: list[Request] = []
        while self._pending and self._is_used():
            lib.vs_mb()  # pairs with the device's release of the flags: id and length are read after it (2.8.22)
            at = self._used_at
            _, written, name, _ = _DESC.unpack(self.memory.read(self.desc + 16 * at, 16))
            batch = self._finish_batch(f"desc {at}: buffer id", name, written)
            self._used_at += sum(len(request._descs) for request in batch)
            if self._used_at >= self.num:
                self._used_at, self._used_wrap = self._used_at - self.num, 1 - self._used_wrap
            done += batch
        if not self._pending and self._is_used():
            raise DeviceFault(f"desc {self._used_at} was used with no request in flight")
        return done

    def enable_calls(self) -> bool:
        if self.event_idx:
            self.driver_event = (self._used_at | self._used_wrap << 15, DESC)
        else:
            self.driver_event = (0, ENABLE)
        lib.vs_mb()  # pairs with the device's barrier between the used flags and the driver's event area (2.8.10)
        return self._is_used()

    def disable_calls(self) -> None:
        self.driver_event = (0, DISABLE)

    # Raw access

    def write_desc(self, index: int, addr: int, size: int, flags: int = 0, next: int = 0) -> None:
        """Overwrite descriptor ``index``; ``next`` is its buffer id."""
        self.memory.write(self.desc + 16 * index, _DESC.pack(addr, size, next, flags))

    def desc_flags(self, index: int) -> int:
        return self._load(self.desc + 16 * index + 14)

    def set_desc_flags(self, index: int, flags: int) -> None:
        self._store(self.desc + 16 * index + 14, flags)

    @property
    def driver_event(self) -> tuple[int, int]:
        """(place with wrap counter in bit 15, flags) of the area that the driver writes."""
        return self._load(self.avail), self._load(self.avail + 2)

    @driver_event.setter
    def driver_event(self, value: tuple[int, int]) -> None:
        place, flags = value
        self._store(self.avail, place)
        lib.vs_mb()  # the place before the flags that say it counts
        self._store(self.avail + 2, flags)

    @property
    def device_event(self) -> tuple[int, int]:
        """The same of the area that the device writes."""
        return self._load(self.used), self._load(self.used + 2)
