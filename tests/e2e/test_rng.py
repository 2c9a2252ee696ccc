# SPDX-License-Identifier: BSD-3-Clause
"""The stock virtio-rng driver of a stock kernel, on QEMU's vhost-user-rng-pci, served by our rng device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.vm import Backend, Vm, wait_until
from vhostsock.devices.rng import Rng
from vhostsock.testing.replay import replay

READ = "dd if=/dev/hwrng bs=1k count=16 iflag=fullblock 2>/dev/null"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    folder = tmp_path_factory.mktemp("rng")
    with Backend(folder, "rng", "--record", folder / "session.rec") as backend:
        yield backend


RINGS: dict[str, list[str]] = {"split": [], "packed": ["--", "-global", "vhost-user-rng-pci.packed=on"]}


@pytest.fixture(scope="module", params=RINGS)
def vm(
    request: pytest.FixtureRequest, backend: Backend, stock_initramfs: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Vm]:
    options: list[str | Path] = ["--socket", backend.socket, "--carrier", "rng", *RINGS[request.param]]
    with Vm(tmp_path_factory.mktemp("vm"), stock_initramfs, *options) as vm:
        features = vm.run("cat /sys/bus/virtio/drivers/virtio_rng/virtio*/features").text  # a digit a bit, bit 0 first
        assert features[34] == str(int(request.param == "packed"))  # VIRTIO_F_RING_PACKED
        yield vm


def random_bytes(vm: Vm) -> bytes:
    return vm.run(READ).output


def test_stock_driver_is_bound_to_our_device(vm: Vm) -> None:
    assert vm.run("cat /sys/class/misc/hw_random/rng_current").text == "virtio_rng.0"


def test_hwrng_gives_data_that_does_not_repeat(vm: Vm) -> None:
    one, two = random_bytes(vm), random_bytes(vm)
    assert len(one) == len(two) == 16384
    assert one != two
    assert len(set(one)) == 256


def test_a_read_survives_pause_and_resume(vm: Vm) -> None:
    reading = vm.start(READ)
    vm.pause()
    assert vm.qmp.execute("query-status")["running"] is False
    vm.resume()
    assert len(reading.wait().output) == 16384


def test_pause_and_resume_again_and_again(vm: Vm) -> None:
    for _ in range(10):
        vm.pause()
        vm.resume()
        assert len(random_bytes(vm)) == 16384


def test_reset_in_the_middle_of_a_read_then_the_device_works_again(vm: Vm) -> None:
    vm.start("cat /dev/hwrng >/dev/null")
    vm.reset()
    assert len(random_bytes(vm)) == 16384


def test_driver_unbound_and_bound_again(vm: Vm) -> None:
    path = vm.run("basename /sys/bus/virtio/drivers/virtio_rng/virtio*").text
    for _ in range(3):
        vm.run(f"cd /sys/bus/virtio/drivers/virtio_rng && echo {path} > unbind && echo {path} > bind")
        assert len(random_bytes(vm)) == 16384


def test_what_qemu_said_can_be_played_to_the_device_again(vm: Vm, backend: Backend) -> None:
    vm.pause()
    assert replay(backend.socket.with_name("session.rec"), Rng()) > 10
    vm.resume()


def test_unplugged_device_is_gone_and_the_back_end_serves_the_next(vm: Vm, backend: Backend) -> None:
    vm.run("test -e /sys/bus/virtio/drivers/virtio_rng/virtio*")
    vm.unplug()
    vm.run("! test -e /sys/bus/virtio/drivers/virtio_rng/virtio*")
    device = {"driver": "vhost-user-rng-pci", "chardev": "again", "id": "vhostsock1"}
    address = {"type": "unix", "data": {"path": str(backend.socket)}}
    vm.qmp.execute("chardev-remove", id="vhostsock0-socket")
    vm.qmp.execute("chardev-add", id="again", backend={"type": "socket", "data": {"addr": address, "server": False}})
    vm.qmp.execute("device_add", **device)
    wait_until(lambda: "virtio_rng" in vm.run("cat /sys/class/misc/hw_random/rng_current").text, "the plugged device is driven")
    assert len(random_bytes(vm)) == 16384


def test_another_guest_is_served_after_the_first_died(backend: Backend, vm: Vm, stock_initramfs: str, tmp_path: Path) -> None:
    vm.process.kill()
    vm.process.wait()
    with Vm(tmp_path, stock_initramfs, "--socket", backend.socket, "--carrier", "rng") as second:
        assert len(random_bytes(second)) == 16384
