# SPDX-License-Identifier: BSD-3-Clause
"""A guest that knows what is native: it asks the device about nothing else, and no program can tell.

As in test_nic.py QEMU's user networking is the network, and the policy names nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.site import Site
from tests.e2e.test_nic import HOST, check_claims, with_nic


@pytest.fixture(scope="module")
def place(initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with with_nic(tmp_path_factory.mktemp("site"), initramfs, hints=True) as it:
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
    check_claims(place)
    place.check("connect_check 10.0.0.5 7000 7001 7003 10.66.0.0 80 13")
