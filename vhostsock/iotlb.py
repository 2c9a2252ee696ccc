# SPDX-License-Identifier: BSD-3-Clause
"""Translation for a driver behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM): the device IOTLB of one connection.

A front-end says where I/O virtual addresses are (IOTLB_MSG), mostly because it was asked (a miss). What it said, over a memory
map, is a view: a MemoryMap that rings and chains use as any other (csrc/core/vs_iotlb.h).
"""

from __future__ import annotations

from vhostsock._core import ffi, lib
from vhostsock.errors import FrontendError
from vhostsock.memory import MemoryMap

__all__ = ["Iotlb"]


class Iotlb:
    """What is known, at most VS_IOTLB_MAX ranges; a new one takes the place of the oldest."""

    def __init__(self) -> None:
        ptr = lib.vs_iotlb_new()
        if ptr == ffi.NULL:
            raise MemoryError("no memory for an IOTLB")
        self._ptr = ffi.gc(ptr, lib.vs_iotlb_free)

    @property
    def entries(self) -> int:
        return int(lib.vs_iotlb_count(self._ptr))

    def update(self, iova: int, size: int, uva: int, perm: int) -> None:
        """[iova, iova + size) is at front-end address uva. FrontendError for what cannot be."""
        err = ffi.new("struct vs_err *")
        if lib.vs_iotlb_update(self._ptr, iova, size, uva, perm, err) < 0:
            raise FrontendError(ffi.string(err.text).decode(errors="replace"))

    def invalidate(self, iova: int, size: int) -> None:
        """[iova, iova + size), or to the end of all addresses, is not known any more."""
        if lib.vs_iotlb_invalidate(self._ptr, iova, size) < 0:
            raise FrontendError(f"IOTLB invalidation at iova {iova:#x} of {size} bytes")

    def clear(self) -> None:
        lib.vs_iotlb_clear(self._ptr)

    def view(self, memory: MemoryMap) -> MemoryMap:
        """What is known now about ``memory``. The new map holds the regions that it needs."""
        return MemoryMap(lib.vs_iotlb_view(self._ptr, memory.ptr))

    @staticmethod
    def has(view: MemoryMap, iova: int, perm: int) -> bool:
        """Whether the view has the byte at ``iova`` with these permissions."""
        return not lib.vs_mem_missing(view.ptr, iova, 1, perm, ffi.new("uint64_t *"))
