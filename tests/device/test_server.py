# SPDX-License-Identifier: BSD-3-Clause
"""The listener outlives its sessions, whatever a front-end does, and leaves nothing behind."""

# ruff: noqa: ASYNC240 - files of the test itself, in its own folder
from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.device.devices import Recorder, Upper
from tests.protocol.test_framing import BROKEN
from vhostsock import Device, Server, UsageError
from vhostsock.proto import Request, wire
from vhostsock.testing.frontend import Frontend


async def connect(path: Path) -> Frontend:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return Frontend(sock)


async def works(path: Path) -> None:
    """A whole session of a well-behaved front-end."""
    async with await connect(path) as frontend:
        await frontend.handshake()
        await frontend.start()
        frontend.queues[0].submit([b"hello"], [16])
        [done] = await frontend.queues[0].wait_async()
        assert done.data == b"HELLO"
        await frontend.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server.sock"


@in_loop
async def test_front_ends_are_served_one_after_the_other(path: Path) -> None:
    async with Server(Upper(), path=path):
        for _ in range(3):
            await works(path)
    assert not path.exists()


@pytest.mark.parametrize("name", BROKEN)
@in_loop
async def test_the_listener_serves_on_after_a_broken_message(name: str, path: Path) -> None:
    message, fds, _ = BROKEN[name]
    async with Server(Upper(), path=path):
        async with await connect(path) as hostile:
            await hostile.handshake()
            given = [os.eventfd(0) for _ in range(fds)]
            await hostile.send(message, given)
            await hostile.ended()
            for fd in given:
                os.close(fd)
        await works(path)


@in_loop
async def test_the_listener_serves_on_after_more_descriptors_than_a_message_may_have(path: Path) -> None:
    async with Server(Upper(), path=path):
        async with await connect(path) as hostile:
            fd = hostile.memory.regions[0].fd
            await hostile.send(wire.pack(Request.GET_FEATURES, 1), [fd] * 9)  # the ninth is dropped by the kernel: MSG_CTRUNC
            await hostile.ended()
        await works(path)


@pytest.mark.parametrize("size", [0, 5, 12, 15])
@in_loop
async def test_the_listener_serves_on_after_a_front_end_that_dies(size: int, path: Path) -> None:
    async with Server(Upper(), path=path):
        async with await connect(path) as dying:
            fds = [dying.memory.regions[0].fd] if size else []
            await dying.send(wire.pack(Request.SET_FEATURES, 1, wire.U64, 0)[:size], fds)
        async with await connect(path) as dying:
            await dying.handshake()
            await dying.start()
            dying.queues[0].submit([b"unanswered"], [16])
        await works(path)


@in_loop
async def test_a_message_may_come_byte_by_byte(path: Path) -> None:
    async with Server(Upper(), path=path), await connect(path) as slow:
        for byte in wire.pack(Request.SET_OWNER, 1) + wire.pack(Request.GET_FEATURES, 1):
            await slow.send(bytes([byte]))
        assert await slow.reply_to(Request.GET_FEATURES, wire.U64)


@in_loop
async def test_messages_may_come_all_at_once(path: Path) -> None:
    async with Server(Upper(), path=path), await connect(path) as fast:
        await fast.send(wire.pack(Request.GET_FEATURES, 1) * 100)
        for _ in range(100):
            assert await fast.reply_to(Request.GET_FEATURES, wire.U64)


@in_loop
async def test_a_flood_of_messages_leaves_time_for_the_rest() -> None:
    """Everything is there at once, so that the server never has to wait for a message."""
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(turn)

    device = Recorder()
    ours, theirs = socket.socketpair()
    theirs.sendall(wire.pack(Request.SET_OWNER, 1) * 250)
    async with Server(device, sock=ours), Frontend(theirs) as frontend:
        turn()
        await frontend.settled()
        assert turns > 250


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """This process cannot open another one; what is open stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Logged(logging.Handler):
    """Set when a record with ``text`` in it is logged."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.happened = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.happened.set()


@in_loop
async def test_a_front_end_that_comes_when_no_descriptor_is_left_is_served_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhostsock.server.ACCEPT_PAUSE", 0.01)
    logged = Logged("cannot accept a front-end: Too many open files")
    logging.getLogger("vhostsock").addHandler(logged)
    async with Server(Upper(), path=path), await connect(path) as early:
        with no_descriptors_left():
            await logged.happened.wait()
        await early.settled()
    logging.getLogger("vhostsock").removeHandler(logged)


@in_loop
async def test_a_message_whose_descriptor_found_no_room_ends_the_session(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Server(Upper(), path=path):
        async with await connect(path) as unlucky:
            await unlucky.handshake()
            with no_descriptors_left():
                await unlucky.send(wire.pack(Request.SET_BACKEND_REQ_FD, 1), [unlucky.sock.fileno()])
                await unlucky.ended()
        await works(path)
    assert "MSG_CTRUNC" in caplog.text


@in_loop
async def test_a_second_front_end_waits_for_the_first_to_leave(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Server(Upper(), path=path):
        async with await connect(path) as first:
            await first.handshake()
            second = asyncio.create_task(works(path))
            while "another front-end" not in caplog.text:
                await first.settled()
            assert not second.done()
        await second


@in_loop
async def test_closing_the_server_ends_the_session(path: Path) -> None:
    device = Recorder()
    async with Server(device, path=path), await connect(path) as frontend:
        await frontend.handshake()
        await frontend.start()
        await frontend.settled()
        device.take()
    assert device.take() == ["draining 0", "stopped 0", "disconnected"]


@pytest.mark.parametrize("turns", range(8))
@in_loop
async def test_a_stop_in_the_midst_of_a_sessions_end_leaves_nothing_half_done(turns: int, path: Path) -> None:
    device = Recorder()
    async with Server(device, path=path) as server, await connect(path) as frontend:
        await frontend.handshake()
        await frontend.start()
        await frontend.settled()
        device.take()
        frontend.close()
        for _ in range(turns):  # of the loop: each stops the server one step later
            await asyncio.sleep(0)
        server.stop()
        await server.serve_forever()
        assert device.take() == ["draining 0", "stopped 0", "disconnected"]


@in_loop
async def test_stop_makes_serve_forever_return(path: Path) -> None:
    async with Server(Upper(), path=path) as server:
        asyncio.get_running_loop().call_soon(server.stop)
        await server.serve_forever()


@in_loop
async def test_the_socket_of_a_dead_server_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with Server(Upper(), path=path):
        await works(path)


@in_loop
async def test_the_path_of_a_living_server_is_left_alone(path: Path) -> None:
    async with Server(Upper(), path=path):
        with pytest.raises(OSError, match="another process is serving there") as caught:
            await Server(Upper(), path=path).__aenter__()
        assert caught.value.errno == errno.EADDRINUSE
        await works(path)


@in_loop
async def test_the_path_of_a_server_with_a_full_backlog_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        with pytest.raises(OSError, match="another process is serving there"):
            await Server(Upper(), path=path).__aenter__()


@in_loop
async def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="not a socket"):
        await Server(Upper(), path=path).__aenter__()
    assert path.read_text() == "precious"


@in_loop
async def test_a_path_that_another_server_took_over_is_not_removed(path: Path) -> None:
    async with Server(Upper(), path=path):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


@in_loop
async def test_a_listening_socket_can_be_passed(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    async with Server(Upper(), fd=listener.detach()):
        await works(path)
        await works(path)
    assert path.exists()  # it is not ours


@in_loop
async def test_a_connected_socket_is_served_once() -> None:
    ours, theirs = socket.socketpair()
    async with Server(Upper(), fd=ours.detach()) as server, Frontend(theirs) as frontend:
        await frontend.handshake()
        frontend.sock.close()
        await server.serve_forever()


@in_loop
async def test_a_device_that_fails_costs_only_its_session(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Fragile(Upper):
        failures = 1

        async def connected(self) -> None:
            if self.failures:
                self.failures = 0
                raise ZeroDivisionError

    async with Server(Fragile(), path=path):
        async with await connect(path) as unlucky:
            await unlucky.ended()
        await works(path)
    assert "Fragile failed, session ended" in caplog.text


def test_what_cannot_be_served_is_refused_at_once() -> None:
    class Nothing(Device):
        virtio_id = 39

    with pytest.raises(UsageError, match="Nothing overrides none of handle, handle_batch, queue_started"):
        Server(Nothing(), path="/nowhere")
    with pytest.raises(UsageError, match="not 300"):
        Server(Upper(num_queues=300), path="/nowhere")
    for attribute, value, evidence in (
        ("features", 1 << 34 | 1, "RING_PACKED: a device chooses among bits 0 to 23 and 50 to 63"),
        ("config", bytes(257), "257 bytes; 256 is all"),
    ):
        device = Upper()
        setattr(device, attribute, value)
        with pytest.raises(UsageError, match=evidence):
            Server(device, path="/nowhere")
    with pytest.raises(UsageError, match="exactly one of"):
        Server(Upper())
    with pytest.raises(UsageError, match="exactly one of"):
        Server(Upper(), path="/nowhere", fd=1)


def test_descriptors_that_cannot_be_served_are_refused_and_left_open() -> None:
    with socket.socket(socket.AF_UNIX) as idle:
        for way in ({"sock": idle}, {"fd": idle.fileno()}):
            with pytest.raises(UsageError, match="neither listens nor is connected"):
                Server(Upper(), **way)
    with pytest.raises(UsageError, match="descriptor 999999 cannot be served: Bad file descriptor"):
        Server(Upper(), fd=999999)
    with socket.socket(socket.AF_INET) as inet, pytest.raises(UsageError, match="not a Unix stream socket"):
        Server(Upper(), fd=inet.fileno())


@in_loop
async def test_a_device_whose_own_task_was_cancelled_costs_only_its_session(path: Path) -> None:
    class Broken(Upper):
        sessions = 0

        async def connected(self) -> None:
            self.sessions += 1
            if self.sessions == 1:
                raise asyncio.CancelledError

    async with Server(Broken(), path=path):
        async with await connect(path) as frontend:
            await frontend.ended()
        await works(path)
