"""Drivers that break the rules of virtio-blk: each gets the status it deserves, and nothing of the image changes."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.blk.disk import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OUT,
    SECTOR,
    SECTORS,
    UNMAP,
    UNSUPP,
    WRITE_ZEROES,
    disk,
    header,
    segment,
)
from vhostsock.testing.driver import DESC_NEXT, DESC_WRITE

D = bytes(SECTOR)
LAST = SECTORS - 1

BAD: dict[str, tuple[int, Sequence[bytes], Sequence[int]]] = {
    # name: (status, readable, writable)
    "read behind the end": (IOERR, [header(IN, SECTORS)], [SECTOR, 1]),
    "read across the end": (IOERR, [header(IN, LAST)], [2 * SECTOR, 1]),
    "read at the last sector number": (IOERR, [header(IN, 2**64 - 1)], [SECTOR, 1]),
    "read whose end wraps to zero": (IOERR, [header(IN, 2**64 - 1)], [2 * SECTOR, 1]),
    "read whose offset in bytes wraps": (IOERR, [header(IN, 2**55)], [SECTOR, 1]),
    "read of half a sector": (IOERR, [header(IN, 0)], [256, 1]),
    "read of a sector and a byte": (IOERR, [header(IN, 0)], [SECTOR + 1, 1]),
    "write behind the end": (IOERR, [header(OUT, SECTORS), D], [1]),
    "write across the end": (IOERR, [header(OUT, LAST), D, D], [1]),
    "write whose end wraps": (IOERR, [header(OUT, 2**64 - 1), D, D], [1]),
    "write of a byte": (IOERR, [header(OUT, 0), b"x"], [1]),
    "write with room for data": (IOERR, [header(OUT, 0), D], [SECTOR, 1]),
    "header of 15 bytes": (IOERR, [header(OUT, 0)[:15]], [1]),
    "header of 15 bytes and room": (IOERR, [header(IN, 0)[:15]], [SECTOR, 1]),
    "no header": (IOERR, [], [SECTOR, 1]),
    "unknown type": (UNSUPP, [header(99), D], [1]),
    "unknown type with room": (UNSUPP, [header(0x80000000)], [100, 1]),
    "secure erase, which is not offered": (UNSUPP, [header(14), segment(0, 1)], [1]),
    "flush with room for data": (IOERR, [header(FLUSH)], [7, 1]),
    "id with too little room": (IOERR, [header(GET_ID)], [19, 1]),
    "id with too much room": (IOERR, [header(GET_ID)], [21, 1]),
    "discard without segments": (IOERR, [header(DISCARD)], [1]),
    "discard with half a segment": (IOERR, [header(DISCARD), segment(0, 1)[:8]], [1]),
    "discard with 17 segments": (IOERR, [header(DISCARD), segment(0, 1) * 17], [1]),
    "discard behind the end": (IOERR, [header(DISCARD), segment(SECTORS, 1)], [1]),
    "discard whose end wraps": (IOERR, [header(DISCARD), segment(2**64 - 1, 1)], [1]),
    "discard of good and bad": (IOERR, [header(DISCARD), segment(0, 8) + segment(LAST, 2)], [1]),
    "discard of too much": (IOERR, [header(DISCARD), segment(0, 2**32 - 1)], [1]),
    "discard with unmap": (UNSUPP, [header(DISCARD), segment(0, 8, UNMAP)], [1]),
    "zeroes with an unknown flag": (UNSUPP, [header(WRITE_ZEROES), segment(0, 8, 2)], [1]),
    "zeroes of good and bad": (IOERR, [header(WRITE_ZEROES), segment(0, 8) + segment(SECTORS, 1)], [1]),
    "zeroes of good and unknown": (UNSUPP, [header(WRITE_ZEROES), segment(0, 8) + segment(0, 1, 4)], [1]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@in_loop
async def test_bad_requests_get_their_status_and_change_nothing(packed: bool, tmp_path: Path) -> None:
    async with disk(tmp_path, frontend={"accept": ~0} if packed else {}) as d:
        image, driver = d.image.read_bytes(), d.frontend.queues[0]
        for name, (status, readable, writable) in BAD.items():
            sent = driver.add(readable, writable)
            for gpa, size in sent.writable:
                d.frontend.memory.write(gpa, b"\xaa" * size)
            driver.publish()
            driver.kick()
            [done] = await driver.wait_async()
            assert done.data == bytes(done.room - 1) + bytes([status]), name
            assert d.image.read_bytes() == image, name
        assert await d.read(0, SECTORS) == image
        refused = [status for status, _, _ in BAD.values()]
        assert (d.device.counts["errors"], d.device.counts["unsupported"]) == (refused.count(IOERR), refused.count(UNSUPP))


@in_loop
async def test_a_request_without_room_for_a_status_breaks_the_ring(tmp_path: Path) -> None:
    async with disk(tmp_path, num_queues=2) as d:
        image, driver = d.image.read_bytes(), d.frontend.queues[0]
        for _ in range(3):
            driver.add([header(IN, 0)], [SECTOR, 1])
        driver.add([header(OUT, 0), b"x" * SECTOR])
        driver.submit([header(IN, 1)], [SECTOR, 1])
        while not driver._take(driver.err_fd):
            await d.frontend.settled()
        assert await d.read(0, SECTORS, queue=1) == image  # the other queue goes on
        await d.frontend.reboot()
        assert await d.read(0, SECTORS) == image


@in_loop
async def test_the_status_may_be_in_a_region_that_is_truncated_meanwhile(tmp_path: Path) -> None:
    """The session ends, and the next one is served."""
    async with disk(tmp_path, frontend={"memory": (1 << 20, 1 << 16)}) as d:
        memory, driver = d.frontend.memory, d.frontend.queues[0]
        gone = memory.regions[1]
        sent = driver.add([header(IN, 0)], [SECTOR, 1], indirect=False)
        driver.write_desc(sent._descs[2], gone.gpa + 5, 1, DESC_WRITE)
        os.ftruncate(gone.fd, 0)
        driver.publish()
        driver.kick()
        await d.frontend.ended()


@in_loop
async def test_data_in_a_region_that_was_truncated_fail_that_request_or_end_the_session(tmp_path: Path) -> None:
    """What the kernel finds is EFAULT; clearing the buffer afterwards finds the memory gone for good."""
    async with disk(tmp_path, frontend={"memory": (1 << 20, 1 << 16)}) as d:
        memory, driver, image = d.frontend.memory, d.frontend.queues[0], d.image.read_bytes()
        gone = memory.regions[1]
        sent = driver.add([header(OUT, 0), bytes(SECTOR)], [1], indirect=False)
        driver.write_desc(sent._descs[1], gone.gpa, SECTOR, DESC_NEXT, sent._descs[2])
        os.ftruncate(gone.fd, 0)
        driver.publish()
        driver.kick()
        [done] = await driver.wait_async()
        assert done.data == bytes([IOERR])
        sent = driver.add([header(IN, 0)], [SECTOR, 1], indirect=False)
        driver.write_desc(sent._descs[1], gone.gpa, SECTOR, DESC_NEXT | DESC_WRITE, sent._descs[2])
        driver.publish()
        driver.kick()
        await d.frontend.ended()
        assert d.image.read_bytes() == image


@in_loop
async def test_a_front_end_that_leaves_with_everything_in_flight_leaves_nothing_behind(tmp_path: Path) -> None:
    async with disk(tmp_path, num_queues=4) as d:
        for driver in d.frontend.queues:
            while driver.free >= 3:
                driver.submit([header(OUT, 0), D], [1])
    assert d.device._under_way == [0] * 4


@in_loop
async def test_config_cannot_be_written(tmp_path: Path) -> None:
    async with disk(tmp_path) as d:
        before = await d.config()
        with pytest.raises(Exception, match="SET_CONFIG"):
            await d.frontend.write_config(32, struct.pack("<B", 0))
        assert await d.config() == before
