"""A migration begins, ends and fails under running rings, and every page that the device wrote to is in the log."""

from __future__ import annotations

import os

import pytest

from tests.aio import in_loop
from vhostsock import Chain, Device, Queue
from vhostsock._core import lib
from vhostsock.proto import Request as Message
from vhostsock.proto import wire
from vhostsock.proto.features import VirtioFeature
from vhostsock.testing.frontend import QEMU_7_2, QEMU_11_1, Dialect, Frontend, attach
from vhostsock.testing.memory import PAGE, pages

formats = pytest.mark.parametrize("accept", [~(VirtioFeature.RING_PACKED | VirtioFeature.LOG_ALL), ~VirtioFeature.LOG_ALL],
                                  ids=["split", "packed"])  # fmt: skip


class Writer(Device):
    virtio_id = 42
    migratable = True
    packed = True
    num_queues = 2

    def __init__(self) -> None:
        self.starts = self.resets = 0

    def queue_started(self, queue: Queue) -> None:
        self.starts += 1
        super().queue_started(queue)

    def reset(self) -> None:
        self.resets += 1

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(chain.read() * (chain.writable // 4))


async def write(frontend: Frontend, queue: int = 0) -> set[int]:
    """A request; where the device answered."""
    request = frontend.queues[queue].submit([b"data"], [2 * PAGE])
    await frontend.queues[queue].wait_async()
    return pages(*request.writable[0])


@formats
@pytest.mark.parametrize("dialect", [QEMU_7_2, QEMU_11_1], ids=lambda d: d.name)
@in_loop
async def test_a_log_is_turned_on_and_off_under_running_rings(accept: int, dialect: Dialect) -> None:
    device = Writer()
    async with attach(device, accept=accept, dialect=dialect) as frontend:
        await write(frontend)
        log = await frontend.start_log()
        assert log.take() == set()
        for queue in (0, 1):
            marked = await write(frontend, queue)
            await frontend.settled()
            taken = log.take()
            assert marked <= taken
            assert frontend.queues[queue].used // PAGE * PAGE in taken
        await frontend.stop_log()  # the migration failed
        await write(frontend)
        assert (device.starts, device.resets) == (2, 0)  # the rings never stopped
        again = await frontend.start_log()
        marked = await write(frontend)
        await frontend.pause()  # it succeeds: the last pages, then the other host goes on
        assert marked <= again.take()


@in_loop
async def test_a_pause_at_the_end_of_a_migration_that_fails_is_no_reset() -> None:
    device = Writer()
    async with attach(device) as frontend:
        await frontend.start_log()
        await frontend.pause()
        await frontend.stop_log()
        await frontend.resume()
        await write(frontend)
        assert device.resets == 0


@in_loop
async def test_a_driver_that_acks_the_log_bit_by_itself_is_tolerated() -> None:
    # the guests of QEMU's generic device are offered every bit but 30
    async with attach(Writer(), accept=~0) as frontend:
        assert frontend.features & VirtioFeature.LOG_ALL
        await write(frontend)


@in_loop
async def test_a_log_that_became_too_small_ends_the_session() -> None:
    async with attach(Writer()) as frontend:
        log = await frontend.start_log()
        value = {"size": 1, "offset": 0}
        assert not await frontend.request(Message.SET_LOG_BASE, wire.LOG, value, fds=[log.fd], reply=wire.U64)
        frontend.queues[0].submit([b"data"], [PAGE])
        await frontend.ended()


@pytest.mark.parametrize("value", [{"size": 0, "offset": 0}, {"size": 1 << 50, "offset": 0}, {"size": 1, "offset": 1 << 62}])
@in_loop
async def test_a_log_that_cannot_be_ends_the_session(value: dict[str, int]) -> None:
    # its reply has no way to say no, and to go on without a log would lose pages
    async with attach(Writer()) as frontend:
        fd = os.memfd_create("log")
        os.ftruncate(fd, 4096)
        await frontend.request(Message.SET_LOG_BASE, wire.LOG, value, fds=[fd])
        os.close(fd)
        await frontend.ended()


@in_loop
async def test_a_front_end_cannot_pile_up_logs() -> None:
    async with attach(Writer()) as frontend:
        log = await frontend.start_log()
        fds, regions = len(os.listdir("/proc/self/fd")), lib.vs_region_count_live()
        for _ in range(20):
            value = {"size": log.size, "offset": 0}
            assert not await frontend.request(Message.SET_LOG_BASE, wire.LOG, value, fds=[log.fd], reply=wire.U64)
            await frontend.request(Message.SET_LOG_FD, fds=[frontend.queues[0].err_fd], ack=True)
        # one more fd than before: that of SET_LOG_FD, and the vrings' and the log's own copies of it
        assert len(os.listdir("/proc/self/fd")) - fds == 2
        assert lib.vs_region_count_live() == regions
        assert await write(frontend) <= log.take()


@in_loop
async def test_the_fd_of_set_log_fd_is_told_whether_it_comes_before_the_log_or_after() -> None:
    async with attach(Writer()) as frontend:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            await frontend.request(Message.SET_LOG_FD, fds=[fd], ack=True)
            await frontend.start_log()
            await write(frontend)
            await frontend.settled()
            assert os.eventfd_read(fd)
            await frontend.request(Message.SET_LOG_FD, fds=[fd], ack=True)
            await write(frontend)
            await frontend.settled()
            assert os.eventfd_read(fd)
        finally:
            os.close(fd)
