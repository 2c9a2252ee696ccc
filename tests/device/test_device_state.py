# SPDX-License-Identifier: BSD-3-Clause
"""A device's state through migration: SET_DEVICE_STATE_FD, the stream, CHECK_DEVICE_STATE."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from vhostsock import UsageError
from vhostsock import state as state_module
from vhostsock.offers import session_config
from vhostsock.proto import ProtocolFeature, Request, wire
from vhostsock.proto.wire import TransferDirection
from vhostsock.state import StateReader, StateWriter
from vhostsock.testing.frontend import Refused, attach
from vhostsock.testing.messages import pipe

SAVE, LOAD = TransferDirection


class Notebook(Upper):
    """Has some bytes of state."""

    state_limit = 1 << 20

    def __init__(self, state: bytes = b"") -> None:
        super().__init__()
        self.state = state

    async def save_state(self, stream: StateWriter) -> None:
        await stream.write(self.state)

    async def load_state(self, stream: StateReader) -> None:
        self.state = await stream.read()


@pytest.mark.parametrize("size", [0, 1, 65537, 1 << 20], ids=["none", "a byte", "more than a pipe holds", "all it may"])
@in_loop
async def test_what_one_device_saves_another_one_loads(size: int) -> None:
    source, target = Notebook(os.urandom(size)), Notebook(b"something else")
    async with attach(source) as frontend:
        await frontend.pause()
        data = await frontend.save_state()
        assert data == source.state
        await frontend.resume()  # a migration that was called off
        frontend.queues[0].submit([b"x"], [1])
        await frontend.queues[0].wait_async()
    async with attach(target, started=False) as frontend:
        await frontend.load_state(data)
        assert target.state == source.state
        await frontend.start()


@in_loop
async def test_a_device_that_no_driver_ever_started_saves_its_state() -> None:
    async with attach(Notebook(b"state"), started=False) as frontend:
        await frontend.request(Request.RESET_DEVICE)
        assert await frontend.save_state() == b"state"


@in_loop
async def test_the_state_can_be_read_in_pieces() -> None:
    class Pieces(Notebook):
        async def load_state(self, stream: StateReader) -> None:
            first = await stream.read(3)
            self.state = first + b"|" + await stream.read(0) + await stream.read(2) + b"|" + await stream.read(100)

    device = Pieces()
    async with attach(device, started=False) as frontend:
        await frontend.load_state(b"abcdefgh")
        assert device.state == b"abc|de|fgh"


@in_loop
async def test_a_state_larger_than_the_limit_fails_the_migration_both_ways() -> None:
    device = Notebook(bytes(Notebook.state_limit + 1))
    async with attach(device, started=False) as frontend:
        with pytest.raises(Refused):
            await frontend.save_state()
        with pytest.raises(Refused):
            await frontend.load_state(bytes(Notebook.state_limit + 1))
        await frontend.start()


@in_loop
async def test_a_device_that_fails_fails_the_migration_and_not_the_session(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Notebook):
        async def save_state(self, stream: StateWriter) -> None:
            await stream.write(b"half")
            raise ValueError("the device's bug")

        async def load_state(self, stream: StateReader) -> None:
            raise OSError("no such state")

    async with attach(Broken(), started=False) as frontend:
        for work in (frontend.save_state(), frontend.load_state(b"x" * 100000)):
            with pytest.raises(Refused):
                await work
        await frontend.start()
    assert "the device's bug" in caplog.text
    assert "no such state" in caplog.text


@in_loop
async def test_a_state_that_is_not_read_to_its_end_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    class Hasty(Notebook):
        async def load_state(self, stream: StateReader) -> None:
            self.state = await stream.read(2)

    async with attach(Hasty(), started=False) as frontend:
        with pytest.raises(Refused):
            await frontend.load_state(b"abc")
    assert "left 1 bytes of the state unread" in caplog.text


@in_loop
async def test_a_state_moves_only_while_the_device_is_suspended() -> None:
    async with attach(Notebook()) as frontend:
        with pytest.raises(Refused):
            await frontend.save_state()
        frontend.queues[0].submit([b"x"], [1])
        await frontend.queues[0].wait_async()


@in_loop
async def test_what_is_no_transfer_is_refused_in_the_messages_own_way() -> None:
    async with attach(Notebook(), started=False) as frontend:
        with pipe() as ([reader], [writer]):
            for direction, phase, fd in (
                (2, 0, writer),
                (SAVE, 1, writer),
                (SAVE, 0, reader),
                (LOAD, 0, writer),
                (LOAD, 0, frontend.memory.regions[0].fd),
            ):
                with pytest.raises(Refused):
                    await frontend.transfer_state(direction, fd, phase=phase)
        with pytest.raises(Refused):  # nothing to check
            await frontend.check_state()
        await frontend.start()


@in_loop
async def test_a_socket_serves_as_well_as_a_pipe() -> None:
    async with attach(Notebook(b"state"), started=False) as frontend:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                await frontend.transfer_state(SAVE, theirs.fileno())
            assert await asyncio.get_running_loop().run_in_executor(None, ours.makefile("rb").read) == b"state"
        await frontend.check_state()


@in_loop
async def test_a_second_transfer_waits_for_nobody_and_is_refused() -> None:
    async with attach(Notebook(bytes(1 << 20)), started=False) as frontend:
        with pipe() as ([_], [writer]):
            await frontend.transfer_state(SAVE, writer)
            with pytest.raises(Refused):
                await frontend.transfer_state(SAVE, writer)


@in_loop
async def test_a_transfer_that_is_checked_no_more_gives_way_to_the_next() -> None:
    async with attach(Notebook(b"state"), started=False) as frontend:
        with pipe() as ([reader], [writer]):
            await frontend.transfer_state(SAVE, writer)
            os.close(writer_of := os.dup(reader))
            assert writer_of
            while await asyncio.to_thread(os.read, reader, 5) != b"state":
                pass
            await frontend.settled()
        assert await frontend.save_state() == b"state"


@in_loop
async def test_a_ring_that_starts_cuts_the_transfer_short(caplog: pytest.LogCaptureFixture) -> None:
    device = Notebook(b"old")
    async with attach(device, started=False) as frontend:
        with pipe() as ([reader], [writer]):
            await frontend.transfer_state(LOAD, reader)
            os.write(writer, b"new")
            await frontend.start()
            frontend.queues[0].submit([b"x"], [1])
            await frontend.queues[0].wait_async()
            with pytest.raises(Refused):
                await frontend.check_state()
    assert device.state == b"old"
    assert "cut short: a ring starts" in caplog.text


@pytest.mark.parametrize("how", ["reset", "gone"])
@in_loop
async def test_a_transfer_under_way_ends_with_a_reset_and_with_the_session(how: str) -> None:
    async with attach(Notebook(bytes(1 << 20)), started=False) as frontend:
        with pipe() as ([reader], [writer]):
            await frontend.transfer_state(SAVE, writer)
            os.close(os.dup(reader))
            if how == "reset":
                await frontend.request(Request.RESET_DEVICE)
                await frontend.settled()


@in_loop
async def test_a_front_end_that_stops_moving_bytes_does_not_hold_the_device_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "STALL", 0.01)
    async with attach(Notebook(bytes(1 << 20)), started=False) as frontend:
        for direction in (SAVE, LOAD):
            with pipe() as ([reader], [writer]):
                await frontend.transfer_state(direction, writer if direction == SAVE else reader)
                with pytest.raises(Refused):
                    await frontend.check_state()


@in_loop
async def test_a_front_end_that_closes_its_end_early_fails_the_save() -> None:
    async with attach(Notebook(bytes(1 << 20)), started=False) as frontend:
        with pipe() as (reader, writer):
            await frontend.transfer_state(SAVE, writer[0])
            os.close(reader.pop())
            os.close(writer.pop())
            with pytest.raises(Refused):
                await frontend.check_state()


def test_only_a_device_with_both_hooks_is_offered_for_migration() -> None:
    assert session_config(Notebook()).protocol_features & ProtocolFeature.DEVICE_STATE
    assert not session_config(Upper()).protocol_features & ProtocolFeature.DEVICE_STATE

    class Half(Upper):
        async def save_state(self, stream: StateWriter) -> None: ...

    with pytest.raises(UsageError, match="overrides one of save_state and load_state"):
        session_config(Half())


@in_loop
async def test_the_answer_says_that_no_descriptor_comes_back() -> None:
    async with attach(Notebook(), started=False) as frontend:
        with pipe() as ([_], [writer]):
            value = {"direction": SAVE, "phase": 0}
            answer = await frontend.request(
                Request.SET_DEVICE_STATE_FD, wire.TRANSFER, value, fds=[writer], reply=wire.U64
            )
        assert answer == 0x100
        await frontend.check_state()
