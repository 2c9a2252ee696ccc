# SPDX-License-Identifier: BSD-3-Clause
"""DPDK's virtio-user as the front-end: Debian's testpmd forwards packets round and round through our loopback device.

It is another front-end than QEMU in all that matters: it acks few protocol features, talks first, keeps the config space and
the control queue to itself, has its memory in one unsealed file, and sends garbage with GET_VRING_BASE. Everything that testpmd
sends comes back to it, so the two sides' counters have to agree to the packet.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType

import pytest

from tests.e2e.vm import WITHIN, Backend, Program, script, wait_until
from vhostsock.trace import trace

pytestmark = pytest.mark.foreign

ENOUGH = 2000
"""Packets to wait for: over 30 bursts, and several times round rings of 64."""

PLUGINS = ("librte_net_virtio.so.23", "librte_mempool_ring.so.23")  # by name: DPDK refuses paths below a world-writable folder
BURST = 32  # what testpmd sends first and takes at a time
VERSION_1, MRG_RXBUF, PACKED, IN_ORDER = 1 << 32, 1 << 15, 1 << 34, 1 << 35


class Testpmd(Program):
    """testpmd on one virtio-user port, sending back what comes in. No hugepages, no PCI, nothing shared with other programs.

    Its prompt comes when a command is done; what the command has printed comes when testpmd ends (``counts``).
    """

    __test__ = False

    def __init__(self, folder: Path, program: str, port: str, *options: str, wait: bool = True) -> None:
        self.log = folder / "testpmd.log"
        environment = [f"--file-prefix={prefix(folder)}", "--no-huge", "-m", "128", "--no-pci", "--no-telemetry"]
        plugins = [word for plugin in PLUGINS for word in ("-d", plugin)]
        command = [program, "-l", "0,1", *environment, *plugins, f"--vdev=net_virtio_user0,{port}", "--", "-i",
                   "--total-num-mbufs=2048", "--forward-mode=io", *options]  # fmt: skip
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env={
                **os.environ, "XDG_RUNTIME_DIR": str(folder), "TERM": "dumb"})  # fmt: skip
        if wait:
            self.await_log("testpmd> $")

    def enter(self, command: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def do(self, command: str) -> None:
        """Type a command and wait until it is done."""
        at = len(self.log.read_text())
        self.enter(command)
        self.await_log(rf"{command.splitlines()[-1]}\s[\s\S]*testpmd> $", at)

    def counts(self) -> list[tuple[int, int]]:
        """After the end: what each "stop" said, packets received and sent. None was dropped."""
        pattern = r"statistics for port 0 .*\n +RX-packets: (\d+) +RX-dropped: 0 .*\n +TX-packets: (\d+) +TX-dropped: 0 "
        return [(int(received), int(sent)) for received, sent in re.findall(pattern, self.log.read_text())]

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None and kind is None:
            self.enter("quit")
            self.process.wait(WITHIN)
            assert self.process.returncode == 0, self.log.read_text()
        assert self.process.stdin
        self.process.stdin.close()
        self.close()


class Connected(Backend):
    """`vhostsock serve net --loopback` on a connection that it is given: QEMU's and DPDK's "server mode", where they listen."""

    def __init__(self, folder: Path, name: str, to: Path) -> None:
        self.log, self.record = folder / f"{name}.log", folder / f"{name}.rec"
        program = str(Path(sys.executable).with_name("vhostsock"))
        command = [program, "serve", "net", "--loopback", "--record", str(self.record), "--fd"]
        with socket.socket(socket.AF_UNIX) as sock, self.log.open("wb") as out:
            wait_until(lambda: sock.connect_ex(str(to)) == 0, f"testpmd listens on {to}")
            fd = sock.fileno()
            self.process = subprocess.Popen(
                [*command, str(fd)], pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        self.await_log("front-end connected")


@pytest.fixture(scope="module")
def program() -> str:
    return script("fetch-program", "bookworm", "dpdk-dev", "dpdk-testpmd")


def go_round(backend: Backend | Connected, testpmd: Testpmd) -> None:
    """Let packets go round until `ENOUGH` went, then stop."""
    before = backend.stats("net")["rx_packets"]
    testpmd.do("start tx_first")
    wait_until(lambda: backend.stats("net")["rx_packets"] - before >= ENOUGH, f"{ENOUGH} packets go round")
    testpmd.do("stop")


def lines_of(record: Path) -> list[str]:
    return list(trace(str(record)))


def features_of(record: Path) -> list[int]:
    """What the front-end acked, each time it did."""
    found = (re.search(r"-> SET_FEATURES .* (0x[0-9a-f]+) =", line) for line in lines_of(record))
    return [int(match[1], 16) for match in found if match]


def messages(lines: Iterable[str]) -> list[str]:
    """The names of the front-end's messages, in order."""
    return [match[1] for line in lines if (match := re.search(r" -> (\w+) ", line))]


def started(record: Path) -> bool:
    return any(line.endswith("== ring 1 started") for line in lines_of(record))


RINGS = {
    "split": ("mrg_rxbuf=1,in_order=0", MRG_RXBUF, PACKED | IN_ORDER),
    "whole buffers": ("mrg_rxbuf=0,in_order=0", 0, MRG_RXBUF | PACKED | IN_ORDER),
    "split in order": ("in_order=1", IN_ORDER, PACKED),
    "packed": ("packed_vq=1,in_order=0", PACKED, IN_ORDER),
    "packed in order": ("packed_vq=1,in_order=1", PACKED | IN_ORDER, 0),
}


TRACES = Path(__file__).parent.parent / "data" / "traces"


@pytest.mark.parametrize("ring", RINGS)
def test_packets_go_round_and_none_is_lost(tmp_path: Path, program: str, ring: str) -> None:
    options, wanted, unwanted = RINGS[ring]
    record = tmp_path / "record"
    with Backend(tmp_path, "net", "--loopback", "--record", record) as backend:
        with Testpmd(tmp_path, program, f"path={backend.socket},queue_size=64,{options}") as testpmd:
            go_round(backend, testpmd)
        backend.await_log("front-end disconnected")
        stats = backend.stats("net")
    [(received, sent)] = testpmd.counts()
    assert sent == stats["tx_packets"] == stats["rx_packets"]
    assert sent - BURST <= received <= sent  # what it had sent last lies in the receive ring
    assert stats["tx_refused"] == stats["tx_dropped"] == stats["rx_dropped"] == 0
    assert messages(lines_of(record)) == messages((TRACES / "dpdk22-virtiouser-split.txt").read_text().splitlines())
    acked = features_of(record)
    assert acked
    assert all(bits & (VERSION_1 | wanted | unwanted) == VERSION_1 | wanted for bits in acked)


def test_two_pairs_are_served_side_by_side(tmp_path: Path, program: str) -> None:
    record = tmp_path / "record"
    with Backend(tmp_path, "net", "--loopback", "--pairs", "2", "--record", record) as backend:
        port, pairs = f"path={backend.socket},queue_size=64,queues=2", ("--rxq=2", "--txq=2", "--nb-cores=1")
        with Testpmd(tmp_path, program, port, *pairs) as testpmd:
            go_round(backend, testpmd)
        backend.await_log("front-end disconnected")
        stats = backend.stats("net")
    [(received, sent)] = testpmd.counts()
    assert sent == stats["tx_packets"] == stats["rx_packets"]
    assert sent - 2 * BURST <= received <= sent
    bases = dict(re.findall(r"<- GET_VRING_BASE .* vq=(\d) base=(0x[0-9a-f]+)", "\n".join(lines_of(record))))
    assert bases.keys() == {"0", "1", "2", "3"}
    assert all(int(base, 16) >= BURST for base in bases.values())


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_a_back_end_that_comes_back_is_taken_up_where_dpdk_listens(tmp_path: Path, program: str, ring: str) -> None:
    """server=1: testpmd waits for the first back-end before it starts. For those that come later it says base 0."""
    path = tmp_path / "dpdk.sock"
    with Testpmd(tmp_path, program, f"path={path},server=1,queue_size=64,{RINGS[ring][0]}", wait=False) as testpmd:
        for life in range(3):
            with Connected(tmp_path, f"life{life}", path) as backend:
                wait_until(partial(started, backend.record), "DPDK starts its rings")
                if life == 0:
                    testpmd.await_log("testpmd> $")
                go_round(backend, testpmd)
                if life == 1:
                    backend.process.kill()  # a crash; the others end in order
                    backend.process.wait()
    counts = testpmd.counts()
    assert len(counts) == 3
    assert all(received >= ENOUGH - BURST for received, _ in counts)


@pytest.fixture(autouse=True)
def dpdk_leaves_no_files(tmp_path: Path) -> Iterator[None]:
    """DPDK makes a folder for each run in /var/run/dpdk (XDG_RUNTIME_DIR for a user) and leaves files in it."""
    yield
    shutil.rmtree(Path("/var/run/dpdk") / prefix(tmp_path), ignore_errors=True)


def prefix(folder: Path) -> str:
    return f"vhostsock-{os.getpid()}-{folder.name}"
