# SPDX-License-Identifier: BSD-3-Clause
"""Packed rings over the whole protocol: offered only by a device that asks, negotiated, stopped and gone on with."""

from __future__ import annotations

import pytest

from tests.aio import in_loop
from vhostsock import Device
from vhostsock.devices.echo import Echo
from vhostsock.devices.rng import Rng
from vhostsock.offers import session_config
from vhostsock.offload.device import OffloadDevice
from vhostsock.proto.features import VirtioFeature
from vhostsock.testing.frontend import QEMU_7_2, QEMU_11_1, Dialect, attach
from vhostsock.testing.packed import PackedQueue


@pytest.mark.parametrize(("kind", "offered"), [(Device, False), (OffloadDevice, False), (Rng, True), (Echo, True)])
def test_only_a_device_that_asks_offers_packed_rings(kind: type[Device], offered: bool) -> None:
    device = kind.__new__(kind)
    assert device.packed is offered
    device.num_queues = 2
    assert bool(session_config(device).features & VirtioFeature.RING_PACKED) is offered


@pytest.mark.parametrize("dialect", [QEMU_7_2, QEMU_11_1], ids=lambda d: d.name)
@pytest.mark.parametrize("size", [64, 24])
@in_loop
async def test_a_packed_ring_echoes_over_pauses_and_reboots(dialect: Dialect, size: int) -> None:
    async with attach(Echo(), dialect=dialect, accept=~0, size=size) as frontend:
        for round_ in range(6):
            queue = frontend.queues[0]
            assert isinstance(queue, PackedQueue)
            requests = [queue.submit([b"%d.%d" % (round_, i)], [16]) for i in range(20)]
            done = await queue.wait_async(20)
            assert set(done) == set(requests)
            assert [r.data for r in requests] == [b"%d.%d" % (round_, i) for i in range(20)]
            if round_ == 3:
                await frontend.reboot()
            else:
                await frontend.pause()
                assert frontend.bases[0] & 0xFFFF == frontend.bases[0] >> 16  # nothing was in flight
                await frontend.resume()


@in_loop
async def test_a_front_end_that_does_not_ask_gets_split_rings() -> None:
    async with attach(Rng()) as frontend:
        assert not isinstance(frontend.queues[0], PackedQueue)
        frontend.queues[0].submit([], [64])
        [done] = await frontend.queues[0].wait_async()
        assert done.written == 64
