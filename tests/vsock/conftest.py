# SPDX-License-Identifier: BSD-3-Clause
"""A pretended guest in front of a real vsock device: real session, real rings, real engine, real sockets of this host.

The device and its server run on an event loop in a thread, as they do in a process of their own; the test is the guest's driver
on one side and the host's programs on the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vhostsock.testing.frontend import Frontend, attach
from vhostsock.testing.packed import PackedQueue
from vhostsock.testing.vsock import VsockDriver
from vhostsock.vsock import VsockDevice

T = TypeVar("T")
PATIENCE = 30.0  # seconds for anything that must happen
CID = 42


class Guest(VsockDriver):
    """The driver, and what a test wants to know of the device behind it."""

    device: VsockDevice
    frontend: Frontend
    loop: asyncio.AbstractEventLoop
    path: Path

    def in_loop(self, call: Callable[[], T]) -> T:
        """``call()`` on the device's thread."""

        async def run() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE)

    def run(self, work: Any) -> Any:
        """Await ``work`` on the device's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until ``condition()`` holds on the device's thread: it is looked at after everything that happens there."""

        async def run() -> None:
            while not condition():  # noqa: ASYNC110  every turn of the loop may have changed it, none tells
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(run(), PATIENCE), self.loop).result(PATIENCE)

    def host_connects(self, port: int) -> socket.socket:
        """A client of the host that has asked for ``port`` of the guest and did not look at the answer yet."""
        client = client_of(self.path)
        client.sendall(b"CONNECT %d\n" % port)
        return client


@contextlib.contextmanager
def serving(device: VsockDevice, driver: dict[str, Any], **frontend: Any) -> Iterator[Guest]:
    """A guest whose driver has started on ``device``."""
    options: dict[str, Any] = {"size": 128, "memory": (32 << 20,)} | frontend
    started = threading.Event()
    shared: dict[str, Any] = {}

    async def serve() -> None:
        done = shared["done"] = asyncio.Event()
        try:
            async with attach(device, **options) as frontend:
                shared.update(frontend=frontend, loop=asyncio.get_running_loop())
                started.set()
                await done.wait()
        except BaseException as error:
            shared["error"] = error
        finally:
            started.set()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="device")
    thread.start()
    try:
        assert started.wait(PATIENCE)
        if "error" in shared:
            raise shared["error"]
        guest = Guest(shared["frontend"].queues[:2], cid=CID, **driver)
        guest.device, guest.frontend, guest.loop = device, shared["frontend"], shared["loop"]
        yield guest
    finally:
        if "loop" in shared:
            shared["loop"].call_soon_threadsafe(shared["done"].set)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    if "error" in shared:
        raise shared["error"]


MakeGuest = Callable[..., Guest]


@pytest.fixture
def make_guest(tmp_path: Path) -> Iterator[MakeGuest]:
    """``make_guest(driver={...}, frontend={...}, **arguments of the device)``; the guests go when the test ends. ``guest.path``
    is the device's uds_path."""
    with contextlib.ExitStack() as stack:

        def make(driver: dict[str, Any] | None = None, frontend: dict[str, Any] | None = None, **arguments: Any) -> Guest:
            path = tmp_path / "v"
            options: dict[str, Any] = {"uds_path": path, "name": "vm1"} | arguments
            device = VsockDevice(CID, **options)
            guest = stack.enter_context(serving(device, driver or {}, **(frontend or {})))
            guest.path = path
            return guest

        yield make


@pytest.fixture(params=["split", "packed"])
def guest(request: pytest.FixtureRequest, make_guest: MakeGuest) -> Guest:
    """A guest on rings of either format."""
    guest = make_guest(frontend={"accept": ~0} if request.param == "packed" else {})
    assert isinstance(guest.queues[0], PackedQueue) == (request.param == "packed")
    return guest


@contextlib.contextmanager
def listener_at(path: Path, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """A program of the host that listens where ``port`` of the host leads."""
    with socket.socket(socket.AF_UNIX, kind) as server:
        server.bind(f"{path}_{port}")
        server.listen(64)
        server.settimeout(PATIENCE)
        yield server


def client_of(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A client of the host, connected to the device's uds_path."""
    client = socket.socket(socket.AF_UNIX, kind)
    client.settimeout(PATIENCE)
    client.connect(str(path))
    return client


def accept(server: socket.socket) -> socket.socket:
    connection, _ = server.accept()
    connection.settimeout(PATIENCE)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 18), b""))


def read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line
