# SPDX-License-Identifier: BSD-3-Clause
"""The stock AF_VSOCK driver of a stock kernel, on QEMU's vhost-user-vsock-pci, served by our vsock device."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import HERE
from tests.e2e.vm import Vm, script, wait_until
from tests.e2e.vsock_site import CID, VsockSite, vsock_site


def make_initramfs(folder: Path, *options: str) -> str:
    """A guest with stock modules, the agent, and the check program."""
    program = str(HERE / "guest" / "vsock_check.c")
    return script("mkinitramfs", *options, "--program", program, "-o", str(folder / "vsock.cpio"))


@pytest.fixture(scope="module")
def vsock_initramfs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The one for this system's QEMU and Linux 6.1."""
    script("fetch-qemu")
    return make_initramfs(tmp_path_factory.mktemp("initramfs"))


@pytest.fixture(scope="module")
def site(vsock_initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VsockSite]:
    with vsock_site(tmp_path_factory.mktemp("vsock"), vsock_initramfs) as site:
        yield site


@contextlib.contextmanager
def echo_in_guest(site: VsockSite, port: int) -> Iterator[None]:
    """A program of the guest that listens."""
    site.vm.run(f"vsock_check echo {port} >/tmp/echo & until grep -q ready /tmp/echo; do usleep 10000; done")
    try:
        yield
    finally:
        site.vm.run("killall vsock_check; rm /tmp/echo")


def echoes(sock: socket.socket, data: bytes) -> bool:
    """Whether all of ``data`` comes back, sent and received at once."""
    thread = threading.Thread(target=sock.sendall, args=(data,))
    thread.start()
    got = bytearray()
    while len(got) < len(data) and (part := sock.recv(1 << 16)):
        got += part
    thread.join()
    return got == data


def test_python_is_not_asked_per_packet(site: VsockSite) -> None:
    """The first: after others the device may linger for a minute for a peer that does not read."""
    before = site.backend.idle("vm1")
    site.vm.run("CHECK_ONLY=a_download vsock_check stream")
    after = site.backend.idle("vm1")
    assert after["to_guest"] - before["to_guest"] == 4 << 20
    assert after["events"] - before["events"] == 2  # CONNECT and ENDED


def test_stock_driver_has_the_cid_of_the_command_line(site: VsockSite) -> None:
    assert site.vm.run("ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport | grep ^virtio").text
    assert site.vm.run("vsock_check cid").text == str(CID)


def test_programs_of_the_guest_get_what_they_may_rely_on(site: VsockSite) -> None:
    assert site.check("stream").count("\nok ") >= 14
    with site.accept() as sock:  # of the last claim, which does not wait
        assert sum(map(len, iter(lambda: sock.recv(10000), b""))) == 200000


def test_messages_keep_their_bounds(site: VsockSite) -> None:
    assert site.check("seqpacket").count("ok ") == 3


def test_host_reaches_a_listener_of_the_guest(site: VsockSite) -> None:
    with echo_in_guest(site, 1234):
        with site.connect(1234) as sock:
            assert echoes(sock, b"hello")
        with socket.create_connection(("127.0.0.1", site.published), timeout=300) as sock:
            assert echoes(sock, os.urandom(4 << 20))


def test_many_connections_of_the_host_one_after_the_other_and_at_once(site: VsockSite) -> None:
    before = site.backend.stats("vm1")["flows"]  # one lingers: a program of the host that never reads, of a check before
    with echo_in_guest(site, 1234), contextlib.ExitStack() as stack:
        for number in range(50):
            with site.connect(1234) as sock:
                assert echoes(sock, b"%d" % number)
        for sock in [stack.enter_context(site.connect(1234)) for _ in range(50)]:
            assert echoes(sock, b"at once")
    wait_until(lambda: site.backend.stats("vm1")["flows"] <= before, "every connection is over")


def test_port_where_the_guest_does_not_listen_closes_the_client(site: VsockSite) -> None:
    with pytest.raises(ConnectionError):
        site.connect(4321)


def test_connections_survive_pause_and_resume(site: VsockSite) -> None:
    holding = site.vm.start("vsock_check hold")
    with site.accept() as sock:
        assert sock.recv(3) == b"hi\n"
        site.vm.pause()
        site.vm.resume()
        assert not holding.done
        sock.sendall(b"!")
        assert holding.wait().text.splitlines() == ["recv data", "send ok"]


def test_reboot_ends_every_connection_and_the_new_system_starts_afresh(site: VsockSite) -> None:
    site.vm.start("vsock_check hold")
    with site.accept() as sock:
        assert sock.recv(3) == b"hi\n"
        site.vm.reset()
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert "not ok" not in site.vm.run("CHECK_ONLY=comes_back vsock_check stream").text
    site.backend.idle("vm1")


@pytest.mark.foreign
@pytest.mark.parametrize(("suite", "rings"), [("trixie", "split"), ("trixie-backports", "packed")])
def test_qemu_and_kernel_of_another_suite(tmp_path: Path, suite: str, rings: str) -> None:
    """QEMU 10.0 with Linux 6.12, QEMU 11.1 with Linux 7: drivers that send 64 KiB in one packet, in other buffers than 6.1."""
    kernel = script("fetch-kernel", suite)
    root = make_initramfs(tmp_path, "--kernel", kernel)
    boot = ["--qemu", script("fetch-qemu", suite), "--kernel", kernel]
    if rings == "packed":
        boot += ["--", "-global", "vhost-user-vsock-pci.packed=on"]
    with vsock_site(tmp_path, root, *boot) as site:
        features = site.vm.run("cat /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*/features").text
        assert features[34] == str(int(rings == "packed"))  # VIRTIO_F_RING_PACKED, a digit a bit, bit 0 first
        site.check("stream")
        site.check("seqpacket")
        with echo_in_guest(site, 1234), site.connect(1234) as sock:
            assert echoes(sock, os.urandom(1 << 20))
        site.vm.reset()
        assert "not ok" not in site.vm.run("CHECK_ONLY=comes_back vsock_check stream").text
        site.vm.unplug()
        with pytest.raises(ConnectionError):
            site.connect(1234)


def test_back_end_that_is_gone_hangs_no_program(vsock_initramfs: str, tmp_path: Path) -> None:
    with vsock_site(tmp_path, vsock_initramfs) as site:
        site.vm.start("vsock_check hold")
        with site.accept() as sock:
            assert sock.recv(3) == b"hi\n"
            site.backend.process.kill()
            site.backend.process.wait()
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        # nobody answers: AF_VSOCK's own timeout of 2 seconds
        assert site.vm.run("vsock_check hold", check=False).text.endswith("(errno 110 Connection timed out)")


def test_killed_guest_leaves_nothing_and_the_next_is_served(site: VsockSite, vsock_initramfs: str, tmp_path: Path) -> None:
    site.vm.start("vsock_check hold")
    with site.accept() as sock:
        assert sock.recv(3) == b"hi\n"
        site.vm.process.kill()
        site.vm.process.wait()
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    with Vm(tmp_path, vsock_initramfs, "--socket", site.backend.socket, "--carrier", "vsock") as second:
        assert "not ok" not in second.run("CHECK_ONLY=comes_back vsock_check stream").text
