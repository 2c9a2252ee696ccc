# SPDX-License-Identifier: BSD-3-Clause
"""What a device author subclasses: virtio id, queues, config space, features, and what to do with a request.

A device knows nothing of sockets and of the vhost-user protocol. The server calls it, always on the event loop's thread:

    connected()
        queue_started(q) ... queue_draining(q), queue_stopped(q)      any number of times, per queue
        read_config, write_config, reset                              any time
    disconnected()                                                    all queues are stopped then

A queue is *started* when the front-end has set it up and enabled it, and stopped before anything of it changes: on pause,
reset, a change of its addresses, or when the front-end goes. In between its chains are the device's. The default data plane
(dataplane.py) hands them to ``handle`` or ``handle_batch``; a device with a data plane of its own overrides the queue hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ClassVar

from .dataplane import DataPlane, Queue
from .errors import RequestError, UsageError
from .ring import Chain

__all__ = ["Device", "Queue"]


class Device:
    """Base class of every device. Override ``handle`` or ``handle_batch``, and what else the device needs.

    virtio_id         the device type (virtio 1.3, 5)
    num_queues        1..256
    max_queue_size    descriptors; a front-end that asks for larger queues is refused
    features          the device type's own feature bits (0..23, 50..63); ring features are the library's
    packed            offer packed rings too; the front-end and the driver choose. For all that uses Vring and Chain alone
    config            the config space, up to 256 bytes, for devices whose config never changes
    acked_features    what of all offered feature bits the driver took; set by the server, before a queue starts
    concurrency       ``handle`` calls under way at once, per queue; more chains wait in the ring
    stop_timeout      seconds that calls under way get when a queue stops; then they are cancelled
    """

    virtio_id: ClassVar[int]
    num_queues: int = 1
    max_queue_size: int = 1024
    features: int = 0
    acked_features: int = 0
    packed: bool = False
    config: bytes = b""
    concurrency: int = 64
    stop_timeout: float = 1.0

    _config_listener: Callable[[], None] | None = None

    # ---- requests: override one of the two

    async def handle(self, queue: Queue, chain: Chain) -> None:
        """One request. Read from the chain, write to it, return: it is completed then, with what was written.

        Calls run concurrently (see ``concurrency``), also on one queue, and may complete in any order. RequestError:
        ``refused`` may write a status, the chain is completed. DriverError: the ring is broken until the driver sets it up
        again. Another exception is a bug of the device: it is logged, and the chain is completed with what was written.
        """
        raise UsageError(f"{type(self).__name__} overrides neither handle nor handle_batch")

    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
        """Requests as they lie in the ring, at most 64 at a time, without a task each. Complete each chain, now or later.

        What is completed later needs ``queue.flush()``. An exception completes the chains that are still open.
        """
        raise UsageError(f"{type(self).__name__} overrides neither handle nor handle_batch")

    def refused(self, queue: Queue, chain: Chain, error: RequestError) -> None:
        """Write ``error.status`` to the chain where this device type has it. The chain is completed afterwards."""

    # ---- config space (virtio 1.3, 2.5)

    @property
    def has_config(self) -> bool:
        """Whether to offer the front-end a config space."""
        return bool(self.config) or type(self).read_config is not Device.read_config

    def read_config(self, offset: int, size: int) -> bytes:
        """``size`` bytes of the config space from ``offset`` on. Default: ``config``, and zeros behind its end."""
        return self.config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        """The driver wrote. QEMU's generic device sends the whole space each time. RequestError: the write is refused."""
        raise RequestError(f"{type(self).__name__} has no writable config space")

    def config_changed(self) -> None:
        """Call this when the config space reads differently from before: the guest gets a configuration interrupt.

        Nothing happens while no front-end is connected, or one that opened no channel for it.
        """
        if self._config_listener:
            self._config_listener()

    # ---- life

    async def connected(self) -> None:
        """A front-end came. Nothing is set up yet."""

    async def disconnected(self) -> None:
        """It went, for whatever reason; every queue is stopped."""

    def reset(self) -> None:
        """The driver starts from scratch: forget what it told the device. All queues are stopped.

        Called for RESET_DEVICE; and, since QEMU's generic device has no such message, when a queue comes back with other
        addresses, size, base or features than it was stopped with. A reset after which all of these are the same (a queue
        that was never used, say) cannot be told from a pause.
        """

    def reload(self) -> None:
        """Look again at what was opened or read at the start: ``vhostsock serve`` calls this on SIGHUP, if it is overridden."""

    def report(self) -> None:
        """Log the device's figures, if it keeps any: ``vhostsock serve`` calls this on SIGUSR1."""

    # ---- data plane

    def queue_started(self, queue: Queue) -> None:
        """From here on ``queue.vring`` is the device's. Scan it at once: kicks may have come before."""
        queue.plane = DataPlane(self, queue, batched=type(self).handle_batch is not Device.handle_batch)

    async def queue_draining(self, queue: Queue) -> None:
        """Take no new chains, and finish those under way as far as it takes a bounded time. ``queue_stopped`` follows."""
        if queue.plane:
            await queue.plane.drain(self.stop_timeout)

    def queue_stopped(self, queue: Queue) -> None:
        """On return nothing of the device uses ``queue.vring`` any more."""
        if queue.plane:
            queue.plane.close()
            queue.plane = None

    def quiesced(self) -> contextlib.AbstractContextManager[None]:
        """Held while the server changes a live vring's call fd or the memory map. For data planes on another thread."""
        return contextlib.nullcontext()
