# SPDX-License-Identifier: BSD-3-Clause
"""One front-end's connection: reads it, and has each event of the protocol session carried out by the part that it concerns.

    vrings.py     rings and their states        channel.py    messages to the front-end
    postcopy.py   memory that is on its way
    state.py      the device's state            here          the socket, guest memory, config space, what only devices know

Everything of the connection is given back in ``_close``, however it ended: rings stopped, memory unmapped, descriptors closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from . import ancillary
from .channel import Channel
from .device import Device
from .errors import FrontendError, RequestError
from .memory import MemoryMap
from .offers import session_config
from .postcopy import Postcopy
from .proto import Session, events, wire
from .recording import Tap
from .shmem import SharedMemory
from .state import Transfer
from .vrings import Vrings

__all__ = ["Backend", "session_config"]

log = logging.getLogger("vhostsock.server")

MTU_MIN, MTU_MAX = 68, 65535  # virtio 1.3, 5.1.4.1


class Backend:
    """Serve one connected socket: ``await Backend(device, sock).serve()``. Owns the socket; ``tap`` hears what goes over it."""

    def __init__(self, device: Device, sock: socket.socket, tap: Tap | None = None) -> None:
        self._device = device
        self._sock = sock
        self._tap = tap or Tap()
        self._loop = asyncio.get_running_loop()
        self._session = Session(session_config(device))
        self._channel = Channel(self._session, self._fail, self._tap)
        self._vrings = Vrings(device, self._session, self._channel, self._fail, self._tap)
        self._transfer = Transfer()
        self._postcopy = Postcopy(sock)
        # how often each region of a memory slot, by gpa, size and uva, was added; and its device, inode and offset
        self._slots: dict[tuple[int, int, int], tuple[int, tuple[int, int, int] | None]] = {}
        self._error: Exception | None = None
        self._readable: asyncio.Future[None] | None = None

    async def serve(self) -> None:
        """Until the front-end leaves. Raises FrontendError when it broke the protocol, OSError when the socket failed."""
        reason = "this back-end stopped"
        self._tap.connected(self._session.config)
        try:
            self._sock.setblocking(False)
            self._device._channel = self._channel
            self._device._shared_memory = SharedMemory(self._device.shmem)
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
                    await self._send(output)
                self._channel.pump()
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
                return ancillary.receive(self._sock, size)
            except (BlockingIOError, InterruptedError):
                self._readable = self._loop.create_future()
                self._loop.add_reader(self._sock, self._wake)
                try:
                    await self._readable
                finally:
                    self._loop.remove_reader(self._sock)

    async def _send(self, data: bytes) -> None:
        fds = self._session.take_output_fds()
        try:
            if fds:  # a reply of some bytes, on a socket whose reader waits for it: it has room, or the front-end is broken
                data = data[socket.send_fds(self._sock, [data], [fd.fileno() for fd in fds], socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            raise FrontendError("the front-end asks for descriptors and does not read its replies") from None
        finally:
            for fd in fds:
                fd.close()
        await self._loop.sock_sendall(self._sock, data)

    def _wake(self) -> None:
        if self._readable and not self._readable.done():
            self._readable.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake()

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

    async def _device_reset(self, _event: events.DeviceReset) -> None:
        await self._transfer.cancel("the device is reset")
        await self._vrings.reset()
        self._device._was_reset()

    async def _memory_table(self, event: events.MemoryTable) -> list[int] | None:
        with contextlib.ExitStack() as made:
            memory = MemoryMap.empty()
            for region, fd in zip(event.regions, event.fds, strict=True):
                made.callback(memory.close)
                memory = memory.with_region(fd.fileno(), **dataclasses.asdict(region))
            self._slots.clear()
            return self._use_memory(memory, event.regions)

    async def _add_region(self, event: events.AddRegion) -> list[int] | None:
        """QEMU 7.2 sends each region once for each pair of a network card, and would remove it as often."""
        region, status = event.region, os.fstat(event.fd.fileno())
        place, what = (region.gpa, region.size, region.uva), (status.st_dev, status.st_ino, region.offset)
        count, known = self._slots.get(place, (0, None))
        if known == what:
            bases = self._bases(self._vrings.memory, [region])
        else:  # also when it is another file at a place that is taken, which is refused
            memory = self._vrings.memory.with_region(event.fd.fileno(), **dataclasses.asdict(region))
            bases = self._use_memory(memory, [region])
        self._slots[place] = count + 1, what
        return bases

    def _use_memory(self, memory: MemoryMap, new: Sequence[events.Region]) -> list[int] | None:
        """Where the new regions are here, when the front-end has to know (postcopy). Nobody touches them before."""
        if self._session.listening:
            self._postcopy.register(memory)
        self._vrings.use_memory(memory)
        return self._bases(memory, new)

    def _bases(self, memory: MemoryMap, regions: Sequence[events.Region]) -> list[int] | None:
        return [Postcopy.base(memory, region) for region in regions] if self._session.listening else None

    async def _remove_region(self, event: events.RemoveRegion) -> None:
        place = event.region.gpa, event.region.size, event.region.uva
        count, what = self._slots.get(place, (1, None))
        if count > 1:
            self._slots[place] = count - 1, what
            return
        gpa, size, uva = place
        self._vrings.use_memory(self._vrings.memory.without_region(gpa=gpa, size=size, uva=uva))
        self._slots.pop(place, None)

    async def _backend_channel(self, event: events.BackendChannel) -> None:
        self._channel.open(event)

    async def _config_read(self, event: events.ConfigRead) -> bytes:
        data = self._device.read_config(event.offset, event.size)
        if len(data) != event.size:
            raise RequestError(f"read_config({event.offset}, {event.size}) gave {len(data)} bytes")
        return data

    async def _config_write(self, event: events.ConfigWrite) -> None:
        self._device.write_config(event.offset, event.data, event.flags)

    async def _postcopy_advise(self, _event: events.PostcopyAdvise) -> events.WithFd:
        return events.WithFd(None, self._postcopy.advise())

    async def _postcopy_listen(self, _event: events.PostcopyListen) -> None:
        self._postcopy.listen(self._vrings.memory)

    async def _postcopy_end(self, _event: events.PostcopyEnd) -> None:
        self._postcopy.end(self._vrings.memory)

    async def _announce(self, event: events.Announce) -> None:
        mac = wire.U64.build(event.value)[:6]
        if mac[0] & 1 or not any(mac):
            raise FrontendError(f"SEND_RARP: {mac.hex(':')} is not the address of one station")
        self._device.announce(mac)

    async def _set_mtu(self, event: events.MtuSet) -> None:
        if not MTU_MIN <= event.value <= MTU_MAX:
            raise FrontendError(f"NET_SET_MTU: {event.value} is not from {MTU_MIN} to {MTU_MAX}")
        self._device.set_mtu(event.value)

    async def _shared_object(self, event: events.SharedObject) -> events.WithFd:
        name = uuid.UUID(bytes=event.uuid)
        fd = self._device.shared_object(name)
        if fd is None:
            raise RequestError(f"{type(self._device).__name__} has no shared object {name}")
        return events.WithFd(None, events.OwnedFd(os.dup(fd)))

    async def _state_transfer(self, event: events.StateTransfer) -> None:
        if event.phase:
            raise FrontendError(f"SET_DEVICE_STATE_FD: migration phase {event.phase}; only 0 (stopped) is known")
        if self._vrings.any_started:
            raise FrontendError("SET_DEVICE_STATE_FD while rings are started: a device's state moves while it is suspended")
        limit = self._device.state_limit
        if event.direction == wire.TransferDirection.SAVE:
            self._transfer.save(event.fd.fileno(), self._device.save_state, limit)
        elif event.direction == wire.TransferDirection.LOAD:
            self._transfer.load(event.fd.fileno(), self._device.load_state, limit)
        else:
            raise FrontendError(f"SET_DEVICE_STATE_FD: direction {event.direction} is neither 0 (save) nor 1 (load)")
        event.fd.take()

    async def _state_check(self, _event: events.StateCheck) -> None:
        await self._transfer.check()

    async def _ring_starts(self, event: events.VringKick | events.VringInbandKick) -> None:
        await self._transfer.cancel("a ring starts")
        if isinstance(event, events.VringKick):
            await self._vrings.set_kick(event)
        else:
            await self._vrings.inband_kick(event)

    async def _close(self) -> None:
        self._device._channel = None
        self._device._shared_memory = None
        self._postcopy.end(self._vrings.memory)
        self._sock.close()
        await self._transfer.close()
        try:
            await self._vrings.close()
        finally:
            self._channel.close()
            self._session.close()
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


_HANDLERS: dict[type[events.Event], Callable[[Backend, Any], Awaitable[Any]]] = {
    events.FeaturesSet: lambda backend, event: backend._vrings.set_features(event),
    events.DeviceReset: Backend._device_reset,
    events.MemoryTable: Backend._memory_table,
    events.AddRegion: Backend._add_region,
    events.RemoveRegion: Backend._remove_region,
    events.VringNum: lambda backend, event: backend._vrings.set_num(event),
    events.VringAddress: lambda backend, event: backend._vrings.set_address(event),
    events.VringBase: lambda backend, event: backend._vrings.set_base(event),
    events.VringStop: lambda backend, event: backend._vrings.get_base(event),
    events.VringEnable: lambda backend, event: backend._vrings.set_enable(event),
    events.VringKick: Backend._ring_starts,
    events.VringInbandKick: Backend._ring_starts,
    events.VringCall: lambda backend, event: backend._vrings.set_call(event),
    events.VringErr: lambda backend, event: backend._vrings.set_err(event),
    events.InflightGet: lambda backend, event: backend._vrings.make_inflight(event),
    events.InflightSet: lambda backend, event: backend._vrings.set_inflight(event),
    events.LogBase: lambda backend, event: backend._vrings.set_log(event),
    events.LogFd: lambda backend, event: backend._vrings.set_log_fd(event),
    events.BackendChannel: Backend._backend_channel,
    events.ConfigRead: Backend._config_read,
    events.ConfigWrite: Backend._config_write,
    events.Iotlb: lambda backend, event: backend._vrings.set_iotlb(event),
    events.PostcopyAdvise: Backend._postcopy_advise,
    events.PostcopyListen: Backend._postcopy_listen,
    events.PostcopyEnd: Backend._postcopy_end,
    events.Announce: Backend._announce,
    events.MtuSet: Backend._set_mtu,
    events.SharedObject: Backend._shared_object,
    events.StateTransfer: Backend._state_transfer,
    events.StateCheck: Backend._state_check,
}
