# SPDX-License-Identifier: BSD-3-Clause
"""GPA_ADDRESSES: rings and regions by guest-physical addresses; the front-end's own never appear."""

from __future__ import annotations

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from vhostsock.offers import session_config
from vhostsock.proto import ProtocolFeature, Request, wire
from vhostsock.testing.frontend import QEMU_11_1, BackendGone, Dialect, attach

TABLES = Dialect("tables", QEMU_11_1.protocol_mask & ~ProtocolFeature.CONFIGURE_MEM_SLOTS, True, True, False)


class ByGpa(Upper):
    gpa_addresses = True
    iommu = True


@pytest.mark.parametrize("iommu", [False, True], ids=["direct", "behind an IOMMU"])
@pytest.mark.parametrize("dialect", [QEMU_11_1, TABLES], ids=["slots", "table"])
@in_loop
async def test_rings_are_found_by_guest_physical_addresses(dialect: Dialect, iommu: bool) -> None:
    async with attach(ByGpa(), dialect=dialect, memory=[1 << 16, 1 << 20], iommu=iommu) as frontend:
        assert frontend.protocol_features & ProtocolFeature.GPA_ADDRESSES
        queue = frontend.queues[0]
        for _ in range(3):
            submitted = queue.submit([b"ping"], [4])
            while submitted.written is None:
                await queue.wait_async()
            assert submitted.data == b"PING"


@pytest.mark.parametrize("request_", [Request.ADD_MEM_REG, Request.REM_MEM_REG])
@in_loop
async def test_a_region_with_a_user_address_of_its_own_ends_the_session(request_: Request) -> None:
    async with attach(ByGpa(), started=False) as frontend:
        region = {"gpa": 1 << 40, "size": 4096, "uva": 1 << 41, "offset": 0}
        fds = [frontend.memory.regions[0].fd] if request_ == Request.ADD_MEM_REG else []
        await frontend.request(request_, wire.MEM_REGION, {"region": region}, fds=fds)
        with pytest.raises(BackendGone):
            await frontend.settled()


def test_only_a_device_that_asks_for_it_is_offered_with_it() -> None:
    assert not session_config(Upper()).protocol_features & ProtocolFeature.GPA_ADDRESSES
