# SPDX-License-Identifier: BSD-3-Clause
"""One connection of the probe to a back-end: testing's Frontend, that keeps a transcript and expects nothing.

What a back-end does wrong here is its news, not this process's bug: Failed carries it. The transcript is evidence, in the
lines of ``vhostsock trace``; what happens in the rings is in it as notes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Sequence
from typing import Any

from construct import Construct, ConstructError

from .. import ancillary
from ..errors import VhostsockError
from ..proto import ProtocolFeature, Request, VirtioFeature, wire
from ..recording import Entry, describe_fd
from ..testing.driver import DriverQueue, Region
from ..testing.frontend import BackendGone, Dialect, Frontend, Refused
from ..trace import line_of

__all__ = [
    "BASE_FEATURES", "BASE_PROTOCOL", "Connection", "Failed", "Options", "Transcript", "name_of", "region_body", "table_body",
]  # fmt: skip

BASE_PROTOCOL = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK
BASE_FEATURES = VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.VERSION_1
LARGEST_REPLY = 1 << 16  # bytes; the document's largest has 2056
POLL = 0.001  # seconds between two looks at a ring that has no call descriptor
TRANSCRIPT = 400  # lines that are kept


class Failed(VhostsockError):
    """The back-end does not keep the rule that is being checked; the text says what was seen."""


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def name_of(request: int) -> str:
    return Request(request).name if request in Request._value2member_map_ else f"request {request}"


def table_body(regions: Sequence[Region]) -> bytes:
    """The payload of SET_MEM_TABLE."""
    return bytes(wire.MEM_TABLE.build({"n": len(regions), "regions": [_fields(region) for region in regions]}))


def region_body(region: Region) -> bytes:
    """The payload of ADD_MEM_REG and REM_MEM_REG."""
    return bytes(wire.MEM_REGION.build({"region": _fields(region)}))


def _fields(region: Region) -> dict[str, int]:
    return {"gpa": region.gpa, "size": region.size, "uva": region.uva, "offset": region.offset}


class Transcript:
    """What was said on the connections of one check, a line a message."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._began = time.monotonic()

    def add(self, kind: str, header: Any = None, payload: bytes = b"", fds: Sequence[str] = (), text: str = "") -> None:
        if len(self.lines) == TRANSCRIPT:
            self.lines.append("... (more is not kept)")
        if len(self.lines) > TRANSCRIPT:
            return
        entry = Entry(time.monotonic() - self._began, kind, text, fds=tuple(fds), payload=payload)
        if header is not None:
            entry = dataclasses.replace(entry, request=header.request, flags=header.flags, size=header.size)
        self.lines.append(line_of(entry))

    def note(self, text: str) -> None:
        self.add("==", text=text)


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """protocol: bits that are acked if they are offered; features: the same of the virtio bits; queues: how many are set up."""

    protocol: ProtocolFeature = BASE_PROTOCOL
    features: VirtioFeature = BASE_FEATURES
    queues: int = 1
    size: int = 64
    memory: tuple[int, ...] = (1 << 22,)


class Connection(Frontend):
    """See the module. ``fds``: the descriptors that came with replies, closed with the connection."""

    def __init__(self, sock: socket.socket, transcript: Transcript, options: Options) -> None:
        dialect = Dialect("vhostsock probe", int(options.protocol), True, True, False)
        self.transcript = transcript
        self.fds: list[int] = []
        self._inbound = b""
        super().__init__(
            sock,
            queues=options.queues,
            size=options.size,
            memory=options.memory,
            dialect=dialect,
            accept=int(options.features),
        )

    def close(self) -> None:
        super().close()
        while self.fds:
            os.close(self.fds.pop())

    # ---- bytes

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if len(data) >= wire.HEADER_SIZE:
            header, body = wire.HEADER.parse(data), data[wire.HEADER_SIZE :]
            self.transcript.add("->", header, body, [describe_fd(fd) for fd in fds])
        else:
            self.transcript.note(f"{len(data)} bytes are sent: {data.hex()}")
        try:
            await super().send(data, fds)
        except ConnectionError:
            raise BackendGone("the back-end has closed the connection") from None

    async def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece, fds = await self._receive_some(size - len(data))
            self.fds += fds
            if not piece:
                self.transcript.note("the back-end closes the connection")
                raise BackendGone("the back-end has closed the connection")
            data += piece
        self._inbound += data
        self._log_inbound()
        return data

    async def _receive_some(self, size: int) -> tuple[bytes, list[int]]:
        while True:
            try:
                data, fds, _ = ancillary.receive(self.sock, size)
                return data, list(fds)
            except (BlockingIOError, InterruptedError):
                await self._readable()
            except ConnectionError:
                return b"", []

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self.sock, _wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(self.sock)

    async def gone(self) -> None:
        """Wait until the back-end closes the connection. Failed when it says something that nobody has asked for."""
        await self._readable()
        try:
            said = self.sock.recv(1, socket.MSG_PEEK)
        except ConnectionError:
            said = b""
        if said:
            raise Failed("the back-end sends something that nobody has asked for")
        self.transcript.note("the back-end closes the connection")

    def _log_inbound(self) -> None:
        """Put a whole reply into the transcript; what comes after it is the next one's."""
        if len(self._inbound) < wire.HEADER_SIZE:
            return
        header = wire.HEADER.parse(self._inbound)
        end = wire.HEADER_SIZE + header.size
        if len(self._inbound) >= end:
            self.transcript.add("<-", header, self._inbound[wire.HEADER_SIZE : end])
            self._inbound = self._inbound[end:]

    async def taken(self) -> None:
        """Wait until the back-end has read all that was sent."""
        while struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))[0]:  # noqa: ASYNC110
            await asyncio.sleep(POLL)  # there is nothing that would tell

    # ---- messages

    async def raw_reply(self, request: int) -> bytes:
        """The payload of the next reply, which must be to ``request`` and have the flags of one."""
        header = wire.HEADER.parse(await self.receive(wire.HEADER_SIZE))
        if header.request != request:
            raise Failed(f"a reply to {name_of(header.request)} came where one to {name_of(request)} was due")
        if header.flags != wire.REPLY_FLAGS:
            raise Failed(f"the reply to {name_of(request)} has flags {header.flags:#x}, not {int(wire.REPLY_FLAGS):#x}")
        if header.size > LARGEST_REPLY:
            raise Failed(f"the reply to {name_of(request)} announces {header.size} bytes")
        return await self.receive(header.size)

    async def reply_to(self, request: Request, payload: Construct) -> Any:
        body = await self.raw_reply(request)
        if not body:
            raise Refused(request.name)
        try:
            value = payload.parse(body)
            if len(payload.build(value)) == len(body):
                return value
        except ConstructError:
            pass
        raise Failed(f"the reply to {request.name} has {len(body)} bytes of payload, which is not what the document says")

    async def call(self, request: int, body: bytes = b"", fds: Sequence[int] = (), *, flags: int = wire.REQUEST_FLAGS) -> None:
        """Send one message of these bytes, right or wrong."""
        header = wire.HEADER.build({"request": request, "flags": int(flags), "size": len(body)})
        await self.send(header + body, fds)

    async def ack_of(self, request: int, body: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send it with need_reply; the ack. Only with REPLY_ACK."""
        await self.call(request, body, fds, flags=wire.NEED_REPLY_FLAGS)
        reply = await self.raw_reply(request)
        if len(reply) != 8:
            raise Failed(f"the ack of {name_of(request)} has {len(reply)} bytes of payload, not 8")
        return int(wire.U64.parse(reply))

    async def carried_out(self, request: int, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send it, and be sure that it was carried out: an ack of 0, or, without REPLY_ACK, a connection that goes on."""
        if self.protocol_features & ProtocolFeature.REPLY_ACK:
            ack = await self.ack_of(request, body, fds)
            if ack:
                raise Failed(f"{name_of(request)} was refused (ack {ack})")
        else:
            await self.call(request, body, fds)
            await self.settled()

    async def send_table(self, regions: Sequence[Region]) -> None:
        """SET_MEM_TABLE with these regions, in place of what set_up() would tell."""
        self._memory_sent = True
        await self.carried_out(Request.SET_MEM_TABLE, table_body(regions), [region.fd for region in regions])

    async def sign_of_life(self) -> None:
        """Wait for the answer to GET_FEATURES, whatever else is answered before it: nobody knows what was made of nonsense."""
        await self.call(Request.GET_FEATURES)
        request = 0
        while request != Request.GET_FEATURES:
            header = wire.HEADER.parse(await self.receive(wire.HEADER_SIZE))
            await self.receive(min(header.size, LARGEST_REPLY))
            request = header.request

    async def get_u64(self, request: Request) -> int:
        return int(await self.request(request, reply=wire.U64))

    # ---- rings

    async def set_features(self) -> None:
        await self.carried_out(Request.SET_FEATURES, wire.U64.build(self.features))

    async def set_up(self, *, enable: bool = True, call: bool = True) -> None:
        """Features, memory and all rings, in QEMU's order; enable: enable them too; call: give them call descriptors."""
        await self.set_features()
        await self.send_memory()
        for index in range(len(self.queues)):
            await self.set_up_ring(index, call=call)
        if enable:
            await self.enable_all(True)

    async def set_up_ring(self, index: int, *, call: bool = True) -> None:
        queue = self.queues[index]
        await self.set_ring(index)
        await self.set_fd(Request.SET_VRING_CALL, index, queue.call_fd if call else -1)
        await self.set_fd(Request.SET_VRING_KICK, index, queue.kick_fd)

    async def enable_all(self, on: bool) -> None:
        if self.features & VirtioFeature.PROTOCOL_FEATURES:
            for index in range(len(self.queues)):
                await self.enable(index, on)

    async def stop_ring(self, index: int) -> int:
        """GET_VRING_BASE: the base, which is also kept for the next start."""
        state = {"index": index, "num": 0}
        answer = await self.request(Request.GET_VRING_BASE, wire.VRING_STATE, state, reply=wire.VRING_STATE)
        if answer.index != index:
            raise Failed(f"GET_VRING_BASE of ring {index} is answered for ring {answer.index}")
        self.bases[index] = int(answer.num)
        return int(answer.num)

    def kick(self, queue: DriverQueue) -> None:
        """A kick that does not ask whether one is wanted."""
        queue.publish()
        os.eventfd_write(queue.kick_fd, 1)
        self.transcript.note("the driver kicks")

    async def polled(self, queue: DriverQueue, count: int) -> None:
        """Wait for ``count`` completions without a call."""
        done = 0
        while done < count:
            done += len(queue.collect())
            await asyncio.sleep(POLL)
