# SPDX-License-Identifier: BSD-3-Clause
"""Plays a recorded session to a device: ``vhostsock serve ... --record FILE`` becomes a test.

    from vhostsock.testing.replay import replay

    def test_a_session_of_qemu_is_answered_as_it_was():
        replay("session.rec", Mine())

The front-end's part of the recording, message for message, to the real server with the device; its replies are compared with
those that were recorded. Descriptors are made anew from their descriptions: memory of the same size (the same file where the
recording names one several times), eventfds, sockets. What was in guest memory is not in a recording. So each ring is empty at
the base that it is started with, no request is made, and what depends on requests differs:

    GET_VRING_BASE                                     which base it is
    GET_FEATURES, GET_PROTOCOL_FEATURES                more may be offered now than then, not less
    GET_QUEUE_NUM, GET_MAX_MEM_SLOTS                   may be more now

Everything else is compared to the byte, in order: what is refused, which acks come, the config space, the status.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
from collections.abc import Callable, Collection, Iterable

from ..device import Device
from ..proto import Request, VirtioFeature, wire
from ..recording import Entry, read_recording
from ..server import Server
from ..trace import line_of

__all__ = ["Differs", "replay"]

TIMEOUT = 30.0


class Differs(AssertionError):
    """The device does not answer as it was recorded; the text shows the message and both answers."""


def replay(path: str | os.PathLike[str], device: Device, *, ignore: Collection[Request] = ()) -> int:
    """Play the recording to ``device``; the number of replies that were compared.

    ignore: messages whose replies may differ, such as GET_CONFIG of a device that counts there. Differs; UsageError when the
    file is no recording; TimeoutError when a reply does not come within 30 seconds.
    """
    return asyncio.run(_replay(list(read_recording(os.fspath(path))), device, frozenset(ignore)))


async def _replay(entries: list[Entry], device: Device, ignore: frozenset[Request]) -> int:
    starts = [n for n, entry in enumerate(entries) if entry.kind == "connection"]
    compared = 0
    for start, end in zip(starts, [*starts[1:], len(entries)], strict=True):
        compared += await _Session(ignore).play(entries[start:end], device)
    return compared


class _Session:
    """One connection of a recording."""

    def __init__(self, ignore: frozenset[Request]) -> None:
        self._ignore = ignore
        self._files: dict[str, int] = {}
        self._regions: list[tuple[int, int, int, int]] = []  # uva, size, file, offset
        self._rings: dict[int, dict[str, int]] = {}
        self._features = 0
        self._kept: list[int] = []
        self._compared = 0

    async def play(self, entries: Iterable[Entry], device: Device) -> int:
        ours, theirs = socket.socketpair()
        try:
            async with Server(device, sock=theirs) as server:
                ours.setblocking(False)
                asked = Entry(0.0, "->")
                for entry in entries:
                    if entry.kind == "->":
                        asked = entry
                        await self._send(ours, entry)
                    elif entry.kind == "<-":
                        await self._compare(ours, asked, entry)
                ours.close()
                await server.serve_forever()
        finally:
            ours.close()
            theirs.close()
            for fd in [*self._files.values(), *self._kept]:
                os.close(fd)
        return self._compared

    # ---- out

    async def _send(self, sock: socket.socket, entry: Entry) -> None:
        fds = [self._descriptor(text) for text in entry.fds]
        watch = _WATCH.get(entry.request)
        if watch:
            with contextlib.suppress(struct.error):  # too short: the device is to say so
                watch(self, entry.payload, fds)
        data = wire.HEADER.build({"request": entry.request, "flags": entry.flags, "size": entry.size}) + entry.payload
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a session that was ended before is so again
            sent = socket.send_fds(sock, [data], fds)
            await asyncio.get_running_loop().sock_sendall(sock, data[sent:])

    def _descriptor(self, text: str) -> int:
        """What the description says, open until the connection ends."""
        size = re.search(r" size=(0x[0-9a-f]+)", text)
        if size:
            if text not in self._files:
                self._files[text] = os.memfd_create("replay", os.MFD_CLOEXEC)
                os.ftruncate(self._files[text], int(size[1], 0))
            return self._files[text]
        if text == "socket":
            ends = socket.socketpair()
            self._kept += [end.detach() for end in ends]
        elif text.startswith("pipe:"):
            self._kept += os.pipe2(os.O_CLOEXEC)
        else:
            self._kept.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return self._kept[-1]

    # ---- in

    async def _compare(self, sock: socket.socket, asked: Entry, recorded: Entry) -> None:
        header = wire.HEADER.parse(await self._receive(sock, wire.HEADER_SIZE, asked, recorded))
        body = await self._receive(sock, header.size, asked, recorded)
        found = Entry(recorded.time, "<-", request=header.request, flags=header.flags, size=header.size, payload=body)
        same = (found.request, found.flags) == (recorded.request, recorded.flags)
        if not same or (recorded.request not in self._ignore and not _alike(recorded, found)):
            raise Differs(f"{line_of(asked)}\nwas answered\n{line_of(recorded)}\nand now\n{line_of(found)}")
        self._compared += 1

    async def _receive(self, sock: socket.socket, size: int, asked: Entry, recorded: Entry) -> bytes:
        data = b""
        async with asyncio.timeout(TIMEOUT):
            while len(data) < size:
                try:
                    piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
                except ConnectionError:
                    piece = b""
                if not piece:
                    raise Differs(f"{line_of(asked)}\nwas answered\n{line_of(recorded)}\nand now the session is over")
                data += piece
        return data

    # ---- guest memory: rings that are empty where they start

    def _table(self, payload: bytes, fds: list[int]) -> None:
        [count] = struct.unpack_from("=I", payload)
        rows = [struct.unpack_from("=QQQQ", payload, 8 + 32 * n) for n in range(min(count, len(fds)))]
        self._regions = [(uva, size, fd, offset) for (_, size, uva, offset), fd in zip(rows, fds, strict=True)]

    def _region(self, payload: bytes, fds: list[int]) -> None:
        _, size, uva, offset = struct.unpack_from("=QQQQ", payload, 8)
        self._regions += [(uva, size, fd, offset) for fd in fds[:1]]

    def _acked(self, payload: bytes, fds: list[int]) -> None:
        [self._features] = struct.unpack_from("=Q", payload)

    def _size(self, payload: bytes, fds: list[int]) -> None:
        index, num = struct.unpack_from("=II", payload)
        self._rings.setdefault(index, {})["num"] = num

    def _base(self, payload: bytes, fds: list[int]) -> None:
        index, base = struct.unpack_from("=II", payload)
        self._rings.setdefault(index, {})["base"] = base

    def _addresses(self, payload: bytes, fds: list[int]) -> None:
        index, _, desc, used, avail = struct.unpack_from("=IIQQQ", payload)
        self._rings.setdefault(index, {}).update(desc=desc, used=used, avail=avail)

    def _kick(self, payload: bytes, fds: list[int]) -> None:
        [index] = struct.unpack_from("=B", payload)
        ring = self._rings.get(index, {})
        if not {"num", "base", "desc"} <= ring.keys():
            return
        base = ring["base"]
        if not self._features & VirtioFeature.RING_PACKED:
            for part in ("avail", "used"):
                self._write(ring[part] + 2, struct.pack("<H", base & 0xFFFF))
            return
        at, wrap = base & 0x7FFF, base >> 15 & 1
        for slot in range(ring["num"]):  # used on this lap in front of the place, on the last one from there on
            lap = wrap if slot < at else 1 - wrap
            self._write(ring["desc"] + 16 * slot + 14, struct.pack("<H", 0x8080 if lap else 0))

    def _write(self, uva: int, data: bytes) -> None:
        for start, size, fd, offset in self._regions:
            if start <= uva <= start + size - len(data):
                os.pwrite(fd, data, offset + uva - start)


_WATCH: dict[int, Callable[[_Session, bytes, list[int]], None]] = {
    Request.SET_FEATURES: _Session._acked,
    Request.SET_MEM_TABLE: _Session._table,
    Request.ADD_MEM_REG: _Session._region,
    Request.SET_VRING_NUM: _Session._size,
    Request.SET_VRING_BASE: _Session._base,
    Request.SET_VRING_ADDR: _Session._addresses,
    Request.SET_VRING_KICK: _Session._kick,
}

_MORE = (Request.GET_QUEUE_NUM, Request.GET_MAX_MEM_SLOTS)
_BITS = (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES)


def _alike(recorded: Entry, found: Entry) -> bool:
    if recorded.request in (*_BITS, *_MORE) and recorded.size == found.size == wire.U64.sizeof():
        then, now = wire.U64.parse(recorded.payload), wire.U64.parse(found.payload)
        return now >= then if recorded.request in _MORE else not then & ~now
    if recorded.request == Request.GET_VRING_BASE:
        return recorded.payload[:4] == found.payload[:4] and recorded.size == found.size
    return recorded.payload == found.payload
