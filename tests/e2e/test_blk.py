# SPDX-License-Identifier: BSD-3-Clause
"""The stock virtio-blk driver of a stock kernel, on QEMU's vhost-user-blk-pci, served by our disk."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

from tests.e2e.disk import KNOWN, SIZE, Disk, Load, new_image
from tests.e2e.vm import Backend, Vm, script, wait_until

TWO_PACKED = ("--smp", "2", "--queues", "2", "--", "-global", "vhost-user-blk-pci.packed=on")


@pytest.fixture(
    scope="module",
    params=[("distribution", ()), pytest.param(("trixie", TWO_PACKED), marks=pytest.mark.foreign)],
    ids=["QEMU 7.2", "QEMU 10.0, two packed queues"],
)
def disk(request: pytest.FixtureRequest, disk_initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    suite, options = request.param
    folder = tmp_path_factory.mktemp("disk")
    image = new_image(folder / "image")
    qemu = script("fetch-qemu", suite)
    with (
        Backend(folder, "blk", "--image", image, "--serial", "number-1", "--num-queues", "2") as backend,
        Vm(folder, disk_initramfs, "--qemu", qemu, "--socket", backend.socket, "--carrier", "blk", *options) as vm,
    ):
        disk = Disk(image, backend, vm)
        assert disk.feature("packed") == disk.feature("multi-queue") == bool(options)
        yield disk


def test_stock_driver_shows_the_disk_as_it_is(disk: Disk) -> None:
    assert disk.sectors() == SIZE // 512
    assert disk.vm.run("cat /sys/block/vda/serial").text == "number-1"
    assert disk.vm.run("cat /sys/block/vda/queue/write_cache").text == "write back"
    assert disk.vm.run("ls /sys/block/vda/mq").text.split() == (["0", "1"] if disk.feature("multi-queue") else ["0"])
    for name in ("discard_max_bytes", "write_zeroes_max_bytes"):
        assert int(disk.vm.run(f"cat /sys/block/vda/queue/{name}").text) > 0


def test_data_go_both_ways(disk: Disk) -> None:
    disk.check()


def test_a_sync_in_the_guest_is_a_flush_here(disk: Disk) -> None:
    before = disk.backend.stats("blk")["flushes"]
    disk.vm.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 seek=7000 conv=fsync 2>/dev/null")
    assert disk.backend.stats("blk")["flushes"] > before


def test_discard_in_the_guest_frees_space_here(disk: Disk) -> None:
    disk.vm.run("dd if=/dev/urandom of=/dev/vda bs=1M seek=16 count=4 conv=fsync 2>/dev/null")
    os.sync()
    before = disk.image.stat().st_blocks
    disk.vm.run(f"blkdiscard -o {16 << 20} -l {4 << 20} /dev/vda")
    assert disk.image.stat().st_blocks == before - (4 << 20) // 512
    assert disk.image.read_bytes()[16 << 20 : 20 << 20] == bytes(4 << 20)
    disk.check()


def test_load_from_many_threads_is_right_over_pauses(disk: Disk) -> None:
    with Load(disk.vm):
        for _ in range(5):
            disk.vm.pause()
            disk.vm.resume()
            disk.vm.run("true")


def test_the_guest_sees_a_disk_that_grows(disk: Disk) -> None:
    os.truncate(disk.image, 2 * SIZE)
    disk.backend.process.send_signal(signal.SIGHUP)
    wait_until(lambda: disk.sectors() == 2 * SIZE // 512, "the guest knows the new size")
    disk.vm.run("dd if=/dev/zero of=/dev/vda oflag=direct bs=1M seek=63 count=1 2>/dev/null")


def test_reset_in_the_middle_of_load_then_the_disk_works_again(disk: Disk) -> None:
    disk.vm.run("rm -f /tmp/stop")
    disk.vm.start("disk_load /dev/vda 8 /tmp/stop")
    wait_until(lambda: disk.backend.stats("blk")["under_way"] > 0, "requests are under way")
    disk.vm.reset()
    wait_until(lambda: disk.vm.run("test -b /dev/vda", check=False).status == 0, "the new system has the disk")
    disk.image.write_bytes(random.randbytes(KNOWN) + bytes(SIZE - KNOWN))
    disk.check()


def test_unplugged_disk_is_gone_and_the_back_end_serves_the_next(disk: Disk) -> None:
    disk.vm.unplug()
    wait_until(lambda: disk.vm.run("test -e /dev/vda", check=False).status, "the guest lets the disk go")
    address = {"type": "unix", "data": {"path": str(disk.backend.socket)}}
    disk.vm.qmp.execute("chardev-remove", id="vhostsock0-socket")
    disk.vm.qmp.execute("chardev-add", id="again", backend={"type": "socket", "data": {"addr": address, "server": False}})
    disk.vm.qmp.execute("device_add", driver="vhost-user-blk-pci", chardev="again", id="vhostsock1")
    wait_until(lambda: disk.vm.run("test -b /dev/vda", check=False).status == 0, "the plugged disk is driven")
    disk.check()
