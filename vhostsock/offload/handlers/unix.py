"""The unix handler: a request becomes a connection to a Unix socket of the host."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

from ..errnos import guest_errno
from ..uri import UnixURI
from .base import Connection, Request, apply_options, connect, shown_local

__all__ = ["UnixHandler"]

# A full backlog makes a Unix connect fail with EAGAIN at once, and nothing tells when there is room. TCP would drop the SYN and
# send it again after growing pauses, until the connect times out; so does this.
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0  # seconds


class UnixHandler:
    """unix targets. Errors come in TCP's words: no such path, or nobody who listens there, is ECONNREFUSED."""

    async def connect(self, request: Request) -> Connection:
        if not isinstance(request.target, UnixURI):
            raise OSError(errno.EAFNOSUPPORT, f"the unix handler cannot connect {request.target}")
        sock = socket.socket(socket.AF_UNIX, request.kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            apply_options(sock, request.opts)
            pause = FIRST_PAUSE
            while True:
                try:
                    await connect(sock, request.target.path)
                    break
                except BlockingIOError:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
        except OSError as error:
            sock.close()
            code = guest_errno(error, unix=True)
            raise OSError(code, f"{os.strerror(code)} ({request.target}: {error.strerror})") from error
        except BaseException:
            sock.close()
            raise
        return Connection(sock, shown_local(request, None), request.uri)
