# SPDX-License-Identifier: BSD-3-Clause
"""docs/installing-in-a-guest.md, its part with DKMS done as it stands there: Debian's DKMS, compiler and kmod in a guest.

The guest has a checkout, and the packages that the page asks for: its lines with apt-get are what is left out.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Site, site
from tests.e2e.vm import ROOT, script
from vhostsock.testing.guest import Result

pytestmark = [pytest.mark.by_hand, pytest.mark.timeout(7200)]  # the guest compiles the module
PAGE = (ROOT / "docs" / "installing-in-a-guest.md").read_text()
PACKAGES = ("dkms", "openssl", "linux-image-cloud-amd64", "linux-headers-cloud-amd64", "make", "mokutil", "curl")
HANGS = 3000.0


def commands(heading: str) -> list[list[str]]:
    """The blocks of commands below that heading of the page."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(heading + "\n")]
    blocks = re.findall(r"(?:^    .+\n)+", text, re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in blocks]


class Guest:
    """A site whose guest has the module's source, and not the module."""

    def __init__(self, place: Site) -> None:
        self.site = place
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(ROOT / "csrc", arcname="checkout/csrc", filter=lambda info: None if info.name.endswith(".so") else info)
        place.vm.run_in_image("tar -x --no-same-owner -C ~", input=packed.getvalue())

    def try_to(self, command: str) -> Result:
        return self.site.vm.run_in_image(f"cd ~/checkout && ({command}) 2>&1", timeout=HANGS, check=False)

    def do(self, *lines: str) -> str:
        """Each of the commands succeeds; the last one's output."""
        text = ""
        for line in lines:
            result = self.try_to(line)
            text = result.text
            assert result.status == 0, f"{line}\n{text}"
        return text.strip()


# one processor: see test_kernels.py
@pytest.fixture(scope="module", params=["bookworm"])
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    suite: str = request.param
    folder: Path = tmp_path_factory.mktemp("installing")
    script("fetch-qemu")
    kernel = script("fetch-kernel", suite)
    disk = script("make-guest-image", "--suite", suite, *PACKAGES, timeout=1800)
    root = script("mkinitramfs", "--kernel", kernel, "-o", str(folder / "stock.cpio"))
    with site(folder, root, "--kernel", kernel, "--memory", "1G", disk=disk) as place:
        there = Guest(place)
        assert there.try_to("test -e /lib/modules/$(uname -r)/build").status == 0, "disk and kernel are of different times"
        yield there


def test_dkms_builds_installs_and_signs_it(guest: Guest) -> None:
    [_, install, *_] = commands("With DKMS")
    assert install[0].startswith("dkms add")
    guest.do(*install)
    assert "installed" in guest.do("dkms status vhostsock/0.1.0 -k $(uname -r)")
    assert guest.do("modinfo -F signer virtio_socket") == "DKMS module signing key"
    assert "sockets are offered to the device" in guest.do("dmesg")
    digest = hashlib.sha256((guest.site.www / "data").read_bytes()).hexdigest()
    assert guest.do("curl -sS http://10.0.0.5/data | sha256sum").split()[0] == digest


def test_the_softdep_has_it_loaded_before_virtiofs(guest: Guest) -> None:
    loads = guest.do("modprobe --show-depends virtiofs")
    if "builtin" not in loads:
        assert 0 < loads.index("/virtio_socket.ko") < loads.index("/virtiofs.ko"), loads
