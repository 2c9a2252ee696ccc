# SPDX-License-Identifier: BSD-3-Clause
"""A guest that knows what is native: it asks the device about nothing else, and no program can tell.

As in test_nic.py QEMU's user networking is the network, and the policy names nothing of it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.e2e.site import Site, site
from tests.e2e.test_nic import HOST, OWN, OWN6, forward


@pytest.fixture(scope="module")
def place(initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site"), initramfs, "--nic", hints=True) as it:
        it.vm.run(f"echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; ip -6 addr add {OWN6}/64 dev eth0")
        yield it


def asked(place: Site) -> int:
    """How many messages the guest has sent to the device so far."""
    return place.backend.idle("vm1")["msgs_in"]


def test_what_is_native_is_not_asked_about(place: Site) -> None:
    connects = f"echo quit | nc {HOST} {place.ports['peer']}"
    before = asked(place)
    for _ in range(3):
        place.vm.run(connects)
    place.vm.run(f"echo x | nc -u -w 1 {HOST} {place.ports['peer']}", check=False)  # it has no other end than its limit
    assert asked(place) == before


def test_what_is_offloaded_is(place: Site) -> None:
    before = asked(place)
    place.vm.run("wget -q -O /dev/null http://10.0.0.5/")
    assert asked(place) > before


def test_claims_hold(place: Site) -> None:
    ways = f"NIC_TCP={forward(place, socket.SOCK_STREAM, 8080)} NIC_UDP={forward(place, socket.SOCK_DGRAM, 8090)}"
    ports = place.ports
    place.check(f"{ways} nic_check 10.0.0.5 7000 {HOST} {ports['peer']} {ports['closed']} {OWN} {OWN6}")
    place.check("connect_check 10.0.0.5 7000 7001 7003 10.66.0.0 80 13")
