# SPDX-License-Identifier: BSD-3-Clause
"""A back-end that is killed in the middle of I/O and started again: the guest notices nothing but a pause.

What makes it so: QEMU keeps the guest's device and looks for a new back-end; the requests that the old one had taken are in the
in-flight region that QEMU hands to the new one, which carries them out again. A request that was lost would hang the guest's
program for ever, one that was answered twice would break its ring.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.disk import Disk, Load, new_image
from tests.e2e.vm import Backend, Vm, script, wait_until

KILLS = 4
KILLS_MOST = 40  # where storage is fast a kill mostly falls between two requests, whatever the counters had said before it
PACKED = ("--", "-global", "vhost-user-blk-pci.packed=on")


def busy(backend: Backend, name: str, least: int) -> None:
    wait_until(lambda: backend.stats("blk")[name] >= least, f"{name} of the back-end at {least}")


@pytest.mark.parametrize(
    ("suite", "reconnect", "rings"),
    [
        ("distribution", ("--reconnect", "1"), ()),
        ("distribution", ("--reconnect", "1"), PACKED),
        pytest.param("trixie-backports", ("--reconnect-ms", "100"), (), marks=pytest.mark.foreign),
    ],
    ids=["QEMU 7.2", "QEMU 7.2, packed", "QEMU 11.1"],
)
def test_a_killed_back_end_that_comes_back_costs_the_guest_no_request(
    suite: str, reconnect: tuple[str, ...], rings: tuple[str, ...], disk_initramfs: str, tmp_path: Path
) -> None:
    image = new_image(tmp_path / "image")
    qemu = script("fetch-qemu", suite)
    backend = Backend(tmp_path, "blk", "--image", image)
    try:
        options: list[str | Path] = ["--qemu", qemu, "--socket", backend.socket, "--carrier", "blk", *reconnect, *rings]
        with Vm(tmp_path, disk_initramfs, *options) as vm:
            with Load(vm):
                kills = again = 0
                assert Disk(image, backend, vm).feature("packed") == bool(rings)
                while kills < KILLS or (not again and kills < KILLS_MOST):
                    busy(backend, "under_way", 1)
                    backend.process.kill()
                    backend.process.wait()
                    kills += 1
                    backend = Backend(tmp_path, "blk", "--image", image)
                    busy(backend, "reads", 100)
                    again += backend.stats("blk")["again"]
                assert again, f"none of {kills} kills came in the middle of a request"
            Disk(image, backend, vm).check()
            assert "I/O error" not in vm.console_text()
            assert vm.run("cat /sys/block/vda/inflight").text.split() == ["0", "0"]
    finally:
        backend.close()
