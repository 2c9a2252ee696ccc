"""More than one back-end for an image: one that takes over from one that was killed, a migration's two ends, and rivals."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.blk.disk import FLUSH, IN, OK, OUT, SECTOR, SECTORS, Disk, disk, header, pattern
from vhostsock.devices.blk import Blk
from vhostsock.proto import Request, VirtioFeature, wire
from vhostsock.testing.frontend import BackendGone, Frontend, attach

PAGE = 4096  # of the dirty log, whatever the host's are


class Process:
    """`vhostsock serve blk` on a connection of its own; the image and the front-end live longer."""

    def __init__(self, image: Path) -> None:
        self.sock, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "vhostsock", "serve", "blk", "--image", str(image), "--fd", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.mark.parametrize("accept", [~VirtioFeature.RING_PACKED, ~0], ids=["split", "packed"])
@in_loop
async def test_every_request_ends_once_though_its_back_end_is_killed(accept: int, tmp_path: Path) -> None:
    """Each writes its own sector, so the image tells whether it was carried out, and the ring whether it was answered twice."""
    image = tmp_path / "image"
    image.write_bytes(bytes(SECTORS * SECTOR))
    process = Process(image)
    try:
        async with Frontend(process.sock, size=128, accept=accept, config=True, track=True) as frontend:
            await frontend.handshake()
            await frontend.start()
            [queue] = frontend.queues
            ended = 0
            for round_ in (1, 2):
                sent = 0
                for sector in range(60):
                    queue.submit([header(OUT, sector), bytes([round_ * 64 + sector]) * SECTOR], [1])
                    queue.submit([header(FLUSH)], [1])
                    sent += 2
                done = await queue.wait_async(5)  # the others are under way, or were not taken yet
                process.kill()
                await frontend.ended()
                process = Process(image)
                await frontend.reconnect(process.sock)
                done += await queue.wait_async(sent - len(done))
                assert [request.data for request in done] == [bytes([OK])] * sent
                assert image.read_bytes()[: 60 * SECTOR] == b"".join(bytes([round_ * 64 + n]) * SECTOR for n in range(60))
                ended += sent
            assert queue.in_flight == 0
            assert ended == 240
    finally:
        process.kill()
        process.sock.close()


@in_loop
async def test_every_page_that_the_disk_wrote_is_marked_for_a_migration_and_no_other(tmp_path: Path) -> None:
    async with disk(tmp_path, pattern(SECTORS * SECTOR)) as d:
        frontend, memory = d.frontend, d.frontend.memory
        await d.read(0, 8)
        fd = os.memfd_create("log")
        os.ftruncate(fd, 0x9000)
        with mmap.mmap(fd, 0x9000) as log:
            value = {"size": 0x9000, "offset": 0}
            await frontend.request(Request.SET_LOG_BASE, wire.LOG, value, fds=[fd], reply=wire.U64)
            await frontend.request(Request.SET_FEATURES, wire.U64, frontend.features | VirtioFeature.LOG_ALL)
            # ends in the middle of a page, with the status in a page of its own
            queue = frontend.queues[0]
            sent = queue.submit([header(IN, 3)], [3 * PAGE + SECTOR, 1])
            written = {gpa + at for gpa, size in sent.writable for at in range(0, size, PAGE)}
            [done] = await queue.wait_async()
            assert done.data[-1] == OK
            assert marked(log) == {gpa // PAGE for gpa in written}
            # a write writes its status alone, a read that fails all its room
            log[:] = bytes(len(log))
            sent = queue.submit([header(OUT, 0), bytes(SECTOR)], [1])
            await queue.wait_async()
            assert marked(log) == {sent.writable[0][0] // PAGE}
            log[:] = bytes(len(log))
            sent = queue.submit([header(IN, SECTORS)], [4 * PAGE, 1])
            await queue.wait_async()
            assert marked(log) == {gpa // PAGE + at // PAGE for gpa, size in sent.writable for at in range(0, size, PAGE)}
            assert memory.read(sent.writable[0][0], 4 * PAGE) == bytes(4 * PAGE)
        os.close(fd)


@in_loop
async def test_an_image_is_locked_while_a_guest_runs_and_no_longer(tmp_path: Path) -> None:
    async with disk(tmp_path) as first:
        await first.read(0, 1)
        for options, served in ({}, False), ({"read_only": True}, False), ({"shared": True}, True):
            device = Blk(first.image, **options)  # type: ignore[arg-type]
            async with attach(device, started=False) as frontend:
                if served:
                    await frontend.start()
                    assert len(await Disk(frontend, first.image, device).read(0, 1)) == SECTOR
                else:
                    with contextlib.suppress(BackendGone, ConnectionError):  # the session may end before the last message
                        await frontend.start()
                    await frontend.ended()
            device.close()
        await first.frontend.pause()  # as at the end of a migration
        device = Blk(first.image)
        async with attach(device) as frontend:
            assert len(await Disk(frontend, first.image, device).read(0, 1)) == SECTOR
        device.close()
        await first.frontend.resume()
        await first.read(0, 1)


@in_loop
async def test_guests_that_only_read_share_an_image(tmp_path: Path) -> None:
    async with disk(tmp_path, read_only=True) as first:
        device = Blk(first.image, read_only=True)
        async with attach(device) as frontend:
            assert await Disk(frontend, first.image, device).read(0, 1) == await first.read(0, 1)
        device.close()


def marked(log: mmap.mmap) -> set[int]:
    """The pages that the log marks."""
    return {8 * at + bit for at, byte in enumerate(log[:]) if byte for bit in range(8) if byte >> bit & 1}
