# SPDX-License-Identifier: BSD-3-Clause
"""Drivers behind an IOMMU: IOTLB_MSG both ways. The addresses they use are not those that the memory regions have."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from typing import Any

import pytest

from tests.aio import in_loop
from tests.device.devices import Gate, Upper
from vhostsock.offers import session_config
from vhostsock.proto import ProtocolFeature, Request, VirtioFeature, wire
from vhostsock.testing.frontend import QEMU_11_1, BackendGone, Dialect, Frontend, Refused, attach
from vhostsock.testing.iommu import SHIFT, Iommu

PAGE = mmap.PAGESIZE
ROOM = 1 << 22
NOWHERE = 1 << 50  # in no memory region


class Behind(Upper):
    iommu = True


class GateBehind(Gate):
    iommu = True


def behind(device: Any, **options: Any) -> contextlib.AbstractAsyncContextManager[Frontend]:
    return attach(device, iommu=True, **options)


def iommu_of(frontend: Frontend) -> Iommu:
    assert frontend.iommu
    return frontend.iommu


async def answered(frontend: Frontend, text: bytes = b"ping", index: int = 0) -> None:
    queue = frontend.queues[index]
    submitted = queue.submit([text], [len(text)])
    while submitted.written is None:
        await queue.wait_async()
    assert submitted.data == text.upper()


@pytest.mark.parametrize("accept", [~VirtioFeature.RING_PACKED, ~0], ids=["split", "packed"])
@in_loop
async def test_rings_and_requests_behind_an_iommu(accept: int) -> None:
    device = Behind()
    device.packed = True
    async with behind(device, accept=accept) as frontend:
        assert frontend.features & VirtioFeature.ACCESS_PLATFORM
        for number in range(100):
            await answered(frontend, b"request %d" % number)
        asked = iommu_of(frontend).misses
        assert len(asked) == len(set(asked)), "nothing was asked twice"
        await answered(frontend, bytes(range(65, 91)) * 3000)  # over many pages


@in_loop
async def test_nothing_is_asked_for_without_an_iommu() -> None:
    async with attach(Behind()) as frontend:
        assert not frontend.features & VirtioFeature.ACCESS_PLATFORM
        await answered(frontend)


@in_loop
async def test_a_ring_whose_memory_is_not_known_yet_holds_up_no_other() -> None:
    async with behind(Behind(2)) as frontend:
        iommu = iommu_of(frontend)
        await answered(frontend, index=0)
        await answered(frontend, index=1)
        # a buffer in pages that were never used: the question stays open
        large = frontend.memory.alloc(8 * PAGE)
        frontend.memory.write(large, b"late")
        iommu.asked.clear()
        iommu.hold()
        queue = frontend.queues[0]
        queue.write_desc(queue.num - 1, large, 4)
        queue.offer(queue.num - 1)
        queue.publish()
        queue.kick()
        await iommu.asked.wait()
        assert iommu.misses[-1] == (large, 1)
        for _ in range(10):
            await answered(frontend, index=1)
        used = queue.used_idx
        iommu.release()
        while queue.used_idx == used:
            await frontend.settled()


@in_loop
async def test_what_is_in_no_page_table_breaks_the_ring_that_refers_to_it() -> None:
    async with behind(Behind(2)) as frontend:
        await answered(frontend, index=0)
        await _breaks_at(frontend, NOWHERE)
        assert iommu_of(frontend).misses[-1] == (NOWHERE, 1)
        await answered(frontend, index=1)


@pytest.mark.parametrize(("perm", "flags", "wanted"), [(1, 2, 2), (2, 0, 1)], ids=["writing", "reading"])
@in_loop
async def test_what_may_not_be_accessed_is_not_accessed(perm: int, flags: int, wanted: int) -> None:
    async with behind(Behind()) as frontend:
        page = frontend.memory.alloc(PAGE)
        iommu_of(frontend).denied[page] = perm
        queue = frontend.queues[0]
        queue.write_desc(queue.num - 1, page, 4, flags)
        queue.offer(queue.num - 1)
        queue.publish()
        queue.kick()
        await _broken(frontend, 0)
        assert (page, wanted) in iommu_of(frontend).misses
        assert frontend.memory.read(page, 4) == bytes(4)


async def _breaks_at(frontend: Frontend, iova: int) -> None:
    """Ring 0 breaks when it refers to four bytes at ``iova``."""
    queue = frontend.queues[0]
    queue.write_desc(queue.num - 1, iova, 4)
    queue.offer(queue.num - 1)
    queue.publish()
    queue.kick()
    await _broken(frontend, 0)


async def _broken(frontend: Frontend, index: int) -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(frontend.queues[index].err_fd, told.set)
    await told.wait()
    loop.remove_reader(frontend.queues[index].err_fd)


@in_loop
async def test_an_indirect_table_is_translated_too() -> None:
    async with behind(Behind()) as frontend:
        queue = frontend.queues[0]
        submitted = queue.submit([b"a", b"b", b"c"], [3], indirect=True)
        while submitted.written is None:
            await queue.wait_async()
        assert submitted.data == b"ABC"


@in_loop
async def test_an_invalidated_ring_stands_still_and_goes_on_when_it_is_mapped_again() -> None:
    async with behind(Behind()) as frontend:
        iommu, queue = iommu_of(frontend), frontend.queues[0]
        await answered(frontend)
        iommu.asked.clear()
        iommu.hold()
        await iommu.invalidate(0, 1 << 63)
        await iommu.asked.wait()  # it asks for its ring at once
        submitted = queue.submit([b"ping"], [4])
        await frontend.settled()
        assert queue.used_idx == 1
        iommu.release()
        while submitted.written is None:
            await queue.wait_async()
        assert submitted.data == b"PING"
        await answered(frontend)


@in_loop
async def test_an_invalidation_under_requests_in_flight_leaves_them_their_memory() -> None:
    device = GateBehind()
    device.stop_timeout = 30.0  # they end when the gate opens
    async with behind(device) as frontend:
        iommu, queue = iommu_of(frontend), frontend.queues[0]
        submitted = queue.submit([b"ping"], [4])
        await device.arrived.wait()
        ring = queue.desc // PAGE * PAGE, (queue.used + 8 * queue.num) // PAGE * PAGE + PAGE
        await iommu.invalidate(0, ring[0])
        await iommu.invalidate(ring[1], 1 << 63)
        device.gate.set()
        while submitted.written is None:
            await queue.wait_async()
        assert submitted.data == b"ping"
        await iommu.invalidate(0, 1 << 63)  # and now the ring
        submitted = queue.submit([b"again"], [5])
        while submitted.written is None:
            await queue.wait_async()
        assert submitted.data == b"again"


@in_loop
async def test_a_stop_forgets_what_was_mapped_since_nobody_tells_of_its_end() -> None:
    async with behind(Behind()) as frontend:
        await answered(frontend)
        first = list(iommu_of(frontend).misses)
        await frontend.pause()
        await frontend.resume()
        await answered(frontend)
        assert iommu_of(frontend).misses[: len(first)] == first
        assert len(iommu_of(frontend).misses) >= 2 * len(first)


@pytest.mark.parametrize("how", ["reboot", "reset_device"])
@in_loop
async def test_a_new_driver_starts_behind_the_iommu_again(how: str) -> None:
    async with behind(Behind()) as frontend:
        await answered(frontend)
        await getattr(frontend, how)()
        await answered(frontend)


@in_loop
async def test_without_reply_ack_a_ring_waits_for_the_update_alone() -> None:
    less = Dialect("less", QEMU_11_1.protocol_mask & ~ProtocolFeature.REPLY_ACK, False, False, False)
    async with behind(Behind(), dialect=less) as frontend:
        for _ in range(10):
            await answered(frontend)


@in_loop
async def test_an_iommu_without_a_back_end_channel_ends_the_session() -> None:
    less = Dialect("less", QEMU_11_1.protocol_mask & ~ProtocolFeature.BACKEND_REQ, True, True, False)
    async with attach(Behind(), dialect=less, iommu=True, negotiated=False) as frontend:
        await frontend.handshake()
        with contextlib.suppress(BackendGone, BrokenPipeError):
            await frontend.start()
        await frontend.ended()


@in_loop
async def test_what_is_no_iotlb_message_is_refused() -> None:
    async with behind(Behind()) as frontend:
        iommu = iommu_of(frontend)
        for iova, size, uva, perm in ((0, 0, 0, 3), (2**64 - 1, 2, 0, 3), (0, PAGE, 2**64 - 1, 3), (0, PAGE, 0, 4)):
            with pytest.raises(Refused):
                await iommu.update(iova, size, uva, perm)
        for kind in (0, 1, 4, 255):
            value = {"iova": 0, "size": PAGE, "type": kind}
            assert await frontend.request(Request.IOTLB_MSG, wire.IOTLB, value, reply=wire.U64) != 0
        await answered(frontend)


@in_loop
async def test_an_entry_that_is_not_in_guest_memory_maps_nothing() -> None:
    async with behind(Behind()) as frontend:
        iommu = iommu_of(frontend)
        await answered(frontend)
        await iommu.update(NOWHERE, PAGE, 1 << 60, 3)
        await _breaks_at(frontend, NOWHERE)


@in_loop
async def test_memory_that_is_unplugged_takes_its_translations_along() -> None:
    async with behind(Behind(), memory=[ROOM, 1 << 16]) as frontend:
        await answered(frontend)
        extra = frontend.memory.regions[1]
        await iommu_of(frontend).update(NOWHERE, PAGE, extra.uva, 3)
        await frontend.remove_region(extra)
        await answered(frontend)
        await _breaks_at(frontend, NOWHERE)


@in_loop
async def test_more_pages_than_the_table_holds_are_asked_for_again() -> None:
    async with behind(Behind(), memory=[16 << 20]) as frontend:
        iommu = iommu_of(frontend)
        await answered(frontend)
        ring = len(iommu.misses)
        for page in range(2048):
            await iommu.update(NOWHERE + page * PAGE, PAGE, frontend.memory.regions[0].uva, 3)
        await answered(frontend)
        assert len(iommu.misses) > ring


@in_loop
async def test_the_dirty_log_has_guest_physical_addresses() -> None:
    class Moving(Behind):
        migratable = True

    async with behind(Moving()) as frontend:
        await answered(frontend)
        size = (SHIFT + (1 << 33)) // PAGE // 8
        fd = os.memfd_create("log")
        try:
            os.ftruncate(fd, size)
            await frontend.set_log(fd, size)
            await frontend.request(Request.SET_FEATURES, wire.U64, frontend.features | VirtioFeature.LOG_ALL, ack=True)
            room = frontend.memory.alloc(PAGE)
            queue, used = frontend.queues[0], frontend.queues[0].used_idx
            queue.write_desc(queue.num - 2, queue.desc, 4, 1, queue.num - 1)
            queue.write_desc(queue.num - 1, room, 4, 2)
            queue.offer(queue.num - 2)
            queue.publish()
            queue.kick()
            while queue.used_idx == used:
                await frontend.settled()
            await frontend.pause()
            page = (room + SHIFT) // PAGE
            assert os.pread(fd, 1, page // 8)[0] >> page % 8 & 1
            assert not os.pread(fd, 1, room // PAGE // 8)[0]
        finally:
            os.close(fd)


@in_loop
async def test_iotlb_messages_to_a_device_that_never_offered_it_end_the_session() -> None:
    assert not session_config(Upper()).features & VirtioFeature.ACCESS_PLATFORM
    async with attach(Upper()) as frontend:
        with pytest.raises(BackendGone):
            await frontend.request(Request.IOTLB_MSG, wire.IOTLB, {"iova": 0, "type": 2}, reply=wire.U64)
