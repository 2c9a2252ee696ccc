# SPDX-License-Identifier: BSD-3-Clause
"""What a guest does for a MiB, an answer or a connection, in instructions: ``tests/bench/run profile``.

The guest and its programs are those of guest.py, and an emulated processor can be counted exactly: a plugin of QEMU (insns.c)
counts each block of instructions that is run, and the kernel's symbols say in which function it is. No time is in it, so a
busy machine does not matter, but for how often somebody looks for what has not come yet.

An iteration of ``rep movsq`` counts as an instruction.
"""

from __future__ import annotations

import argparse
import bisect
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.bench.guest import MEASURES, numbers
from tests.bench.native import HERE, built
from tests.bench.paths import PATHS, Shop

__all__ = ["Profile", "main", "profiled", "table"]

BLOCK = struct.Struct("=QQQ")  # insns.c, struct block
KERNEL = 1 << 63  # addresses from there on are the kernel's
ENDBR = 4  # bytes of the instruction that a function may begin with, and a block ends with
USER = "the program"
INTERFACES = ((9, 1), (11, 2), (1000, 7))  # QEMU before this has that: insns.c
MIB = 1 << 20
BYTES, ANSWERS, CONNECTIONS = ("MiB", 2, MIB), ("answer", 2, 1), ("connection", 0, 1)
COUNTED = {key: BYTES for key, measure in MEASURES.items() if measure.moves and measure.by == "near"} | {
    "ask": ANSWERS, "into-ask": ANSWERS, "cycle": CONNECTIONS, "into-cycle": CONNECTIONS,
}  # fmt: skip
"""The unit, in which of the numbers that near.c prints it is, and how many of those make one."""


class Profile(NamedTuple):
    """Of one unit: instructions by function, and how often each was entered."""

    unit: str
    instructions: dict[str, float]
    calls: dict[str, float]


def _blocks(file: Path) -> dict[tuple[int, int], int]:
    """Runs by address and instructions."""
    data = file.read_bytes()
    count = BLOCK.unpack_from(data)[2]
    return {(address, insns): runs for address, insns, runs in BLOCK.iter_unpack(data[BLOCK.size : BLOCK.size * (count + 1)])}


class _Symbols:
    """``text``: of /proc/kallsyms."""

    def __init__(self, text: str) -> None:
        lines = (line.split() for line in text.splitlines())
        found = sorted((int(words[0], 16), " ".join(words[2:])) for words in lines if words[1] in "tTwW")
        self.addresses = [address for address, _ in found]
        self.names = [name for _, name in found]

    def at(self, address: int) -> tuple[str, int]:
        """The function that an address is in, and how far."""
        place = bisect.bisect_right(self.addresses, address) - 1
        return (USER, 0) if address < KERNEL or place < 0 else (self.names[place], address - self.addresses[place])


def _plugin(folder: Path, counts: Path, qemu: str) -> list[str]:
    """What a QEMU is told, with the plugin built for its interface."""
    version = subprocess.run([qemu, "--version"], stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout
    major = re.search(r"version (\d+)\.", version)
    assert major, version
    api = next(api for before, api in INTERFACES if int(major[1]) < before)
    flags = (f"-DAPI_VERSION={api}", "-fvisibility=hidden")
    plugin = built(folder, "insns.so", HERE / "insns.c", shared=True, more=flags)
    return ["-plugin", f"{plugin},out={counts}"]


def profiled(folder: Path, key: str, name: str, milliseconds: int) -> Profile:
    """Of the measure ``key`` on the path ``name``, of those in COUNTED and PATHS."""
    counts = folder / "blocks"
    shop = Shop(folder, partial(_plugin, folder, counts))
    measure = MEASURES[key]
    with PATHS[name].start(shop, name) as opened:
        symbols = _Symbols(opened.vm.run("cat /proc/kallsyms").text)
        numbers(opened, measure, shop.near, milliseconds)  # the first time code is translated, and windows are closed
        before = _blocks(counts)
        found = numbers(opened, measure, shop.near, milliseconds)
        after = _blocks(counts)
    assert found
    unit, which, size = COUNTED[key]
    units = found[which] / size
    instructions, calls = Counter[str](), Counter[str]()
    for (address, insns), runs in after.items():
        if ran := runs - before.get((address, insns), 0):
            function, offset = symbols.at(address)
            instructions[function] += ran * insns
            calls[function] += ran if offset in (0, ENDBR) and function != USER else 0
    return Profile(
        unit,
        {function: count / units for function, count in instructions.most_common()},
        {function: calls[function] / units for function in instructions},
    )


def table(profile: Profile, most: int) -> list[str]:
    """As Markdown: the ``most`` functions with the most instructions, and all together."""
    whole = sum(profile.instructions.values())
    lines = [f"| | instructions, each {profile.unit} | of all | calls |", "|---|---|---|---|", f"| all | {whole:.0f} | | |"]
    for function, count in list(profile.instructions.items())[:most]:
        calls = "" if function == USER else f"{profile.calls[function]:.2f}"
        lines.append(f"| {function} | {count:.0f} | {count / whole:.1%} | {calls} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run profile", description="What a guest does for it, in instructions.")
    parser.add_argument("measure", choices=list(COUNTED), metavar="MEASURE", help=f"of {', '.join(COUNTED)}")
    parser.add_argument("--path", choices=list(PATHS), default="offload-fs", metavar="PATH", help="of guest's (%(default)s)")
    parser.add_argument("--ms", type=int, default=1000, help="about, of an emulated processor that is counted (%(default)s)")
    parser.add_argument("--top", type=int, default=40, metavar="N", help="functions to be shown (%(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vhostsock-bench-") as folder:
        print(*table(profiled(Path(folder), options.measure, options.path, options.ms), options.top), sep="\n")
