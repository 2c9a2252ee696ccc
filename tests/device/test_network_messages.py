# SPDX-License-Identifier: BSD-3-Clause
"""What a front-end tells a network device: SEND_RARP and NET_SET_MTU."""

from __future__ import annotations

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from vhostsock import RequestError
from vhostsock.offers import session_config
from vhostsock.proto import ProtocolFeature, Request, wire
from vhostsock.testing.frontend import BackendGone, Refused, attach

BITS = ProtocolFeature.RARP | ProtocolFeature.NET_MTU


class Card(Upper):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[bytes | int] = []

    def announce(self, mac: bytes) -> None:
        self.told.append(mac)

    def set_mtu(self, mtu: int) -> None:
        if mtu > 9000:
            raise RequestError("no larger frames than that")
        self.told.append(mtu)


@in_loop
async def test_a_network_device_is_told_of_its_guests_address_and_mtu() -> None:
    device = Card()
    async with attach(device) as frontend:
        await frontend.announce(bytes.fromhex("525400123456"))
        await frontend.set_mtu(1500)
        await frontend.set_mtu(68)
        assert device.told == [bytes.fromhex("525400123456"), 1500, 68]


@pytest.mark.parametrize("mtu", [0, 67, 65536, 2**64 - 1, 9001])
@in_loop
async def test_an_mtu_that_no_device_or_this_device_cannot_have_is_refused(mtu: int) -> None:
    device = Card()
    async with attach(device) as frontend:
        with pytest.raises(Refused):
            await frontend.set_mtu(mtu)
        assert device.told == []
        await frontend.set_mtu(1500)


@pytest.mark.parametrize("mac", ["000000000000", "ffffffffffff", "010203040506"])
@in_loop
async def test_an_address_that_no_station_has_is_refused(mac: str) -> None:
    device = Card()
    async with attach(device) as frontend:
        with pytest.raises(Refused):
            await frontend.announce(bytes.fromhex(mac))
        assert device.told == []


def test_both_are_offered_by_the_devices_that_listen() -> None:
    assert session_config(Card()).protocol_features & BITS == BITS
    assert not session_config(Upper()).protocol_features & BITS


@pytest.mark.parametrize("request_", [Request.SEND_RARP, Request.NET_SET_MTU])
@in_loop
async def test_to_another_device_they_end_the_session(request_: Request) -> None:
    async with attach(Upper()) as frontend:
        await frontend.request(request_, wire.U64, 1500)
        with pytest.raises(BackendGone):
            await frontend.settled()
