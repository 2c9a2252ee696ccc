# SPDX-License-Identifier: BSD-3-Clause
"""The ways between a guest and its host that guest.py compares: for each a guest, a back-end, and the far end (far.c).

Every guest has the same kernel and the same root, with near.c in it; one processor, 256 MiB, and no device but the one of its
path. The others' devices have the options that their own manuals begin with. Each far end is a process of its own. A far end in
the guest, too, where a program of the host reaches it: `LISTENS` of the guest, by what each path has for that.
"""

from __future__ import annotations

import contextlib
import copy
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.bench import iperf
from tests.bench.native import HERE, built
from tests.e2e.vm import WITHIN, Backend, Program, Vm, free_port, script, wait_until
from tests.netns import Namespace
from tests.probe.others import BACKENDS, fetched

__all__ = ["PATHS", "Open", "Route", "Shop"]

LOOPBACK, HOST, GUEST = "127.0.0.1", "10.0.2.2", "10.0.2.15"  # as the guest knows them, see qemu-scripts/guest/init
NIC = ("-device", "virtio-net-pci,netdev=net,romfile=")
CID, VMADDR_CID_HOST, PORT = "3", 2, 7000
LISTENS = 7001  # in the guest
NEWEST = "trixie-backports"
QUIET = ("-machine", "hpet=off")
"""That of QEMU 11 ticks 250 times a second for a guest that does nothing, at 2 % of a core; seven of eight do nothing."""
POLICY = """
[[rule]]
match = {{ scheme = "tcp", address = "{host}", port = {port} }}
action = "offload"
rewrite = "tcp://127.0.0.1:{far}"

[[rule]]
match = {{ scheme = "udp", address = "{host}", port = {port} }}
action = "offload"
rewrite = "udp://127.0.0.1:{far_udp}"

[[rule]]
match = {{ scheme = "tcp", address = "{host}", port = {iperf} }}
action = "offload"
rewrite = "tcp://127.0.0.1:{{port}}"

[[publish]]
guest = "tcp://0.0.0.0:{listens}"
host = "tcp://127.0.0.1:{into}"
"""


class Open(NamedTuple):
    """A path that is there. ``where``: the far end, in near.c's words, ``udp``: for datagrams, "" where the path carries none.

    ``into``: the far end in the guest, as near.c on the host finds it. ``backend``: None where QEMU or the kernel is that.
    ``iperf``: iperf3's server, ADDRESS:PORT. ``space``: where the host's programs are that reach the guest; None: not apart.
    """

    vm: Vm
    where: str
    far: Program
    into: str
    backend: Program | None = None
    udp: str = ""
    iperf: str = ""
    space: Namespace | None = None

    def on_host(self, command: list[str | Path]) -> str:
        """What a program of the host prints that ends by itself."""
        run = partial(subprocess.run, command, capture_output=True, text=True, check=True, timeout=WITHIN)
        return (self.space.run(run) if self.space else run()).stdout


class Shop:
    """What all paths are made with. ``folder`` is theirs; ``more`` says which words a QEMU is given besides."""

    def __init__(self, folder: Path, more: Callable[[str], Sequence[str]] = lambda qemu: ()) -> None:
        self.folder = folder
        self.more = more
        self.far = built(folder, "far", HERE / "far.c")
        self.near = built(folder, "near", HERE / "near.c")
        programs = ("--program", str(HERE / "near.c"), "--program", str(HERE / "far.c"), *iperf.carried())
        module = script("build-guest-module")
        self.initramfs = script("mkinitramfs", *programs, "--module", module, "-o", str(folder / "root.cpio"))

    def within(self, name: str) -> Shop:
        """The same, for paths in a folder of their own: where there are several of one name."""
        other = copy.copy(self)
        other.folder = self.place(name)
        return other

    def place(self, name: str) -> Path:
        """A folder for the path of that name."""
        place = self.folder / name
        place.mkdir()
        return place

    def listening(self, place: Path, *where: str) -> Program:
        """A far end that serves there, each in far.c's words: connections, and datagrams where that is an address of UDP."""
        words = (f"{'dgram' if each.startswith('udp') else 'serve'}:{each}" for each in where)
        far = Program(place / "far.log", [self.far, *words])
        far.await_log("ready")
        return far

    def vm(
        self, place: Path, *options: str | Path, qemu: str = NEWEST, ours: bool = False, where: str = f"tcp:0.0.0.0:{LISTENS}"
    ) -> Vm:
        """``ours``: with the guest module; without it nothing of it is there. ``where``: of its far end, in far.c's words."""
        words = () if ours else ("--append", "vhostsock.nomodule")
        binary = script("fetch-qemu", qemu)
        more = (*QUIET, *self.more(binary))
        last = more if "--" in options else ("--", *more)
        vm = Vm(place, self.initramfs, "--qemu", binary, *words, *options, *last)
        try:
            vm.start_until(f"far serve:{where}", "ready", timeout=86400)
        except BaseException:
            vm.close()
            raise
        return vm


class Route(NamedTuple):
    """``title``: as the tables have it. ``ours``: what the project offers."""

    title: str
    start: Callable[[Shop, str], contextlib.AbstractContextManager[Open]]
    ours: bool = False


def _ports(far: Program) -> tuple[int, int]:
    """Of one that serves connections and then datagrams."""
    tcp, udp = far.await_log(r"^(\d+)\n(\d+)\n").groups()
    return int(tcp), int(udp)


@contextlib.contextmanager
def _open(
    place: Path, vm: Vm, far: Program, into: str, backend: Program | None = None, space: Namespace | None = None
) -> Iterator[Open]:
    """Where the guest reaches the ports of the far end as they are, and of iperf3."""
    tcp, udp = _ports(far)
    port, address = free_port(), HOST if space else LOOPBACK
    serve = partial(iperf.server, place / "iperf3.log", address, port)
    with space.run(serve) if space else serve():
        yield Open(vm, f"tcp:{HOST}:{tcp}", far, into, backend, f"udp:{HOST}:{udp}", f"{HOST}:{port}", space)


def offload(carrier: str, qemu: str) -> Callable[[Shop, str], contextlib.AbstractContextManager[Open]]:
    @contextlib.contextmanager
    def start(shop: Shop, name: str) -> Iterator[Open]:
        place = shop.place(name)
        policy = place / "policy.toml"
        into, port = free_port(), free_port()
        with shop.listening(place, "tcp", "udp") as far, iperf.server(place / "iperf3.log", LOOPBACK, port):
            tcp, udp = _ports(far)
            ports = {"port": PORT, "far": tcp, "far_udp": udp, "iperf": port, "listens": LISTENS, "into": into}
            policy.write_text(POLICY.format(host=HOST, **ports))
            with (
                Backend(place, "offload", "--policy", policy, "--name", "vm1") as backend,
                shop.vm(place, "--socket", backend.socket, "--carrier", carrier, qemu=qemu, ours=True) as vm,
            ):
                here, udp_here = (f"{kind}:{HOST}:{PORT}" for kind in ("tcp", "udp"))
                yield Open(vm, here, far, f"tcp:{LOOPBACK}:{into}", backend, udp_here, f"{HOST}:{port}")
                assert backend.stats("vm1")["opened"] > 0, "nothing was offloaded"

    return start


@contextlib.contextmanager
def slirp(shop: Shop, name: str) -> Iterator[Open]:
    place, into = shop.place(name), free_port()
    card = ("-netdev", f"user,id=net,hostfwd=tcp:{LOOPBACK}:{into}-:{LISTENS}", *NIC)
    with (
        shop.listening(place, "tcp", "udp") as far,
        shop.vm(place, "--", *card) as vm,
        _open(place, vm, far, f"tcp:{LOOPBACK}:{into}") as it,
    ):
        yield it


@contextlib.contextmanager
def passt(shop: Shop, name: str) -> Iterator[Open]:
    """``name``: passt-stream, where frames go through a socket, or passt-vhost-user, where it maps the guest's memory."""
    place, into = shop.place(name), free_port()
    way = place / "passt.sock"
    vhost_user = name == "passt-vhost-user"
    # the guest's address is the one that init gives it; its gateway leads to the host's loopback
    options: list[str | Path] = ["-f", "-4", "-a", GUEST, "-n", "24", "-g", HOST, "-s", way]
    options += ["-t", f"{LOOPBACK}/{into}:{LISTENS}"]
    if vhost_user:
        options.append("--vhost-user")
        card = [
            *("-object", "memory-backend-memfd,id=memory,size=256M,share=on", "-machine", "memory-backend=memory"),
            *("-chardev", f"socket,id=passt,path={way}", "-netdev", "vhost-user,id=net,chardev=passt"),
        ]
    else:
        card = ["-netdev", f"stream,id=net,addr.type=unix,addr.path={way},server=off"]
    with (
        shop.listening(place, "tcp", "udp") as far,
        Program(place / "passt.log", [_passt(), *options]) as backend,
    ):
        wait_until(way.exists, "passt listens")
        with shop.vm(place, "--", *card, *NIC) as vm:
            vm.run("ip link set eth0 mtu 65520")  # passt's DHCP would have said so, and it is many times faster for it
            with _open(place, vm, far, f"tcp:{LOOPBACK}:{into}", backend) as it:
                yield it


def _passt() -> str:
    """The build for this processor. The package holds two; passt would choose by its own name, and finds that of the loader."""
    avx2 = " avx2 " in Path("/proc/cpuinfo").read_text()
    return script("fetch-program", NEWEST, "passt", "passt.avx2" if avx2 else "passt")


@contextlib.contextmanager
def tap(shop: Shop, name: str) -> Iterator[Open]:
    """A tap without vhost, in a namespace of its own; root only."""
    place = shop.place(name)
    with Namespace() as space:
        card = ("-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no", *NIC)
        with space.run(shop.vm, place, "--", *card) as vm:
            space.address("tap0", HOST, 24)
            space.link("set", "tap0", state="up")
            with (
                space.run(shop.listening, place, f"tcp:{HOST}", f"udp:{HOST}") as far,
                _open(place, vm, far, f"tcp:{GUEST}:{LISTENS}", space=space) as it,
            ):
                yield it


def _vsock_words(uds: Path) -> str:
    """The far end of a vsock path: both devices take a port of the host for a Unix socket beside ``uds``."""
    return f"{uds}_{PORT}"


@contextlib.contextmanager
def vsock(shop: Shop, name: str) -> Iterator[Open]:
    place = shop.place(name)
    uds = place / "v"
    with (
        shop.listening(place, _vsock_words(uds)) as far,
        Backend(place, "vsock", "--guest-cid", CID, "--uds-path", uds) as backend,
        shop.vm(place, "--socket", backend.socket, "--carrier", "vsock", where=f"vsock:{LISTENS}") as vm,
    ):
        yield Open(vm, f"vsock:{VMADDR_CID_HOST}:{PORT}", far, f"into:{uds}:{LISTENS}", backend)


@contextlib.contextmanager
def vhost_device_vsock(shop: Shop, name: str) -> Iterator[Open]:
    place = shop.place(name)
    uds, way = place / "v", place / "vsock.sock"
    [other] = [each for each in BACKENDS if each.device == "vsock"]
    command: list[str | Path] = [fetched(other), "--guest-cid", CID, "--uds-path", uds, "--socket", way]
    with shop.listening(place, _vsock_words(uds)) as far, Program(place / "vsock.log", command) as backend:
        wait_until(way.exists, "vhost-device-vsock listens")
        with shop.vm(place, "--socket", way, "--carrier", "vsock", where=f"vsock:{LISTENS}") as vm:
            yield Open(vm, f"vsock:{VMADDR_CID_HOST}:{PORT}", far, f"into:{uds}:{LISTENS}", backend)


PATHS = {
    "offload-fs": Route("offload, fs, QEMU 7.2", offload("fs", "distribution"), ours=True),
    "offload-generic": Route("offload, generic", offload("generic", NEWEST), ours=True),
    "vsock": Route("vsock", vsock, ours=True),
    "slirp": Route("slirp", slirp),
    "passt-stream": Route("passt, stream", passt),
    "passt-vhost-user": Route("passt, vhost-user", passt),
    "tap": Route("tap, no vhost", tap),
    "vhost-device-vsock": Route("vhost-device-vsock", vhost_device_vsock),
}
