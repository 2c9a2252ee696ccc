# SPDX-License-Identifier: BSD-3-Clause
"""The default data plane: bounded concurrency, a fair share of the loop, and every chain comes back whatever a handler does."""

from __future__ import annotations

import asyncio
import logging
import os
import select

import pytest

from tests.aio import in_loop
from tests.device.devices import Gate, Upper
from vhostsock import Chain, Device, DriverError, Queue, RequestError
from vhostsock.dataplane import BUDGET
from vhostsock.proto import Request, VirtioFeature
from vhostsock.testing.driver import NO_NOTIFY
from vhostsock.testing.frontend import attach


@pytest.mark.parametrize("accept", [~0, ~VirtioFeature.EVENT_IDX, ~VirtioFeature.INDIRECT_DESC], ids=["all", "flags", "direct"])
@in_loop
async def test_many_requests_in_many_rounds(accept: int) -> None:
    async with attach(Upper(), accept=accept, size=16) as frontend:
        queue, answered = frontend.queues[0], 0
        for number in range(2000):
            queue.submit([b"request ", b"%d" % number], [8, 32])
            if queue.free < 4:
                done = await queue.wait_async()
                answered += len(done)
                assert all(request.data.startswith(b"REQUEST ") for request in done)
        answered += len(await queue.wait_async(queue.in_flight))
        assert answered == 2000


@in_loop
async def test_no_more_handlers_than_allowed_run_at_once() -> None:
    device = Gate(concurrency=3)
    async with attach(device) as frontend:
        queue = frontend.queues[0]
        for _ in range(10):
            queue.submit([b"x"], [1])
        await device.arrived.wait()
        await frontend.settled()
        assert (device.waiting, device.most) == (3, 3)
        device.gate.set()
        assert len(await queue.wait_async(10)) == 10
        assert device.most == 3


@in_loop
async def test_a_ring_that_never_empties_leaves_time_for_the_rest() -> None:
    """The device offers its own requests again: without a budget the first wake-up would never end."""

    class Endless(Device):
        virtio_id = 39
        rounds = 0

        def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
            self.rounds += 1
            assert len(chains) <= BUDGET
            for chain in chains:
                chain.complete()
            queue.flush()
            for request in frontend.queues[0].collect():
                assert request.written == 0
                frontend.queues[0].add([b"again"])
            frontend.queues[0].publish()

    device = Endless()
    async with attach(device, size=256) as frontend:
        for _ in range(200):
            frontend.queues[0].submit([b"again"])
        for _ in range(5):  # the vhost-user socket is served all the while
            before = device.rounds
            await frontend.settled()
            assert device.rounds > before


@in_loop
async def test_kicks_are_off_while_there_is_work_and_on_when_there_is_none() -> None:
    device = Gate(concurrency=1)
    async with attach(device, accept=~VirtioFeature.EVENT_IDX) as frontend:
        queue = frontend.queues[0]
        queue.submit([b"x"], [1])
        await device.arrived.wait()
        assert queue.used_flags == NO_NOTIFY
        device.gate.set()
        await queue.wait_async()
        while queue.used_flags == NO_NOTIFY:
            await frontend.settled()


class Failing(Device):
    """Fails in the way that the request says."""

    virtio_id = 39

    async def handle(self, queue: Queue, chain: Chain) -> None:
        what = chain.read()
        chain.write(b"so far")
        if what == b"refuse":
            raise RequestError("not today", status=1)
        if what == b"bug":
            raise ZeroDivisionError("in the device")
        if what == b"break":
            raise DriverError("no such opcode", vring=queue.index)
        chain.complete()
        if what == b"twice":
            chain.complete()

    def refused(self, queue: Queue, chain: Chain, error: RequestError) -> None:
        chain.write(b", status %d" % (error.status or 0))


class FailingBatch(Failing):
    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
        for chain in chains:
            what = chain.read()
            if what == b"bug":
                raise ZeroDivisionError("in the device")
            if what == b"break":
                raise DriverError("no such opcode", vring=queue.index)
            chain.write(b"fine")
            chain.complete()


@in_loop
async def test_a_chain_is_completed_exactly_once_whatever_its_handler_does(caplog: pytest.LogCaptureFixture) -> None:
    async with attach(Failing()) as frontend:
        for what in (b"refuse", b"bug", b"early", b"twice"):
            frontend.queues[0].submit([what], [64])
            [done] = await frontend.queues[0].wait_async()
            assert done.data == (b"so far, status 1" if what == b"refuse" else b"so far")
    # a device's bug is told with its traceback, a refusal is nobody's bug
    assert [type(record.exc_info[1]) for record in caplog.records if record.exc_info] == [ZeroDivisionError]


@pytest.mark.parametrize("by", [Failing, FailingBatch])
@in_loop
async def test_a_handler_that_blames_the_driver_breaks_the_ring(by: type[Failing], caplog: pytest.LogCaptureFixture) -> None:
    async with attach(by()) as frontend:
        queue = frontend.queues[0]
        queue.submit([b"break"], [64])
        assert await wait_for_error(queue.err_fd) == 1
        queue.submit([b"good"], [64])
        await frontend.settled()
        assert queue.collect() == []
        assert "vring 0: no such opcode" in caplog.text
        await frontend.reboot()
        frontend.queues[0].submit([b"good"], [64])
        await frontend.queues[0].wait_async()


@in_loop
async def test_a_batch_that_fails_gives_back_the_chains_it_left() -> None:
    async with attach(FailingBatch()) as frontend:
        queue = frontend.queues[0]
        for what in (b"good", b"bug", b"never looked at"):
            queue.add([what], [64])
        queue.publish()
        queue.kick()
        assert [done.data for done in await queue.wait_async(3)] == [b"fine", b"", b""]
        queue.submit([b"good"], [64])
        [done] = await queue.wait_async()
        assert done.data == b"fine"


@in_loop
async def test_an_exception_in_refused_is_logged_and_the_chain_completed(caplog: pytest.LogCaptureFixture) -> None:
    class Worse(Failing):
        def refused(self, queue: Queue, chain: Chain, error: RequestError) -> None:
            raise ZeroDivisionError

    async with attach(Worse()) as frontend:
        frontend.queues[0].submit([b"refuse"], [64])
        [done] = await frontend.queues[0].wait_async()
        assert done.data == b"so far"
    assert "refused() failed" in caplog.text


@in_loop
async def test_chains_may_be_completed_later_and_flushed_by_the_device() -> None:
    class Later(Device):
        virtio_id = 39

        def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
            asyncio.get_running_loop().call_soon(self.finish, queue, chains)

        def finish(self, queue: Queue, chains: list[Chain]) -> None:
            for chain in chains:
                chain.write(b"later")
                chain.complete()
            queue.flush()

    async with attach(Later()) as frontend:
        frontend.queues[0].submit([b"x"], [8])
        [done] = await frontend.queues[0].wait_async()
        assert done.data == b"later"


@in_loop
async def test_requests_that_end_together_are_one_interrupt() -> None:
    device = Gate()
    async with attach(device, accept=~VirtioFeature.EVENT_IDX) as frontend:
        queue = frontend.queues[0]
        await frontend.settled()
        queue.take_call()
        for _ in range(8):
            queue.add([b"x"], [1])
        queue.publish()
        queue.kick()
        while device.waiting < 8:
            await frontend.settled()
        device.gate.set()
        assert len(await queue.wait_async(8)) == 8
        await frontend.settled()
        assert not queue.take_call()  # wait_async took the only one


@in_loop
async def test_a_driver_that_breaks_the_ring_breaks_only_the_ring(caplog: pytest.LogCaptureFixture) -> None:
    async with attach(Upper(num_queues=2)) as frontend:
        bad, good = frontend.queues
        bad.offer(999)  # no such descriptor
        bad.publish()
        os.eventfd_write(bad.kick_fd, 1)
        assert (await wait_for_error(bad.err_fd)) == 1
        good.submit([b"still here"], [16])
        [done] = await good.wait_async()
        assert done.data == b"STILL HERE"
        os.eventfd_write(bad.kick_fd, 1)  # nobody reads a broken ring's kicks: this must not spin
        await frontend.settled()
        await frontend.reboot()  # sets it up again
        frontend.queues[0].submit([b"mended"], [16])
        [done] = await frontend.queues[0].wait_async()
        assert done.data == b"MENDED"
    assert [r.levelno for r in caplog.records if "vring 0" in r.message] == [logging.WARNING]


async def wait_for_error(fd: int) -> int:
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        asyncio.get_running_loop().remove_reader(fd)
    return os.eventfd_read(fd)


@in_loop
async def test_memory_that_the_front_end_truncates_ends_its_session_not_the_process() -> None:
    async with attach(Upper()) as frontend:
        queue = frontend.queues[0]
        queue.add([b"x" * 4096], [4096])
        queue.publish()
        for region in frontend.memory.regions:
            os.ftruncate(region.fd, 0)
        os.eventfd_write(queue.kick_fd, 1)
        await frontend.ended()


@in_loop
async def test_memory_that_is_truncated_under_a_request_ends_the_session_without_another_kick() -> None:
    device = Gate()
    async with attach(device) as frontend:
        frontend.queues[0].submit([b"x"], [4096])
        await device.arrived.wait()
        for region in frontend.memory.regions:
            os.ftruncate(region.fd, 0)
        device.gate.set()
        await frontend.ended()


@in_loop
async def test_a_kick_fd_that_ends_ends_the_session() -> None:
    async with attach(Upper()) as frontend:
        read, write = os.pipe()
        await frontend.set_fd(Request.SET_VRING_KICK, 0, read)
        os.close(read)
        os.write(write, b"kick")
        await frontend.settled()
        os.close(write)
        await frontend.ended()


@in_loop
async def test_a_kick_fd_that_cannot_be_read_ends_the_session() -> None:
    async with attach(Upper()) as frontend:
        with select.epoll() as odd:  # an anonymous inode as an eventfd is, and readable, but not with read()
            odd.register(frontend.queues[0].kick_fd, select.EPOLLIN)
            await frontend.set_fd(Request.SET_VRING_KICK, 0, odd.fileno())
            os.eventfd_write(frontend.queues[0].kick_fd, 1)
            await frontend.ended()
