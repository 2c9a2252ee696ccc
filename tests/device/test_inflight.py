"""Back-ends that are killed in the middle of their work, and back-ends that stop without finishing it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aio import in_loop
from vhostsock import Chain, Device, Queue
from vhostsock._core import lib
from vhostsock.proto import Request as Message
from vhostsock.proto import wire
from vhostsock.proto.features import ProtocolFeature, VirtioFeature
from vhostsock.testing.driver import Request
from vhostsock.testing.frontend import Frontend, Refused, attach

formats = pytest.mark.parametrize("accept", [~VirtioFeature.RING_PACKED, ~0], ids=["split", "packed"])
SUSPENDS = ProtocolFeature.GET_VRING_BASE_INFLIGHT


# kill -9


class Nursery:
    """nursery.py, and the back-ends that it made for us."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            script = Path(__file__).with_name("nursery.py")
            self._process = subprocess.Popen([sys.executable, script], stdin=theirs.fileno())
        self._child = 0

    def backend(self, device: str) -> socket.socket:
        """The front-end's end of a connection to a new back-end process."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [device.encode()], [theirs.fileno()])
        self._child = int(self._control.recv(64))
        return ours

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)

    def close(self) -> None:
        self._control.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    it = Nursery()
    yield it
    it.close()


class Load:
    """Requests on every queue of a front-end, each with a content of its own; what comes back is checked and counted.

    sent, done, again   requests; those that the device had seen before a crash
    held                requests under way that are only answered when they come again
    """

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.sent = self.done = self.again = self.held = 0
        self._expected: dict[Request, bytes] = {}

    def fill(self, *, hold: bool) -> None:
        """Fill the rings; with ``hold``, every sixth request is one to be held."""
        for queue in self.frontend.queues:
            while queue.free >= 3:
                held = hold and self.sent % 6 == 0
                data = [b"%s%d" % (b"hold" * held, self.sent), b"+" * (self.sent % 3)][: 1 + bool(self.sent % 3)]
                request = queue.submit(data, [16], indirect=self.sent % 2 == 0)
                self._expected[request] = b"".join(data)[::-1]
                self.sent += 1
                self.held += held

    def take(self) -> None:
        """What was completed. A request that was completed twice is a DeviceFault of the driver's."""
        for queue in self.frontend.queues:
            for request in queue.collect():
                answer = self._expected.pop(request)
                assert request.data.removesuffix(b"!") == answer
                self.done += 1
                self.again += request.data != answer
                self.held -= answer.endswith(b"dloh")

    async def until(self, done: int) -> None:
        loop, called = asyncio.get_running_loop(), asyncio.Event()
        for queue in self.frontend.queues:
            loop.add_reader(queue.call_fd, called.set)
        try:
            async with asyncio.timeout(30):
                self.take()
                while self.done < done:
                    called.clear()
                    # all of them: one that has something already is taken below, after the next call or at once
                    if not any([queue.enable_calls() for queue in self.frontend.queues]):
                        await called.wait()
                    for queue in self.frontend.queues:
                        queue.take_call()
                    self.take()
        finally:
            for queue in self.frontend.queues:
                loop.remove_reader(queue.call_fd)


@formats
@pytest.mark.parametrize("device", ["dawdler", "tidy"])
@in_loop
async def test_no_request_is_lost_or_doubled_when_back_ends_are_killed_at_any_time(
    nursery: Nursery, accept: int, device: str
) -> None:
    draw, hold = random.Random(accept), device == "dawdler"  # in order, one that is held would hold up all behind it
    async with Frontend(nursery.backend(device), queues=2, size=32, accept=accept, track=True) as frontend:
        await frontend.handshake()
        await frontend.start()
        load, held = Load(frontend), 0
        for _ in range(12):
            load.fill(hold=hold)
            held = max(held, load.held)
            # up to some point of the work, and sometimes before any of it
            await load.until(draw.randrange(load.done, load.sent - load.held + 1))
            await crash(nursery, frontend, load, device)
        while load.done < load.sent:
            load.fill(hold=False)
            await load.until(load.sent - load.held)  # what is behind those to be held was popped, so they were, too
            if load.held:
                await crash(nursery, frontend, load, device)
        assert [queue.in_flight for queue in frontend.queues] == [0, 0]
        assert load.again >= held
        assert not hold or held > 3
        nursery.kill()
        await frontend.ended()


async def crash(nursery: Nursery, frontend: Frontend, load: Load, device: str) -> None:
    nursery.kill()
    await frontend.ended()
    load.take()
    load.fill(hold=False)  # the driver knows nothing of it
    await frontend.reconnect(nursery.backend(device))


# Without a crash


class Stuck(Device):
    """Takes requests and keeps them until it is let go."""

    virtio_id = 42
    inflight = True
    packed = True
    stop_timeout = 30.0  # a test that waits for it fails

    def __init__(self) -> None:
        self.go, self.came = asyncio.Event(), asyncio.Event()
        self.seen: list[tuple[bytes, bool]] = []

    async def handle(self, queue: Queue, chain: Chain) -> None:
        self.seen.append((chain.read(), chain.again))
        self.came.set()
        await self.go.wait()
        chain.write(b"late")


async def seen(device: Stuck, count: int) -> None:
    async with asyncio.timeout(30):
        while len(device.seen) < count:
            device.came.clear()
            await device.came.wait()


@in_loop
async def test_a_ring_that_is_larger_than_its_part_of_the_region_is_served_without_tracking(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As SeaBIOS under QEMU 10.0 makes it; the driver after it takes the size that the device has."""
    device = Stuck()
    device.go.set()
    async with attach(device, started=False, track=True, protocol=SUSPENDS, size=64) as frontend:
        frontend.size = 16  # what the region is made for; the ring has 64
        for size, tracked in ((64, False), (16, True)):
            device.go.clear()
            await frontend.start()
            [queue] = frontend.queues
            assert queue.num == size
            queue.submit([b"x"], [4])
            await seen(device, 1)
            assert ("would lose its requests" in caplog.text) != tracked
            stopping = asyncio.ensure_future(frontend.stop())
            if not tracked:  # it waits for the request, which would be lost
                device.go.set()
            await stopping
            assert [request.data for request in queue.collect()] == ([] if tracked else [b"late"])
            device.seen.clear()
            caplog.clear()
            frontend.renew_queues()


@formats
@in_loop
async def test_a_stop_does_not_wait_for_requests_that_are_in_the_region(accept: int) -> None:
    device = Stuck()
    async with attach(device, accept=accept, track=True, protocol=SUSPENDS) as frontend:
        [queue] = frontend.queues
        requests = [queue.submit([b"%d" % i], [4]) for i in range(2)]
        await seen(device, 2)
        async with asyncio.timeout(10):
            await frontend.pause()
        assert frontend.bases == ([0x8000_8002] if accept == ~0 else [2])
        assert queue.collect() == []
        requests.append(queue.submit([b"2"], [4]))
        await frontend.resume()
        await seen(device, 5)
        assert device.seen[2:] == [(b"0", True), (b"1", True), (b"2", False)]
        device.go.set()
        assert await queue.wait_async(3) == requests


@in_loop
async def test_what_was_in_flight_when_a_ring_was_disabled_comes_again_when_it_is_enabled() -> None:
    device = Stuck()
    async with attach(device, track=True, protocol=SUSPENDS) as frontend:
        request = frontend.queues[0].submit([b"x"], [4])
        await seen(device, 1)
        await frontend.enable(0, False)
        await frontend.enable(0, True)
        await seen(device, 2)
        device.go.set()
        assert await frontend.queues[0].wait_async() == [request]


@in_loop
async def test_without_the_feature_a_stop_waits() -> None:
    device = Stuck()
    async with attach(device, track=True) as frontend:
        request = frontend.queues[0].submit([b"x"], [4])
        await seen(device, 1)
        asyncio.get_running_loop().call_soon(device.go.set)
        await frontend.pause()
        assert frontend.queues[0].collect() == [request]
        assert frontend.bases == [1]


@in_loop
async def test_a_reset_forgets_what_was_in_flight() -> None:
    device = Stuck()
    async with attach(device, track=True, protocol=SUSPENDS) as frontend:
        frontend.queues[0].submit([b"old"], [4])
        await seen(device, 1)
        first = frontend.inflight
        await frontend.reset_device()
        assert first is not None
        request = frontend.queues[0].submit([b"new"], [4])
        device.go.set()
        assert await frontend.queues[0].wait_async() == [request]
        assert device.seen == [(b"old", False), (b"new", False)]


# Front-ends that ask for what cannot be


@in_loop
async def test_a_region_for_more_than_the_device_has_is_not_made() -> None:
    async with attach(Stuck(), started=False) as frontend:
        await frontend.request(Message.SET_FEATURES, wire.U64, frontend.features)
        for num_queues, queue_size in ((2, 64), (0, 64), (1, 0), (1, 1025), (65535, 65535)):
            value = {"size": 0, "offset": 0, "num_queues": num_queues, "queue_size": queue_size}
            answer = await frontend.request(Message.GET_INFLIGHT_FD, wire.INFLIGHT, value, reply=wire.INFLIGHT)
            assert answer.size == 0
        assert frontend.reply_fds == []


@pytest.mark.parametrize(
    "change",
    [
        {"num_queues": 2}, {"num_queues": 0}, {"num_queues": 65535}, {"queue_size": 0}, {"queue_size": 65535}, {"size": 0},
        {"size": 1 << 40}, {"size": (1 << 64) - 1}, {"offset": 1 << 40}, {"offset": (1 << 64) - 8}, {"size": 64},
    ],
)  # fmt: skip
@in_loop
async def test_a_region_that_cannot_be_is_refused_and_the_session_lives(change: dict[str, int]) -> None:
    async with attach(Stuck(), started=False) as frontend:
        await frontend.request(Message.SET_FEATURES, wire.U64, frontend.features)
        await frontend.share_inflight()
        size, fd = frontend.inflight or (0, -1)
        value = {"size": size, "offset": 0, "num_queues": 1, "queue_size": 64} | change
        with pytest.raises(Refused):
            await frontend.request(Message.SET_INFLIGHT_FD, wire.INFLIGHT, value, fds=[fd], ack=True)
        await frontend.settled()


@in_loop
async def test_a_front_end_cannot_pile_up_regions() -> None:
    async with attach(Stuck(), started=False) as frontend:
        await frontend.request(Message.SET_FEATURES, wire.U64, frontend.features)
        await frontend.share_inflight()
        fds, regions = len(os.listdir("/proc/self/fd")), lib.vs_region_count_live()
        for _ in range(20):
            value = {"size": 0, "offset": 0, "num_queues": 1, "queue_size": 64}
            await frontend.request(Message.GET_INFLIGHT_FD, wire.INFLIGHT, value, reply=wire.INFLIGHT)
            os.close(frontend.reply_fds.pop())
            await frontend.share_inflight()
        assert (len(os.listdir("/proc/self/fd")), lib.vs_region_count_live()) == (fds, regions)


@in_loop
async def test_only_a_file_can_be_the_region() -> None:
    async with attach(Stuck(), started=False) as frontend:
        value = {"size": 4096, "offset": 0, "num_queues": 1, "queue_size": 64}
        with pytest.raises(Refused):
            await frontend.request(Message.SET_INFLIGHT_FD, wire.INFLIGHT, value, fds=[frontend.queues[0].kick_fd], ack=True)
