# SPDX-License-Identifier: BSD-3-Clause
"""Host sockets that lead into the guest.

A :class:`Doorway` listens while a front-end is connected, and the device takes its connections to the guest. To which port,
that is known (a published address), or the client says it in a line of its own, as with Firecracker's hybrid vsock:

    client: CONNECT <port>\\n    the guest's port, decimal
    device: OK <port>\\n         the guest has taken the connection, the port is the host's. Refused: the socket is closed

On a SOCK_SEQPACKET socket both are messages. What a client sends behind its line belongs to the guest.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ..offload.uri import InetURI, UnixURI
from ..sockfile import SocketFile

__all__ = ["BadRequest", "Doorway", "listen", "read_port"]

BACKLOG: Final = 128
LINE_MAX: Final = 32  # "CONNECT 4294967295\r\n" has 20
PAUSE: Final = 1.0  # seconds until the next attempt when this process has no descriptor left for a connection
_OUT_OF: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LINE: Final = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n?", re.IGNORECASE)

log = logging.getLogger("vhostsock.vsock")


class BadRequest(ValueError):
    """A client of the host did not say which port it wants; the text says what it said."""


def listen(uri: InetURI | UnixURI, kind: socket.SocketKind = socket.SOCK_STREAM) -> Doorway:
    """Listen there. OSError with the address in its text."""
    if isinstance(uri, UnixURI):
        file = SocketFile(uri.path, kind, backlog=BACKLOG)
        return Doorway(file.sock, str(uri), file.close)
    sock = socket.socket(uri.family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(uri.name())
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen: {error.strerror}", str(uri)) from None
    return Doorway(sock, str(InetURI.of_name("tcp", sock.getsockname())), sock.close)


class Doorway:
    """A listening socket; ``name`` is its URI, ``accept_all`` serves it until it is cancelled."""

    def __init__(self, sock: socket.socket, name: str, close: Callable[[], None]) -> None:
        self.sock = sock
        self.name = name
        self.close = close
        sock.setblocking(False)

    async def accept_all(self, take: Callable[[socket.socket], None]) -> None:
        """Give every connection to ``take``, which owns it then. Returns only by being cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self.sock)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _OUT_OF:
                    raise
                log.error("%s: cannot accept: %s", self.name, error.strerror)
                await asyncio.sleep(PAUSE)
                continue
            take(client)


async def read_port(client: socket.socket) -> int:
    """The port of the client's CONNECT line; what stands behind the line is left in the socket. BadRequest, OSError."""
    if client.type == socket.SOCK_SEQPACKET:
        return _port_of(await asyncio.get_running_loop().sock_recv(client, LINE_MAX))
    line, more = b"", True
    while more and not line.endswith(b"\n") and len(line) < LINE_MAX:
        seen = await _peek(client, LINE_MAX - len(line))
        more = bool(seen)
        line += client.recv(seen.find(b"\n") + 1 or len(seen))
    return _port_of(line)


async def _peek(client: socket.socket, size: int) -> bytes:
    """What can be read, as soon as there is anything, left in the socket."""
    loop = asyncio.get_running_loop()
    while True:
        with suppress(BlockingIOError, InterruptedError):
            return client.recv(size, socket.MSG_PEEK)
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(client, _wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(client)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _port_of(line: bytes) -> int:
    match = _LINE.fullmatch(line)
    if not match or int(match[1]) >> 32:
        raise BadRequest(f"{line!r} is not 'CONNECT <port>'")
    return int(match[1])
