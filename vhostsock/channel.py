# SPDX-License-Identifier: BSD-3-Clause
"""The back-end channel: messages from us to the front-end, over the socket that SET_BACKEND_REQ_FD brings.

There are two kinds. A *notice* says that something happened (the config space changed; in-band, that buffers were used): one of
each key waits at most, since the second would say nothing new. A *call* wants an answer and is awaited; each asks for an ack
where REPLY_ACK was negotiated, and is done when it was sent where it was not.

    posted -> queued -> sent -> answered            answers come in the order of the questions; matched by that

A message waits in the queue while the device is suspended, which is while no ring is started (the vhost-user document,
"Suspended device state"), and while the socket is full. Nobody waits with it: the session goes on, whatever the front-end
does with its end. What bounds the queue: a notice for each key (the config space; two per ring), and CALLS calls; who makes
another call waits for a place.

The front-end may close the channel (calls fail with EPIPE, the session goes on) or open another one, which does the same to the
old. An answer that breaks the protocol ends the session.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import Any

from . import ancillary
from .errors import FrontendError
from .proto import ProtocolFeature, Session, events, wire
from .proto.features import names
from .proto.messages import BACKEND_TABLE, BackendRow
from .recording import Tap

__all__ = ["CALLS", "Channel"]

log = logging.getLogger("vhostsock.server")

CALLS = 64  # under way at once; a reader that is slow should slow its callers, not fill memory


@dataclasses.dataclass(eq=False, slots=True)
class _Message:
    row: BackendRow
    data: bytes  # what is still to be sent
    fds: list[int]  # ours, to be sent with the first byte and closed then
    answer: asyncio.Future[tuple[int, events.OwnedFd | None]] | None  # None: nobody waits for one
    key: object = None  # of a notice
    begun: bool = False  # its first byte is out: it cannot be taken back any more

    def close_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


class Channel:
    """Closed until the front-end opens it. ``fail``: told when the session cannot go on."""

    def __init__(self, session: Session, fail: Callable[[Exception], None], tap: Tap) -> None:
        self._session = session
        self._fail = fail
        self._tap = tap
        self._loop = asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        self._queue: collections.deque[_Message] = collections.deque()
        self._sent: collections.deque[_Message] = collections.deque()  # and to be answered
        self._again: dict[object, _Message] = {}  # notices that came up while one of their key was unanswered
        self._room = asyncio.Semaphore(CALLS)
        self._writing = False
        self._buffer = b""
        self._fds: list[events.OwnedFd] = []

    # ---- life

    def open(self, event: events.BackendChannel) -> None:
        """Use this socket from now on. FrontendError when it is not a Unix stream socket."""
        if not stat.S_ISSOCK(os.fstat(event.fd.fileno()).st_mode):
            raise FrontendError("SET_BACKEND_REQ_FD: the descriptor is not a socket")
        sock = socket.socket(fileno=os.dup(event.fd.fileno()))
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            sock.close()
            raise FrontendError("SET_BACKEND_REQ_FD: the descriptor is not a Unix stream socket")
        self.close()
        os.set_inheritable(sock.fileno(), False)
        sock.setblocking(False)
        self._sock = sock
        self._loop.add_reader(sock, self._readable)

    def close(self) -> None:
        """Calls under way fail with EPIPE. Idempotent; ``open`` may follow."""
        if not self._sock:
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._writing = False
        self._sock.close()
        self._sock = None
        for message in [*self._queue, *self._sent]:
            message.close_fds()
            if message.answer and not message.answer.done() and message.key is None:
                message.answer.set_exception(OSError(errno.EPIPE, "the back-end channel was closed"))
        self._queue.clear()
        self._sent.clear()
        self._again.clear()
        self._drop_input()

    @property
    def is_open(self) -> bool:
        return self._sock is not None

    # ---- messages

    def notify(self, request: wire.BackendRequest, value: Any = None, *, key: object = None, ack: bool = False) -> None:
        """Send a notice unless one like it (request, key) waits already. Nothing happens where it cannot be sent.

        ack: the next one like it is sent only when this one was answered.
        """
        row = BACKEND_TABLE[request]
        key = request, key
        if self._sock is None or row.needs & ~self._session.protocol_features or key in self._again:
            return
        if any(message.key == key and not message.begun for message in self._queue):
            return
        answer = self._loop.create_future() if ack and self._acks else None
        message = _Message(row, self._pack(row, value, answer is not None), [], answer, key)
        if any(other.key == key for other in self._sent):
            self._again[key] = message
        else:
            self._queue.append(message)
            self.pump()

    async def call(self, request: wire.BackendRequest, value: Any = None, *, fd: int = -1) -> int:
        """Send a message and wait for its answer. Returns the descriptor that came with it (the caller's to close), or -1.

        fd: sent along; it stays the caller's. OSError: EOPNOTSUPP when the front-end did not agree to such messages, EREMOTEIO
        when it refused this one, EPIPE when the channel was closed meanwhile.
        """
        row = BACKEND_TABLE[request]
        missing = row.needs & ~self._session.protocol_features
        if self._sock is None or missing:
            why = f"did not negotiate {names(missing)}" if missing else "opened no back-end channel"
            raise OSError(errno.EOPNOTSUPP, f"{request.name}: the front-end {why}")
        sock = self._sock
        async with self._room:
            if self._sock is not sock:
                raise OSError(errno.EPIPE, "the back-end channel was closed")
            answer: asyncio.Future[tuple[int, events.OwnedFd | None]] = self._loop.create_future()
            data = self._pack(row, value, row.reply is None and self._acks)
            message = _Message(row, data, [os.dup(fd)] if fd >= 0 else [], answer)
            self._queue.append(message)
            try:
                self.pump()
                result, got = await answer
            finally:
                if not message.begun and message in self._queue:  # cancelled: nobody has seen it
                    self._queue.remove(message)
                message.close_fds()
        if result:
            raise OSError(errno.EREMOTEIO, f"{request.name}: the front-end refused it ({result:#x})")
        return got.take() if got else -1

    @property
    def _acks(self) -> bool:
        return bool(self._session.protocol_features & ProtocolFeature.REPLY_ACK)

    @staticmethod
    def _pack(row: BackendRow, value: Any, ack: bool) -> bytes:
        return wire.pack(row.request, wire.NEED_REPLY_FLAGS if ack else wire.REQUEST_FLAGS, row.payload, value)

    # ---- sending

    def pump(self) -> None:
        """Send what may be sent now. To be called whenever the device may have ceased to be suspended."""
        while self._queue and self._sock and (self._session.started or self._queue[0].begun):
            message = self._queue[0]
            try:
                sent = socket.send_fds(
                    self._sock, [message.data], message.fds, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                )
            except (BlockingIOError, InterruptedError):
                self._write_later()
                return
            except OSError as error:
                self._lost(error)
                return
            if not message.begun:
                message.begun = True
                message.close_fds()
                self._tap.sent_on_channel(message.data)
            message.data = message.data[sent:]
            if not message.data:
                self._queue.popleft()
                self._was_sent(message)

    def _was_sent(self, message: _Message) -> None:
        if message.answer is None:
            return
        if message.row.reply is not None or self._acks:
            self._sent.append(message)
        elif not message.answer.done():
            message.answer.set_result((0, None))

    def _write_later(self) -> None:
        if not self._writing and self._sock:
            self._writing = True
            self._loop.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        self._writing = False
        if self._sock:
            self._loop.remove_writer(self._sock)
        self.pump()

    def _lost(self, error: OSError | None = None) -> None:
        log.info("the front-end closed the back-end channel%s", f": {error.strerror}" if error else "")
        self.close()

    # ---- answers

    def _readable(self) -> None:
        while self._sock:
            wanted = wire.HEADER_SIZE
            if len(self._buffer) >= wanted:
                wanted += int(wire.HEADER.parse(self._buffer[:wanted]).size)
            try:
                data, fds, truncated = ancillary.receive(self._sock, wanted - len(self._buffer))
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lost(error)
                return
            self._fds += map(events.OwnedFd, fds)
            if not data:
                self._lost()
                return
            self._buffer += data
            try:
                self._check(truncated)
                if len(self._buffer) == wire.HEADER_SIZE + wire.U64.sizeof():
                    self._answered()
            except FrontendError as error:
                self.close()
                self._fail(error)
                return

    def _check(self, truncated: bool) -> None:
        """What can be said of an answer from its header on."""
        if len(self._buffer) < wire.HEADER_SIZE:
            return
        header = wire.HEADER.parse(self._buffer[: wire.HEADER_SIZE])
        what = f"back-end channel: request {header.request}, flags {header.flags:#x}, {header.size} bytes"
        if not self._sent:
            raise FrontendError(f"{what}: an answer to nothing")
        row = self._sent[0].row
        if (header.request, header.flags, header.size) != (row.request, wire.REPLY_FLAGS, wire.U64.sizeof()):
            raise FrontendError(f"{what}: no answer to {row.request.name}")
        if truncated or len(self._fds) > row.reply_fds:
            raise FrontendError(f"{what}: too many descriptors in the answer to {row.request.name}")

    def _answered(self) -> None:
        message = self._sent.popleft()
        self._tap.received_on_channel(self._buffer, [fd.fileno() for fd in self._fds])
        value = int(wire.U64.parse(self._buffer[wire.HEADER_SIZE :]))
        assert message.answer
        if not message.answer.done():  # else it was cancelled
            message.answer.set_result((value, self._fds.pop() if self._fds else None))
        self._drop_input()
        if message.key in self._again:
            self._queue.append(self._again.pop(message.key))
            self.pump()

    def _drop_input(self) -> None:
        self._buffer = b""
        for fd in self._fds:
            fd.close()
        self._fds.clear()
