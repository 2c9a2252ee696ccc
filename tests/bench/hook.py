# SPDX-License-Identifier: BSD-3-Clause
"""What the guest module adds to sockets that stay native: ``tests/bench/run hook``. docs/performance.md keeps what it printed.

Two guests, of one kernel, run all the time and take turns in each round: one has the module and a device, the other has
neither. calls.c times the calls in both. A round's figure is the median of its calls; printed are min - median - max of the
rounds, and of the differences of neighbours in one round. The guests' processor is emulated: look at the difference against
the call.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.ring import spread
from tests.e2e.vm import Backend, Vm, script

__all__ = ["main", "measured", "table"]

HERE = Path(__file__).resolve().parent
CALLS = {
    "socket": "`socket()`",
    "loopback": "`connect()` to loopback: decided in the guest",
    "hinted": "`connect()` elsewhere: the device has said beforehand that it is native",
    "elsewhere": "`connect()` elsewhere: the device is asked, and says native",
}
WITHOUT, WITH = "without", "with"
Figures = dict[tuple[str, str], list[float]]  # (guest, call) -> the median of each round, in microseconds


@contextlib.contextmanager
def guests(folder: Path) -> Iterator[dict[str, Vm]]:
    """Both, with the program in them. The policy leaves everything native; of what it says of a uid the guest knows nothing."""
    script("fetch-qemu")
    program = ("--program", str(HERE / "calls.c"))
    plain = script("mkinitramfs", *program, "-o", str(folder / "plain.cpio"))
    ours = script("mkinitramfs", *program, "--module", script("build-guest-module"), "-o", str(folder / "ours.cpio"))
    policy = folder / "policy.toml"
    policy.write_text('[[rule]]\nmatch = { address = "192.0.2.1", uid = 0 }\naction = "native"\n')
    (folder / WITH).mkdir()
    (folder / WITHOUT).mkdir()
    with (
        Backend(folder / WITH, "offload", "--policy", policy, "--name", "vm1") as backend,
        Vm(folder / WITH, ours, "--socket", backend.socket) as module,
        Vm(folder / WITHOUT, plain) as native,
    ):
        yield {WITHOUT: native, WITH: module}
        assert backend.stats("vm1")["events"] > 0, "nobody asked the device"


def measured(folder: Path, rounds: int, calls: int) -> Figures:
    """The figures of both guests. AssertionError when the device was not asked."""
    found: Figures = {}
    with guests(folder) as vms:
        for _ in range(rounds):
            for name, vm in vms.items():
                for line in vm.run(f"calls {calls}").text.splitlines():
                    call, _least, median, _most = line.split()
                    found.setdefault((name, call), []).append(int(median) / 1000)
    return found


def table(found: Figures) -> list[str]:
    """As Markdown."""
    lines = ["| call | without the module, us | with it, us | added, us |", "|---|---|---|---|"]
    for call, text in CALLS.items():
        plain, ours = found[WITHOUT, call], found[WITH, call]
        added = [b - a for a, b in zip(plain, ours, strict=True)]
        lines.append(f"| {text} | {spread(plain, '.1f')} | {spread(ours, '.1f')} | {spread(added, '.1f')} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run hook", description="What the module adds to native sockets.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=500, help="of each kind in a round (%(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(*table(measured(Path(folder), options.rounds, options.calls)), sep="\n", file=sys.stdout)
