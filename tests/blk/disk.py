"""What the tests of the disk share: an image, and a driver that speaks virtio-blk (virtio 1.3, 5.2.6)."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from vhostsock.devices.blk import Blk
from vhostsock.testing.driver import Request
from vhostsock.testing.frontend import Frontend, attach

SECTOR = 512
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
SECTORS = 128


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class Disk:
    """A driver of the disk behind ``frontend``. Every method waits for its request, alone on the queue."""

    def __init__(self, frontend: Frontend, image: Path, device: Blk) -> None:
        self.frontend = frontend
        self.image = image
        self.device = device

    async def request(
        self, readable: Sequence[bytes], writable: Sequence[int] = (1,), queue: int = 0, **options: Any
    ) -> Request:
        driver = self.frontend.queues[queue]
        sent = driver.submit(readable, writable, **options)
        [done] = await driver.wait_async()
        assert done is sent
        return done

    async def status(self, readable: Sequence[bytes], writable: Sequence[int] = (1,), queue: int = 0) -> int:
        """The status; the reported length must cover it."""
        done = await self.request(readable, writable, queue)
        assert done.written == done.room
        return done.data[-1]

    async def read(self, sector: int, sectors: int, queue: int = 0) -> bytes:
        done = await self.request([header(IN, sector)], [sectors * SECTOR, 1], queue)
        assert done.data[-1] == OK
        return done.data[:-1]

    async def write(self, sector: int, data: bytes, queue: int = 0) -> int:
        return await self.status([header(OUT, sector), data], [1], queue)

    def sync(self) -> None:
        with self.image.open("rb") as file:
            os.fdatasync(file.fileno())

    async def config(self) -> dict[str, int]:
        """The fields of the config space by name (5.2.4)."""
        names = ("capacity size_max seg_max blk_size exponent alignment min_io opt_io writeback num_queues "
                 "max_discard discard_seg discard_align max_zeroes zeroes_seg may_unmap")  # fmt: skip
        data = await self.frontend.read_config(0, 60)
        return dict(zip(names.split(), struct.unpack("<QII4xIBBHIBxHIIIIIB3x", data), strict=True))



@contextlib.asynccontextmanager
async def disk(
    folder: Path, data: bytes | None = None, *, frontend: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Disk]:
    """A disk with these contents (``SECTORS`` of a pattern by default), attached and started; ``options`` are Blk's."""
    image = folder / "image"
    image.write_bytes(pattern(SECTORS * SECTOR) if data is None else data)
    device = Blk(image, **options)
    try:
        async with attach(device, **(frontend or {})) as attached:
            yield Disk(attached, image, device)
    finally:
        device.close()


def allocated(path: Path) -> int:
    """Bytes that the file takes on its file system."""
    return os.stat(path).st_blocks * 512
