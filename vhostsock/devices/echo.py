# SPDX-License-Identifier: BSD-3-Clause
"""A device for trying things out: what the driver writes into a request comes back in the same request.

Not a virtio standard. It takes id 39, for which QEMU has a name and Linux has no driver, so it can be attached as
``vhost-user-test-device-pci,virtio-id=39``. One queue. A request whose writable part is shorter than its readable part gets as
much as fits. The config space is one little-endian u32: how many requests were answered since the last reset.
"""

from __future__ import annotations

import asyncio

from ..device import Device, Queue
from ..ring import Chain

__all__ = ["Echo"]

CHUNK = 65536


class Echo(Device):
    virtio_id = 39
    packed = True

    def __init__(self) -> None:
        self.answered = 0

    async def handle(self, queue: Queue, chain: Chain) -> None:
        left = min(chain.readable, chain.writable)
        while left:
            left -= chain.write(chain.read(min(left, CHUNK)))
            if left:  # a guest may announce 4 GiB in one request, over pages that it has only once
                await asyncio.sleep(0)
        self.answered += 1

    def read_config(self, offset: int, size: int) -> bytes:
        config = (self.answered & 0xFFFFFFFF).to_bytes(4, "little")
        return config[offset : offset + size].ljust(size, b"\0")

    def reset(self) -> None:
        self.answered = 0
