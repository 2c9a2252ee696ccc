# SPDX-License-Identifier: BSD-3-Clause
"""The IOMMU between a driver and a back-end, as a front-end has it: answers what the back-end misses.

The driver's addresses (those of vhostsock.testing.memory) are the I/O virtual ones; the front-end gives memory regions other
guest-physical addresses, so a back-end that forgets to translate finds nothing.
"""

from __future__ import annotations

import asyncio
import mmap
from typing import TYPE_CHECKING, Any

from ..proto import ProtocolFeature, wire
from ..proto.wire import BackendRequest, IotlbType, Request
from .messages import Refused

if TYPE_CHECKING:
    from .frontend import Frontend

__all__ = ["SHIFT", "Iommu"]

PAGE = mmap.PAGESIZE
SHIFT = 1 << 36  # from a driver's address to the guest-physical one that the back-end is told


class Iommu:
    """``misses``: (iova, permissions) in the order of the questions.

    ``denied``: pages, by their address, that are not mapped, or mapped for reading (1) or writing (2) only. ``hold()`` makes
    questions wait until ``release()``.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self.misses: list[tuple[int, int]] = []
        self.denied: dict[int, int] = {}
        self.asked = asyncio.Event()  # set at each question; to be cleared by the test
        self._open = asyncio.Event()
        self._open.set()

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def serve(self) -> None:
        """Until it is cancelled, or the back-end closes the channel."""
        channel = self._frontend.channel
        assert channel, "an IOMMU needs the back-end channel"
        while True:
            try:
                message = await channel.next()
            except EOFError:
                return
            message.close()
            if message.request == BackendRequest.IOTLB_MSG:
                assert message.value.type == IotlbType.MISS
                self.misses.append((message.value.iova, message.value.perm))
                self.asked.set()
                await self._open.wait()
                await self.map(message.value.iova)
            if message.wants_answer:
                await channel.answer(message.request)

    async def map(self, iova: int) -> None:
        """Tell the back-end of the page that holds ``iova``, if it is mapped: as QEMU does it, before the question's answer."""
        page = iova // PAGE * PAGE
        perm = self.denied.get(page, 3)
        try:
            uva = self.address(page)
        except IndexError:
            return
        if perm:
            await self.update(page, PAGE, uva, perm)

    def address(self, iova: int) -> int:
        """What the front-end calls the place of ``iova``: its own address, or with GPA_ADDRESSES the guest-physical one."""
        by_gpa = self._frontend.protocol_features & ProtocolFeature.GPA_ADDRESSES
        uva = self._frontend.memory.uva(iova)  # IndexError where there is no memory
        return iova + SHIFT if by_gpa else uva

    async def update(self, iova: int, size: int, uva: int, perm: int) -> None:
        """IOTLB_MSG. Refused when the back-end says so."""
        await self._send(iova=iova, size=size, uaddr=uva, perm=perm, type=IotlbType.UPDATE)

    async def invalidate(self, iova: int, size: int) -> None:
        await self._send(iova=iova, size=size, type=IotlbType.INVALIDATE)

    async def _send(self, **value: Any) -> None:
        if await self._frontend.request(Request.IOTLB_MSG, wire.IOTLB, value, reply=wire.U64):
            raise Refused("IOTLB_MSG")
