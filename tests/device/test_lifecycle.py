# SPDX-License-Identifier: BSD-3-Clause
"""Start, stop, pause, resume, reset: what reaches the device, and that no request is lost on the way."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.aio import in_loop
from tests.device.devices import Gate, Recorder, Upper
from vhostsock import Queue
from vhostsock.devices.echo import Echo
from vhostsock.proto import Request, VirtioFeature, wire
from vhostsock.testing.driver import DriverQueue
from vhostsock.testing.frontend import QEMU_7_2, QEMU_11_1, Dialect, Frontend, Refused, attach

DIALECTS = pytest.mark.parametrize("dialect", [QEMU_7_2, QEMU_11_1], ids=["7.2", "11.1"])


async def ask(queue: DriverQueue, data: bytes) -> bytes:
    queue.submit([data], [len(data)])
    [done] = await queue.wait_async()
    return done.data


@DIALECTS
@in_loop
async def test_a_device_hears_of_each_queue_once_per_start_and_stop(dialect: Dialect) -> None:
    device = Recorder(num_queues=2)
    async with attach(device, started=False, dialect=dialect) as frontend:
        assert device.take() == ["connected"]
        await frontend.start()
        await frontend.settled()
        assert device.take() == ["started 0", "started 1"]
        await frontend.pause()
        assert device.take() == ["draining 0", "stopped 0", "draining 1", "stopped 1"]
        await frontend.resume()
        await frontend.settled()
        assert device.take() == ["started 0", "started 1"]
    assert device.take() == ["draining 0", "stopped 0", "draining 1", "stopped 1", "disconnected"]


class DrainTogether(Recorder):
    """Its queues finish draining only when both are at it."""

    def __init__(self) -> None:
        super().__init__(num_queues=2)
        self.both = asyncio.Barrier(2)

    async def queue_draining(self, queue: Queue) -> None:
        await self.both.wait()


@in_loop
async def test_a_device_knows_what_its_driver_acked_before_a_queue_starts_and_forgets_it_with_the_front_end() -> None:
    class Watcher(Recorder):
        features = 0x5
        seen = 0

        async def connected(self) -> None:
            assert self.acked_features == 0

        def queue_started(self, queue: Queue) -> None:
            self.seen = self.acked_features

    device = Watcher()
    for accept in (~0x1, ~0x4):
        async with attach(device, accept=accept) as frontend:
            await frontend.settled()
            assert device.seen == frontend.offered & accept
            assert device.seen & 0x5 == 0x5 & accept


@pytest.mark.parametrize("how", ["close", "RESET_DEVICE"])
@in_loop
async def test_queues_that_stop_together_drain_together(how: str) -> None:
    device = DrainTogether()
    async with attach(device) as frontend:
        await frontend.settled()
        if how == "RESET_DEVICE":
            await frontend.request(Request.RESET_DEVICE)
            await frontend.settled()
    assert device.told.count("stopped 0") == device.told.count("stopped 1") == 1


@DIALECTS
@in_loop
async def test_requests_survive_a_pause(dialect: Dialect) -> None:
    async with attach(Upper(), dialect=dialect) as frontend:
        queue = frontend.queues[0]
        assert await ask(queue, b"before") == b"BEFORE"
        await frontend.pause()
        assert frontend.bases == [1]
        queue.submit([b"meanwhile"], [64])  # a running guest's last request, seen by nobody yet
        await frontend.resume()
        [done] = await queue.wait_async()
        assert done.data == b"MEANWHILE"


@in_loop
async def test_a_kick_before_enable_is_not_lost() -> None:
    async with attach(Upper(), started=False, dialect=QEMU_7_2) as frontend:
        queue = frontend.queues[0]
        await frontend.request(Request.SET_FEATURES, wire.U64, frontend.features)
        await frontend.send_memory()
        await frontend.set_ring(0)
        queue.submit([b"early"], [16])
        await frontend.set_fd(Request.SET_VRING_KICK, 0, queue.kick_fd)
        await frontend.settled()
        assert queue.collect() == []  # started, but not enabled
        assert os.eventfd_read(queue.kick_fd) == 1  # the kick was not consumed by the disabled ring
        await frontend.enable(0, True)
        [done] = await queue.wait_async()  # found by the scan: there is no kick any more
        assert done.data == b"EARLY"


@in_loop
async def test_a_disabled_ring_takes_no_requests_and_goes_on_where_it_was() -> None:
    async with attach(Upper()) as frontend:
        queue = frontend.queues[0]
        assert await ask(queue, b"one") == b"ONE"
        await frontend.enable(0, False)
        queue.submit([b"two"], [16])
        await frontend.settled()
        assert queue.collect() == []
        await frontend.enable(0, True)
        [done] = await queue.wait_async()
        assert done.data == b"TWO"


@in_loop
async def test_without_protocol_features_every_ring_is_enabled() -> None:
    async with attach(Upper(), accept=~VirtioFeature.PROTOCOL_FEATURES) as frontend:
        assert await ask(frontend.queues[0], b"hello") == b"HELLO"
        assert not [name for name, _, _ in frontend.sent if name == "SET_VRING_ENABLE"]
        await frontend.stop()
        assert frontend.bases == [1]


@in_loop
async def test_get_vring_base_waits_for_what_is_in_flight() -> None:
    device = Gate()
    async with attach(device) as frontend:
        queue = frontend.queues[0]
        queue.submit([b"slow"], [16])
        await device.arrived.wait()
        device.gate.set()
        await frontend.stop()
        assert frontend.bases == [1]
        [done] = queue.collect()
        assert done.data == b"slow"


@in_loop
async def test_a_handler_that_never_ends_is_cancelled_when_its_queue_stops() -> None:
    device = Gate()
    device.stop_timeout = 0.01
    async with attach(device) as frontend:
        frontend.queues[0].submit([b"never"], [16])
        await device.arrived.wait()
        await frontend.stop()
        assert device.cancelled == 1
        [done] = frontend.queues[0].collect()  # every chain comes back
        assert done.data == b""


@in_loop
async def test_a_pause_is_no_reset_but_a_reboot_is() -> None:
    device = Recorder(num_queues=2)
    async with attach(device) as frontend:
        await frontend.pause()
        await frontend.resume()
        await frontend.settled()
        assert "reset" not in device.take()
        await frontend.reboot()
        await frontend.settled()
        told = device.take()
        assert told.index("stopped 1") < told.index("reset") < told.index("started 0")
        assert told.count("reset") == 1


@in_loop
async def test_reset_device_stops_all_rings_and_keeps_memory_and_session() -> None:
    device = Recorder()
    async with attach(device) as frontend:
        await frontend.request(Request.SET_STATUS, wire.U64, 0xF)
        device.take()
        await frontend.request(Request.RESET_DEVICE)
        assert await frontend.request(Request.GET_STATUS, reply=wire.U64) == 0
        assert device.take() == ["draining 0", "stopped 0", "reset"]
        await frontend.reset_device()
        await frontend.settled()
        assert device.take() == ["reset", "started 0"]


@in_loop
async def test_echo_counts_from_zero_after_a_reset() -> None:
    async with attach(Echo()) as frontend:
        await ask(frontend.queues[0], b"x")
        assert await frontend.read_config(0, 4) == b"\1\0\0\0"
        await frontend.reset_device()
        assert await frontend.read_config(0, 4) == bytes(4)


@in_loop
async def test_the_call_fd_may_change_at_any_time() -> None:
    async with attach(Upper()) as frontend:
        queue = frontend.queues[0]
        assert await ask(queue, b"a") == b"A"
        old, queue.call_fd = queue.call_fd, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        await frontend.set_fd(Request.SET_VRING_CALL, 0, queue.call_fd)
        assert await ask(queue, b"b") == b"B"
        os.close(old)


@in_loop
async def test_a_new_call_fd_is_signalled_for_what_the_old_one_swallowed() -> None:
    async with attach(Upper()) as frontend:
        queue = frontend.queues[0]
        masked = os.eventfd(0, os.EFD_NONBLOCK)
        await frontend.set_fd(Request.SET_VRING_CALL, 0, masked)
        queue.submit([b"x"], [1])
        while not queue.collect():
            await frontend.settled()
        queue.take_call()
        await frontend.set_fd(Request.SET_VRING_CALL, 0, queue.call_fd)
        await frontend.settled()
        assert queue.take_call()
        os.close(masked)


@in_loop
async def test_a_ring_without_a_call_fd_is_served() -> None:
    async with attach(Upper()) as frontend:
        await frontend.set_fd(Request.SET_VRING_CALL, 0, -1)
        frontend.queues[0].submit([b"polled"], [16])
        while not (done := frontend.queues[0].collect()):
            await frontend.settled()
        assert done[0].data == b"POLLED"


@in_loop
async def test_the_kick_fd_of_a_running_ring_may_change() -> None:
    async with attach(Upper()) as frontend:
        queue = frontend.queues[0]
        old, queue.kick_fd = queue.kick_fd, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        await frontend.set_fd(Request.SET_VRING_KICK, 0, queue.kick_fd)
        assert await ask(queue, b"new") == b"NEW"
        os.close(old)


@in_loop
async def test_setting_a_running_ring_to_what_it_is_changes_nothing() -> None:
    device = Recorder()
    async with attach(device) as frontend:
        await frontend.settled()
        device.take()
        await frontend.set_ring(0)
        await frontend.settled()
        assert device.take() == []


@in_loop
async def test_setting_a_running_ring_to_something_else_restarts_it() -> None:
    async with attach(Upper()) as frontend:
        assert await ask(frontend.queues[0], b"here") == b"HERE"
        with frontend.queues[0] as old, DriverQueue(frontend.memory, frontend.size, base=1) as moved:
            frontend.queues[0] = moved
            os.dup2(old.kick_fd, moved.kick_fd)  # only the addresses change
            os.dup2(old.call_fd, moved.call_fd)
            await frontend.request(Request.SET_VRING_ADDR, wire.ADDRESS, frontend.address(0), ack=True)
            assert await ask(moved, b"there") == b"THERE"


@in_loop
async def test_a_ring_outside_of_memory_does_not_start() -> None:
    async with attach(Upper(), started=False) as frontend:
        await frontend.request(Request.SET_FEATURES, wire.U64, frontend.features)
        await frontend.set_ring(0)
        with pytest.raises(Refused, match="SET_VRING_KICK"):
            await frontend.set_fd(Request.SET_VRING_KICK, 0, frontend.queues[0].kick_fd)
        await frontend.send_memory()  # the session went on, and now it can
        await frontend.set_fd(Request.SET_VRING_KICK, 0, frontend.queues[0].kick_fd)
        await frontend.enable(0, True)
        assert await ask(frontend.queues[0], b"now") == b"NOW"


async def stop_unstarted(frontend: Frontend) -> list[int]:
    await frontend.stop()
    return frontend.bases


@in_loop
async def test_stopping_rings_that_never_started_reports_the_base_they_have() -> None:
    """DPDK's first messages after a reconnect are ENABLE 0 and GET_VRING_BASE, before any negotiation."""
    async with attach(Upper(num_queues=2), negotiated=False, queues=2) as frontend:
        assert await stop_unstarted(frontend) == [0, 0]
        await frontend.request(Request.SET_VRING_BASE, wire.VRING_STATE, {"index": 1, "num": 7})
        assert await stop_unstarted(frontend) == [0, 7]
        await frontend.handshake()
        await frontend.start()
        assert await ask(frontend.queues[0], b"after") == b"AFTER"
