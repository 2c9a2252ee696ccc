# SPDX-License-Identifier: BSD-3-Clause
"""Network namespaces of the guest: which are offered, how policies tell them apart, and one whose loopback is the device's."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import whole_initramfs
from tests.e2e.vm import Backend, Program, Vm, script
from vhostsock.testing.guest import Result

POLICY = """
[[rule]]
match = {{ scheme = "tcp", address = "10.0.0.5" }}
action = "offload"
rewrite = "tcp://127.0.0.1:{port}"

[[rule]]
match = {{ scheme = "tcp", address = "10.0.0.6", netns = "shop*" }}
action = "offload"
rewrite = "tcp://127.0.0.1:{port}"

[[rule]]
match = {{ scheme = "tcp", address = "10.0.0.7", netns = "*" }}
action = "offload"
rewrite = "tcp://127.0.0.1:{port}"

[hairpin]
netns = "judge"
"""
pytestmark = pytest.mark.skipif("os.geteuid() != 0", reason="hairpin needs a network namespace of the host: root")


class Place:
    """A guest, its back-end, and a web server that is 10.0.0.5, .6 or .7 by who asks."""

    def __init__(self, backend: Backend, vm: Vm) -> None:
        self.backend = backend
        self.vm = vm

    def inside(self, command: str, *, name: str = "", check: bool = True) -> Result:
        """Run a command in a network namespace of its own, which gets a name first."""
        naming = f"echo {name} >/proc/net/hwsock_netns; " if name else ""
        return self.vm.run(f"unshare -n sh -c '{naming}{command}'", timeout=240, check=check)

    def fetch(self, address: str, *, name: str = "") -> str:
        """The page, or wget's complaint."""
        return self.inside(f"wget -q -O - http://{address}/page 2>&1", name=name, check=False).text


NEWER = [pytest.param(suite, marks=pytest.mark.foreign) for suite in ("trixie", "trixie-backports")]


@pytest.fixture(scope="module", params=["bookworm", *NEWER])
def place(request: pytest.FixtureRequest, initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder: Path = tmp_path_factory.mktemp("namespaces")
    kernel = script("fetch-kernel", request.param)
    root = initramfs if request.param == "bookworm" else whole_initramfs(folder, request.param)
    (folder / "page").write_text("served")
    server = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder), "0"]
    with Program(folder / "web.log", server) as web:
        policy = folder / "policy.toml"
        policy.write_text(POLICY.format(port=web.await_log(r" port (\d+)")[1]))
        with (
            Backend(folder, "offload", "--policy", policy, "--name", "vm1") as backend,
            Vm(folder, root, "--kernel", kernel, "--socket", backend.socket) as vm,
        ):
            yield Place(backend, vm)


def test_only_the_initial_namespace_is_offered(place: Place) -> None:
    assert place.vm.run("wget -q -O - http://10.0.0.5/page").text == "served"
    for address in ("10.0.0.5", "10.0.0.6", "10.0.0.7"):
        assert "unreachable" in place.fetch(address)
    assert place.inside("cat /proc/net/hwsock_netns").text.split()[1:] == ["-"]
    assert place.vm.run("cat /proc/net/hwsock_netns").text.split()[1:] == ["init", "offered"]


def test_a_namespace_with_a_name_gets_what_rules_for_that_name_say(place: Place) -> None:
    assert place.fetch("10.0.0.6", name="shop1") == "served"
    assert re.search(r"vm1 #\d+ netns=shop1 tcp://10\.0\.0\.6:80 offload", place.backend.log.read_text())
    assert "unreachable" in place.fetch("10.0.0.6", name="office")
    assert "unreachable" in place.fetch("10.0.0.5", name="shop1"), "a rule that names no namespace is the initial one's"
    assert "unreachable" in place.vm.run("wget -q -O - http://10.0.0.6/page 2>&1", check=False).text


def test_all_namespaces_are_offered_when_the_guest_says_so(place: Place) -> None:
    switch = "/sys/module/virtio_socket/parameters/all_netns"
    place.vm.run(f"echo 1 >{switch}")
    try:
        assert place.fetch("10.0.0.7") == "served"
        assert re.search(r"vm1 #\d+ netns=\d+ tcp://10\.0\.0\.7:80 offload", place.backend.log.read_text())
        assert "unreachable" in place.fetch("10.0.0.5")
    finally:
        place.vm.run(f"echo 0 >{switch}")


def test_root_of_a_container_cannot_name_its_namespace(place: Place) -> None:
    result = place.vm.run("unshare -r -n sh -c 'echo shop1 >/proc/net/hwsock_netns'", check=False)
    assert result.status
    assert b"not permitted" in result.errors
    for wrong, why in (("init", "busy"), ("$(printf %064d 0)", "too long"), ("two words", "Invalid")):
        said = place.inside(f"echo {wrong} >/proc/net/hwsock_netns", check=False).errors.decode()
        assert why in said, said


def test_sockets_are_shown_in_their_namespace_with_its_name(place: Place) -> None:
    shown = place.inside("nc -l -p 7 & until grep -q LISTEN /proc/net/hwsock; do :; done; cat /proc/net/hwsock; kill $!",
                         name="judge").text.splitlines()  # fmt: skip
    assert shown[0].split()[-1] == "netns"
    assert [line.split()[-1].split(":")[1] for line in shown[1:]] == ["judge"]
    assert "judge" not in place.vm.run("cat /proc/net/hwsock").text


def test_a_program_may_talk_to_itself_through_the_device(place: Place) -> None:
    result = place.inside("ip link set lo up; hairpin_check", name="judge", check=False)
    assert "not ok" not in result.text, result.text
    assert result.status == 0
    log = place.backend.log.read_text()
    assert re.search(r"netns=judge tcp://127\.0\.0\.1:0 published as tcp://127\.0\.0\.1:\d+ \(hairpin at ", log)
    assert re.search(r"netns=judge udp6://::1/\d+ offload", log)


def test_the_loopback_of_other_namespaces_stays_native(place: Place) -> None:
    assert "not ok" not in place.inside("ip link set lo up; hairpin_check", name="shop1").text
    assert "not ok" not in place.vm.run("hairpin_check", timeout=240).text
    assert not re.search(r"netns=shop1 \S+ published", place.backend.log.read_text())
