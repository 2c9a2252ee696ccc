# SPDX-License-Identifier: BSD-3-Clause
"""Which sockets the module takes, what it gives back, what is left without the device: guest/{takeover,gone}_check.c."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import whole_initramfs
from tests.e2e.site import Site, site
from tests.e2e.vm import script


@pytest.mark.parametrize(
    ("suite", "processors"),
    [("distribution", 1), pytest.param("trixie", 2, marks=pytest.mark.foreign)],
    ids=["one processor", "two processors, two ring pairs"],
)
def test_takeover_claims_hold(initramfs: str, tmp_path: Path, suite: str, processors: int) -> None:
    qemu = script("fetch-qemu", suite)
    options = "--qemu", qemu, "--smp", str(processors), "--append", "virtio_socket.ping_secs=600"
    with site(tmp_path, initramfs, *options, pairs=processors) as place:
        place.check_memory()
        place.check("takeover_check 10.0.0.5 7000 fd00::5 7000 192.0.2.1")
        place.backend.idle("vm1")
        place.check("stream_check 10.0.0.5 7000")
        assert not place.hwsock()  # the device may still linger for a peer that does not read


@pytest.mark.foreign
def test_threads_that_linger_between_two_steps_hang_nobody(tmp_path: Path) -> None:
    """The claims about races once more, with a module in which another thread comes between two steps far more often."""
    qemu = script("fetch-qemu", "trixie")  # with processors that run in parallel
    with site(tmp_path, whole_initramfs(tmp_path, "bookworm", "--races"), "--qemu", qemu, "--smp", "2", pairs=2) as place:
        place.check_races()


def _unplug(place: Site) -> None:
    place.vm.unplug()


def _kill(place: Site) -> None:
    place.backend.process.kill()
    place.backend.process.wait()


@pytest.mark.parametrize("take_away", [_unplug, _kill], ids=["unplugged", "back-end killed"])
def test_everybody_who_waits_hears_that_the_device_is_gone(
    initramfs: str, tmp_path: Path, take_away: Callable[[Site], None]
) -> None:
    with site(tmp_path, initramfs, "--append", "virtio_socket.ping_secs=1") as place:
        place.check_gone(lambda: take_away(place))
