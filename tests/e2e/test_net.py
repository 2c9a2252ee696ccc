# SPDX-License-Identifier: BSD-3-Clause
"""The stock virtio-net driver on our card over a tap, in a namespace of the test: ping, TCP both ways, pause, reset, link."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.vm import WITHIN, Backend, Vm, script, wait_until
from tests.netns import Namespace, may_make_namespaces

pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="needs root and /dev/net/tun")
HOST, GUEST = "192.0.2.1", "192.0.2.2"
SIZE = 8 << 20


class Net:
    """A guest with the card as eth0, and the host's end of the cable: a server that takes bytes and sends them back."""

    def __init__(self, stack: ExitStack, folder: Path, initramfs: str, *boot: str, pairs: int = 1) -> None:
        self.space = stack.enter_context(Namespace())
        self.backend = stack.enter_context(self.space.run(Backend, folder, "net", "--tap", "tap0", "--pairs", str(pairs)))
        self.space.address("tap0", HOST, 24)
        self.server = stack.enter_context(self.space.run(socket.create_server, (HOST, 7)))
        self.server.settimeout(WITHIN)
        self.vm = stack.enter_context(Vm(folder, initramfs, "--socket", self.backend.socket, *boot))
        self.configure()

    def configure(self) -> None:
        self.vm.run(f"ip addr flush dev eth0; ip addr add {GUEST}/24 dev eth0; ip link set eth0 up")

    def ping(self) -> None:
        assert " 3 packets received" in self.vm.run(f"ping -c 3 -i 0.2 -W 10 {HOST}").text

    def transfer(self) -> None:
        """The guest sends random bytes and reads them back; both sides look at all of them."""
        data = random.randbytes(SIZE)
        seen = hashlib.sha256()

        def echo() -> None:
            connection, _ = self.server.accept()
            with connection:
                connection.settimeout(WITHIN)
                left = SIZE
                while left:
                    piece = connection.recv(min(left, 1 << 16))
                    seen.update(piece)
                    connection.sendall(piece)
                    left -= len(piece)

        thread = threading.Thread(target=echo)
        thread.start()
        said = self.vm.run(f"nc {HOST} 7 | head -c {SIZE} | sha256sum", input=data).text.split()[0]
        thread.join()
        assert said == seen.hexdigest() == hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def net(stock_initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """With two queue pairs, for each of which QEMU 7.2 shares the guest's memory anew."""
    with ExitStack() as stack:
        yield Net(stack, tmp_path_factory.mktemp("net"), stock_initramfs, "--carrier", "net", "--pairs", "2", pairs=2)


def feature(vm: Vm, bit: int) -> bool:
    return vm.run("cat /sys/class/net/eth0/device/features").text[bit] == "1"


def test_guest_and_host_reach_each_other(net: Net) -> None:
    assert feature(net.vm, 8), "it takes segments that are to be cut"
    net.ping()
    net.transfer()
    stats = net.backend.stats("net")
    assert stats["tx_refused"] == stats["tx_dropped"] == stats["rx_dropped"] == 0
    assert min(stats["rx_gso"], stats["tx_gso"]) > 0, "segments went through uncut, both ways"


def test_a_transfer_survives_pauses(net: Net) -> None:
    ends = threading.Event()

    def pauses() -> None:
        while not ends.wait(0.05):
            net.vm.pause()
            net.vm.resume()

    thread = threading.Thread(target=pauses)
    thread.start()
    try:
        net.transfer()
    finally:
        ends.set()
        thread.join()


def test_the_card_works_after_a_reset(net: Net) -> None:
    net.vm.reset()
    net.configure()
    net.ping()
    net.transfer()


def test_a_card_outlives_its_back_end(device_initramfs: str, tmp_path: Path) -> None:
    """QEMU 7.2 takes the guest's carrier while there is none, and gives it back with the next."""
    with ExitStack() as stack:
        first = stack.enter_context(Backend(tmp_path, "net", "--loopback"))
        vm = stack.enter_context(
            Vm(tmp_path, device_initramfs, "--socket", first.socket, "--carrier", "net", "--reconnect", "1")
        )
        vm.run("ip link set eth0 up; loop_check eth0 100")
        first.process.kill()
        first.process.wait()
        wait_until(lambda: vm.run("cat /sys/class/net/eth0/carrier").text == "0", "the carrier goes")
        stack.enter_context(Backend(tmp_path, "net", "--loopback"))
        wait_until(lambda: vm.run("cat /sys/class/net/eth0/carrier").text == "1", "the carrier comes")
        assert vm.run("loop_check eth0 100").text == "100 frames came back"


@pytest.mark.foreign
def test_a_tap_that_is_set_down_takes_the_guests_carrier_and_gives_it_back(stock_initramfs: str, tmp_path: Path) -> None:
    """Over the generic device of QEMU 11.1, where the config space is ours: a config change, seen by the guest's driver."""
    qemu = script("fetch-qemu", "trixie-backports")
    generic = ("--carrier", "generic", "--virtio-id", "1", "--config-size", "12", "--qemu", qemu)
    with ExitStack() as stack:
        net = Net(stack, tmp_path, stock_initramfs, *generic)
        net.ping()
        for state, carrier in (("down", "0"), ("up", "1")) * 2:
            net.space.link("set", "tap0", state=state)
            wait_until(lambda c=carrier: net.vm.run("cat /sys/class/net/eth0/carrier").text == c, f"carrier {carrier}")  # type: ignore[misc]
        net.ping()
        net.transfer()
