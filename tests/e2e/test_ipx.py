# SPDX-License-Identifier: BSD-3-Clause
"""IPX between two guests, each with a back-end of its own: datagrams both ways, broadcasts, and what programs may rely on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests.e2e.vm import Backend, Vm
from vhostsock.offload.uri import IpxURI
from vhostsock.testing.guest import Command

NETWORK = "000000a1"
PORT = 2130


def place(number: int) -> str:
    """A loopback address that is this run's alone."""
    return f"127.{64 | os.getpid() >> 8 & 63}.{os.getpid() & 255}.{number}"


def node(host: str) -> str:
    return f"{IpxURI.node_at(IPv4Address(host), PORT):012x}"


@dataclass
class Node:
    vm: Vm
    backend: Backend
    own: str
    peer: str
    echo: Command | None = None
    echo_says: str = ""  # the file in the guest

    def start_echo(self) -> None:
        self.echo, self.echo_says = self.vm.start_until("ipx_check echo", "ready")


@pytest.fixture(scope="module")
def nodes(initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    hosts = [place(1), place(2)]
    with contextlib.ExitStack() as stack:
        made: list[Node] = []
        for own, peer in (hosts, reversed(hosts)):
            folder: Path = tmp_path_factory.mktemp("ipx")
            (folder / "policy.toml").write_text(f"""
[[rule]]
match = {{ scheme = "ipx", address = "{place(3)}" }}
action = "deny"
errno = "EPERM"

[[ipx]]
network = "{NETWORK}"
listen = "udp://{own}:{PORT}"
peers = ["udp://{peer}:{PORT}"]
""")
            policy = folder / "policy.toml"
            backend = stack.enter_context(Backend(folder, "offload", "--policy", policy, "--name", f"vm{len(made)}"))
            vm = stack.enter_context(Vm(folder, initramfs, "--socket", backend.socket))
            made.append(Node(vm, backend, node(own), node(peer)))
        for each in made:
            each.start_echo()
        yield made


@pytest.mark.parametrize("number", [0, 1], ids=["one way", "the other way"])
def test_ipx_claims_hold_between_two_guests(nodes: list[Node], number: int) -> None:
    here = nodes[number]
    result = here.vm.run(f"ipx_check {NETWORK} {here.own} {here.peer} {node(place(3))}", check=False)
    assert result.status == 0, result
    assert "not ok" not in result.text
    assert result.text.endswith("\n1..18")


def test_the_sockets_are_shown_and_logged(nodes: list[Node]) -> None:
    here = nodes[0]
    assert f"ipx://{NETWORK}.{here.own}.5000" in here.vm.run("grep ^ipx /proc/net/hwsock").text
    here.backend.await_log(rf"#\d+ ipx://00000000\.0+\.5000 bound as ipx://{NETWORK}\.{here.own}\.5000, over udp://")


def test_an_unplugged_device_is_an_interface_that_is_gone(nodes: list[Node]) -> None:
    here = nodes[1]
    here.vm.unplug()
    assert here.echo
    assert here.echo.wait(check=False).status == 1
    assert "recvfrom: Link has been severed" in here.vm.run(f"cat {here.echo_says}").text
    assert "errno 99" in here.vm.run("ipx_check echo", check=False).text
