# SPDX-License-Identifier: BSD-3-Clause
"""Front-ends that misuse the transfer of a device's state (SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE)."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from vhostsock import Server
from vhostsock.proto import Request
from vhostsock.proto.wire import TransferDirection
from vhostsock.state import StateReader, StateWriter
from vhostsock.testing.frontend import Frontend, Refused, attach


class Notebook(Upper):
    """Has state; says whether a hook of its own is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = 0

    async def save_state(self, stream: StateWriter) -> None:
        await stream.write(b"state")

    async def load_state(self, stream: StateReader) -> None:
        self.busy += 1
        try:
            await stream.read()
        finally:
            self.busy -= 1

    async def disconnected(self) -> None:
        assert not self.busy, "a hook runs on for a front-end that has gone"


@in_loop
async def test_a_transfer_after_one_that_was_cut_short_does_not_end_the_server(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    async with Server(Notebook(), path=path):
        for _ in range(2):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(path))
            async with Frontend(sock) as frontend:
                await frontend.handshake()
                reading, writing = os.pipe()
                await frontend.transfer_state(TransferDirection.LOAD, reading)
                await frontend.start()  # which cuts it short
                await frontend.stop()
                await frontend.transfer_state(TransferDirection.LOAD, reading)
                os.close(reading)
                os.close(writing)
                await frontend.check_state()


@in_loop
async def test_a_server_that_stops_while_a_transfer_is_checked_ends_the_transfer() -> None:
    device = Notebook()
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()  # never written to, never closed: the transfer stalls
    async with Server(device, sock=ours) as server, Frontend(theirs) as frontend:
        await frontend.handshake()
        await frontend.transfer_state(TransferDirection.LOAD, reading)
        await frontend.request(Request.CHECK_DEVICE_STATE)
        while not device.busy or struct.unpack("i", fcntl.ioctl(ours, termios.FIONREAD, bytes(4)))[0]:  # noqa: ASYNC110
            await asyncio.sleep(0)  # no event says that the last message was read
        server.stop()
        await server.close()
        assert not device.busy
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("kind", ["eventfd", "file", "wrong end"])
@in_loop
async def test_a_descriptor_that_is_no_pipe_end_for_it_is_refused_and_closed(kind: str) -> None:
    async with attach(Notebook(), started=False) as frontend:
        reading, writing = os.pipe()
        fd = {"eventfd": os.eventfd(0), "file": os.memfd_create("x"), "wrong end": os.dup(writing)}
        try:
            with pytest.raises(Refused):
                await frontend.transfer_state(TransferDirection.LOAD, fd[kind])
        finally:
            for each in (reading, writing, *fd.values()):
                os.close(each)
        await frontend.start()
