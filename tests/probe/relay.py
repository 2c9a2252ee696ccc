# SPDX-License-Identifier: BSD-3-Clause
"""A back-end that misbehaves in one way: a sound one of this library, behind a relay that has a fault.

A relay sits on each connection between the front-end and the sound back-end. Whole messages pass through it, and its Fault may
change, answer, drop or multiply them. What goes over the rings it does not see; for faults there, the device is another one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from collections.abc import Callable

from vhostsock import Device, Server, ancillary
from vhostsock.probe.connection import Options, Transcript
from vhostsock.probe.offer import Offer, discover
from vhostsock.probe.target import Fate, Target
from vhostsock.proto import wire
from vhostsock.testing.frontend import BackendGone, Refused

__all__ = ["Fault", "Faulty", "Message", "Relay", "offer_of"]


@dataclasses.dataclass
class Message:
    request: int
    flags: int
    body: bytes
    fds: list[int]

    @property
    def u64(self) -> int:
        return int.from_bytes(self.body[:8], "little")

    @property
    def words(self) -> tuple[int, int]:
        return int.from_bytes(self.body[:4], "little"), int.from_bytes(self.body[4:8], "little")

    def with_body(self, body: bytes) -> Message:
        return dataclasses.replace(self, body=body)


Step = Callable[["Relay", Message], Message | None]


def _as_it_is(_relay: Relay, message: Message) -> Message:
    return message


@dataclasses.dataclass(frozen=True)
class Fault:
    """ask: what becomes of a message of the front-end; answer: of a reply. None: it is dropped.

    protocol, features: bits that are offered beside the device's own, and hidden from it
    whole_reads: a header that does not come with one read ends the session; one_message: only the first one of a read counts
    dies_inside: the end of the connection within a message is the end of the back-end
    one_session: it serves one front-end, ever; drops_first: a second front-end ends the session of the first
    """

    ask: Step = _as_it_is
    answer: Step = _as_it_is
    device: Callable[[], Device] | None = None
    protocol: int = 0
    features: int = 0
    whole_reads: bool = False
    one_message: bool = False
    dies_inside: bool = False
    one_session: bool = False
    drops_first: bool = False


class Relay:
    """One connection. ``memory`` is for faults that need to remember something."""

    def __init__(self, target: Faulty, front: socket.socket, back: socket.socket) -> None:
        self.target = target
        self.fault = target.fault
        self.number = target.sessions
        self.memory: dict[str, int] = {}
        self.kept: list[int] = []
        self._front, self._back = front, back

    async def run(self) -> None:
        pumps = [asyncio.create_task(self._pump(*way)) for way in ((self._front, self._back), (self._back, self._front))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            ends = await asyncio.gather(*pumps, return_exceptions=True)
            self._front.close()
            self._back.close()
            for fd in self.kept:
                os.close(fd)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        asked = source is self._front
        step = self.fault.ask if asked else self.fault.answer
        while message := await self._read(source, asked):
            try:
                passed = step(self, message)
                if passed is not None:
                    self._send(sink, passed)
            except (_Over, ConnectionError):
                return
            finally:
                for fd in message.fds:
                    os.close(fd)

    async def _read(self, source: socket.socket, asked: bool) -> Message | None:
        data, fds = await self._receive(source, wire.HEADER_SIZE if not self.fault.one_message else 4096)
        if not data or (asked and self.fault.whole_reads and len(data) < wire.HEADER_SIZE):
            return None
        while len(data) < wire.HEADER_SIZE or len(data) < wire.HEADER_SIZE + wire.HEADER.parse(data).size:
            size = wire.HEADER.parse(data).size if len(data) >= wire.HEADER_SIZE else 0
            piece, more = await self._receive(source, wire.HEADER_SIZE + size - len(data))
            fds += more
            if not piece:
                for fd in fds:
                    os.close(fd)
                if asked and self.fault.dies_inside:
                    self.target.dead = "it was killed by SIGSEGV"
                return None
            data += piece
        header = wire.HEADER.parse(data)
        return Message(header.request, header.flags, data[wire.HEADER_SIZE : wire.HEADER_SIZE + header.size], fds)

    async def _receive(self, source: socket.socket, size: int) -> tuple[bytes, list[int]]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                data, fds, _ = ancillary.receive(source, size)
                return data, list(fds)
            except ConnectionError:
                return b"", []
            except BlockingIOError:
                ready = asyncio.Event()
                loop.add_reader(source, ready.set)
                try:
                    await ready.wait()
                finally:
                    loop.remove_reader(source)

    def _send(self, sink: socket.socket, message: Message) -> None:
        header = wire.HEADER.build({"request": message.request, "flags": message.flags, "size": len(message.body)})
        socket.send_fds(sink, [header + message.body], message.fds)

    # ---- for faults

    def reply(self, request: int, body: bytes, fds: tuple[int, ...] = ()) -> None:
        """To the front-end, in the back-end's place."""
        self._send(self._front, Message(request, wire.REPLY_FLAGS, body, list(fds)))

    def ack(self, message: Message, value: int) -> None:
        """Answer in the back-end's place, if an answer is asked for."""
        if message.flags & wire.Flag.NEED_REPLY:
            self.reply(message.request, wire.U64.build(value))

    def close(self) -> None:
        raise _Over

    def die(self) -> None:
        self.target.dead = "it was killed by SIGSEGV"
        raise _Over


class _Over(Exception):
    """The relay's connection ends."""


class Faulty(Target):
    """A back-end with a fault, in this process."""

    def __init__(self, make: Callable[[], Device], fault: Fault, limit: float) -> None:
        super().__init__(limit)
        self.pid = os.getpid()
        self.fault = fault
        self.sessions = 0
        self.dead = ""
        self.leaked: list[int] = []
        self._make = fault.device or make
        self._tasks: list[asyncio.Task[None]] = []
        self._relays: list[Relay] = []

    async def connect(self, *, patient: bool = True) -> socket.socket:
        self.sessions += 1
        self.used = True
        ours, front = socket.socketpair()
        ours.setblocking(False)
        if self.fault.one_session and self.sessions > 1:
            front.close()
            return ours
        if self.fault.drops_first:
            for task in self._tasks:
                task.cancel()
        back, theirs = socket.socketpair()
        for sock in (front, back):
            sock.setblocking(False)
        self._tasks.append(asyncio.create_task(self._serve(Relay(self, front, back), theirs)))
        return ours

    async def _serve(self, relay: Relay, sock: socket.socket) -> None:
        async with Server(self._make(), sock=sock) as server:
            await relay.run()
            await server.serve_forever()

    async def fate(self) -> Fate | None:
        await asyncio.wait([asyncio.gather(*self._tasks, return_exceptions=True)], timeout=self.limit)
        return Fate(True, self.dead) if self.dead else None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for fd in self.leaked:
            os.close(fd)


async def offer_of(target: Target) -> Offer:
    """What it offers, asked on a connection of its own."""
    connection = await target.enter(Transcript(), Options())
    try:
        return await discover(connection, 4)
    except (BackendGone, Refused) as error:
        raise AssertionError(f"the sound back-end does not answer: {error}") from error
    finally:
        connection.close()
