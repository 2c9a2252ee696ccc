# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-vsock device (virtio 1.3, 5.10): AF_VSOCK sockets of a guest become sockets of the host.

Division of work.  The engine (csrc/engine/vs_vsock.c) speaks to the driver and moves all bytes. Here each connection is
decided, once: where a port of the host leads to (``forwards``, then ``uds_path``), and which port of the guest a connection of
the host is for (host.py). Without either, every connection is refused.

A connection of the guest comes as CONNECT and gets one answer, a connected descriptor or a refusal. A connection of the host is
announced with Engine.call(); TAKEN follows, or ENDED, or nothing, and then it is reset after ``connect_timeout``.

Log lines start with the device's name and the two ports, guest first: ``vm1 1024 -> 5432 ...``; ``<-`` when the host began.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final

from .._core import ffi, lib
from ..device import Queue
from ..errors import UsageError
from ..offload.abi import struct_of
from ..offload.engine import Event
from ..offload.engine_device import EngineDevice
from ..offload.errnos import errno_name, guest_errno
from ..offload.flows import ended_text
from ..offload.handlers import Connection, DirectHandler, Handler, InProcessHandler, Request, StreamFunction, UnixHandler
from ..offload.policy import Guest
from ..offload.uri import UNIX_PATH_MAX, InetURI, UnixURI, URIError, VsockURI, parse
from .host import BadRequest, Doorway, listen, read_port

__all__ = ["VsockDevice"]

log = logging.getLogger("vhostsock.vsock")

CONFIG: Final = struct_of("struct vsk_config")
CID_HOST: Final[int] = lib.VSK_CID_HOST
EVENT_RING: Final = 2
Target = str | InetURI | UnixURI | Handler | StreamFunction


@dataclass(slots=True)
class _Flow:
    """A connection that is not over. ``ports`` is its name in the log, ``timer`` runs while the guest may still answer."""

    ports: str
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    connection: Connection | None = None


class VsockDevice(EngineDevice):
    """Serve the vsock of one guest.

    guest_cid        the guest's context id, 3 or more
    uds_path         a connection of the guest to port P goes to the Unix socket ``<uds_path>_<P>``; and on ``uds_path`` itself
                     the device listens for connections of the host (host.py says how a client names the guest's port)
    seqpacket_path   listen there, too, for clients with SOCK_SEQPACKET; messages keep their bounds, in both directions
    forwards         where ports of the host lead to instead: URIs (tcp://, tcp6://, unix://), Handler objects, or
                     ``async def f(reader, writer, request)``
    publish          listening addresses of the host (URIs, port 0: any) that lead to ports of the guest
    name             who this guest is in the log
    connect_timeout  seconds, in either direction
    max_flows        connections at once; one more is refused
    max_pending      connections being made at once, and clients that did not yet say which port they want; likewise
    buffer           bytes that a connection may hold for a host socket that does not take them; also the guest's send window
    buffers          bytes of such buffers over all connections; one that would exceed it is reset
    busy_poll        microseconds for which the engine's thread may wait awake where that is faster; 0: not at all

    UsageError: an argument is out of range or no address. The addresses are listened on while a front-end is connected; its
    session fails when that is not possible.
    """

    virtio_id: ClassVar[int] = 19
    num_queues = 3  # rx, tx, event; vhost-user-vsock keeps the last one to itself
    features = 1 << lib.VSK_F_STREAM | 1 << lib.VSK_F_SEQPACKET
    packed = True

    def __init__(
        self, guest_cid: int, *, uds_path: str | os.PathLike[str] | None = None,
        seqpacket_path: str | os.PathLike[str] | None = None, forwards: Mapping[int, Target] | None = None,
        publish: Mapping[str, int] | None = None, name: str = "guest", connect_timeout: float = 10.0, max_flows: int = 4096,
        max_pending: int = 1024, buffer: int = 256 << 10, buffers: int = 64 << 20, busy_poll: int = 50,
    ) -> None:  # fmt: skip
        if not CID_HOST < guest_cid < 0xFFFFFFFF:
            raise UsageError(f"guest_cid {guest_cid}: must be 3 to {0xFFFFFFFE}; 0, 1 and 2 are taken")
        self._uds_path = None if uds_path is None else os.path.abspath(uds_path)
        self._forwards = {_port(port): _handler(target) for port, target in (forwards or {}).items()}
        limits: dict[str, Any] = {
            "pairs": 1, "max_flows": max_flows, "buf_alloc": buffer, "buf_total": buffers, "guest_cid": guest_cid,
            "busy_poll": busy_poll,
        }  # fmt: skip
        if len(self._forwards) <= lib.VSE_ROUTES_MAX:  # else the engine asks about every port
            limits |= {"ports": _ports(self._forwards), "ports_path": self._uds_path or ""}
        self.config = CONFIG.build({"guest_cid": guest_cid})
        self._cid = guest_cid
        self._doors = [
            *([(_path("uds_path", self._uds_path), socket.SOCK_STREAM, None)] if self._uds_path else []),
            *([(_path("seqpacket_path", seqpacket_path), socket.SOCK_SEQPACKET, None)] if seqpacket_path else []),
            *((_uri(address), socket.SOCK_STREAM, _port(port)) for address, port in (publish or {}).items()),
        ]
        self._connect_timeout = connect_timeout
        self._max_pending = max_pending
        self._flows: dict[int, _Flow] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._clients: set[asyncio.Task[None]] = set()
        self._listening: list[Doorway] = []
        super().__init__(name, log, limits)

    @property
    def listening(self) -> list[str]:
        """The URIs listened on, with the ports that they really have; empty while no front-end is connected."""
        return [door.name for door in self._listening]

    # ---- life

    async def connected(self) -> None:
        await super().connected()
        for uri, kind, port in self._doors:
            door = listen(uri, kind)
            self._listening.append(door)
            self._keep(asyncio.create_task(door.accept_all(partial(self._visited, port)), name=f"vsock {door.name}"))
            self._log(logging.INFO, "listening on %s", door.name)

    async def disconnected(self) -> None:
        await super().disconnected()
        for door in self._listening:
            door.close()
        self._listening.clear()

    def queue_started(self, queue: Queue) -> None:
        if queue.index != EVENT_RING:
            super().queue_started(queue)

    def queue_stopped(self, queue: Queue) -> None:
        if queue.index != EVENT_RING:
            super().queue_stopped(queue)

    def _forget_flows(self) -> None:
        for flow in self._flows.values():
            if flow.timer:
                flow.timer.cancel()
        self._flows.clear()

    # ---- from the guest

    def _answer(self, event: Event) -> None:
        answer = _ANSWERS.get(event.kind)
        if answer:
            answer(self, event)

    def _unanswered(self, event: Event) -> None:
        if event.kind == "CONNECT":
            self._refuse(event.handle)

    def _refuse(self, handle: int) -> None:
        if self._engine:
            self._engine.refuse(handle, lib.VSO_DENY, errno.ECONNREFUSED)
        self._flows.pop(handle, None)

    def _say(self, ports: str, text: str, *arguments: object, level: int = logging.INFO) -> None:
        self._log(level, f"%s {text}", ports, *arguments)

    def _connect(self, event: Event) -> None:
        header = ffi.from_buffer("struct vsk_hdr *", event.payload)
        flow = _Flow(f"{header.src_port} -> {header.dst_port}")
        kind = socket.SOCK_SEQPACKET if header.type == lib.VSK_TYPE_SEQPACKET else socket.SOCK_STREAM
        route = self._route(header.dst_port)
        if kind == socket.SOCK_SEQPACKET and not self.acked_features >> lib.VSK_F_SEQPACKET & 1:
            self._say(flow.ports, "refused: seqpackets were not negotiated", level=logging.WARNING)
            self._refuse(event.handle)
            return
        if route is None:
            self._say(flow.ports, "refused: nothing leads from there")
            self._refuse(event.handle)
            return
        if len(self._connecting) >= self._max_pending:
            self._say(flow.ports, "refused: %d connections are being made", len(self._connecting), level=logging.WARNING)
            self._refuse(event.handle)
            return
        handler, target = route
        asked = VsockURI(CID_HOST, header.dst_port)
        request = Request(asked, target or asked, Guest(self.name), flow=header.src_port, kind=kind,
                          reset=partial(self._reset_flow, event.handle), settle=self._settle,
                          dialed=partial(self._dialed, event.handle))  # fmt: skip
        self._flows[event.handle] = flow
        flow.task = asyncio.create_task(self._make(event.handle, flow, handler, request))
        self._keep(flow.task, self._connecting)

    def _routed(self, event: Event) -> None:
        """The engine has connected a stream to where its port leads."""
        header = ffi.from_buffer("struct vsk_hdr *", event.payload)
        route = self._route(header.dst_port)
        self._flows[event.handle] = flow = _Flow(f"{header.src_port} -> {header.dst_port}")
        self._say(flow.ports, "%s", route and route[1])

    def _dialed(self, handle: int) -> socket.socket | None:
        return self._engine.dialed(handle) if self._engine else None

    def _route(self, port: int) -> tuple[Handler, InetURI | UnixURI | None] | None:
        if port in self._forwards:
            return self._forwards[port]
        return (UnixHandler(), UnixURI(f"{self._uds_path}_{port}")) if self._uds_path else None

    async def _make(self, handle: int, flow: _Flow, handler: Handler, request: Request) -> None:
        """Connect, and answer."""
        try:
            async with asyncio.timeout(self._connect_timeout):
                connection = await handler.connect(request)
            self._adopt(handle, flow, connection)
        except OSError as error:
            self._say(flow.ports, "%s %s", request.target, errno_name(guest_errno(error)))
            self._refuse(handle)
        except Exception:
            log.exception("%s %s: its handler failed", self.name, flow.ports)
            self._refuse(handle)
        except asyncio.CancelledError:
            self._refuse(handle)  # the handler cancelled itself, if it was not us; the guest waits
            raise
        else:
            self._say(flow.ports, "%s", request.target)

    def _adopt(self, handle: int, flow: _Flow, connection: Connection) -> None:
        assert self._engine is not None
        if connection.task:
            self._keep(connection.task)
        try:
            taken = self._engine.connected(handle, connection.detach(), str(connection.local), str(connection.peer))
        except OSError:
            connection.close()
            raise
        if not taken:
            connection.close()
            return
        flow.task, flow.connection = None, connection

    def _cancel(self, event: Event) -> None:
        flow = self._flows.pop(event.handle, None)
        if flow and flow.task:
            flow.task.cancel()

    def _ended(self, event: Event) -> None:
        flow = self._flows.pop(event.handle, None)
        if flow is None:
            return
        if flow.timer:
            flow.timer.cancel()
        self._say(flow.ports, "%s", ended_text(event, None))
        if flow.connection and flow.connection.ended:
            flow.connection.ended(event.error)

    def _reset_flow(self, handle: int, error: int) -> None:
        if self._engine:
            self._engine.reset(handle, error)

    # ---- from the host

    def _visited(self, port: int | None, client: socket.socket) -> None:
        client.setblocking(False)
        if port is not None:
            self._announce(client, port, greet=False)
        elif len(self._clients) >= self._max_pending:
            self._log(logging.WARNING, "%d clients did not say which port they want yet; another one is refused",
                      len(self._clients))  # fmt: skip
            client.close()
        else:
            task = asyncio.create_task(self._welcome(client))
            # a task that is cancelled before its first step runs none of its own clean-up
            task.add_done_callback(lambda _: client.close())
            self._keep(task, self._clients)

    async def _welcome(self, client: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout):
                port = await read_port(client)
        except BadRequest as error:
            self._log(logging.WARNING, "a client is refused: %s", error)
        except TimeoutError:
            self._log(logging.WARNING, "a client did not say which port it wants")
        except OSError as error:
            self._log(logging.INFO, "a client left: %s", error.strerror)
        else:
            self._announce(client, port, greet=True)

    def _announce(self, client: socket.socket, port: int, *, greet: bool) -> None:
        assert self._engine is not None
        try:
            handle = self._engine.call(client.detach(), port, greet=greet)
        except OSError as error:
            self._say(f"{port} <-", "refused: %s", error.strerror, level=logging.WARNING)
            return
        timer = asyncio.get_running_loop().call_later(self._connect_timeout, self._reset_flow, handle, errno.ETIMEDOUT)
        self._flows[handle] = _Flow(f"{port} <-", timer=timer)

    def _taken(self, event: Event) -> None:
        flow = self._flows.get(event.handle)
        if flow and flow.timer:
            flow.timer.cancel()
            flow.timer = None
            flow.ports = f"{event.flow >> 32} <- {event.flow & 0xFFFFFFFF}"
            self._say(flow.ports, "taken")


_ANSWERS: Final[Mapping[str, Callable[[VsockDevice, Event], None]]] = {
    "CONNECT": VsockDevice._connect,
    "ROUTED": VsockDevice._routed,
    "CANCEL": VsockDevice._cancel,
    "TAKEN": VsockDevice._taken,
    "ENDED": VsockDevice._ended,
    "BROKEN": VsockDevice._broken,
}


def _ports(forwards: Mapping[int, tuple[Handler, InetURI | UnixURI | None]]) -> Any:
    """The engine's table of these ports: it connects to addresses itself, and asks about the others. ``struct vse_port[]``."""
    ports = ffi.new("struct vse_port[]", len(forwards))
    for entry, (port, (_, target)) in zip(ports, forwards.items(), strict=True):
        entry.port = port
        sockaddr = b""
        with suppress(OSError):  # an interface that is not there yet
            sockaddr = target.sockaddr() if target else b""
        entry.target_len = len(sockaddr)
        ffi.memmove(entry.target, sockaddr, len(sockaddr))
    return ports


def _port(port: int) -> int:
    if not 0 <= port < 0xFFFFFFFF:
        raise UsageError(f"vsock port {port}: must be 0 to {0xFFFFFFFE}")
    return port


def _uri(text: str | InetURI | UnixURI) -> InetURI | UnixURI:
    try:
        uri = parse(text) if isinstance(text, str) else text
    except URIError as error:
        raise UsageError(str(error)) from None
    if isinstance(uri, UnixURI) or (isinstance(uri, InetURI) and uri.transport == "tcp"):
        return uri
    raise UsageError(f"{uri}: a vsock connection leads to tcp, tcp6 or unix")


def _handler(target: Target) -> tuple[Handler, InetURI | UnixURI | None]:
    if isinstance(target, str | InetURI | UnixURI):
        uri = _uri(target)
        return (UnixHandler() if isinstance(uri, UnixURI) else DirectHandler()), uri
    return (target if hasattr(target, "connect") else InProcessHandler(target)), None


def _path(what: str, path: str | os.PathLike[str]) -> UnixURI:
    """Where to listen. UsageError when that can never be, or ``<path>_<port>`` cannot."""
    absolute = os.path.abspath(path)
    if len(os.fsencode(absolute)) + len("_4294967295") > UNIX_PATH_MAX:
        raise UsageError(f"{what} {absolute}: too long for the name of a socket with a port behind it")
    if not os.path.isdir(os.path.dirname(absolute)):
        raise UsageError(f"{what} {absolute}: there is no such folder")
    return UnixURI(absolute)
