# SPDX-License-Identifier: BSD-3-Clause
"""A guest with the rng, input and net devices, under each QEMU that Debian has: stock drivers, and all that QEMU does to them.

No test machine is sure to have KVM, and without it QEMU 7.2 refuses vhost-user-input-pci ("requires kvm") and crashes when the
network card gets MSI-X: no input there, and a card with INTx. 11.1 has input and net twice, as device types of their own and as
the generic device. The rng device is served without memory slots, so that QEMU sends it whole tables where the others get one
region at a time.
"""

from __future__ import annotations

import re
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.vm import WITHIN, Backend, Program, Vm, script, wait_until
from vhostsock.qemu import qemu_args
from vhostsock.trace import trace

HERE = Path(__file__).resolve().parent
DIMM = 128 << 20
FRAMES = 200

OWN: dict[str, dict[str, object]] = {"input": {"carrier": "input"}, "net": {"carrier": "net"}}
GENERIC: dict[str, dict[str, object]] = {
    "input": {"carrier": "generic", "virtio_id": 18, "config_size": 136},
    "net": {"carrier": "generic", "virtio_id": 1, "config_size": 12},
}
VERSIONS = {
    "7.2": ("distribution", {"net": OWN["net"]}),
    "10.0": ("trixie", OWN),
    "11.1": ("trixie-backports", OWN),
    "11.1 generic": ("trixie-backports", GENERIC),
}
PARAMETERS = [
    pytest.param(name, marks=() if suite == "distribution" else pytest.mark.foreign) for name, (suite, _) in VERSIONS.items()
]
MEMORY = "sed -n 's/MemTotal: *\\([0-9]*\\) .*/\\1/p' /proc/meminfo"  # KiB


class Machine:
    """A guest, its three devices, and what is needed to see that they work."""

    def __init__(self, stack: ExitStack, folder: Path, initramfs: str, version: str) -> None:
        suite, carriers = VERSIONS[version]
        self.folder = folder
        self.events = folder / "events.sock"
        rng_socket = folder / "rng.sock"
        rng = [sys.executable, HERE / "serve_rng_without.py", "CONFIGURE_MEM_SLOTS", rng_socket, self.record("rng")]
        self.backends = {"rng": stack.enter_context(Program(folder / "rng.log", list(map(str, rng))))}
        self.backends["rng"].await_log("listening on")
        serve = {"input": ("--events", self.events), "net": ("--loopback",)}
        arguments: list[str] = []
        for name, carrier in carriers.items():
            backend = stack.enter_context(Backend(folder, name, *serve[name], "--record", self.record(name)))
            self.backends[name] = backend
            given = qemu_args(str(backend.socket), name=f"vhostsock-{name}", **carrier)  # type: ignore[arg-type]
            arguments += given[given.index("-chardev") :]  # the guest has its memory from the first
        if version == "7.2":
            arguments += ["-global", "virtio-net-pci.vectors=0"]
        self.vm = stack.enter_context(
            Vm(folder, initramfs, "--qemu", script("fetch-qemu", suite), "--socket", rng_socket, "--carrier", "rng",
               "--append", "memhp_default_state=online", "--", "-m", "256M,slots=2,maxmem=1G", *arguments)
        )  # fmt: skip

    def record(self, name: str) -> Path:
        return self.folder / f"{name}.rec"

    def messages(self, name: str) -> list[str]:
        """What QEMU has sent that device so far."""
        return [match[1] for line in trace(str(self.record(name))) if (match := re.search(r" -> (\w+) ", line))]

    def type(self, *lines: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.events))
            sock.sendall("".join(f"{line}\n" for line in lines).encode())
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(WITHIN)
            assert sock.recv(4096) == b""  # it says nothing but errors

    def check_rng(self) -> None:
        assert len(set(self.vm.run("dd if=/dev/hwrng bs=1k count=4 iflag=fullblock 2>/dev/null").output)) == 256

    def event_device(self) -> str:
        """The guest's file of our input device, among those of the PC."""
        show = "sed -n '/vhostsock/,/^$/s/.*Handlers=.*\\(event[0-9]*\\).*/\\1/p' /proc/bus/input/devices"
        device = f"/dev/input/{self.vm.run(f'modprobe evdev; {show}').text}"
        self.vm.run(f"until [ -c {device} ]; do usleep 10000; done")
        return device

    def check_input(self) -> None:
        """A key, as /dev/input has it. Nothing is typed before the reader has the device open."""
        device = self.event_device()
        self.vm.run("rm -f /tmp/open")
        reading = self.vm.start(f"exec <{device}; >/tmp/open; dd bs=24 count=4 2>/dev/null")
        self.vm.run("until [ -e /tmp/open ]; do usleep 10000; done")
        self.type("EV_KEY KEY_A 1", "EV_SYN SYN_REPORT 0", "EV_KEY KEY_A 0", "EV_SYN SYN_REPORT 0")
        events = [struct.unpack("<HHi", event[16:]) for (event,) in struct.iter_unpack("24s", reading.wait().output)]
        assert events == [(1, 30, 1), (0, 0, 0), (1, 30, 0), (0, 0, 0)]

    def check_net(self) -> None:
        self.vm.run("ip link set eth0 up")
        assert self.vm.run(f"loop_check eth0 {FRAMES}").text == f"{FRAMES} frames came back"

    def check(self) -> None:
        self.check_rng()
        self.check_net()
        if "input" in self.backends:
            self.check_input()

    def need_input(self) -> Path:
        if "input" not in self.backends:
            pytest.skip("this QEMU wants KVM for an input device")
        return self.events


@pytest.fixture(scope="module", params=PARAMETERS)
def machine(
    request: pytest.FixtureRequest, device_initramfs: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(stack, tmp_path_factory.mktemp("machine"), device_initramfs, request.param)


def test_stock_drivers_drive_the_devices(machine: Machine) -> None:
    machine.check()


def test_the_guest_shows_the_name_of_the_input_device(machine: Machine) -> None:
    machine.need_input()
    assert 'Name="vhostsock keyboard"' in machine.vm.run("cat /proc/bus/input/devices").text


def test_devices_go_on_after_pauses(machine: Machine) -> None:
    for _ in range(3):
        machine.vm.pause()
        machine.vm.resume()
    machine.check()


def test_memory_that_is_plugged_in_is_used_by_all_devices(machine: Machine) -> None:
    vm = machine.vm
    before = {name: machine.messages(name) for name in machine.backends}
    total = int(vm.run(MEMORY).text)
    vm.qmp.execute("object-add", **{"qom-type": "memory-backend-memfd", "id": "more", "size": DIMM, "share": True})
    vm.qmp.execute("device_add", driver="pc-dimm", id="dimm", memdev="more")
    vm.run(f"until [ $({MEMORY}) -gt {total + (DIMM >> 11)} ]; do usleep 10000; done")
    told = {name: machine.messages(name)[len(before[name]) :] for name in machine.backends}
    assert "SET_MEM_TABLE" in told["rng"]
    assert all("ADD_MEM_REG" in told[name] for name in told if name != "rng")
    machine.check()
    # what lies above 4 GiB is given out first: the card's next buffers are there, once those that it has are used up
    vm.run("loop_check eth0 1000")
    assert touched(machine.backends["net"].process.pid, DIMM) > 0


def touched(pid: int, size: int) -> int:
    """KiB that the process has used of mappings of guest memory of this size."""
    used, wanted = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            wanted = "memory-backend-memfd" in line and int(bounds[2], 16) - int(bounds[1], 16) == size
        elif wanted and (rss := re.match(r"Rss: +(\d+) kB", line)):
            used += int(rss[1])
    return used


def test_a_lamp_that_the_guest_switches_is_told(machine: Machine) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(machine.need_input()))
        sock.settimeout(WITHIN)
        sock.sendall(b"nonsense\n")
        assert sock.recv(4096).startswith(b"error:")  # so we are one of those that are told
        machine.vm.run(f"cat >{machine.event_device()}", input=bytes(16) + struct.pack("<HHi", 17, 1, 1))
        assert sock.recv(4096) == b"EV_LED LED_CAPSL 1\n"


def test_devices_work_after_a_reboot(machine: Machine) -> None:
    machine.vm.reset()
    machine.check()


def test_a_device_that_was_unplugged_is_gone_and_its_back_end_takes_the_next(machine: Machine) -> None:
    machine.need_input()
    vm, backend = machine.vm, machine.backends["input"]
    assert isinstance(backend, Backend)
    driver = vm.qmp.execute("qom-get", path="/machine/peripheral/vhostsock-input", property="type")
    options = {"virtio-id": 18, "num_vqs": 2, "vq_size": 64, "config_size": 136} if "test-device" in driver else {}
    vm.unplug("vhostsock-input")
    vm.run("! grep vhostsock /proc/bus/input/devices")
    vm.qmp.execute("chardev-remove", id="vhostsock-input-socket")
    backend.await_log("front-end disconnected")
    address = {"type": "unix", "data": {"path": str(backend.socket)}}
    vm.qmp.execute("chardev-add", id="again", backend={"type": "socket", "data": {"addr": address, "server": False}})
    vm.qmp.execute("device_add", driver=driver, id="vhostsock9", chardev="again", **options)
    wait_until(lambda: "vhostsock" in vm.run("cat /proc/bus/input/devices").text, "the plugged device is driven")
    machine.check_input()
