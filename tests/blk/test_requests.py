"""Each request type does what virtio 1.3, 5.2.6 says, on both ring formats and however the driver cuts it into buffers."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.aio import in_loop
from tests.blk.disk import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    OK,
    OUT,
    SECTOR,
    SECTORS,
    UNMAP,
    WRITE_ZEROES,
    allocated,
    disk,
    header,
    pattern,
    segment,
)
from vhostsock import UsageError
from vhostsock.devices.blk import Blk
from vhostsock.proto.wire import BackendRequest
from vhostsock.testing.packed import PackedQueue

RINGS = pytest.mark.parametrize("ring", [{}, {"accept": ~0}], ids=["split", "packed"])


@RINGS
@in_loop
async def test_reads_and_writes_are_of_the_image(ring: dict[str, Any], tmp_path: Path) -> None:
    async with disk(tmp_path, frontend=ring) as d:
        assert isinstance(d.frontend.queues[0], PackedQueue) == bool(ring)
        image = d.image.read_bytes()
        assert await d.read(0, SECTORS) == image
        assert await d.read(5, 1) == image[5 * SECTOR : 6 * SECTOR]
        assert await d.write(3, b"w" * 2 * SECTOR) == OK
        assert await d.read(2, 4) == image[2 * SECTOR : 3 * SECTOR] + b"w" * 2 * SECTOR + image[5 * SECTOR : 6 * SECTOR]
        assert d.image.read_bytes() == image[: 3 * SECTOR] + b"w" * 2 * SECTOR + image[5 * SECTOR :]


def cut(data: bytes, *at: int) -> list[bytes]:
    return [data[i:j] for i, j in zip((0, *at), (*at, len(data)), strict=True)]


@RINGS
@pytest.mark.parametrize("indirect", [False, True])
@in_loop
async def test_buffers_may_begin_and_end_anywhere(indirect: bool, ring: dict[str, Any], tmp_path: Path) -> None:
    async with disk(tmp_path, frontend=ring) as d:
        image, new = d.image.read_bytes(), pattern(2 * SECTOR, 7)
        for pieces in ([1025], [1, 1024], [512, 513], [511, 1, 1, 511, 1], [100] * 10 + [25]):
            for at in ((16,), (1,), (4, 8), ()):
                done = await d.request(cut(header(IN, 4), *at), pieces, indirect=indirect)
                assert done.data == image[4 * SECTOR : 6 * SECTOR] + bytes([OK])
        whole = header(OUT, 4) + new
        for cuts in ([], [16], [15], [17, 18], [1, 500, 528], range(100, 1000, 100)):
            done = await d.request(cut(whole, *cuts), [1], indirect=indirect)
            assert done.data == bytes([OK])
            assert d.image.read_bytes()[4 * SECTOR : 6 * SECTOR] == new
            assert await d.write(4, bytes(2 * SECTOR)) == OK


@in_loop
async def test_a_request_may_have_more_buffers_than_one_system_call_takes(tmp_path: Path) -> None:
    """1024 descriptors make up to 2048 pieces when regions meet in the middle of buffers; here 1022 pieces of a byte or two."""
    async with disk(tmp_path, frontend={"size": 1024}) as d:
        image = d.image.read_bytes()
        pieces = [1] * 1000 + [24, 1]
        done = await d.request([header(IN, 8)], pieces)
        assert done.data == image[8 * SECTOR : 10 * SECTOR] + bytes([OK])
        data = pattern(2 * SECTOR, 3)
        assert await d.status([header(OUT, 8), *cut(data, *range(1, 1000))]) == OK
        assert await d.read(8, 2) == data


@in_loop
async def test_a_buffer_across_memory_regions_is_read_and_written_whole(tmp_path: Path) -> None:
    async with disk(tmp_path, frontend={"memory": (1 << 20, 1 << 20)}) as d:
        memory, queue = d.frontend.memory, d.frontend.queues[0]
        image, middle = d.image.read_bytes(), memory.regions[1].gpa
        for gpa in (middle - 700, middle - 1024):
            sent = queue.add([header(IN, 1)], [1024, 1], indirect=False)
            queue.write_desc(sent._descs[1], gpa, 1024, 3, sent._descs[2])
            queue.publish()
            queue.kick()
            await queue.wait_async()
            assert memory.read(gpa, 1024) == image[SECTOR : 3 * SECTOR]


@in_loop
async def test_get_id_gives_the_serial_padded_with_zeros(tmp_path: Path) -> None:
    async with disk(tmp_path, serial="serial-0123") as d:
        done = await d.request([header(GET_ID)], [20, 1])
        assert done.data == b"serial-0123".ljust(20, b"\0") + bytes([OK])
    async with disk(tmp_path, serial="x" * 20) as d:
        assert (await d.request([header(GET_ID)], [7, 13, 1])).data == b"x" * 20 + bytes([OK])


@RINGS
@in_loop
async def test_discard_gives_space_back_and_the_rest_stays(ring: dict[str, Any], tmp_path: Path) -> None:
    data = pattern(1 << 20)
    async with disk(tmp_path, data, frontend=ring) as d:
        d.sync()  # delayed allocation
        before = allocated(d.image)
        segments = segment(256, 256) + segment(1024, 512)
        assert await d.status([header(DISCARD), segments]) == OK
        assert allocated(d.image) == before - 768 * SECTOR
        assert d.image.stat().st_size == len(data)
        image = d.image.read_bytes()
        for start, end in ((0, 256), (512, 1024), (1536, 2048)):
            assert image[start * SECTOR : end * SECTOR] == data[start * SECTOR : end * SECTOR]


@pytest.mark.parametrize("flags", [0, UNMAP])
@in_loop
async def test_write_zeroes_zeroes_those_sectors_and_unmap_may_free_them(flags: int, tmp_path: Path) -> None:
    data = pattern(1 << 20)
    async with disk(tmp_path, data) as d:
        d.sync()
        before = allocated(d.image)
        assert await d.status([header(WRITE_ZEROES), segment(7, 1, flags) + segment(16, 1024, flags)]) == OK
        image = d.image.read_bytes()
        want = bytearray(data)
        for start, count in ((7, 1), (16, 1024)):
            want[start * SECTOR : (start + count) * SECTOR] = bytes(count * SECTOR)
        assert image == bytes(want)
        assert (allocated(d.image) < before) == bool(flags)


@in_loop
async def test_write_zeroes_writes_them_where_the_file_system_cannot_make_them() -> None:
    """tmpfs has no FALLOC_FL_ZERO_RANGE."""
    shm = Path("/dev/shm")
    folder = shm / f"vhostsock-blk-{os.getpid()}"
    folder.mkdir()
    data = pattern(3 << 20)
    try:
        async with disk(folder, data) as d:
            assert await d.status([header(WRITE_ZEROES), segment(1, 5000)]) == OK
            assert d.image.read_bytes() == data[:SECTOR] + bytes(5000 * SECTOR) + data[5001 * SECTOR :]
    finally:
        (folder / "image").unlink(missing_ok=True)
        folder.rmdir()


@in_loop
async def test_every_queue_serves_the_whole_disk(tmp_path: Path) -> None:
    async with disk(tmp_path, num_queues=4) as d:
        for queue in range(4):
            assert await d.write(queue, bytes([queue]) * SECTOR, queue) == OK
        for queue in range(4):
            assert await d.read(0, 4, queue) == b"".join(bytes([n]) * SECTOR for n in range(4))


@in_loop
async def test_a_read_only_disk_refuses_every_change_and_reads(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(pattern(SECTORS * SECTOR))
    async with disk(tmp_path, read_only=True) as d:
        image = d.image.read_bytes()
        assert d.frontend.offered >> 5 & 1  # VIRTIO_BLK_F_RO
        assert await d.write(0, bytes(SECTOR)) == 1
        assert await d.status([header(DISCARD), segment(0, 8)]) == 1
        assert await d.status([header(WRITE_ZEROES), segment(0, 8)]) == 1
        assert await d.status([header(FLUSH)]) == OK
        assert await d.read(0, SECTORS) == image == d.image.read_bytes()


@in_loop
async def test_config_space_describes_the_disk(tmp_path: Path) -> None:
    async with disk(tmp_path, bytes(100 * 4096 + 700), num_queues=3, block_size=4096, seg_max=62) as d:
        config = await d.config()
        want = {"capacity": 800, "blk_size": 4096, "seg_max": 62, "num_queues": 3, "writeback": 1, "may_unmap": 1}
        assert {name: config[name] for name in want} == want
        assert config["blk_size"] << config["exponent"] == config["min_io"] * config["blk_size"] == os.stat(d.image).st_blksize
        assert config["discard_seg"] == config["zeroes_seg"] == 16
        assert await d.frontend.read_config(34, 2) == struct.pack("<H", 3)
        for bit in (2, 6, 9, 10, 12, 13, 14):  # SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES
            assert d.frontend.offered >> bit & 1
        assert not d.frontend.offered >> 11 & 1  # CONFIG_WCE


@in_loop
async def test_an_image_that_grew_is_announced_and_served_to_its_new_end(tmp_path: Path) -> None:
    async with disk(tmp_path) as d:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, d.device.reload)
        try:
            assert await d.write(SECTORS, bytes(SECTOR)) == 1
            os.truncate(d.image, 2 * SECTORS * SECTOR)
            os.kill(os.getpid(), signal.SIGHUP)
            assert await d.frontend.backend_request() == BackendRequest.CONFIG_CHANGE_MSG
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
        assert (await d.config())["capacity"] == 2 * SECTORS
        assert await d.write(2 * SECTORS - 1, b"e" * SECTOR) == OK
        assert d.image.read_bytes()[-SECTOR:] == b"e" * SECTOR


@in_loop
async def test_an_image_that_shrank_fails_the_reads_behind_its_end_with_zeros(tmp_path: Path) -> None:
    async with disk(tmp_path) as d:
        os.truncate(d.image, 64 * SECTOR)
        assert await d.read(63, 1) == d.image.read_bytes()[-SECTOR:]
        driver = d.frontend.queues[0]
        sent = driver.add([header(IN, 60)], [8 * SECTOR, 1])
        d.frontend.memory.write(sent.writable[0][0], b"\xaa" * 8 * SECTOR)
        driver.publish()
        driver.kick()
        [done] = await driver.wait_async()
        assert done.data == bytes(8 * SECTOR) + b"\1"
        d.device.reload()
        assert (await d.config())["capacity"] == 64


@in_loop
async def test_requests_survive_a_pause_and_a_reboot(tmp_path: Path) -> None:
    async with disk(tmp_path, num_queues=2) as d:
        for round_ in range(4):
            assert await d.write(round_, bytes([round_]) * SECTOR, round_ % 2) == OK
            if round_ == 2:
                await d.frontend.reboot()
            else:
                await d.frontend.pause()
                await d.frontend.resume()
            assert await d.read(round_, 1) == bytes([round_]) * SECTOR


@pytest.mark.parametrize(
    "wrong",
    [{"num_queues": 0}, {"num_queues": 257}, {"serial": "x" * 21}, {"serial": "é"}, {"block_size": 513}, {"seg_max": 0}],
)
def test_what_cannot_be_served_is_refused_at_once(wrong: dict[str, Any], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SECTOR))
    with pytest.raises(UsageError):
        Blk(image, **wrong)


def test_an_image_must_be_there_and_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Blk(tmp_path / "no")
    with pytest.raises(UsageError, match="neither a file nor a block device"):
        Blk("/dev/null")


