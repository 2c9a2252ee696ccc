# SPDX-License-Identifier: BSD-3-Clause
"""An entropy source (virtio 1.3, 5.4): the smallest device there is. One queue, each request is room to be filled."""

from __future__ import annotations

import os

from ..device import Device, Queue
from ..ring import Chain

__all__ = ["Rng"]

# A guest may offer gigabytes of room in one chain; a device may use less of it (5.4.6.2). Linux asks for 64 bytes.
MAX_BYTES = 65536


class Rng(Device):
    """Serves the stock virtio-rng driver: ``-device vhost-user-rng-pci``."""

    virtio_id = 4
    packed = True

    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
        for chain in chains:
            chain.write(os.urandom(min(chain.writable, MAX_BYTES)))
            chain.complete()
