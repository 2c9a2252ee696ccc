# SPDX-License-Identifier: BSD-3-Clause
"""Shared objects (dma-bufs by name) and shared memory regions."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import uuid
from collections.abc import Iterator

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from vhostsock import UsageError
from vhostsock.offers import session_config
from vhostsock.proto import ProtocolFeature, Request, wire
from vhostsock.proto.wire import BackendRequest
from vhostsock.testing.frontend import QEMU_11_1, BackendGone, Dialect, Frontend, attach

PAGE = mmap.PAGESIZE
NAME, OTHER = uuid.UUID(int=1 << 96), uuid.UUID(int=2)


@contextlib.contextmanager
def memfd(content: bytes = b"") -> Iterator[int]:
    fd = os.memfd_create("object")
    os.write(fd, content)
    try:
        yield fd
    finally:
        os.close(fd)


class Exporter(Upper):
    shared_objects = True

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd

    def shared_object(self, name: uuid.UUID) -> int | None:
        return self.fd if name == NAME else None


class Screen(Upper):
    shmem = {0: 4 * PAGE, 3: PAGE}  # noqa: RUF012


async def acked(frontend: Frontend, task: asyncio.Task[None], request: BackendRequest) -> dict[str, int]:
    """What the front-end is sent for a mapping; it answers with success."""
    assert frontend.channel
    message = await frontend.channel.acknowledge(request)
    await task
    message.close()
    return {key: message.value[key] for key in ("shmid", "shm_offset", "len", "fd_offset", "flags")}


# ---- objects


@in_loop
async def test_a_shared_object_is_handed_out_by_its_name() -> None:
    with memfd(b"pixels") as fd:
        async with attach(Exporter(fd)) as frontend:
            for _ in range(3):  # the device's descriptor stays its own
                got = await frontend.shared_object(NAME)
                assert got is not None
                assert os.pread(got, 6, 0) == b"pixels"
                os.close(got)
            assert await frontend.shared_object(OTHER) is None
            frontend.queues[0].submit([b"x"], [1])
            await frontend.queues[0].wait_async()


@in_loop
async def test_a_device_whose_object_is_no_descriptor_loses_the_request_and_not_the_session() -> None:
    async with attach(Exporter(-1)) as frontend:
        assert await frontend.shared_object(NAME) is None
        await frontend.settled()


@in_loop
async def test_a_name_is_on_the_wire_as_the_standard_writes_it() -> None:
    device = Exporter(-1)
    async with attach(device) as frontend:
        assert frontend.channel
        task = asyncio.create_task(device.share_object(uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")))
        message = await frontend.channel.acknowledge(BackendRequest.SHARED_OBJECT_ADD)
        await task
        assert message.value.uuid == bytes.fromhex("00112233445566778899aabbccddeeff")


@in_loop
async def test_another_device_is_asked_for_no_objects() -> None:
    assert not session_config(Upper()).protocol_features & ProtocolFeature.SHARED_OBJECT
    async with attach(Upper()) as frontend:
        await frontend.request(Request.GET_SHARED_OBJECT, wire.UUID, {"uuid": bytes(16)})
        with pytest.raises(BackendGone):
            await frontend.settled()


# ---- memory


@in_loop
async def test_the_front_end_learns_the_sizes_of_the_regions() -> None:
    async with attach(Screen(), started=False) as frontend:
        assert await frontend.shmem_sizes() == {0: 4 * PAGE, 3: PAGE}


@in_loop
async def test_a_device_maps_and_unmaps_whole_pages() -> None:
    device = Screen()
    async with attach(device) as frontend:
        with memfd() as fd:
            task = asyncio.create_task(device.shmem_map(0, PAGE, 2 * PAGE, fd, fd_offset=PAGE, writable=False))
            sent = await acked(frontend, task, BackendRequest.SHMEM_MAP)
        assert sent == {"shmid": 0, "shm_offset": PAGE, "len": 2 * PAGE, "fd_offset": PAGE, "flags": 0}
        task = asyncio.create_task(device.shmem_unmap(0, PAGE, 2 * PAGE))
        sent = await acked(frontend, task, BackendRequest.SHMEM_UNMAP)
        assert sent == {"shmid": 0, "shm_offset": PAGE, "len": 2 * PAGE, "fd_offset": 0, "flags": 0}


@in_loop
async def test_a_mapping_that_cannot_be_is_never_sent() -> None:
    device = Screen()
    async with attach(device) as frontend:
        with memfd() as fd:
            await acked(frontend, asyncio.create_task(device.shmem_map(0, PAGE, PAGE, fd)), BackendRequest.SHMEM_MAP)
            for shmid, offset, size, why in (
                (1, 0, PAGE, "there is no shared memory region 1"),
                (0, PAGE, PAGE, "overlaps"),
                (0, 0, 2 * PAGE, "overlaps"),
                (0, 0, 4 * PAGE, "overlaps"),
                (0, 4 * PAGE, PAGE, "outside"),
                (3, 0, 2 * PAGE, "outside"),
                (0, 2 * PAGE, PAGE - 1, "whole pages"),
                (0, 2 * PAGE, 0, "whole pages"),
                (0, 2 * PAGE + 1, PAGE, "whole pages"),
                (0, -PAGE, PAGE, "whole pages"),
            ):
                with pytest.raises(UsageError, match=why):
                    await device.shmem_map(shmid, offset, size, fd)
            for offset, size in ((0, PAGE), (PAGE, 2 * PAGE), (0, 2 * PAGE)):
                with pytest.raises(UsageError, match="nothing is mapped"):
                    await device.shmem_unmap(0, offset, size)
            await acked(frontend, asyncio.create_task(device.shmem_map(0, 0, PAGE, fd)), BackendRequest.SHMEM_MAP)


@in_loop
async def test_a_mapping_that_the_front_end_refused_leaves_its_place_free() -> None:
    device = Screen()
    async with attach(device) as frontend:
        assert frontend.channel
        with memfd() as fd:
            task = asyncio.create_task(device.shmem_map(3, 0, PAGE, fd))
            (await frontend.channel.receive()).close()
            await frontend.channel.answer(BackendRequest.SHMEM_MAP, 1)
            await asyncio.wait([task])
            error = task.exception()
            assert isinstance(error, OSError)
            assert error.errno == errno.EREMOTEIO
            await acked(frontend, asyncio.create_task(device.shmem_map(3, 0, PAGE, fd)), BackendRequest.SHMEM_MAP)


@pytest.mark.parametrize("how", ["reset_device", "reboot"])
@in_loop
async def test_a_reset_unmaps_everything(how: str) -> None:
    device = Screen()
    async with attach(device) as frontend:
        with memfd() as fd:
            await acked(frontend, asyncio.create_task(device.shmem_map(3, 0, PAGE, fd)), BackendRequest.SHMEM_MAP)
            await getattr(frontend, how)()
            await acked(frontend, asyncio.create_task(device.shmem_map(3, 0, PAGE, fd)), BackendRequest.SHMEM_MAP)


@in_loop
async def test_a_descriptor_is_sent_only_to_a_front_end_that_agreed_to_get_some() -> None:
    less = Dialect("less", QEMU_11_1.protocol_mask & ~ProtocolFeature.BACKEND_SEND_FD, True, True, False)
    device = Screen()
    async with attach(device, dialect=less):
        with memfd() as fd, pytest.raises(OSError, match="did not negotiate BACKEND_SEND_FD"):
            await device.shmem_map(0, 0, PAGE, fd)


@pytest.mark.parametrize("sizes", [{256: PAGE}, {-1: PAGE}, {0: PAGE + 1}, {0: 0}, {0: 1 << 63}])
def test_regions_that_cannot_be_are_the_device_authors_mistake(sizes: dict[int, int]) -> None:
    device = Screen()
    device.shmem = sizes
    with pytest.raises(UsageError, match="shared memory region"):
        session_config(device)


@in_loop
async def test_without_a_front_end_nothing_can_be_mapped() -> None:
    with pytest.raises(OSError, match="no front-end is connected"):
        await Screen().shmem_map(0, 0, PAGE, 0)
