"""Rings that start, stop and change one at a time, in every encoding and number that front-ends use."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.aio import in_loop
from tests.device.devices import Recorder, Upper
from vhostsock.proto import Request, wire
from vhostsock.proto.features import VirtioFeature
from vhostsock.testing.driver import DriverQueue
from vhostsock.testing.frontend import QEMU_7_2, Frontend, attach
from vhostsock.testing.packed import PackedQueue

formats = pytest.mark.parametrize("accept", [~VirtioFeature.RING_PACKED, ~0], ids=["split", "packed"])


def upper(num_queues: int = 1, size: int = 1024) -> Upper:
    device = Upper(num_queues)
    device.packed = True
    device.max_queue_size = size
    return device


async def ask(queue: DriverQueue, data: bytes) -> bytes:
    request = queue.submit([data], [len(data)])
    assert await queue.wait_async() == [request]
    return request.data


async def replace(frontend: Frontend, index: int) -> None:
    """VIRTIO_F_RING_RESET as a front-end carries it out: this ring stops, and comes back new; the others run on."""
    await frontend.enable(index, False)
    state = {"index": index, "num": 0}
    await frontend.request(Request.GET_VRING_BASE, wire.VRING_STATE, state, reply=wire.VRING_STATE)
    old = frontend.queues[index]
    new = type(old)(frontend.memory, old.num)
    old.close()
    frontend.queues[index], frontend.bases[index] = new, new.base
    await frontend.set_ring(index)
    await frontend.set_fd(Request.SET_VRING_CALL, index, new.call_fd)
    await frontend.set_fd(Request.SET_VRING_KICK, index, new.kick_fd)
    await frontend.enable(index, True)


@formats
@in_loop
async def test_one_ring_is_reset_while_the_others_run(accept: int) -> None:
    device = upper(3)
    async with attach(device, accept=accept, queues=3) as frontend:
        for _ in range(3):
            waiting = [frontend.queues[i].submit([b"%d" % i], [1]) for i in (0, 2)]
            await replace(frontend, 1)
            assert await ask(frontend.queues[1], b"new") == b"NEW"
            assert [(await frontend.queues[i].wait_async())[0] for i in (0, 2)] == waiting


@in_loop
async def test_a_reset_of_one_ring_is_no_reset_of_the_device() -> None:
    device = Recorder()
    device.num_queues = 2
    async with attach(device, queues=2) as frontend:
        await frontend.settled()
        device.take()
        await replace(frontend, 1)
        await frontend.settled()
        assert not [event for event in device.take() if "reset" in str(event)]


@in_loop
async def test_every_one_of_256_rings_is_served() -> None:
    async with attach(upper(256), queues=256, size=8, memory=(1 << 24,), dialect=QEMU_7_2) as frontend:
        requests = [queue.submit([b"%d" % i], [3]) for i, queue in enumerate(frontend.queues)]
        async with asyncio.timeout(60):
            for i, (queue, request) in enumerate(zip(frontend.queues, requests, strict=True)):
                assert await queue.wait_async() == [request]
                assert request.data == b"%d" % i


@pytest.mark.parametrize(("accept", "size"), [(~VirtioFeature.RING_PACKED, 32768), (~0, 32768), (~0, 32767)])
@in_loop
async def test_the_largest_rings_there_are(accept: int, size: int) -> None:
    async with attach(upper(size=32768), accept=accept, size=size, memory=(1 << 23,)) as frontend:
        assert await ask(frontend.queues[0], b"large") == b"LARGE"


# Where a packed ring begins: QEMU has both halves, DPDK's virtio-user the lower one, and some front-ends may say nothing


@pytest.mark.parametrize("base", [0x8000_8000, 0x8000])
@in_loop
async def test_the_base_of_a_packed_ring_is_understood_as_qemu_and_as_dpdk_send_it(base: int) -> None:
    async with attach(upper(), accept=~0, started=False) as frontend:
        frontend.bases = [base]
        await frontend.start()
        assert await ask(frontend.queues[0], b"x") == b"X"
        await frontend.pause()
        assert frontend.bases == [0x8001_8001]


@formats
@in_loop
async def test_after_a_device_reset_a_ring_begins_where_its_format_does(accept: int) -> None:
    start = 0x8000_8000 if accept == ~0 else 0
    async with attach(upper(), accept=accept) as frontend:
        assert await ask(frontend.queues[0], b"before") == b"BEFORE"
        await frontend.request(Request.RESET_DEVICE)
        await frontend.request(Request.SET_FEATURES, wire.U64, frontend.features)
        state = {"index": 0, "num": 0}
        answer = await frontend.request(Request.GET_VRING_BASE, wire.VRING_STATE, state, reply=wire.VRING_STATE)
        assert answer.num == start
        # and it can be started without SET_VRING_BASE
        old = frontend.queues[0]
        new = type(old)(frontend.memory, old.num)
        old.close()
        frontend.queues[0] = new
        await frontend.request(Request.SET_VRING_ADDR, wire.ADDRESS, frontend.address(0), ack=True)
        await frontend.set_fd(Request.SET_VRING_CALL, 0, new.call_fd)
        await frontend.set_fd(Request.SET_VRING_KICK, 0, new.kick_fd)
        await frontend.enable(0, True)
        assert await ask(new, b"after") == b"AFTER"


@in_loop
async def test_a_ring_whose_base_nobody_set_begins_where_its_format_does() -> None:
    async with attach(upper(), accept=~0, started=False) as frontend:
        [queue] = frontend.queues
        assert isinstance(queue, PackedQueue)
        await frontend.request(Request.SET_FEATURES, wire.U64, frontend.features)
        await frontend.send_memory()
        await frontend.request(Request.SET_VRING_NUM, wire.VRING_STATE, {"index": 0, "num": queue.num})
        await frontend.request(Request.SET_VRING_ADDR, wire.ADDRESS, frontend.address(0))
        await frontend.set_fd(Request.SET_VRING_KICK, 0, queue.kick_fd)
        await frontend.enable(0, True)
        assert await ask(queue, b"x") == b"X"


@formats
@in_loop
async def test_num_and_base_of_a_running_ring_may_be_set_again(accept: int) -> None:
    async with attach(upper(), accept=accept) as frontend:
        [queue] = frontend.queues
        for i in range(3):
            assert await ask(queue, b"%d" % i) == b"%d" % i
            await frontend.request(Request.SET_VRING_NUM, wire.VRING_STATE, {"index": 0, "num": queue.num}, ack=True)
            base = 0x8000_8000 + 0x1_0001 * (i + 1) if accept == ~0 else i + 1
            await frontend.request(Request.SET_VRING_BASE, wire.VRING_STATE, {"index": 0, "num": base}, ack=True)
        assert await ask(queue, b"still") == b"STILL"


# Polling


@formats
@in_loop
async def test_a_ring_without_a_kick_fd_is_polled(accept: int) -> None:
    async with attach(upper(2), accept=accept, queues=2) as frontend:
        for index in (0, 1):
            await frontend.set_fd(Request.SET_VRING_KICK, index, -1)
        async with asyncio.timeout(30):
            for i in range(3):
                for queue in frontend.queues:
                    assert await ask(queue, b"ring %d" % i) == b"RING %d" % i
                    queue.take_kick()  # which nobody reads
        # and back to kicks, for one of them
        await frontend.set_fd(Request.SET_VRING_KICK, 0, frontend.queues[0].kick_fd)
        async with asyncio.timeout(30):
            for queue in frontend.queues:
                assert await ask(queue, b"both") == b"BOTH"


@in_loop
async def test_polling_ends_with_the_last_ring_that_needs_it() -> None:
    async with attach(upper()) as frontend:
        await frontend.set_fd(Request.SET_VRING_KICK, 0, -1)
        assert await ask(frontend.queues[0], b"x") == b"X"
        await frontend.pause()
        before = len(os.listdir("/proc/self/fd"))
        await frontend.resume()  # with a kick fd
        assert await ask(frontend.queues[0], b"y") == b"Y"
        assert len(os.listdir("/proc/self/fd")) == before + 1
