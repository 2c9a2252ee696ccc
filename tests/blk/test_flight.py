"""Many requests at once: none waits for another, none is lost, and the loop never waits for the storage.

The storage that takes its time is real: a read into guest memory whose page userfaultfd holds back stays in the kernel until
the test lets it go.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.blk.disk import FLUSH, IN, OK, OUT, SECTOR, SECTORS, disk, header, pattern
from vhostsock import Queue, UsageError
from vhostsock._core import ffi, lib
from vhostsock.devices.blk import Blk
from vhostsock.fileio import FileOp, FilePool
from vhostsock.proto import ProtocolFeature, VirtioFeature
from vhostsock.testing.frontend import attach

LIBC = ctypes.CDLL(None, use_errno=True)
SYS_USERFAULTFD, SYS_CACHESTAT = 323, 451
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04


@contextlib.contextmanager
def userfaultfd() -> Iterator[int]:
    fd = LIBC.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        pytest.skip(f"no userfaultfd for the kernel's own accesses here: {os.strerror(ctypes.get_errno())}")
    try:
        fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("=QQQ", 0xAA, 1 << 5, 0)))  # UFFD_FEATURE_MISSING_SHMEM
        yield fd
    finally:
        os.close(fd)


class HoldingDisk(Blk):
    """Knows its queue, to find where guest memory is in this process."""

    queue: Queue

    def queue_started(self, queue: Queue) -> None:
        self.queue = queue
        super().queue_started(queue)

    def host_address(self, gpa: int) -> int:
        assert self.queue.memory
        return int(ffi.cast("uintptr_t", lib.vs_mem_gpa(self.queue.memory.ptr, gpa, 1)))


@in_loop
async def test_a_read_that_the_kernel_holds_delays_nobody_but_a_stop_of_its_queue(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(pattern(SECTORS * SECTOR))
    device = HoldingDisk(tmp_path / "image", threads=2)
    with userfaultfd() as faults:
        async with attach(device) as frontend:
            driver, memory = frontend.queues[0], frontend.memory
            held = driver.add([header(IN, 0)], [mmap.PAGESIZE, 1])
            page = held.writable[0][0]
            assert page % mmap.PAGESIZE == 0
            await frontend.settled()
            where = device.host_address(page)
            fcntl.ioctl(faults, UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", where, mmap.PAGESIZE, 1, 0)))
            driver.publish()
            driver.kick()
            for sector in range(20):  # the second thread serves them, and the loop the socket
                sent = driver.submit([header(IN, sector)], [SECTOR, 1])
                [done] = await driver.wait_async()
                assert done is sent
                assert done.data == device_bytes(tmp_path, sector) + b"\0"
            assert held.written is None
            stopping = asyncio.ensure_future(frontend.pause())
            await asyncio.wait([stopping], timeout=0.05)  # as long as it likes: it must not end
            assert not stopping.done()
            fcntl.ioctl(faults, UFFDIO_ZEROPAGE, bytearray(struct.pack("=QQQq", where, mmap.PAGESIZE, 0, 0)))
            await stopping
            [done] = driver.collect()
            assert done is held
            assert memory.read(page, mmap.PAGESIZE) == device_bytes(tmp_path, 0, 8)
            assert frontend.bases == [21]
    device.close()


@pytest.mark.parametrize("accept", [~VirtioFeature.RING_PACKED, ~0], ids=["split", "packed"])
@in_loop
async def test_a_tracked_queue_stops_without_what_no_thread_has_begun_and_takes_it_up_again(
    accept: int, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(pattern(SECTORS * SECTOR))
    device = HoldingDisk(tmp_path / "image", threads=1)
    suspends = ProtocolFeature.GET_VRING_BASE_INFLIGHT
    with userfaultfd() as faults:
        async with attach(device, accept=accept, track=True, protocol=suspends) as frontend:
            driver = frontend.queues[0]
            held = driver.add([header(IN, 0)], [mmap.PAGESIZE, 1])
            page = held.writable[0][0]
            await frontend.settled()
            where = device.host_address(page)
            fcntl.ioctl(faults, UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", where, mmap.PAGESIZE, 1, 0)))
            driver.publish()
            driver.kick()
            others = {driver.submit([header(IN, sector)], [SECTOR, 1]): sector for sector in range(20)}
            while device.counts["reads"] < 21:
                await frontend.settled()
            assert select.select([faults], [], [], 30)[0]  # the one thread has come to the page
            stopping = asyncio.ensure_future(frontend.pause())
            while device._under_way[0] > 1:
                await asyncio.wait([stopping], timeout=0.001)  # all but the held one are cancelled
            fcntl.ioctl(faults, UFFDIO_ZEROPAGE, bytearray(struct.pack("=QQQq", where, mmap.PAGESIZE, 0, 0)))
            await stopping
            assert driver.collect() == [held]
            await frontend.resume()
            for done in await driver.wait_async(20):
                assert done.data == device_bytes(tmp_path, others.pop(done)) + b"\0"
            assert (others, device.counts["again"]) == ({}, 20)
    device.close()


def device_bytes(folder: Path, sector: int, count: int = 1) -> bytes:
    return (folder / "image").read_bytes()[sector * SECTOR : (sector + count) * SECTOR]


@pytest.mark.parametrize("accept", [~(1 << 34), ~0], ids=["split", "packed"])
@in_loop
async def test_requests_of_many_queues_all_end_with_their_own_data(accept: int, tmp_path: Path) -> None:
    async with disk(tmp_path, num_queues=3, frontend={"accept": accept}) as d:
        image = d.image.read_bytes()
        ended = 0
        for round_ in range(10):
            sent = {}
            for queue, driver in enumerate(d.frontend.queues):
                for i in range(driver.free):
                    sector = (round_ * 31 + queue * 7 + i * 3) % (SECTORS - 4)
                    sent[driver.add([header(IN, sector)], [(i % 4 + 1) * SECTOR, 1])] = sector
                driver.publish()
                driver.kick()
            for driver in d.frontend.queues:
                for done in await driver.wait_async(driver.in_flight):
                    sector = sent.pop(done)
                    assert done.data == image[sector * SECTOR : sector * SECTOR + done.room - 1] + b"\0"
                    ended += 1
            assert not sent
        assert ended == d.device.counts["reads"] == 10 * 3 * 64


def dirty_pages(path: Path) -> int:
    """Pages of the file that are not on its storage yet."""
    with path.open("rb") as file:
        span, answer = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
        if LIBC.syscall(SYS_CACHESTAT, file.fileno(), span, answer, 0) < 0:
            pytest.skip(f"no cachestat(2) here (Linux 6.5): {os.strerror(ctypes.get_errno())}")
        return answer[1] + answer[2]  # dirty, and being written back


@in_loop
async def test_a_write_waits_in_the_page_cache_and_a_flush_puts_it_on_storage() -> None:
    # /tmp may be in memory, where nothing is ever to be written back; /var/tmp outlives a reboot
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        await _write_and_flush(Path(folder))


async def _write_and_flush(folder: Path) -> None:
    async with disk(folder) as d:
        d.sync()
        assert dirty_pages(d.image) == 0
        assert await d.write(0, b"d" * SECTOR) == OK
        assert dirty_pages(d.image) > 0
        assert await d.status([header(FLUSH)]) == OK
        assert dirty_pages(d.image) == 0


@pytest.mark.parametrize("how", ["the driver did not take FLUSH", "write_through"])
@in_loop
async def test_without_flush_a_write_is_on_storage_when_it_completes(how: str, tmp_path: Path) -> None:
    through = how == "write_through"
    async with disk(tmp_path, write_through=through, frontend={} if through else {"accept": ~(1 << 9 | 1 << 34)}) as d:
        assert bool(d.frontend.offered & 1 << 9) != through
        d.sync()
        for sector in range(0, SECTORS, 16):
            assert await d.write(sector, b"d" * SECTOR) == OK
            assert dirty_pages(d.image) == 0
        assert (await d.config())["writeback"] == int(not through)


def counted(pool_jobs: int, threads: int, image: Path) -> list[int]:
    errors: list[int] = []

    async def run() -> None:
        every = asyncio.Event()

        def ended(jobs: list[tuple[int, int]]) -> None:
            errors.extend(error for _, error in jobs)
            if len(errors) == pool_jobs:
                every.set()

        pool: FilePool[int] = FilePool(threads, ended)
        with image.open("r+b") as file:
            for number in range(pool_jobs):
                pool.submit(FileOp.SYNC if number % 2 else FileOp.ZERO, number, file.fileno(), length=SECTOR, offset=number)
            await every.wait()
        pool.close()
        pool.close()

    asyncio.run(run())
    return errors


@pytest.mark.parametrize("threads", [1, 64])
def test_more_jobs_than_one_batch_reports_all_end_once(threads: int, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    assert counted(600, threads, tmp_path / "image") == [0] * 600


@in_loop
async def test_a_job_that_cannot_be_is_refused_at_once() -> None:
    ended: asyncio.Queue[list[tuple[str, int]]] = asyncio.Queue()
    pool: FilePool[str] = FilePool(1, ended.put_nowait)
    for arguments in ({}, {"length": 2**63, "offset": 1}):
        with pytest.raises(UsageError):
            pool.submit(FileOp.READ, "no chain", **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        pool.submit(FileOp.ZERO, "past the end of any file", 0, length=2, offset=2**63 - 1)
    pool.submit(FileOp.SYNC, "no such file", 12345)
    assert await ended.get() == [("no such file", errno.EBADF)]
    pool.close()
    with pytest.raises(UsageError, match=r"1\.\.64"):
        FilePool(65, ended.put_nowait)


@in_loop
async def test_closing_a_pool_finishes_what_was_submitted(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 64 * SECTOR)
    pool: FilePool[int] = FilePool(1, lambda jobs: None)
    with path.open("r+b") as file:
        for number in range(64):
            pool.submit(FileOp.ZERO, number, file.fileno(), length=SECTOR, offset=number * SECTOR)
        pool.close()
    assert path.read_bytes() == bytes(64 * SECTOR)


@in_loop
async def test_the_processes_signals_are_not_for_the_pools_threads(tmp_path: Path) -> None:
    async with disk(tmp_path) as d:
        await d.read(0, 1)
        own = {thread for thread in os.listdir("/proc/self/task") if "SigBlk" in read(thread) and blocks(thread, 15)}  # SIGTERM
        assert len(own) >= 8
        assert not any(blocks(thread, 7) for thread in own)  # SIGBUS, for memory that is truncated


def read(thread: str) -> str:
    return Path(f"/proc/self/task/{thread}/status").read_text()


def blocks(thread: str, signal: int) -> bool:
    [mask] = [line.split()[1] for line in read(thread).splitlines() if line.startswith("SigBlk:")]
    return bool(int(mask, 16) >> (signal - 1) & 1)


@in_loop
async def test_writes_and_reads_of_one_queue_may_overtake_but_each_is_whole(tmp_path: Path) -> None:
    async with disk(tmp_path, bytes(SECTORS * SECTOR), frontend={"size": 256}) as d:
        driver = d.frontend.queues[0]
        for i in range(100):
            driver.add([header(OUT, i), bytes([i + 1]) * SECTOR], [1])
        driver.publish()
        driver.kick()
        assert {done.data for done in await driver.wait_async(100)} == {b"\0"}
        assert d.image.read_bytes() == b"".join(bytes([i + 1]) * SECTOR for i in range(100)) + bytes(28 * SECTOR)
