"""A pretended guest in front of a real offload device, with real sockets of this host behind it.

The test is the guest's driver on one side and the host's servers on the other; the device runs in a thread (device_thread).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import textwrap
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from tests.device_thread import PATIENCE, OnDeviceThread, device_thread
from vhostsock.offload.device import OffloadDevice
from vhostsock.offload.policy_file import parse_policy
from vhostsock.testing.offload import OffloadDriver

LOOPS: dict[str, Callable[[Coroutine[Any, Any, None]], None]] = {"asyncio": asyncio.run, "uvloop": uvloop.run}


class Guest(OnDeviceThread, OffloadDriver):
    """The driver, and what a test wants to know of the device behind it."""

    device: OffloadDevice


@contextlib.contextmanager
def serving(device: OffloadDevice, loop: str = "asyncio", **options: Any) -> Iterator[Guest]:
    """A guest that has said HELLO to ``device``, which runs on that kind of loop."""
    with device_thread(device, LOOPS[loop], size=256, memory=(32 << 20,), **options) as there:
        guest = Guest(there.frontend.queues)
        guest.device, guest.frontend, guest.loop = device, there.frontend, there.loop
        guest.hello(timeout=PATIENCE)
        yield guest


MakeGuest = Callable[..., Guest]


@pytest.fixture(scope="session")
def uvloops_own_pipe() -> None:
    """The first uvloop opens a pipe that the process keeps; opened here, it is no leak of a test."""
    uvloop.new_event_loop().close()


@pytest.fixture(params=LOOPS)
def make_guest(request: pytest.FixtureRequest, uvloops_own_pipe: None) -> Iterator[MakeGuest]:
    """``make_guest(policy text, **arguments of the device)``; the guests go when the test ends. The library runs on any loop,
    the command uses uvloop: each test sees both."""
    with contextlib.ExitStack() as stack:

        def make(policy: str = "", **arguments: Any) -> Guest:
            arguments.setdefault("name", "vm1")
            device = OffloadDevice(policy=parse_policy(textwrap.dedent(policy), "policy.toml"), **arguments)
            return stack.enter_context(serving(device, request.param))

        yield make


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening TCP socket on 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        yield server


def port_of(server: socket.socket) -> int:
    port: int = server.getsockname()[1]
    return port


def accept(server: socket.socket) -> socket.socket:
    connection, _ = server.accept()
    connection.settimeout(PATIENCE)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return port_of(server)
