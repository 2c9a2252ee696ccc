"""The device side of a split virtqueue again, in plain Python and by the letter of virtio 1.3, 2.7: what C is compared with.

Slow and obvious on purpose: sets instead of modular arithmetic, the whole chain listed before it is judged.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

NEXT, WRITE, INDIRECT = 1, 2, 4
CHAIN_MAX = 1024


class Broken(Exception):
    """The driver broke a rule."""


@dataclass(frozen=True)
class Buffer:
    addr: int
    size: int
    writable: bool


@dataclass
class Memory:
    """Guest-physical memory: (start, contents) of each region."""

    regions: list[tuple[int, Callable[[int, int], bytes]]]
    sizes: list[int]

    def covers(self, addr: int, size: int) -> bool:
        """Every byte is in some region."""
        while size:
            for (start, _), length in zip(self.regions, self.sizes, strict=True):
                if start <= addr < start + length:
                    step = min(size, start + length - addr)
                    addr, size = addr + step, size - step
                    break
            else:
                return False
        return True

    def in_one_region(self, addr: int, size: int) -> bool:
        return any(
            start <= addr and addr + size <= start + length
            for (start, _), length in zip(self.regions, self.sizes, strict=True)
        )

    def read(self, addr: int, size: int) -> bytes:
        data = b""
        while size:
            for (start, get), length in zip(self.regions, self.sizes, strict=True):
                if start <= addr < start + length:
                    step = min(size, start + length - addr)
                    data += get(addr, step)
                    addr, size = addr + step, size - step
                    break
        return data


Entry = Callable[[int], tuple[int, int, int, int]]


def follow(table: Entry, entries: int, head: int, limit: int) -> list[tuple[int, int, int]]:
    """The descriptors of one table from ``head`` on: (addr, len, flags) each."""
    found = []
    visited = set()
    at: int | None = head
    while at is not None:
        if at >= entries:
            raise Broken("next out of range")
        if at in visited:
            raise Broken("loop")
        visited.add(at)
        addr, size, flags, following = table(at)
        found.append((addr, size, flags))
        if len(found) > limit:
            raise Broken("too long")
        at = following if flags & NEXT and not flags & INDIRECT else None
    return found


def chain(memory: Memory, desc_at: int, num: int, head: int, indirect_ok: bool) -> list[Buffer]:
    """The buffers of the chain that starts at descriptor ``head``, or Broken."""
    limit = min(num, CHAIN_MAX)

    def entry(base: int) -> Entry:
        def get(i: int) -> tuple[int, int, int, int]:
            addr, size, flags, following = struct.unpack("<QIHH", memory.read(base + 16 * i, 16))
            return addr, size, flags, following

        return get

    if head >= num:
        raise Broken("head out of range")
    descs = follow(entry(desc_at), num, head, limit)
    addr, size, flags = descs[-1]
    if flags & INDIRECT:
        entries = size // 16
        if not indirect_ok or flags & NEXT or size == 0 or size % 16 or entries > limit:
            raise Broken("indirect rules")
        if not memory.in_one_region(addr, size):
            raise Broken("table not in one region")
        inner = follow(entry(addr), entries, 0, limit)
        if any(f & INDIRECT for _, _, f in inner):
            raise Broken("nested")
        descs = descs[:-1] + inner
    if len(descs) > limit:
        raise Broken("too long")
    buffers = [Buffer(a, n, bool(f & WRITE)) for a, n, f in descs]
    order = [b.writable for b in buffers]
    if order != sorted(order):
        raise Broken("readable after writable")
    if not all(memory.covers(b.addr, b.size) for b in buffers):
        raise Broken("buffer not in memory")
    if sum(b.size for b in buffers) > 1 << 32:
        raise Broken("too many bytes")
    return buffers


def notify_wanted(old: int, new: int, event: int) -> bool:
    """Does [old, new) modulo 2**16 contain ``event``? (2.7.7.2 and 2.7.10)"""
    published = set()
    while old != new:
        published.add(old)
        old = (old + 1) % 65536
    return event in published
