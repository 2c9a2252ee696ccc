# SPDX-License-Identifier: BSD-3-Clause
"""Front-ends that say half of it, read nothing, say too much, or go in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.device.devices import Gate, Recorder, Upper
from tests.device.test_server import connect, works
from vhostsock import Server
from vhostsock.proto import Request, wire
from vhostsock.testing.frontend import attach


@pytest.mark.parametrize("said", [0, 1, 12, 19])
@in_loop
async def test_a_server_whose_front_end_stalls_in_a_message_stops_at_once(said: int, tmp_path: Path) -> None:
    message = wire.pack(Request.SET_VRING_NUM, 1, wire.VRING_STATE, {"index": 0, "num": 64})
    async with Server(Recorder(), path=tmp_path / "s"), await connect(tmp_path / "s") as stalled:
        await stalled.handshake()
        await stalled.send(message[:said])


@in_loop
async def test_a_stalled_front_end_holds_up_the_next_one_until_it_goes(tmp_path: Path) -> None:
    """One front-end at a time: the guest behind the second one is the first one's guest, too, or it is a mistake."""
    async with Server(Upper(), path=tmp_path / "s"):
        stalled = await connect(tmp_path / "s")
        await stalled.handshake()
        await stalled.send(b"\1")
        waiting = asyncio.create_task(works(tmp_path / "s"))
        await asyncio.sleep(0)
        assert not waiting.done()
        stalled.close()
        await waiting


@in_loop
async def test_a_front_end_that_reads_no_replies_stops_its_own_session_and_not_the_server(tmp_path: Path) -> None:
    async with Server(Upper(), path=tmp_path / "s"):
        async with await connect(tmp_path / "s") as deaf:
            with contextlib.suppress(BlockingIOError):
                while True:
                    deaf.sock.send(wire.pack(Request.GET_FEATURES, 1) * 64, socket.MSG_DONTWAIT)
                    await asyncio.sleep(0)
        await works(tmp_path / "s")
    async with Server(Upper(), path=tmp_path / "s"), await connect(tmp_path / "s") as deaf:  # and the server can be stopped
        with contextlib.suppress(BlockingIOError):
            while True:
                deaf.sock.send(wire.pack(Request.GET_FEATURES, 1) * 64, socket.MSG_DONTWAIT)
                await asyncio.sleep(0)


@in_loop
async def test_what_was_said_before_the_end_is_carried_out_and_its_replies_may_go_nowhere(tmp_path: Path) -> None:
    device = Recorder()
    async with Server(device, path=tmp_path / "s"):
        for _ in range(5):
            async with await connect(tmp_path / "s") as brief:
                await brief.handshake()
                await brief.start()
                await brief.send(wire.pack(Request.GET_FEATURES, 1) * 200)
    assert device.take().count("disconnected") == 5


@in_loop
async def test_a_storm_of_kicks_leaves_time_for_the_rest() -> None:
    async with attach(Upper()) as frontend:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        await frontend.set_fd(Request.SET_VRING_KICK, 0, reading)
        storming = True

        async def storm() -> None:
            while storming:
                with contextlib.suppress(BlockingIOError):
                    os.write(writing, bytes(4096))
                await asyncio.sleep(0)

        task = asyncio.create_task(storm())
        for _ in range(50):
            frontend.queues[0].submit([b"x"], [1])
            await frontend.queues[0].wait_async()
            await frontend.settled()
        storming = False
        await task
        os.close(reading)
        os.close(writing)


@in_loop
async def test_memory_that_is_removed_under_a_request_stays_until_the_request_is_done() -> None:
    device = Gate()
    async with attach(device, memory=[1 << 20, 1 << 20]) as frontend:
        queue, memory = frontend.queues[0], frontend.memory
        buffer = memory.alloc(64, region=1)
        memory.write(buffer, b"request")
        queue.write_desc(0, buffer, 7, 1, 1)
        queue.write_desc(1, buffer + 32, 16, 2)
        queue.offer(0)
        queue.publish()
        queue.kick()
        await device.arrived.wait()
        await frontend.remove_region(memory.regions[1])
        device.gate.set()
        await frontend.settled()
        while queue.used_idx == 0:
            await frontend.settled()
        assert memory.read(buffer + 32, 7) == b"request"


@in_loop
async def test_a_request_in_memory_that_was_never_shared_breaks_its_ring_alone() -> None:
    async with attach(Upper(2)) as frontend:
        lost, fine = frontend.queues
        lost.write_desc(0, 1 << 50, 16, 2)
        lost.offer(0)
        lost.publish()
        os.eventfd_write(lost.kick_fd, 1)
        fine.submit([b"x"], [1])
        [done] = await fine.wait_async()
        assert done.data == b"X"
        await frontend.settled()
        assert os.eventfd_read(lost.err_fd) == 1
