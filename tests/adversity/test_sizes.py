# SPDX-License-Identifier: BSD-3-Clause
"""As many, as large and as odd as it can get."""

from __future__ import annotations

import os

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from tests.engine.engine import EngineUnderTest
from vhostsock._core import lib
from vhostsock.devices.echo import Echo
from vhostsock.testing.driver import Region
from vhostsock.testing.flow import Refused
from vhostsock.testing.frontend import attach
from vhostsock.testing.offload import pack_open


@pytest.mark.long
@in_loop
async def test_two_hundred_and_fifty_six_queues_work_side_by_side() -> None:
    async with attach(Upper(256), memory=[1 << 23]) as frontend:
        for queue in frontend.queues:
            queue.submit([b"x"], [1])
        for queue in frontend.queues:
            [done] = await queue.wait_async()
            assert done.data == b"X"
        await frontend.stop()


@in_loop
async def test_a_region_of_an_odd_size_is_memory_to_its_last_byte() -> None:
    fd = os.memfd_create("odd")
    os.ftruncate(fd, 0x1000 + 0x3B10)
    async with attach(Upper()) as frontend:
        await frontend.add_region(Region(fd, 1 << 40, 0x3B10, 1 << 41, 0x1000))
        os.pwrite(fd, b"last", 0x1000 + 0x3B10 - 4)
        queue = frontend.queues[0]
        queue.write_desc(0, (1 << 40) + 0x3B10 - 4, 4, 1, 1)
        queue.write_desc(1, (1 << 40), 16, 2)
        queue.offer(0)
        queue.publish()
        os.eventfd_write(queue.kick_fd, 1)
        while not os.pread(fd, 4, 0x1000).strip(b"\0"):
            await frontend.settled()
        assert os.pread(fd, 4, 0x1000) == b"LAST"
    os.close(fd)


@in_loop
async def test_a_chain_of_gigabytes_over_the_same_pages_leaves_time_for_the_rest() -> None:
    """Descriptors may overlap: a guest of a few megabytes can announce 4 GiB in one request."""
    async with attach(Echo(), size=256, memory=[1 << 22]) as frontend:
        queue, memory = frontend.queues[0], frontend.memory
        part = 1 << 21
        for at in range(128):
            queue.write_desc(at, memory.regions[0].gpa, part, 1 if at < 127 else 3, at + 1)
        for at in range(127, 255):
            queue.write_desc(at, memory.regions[0].gpa + part, part, 2 | (at < 254), at + 1)
        queue.offer(0)
        queue.publish()
        os.eventfd_write(queue.kick_fd, 1)
        for _ in range(20):
            await frontend.settled()
        assert queue.used_idx == 0  # it is still at it, and so were we


def test_sixteen_thousand_flows_and_one_more() -> None:
    flows = 16384
    engine = EngineUnderTest(config={"max_flows": flows}, num=1024)
    engine.on_connect = lambda event: None  # nobody ever answers
    try:
        engine.driver.hello(epoch=1)
        for flow in range(1, flows + 1):
            while engine.driver.queues[1].free < 4:
                engine.driver.step()
                engine.take_events()
            engine.driver.post(lib.VSO_CONNECT, (1 << 20) + flow, payload=pack_open("tcp://10.0.0.1:1"))
        engine.driver.wait(lambda: bool(engine.stats.flows == flows))
        with pytest.raises(Refused, match="ENFILE"):
            engine.driver.connect("tcp://10.0.0.1:1")
        engine.driver.hello(epoch=2)
        assert engine.stats.flows == 0
    finally:
        engine.close()
