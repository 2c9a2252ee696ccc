# SPDX-License-Identifier: BSD-3-Clause
"""Recordings of vhost-user sessions: what ``vhostsock serve --record FILE`` writes and ``vhostsock trace FILE`` reads.

A recording is one JSON object a line. The first says what the file is; the rest have ``t``, seconds since it began:

    {"vhostsock-recording": 1, "byteorder": "little", "began": "2026-01-31T12:00:00+00:00"}
    {"t": .., "kind": "connection", "number": 0, "features": .., "protocol_features": .., "queues": .., "slots": ..}
    {"t": .., "kind": "->", "request": 5, "flags": 1, "size": 40, "payload": "hex", "fds": ["/memfd:ram size=0x1000 seals=0x7"]}
    {"t": .., "kind": "<-", ...}     our reply, with the same members and no fds
    {"t": .., "kind": "=>", ...}     our message on the back-end channel
    {"t": .., "kind": "<=", ...}     the front-end's answer there, with its fds
    {"t": .., "kind": "==", "text": "ring 0 started"}

Payloads are kept as they were on the wire, so that a message that nobody understands, or that ended early (``payload`` shorter
than ``size``), is in the recording too. Descriptors are described when they arrive, before anybody can close them. Kicks and
requests in the rings are not recorded: they do not pass through the session.

A recording never harms the session it is about. Each line is written at once, so it is there when the process dies; if it
cannot be written (a full disk, or LIMIT reached), the log says so, the recording ends, and the session goes on.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

from .errors import UsageError
from .proto import SessionConfig, wire

__all__ = ["LIMIT", "Entry", "Recorder", "Tap", "describe_fd", "read_recording"]

log = logging.getLogger("vhostsock.recording")

VERSION = 1
MESSAGES = ("->", "<-", "=>", "<=")
OFFER = ("number", "features", "protocol_features", "queues", "slots")
# A front-end can send messages without end; a session of QEMU is a few hundred lines of 200 bytes.
LIMIT = 256 << 20


class Tap:
    """What a Backend tells about its connection to whoever listens. This one does not listen."""

    def connected(self, config: SessionConfig) -> None:
        """A front-end came; it will be offered this."""

    def received(self, data: bytes, fds: Sequence[int]) -> None:
        """Bytes of one message, never beyond its end, and the descriptors that came with them (still the caller's)."""

    def sent(self, data: bytes) -> None:
        """Whole replies."""

    def sent_on_channel(self, data: bytes) -> None:
        """A whole message on the back-end channel."""

    def received_on_channel(self, data: bytes, fds: Sequence[int]) -> None:
        """A whole answer on the back-end channel, with its descriptors."""

    def noted(self, text: str) -> None:
        """Something happened that is no message."""

    def ended(self, reason: str) -> None:
        """The connection is over."""


class Recorder(Tap):
    """Writes a recording to ``path``, in place of what was there. OSError with path and reason when it cannot be opened."""

    def __init__(self, path: str, *, limit: int = LIMIT) -> None:
        try:
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by close())
        except OSError as error:
            raise OSError(error.errno, f"cannot record there: {error.strerror}", path) from None
        self._path = path
        self._limit = self._left = limit
        self._began = time.monotonic()
        self._connections = 0
        self._buffer = b""
        self._fds: list[str] = []
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._write({"vhostsock-recording": VERSION, "byteorder": sys.byteorder, "began": began})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the recording. Idempotent; what is told afterwards is not recorded."""
        self._file.close()

    def connected(self, config: SessionConfig) -> None:
        offer = (self._connections, config.features, config.protocol_features, config.num_queues, config.max_mem_slots)
        self._connections += 1
        self._add("connection", **dict(zip(OFFER, offer, strict=True)))

    def received(self, data: bytes, fds: Sequence[int]) -> None:
        self._fds += map(describe_fd, fds)
        self._buffer += data
        if len(self._buffer) >= wire.HEADER_SIZE and not self._missing():
            self._add_received()

    def sent(self, data: bytes) -> None:
        self._add_messages("<-", data)

    def sent_on_channel(self, data: bytes) -> None:
        self._add_messages("=>", data)

    def received_on_channel(self, data: bytes, fds: Sequence[int]) -> None:
        self._add_messages("<=", data, fds=list(map(describe_fd, fds)))

    def noted(self, text: str) -> None:
        self._add("==", text=text)

    def ended(self, reason: str) -> None:
        if len(self._buffer) >= wire.HEADER_SIZE:  # the message that ended the session, as far as it was read
            self._add_received()
        self._buffer, self._fds = b"", []
        self._add("==", text=reason)

    def _missing(self) -> int:
        return wire.HEADER_SIZE + int(wire.HEADER.parse(self._buffer).size) - len(self._buffer)

    def _add_received(self) -> None:
        header = wire.HEADER.parse(self._buffer)
        self._add_message("->", header, self._buffer[wire.HEADER_SIZE :], fds=self._fds)
        self._buffer, self._fds = b"", []

    def _add_messages(self, kind: str, data: bytes, **more: Any) -> None:
        while data:
            header = wire.HEADER.parse(data)
            end = wire.HEADER_SIZE + header.size
            self._add_message(kind, header, data[wire.HEADER_SIZE : end], **more)
            data = data[end:]

    def _add_message(self, kind: str, header: Any, payload: bytes, **more: Any) -> None:
        self._add(kind, request=header.request, flags=header.flags, size=header.size, payload=payload.hex(), **more)

    def _add(self, kind: str, **members: Any) -> None:
        self._write({"t": round(time.monotonic() - self._began, 6), "kind": kind, **members})

    def _write(self, members: dict[str, Any]) -> None:
        if self._file.closed:
            return
        line = json.dumps(members).encode() + b"\n"
        try:
            if len(line) > self._left:
                raise OSError(f"it has reached the limit of {self._limit} bytes")
            self._left -= len(line)
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            log.error("%s: the recording ends here: %s", self._path, error.strerror or error)
            self.close()


def describe_fd(fd: int) -> str:
    """What a descriptor is, as /proc has it: ``/memfd:ram size=0x1000 seals=0x7``, ``socket``, ``anon_inode:[eventfd]``."""
    try:
        status = os.fstat(fd)
        if stat.S_ISSOCK(status.st_mode):
            return "socket"
        name = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    except OSError as error:
        return f"unknown ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return name
    text = f"{name} size={status.st_size:#x}"
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # no file system for it has seals but tmpfs and hugetlbfs
        return text
    return f"{text} seals={seals:#x}"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A line of a recording. time: seconds since it began; offer: of a "connection"; text: of "=="; the rest: of a message."""

    time: float
    kind: str
    text: str = ""
    offer: dict[str, int] = dataclasses.field(default_factory=dict)
    request: int = 0
    flags: int = 0
    size: int = 0
    payload: bytes = b""
    fds: tuple[str, ...] = ()


def read_recording(path: str) -> Iterator[Entry]:
    """The entries of a recording. UsageError, with file and line, when it is none. A last line cut short becomes an "=="."""
    with open(path, "rb") as file:
        _check_first(path, file.readline(1 << 16))
        time = 0.0
        for number, line in enumerate(file, 2):
            if not line.endswith(b"\n"):
                yield Entry(time, "==", "the recording ends within a line")
                return
            try:
                entry = _entry(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(f"{path}:{number}: not a line of a vhostsock recording") from None
            time = entry.time
            yield entry


def _check_first(path: str, line: bytes) -> None:
    try:
        first = json.loads(line)
        version, order = first["vhostsock-recording"], first["byteorder"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path}: not a recording; 'vhostsock serve ... --record FILE' makes one") from None
    if version != VERSION:
        raise UsageError(f"{path}: a recording of version {version}; this vhostsock reads version {VERSION}")
    if order != sys.byteorder:
        raise UsageError(f"{path}: recorded on a {order}-endian machine; read it on one such")


def _entry(line: Any) -> Entry:
    time, kind = float(line["t"]), line["kind"]
    if kind == "connection":
        return Entry(time, kind, offer={name: _number(line[name]) for name in OFFER})
    if kind == "==":
        return Entry(time, kind, str(line["text"]))
    if kind not in MESSAGES:
        raise ValueError(kind)
    request, flags, size = (_number(line[name]) for name in ("request", "flags", "size"))
    fds = tuple(str(fd) for fd in line.get("fds", ()))
    return Entry(time, kind, request=request, flags=flags, size=size, payload=bytes.fromhex(line["payload"]), fds=fds)


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError
    return value
