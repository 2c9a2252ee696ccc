# SPDX-License-Identifier: BSD-3-Clause
"""The back-end channel: messages from us to the front-end, over the socket that SET_BACKEND_REQ_FD brings."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from .errors import FrontendError
from .proto import events, wire
from .recording import Tap

__all__ = ["Channel"]


class Channel:
    """Closed until the front-end opens it with ``open``; it may do so again, which replaces the socket."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._sock: socket.socket | None = None

    def open(self, event: events.BackendChannel) -> None:
        if not stat.S_ISSOCK(os.fstat(event.fd.fileno()).st_mode):
            raise FrontendError("SET_BACKEND_REQ_FD: the descriptor is not a socket")
        self.close()
        self._sock = socket.socket(fileno=event.fd.take())

    def close(self) -> None:
        if self._sock:
            self._sock.close()
            self._sock = None

    def config_changed(self) -> None:
        if self._sock:
            # a full channel holds an unread notice already; a closed one is noticed at the main socket
            with contextlib.suppress(OSError):
                message = wire.pack(wire.BackendRequest.CONFIG_CHANGE_MSG, wire.REQUEST_FLAGS)
                self._sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                self._tap.sent_on_channel(message)
