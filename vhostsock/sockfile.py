# SPDX-License-Identifier: BSD-3-Clause
"""A listening Unix socket at a path: in place of a file that a dead server left behind, and removed at the end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat

__all__ = ["SocketFile"]

log = logging.getLogger("vhostsock.server")


class SocketFile:
    """Listens at ``path`` from construction to ``close``. ``sock`` is the listening socket; whoever closes it first may.

    OSError (EADDRINUSE, EEXIST and others, with a text that says what to do): the path cannot be listened on.
    """

    def __init__(self, path: str, kind: socket.SocketKind = socket.SOCK_STREAM, *, backlog: int) -> None:
        self.path = path
        self.sock = _listen(path, kind, backlog)
        status = os.stat(path)
        self._made: tuple[int, int] | None = (status.st_dev, status.st_ino)

    def close(self) -> None:
        """Stop listening and remove the file, unless another server has taken its place. Idempotent."""
        self.sock.close()
        if self._made:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == self._made:
                    os.unlink(self.path)
            self._made = None


def _listen(path: str, kind: socket.SocketKind, backlog: int) -> socket.socket:
    """A listening socket at ``path``, in place of one that nobody listens on any more."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(error.errno, f"cannot listen: {error.strerror or error}", path) from None
            _remove_stale(path, kind)
            sock.bind(path)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    """Remove the socket file of a server that is gone. OSError when the path is anything else."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "is there and is not a socket; choose another path", path)
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            log.info("%s: removing the socket of a server that is gone", path)
            os.unlink(path)
            return
        except OSError as error:
            # its backlog is full, or it is a socket of another type: somebody listens
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    raise OSError(errno.EADDRINUSE, "another process is serving there; stop it or choose another path", path)
