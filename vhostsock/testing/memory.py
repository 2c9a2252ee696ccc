"""A guest's RAM without a guest: one memfd a region, an allocator, the address spaces of the guest and of the front-end.

And the dirty log of a migration of it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from vhostsock.memory import MemoryMap

__all__ = ["PAGE", "DirtyPages", "GuestMemory", "Region", "pages"]

PAGE = 4096  # of a dirty log, whatever the host's pages are


@dataclass(frozen=True)
class Region:
    """One row of the memory table, as ADD_MEM_REG has it: ``size`` bytes at ``offset`` of the file ``fd``."""

    fd: int
    gpa: int
    size: int
    uva: int
    offset: int = 0


class GuestMemory:
    """A guest's RAM: one memfd per size given, adjacent in guest-physical addresses from ``gpa`` on.

    Front-end addresses (``uva``) begin at ``uva``, with a hole after each region, so that what is adjacent for the guest is not
    for the front-end. A size must be a multiple of the page size. Not thread-safe. Blocks that are freed are used again by
    size, so a driver can run for ever in bounded memory.
    """

    def __init__(self, *sizes: int, gpa: int = 0x4000_0000, uva: int = 0x7F00_0000_0000) -> None:
        self.regions: list[Region] = []
        self._maps: list[mmap.mmap] = []
        self._next = 0  # region to allocate from
        self._tops: list[int] = []  # first gpa of each region that was never allocated
        self._free: dict[int, list[int]] = {}  # block size -> addresses
        try:
            for size in sizes:
                fd = os.memfd_create("vhostsock-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                self.regions.append(Region(fd, gpa, size, uva))
                os.ftruncate(fd, size)
                self._maps.append(mmap.mmap(fd, size))
                self._tops.append(gpa)
                gpa += size
                uva += size + 0x10000
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and close the files. Back-ends that mapped them keep their own mappings. May be called again."""
        while self._maps:
            self._maps.pop().close()
        while self.regions:
            os.close(self.regions.pop().fd)

    def map(self) -> MemoryMap:
        """The regions as a back-end would map them. The caller closes it (or lets it go)."""
        memory = MemoryMap.empty()
        for r in self.regions:
            memory = memory.with_region(r.fd, gpa=r.gpa, size=r.size, uva=r.uva, offset=r.offset)
        return memory

    def _pieces(self, gpa: int, size: int) -> Iterable[tuple[mmap.mmap, int, int]]:
        """(map, offset, length) for each region that ``[gpa, gpa + size)`` is in. IndexError outside of memory."""
        for region, view in zip(self.regions, self._maps, strict=True):
            if region.gpa <= gpa < region.gpa + region.size:
                part = min(size, region.gpa + region.size - gpa)
                yield view, gpa - region.gpa, part
                gpa, size = gpa + part, size - part
                if not size:
                    return
        if size:
            raise IndexError(f"guest-physical address {gpa:#x} is not in guest memory")

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes at ``gpa``; may cross regions. IndexError outside of memory."""
        return b"".join(view[off : off + n] for view, off, n in self._pieces(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        """Store ``data`` at ``gpa``; may cross regions. IndexError outside of memory."""
        for view, off, n in self._pieces(gpa, len(data)):
            view[off : off + n] = data[:n]
            data = data[n:]

    def at(self, gpa: int, size: int) -> tuple[mmap.mmap, int]:
        """The mapping and the offset in it of ``size`` bytes that are in one region. IndexError if they are not."""
        [(view, off, _)] = self._pieces(gpa, 1)
        if off + size > len(view):
            raise IndexError(f"{size} bytes at {gpa:#x} are not in one region")
        return view, off

    def uva(self, gpa: int) -> int:
        """The front-end's address of a guest-physical address. IndexError outside of memory."""
        for r in self.regions:
            if r.gpa <= gpa < r.gpa + r.size:
                return r.uva + gpa - r.gpa
        raise IndexError(f"guest-physical address {gpa:#x} is not in guest memory")

    @staticmethod
    def _block(size: int) -> int:
        return max(16, 1 << (size - 1).bit_length())

    def alloc(self, size: int, region: int | None = None) -> int:
        """A block of ``size`` bytes in one region (in that one if given); its contents are whatever was there before.

        Aligned to its size rounded up to a power of two, at most to a page. MemoryError when no region has room.
        """
        block = self._block(size)
        if region is None and self._free.get(block):
            return self._free[block].pop()
        for i in range(len(self.regions)) if region is None else (region,):
            align = min(block, mmap.PAGESIZE)
            start = (self._tops[i] + align - 1) // align * align
            # not always room for the whole rounded block: the last one of a region may be as small as asked
            if start + size <= self.regions[i].gpa + self.regions[i].size:
                self._tops[i] = start + block
                return start
        raise MemoryError(f"no {size} bytes left in the guest memory")

    def free(self, gpa: int, size: int) -> None:
        """Give back what ``alloc(size)`` returned."""
        self._free.setdefault(self._block(size), []).append(gpa)


class DirtyPages:
    """A dirty log as a front-end shares it: ``fd`` has ``size`` bytes, a bit for each page from guest-physical address 0 on."""

    def __init__(self, memory: GuestMemory) -> None:
        last = max(region.gpa + region.size for region in memory.regions)
        self.size = ((last + PAGE - 1) // PAGE + 7) // 8
        self.fd = os.memfd_create("vhostsock-log", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.size)
            self._map = mmap.mmap(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> DirtyPages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and close the file. May be called again."""
        self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def take(self) -> set[int]:
        """The guest-physical addresses of the pages that are marked, which are not any more. Not while the device runs."""
        marked = {8 * i + bit for i, byte in enumerate(self._map[:]) if byte for bit in range(8) if byte >> bit & 1}
        self._map[:] = bytes(self.size)
        return {PAGE * page for page in marked}


def pages(gpa: int, size: int) -> set[int]:
    """The addresses of the pages that ``size`` bytes at ``gpa`` are in."""
    return set(range(gpa // PAGE * PAGE, gpa + size, PAGE))
