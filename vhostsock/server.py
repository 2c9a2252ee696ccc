# SPDX-License-Identifier: BSD-3-Clause
"""Where front-ends connect: a Unix socket path, a listening descriptor from a service manager, or one connected socket.

One front-end at a time is served; another one that connects meanwhile waits in the socket's backlog and is served next. A
session that ends, for whatever reason, costs nothing but itself: the server goes on listening, until it is closed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from types import TracebackType
from typing import Self

from .backend import Backend
from .device import Device
from .errors import FrontendError, UsageError
from .offers import session_config
from .recording import Tap
from .sockfile import SocketFile

__all__ = ["Server"]

log = logging.getLogger("vhostsock.server")

# A front-end that waits is rare, a crowd of them a mistake; what finds no room gets EAGAIN from connect().
BACKLOG = 8
ACCEPT_PAUSE = 1.0  # seconds until the next attempt when this process has no descriptor left for a connection


class Server:
    """Serve ``device`` to front-ends. Exactly one of

    path    create a Unix socket there; a file that a dead server left behind is replaced, and ours is removed at the end
    sock    a listening Unix socket, or a connected one
    fd      the same as a descriptor, which the server takes over

    tap: told of everything that goes over the connections, for example a ``Recorder`` (recording.py).

    ``async with Server(...)`` listens from entry to exit; ``serve_forever`` returns when ``stop`` is called, or when the one
    connection of a connected socket ends. UsageError: the device cannot be served as it is, or the arguments are wrong. OSError
    (EADDRINUSE and others, with a text that says what to do): the path cannot be listened on.
    """

    def __init__(
        self,
        device: Device,
        *,
        path: str | os.PathLike[str] | None = None,
        sock: socket.socket | None = None,
        fd: int | None = None,
        tap: Tap | None = None,
    ) -> None:
        if sum(given is not None for given in (path, sock, fd)) != 1:
            raise UsageError("a Server needs exactly one of path, sock and fd")
        session_config(device)  # complains about the device now, not when a front-end comes
        if not any(getattr(type(device), name) is not getattr(Device, name) for name in _DATA_HANDLERS):
            raise UsageError(f"{type(device).__name__} overrides none of {', '.join(_DATA_HANDLERS)}")
        self._device = device
        self._tap = tap
        self._path = os.fspath(path) if path is not None else None
        if sock is not None:
            _check_state(sock)
        self._sock = sock if fd is None else _socket_of(fd)
        self._file: SocketFile | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """The path, or "fd N", for messages to people."""
        if self._path is not None:
            return self._path
        return f"fd {self._sock.fileno()}" if self._sock else "closed"

    async def __aenter__(self) -> Self:
        if self._path is not None:
            self._file = SocketFile(self._path, backlog=BACKLOG)
            self._sock = self._file.sock
        assert self._sock is not None
        self._sock.setblocking(False)
        serve = self._accept(self._sock) if _is_listening(self._sock) else self._serve(self._sock)
        self._task = asyncio.create_task(serve, name=f"vhostsock server on {self.address}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def serve_forever(self) -> None:
        """Wait until ``stop`` or ``close`` is called, or a connected socket's session is over."""
        if self._task is None:
            raise UsageError("use 'async with server:' around serve_forever()")
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()

    def stop(self) -> None:
        """End the session and stop listening; ``serve_forever`` returns when all is closed. For signal handlers."""
        if self._task:
            self._task.cancel()

    async def close(self) -> None:
        """As ``stop``, and wait for it. Idempotent."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._sock:
            self._sock.close()
            self._sock = None
        if self._file:
            self._file.close()
            self._file = None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except ConnectionAbortedError:
                continue  # it went before we came
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.error("cannot accept a front-end: %s", error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            loop.add_reader(listener, self._note_waiting, listener)
            try:
                await self._serve(sock)
            finally:
                loop.remove_reader(listener)

    def _note_waiting(self, listener: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(listener)
        log.warning("%s: another front-end connects while one is served; it has to wait", self.address)

    async def _serve(self, sock: socket.socket) -> None:
        log.info("front-end connected")
        try:
            await Backend(self._device, sock, self._tap).serve()
        except FrontendError as error:
            log.error("the front-end broke the protocol, session ended: %s", error)
        except OSError as error:
            log.info("connection lost: %s", error.strerror or error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # nobody stops this server: something that the device awaited was cancelled
            log.exception("%s failed, session ended", type(self._device).__name__)
        except Exception:
            log.exception("%s failed, session ended", type(self._device).__name__)
        else:
            log.info("front-end disconnected")


_DATA_HANDLERS = ("handle", "handle_batch", "queue_started")


def _socket_of(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"descriptor {fd} cannot be served: {error.strerror}") from None
    try:
        _check_state(sock)
    except UsageError:
        sock.detach()
        raise
    return sock


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _check_state(sock: socket.socket) -> None:
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise UsageError(f"descriptor {sock.fileno()} is not a Unix stream socket")
    if not _is_listening(sock):
        try:
            sock.getpeername()
        except OSError:
            raise UsageError(f"descriptor {sock.fileno()} is a socket that neither listens nor is connected") from None
