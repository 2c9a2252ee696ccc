# SPDX-License-Identifier: BSD-3-Clause
"""Bytes and the file descriptors that come with them (SCM_RIGHTS), received so that no program started from here inherits them.

``socket.recv_fds`` is of no use for that: it drops its ``flags`` argument (CPython 3.11), so MSG_CMSG_CLOEXEC never reaches the
kernel.
"""

from __future__ import annotations

import array
import socket

from .proto.wire import MAX_FDS

__all__ = ["receive"]

_ITEM = array.array("i").itemsize


def receive(sock: socket.socket, size: int) -> tuple[bytes, list[int], bool]:
    """At most ``size`` bytes, and up to MAX_FDS descriptors, which are the caller's to close; True when some were lost.

    Lost (MSG_CTRUNC) are those beyond MAX_FDS, and those for which this process has no room. OSError as from recvmsg.
    """
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_LEN(MAX_FDS * _ITEM), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % _ITEM])
    return data, list(fds), bool(flags & socket.MSG_CTRUNC)
