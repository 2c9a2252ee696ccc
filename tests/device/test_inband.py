# SPDX-License-Identifier: BSD-3-Clause
"""In-band notifications: VRING_KICK from the front-end, VRING_CALL and VRING_ERR to it, and no eventfd at all."""

from __future__ import annotations

import os
import select

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from vhostsock.offers import session_config
from vhostsock.proto import ProtocolFeature, Request, wire
from vhostsock.proto.wire import BackendRequest
from vhostsock.testing.frontend import QEMU_11_1, BackendGone, Dialect, Frontend, attach

MESSAGES = Dialect("a simulator", QEMU_11_1.protocol_mask, True, True, False, inband=True)


class Simulated(Upper):
    inband = True


async def called(frontend: Frontend, index: int = 0) -> None:
    """Wait for a VRING_CALL and pass it to the driver, who waits for an eventfd."""
    assert frontend.channel
    message = await frontend.channel.acknowledge(BackendRequest.VRING_CALL)
    assert (message.value.index, message.value.num) == (index, 0)
    assert message.wants_answer
    os.eventfd_write(frontend.queues[index].call_fd, 1)


async def request(frontend: Frontend, index: int = 0) -> None:
    queue = frontend.queues[index]
    submitted = queue.submit([b"ping"], [4])
    queue.enable_calls()
    await frontend.inband_kick(index)
    await called(frontend, index)
    await queue.wait_async()
    assert submitted.data == b"PING"


@in_loop
async def test_rings_work_without_any_eventfd() -> None:
    async with attach(Simulated(2), dialect=MESSAGES) as frontend:
        for index in (0, 1, 1, 0):
            await request(frontend, index)


@in_loop
async def test_a_ring_starts_with_its_kick_message_and_again_after_a_stop() -> None:
    async with attach(Simulated(), dialect=MESSAGES) as frontend:
        await request(frontend)
        for _ in range(2):
            await frontend.pause()
            await frontend.resume()
            await request(frontend)


@in_loop
async def test_a_kick_that_comes_before_the_ring_is_enabled_is_not_lost() -> None:
    async with attach(Simulated(), dialect=MESSAGES) as frontend:
        await frontend.enable(0, False)
        frontend.queues[0].submit([b"ping"], [4])
        await frontend.inband_kick(0)
        await frontend.enable(0, True)
        await called(frontend)


@in_loop
async def test_calls_of_a_front_end_that_does_not_answer_become_one() -> None:
    async with attach(Simulated(), dialect=MESSAGES) as frontend:
        assert frontend.channel
        queue = frontend.queues[0]
        for _ in range(50):
            submitted = queue.submit([b"ping"], [4])
            queue.enable_calls()
            await frontend.inband_kick(0)
            while submitted.written is None:
                await frontend.settled()
                queue.collect()
        first = await frontend.channel.receive()
        assert first.request == BackendRequest.VRING_CALL
        await frontend.settled()
        with pytest.raises(BlockingIOError):
            frontend.channel.sock.recv(1)
        await frontend.channel.answer(BackendRequest.VRING_CALL)
        await called(frontend)  # what came up meanwhile
        await frontend.settled()
        with pytest.raises(BlockingIOError):
            frontend.channel.sock.recv(1)


@in_loop
async def test_a_broken_ring_is_told_by_message() -> None:
    async with attach(Simulated(), dialect=MESSAGES) as frontend:
        assert frontend.channel
        frontend.queues[0].write_desc(0, 1 << 60, 4, 0)
        frontend.queues[0].offer(0)
        frontend.queues[0].publish()
        await frontend.inband_kick(0)
        message = await frontend.channel.acknowledge(BackendRequest.VRING_ERR)
        assert (message.value.index, message.value.num) == (0, 0)


@in_loop
async def test_descriptors_are_preferred_to_messages() -> None:
    """As QEMU does it, which acks the feature and goes on as if it had not."""
    async with attach(Simulated(), dialect=QEMU_11_1) as frontend:
        assert frontend.channel
        assert frontend.protocol_features & ProtocolFeature.INBAND_NOTIFICATIONS
        queue = frontend.queues[0]
        await frontend.inband_kick(0)  # for a ring with a kick fd: nothing
        submitted = queue.submit([b"ping"], [4])
        await queue.wait_async()
        assert submitted.data == b"PING"
        assert not select.select([frontend.channel.sock], [], [], 0)[0]


@in_loop
async def test_a_kick_with_something_in_its_reserved_field_ends_the_session() -> None:
    async with attach(Simulated(), dialect=MESSAGES) as frontend:
        await frontend.request(Request.VRING_KICK, wire.VRING_STATE, {"index": 0, "num": 1})
        with pytest.raises(BackendGone):
            await frontend.settled()


@in_loop
async def test_only_a_device_that_asks_for_it_is_offered_with_it() -> None:
    assert not session_config(Upper()).protocol_features & ProtocolFeature.INBAND_NOTIFICATIONS
    async with attach(Upper()) as frontend:
        await frontend.request(Request.VRING_KICK, wire.VRING_STATE, {"index": 0, "num": 0})
        with pytest.raises(BackendGone):
            await frontend.settled()
