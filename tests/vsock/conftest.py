# SPDX-License-Identifier: BSD-3-Clause
"""A pretended guest in front of a real vsock device: real session, real rings, real engine, real sockets of this host.

The test is the guest's driver on one side and the host's programs on the other; the device runs in a thread (device_thread).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.device_thread import PATIENCE, OnDeviceThread, device_thread
from vhostsock.testing.packed import PackedQueue
from vhostsock.testing.vsock import VsockDriver
from vhostsock.vsock import VsockDevice

CID = 42


class Guest(OnDeviceThread, VsockDriver):
    """The driver, and what a test wants to know of the device behind it."""

    device: VsockDevice
    path: Path

    def host_connects(self, port: int) -> socket.socket:
        """A client of the host that has asked for ``port`` of the guest and did not look at the answer yet."""
        client = client_of(self.path)
        client.sendall(b"CONNECT %d\n" % port)
        return client


@contextlib.contextmanager
def serving(device: VsockDevice, driver: dict[str, Any], **frontend: Any) -> Iterator[Guest]:
    """A guest whose driver has started on ``device``."""
    options: dict[str, Any] = {"size": 128, "memory": (32 << 20,)} | frontend
    with device_thread(device, **options) as there:
        guest = Guest(there.frontend.queues[:2], cid=CID, **driver)
        guest.device, guest.frontend, guest.loop = device, there.frontend, there.loop
        yield guest


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
