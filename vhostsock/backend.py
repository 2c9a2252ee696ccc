# SPDX-License-Identifier: BSD-3-Clause
"""One front-end's connection: reads it, and has each event of the protocol session carried out by the part that it concerns.

    vrings.py     rings and their states        channel.py    messages to the front-end
    here          the socket, guest memory, config space

Everything of the connection is given back in ``_close``, however it ended: rings stopped, memory unmapped, descriptors closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from .channel import Channel
from .device import Device
from .errors import FrontendError, RequestError
from .memory import MemoryMap
from .offers import session_config
from .proto import Session, events, wire
from .recording import Tap
from .vrings import Vrings

__all__ = ["Backend", "session_config"]

log = logging.getLogger("vhostsock.server")


class Backend:
    """Serve one connected socket: ``await Backend(device, sock).serve()``. Owns the socket; ``tap`` hears what goes over it."""

    def __init__(self, device: Device, sock: socket.socket, tap: Tap | None = None) -> None:
        self._device = device
        self._sock = sock
        self._tap = tap or Tap()
        self._loop = asyncio.get_running_loop()
        self._session = Session(session_config(device))
        self._vrings = Vrings(device, self._fail, self._tap)
        self._channel = Channel(self._tap)
        self._error: Exception | None = None
        self._readable: asyncio.Future[None] | None = None

    async def serve(self) -> None:
        """Until the front-end leaves. Raises FrontendError when it broke the protocol, OSError when the socket failed."""
        reason = "this back-end stopped"
        self._tap.connected(self._session.config)
        try:
            self._sock.setblocking(False)
            self._device._config_listener = self._channel.config_changed
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
        await self._vrings.reset()
        self._device.reset()

    async def _memory_table(self, event: events.MemoryTable) -> None:
        with contextlib.ExitStack() as made:
            memory = MemoryMap.empty()
            for region, fd in zip(event.regions, event.fds, strict=True):
                made.callback(memory.close)
                memory = memory.with_region(fd.fileno(), **dataclasses.asdict(region))
            self._vrings.use_memory(memory)

    async def _add_region(self, event: events.AddRegion) -> None:
        self._vrings.use_memory(self._vrings.memory.with_region(event.fd.fileno(), **dataclasses.asdict(event.region)))

    async def _remove_region(self, event: events.RemoveRegion) -> None:
        region = event.region
        self._vrings.use_memory(self._vrings.memory.without_region(gpa=region.gpa, size=region.size, uva=region.uva))

    async def _backend_channel(self, event: events.BackendChannel) -> None:
        self._channel.open(event)

    async def _config_read(self, event: events.ConfigRead) -> bytes:
        data = self._device.read_config(event.offset, event.size)
        if len(data) != event.size:
            raise RequestError(f"read_config({event.offset}, {event.size}) gave {len(data)} bytes")
        return data

    async def _config_write(self, event: events.ConfigWrite) -> None:
        self._device.write_config(event.offset, event.data, event.flags)

    async def _close(self) -> None:
        self._device._config_listener = None
        self._sock.close()
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
    events.VringKick: lambda backend, event: backend._vrings.set_kick(event),
    events.VringCall: lambda backend, event: backend._vrings.set_call(event),
    events.VringErr: lambda backend, event: backend._vrings.set_err(event),
    events.BackendChannel: Backend._backend_channel,
    events.ConfigRead: Backend._config_read,
    events.ConfigWrite: Backend._config_write,
}
