"""A pretended guest in front of a real offload device, with real sockets of this host behind it.

The device and its server run on an event loop in a thread, as they do in a process of their own; the test is the guest's
driver on one side and the host's servers on the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import textwrap
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import uvloop

from vhostsock.offload.device import OffloadDevice
from vhostsock.offload.policy_file import parse_policy
from vhostsock.testing.frontend import Frontend, attach
from vhostsock.testing.offload import OffloadDriver

T = TypeVar("T")
LOOPS: dict[str, Callable[[Coroutine[Any, Any, None]], None]] = {"asyncio": asyncio.run, "uvloop": uvloop.run}
PATIENCE = 30.0  # seconds for anything that must happen


class Guest(OffloadDriver):
    """The driver, and what a test wants to know of the device behind it."""

    device: OffloadDevice
    frontend: Frontend
    loop: asyncio.AbstractEventLoop

    def in_loop(self, call: Callable[[], T]) -> T:
        """``call()`` on the device's thread."""

        async def run() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until ``condition()`` holds on the device's thread: it is looked at after everything that happens there."""

        async def run() -> None:
            while not condition():  # noqa: ASYNC110  every turn of the loop may have changed it, none tells
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(run(), PATIENCE), self.loop).result(PATIENCE)


@contextlib.contextmanager
def serving(device: OffloadDevice, loop: str = "asyncio", **options: Any) -> Iterator[Guest]:
    """A guest that has said HELLO to ``device``, which runs on that kind of loop."""
    started = threading.Event()
    shared: dict[str, Any] = {}

    async def serve() -> None:
        done = shared["done"] = asyncio.Event()
        try:
            async with attach(device, size=256, memory=(32 << 20,), **options) as frontend:
                shared.update(frontend=frontend, loop=asyncio.get_running_loop())
                started.set()
                await done.wait()
        except BaseException as error:
            shared["error"] = error
        finally:
            started.set()

    thread = threading.Thread(target=LOOPS[loop], args=(serve(),), name="device")
    thread.start()
    try:
        assert started.wait(PATIENCE)
        if "error" in shared:
            raise shared["error"]
        guest = Guest(shared["frontend"].queues)
        guest.device, guest.frontend, guest.loop = device, shared["frontend"], shared["loop"]
        guest.hello(timeout=PATIENCE)
        yield guest
    finally:
        if "loop" in shared:
            shared["loop"].call_soon_threadsafe(shared["done"].set)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    if "error" in shared:
        raise shared["error"]


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
