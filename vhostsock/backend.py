# SPDX-License-Identifier: BSD-3-Clause
"""One front-end's connection: carries out what the protocol session asks for, on the rings, the memory map and the device.

A ring has three facts that come and go independently (the vhost-user document, "Ring states"):

    started     SET_VRING_KICK to GET_VRING_BASE: the vring runs, its configuration was checked
    enabled     SET_VRING_ENABLE, or always without PROTOCOL_FEATURES; kept while the ring is stopped
    attached    both of the above: the device's data plane has the queue

Nobody reads the kick fd of a ring that is not attached, and attaching scans the ring, so a kick that comes before
SET_VRING_ENABLE is not lost. Detaching finishes the requests under way (Device.stop_timeout bounds it).

Setting something of a started ring again: the same value changes nothing; another one restarts the ring with it. The call fd
and the memory map change under a running ring without a stop, while ``Device.quiesced()`` is held.

Everything of the connection is given back in ``_close``, however it ended: rings stopped, memory unmapped, descriptors closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from .device import Device, Queue
from .errors import FrontendError, RequestError, UsageError
from .memory import MemoryMap
from .proto import Session, SessionConfig, events, wire
from .proto.features import (
    DEVICE_FEATURES,
    IMPLEMENTED_PROTOCOL,
    OPTIONAL_RING_FEATURES,
    RING_FEATURES,
    ProtocolFeature,
    VirtioFeature,
    names,
)
from .recording import Tap

__all__ = ["Backend", "session_config"]

log = logging.getLogger("vhostsock.server")


def session_config(device: Device) -> SessionConfig:
    """What a session offers on behalf of a device. UsageError when the device asks for what cannot be offered."""
    name = type(device).__name__
    reserved = VirtioFeature(device.features & ~DEVICE_FEATURES)
    if reserved:
        raise UsageError(f"{name}.features: {names(reserved)}: a device chooses among bits 0 to 23 and 50 to 63")
    if len(device.config) > wire.CONFIG_MAX:
        raise UsageError(f"{name}.config has {len(device.config)} bytes; {wire.CONFIG_MAX} is all that a front-end can read")
    protocol = IMPLEMENTED_PROTOCOL if device.has_config else IMPLEMENTED_PROTOCOL & ~ProtocolFeature.CONFIG
    rings = RING_FEATURES | OPTIONAL_RING_FEATURES if device.packed else RING_FEATURES
    return SessionConfig(rings | device.features, protocol, device.num_queues)


@dataclasses.dataclass(slots=True)
class _Ring:
    queue: Queue
    enabled: bool = False
    started: bool = False
    attached: bool = False
    num: int = 0
    address: tuple[int, int, int] = (0, 0, 0)  # desc, avail, used, as Vring.set_addr takes them
    base: int = 0
    features: int = 0
    stopped_with: tuple[Any, ...] | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a pause keeps and a new driver most likely changes."""
        return self.num, self.address, self.base, self.features


class Backend:
    """Serve one connected socket: ``await Backend(device, sock).serve()``. Owns the socket; ``tap`` hears what goes over it."""

    def __init__(self, device: Device, sock: socket.socket, tap: Tap | None = None) -> None:
        self._device = device
        self._sock = sock
        self._tap = tap or Tap()
        self._loop = asyncio.get_running_loop()
        self._session = Session(session_config(device))
        self._memory = MemoryMap.empty()
        self._rings = [_Ring(Queue(index, self._fail)) for index in range(device.num_queues)]
        self._channel: socket.socket | None = None
        self._error: Exception | None = None
        self._readable: asyncio.Future[None] | None = None
        for ring in self._rings:
            self._install(ring)

    async def serve(self) -> None:
        """Until the front-end leaves. Raises FrontendError when it broke the protocol, OSError when the socket failed."""
        reason = "this back-end stopped"
        self._tap.connected(self._session.config)
        try:
            self._sock.setblocking(False)
            self._device._config_listener = self._config_changed
            self._device.acked_features = 0
            await self._device.connected()
            while True:
                data, fds, truncated = await self._receive(self._session.wanted)
                self._tap.received(data, fds)
                event = self._session.receive(data, fds, truncated=truncated)
                if not data:
                    reason = "front-end closed the connection"
                    return
                if event:
                    await self._carry_out(event)
                output = self._session.take_output()
                if output:
                    self._tap.sent(output)
                    await self._loop.sock_sendall(self._sock, output)
                # None of the above has to wait while the front-end goes on sending: let the others have their turn.
                await asyncio.sleep(0)
        except Exception as error:
            reason = f"session ended: {error}"
            raise
        finally:
            try:
                await _to_the_end(self._close())
            finally:
                self._tap.ended(reason)

    # ---- the socket

    async def _receive(self, size: int) -> tuple[bytes, list[int], bool]:
        """At most ``size`` bytes with the descriptors that came along; raises what a data plane reported meanwhile."""
        while True:
            if self._error:
                raise self._error
            try:
                data, fds, flags, _ = socket.recv_fds(self._sock, size, wire.MAX_FDS, socket.MSG_CMSG_CLOEXEC)
                return data, list(fds), bool(flags & socket.MSG_CTRUNC)
            except (BlockingIOError, InterruptedError):
                self._readable = self._loop.create_future()
                self._loop.add_reader(self._sock, self._wake)
                try:
                    await self._readable
                finally:
                    self._loop.remove_reader(self._sock)

    def _wake(self) -> None:
        if self._readable and not self._readable.done():
            self._readable.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake()

    def _config_changed(self) -> None:
        if self._channel:
            # a full channel holds an unread notice already; a closed one is noticed at the main socket
            with contextlib.suppress(OSError):
                message = wire.pack(wire.BackendRequest.CONFIG_CHANGE_MSG, wire.REQUEST_FLAGS)
                self._channel.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                self._tap.sent_on_channel(message)

    # ---- events

    async def _carry_out(self, event: events.Event) -> None:
        try:
            value = await _HANDLERS[type(event)](self, event)
        except RequestError as error:  # the driver's doing, which the front-end only passed on
            log.info("%s", error)
            self._session.refuse(str(error), fatal=False)
        except (FrontendError, OSError, MemoryError) as error:
            log.warning("refused: %s", error)
            self._session.refuse(str(error))
        else:
            self._session.done(value)

    async def _features_set(self, event: events.FeaturesSet) -> None:
        self._device.acked_features = event.value
        for ring in self._rings:
            ring.features = event.value
            ring.queue.vring.set_features(event.value)
            if not event.value & VirtioFeature.PROTOCOL_FEATURES:
                ring.enabled = True
        self._attach_ready()

    async def _device_reset(self, _event: events.DeviceReset) -> None:
        for ring in self._rings:
            ring.enabled = False
        await asyncio.gather(*map(self._stop, self._rings))
        for ring in self._rings:
            ring.stopped_with = None
            ring.base = 0
            ring.queue.vring.set_base(0)
        self._device.reset()

    async def _memory_table(self, event: events.MemoryTable) -> None:
        with contextlib.ExitStack() as made:
            memory = MemoryMap.empty()
            for region, fd in zip(event.regions, event.fds, strict=True):
                made.callback(memory.close)
                memory = memory.with_region(fd.fileno(), **dataclasses.asdict(region))
            self._use_memory(memory)

    async def _add_region(self, event: events.AddRegion) -> None:
        self._use_memory(self._memory.with_region(event.fd.fileno(), **dataclasses.asdict(event.region)))

    async def _remove_region(self, event: events.RemoveRegion) -> None:
        region = event.region
        self._use_memory(self._memory.without_region(gpa=region.gpa, size=region.size, uva=region.uva))

    async def _vring_num(self, event: events.VringNum) -> None:
        if event.num > self._device.max_queue_size:
            raise FrontendError(f"ring {event.index}: {event.num} descriptors, this device takes {self._device.max_queue_size}")
        await self._configure(self._rings[event.index], "num", event.num)

    async def _vring_address(self, event: events.VringAddress) -> None:
        await self._configure(self._rings[event.index], "address", (event.desc, event.avail, event.used))

    async def _vring_base(self, event: events.VringBase) -> None:
        await self._configure(self._rings[event.index], "base", event.num)

    async def _vring_stop(self, event: events.VringStop) -> int:
        ring = self._rings[event.index]
        await self._stop(ring)
        return ring.base

    async def _vring_enable(self, event: events.VringEnable) -> None:
        if event.num > 1:
            raise FrontendError(f"ring {event.index}: SET_VRING_ENABLE with {event.num}, must be 0 or 1")
        ring = self._rings[event.index]
        ring.enabled = bool(event.num)
        if not ring.enabled:
            await self._detach(ring)
        self._attach_ready()

    async def _vring_kick(self, event: events.VringKick) -> None:
        ring = self._rings[event.index]
        if event.fd is None:
            raise FrontendError(f"ring {event.index}: SET_VRING_KICK without an eventfd asks for polling, which is not served")
        if stat.S_IFMT(os.fstat(event.fd.fileno()).st_mode) not in _PLAIN_EVENT_FDS:
            raise FrontendError(f"ring {event.index}: the kick fd must be an eventfd, a socket or a pipe")
        os.set_blocking(event.fd.fileno(), False)  # of the open file, so also for the front-end; QEMU's is that already
        await self._detach(ring)
        self._drop_kick(ring)
        if not ring.started:
            ring.queue.vring.start()
            ring.started = True
        ring.queue.kick_fd = event.fd.take()
        self._attach_ready()

    async def _vring_call(self, event: events.VringCall) -> None:
        ring = self._rings[event.index]
        with self._device.quiesced():
            ring.queue.vring.set_call(event.fd.fileno() if event.fd else None)
        if ring.started and event.fd and stat.S_IFMT(os.fstat(event.fd.fileno()).st_mode) == 0:
            # The old fd may have swallowed a call: QEMU gives a masked one first and the guest's after SET_VRING_ENABLE. One
            # call too many is harmless (virtio 1.3, 2.3: the driver looks at the ring), one too few hangs the guest.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(event.fd.fileno(), 1)

    async def _vring_err(self, event: events.VringErr) -> None:
        with self._device.quiesced():
            self._rings[event.index].queue.vring.set_err(event.fd.fileno() if event.fd else None)

    async def _backend_channel(self, event: events.BackendChannel) -> None:
        if not stat.S_ISSOCK(os.fstat(event.fd.fileno()).st_mode):
            raise FrontendError("SET_BACKEND_REQ_FD: the descriptor is not a socket")
        self._close_channel()
        self._channel = socket.socket(fileno=event.fd.take())

    async def _config_read(self, event: events.ConfigRead) -> bytes:
        data = self._device.read_config(event.offset, event.size)
        if len(data) != event.size:
            raise RequestError(f"read_config({event.offset}, {event.size}) gave {len(data)} bytes")
        return data

    async def _config_write(self, event: events.ConfigWrite) -> None:
        self._device.write_config(event.offset, event.data, event.flags)

    # ---- rings

    def _install(self, ring: _Ring) -> None:
        """Give the vring the memory map of now. FrontendError when a running one is not in it."""
        ring.queue.memory = self._memory
        ring.queue.vring.set_memory(self._memory)

    def _use_memory(self, memory: MemoryMap) -> None:
        old, self._memory = self._memory, memory
        errors = []
        with self._device.quiesced():
            for ring in self._rings:
                try:
                    self._install(ring)
                except FrontendError as error:
                    errors.append(error)
        old.close()
        if errors:
            raise errors[0]

    async def _configure(self, ring: _Ring, name: str, value: Any) -> None:
        """Set num, address or base; restart a started ring if that changes it."""
        if ring.started and getattr(ring, name) == value:
            return
        restart = ring.started
        if restart:
            await self._detach(ring)
            ring.base = ring.queue.vring.stop()
            ring.started = False
        setter = {"num": "set_num", "address": "set_addr", "base": "set_base"}[name]
        getattr(ring.queue.vring, setter)(*value if name == "address" else (value,))
        setattr(ring, name, value)
        if restart:
            ring.queue.vring.start()
            ring.started = True
            self._attach_ready()

    def _attach_ready(self) -> None:
        """Hand every ring that is started and enabled to the device."""
        ready = [ring for ring in self._rings if ring.started and ring.enabled and not ring.attached]
        if not ready:
            return
        if not any(ring.attached for ring in self._rings) and any(
            ring.started and ring.stopped_with not in (None, ring.identity) for ring in self._rings
        ):
            self._device.reset()
        for ring in self._rings:
            ring.stopped_with = None
        for ring in ready:
            self._device.queue_started(ring.queue)
            ring.attached = True
            self._tap.noted(f"ring {ring.queue.index} started")

    async def _detach(self, ring: _Ring) -> None:
        if not ring.attached:
            return
        ring.attached = False
        try:
            await self._device.queue_draining(ring.queue)
        finally:  # also when this task is cancelled: a data plane must never see its vring stop
            self._device.queue_stopped(ring.queue)
            self._tap.noted(f"ring {ring.queue.index} stopped")

    async def _stop(self, ring: _Ring) -> None:
        await self._detach(ring)
        self._drop_kick(ring)
        ring.base = ring.queue.vring.stop()
        if ring.started:
            ring.started = False
            ring.stopped_with = ring.identity

    def _drop_kick(self, ring: _Ring) -> None:
        fd, ring.queue.kick_fd = ring.queue.kick_fd, -1
        if fd >= 0:
            os.close(fd)

    def _close_channel(self) -> None:
        if self._channel:
            self._channel.close()
            self._channel = None

    async def _close(self) -> None:
        self._device._config_listener = None
        self._sock.close()
        try:
            for result in await asyncio.gather(*map(self._stop, self._rings), return_exceptions=True):
                if isinstance(result, Exception):
                    log.error("%s failed to stop a queue", type(self._device).__name__, exc_info=result)
        finally:
            for ring in self._rings:
                self._drop_kick(ring)
                ring.queue.vring.close()
            self._close_channel()
            self._session.close()
            self._memory.close()
        await self._device.disconnected()


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``, which takes a bounded time, and only then let a cancellation through: half a clean-up would leave the
    device with vrings that are gone."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled:
        raise cancelled


_PLAIN_EVENT_FDS = (0, stat.S_IFSOCK, stat.S_IFIFO)  # an eventfd is an anonymous inode, which has no type

_HANDLERS: dict[type[events.Event], Callable[[Backend, Any], Awaitable[Any]]] = {
    events.FeaturesSet: Backend._features_set,
    events.DeviceReset: Backend._device_reset,
    events.MemoryTable: Backend._memory_table,
    events.AddRegion: Backend._add_region,
    events.RemoveRegion: Backend._remove_region,
    events.VringNum: Backend._vring_num,
    events.VringAddress: Backend._vring_address,
    events.VringBase: Backend._vring_base,
    events.VringStop: Backend._vring_stop,
    events.VringEnable: Backend._vring_enable,
    events.VringKick: Backend._vring_kick,
    events.VringCall: Backend._vring_call,
    events.VringErr: Backend._vring_err,
    events.BackendChannel: Backend._backend_channel,
    events.ConfigRead: Backend._config_read,
    events.ConfigWrite: Backend._config_write,
}
