# SPDX-License-Identifier: BSD-3-Clause
"""The guest module in the stock kernels of later Debian releases: the claims that hold on 6.1 hold there.

Built with the compiler of each release. These kernels have virtiofs built in, so it has taken the device when our module comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import whole_initramfs
from tests.e2e.site import Site, site
from tests.e2e.vm import script

pytestmark = pytest.mark.foreign
SUITES = {"trixie": "6.12.", "trixie-backports": "7."}


# one processor: two under QEMU 7.2 corrupt these kernels (its emulation of cmpxchg16b)
@pytest.fixture(scope="module", params=SUITES)
def newer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    suite: str = request.param
    script("fetch-qemu")
    root = whole_initramfs(tmp_path_factory.mktemp("initramfs"), suite)
    with site(tmp_path_factory.mktemp("site"), root, "--kernel", script("fetch-kernel", suite)) as it:
        assert it.vm.run("uname -r").text.startswith(SUITES[suite])
        yield it


def test_downloads_are_unharmed(newer: Site) -> None:
    digest = hashlib.sha256((newer.www / "data").read_bytes()).hexdigest()
    assert newer.vm.run("wget -q -O - http://10.0.0.5/data | sha256sum").text.split()[0] == digest


def test_takeover_claims_hold(newer: Site) -> None:
    """Before the stream claims: after those the device lingers for a peer that does not read, and has flows for a minute."""
    newer.check("takeover_check 10.0.0.5 7000 fd00::5 7000 192.0.2.1")
    newer.backend.idle("vm1")


@pytest.mark.parametrize(("host", "denied"), [("10.0.0.5", "10.66.0.0 80 13"), ("fd00::5", "")], ids=["IPv4", "IPv6"])
def test_stream_claims_hold(newer: Site, host: str, denied: str) -> None:
    newer.check_streams(host, denied)


def test_pages_are_used_again_and_let_go(newer: Site) -> None:
    newer.check("pages_check 10.0.0.5 7000")


def test_windows_grow_for_who_needs_them(newer: Site) -> None:
    newer.check("window_check 10.0.0.5 7000")


def test_who_waits_looks_before_sleeping(newer: Site) -> None:
    newer.check("look_check 10.0.0.5 7000")


def test_datagram_claims_hold(newer: Site) -> None:
    newer.check_datagrams()


def test_group_claims_hold(newer: Site) -> None:
    newer.check_groups()


def test_ipx_claims_hold(newer: Site) -> None:
    newer.check_ipx()


def test_datagram_server_claims_hold(newer: Site) -> None:
    newer.check_datagram_server()


def test_the_kernels_own_sockets_are_left_alone_and_landlock_is_obeyed(newer: Site) -> None:
    newer.check("kernel_check 10.0.0.5 7000 landlock")


def test_listener_claims_hold(newer: Site) -> None:
    newer.check_listener()


def test_everybody_who_waits_hears_that_the_device_was_unplugged(newer: Site) -> None:
    newer.check_gone(newer.vm.unplug)


def test_a_device_plugged_later_is_taken_from_virtiofs(newer: Site) -> None:
    newer.plug_again()
    newer.vm.run("test -e /sys/bus/virtio/drivers/virtio_socket/virtio*")
