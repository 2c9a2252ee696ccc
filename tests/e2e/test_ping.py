# SPDX-License-Identifier: BSD-3-Clause
"""Ping sockets of a guest without a NIC, offloaded: a back-end in a network namespace whose ping_group_range is ours to set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.vm import Backend, Vm
from tests.netns import Namespace, may_make_namespaces

pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="needs root, for a network namespace")
RANGE = "/proc/sys/net/ipv4/ping_group_range"
POLICY = """
[[rule]]
match = { scheme = "icmp", address = "10.0.0.5" }
action = "offload"
rewrite = "icmp://127.0.0.1:0"

[[rule]]
match = { scheme = "icmp6", address = "fd00::5" }
action = "offload"
rewrite = "icmp6://::1/0"
"""


@pytest.fixture(scope="module")
def pinging(initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Namespace, Backend, Vm]]:
    folder: Path = tmp_path_factory.mktemp("ping")
    (folder / "policy.toml").write_text(POLICY)
    with Namespace() as space:
        space.link("set", "lo", state="up")
        backend = space.run(Backend, folder, "offload", "--policy", folder / "policy.toml", "--name", "vm1")
        with backend, Vm(folder, initramfs, "--socket", backend.socket) as vm:
            vm.run(f"echo 0 2147483647 >{RANGE}")
            yield space, backend, vm


def test_a_host_that_permits_no_ping_sockets_says_where_to_permit_them(pinging: tuple[Namespace, Backend, Vm]) -> None:
    space, backend, vm = pinging
    space.run(Path(RANGE).write_text, "1 0")
    result = vm.run("ping_check 10.0.0.5", check=False)
    assert "errno 13" in result.text, result
    backend.await_log(r"icmp://10\.0\.0\.5:0 .*EACCES.*net\.ipv4\.ping_group_range")


@pytest.mark.parametrize("address", ["10.0.0.5", "fd00::5"])
def test_ping_claims_hold(pinging: tuple[Namespace, Backend, Vm], address: str) -> None:
    space, _, vm = pinging
    space.run(Path(RANGE).write_text, "0 2147483647")
    result = vm.run(f"ping_check {address}", check=False, timeout=240)
    assert result.status == 0, result
    assert "not ok" not in result.text


def test_an_address_without_a_rule_stays_native(pinging: tuple[Namespace, Backend, Vm]) -> None:
    _, _, vm = pinging
    assert "errno 101" in vm.run("ping_check 192.0.2.1", check=False).text
    assert vm.run("ping_check 127.0.0.1", check=False, timeout=240).status == 0
