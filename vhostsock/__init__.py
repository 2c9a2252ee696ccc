# SPDX-License-Identifier: BSD-3-Clause
"""vhostsock: vhost-user device back-ends in Python, and a socket-offload device for QEMU guests.

Subclass :class:`Device`, give it to a :class:`Server`; docs/writing-a-device.md goes from there to a guest.
"""

from .device import Device, Queue
from .errors import DriverError, FrontendError, PolicyError, RequestError, UsageError, VhostsockError
from .fileio import FileOp, FilePool
from .ring import Chain, Vring
from .server import Server

__all__ = [
    "Chain",
    "Device",
    "DriverError",
    "FileOp",
    "FilePool",
    "FrontendError",
    "PolicyError",
    "Queue",
    "RequestError",
    "Server",
    "UsageError",
    "VhostsockError",
    "Vring",
]
