# SPDX-License-Identifier: BSD-3-Clause
"""What the rings of a driver behind an IOMMU lack, asked of the front-end (the vhost-user document, "IOMMU support").

A ring has one question at a time. It waits, and the others do not: for the update that answers the question, which comes as a
message of its own (Vrings.set_iotlb). Where REPLY_ACK was negotiated an answer without an update before it means that there is
no such mapping, and that is the driver's fault.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable

from .channel import Channel
from .errors import FrontendError
from .iotlb import Iotlb
from .memory import MemoryMap
from .proto import ProtocolFeature, Session, wire
from .ringstate import Ring

__all__ = ["Misses"]

log = logging.getLogger("vhostsock.server")


class Misses:
    """Of one connection. ``fail``: told when the session cannot go on."""

    def __init__(self, session: Session, channel: Channel, fail: Callable[[Exception], None]) -> None:
        self._session = session
        self._channel = channel
        self._fail = fail
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, ring: Ring, view: MemoryMap, iova: int, perm: int) -> None:
        """Ask for ``iova``, unless that question is under way, or was answered meanwhile: ``view`` is what is known now."""
        if Iotlb.has(view, iova, perm):
            if ring.queue.plane:
                ring.queue.plane.wake()
        elif ring.asked != (iova, perm):
            ring.asked = iova, perm
            task = asyncio.get_running_loop().create_task(self._ask(ring, ring.asked))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, ring: Ring, asked: tuple[int, int]) -> None:
        iova, perm = asked
        miss = {"iova": iova, "perm": perm, "type": wire.IotlbType.MISS}
        answered = bool(self._session.protocol_features & ProtocolFeature.REPLY_ACK)
        try:
            await self._channel.call(wire.BackendRequest.IOTLB_MSG, miss)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._fail(FrontendError(f"ring {ring.queue.index}: a driver behind an IOMMU needs the back-end channel"))
                return
            if error.errno != errno.EREMOTEIO:
                return  # the channel is gone, and with it most likely the front-end
            answered = True
        # An update would have come before the answer. "is": the same question may have been put again since.
        if ring.asked is asked and answered:
            ring.asked = None
            self._unmapped(ring, f"iova {iova:#x} is not mapped for {'reading' if perm == 1 else 'writing'}")

    def _unmapped(self, ring: Ring, why: str) -> None:
        if not ring.attached:
            log.warning("ring %d: %s; it waits until the front-end maps it", ring.queue.index, why)
            return
        ring.queue.vring.fail(why)
        if ring.queue.plane:
            ring.queue.plane.wake()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
