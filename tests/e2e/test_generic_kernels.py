# SPDX-License-Identifier: BSD-3-Clause
"""The kernels that Debian's installer chooses, with the drivers of real machines; the other tests boot the smaller cloud ones.

The same source in another configuration: what may differ is what is built in, what is a module, and how it is instrumented.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import initramfs_of
from tests.e2e.site import Site, site
from tests.e2e.vm import script, wait_until

pytestmark = pytest.mark.by_hand  # each is a hundred megabytes to fetch
SUITES = {"bookworm": "6.1.", "trixie": "6.12.", "trixie-backports": "7."}


@pytest.fixture(scope="module", params=SUITES)
def generic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    suite: str = request.param
    script("fetch-qemu")
    kernel = script("fetch-kernel", "--generic", suite)
    module = script("build-guest-module", "--headers", f"{kernel}/headers")
    root = initramfs_of(tmp_path_factory.mktemp("initramfs"), kernel, module)
    with site(tmp_path_factory.mktemp("site"), root, "--kernel", kernel) as it:
        release = it.vm.run("uname -r").text.strip()
        assert release.startswith(SUITES[suite])
        assert release.endswith("-amd64")
        assert "cloud" not in release
        yield it


def test_takeover_claims_hold(generic: Site) -> None:
    generic.check("takeover_check 10.0.0.5 7000 fd00::5 7000 192.0.2.1")
    wait_until(lambda: generic.backend.stats("vm1")["flows"] == 0, "the device has no flow")


def test_stream_claims_hold(generic: Site) -> None:
    generic.check_streams("10.0.0.5", "10.66.0.0 80 13")


def test_datagram_claims_hold(generic: Site) -> None:
    generic.check_datagrams()


def test_listener_claims_hold(generic: Site) -> None:
    generic.check_listener()
