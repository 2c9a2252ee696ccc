# SPDX-License-Identifier: BSD-3-Clause
"""A guest with a NIC beside the device: each serves its sockets, and neither hears of the other's.

QEMU's user networking is the network: 10.0.2.2 is this host's loopback, and in no rule of the policy.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Site, site
from tests.e2e.vm import WITHIN, Program, free_port

HOST, OWN, OWN6 = "10.0.2.2", "10.0.2.15", "fec0::15"


@contextlib.contextmanager
def with_nic(folder: Path, initramfs: str, *, hints: bool = False) -> Iterator[Site]:
    with site(folder, initramfs, "--nic", hints=hints) as it:
        it.vm.run(f"echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; ip -6 addr add {OWN6}/64 dev eth0")
        yield it


@pytest.fixture(scope="module")
def place(initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with with_nic(tmp_path_factory.mktemp("site"), initramfs) as it:
        yield it


@pytest.fixture(scope="module")
def web(place: Site) -> Iterator[str]:
    """The files of ``place.www`` as the guest finds them through its NIC."""
    port = free_port()
    server = ["python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(place.www), str(port)]
    with Program(place.folder / "native.log", server) as program:
        program.await_log("port")
        yield f"http://{HOST}:{port}"


def forward(place: Site, kind: socket.SocketKind, guest_port: int) -> int:
    """Publish a port of the guest through its NIC; the port of this host's loopback."""
    port, name = free_port(kind), "udp" if kind == socket.SOCK_DGRAM else "tcp"
    line = f"hostfwd_add {name}:127.0.0.1:{port}-{OWN}:{guest_port}"
    assert not place.vm.qmp.execute("human-monitor-command", **{"command-line": line})
    return port


def moved(place: Site) -> dict[str, int]:
    """How many bytes the device has moved."""
    return {key: value for key, value in place.backend.stats("vm1").items() if key.startswith("bytes")}


def check_claims(place: Site) -> None:
    ways = f"NIC_TCP={forward(place, socket.SOCK_STREAM, 8080)} NIC_UDP={forward(place, socket.SOCK_DGRAM, 8090)}"
    ports = place.ports
    place.check(f"{ways} nic_check 10.0.0.5 7000 {HOST} {ports['peer']} {ports['closed']} {OWN} {OWN6}")


def test_claims_hold(place: Site) -> None:
    check_claims(place)


def test_what_the_nic_serves_costs_the_device_nothing_but_the_question(place: Site, web: str) -> None:
    before = moved(place)
    place.vm.run(f"wget -q -O /dev/null {web}/data")
    assert moved(place) == before


def test_both_move_data_at_once(place: Site, web: str) -> None:
    want = hashlib.sha256((place.www / "data").read_bytes()).hexdigest()
    running = [place.vm.start(f"wget -q -O - {url}/data | sha256sum") for url in (web, "http://10.0.0.5", web, "http://10.0.0.5")]
    assert [command.wait().text.split()[0] for command in running] == [want] * 4


def test_one_web_server_is_reached_from_every_side(place: Site) -> None:
    port = forward(place, socket.SOCK_STREAM, 8081)
    place.vm.run("mkdir -p /tmp/www && echo hello >/tmp/www/x && httpd -p 8081 -h /tmp/www")
    assert place.fetch(8081, "/x") == b"hello\n"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/x", timeout=WITHIN) as answer:
        assert answer.read() == b"hello\n"
    for address in ("127.0.0.1", OWN):
        assert place.vm.run(f"wget -q -O - http://{address}:8081/x").text == "hello"


def test_without_its_link_native_sockets_fail_and_offloaded_ones_do_not(place: Site, web: str) -> None:
    holding = place.vm.start("hold 10.0.0.5 7002")
    with place.accept() as sock:
        assert sock.recv(3) == b"hi\n"
        place.vm.run("ip link set eth0 down")
        try:
            assert "unreachable" in place.vm.run(f"wget -O - {web}/data", check=False).errors.decode()
            place.vm.run("wget -q -O /dev/null http://10.0.0.5/data")
            sock.sendall(b"still here\n")
        finally:
            place.vm.run("ip link set eth0 up; ip route add default via 10.0.2.2")
    assert holding.wait().text.splitlines() == ["data still here", "recv EOF"]
    place.vm.run(f"wget -q -O /dev/null {web}/data")


def test_without_the_device_native_sockets_live_on(place: Site, web: str) -> None:
    """Last: nobody plugs it again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        holding = place.vm.start(f"hold {HOST} {server.getsockname()[1]}")
        server.settimeout(WITHIN)
        sock, _ = server.accept()
        with sock:
            sock.settimeout(WITHIN)
            assert sock.recv(3) == b"hi\n"
            place.vm.unplug()
            place.vm.run(f"wget -q -O /dev/null {web}/data")
            sock.sendall(b"still here\n")
    assert holding.wait().text.splitlines() == ["data still here", "recv EOF"]
