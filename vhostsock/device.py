# SPDX-License-Identifier: BSD-3-Clause
"""What a device author subclasses: virtio id, queues, config space, features, and what to do with a request.

A device knows nothing of sockets and of the vhost-user protocol. The server calls it, always on the event loop's thread:

    connected()
        queue_started(q) ... queue_draining(q), queue_stopped(q)      any number of times, per queue
        read_config, write_config, reset, announce, set_mtu           any time
        save_state, load_state                                        while all queues are stopped
    disconnected()                                                    all queues are stopped then

A queue is *started* when the front-end has set it up and enabled it, and stopped before anything of it changes: on pause,
reset, a change of its addresses, or when the front-end goes. In between its chains are the device's. The default data plane
(dataplane.py) hands them to ``handle`` or ``handle_batch``; a device with a data plane of its own overrides the queue hooks.
"""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from .dataplane import DataPlane, Queue
from .errors import RequestError, UsageError
from .proto import wire
from .ring import Chain
from .shmem import SharedMemory
from .state import StateReader, StateWriter

__all__ = ["Device", "Queue"]


class _Channel(Protocol):
    """What a device needs of the back-end channel (channel.py)."""

    def notify(self, request: wire.BackendRequest, value: Any = None, *, key: object = None, ack: bool = False) -> None: ...
    async def call(self, request: wire.BackendRequest, value: Any = None, *, fd: int = -1) -> int: ...


class Device:
    """Base class of every device. Override ``handle`` or ``handle_batch``, and what else the device needs.

    virtio_id         the device type (virtio 1.3, 5)
    num_queues        1..256
    max_queue_size    descriptors; a front-end that asks for larger queues is refused
    features          the device type's own feature bits (0..23, 50..63); ring features are the library's
    packed            offer packed rings too; the front-end and the driver choose. For all that uses Vring and Chain alone
    in_order          offer completion in order: what is completed early waits for older requests, and costs the driver less
    inflight          requests survive a crash: the front-end keeps which are under way, and they come again (``chain.again``).
                      And a queue that stops cancels them instead of waiting. For requests that may be carried out twice
    migratable        keep a dirty log for live migration; what the device itself remembers is another matter
    postcopy          offer to be migrated in postcopy: memory may arrive when it is touched, and whoever touches it waits.
                      Needs the right to make a userfaultfd (root, or access to /dev/userfaultfd)
    gpa_addresses     offer to be told guest-physical addresses where it would be the front-end's own virtual ones
    iommu             offer to work behind an IOMMU (ACCESS_PLATFORM). For devices with the default data plane
    inband            offer kicks and calls by messages, for simulations: slow, and a front-end has to want it
    shared_objects    exchange dma-bufs with other devices of the machine: see ``shared_object`` and ``share_object``
    shmem             sizes in bytes of shared memory regions by their ids (virtio 1.3, 2.10), whole pages: see ``shmem_map``
    state_limit       bytes that ``save_state`` may write, and that ``load_state`` is given at most
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
    in_order: bool = False
    inflight: bool = False
    migratable: bool = False
    postcopy: bool = False
    gpa_addresses: bool = False
    iommu: bool = False
    inband: bool = False
    shared_objects: bool = False
    shmem: Mapping[int, int] = {}
    state_limit: int = 64 << 20
    config: bytes = b""
    concurrency: int = 64
    stop_timeout: float = 1.0

    _channel: _Channel | None = None  # of the front-end that is connected
    _shared_memory: SharedMemory | None = None  # what it has mapped

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
        if self._channel:
            self._channel.notify(wire.BackendRequest.CONFIG_CHANGE_MSG)

    # ---- network devices

    def announce(self, mac: bytes) -> None:
        """The guest with this MAC address (6 bytes) has moved here, and its driver does not say so itself: tell the network.

        Offered (RARP) by a device that overrides it.
        """
        raise RequestError(f"{type(self).__name__} has no network to tell")

    def set_mtu(self, mtu: int) -> None:
        """The guest is told this MTU, 68 to 65535 bytes. RequestError when the device cannot have it.

        Offered (NET_MTU) by a device that overrides it.
        """
        raise RequestError(f"{type(self).__name__} has no MTU")

    # ---- shared objects (the vhost-user document, VHOST_USER_BACKEND_SHARED_OBJECT_ADD)

    def shared_object(self, name: uuid.UUID) -> int | None:
        """The dma-buf that was shared under this name: a descriptor, which stays the device's. None: there is none."""
        return None

    async def share_object(self, name: uuid.UUID) -> None:
        """Tell the front-end that this device has an object of that name, which others will then ask ``shared_object`` for."""
        await self._call(wire.BackendRequest.SHARED_OBJECT_ADD, {"uuid": name.bytes})

    async def unshare_object(self, name: uuid.UUID) -> None:
        await self._call(wire.BackendRequest.SHARED_OBJECT_REMOVE, {"uuid": name.bytes})

    async def lookup_object(self, name: uuid.UUID) -> int:
        """The descriptor of an object of another device; the caller closes it. OSError (EREMOTEIO) when nobody has one."""
        fd = await self._call(wire.BackendRequest.SHARED_OBJECT_LOOKUP, {"uuid": name.bytes})
        if fd < 0:
            raise OSError(errno.EREMOTEIO, f"the front-end found {name} and sent no descriptor")
        return fd

    # ---- shared memory regions

    async def shmem_map(
        self, shmid: int, offset: int, size: int, fd: int, *, fd_offset: int = 0, writable: bool = True
    ) -> None:
        """Show the guest ``size`` bytes of ``fd`` from ``fd_offset`` on, at ``offset`` of region ``shmid``.

        ``fd`` stays the caller's. UsageError where something is mapped already, and outside of the region. A reset unmaps all.
        """
        memory = self._memory_of(shmid)
        memory.take(shmid, offset, size)
        try:
            await self._call(wire.BackendRequest.SHMEM_MAP, _mmap(shmid, offset, size, fd_offset, writable), fd=fd)
        except BaseException:
            memory.drop(shmid, offset)
            raise

    async def shmem_unmap(self, shmid: int, offset: int, size: int) -> None:
        """Take back one whole mapping. UsageError for anything else."""
        memory = self._memory_of(shmid)
        memory.check(shmid, offset, size)
        await self._call(wire.BackendRequest.SHMEM_UNMAP, _mmap(shmid, offset, size, 0, False))
        memory.drop(shmid, offset)

    def _memory_of(self, shmid: int) -> SharedMemory:
        if not self._shared_memory:
            raise OSError(errno.ENOTCONN, f"shared memory region {shmid}: no front-end is connected")
        return self._shared_memory

    async def _call(self, request: wire.BackendRequest, value: Any, *, fd: int = -1) -> int:
        """A message to the front-end and its answer: channel.Channel.call says how it fails.

        It waits while the device is suspended (paused, or not started yet), so do not await it in ``connected``.
        """
        if not self._channel:
            raise OSError(errno.ENOTCONN, f"{request.name}: no front-end is connected")
        return await self._channel.call(request, value, fd=fd)

    # ---- migration

    async def save_state(self, stream: StateWriter) -> None:
        """Write what another instance of the device needs to go on in this one's place. All queues are stopped.

        What an exception says is logged, and the migration fails. Offered (DEVICE_STATE) by a device that overrides both.
        """
        raise UsageError(f"{type(self).__name__} does not override save_state")

    async def load_state(self, stream: StateReader) -> None:
        """Become what ``save_state`` wrote. No queue was started yet, and the driver's features are not known yet.

        The bytes are from the other side of a migration: check them as you would a guest's.
        """
        raise UsageError(f"{type(self).__name__} does not override load_state")

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

    def _was_reset(self) -> None:
        """A reset, as the server tells of it: the front-end has unmapped the shared memory regions."""
        if self._shared_memory:
            self._shared_memory.clear()
        self.reset()

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

    async def queue_suspending(self, queue: Queue) -> None:
        """Instead of ``queue_draining`` where what is under way need not be finished: it is in flight and comes again.

        Take no new chains, and see that nothing of the guest is written to after the return. Default: cancel the handlers; of
        a device with a data plane of its own: drain.
        """
        if queue.plane:
            await queue.plane.suspend(self.stop_timeout)
        else:
            await self.queue_draining(queue)

    def queue_stopped(self, queue: Queue) -> None:
        """On return nothing of the device uses ``queue.vring`` any more."""
        if queue.plane:
            queue.plane.close()
            queue.plane = None

    def quiesced(self) -> contextlib.AbstractContextManager[None]:
        """Held while the server changes a live vring's call fd or the memory map. For data planes on another thread."""
        return contextlib.nullcontext()


def _mmap(shmid: int, offset: int, size: int, fd_offset: int, writable: bool) -> dict[str, int]:
    return {"shmid": shmid, "fd_offset": fd_offset, "shm_offset": offset, "len": size, "flags": int(writable)}
