# SPDX-License-Identifier: BSD-3-Clause
"""Descriptors of any kind where the protocol wants a certain one, and more of them than there should be."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from tests.device.test_server import connect, works
from vhostsock import Server
from vhostsock.proto import Request, wire
from vhostsock.testing.driver import Region
from vhostsock.testing.frontend import BackendGone, Frontend, Refused, attach


def memfd(*seals: int) -> int:
    fd = os.memfd_create("region", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 16)
    for seal in seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    return fd


def path_only() -> int:
    return os.open(__file__, os.O_PATH)


def unix_socket() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


NOT_MEMORY: dict[str, Callable[[], int]] = {
    "a directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    "a socket": unix_socket,
    "an eventfd": lambda: os.eventfd(0),
    "/dev/zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "a path without access": path_only,
    "a file that is read-only": lambda: os.open(__file__, os.O_RDONLY),
    "memory sealed against writing": lambda: memfd(fcntl.F_SEAL_WRITE),
    "an empty file": lambda: os.memfd_create("empty"),
}


@pytest.mark.parametrize("kind", NOT_MEMORY)
@in_loop
async def test_what_is_no_memory_is_refused_as_a_region_and_the_session_goes_on(kind: str) -> None:
    async with attach(Upper()) as frontend:
        fd = NOT_MEMORY[kind]()
        with pytest.raises(Refused):
            await frontend.add_region(Region(fd, 1 << 40, 1 << 16, 1 << 41))
        os.close(fd)
        await echoes(frontend)


async def echoes(frontend: Frontend) -> None:
    frontend.queues[0].submit([b"x"], [1])
    [done] = await frontend.queues[0].wait_async()
    assert done.data == b"X"


def dead_pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def epoll() -> int:
    with select.epoll() as mine:
        return os.dup(mine.fileno())


KICKS: dict[str, Callable[[], int]] = {
    "the front-end's own epoll set": epoll,
    "a pipe that nobody writes to": dead_pipe,
    "a socket that is not connected": unix_socket,
    "a pidfd": lambda: os.pidfd_open(os.getpid()),
}


@pytest.mark.parametrize("kind", KICKS)
@in_loop
async def test_a_kick_descriptor_of_any_kind_costs_its_own_session_at_most(kind: str, tmp_path: Path) -> None:
    async with Server(Upper(), path=tmp_path / "s"):
        fd = KICKS[kind]()
        async with await connect(tmp_path / "s") as odd:
            await odd.handshake()
            await odd.start()
            with contextlib.suppress(Refused, BackendGone, OSError):
                await odd.set_fd(Request.SET_VRING_KICK, 0, fd)
                await odd.settled()
        os.close(fd)
        await works(tmp_path / "s")


@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_VRING_ERR, Request.SET_VRING_KICK])
@in_loop
async def test_the_sessions_own_socket_as_a_notification_does_not_keep_the_server_from_stopping(
    request_: Request, tmp_path: Path
) -> None:
    """The front-end's end of the connection, held by us, keeps the connection open after it has gone: as it could itself."""
    async with Server(Upper(), path=tmp_path / "s"):
        odd = await connect(tmp_path / "s")
        await odd.handshake()
        await odd.start()
        value = {"index": 0, "nofd": False}
        await odd.send(wire.pack(request_, wire.REQUEST_FLAGS, wire.VRING_FD, value), [odd.sock.fileno()])
        odd.close()


@pytest.mark.parametrize("pieces", [1, 12], ids=["with one byte", "with each byte of a header"])
@in_loop
async def test_a_flood_of_descriptors_ends_its_session_and_all_are_closed(pieces: int, tmp_path: Path) -> None:
    message = wire.pack(Request.SET_VRING_CALL, 1, wire.VRING_FD, {"index": 0, "nofd": False})
    async with Server(Upper(), path=tmp_path / "s"):
        for _ in range(20):
            async with await connect(tmp_path / "s") as flood:
                reading, writing = os.pipe()
                with contextlib.suppress(OSError):
                    for at in range(pieces):
                        await flood.send(message[at : at + 1], [writing] * 8)
                    await flood.send(message[pieces:])
                os.close(writing)
                flood.sock.shutdown(socket.SHUT_WR)
                await flood.ended()
                await asyncio.to_thread(os.read, reading, 1)  # which ends only when the last copy of the other end is closed
                os.close(reading)
        await works(tmp_path / "s")


@pytest.fixture
def inherited() -> set[int]:
    """Descriptors that a program started from here would get."""
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if inheritable(fd)}


def inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


@in_loop
async def test_no_descriptor_of_a_session_is_inherited_by_programs(inherited: set[int]) -> None:
    async with attach(Upper()) as frontend:
        await echoes(frontend)
        assert {fd for fd in map(int, os.listdir("/proc/self/fd")) if inheritable(fd)} <= inherited
