# SPDX-License-Identifier: BSD-3-Clause
"""What the rings cost: ``tests/bench/run ring``. docs/performance.md keeps what it printed.

1. The ring core alone, driver and device in C on one thread (loop.c): chains a second.
2. Against another implementation: requests a second of a null disk, through a back-end process, with the same front-end and the
   same driver (driver.c) for each. qemu-storage-daemon's vhost-user-blk on a null-co node (libvhost-user in C, and QEMU's block
   layer) against a null disk on this library in C, and in Python. And the real disks: an image file, QEMU's and ours.

All back-ends run all the time, and take turns in each round; a ratio is of two neighbours in one round. Figures are
min - median - max of the rounds. It needs two cores that nobody else uses.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.native import CORE, HERE, built, loaded
from tests.bench.null import command_of
from tests.probe.others import BACKENDS, fetched
from vhostsock.proto import VirtioFeature
from vhostsock.testing.frontend import Frontend
from vhostsock.testing.packed import PackedQueue

__all__ = ["Peer", "core", "main", "peers", "rates"]

BLOCK = 4096  # bytes of a read
DISK = 64 << 20
DEPTHS = (1, 64)
SECONDS = 0.5  # of a measurement, about
NOISE = 20  # requests that are done first


class Peer(NamedTuple):
    """{socket} in its command: where it listens; {folder}: a folder with disk.img. base: name of what it is compared with."""

    name: str
    command: str
    base: str
    packed: bool = False


def peers(program: Path) -> list[Peer]:
    """All of them; ``program`` is a qemu-storage-daemon."""
    export = "--export type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={socket}"

    def null(kind: str) -> str:
        return shlex.join(command_of(kind, "{socket}", "{folder}"))

    serve = f"{shlex.quote(sys.executable)} -m vhostsock serve blk --log-level error --read-only"
    qsd = "qemu-storage-daemon"
    return [
        Peer(
            f"{qsd}, null-co",
            f"{program} --blockdev driver=null-co,node-name=disk,read-zeroes=on,size={DISK} {export}",
            f"{qsd}, null-co",
        ),
        Peer("null disk in C", null("c"), f"{qsd}, null-co"),
        Peer("null disk in C, packed ring", null("c"), f"{qsd}, null-co", True),
        Peer("null disk, handle_batch", null("batch"), f"{qsd}, null-co"),
        Peer("null disk, handle", null("handle"), f"{qsd}, null-co"),
        Peer(
            f"{qsd}, image file",
            f"{program} --blockdev driver=file,node-name=disk,read-only=on,filename={{folder}}/disk.img {export}",
            f"{qsd}, image file",
        ),
        Peer(
            "vhostsock serve blk, image file",
            f"{serve} --socket-path {{socket}} --image {{folder}}/disk.img",
            f"{qsd}, image file",
        ),
    ]


# ---- 1. the core alone


def core(folder: Path, rounds: int, milliseconds: float) -> dict[tuple[str, ...], list[float]]:
    """(format, event_idx, batch, notified) -> chains a second, for each round."""
    program = built(folder, "loop", HERE / "loop.c", HERE / "driver.c", *sorted(CORE.glob("*.c")))
    done = subprocess.run([program, str(rounds), str(milliseconds)], stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    found: dict[tuple[str, ...], list[float]] = {}
    for line in done.stdout.splitlines():
        *key, rate = line.split()
        found.setdefault(tuple(key), []).append(float(rate))
    return found


# ---- 2. through a back-end process


@contextlib.contextmanager
def started(peer: Peer, folder: Path, number: int) -> Iterator[socket.socket]:
    """Its process, and a connection to it."""
    path = folder / f"{number}.sock"
    words = shlex.split(peer.command)
    command = [word.replace("{socket}", str(path)).replace("{folder}", str(folder)) for word in words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            for _ in range(10000):
                if process.poll() is not None:
                    raise RuntimeError(f"{peer.name} ended with status {process.returncode}")
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    sock.connect(str(path))
                    break
                asyncio.run(asyncio.sleep(0.002))
            yield sock
        finally:
            sock.close()
            process.terminate()


class Bench:
    """A running queue of one back-end, driven from C."""

    def __init__(self, folder: Path, peer: Peer, frontend: Frontend) -> None:
        self.name = peer.name
        self.frontend = frontend
        self._ffi, self._lib = loaded(folder, "driver")
        queue = frontend.queues[0]
        memory = frontend.memory
        assert isinstance(queue, PackedQueue) == peer.packed
        view, _ = memory.at(memory.regions[0].gpa, 1)
        self._ram: Any = self._ffi.from_buffer(view)
        self._driver = self._ffi.new("struct drv *")
        for name, value in {
            "ram": self._ram, "gpa": memory.regions[0].gpa, "desc": queue.desc, "avail": queue.avail, "used": queue.used,
            "buffers": memory.alloc(1 << 20), "num": queue.num, "depth": max(DEPTHS), "descs": 3, "n_out": 1,
            "packed": peer.packed, "event_idx": queue.event_idx, "kick_fd": queue.kick_fd, "call_fd": queue.call_fd,
        }.items():  # fmt: skip
            setattr(self._driver, name, value)
        self._driver.len[0:3] = [16, BLOCK, 1]  # a header of zeros is a read of sector 0 (virtio 1.3, 5.2.6)
        self._lib.drv_init(self._driver)
        self.count = {depth: NOISE * depth for depth in DEPTHS}

    def rate(self, depth: int) -> float:
        """Requests a second at that depth; the next measurement takes SECONDS then."""
        took = self._lib.drv_run(self._driver, self.count[depth], depth)
        if took <= 0:
            raise RuntimeError(f"{self.name}: a request was not completed")
        rate = self.count[depth] / took * 1e9
        self.count[depth] = max(int(rate * self.seconds), NOISE * depth)
        return float(rate)

    seconds = SECONDS

    def close(self) -> None:
        self._ffi.release(self._ram)
        self.frontend.close()


async def attached(folder: Path, peer: Peer, sock: socket.socket) -> Bench:
    accept = VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.VERSION_1 | VirtioFeature.EVENT_IDX
    if peer.packed:
        accept |= VirtioFeature.RING_PACKED
    frontend = Frontend(sock, size=256, memory=(1 << 22,), accept=int(accept))
    await frontend.handshake()
    await frontend.start()
    return Bench(folder, peer, frontend)


def rates(folder: Path, chosen: Sequence[Peer], rounds: int, seconds: float) -> dict[tuple[str, int], list[float]]:
    """(peer, depth) -> requests a second, for each round; two rounds before them set the pace and are forgotten."""
    found: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        benches = []
        for number, peer in enumerate(chosen):
            sock = stack.enter_context(started(peer, folder, number))
            bench = asyncio.run(attached(folder, peer, sock))
            bench.seconds = seconds
            stack.callback(bench.close)
            benches.append(bench)
        for number in range(rounds + 2):
            for depth in DEPTHS:
                for bench in benches:
                    rate = bench.rate(depth)
                    if number >= 2:
                        found.setdefault((bench.name, depth), []).append(rate)
    return found


# ---- the report


def spread(values: Sequence[float], form: str) -> str:
    return " - ".join(format(value, form) for value in (min(values), statistics.median(values), max(values)))


def core_table(found: dict[tuple[str, ...], list[float]]) -> list[str]:
    lines = ["| ring | EVENT_IDX | batch | polled, M chains/s | notified, M chains/s |", "|---|---|---|---|---|"]
    for kind, event_idx, batch, notified in found:
        if notified == "0":
            pair = [found[kind, event_idx, batch, each] for each in "01"]
            cells = [spread([value / 1e6 for value in each], ".2f") for each in pair]
            lines.append(f"| {kind} | {'yes' if event_idx == '1' else 'no'} | {batch} | {' | '.join(cells)} |")
    return lines


def peer_table(chosen: Sequence[Peer], found: dict[tuple[str, int], list[float]]) -> list[str]:
    lines = ["| back-end | depth | k requests/s | ratio |", "|---|---|---|---|"]
    for depth in DEPTHS:
        for peer in chosen:
            own, base = found[peer.name, depth], found[peer.base, depth]
            ratio = spread([a / b for a, b in zip(own, base, strict=True)], ".2f") if peer.base != peer.name else "1"
            lines.append(f"| {peer.name} | {depth} | {spread([value / 1e3 for value in own], '.1f')} | {ratio} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run ring", description="What the rings cost.")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="of one measurement, about")
    parser.add_argument("--core", action="store_true", help="the ring core alone: nothing is fetched")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vhostsock-bench-") as name:
        folder = Path(name)
        print("\n".join(core_table(core(folder, options.rounds, options.seconds * 100))), flush=True)
        if options.core:
            return
        with open(folder / "disk.img", "wb") as image:
            image.write(os.urandom(DISK))
        [qsd] = [backend for backend in BACKENDS if backend.name == "qemu-storage-daemon-trixie"]
        chosen = peers(fetched(qsd))
        print("\n".join(["", *peer_table(chosen, rates(folder, chosen, options.rounds, options.seconds))]))


if __name__ == "__main__":
    main()
