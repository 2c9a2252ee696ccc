# SPDX-License-Identifier: BSD-3-Clause
"""The ways from a guest to its host that guest.py compares: for each a guest, a back-end, and the far end (far.c) behind it.

Every guest has the same kernel and the same root, with near.c in it; one processor, 256 MiB, and no device but the one of its
path. The others' devices have the options that their own manuals begin with. Each far end is a process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.bench.native import HERE, built
from tests.e2e.vm import Backend, Program, Vm, script

__all__ = ["PATHS", "Open", "Route", "Shop"]

HOST = "10.0.2.2"  # as the guest knows the host; 10.0.2.15 is the guest itself, see qemu-scripts/guest/init
PORT = 7000
NEWEST = "trixie-backports"
POLICY = """
[[rule]]
match = {{ scheme = "tcp", address = "{host}", port = {port} }}
action = "offload"
rewrite = "tcp://127.0.0.1:{far}"
"""


class Open(NamedTuple):
    """A path that is there. ``where``: the far end, in near.c's words. ``backend``: None where QEMU or the kernel is that."""

    vm: Vm
    where: str
    far: Program
    backend: Program | None = None


class Shop:
    """What all paths are made with. ``folder`` is theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.far = built(folder, "far", HERE / "far.c")
        programs = ("--program", str(HERE / "near.c"), "--program", str(HERE / "far.c"))
        module = script("build-guest-module")
        self.initramfs = script("mkinitramfs", *programs, "--module", module, "-o", str(folder / "root.cpio"))

    def place(self, name: str) -> Path:
        """A folder for the path of that name."""
        place = self.folder / name
        place.mkdir()
        return place

    def listening(self, place: Path, *where: str) -> Program:
        """A far end that serves there."""
        far = Program(place / "far.log", [self.far, *(f"serve:{each}" for each in where)])
        far.await_log("ready")
        return far

    def vm(self, place: Path, *options: str | Path, qemu: str = NEWEST, ours: bool = False) -> Vm:
        """``ours``: with the guest module; without it nothing of it is there."""
        words = () if ours else ("--append", "vhostsock.nomodule")
        return Vm(place, self.initramfs, "--qemu", script("fetch-qemu", qemu), *words, *options)


class Route(NamedTuple):
    """``title``: as the tables have it. ``ours``: what the project offers."""

    title: str
    start: Callable[[Shop, str], contextlib.AbstractContextManager[Open]]
    ours: bool = False


def _tcp_port(far: Program) -> int:
    return int(far.await_log(r"^(\d+)\n")[1])


def offload(carrier: str, qemu: str) -> Callable[[Shop, str], contextlib.AbstractContextManager[Open]]:
    @contextlib.contextmanager
    def start(shop: Shop, name: str) -> Iterator[Open]:
        place = shop.place(name)
        policy = place / "policy.toml"
        with shop.listening(place, "tcp") as far:
            policy.write_text(POLICY.format(host=HOST, port=PORT, far=_tcp_port(far)))
            with (
                Backend(place, "offload", "--policy", policy, "--name", "vm1") as backend,
                shop.vm(place, "--socket", backend.socket, "--carrier", carrier, qemu=qemu, ours=True) as vm,
            ):
                yield Open(vm, f"tcp:{HOST}:{PORT}", far, backend)
                assert backend.stats("vm1")["events"] > 0, "nothing was offloaded"

    return start


@contextlib.contextmanager
def slirp(shop: Shop, name: str) -> Iterator[Open]:
    place = shop.place(name)
    with shop.listening(place, "tcp") as far, shop.vm(place, "--nic") as vm:
        yield Open(vm, f"tcp:{HOST}:{_tcp_port(far)}", far)


PATHS = {
    "offload-fs": Route("offload, `fs`, QEMU 7.2", offload("fs", "distribution"), ours=True),
    "offload-generic": Route("offload, `generic`", offload("generic", NEWEST), ours=True),
    "slirp": Route("slirp", slirp),
}
