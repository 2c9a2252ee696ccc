# SPDX-License-Identifier: BSD-3-Clause
"""Guest memory and the config space over the socket, and the back-end channel."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from vhostsock import Device, RequestError
from vhostsock.proto import ProtocolFeature, Request, wire
from vhostsock.testing.driver import Region
from vhostsock.testing.frontend import QEMU_11_1, BackendGone, Dialect, Refused, attach

# QEMU without memory slots sends whole tables
TABLES = Dialect("tables", QEMU_11_1.protocol_mask & ~ProtocolFeature.CONFIGURE_MEM_SLOTS, True, True, False)
NO_ACKS = Dialect("no acks", 0, False, False, False)


class Settings(Upper):
    """Four bytes of config that a driver may write."""

    def __init__(self) -> None:
        super().__init__()
        self.value = b"abcd"
        self.flags = 0

    def read_config(self, offset: int, size: int) -> bytes:
        return self.value[offset : offset + size]

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        if offset + len(data) > len(self.value):
            raise RequestError("beyond the end")
        self.value = self.value[:offset] + data + self.value[offset + len(data) :]
        self.flags = flags


@contextlib.contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("more")
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("dialect", [QEMU_11_1, TABLES], ids=["slots", "table"])
@in_loop
async def test_requests_may_lie_in_any_region(dialect: Dialect) -> None:
    async with attach(Upper(), memory=[1 << 16, 1 << 20, 1 << 20], dialect=dialect) as frontend:
        queue = frontend.queues[0]
        for _ in range(64):  # 64 KiB each: more than the first two regions hold
            queue.submit([b"x" * 30000], [30000])
            [done] = await queue.wait_async()
            assert done.data == b"X" * 30000


@in_loop
async def test_memory_comes_and_goes_under_a_running_ring() -> None:
    async with attach(Upper()) as frontend:
        with memfd(8192) as fd:
            dimm = Region(fd, 1 << 40, 8192, 1 << 41)
            await frontend.add_region(dimm)
            await frontend.remove_region(dimm)
        frontend.queues[0].submit([b"x"], [1])
        [done] = await frontend.queues[0].wait_async()
        assert done.data == b"X"


@in_loop
async def test_a_region_that_is_added_twice_is_there_until_it_is_removed_twice() -> None:
    """As QEMU 7.2 has it for a network card of two pairs. Another file at the same place is another region, and refused."""
    async with attach(Upper()) as frontend:
        with memfd(8192) as fd, memfd(8192) as other:
            dimm = Region(fd, 1 << 40, 8192, 1 << 41)
            for change in (frontend.add_region, frontend.add_region, frontend.remove_region, frontend.add_region):
                await change(dimm)
            with pytest.raises(Refused):
                await frontend.add_region(Region(other, 1 << 40, 8192, 1 << 41))
    async with attach(Upper()) as frontend:
        with memfd(8192) as fd:
            dimm = Region(fd, 1 << 40, 8192, 1 << 41)
            for change in (frontend.add_region, frontend.add_region, frontend.remove_region, frontend.remove_region):
                await change(dimm)
            with pytest.raises(Refused):
                await frontend.remove_region(dimm)


@in_loop
async def test_a_table_replaces_the_whole_memory_under_a_running_ring() -> None:
    async with attach(Upper(), dialect=TABLES) as frontend:
        [ram] = frontend.memory.regions
        with memfd(8192) as fd:
            regions = [
                {"gpa": r.gpa, "size": r.size, "uva": r.uva, "offset": 0} for r in (ram, Region(fd, 1 << 40, 8192, 1 << 41))
            ]
            table = {"n": 2, "regions": regions}
            await frontend.request(Request.SET_MEM_TABLE, wire.MEM_TABLE, table, fds=[ram.fd, fd], ack=True)
        frontend.queues[0].submit([b"x"], [1])
        [done] = await frontend.queues[0].wait_async()
        assert done.data == b"X"


@in_loop
async def test_what_cannot_be_mapped_is_refused_and_what_was_stays() -> None:
    async with attach(Upper()) as frontend:
        [ram] = frontend.memory.regions
        with memfd(4096) as fd:
            for bad in (
                Region(fd, 1 << 40, 8192, 1 << 41),  # larger than the file
                Region(fd, ram.gpa, 4096, 1 << 41),  # overlaps in the guest
                Region(fd, 1 << 40, 4096, ram.uva),  # overlaps in the front-end
                Region(fd, 1 << 40, 0, 1 << 41),  # empty
                Region(fd, 2**64 - 4096, 4096 + 1, 1 << 41),  # beyond the end of all memory
            ):
                with pytest.raises(Refused):
                    await frontend.add_region(bad)
            with pytest.raises(Refused):
                await frontend.remove_region(Region(fd, 1 << 40, 4096, 1 << 41))
        read, write = os.pipe()
        with pytest.raises(Refused):
            await frontend.add_region(Region(read, 1 << 40, 4096, 1 << 41))
        os.close(read)
        os.close(write)
        frontend.queues[0].submit([b"x"], [1])
        [done] = await frontend.queues[0].wait_async()
        assert done.data == b"X"


@in_loop
async def test_removing_the_memory_of_a_running_ring_breaks_the_ring_and_its_next_kick_ends_the_session() -> None:
    async with attach(Upper()) as frontend:
        with pytest.raises(Refused):
            await frontend.remove_region(frontend.memory.regions[0])
        assert os.eventfd_read(frontend.queues[0].err_fd) == 1
        await frontend.settled()
        os.eventfd_write(frontend.queues[0].kick_fd, 1)
        await frontend.ended()


@in_loop
async def test_without_acks_a_request_that_cannot_be_carried_out_ends_the_session() -> None:
    async with attach(Upper(), started=False, dialect=NO_ACKS) as frontend:
        await frontend.request(Request.SET_VRING_NUM, wire.VRING_STATE, {"index": 0, "num": 3})
        with pytest.raises(BackendGone):
            await frontend.settled()


@pytest.mark.parametrize("num", [0, 3, 2048, 65536])
@in_loop
async def test_a_queue_size_that_cannot_be_is_nacked(num: int) -> None:
    async with attach(Upper(), started=False) as frontend:
        with pytest.raises(Refused):
            await frontend.request(Request.SET_VRING_NUM, wire.VRING_STATE, {"index": 0, "num": num}, ack=True)
        await frontend.start()


@in_loop
async def test_descriptors_of_the_wrong_kind_are_nacked() -> None:
    async with attach(Upper(), started=False) as frontend:
        await frontend.request(Request.SET_FEATURES, wire.U64, frontend.features)
        wrong = frontend.memory.regions[0].fd  # a regular file
        for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            with pytest.raises(Refused):
                await frontend.set_fd(request, 0, wrong)
        with pytest.raises(Refused):
            await frontend.request(Request.SET_BACKEND_REQ_FD, fds=[wrong], ack=True)
        with pytest.raises(Refused):
            await frontend.request(Request.SET_VRING_ENABLE, wire.VRING_STATE, {"index": 0, "num": 2}, ack=True)
        await frontend.start()


@in_loop
async def test_config_is_read_and_written_in_parts() -> None:
    device = Settings()
    async with attach(device) as frontend:
        assert await frontend.read_config(0, 4) == b"abcd"
        assert await frontend.read_config(2, 1) == b"c"
        await frontend.write_config(1, b"XY", flags=1)
        assert (await frontend.read_config(0, 4), device.flags) == (b"aXYd", 1)


@in_loop
async def test_config_that_cannot_be_served_is_refused_in_the_messages_own_way() -> None:
    async with attach(Settings()) as frontend:
        with pytest.raises(Refused):  # four bytes are all it has
            await frontend.read_config(2, 4)
        with pytest.raises(Refused):
            await frontend.write_config(3, b"zz")
        assert await frontend.read_config(0, 4) == b"abcd"


@in_loop
async def test_a_write_to_a_config_space_that_is_not_writable_ends_nothing() -> None:
    class Fixed(Upper):
        config = b"fixed"

    async with attach(Fixed()) as frontend:
        with pytest.raises(Refused):
            await frontend.write_config(0, b"x")
        assert await frontend.read_config(0, 8) == b"fixed\0\0\0"
    no_acks = Dialect("no acks", 0, False, False, False)
    async with attach(Fixed(), dialect=no_acks) as frontend:  # only the driver is to blame, so the session goes on
        await frontend.write_config(0, b"x")
        await frontend.settled()


@pytest.mark.parametrize(("device", "offered"), [(Upper(), False), (Settings(), True)], ids=["none", "some"])
@in_loop
async def test_a_config_space_is_offered_only_by_a_device_that_has_one(device: Device, offered: bool) -> None:
    async with attach(device, started=False) as frontend:
        assert bool(frontend.protocol_features & ProtocolFeature.CONFIG) is offered


@in_loop
async def test_a_config_change_is_told_over_the_back_end_channel() -> None:
    device = Settings()
    device.config_changed()  # nobody is there yet
    async with attach(device) as frontend:
        device.config_changed()
        assert await frontend.backend_request() == wire.BackendRequest.CONFIG_CHANGE_MSG
        for _ in range(5000):  # more than its socket holds: a front-end that does not read cannot block or break us
            device.config_changed()
        assert await frontend.backend_request() == wire.BackendRequest.CONFIG_CHANGE_MSG
        assert frontend.channel
        frontend.channel.close()
        device.config_changed()
        await frontend.settled()
    device.config_changed()
