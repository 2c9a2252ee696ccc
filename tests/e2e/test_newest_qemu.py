# SPDX-License-Identifier: BSD-3-Clause
"""A device that has all of the protocol offered that it can, on QEMU 11.1: behind an Intel IOMMU, without one, and migrated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.vm import Program, Qmp, Vm, script, wait_until
from vhostsock.trace import trace

pytestmark = pytest.mark.foreign

READ = "dd if=/dev/hwrng bs=1k count=16 iflag=fullblock 2>/dev/null"


class Served(Program):
    """The back-end, and what it recorded."""

    def __init__(self, folder: Path, name: str = "everything", *, queues: int = 1) -> None:
        self.socket, self.recording = folder / f"{name}.sock", folder / f"{name}.rec"
        program = Path(__file__).with_name("everything.py")
        super().__init__(folder / f"{name}.log", [sys.executable, program, self.socket, self.recording, str(queues)])
        self.await_log("listening")

    def lines(self, start: str) -> list[str]:
        """The lines of the recording that begin so, without their times."""
        return [text for line in trace(str(self.recording)) if (text := line.strip().partition(" ")[2]).startswith(start)]


@pytest.fixture(scope="module")
def qemu() -> str:
    return script("fetch-qemu", "trixie-backports")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path) as served:
        yield served


def memory(size: str) -> list[str]:
    return ["-object", f"memory-backend-memfd,id=mem,size={size},share=on", "-machine", "q35,memory-backend=mem"]


def test_a_driver_behind_an_iommu_is_served(served: Served, qemu: str, stock_initramfs: str, tmp_path: Path) -> None:
    options = [
        *memory("256M"), "-chardev", f"socket,id=rng,path={served.socket}",
        "-device", "intel-iommu,device-iotlb=on,intremap=off",
        "-device", "vhost-user-rng-pci,chardev=rng,iommu_platform=on,ats=on",
    ]  # fmt: skip
    words = "intel_iommu=on iommu.passthrough=0 iommu.strict=1"
    with Vm(tmp_path, stock_initramfs, "--qemu", qemu, "--append", words, "--", *options) as vm:
        features = vm.run("cat /sys/bus/virtio/drivers/virtio_rng/virtio*/features").text
        assert features[33] == "1"  # VIRTIO_F_ACCESS_PLATFORM
        for _ in range(2):
            assert len(vm.run(READ).output) == 16384
            vm.pause()
            vm.resume()
        vm.reset()
        assert len(vm.run(READ).output) == 16384
    assert served.lines("=> IOTLB_MSG")
    assert any("UPDATE" in line for line in served.lines("-> IOTLB_MSG"))
    assert any("INVALIDATE" in line for line in served.lines("-> IOTLB_MSG"))


def test_a_device_that_has_all_of_it_offered_is_served(served: Served, qemu: str, stock_initramfs: str, tmp_path: Path) -> None:
    options = [
        *memory("256M"), "-chardev", f"socket,id=rng,path={served.socket}", "-device", "vhost-user-rng-pci,chardev=rng",
    ]  # fmt: skip
    with Vm(tmp_path, stock_initramfs, "--qemu", qemu, "--", *options) as vm:
        assert len(vm.run(READ).output) == 16384
    [acked] = served.lines("-> SET_PROTOCOL_FEATURES")
    for name in ("PAGEFAULT", "SHARED_OBJECT", "GPA_ADDRESSES", "SHMEM_MAP", "DEVICE_STATE"):
        assert name in acked
    [sizes] = served.lines("<- GET_SHMEM_CONFIG")
    assert sizes.endswith("n=1 0:0x100000")


def test_a_devices_state_migrates_with_its_machine(qemu: str, tmp_path: Path) -> None:
    """From one QEMU to another through a file. vhost-user-fs is the device type whose state QEMU moves; nothing has to run."""
    state = tmp_path / "machine.state"
    with ExitStack() as stack:
        source, target = (stack.enter_context(Served(tmp_path, name, queues=2)) for name in ("source", "target"))
        first = stack.enter_context(_machine(qemu, tmp_path, source))
        stack.callback((one := Qmp(tmp_path / "source.qmp")).close)
        one.execute("migrate", uri=f"file:{state}")
        _migrated(one)
        assert source.lines("-> CHECK_DEVICE_STATE")
        first.close()
        stack.enter_context(_machine(qemu, tmp_path, target, "-incoming", "defer"))
        stack.callback((other := Qmp(tmp_path / "target.qmp")).close)
        other.execute("migrate-incoming", uri=f"file:{state}")
        _migrated(other)
        target.await_log("loaded 600000 bytes")
        assert target.lines("<- CHECK_DEVICE_STATE")[-1].endswith("0x0")


def test_the_end_of_a_migration_can_be_postcopy(qemu: str, tmp_path: Path) -> None:
    """QEMU's part of it: it takes our userfaultfd, and says when it listens and when all has arrived."""
    way = tmp_path / "way.sock"
    postcopy = [{"capability": "postcopy-ram", "state": True}]
    with ExitStack() as stack:
        source, target = (stack.enter_context(Served(tmp_path, name, queues=2)) for name in ("source", "target"))
        stack.enter_context(_machine(qemu, tmp_path, source))
        stack.enter_context(_machine(qemu, tmp_path, target, "-incoming", "defer"))
        stack.callback((one := Qmp(tmp_path / "source.qmp")).close)
        stack.callback((other := Qmp(tmp_path / "target.qmp")).close)
        for qmp in (one, other):
            qmp.execute("migrate-set-capabilities", capabilities=postcopy)
        other.execute("migrate-incoming", uri=f"unix:{way}")
        one.execute("migrate-set-parameters", **{"max-bandwidth": 4096})  # it would be over before we ask
        one.execute("migrate", uri=f"unix:{way}")
        wait_until(lambda: one.execute("query-migrate").get("status") == "active", "the migration has begun")
        one.execute("migrate-start-postcopy")
        _migrated(one)
        _migrated(other)
        for name in ("POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END"):
            assert target.lines(f"<- {name}"), name
        target.await_log("loaded 600000 bytes")


def _machine(qemu: str, folder: Path, served: Served, *more: str) -> Program:
    """A machine that stands still, with the device."""
    name = served.recording.stem
    return Program(
        folder / f"qemu-{name}.log",
        [
            qemu, "-S", "-nodefaults", "-display", "none", "-accel", "tcg", *memory("16M"), "-m", "16M",
            "-chardev", f"socket,id=fs,path={served.socket}", "-device", "vhost-user-fs-pci,chardev=fs,tag=state",
            "-qmp", f"unix:{folder / name}.qmp,server=on,wait=off", *more,
        ],
    )  # fmt: skip


def _migrated(qmp: Qmp) -> None:
    def over() -> bool:
        status = qmp.execute("query-migrate")
        assert status.get("status") != "failed", status
        return bool(status.get("status") == "completed")

    wait_until(over, "the migration is completed")
