# SPDX-License-Identifier: BSD-3-Clause
"""The front-end's end of the back-end channel: reads the back-end's messages one at a time, and answers them."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from collections.abc import Sequence
from typing import Any

from .. import ancillary
from ..proto import wire
from ..proto.messages import BACKEND_TABLE
from ..proto.wire import BackendRequest

__all__ = ["FrontendChannel", "Message", "receive_exactly"]

TIMEOUT = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """A back-end message: value as its payload parses, fds (the reader's to close), and whether an answer is due."""

    request: BackendRequest
    value: Any
    fds: tuple[int, ...]
    wants_answer: bool

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class FrontendChannel:
    """``sock`` is the socket; ``receive``, ``answer`` and ``acknowledge`` are what a front-end does with it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    def close(self) -> None:
        """Idempotent."""
        self.sock.close()

    async def receive(self) -> Message:
        """``next``, within TIMEOUT seconds."""
        async with asyncio.timeout(TIMEOUT):
            return await self.next()

    async def next(self) -> Message:
        """The next message, as strict as its row in proto/messages.py. EOFError when the back-end closed the channel."""
        head, fds = await receive_exactly(self.sock, wire.HEADER_SIZE)
        header = wire.HEADER.parse(head)
        row = BACKEND_TABLE[BackendRequest(header.request)]
        assert header.flags in (wire.REQUEST_FLAGS, wire.NEED_REPLY_FLAGS), hex(header.flags)
        body, more = await receive_exactly(self.sock, header.size)
        assert not more
        assert len(fds) == row.fds, fds
        assert header.size == (row.payload.sizeof() if row.payload else 0)
        value = row.payload.parse(body) if row.payload else None
        wants = header.flags == wire.NEED_REPLY_FLAGS or row.reply is not None
        return Message(row.request, value, tuple(fds), wants)

    async def answer(self, request: BackendRequest, value: int = 0, fds: Sequence[int] = ()) -> None:
        """An ack, or the reply of a message that has its own; 0 is success."""
        await self.send(wire.pack(request, wire.REPLY_FLAGS, wire.U64, value), fds)

    async def acknowledge(self, request: BackendRequest) -> Message:
        """The next message, which must be this one; answered with success if it wants that. Its fds are the caller's."""
        message = await self.receive()
        assert message.request == request, message
        if message.wants_answer:
            await self.answer(request)
        return message

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Raw bytes with descriptors: for hostile front-ends."""
        async with asyncio.timeout(TIMEOUT):
            if fds:
                data = data[socket.send_fds(self.sock, [data], list(fds)) :]
            await asyncio.get_running_loop().sock_sendall(self.sock, data)


async def receive_exactly(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """``size`` bytes and the descriptors among them. EOFError when the stream ends before; then none is left open."""
    data, fds = b"", list[int]()
    try:
        while len(data) < size:
            try:
                piece, got, _ = ancillary.receive(sock, size - len(data))
            except BlockingIOError:
                await _readable(sock)
                continue
            except ConnectionError:
                piece, got = b"", []
            fds += got
            if not piece:
                raise EOFError("the back-end closed the connection")
            data += piece
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return data, fds


async def _readable(sock: socket.socket) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)
