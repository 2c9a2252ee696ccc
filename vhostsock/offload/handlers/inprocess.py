"""Handlers in this process: an asyncio function serves the connection, on one end of a socketpair.

    async def hello(reader, writer, request):
        writer.write(b"hello " + request.guest.device.encode())
        await writer.drain()

When the function returns, what it wrote is sent and the guest reads to the end of the stream. When it raises, the guest gets a
reset: a stream that was not completed must not look like one that was. For the same reason ``reader`` raises
ConnectionResetError when the guest reset the connection, and never shows that as the end of the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from .base import Connection, Request, shown_local

__all__ = ["InProcessHandler", "StreamFunction"]

StreamFunction = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Request], Awaitable[None]]

log = logging.getLogger("vhostsock.offload")


class _Reader(asyncio.StreamReader):
    """A socketpair has no reset: both an orderly close and an abort of the other end are its end of stream. Which one it was,
    the engine has told before it closed its end, and ``settle`` makes that known (as an exception) before the EOF is."""

    def __init__(self, settle: Callable[[], None]) -> None:
        super().__init__()
        self._settle = settle

    def feed_eof(self) -> None:
        self._settle()
        if self.exception() is None:
            super().feed_eof()


class InProcessHandler:
    """Serves streams with ``function(reader, writer, request)``."""

    def __init__(self, function: StreamFunction) -> None:
        self._function = function

    async def connect(self, request: Request) -> Connection:
        if request.kind != socket.SOCK_STREAM:
            raise OSError(errno.EPROTOTYPE, f"{request.uri} is served as a stream, and messages are asked for")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        loop = asyncio.get_running_loop()
        reader = _Reader(request.settle)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.create_unix_connection(lambda: protocol, sock=ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)

        def ended(error: int) -> None:
            if error:
                reader.set_exception(ConnectionResetError(error, os.strerror(error)))

        task = asyncio.create_task(self._serve(reader, writer, request))
        # a task that is cancelled before its first step runs none of its own clean-up
        task.add_done_callback(lambda _: writer.transport.abort())
        return Connection(theirs, shown_local(request, None), request.uri, task=task, ended=ended)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> None:
        try:
            await self._function(reader, writer, request)
        except (ConnectionResetError, BrokenPipeError):
            # the guest's own doing; the reset is for the case that the function gave up on another connection of its own
            request.reset(errno.ECONNRESET)
            writer.transport.abort()
        except BaseException as error:
            if isinstance(error, Exception):
                log.exception("%s #%d %s reset: its handler failed", request.guest.device, request.flow, request.uri)
            # the reset first: the engine would take the closed socketpair for the stream's end
            request.reset(errno.ECONNRESET)
            writer.transport.abort()
            if not isinstance(error, Exception):
                raise
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
