# SPDX-License-Identifier: BSD-3-Clause
"""What of a device's shared memory regions (virtio 1.3, 2.10) is mapped: the rules, without any I/O.

A front-end refuses a mapping over another one and an unmapping of less or more than one whole mapping (the vhost-user document,
SHMEM_MAP); a device that tries has a bug, and hears so here with the evidence.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

from .errors import UsageError

__all__ = ["REGIONS", "SharedMemory", "check_sizes"]

REGIONS = 256  # an id has 8 bits
PAGE = mmap.PAGESIZE


def check_sizes(sizes: Mapping[int, int]) -> tuple[int, ...]:
    """{id: bytes} as a tuple by id. UsageError for what no region can be."""
    for shmid, size in sizes.items():
        if not 0 <= shmid < REGIONS:
            raise UsageError(f"shared memory region {shmid}: ids are 0 to {REGIONS - 1}")
        if size <= 0 or size % PAGE or size >= 1 << 63:
            raise UsageError(f"shared memory region {shmid}: its size {size:#x} is not a multiple of the page size {PAGE:#x}")
    return tuple(sizes.get(shmid, 0) for shmid in range(max(sizes, default=-1) + 1))


class SharedMemory:
    """The mappings of one device, per region: {offset: size}."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self._sizes = sizes
        self._mapped: dict[int, dict[int, int]] = {shmid: {} for shmid in sizes}

    def take(self, shmid: int, offset: int, size: int) -> None:
        """Note a mapping. UsageError when it is not in the region, not of whole pages, or over another one."""
        mapped = self._region(shmid)
        if size <= 0 or offset < 0 or size % PAGE or offset % PAGE:
            raise UsageError(f"shared memory region {shmid}: offset {offset:#x}, size {size:#x}: mappings have whole pages")
        if offset + size > self._sizes[shmid]:
            raise UsageError(
                f"shared memory region {shmid} has {self._sizes[shmid]:#x} bytes: offset {offset:#x}, size {size:#x} is outside"
            )
        for other, length in mapped.items():
            if offset < other + length and other < offset + size:
                raise UsageError(
                    f"shared memory region {shmid}: offset {offset:#x}, size {size:#x} overlaps what is mapped at {other:#x}, "
                    f"size {length:#x}"
                )
        mapped[offset] = size

    def check(self, shmid: int, offset: int, size: int) -> None:
        """UsageError unless this is a whole mapping."""
        if self._region(shmid).get(offset) != size:
            raise UsageError(f"shared memory region {shmid}: nothing is mapped at {offset:#x} with size {size:#x}")

    def drop(self, shmid: int, offset: int) -> None:
        self._mapped[shmid].pop(offset, None)

    def clear(self) -> None:
        """The device was reset, or the front-end went: with that all mappings are gone."""
        for mapped in self._mapped.values():
            mapped.clear()

    def _region(self, shmid: int) -> dict[int, int]:
        if shmid not in self._mapped:
            raise UsageError(f"there is no shared memory region {shmid}: say its size in Device.shmem")
        return self._mapped[shmid]
