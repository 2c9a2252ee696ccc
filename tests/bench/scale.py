# SPDX-License-Identifier: BSD-3-Clause
"""What many flows cost, and what a bad one costs the others: ``tests/bench/run scale``.

docs/performance.md keeps what it printed.

The near end, the far end and what is between them are those of flows.py. All run; one at a time has connections.

1. Idle connections: memory of the process between for each, and its CPU while nothing happens.
2. Busy flows: what many move together, against what one moves in the same round.
3. A flow whose far end reads nothing: what the process takes for it, and another flow's rate and answers, against the same
   before, in the same round.
4. Two ring pairs against one: eight flows, in the same round.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.ends import DIRECT, OFFLOAD, OTHER_VSOCK, RELAY, VSOCK, Failed, Near, started
from tests.bench.machine import Steady, described
from tests.bench.ring import spread

__all__ = ["all_of_it", "main", "table"]

NAMES = (DIRECT, RELAY, OFFLOAD, VSOCK, OTHER_VSOCK)
AT_ONCE = 256  # connections that are being made: the device bounds them
PIECE = 1 << 16
Found = dict[str, dict[str, Any]]  # by what was measured, then by name


def _connect(near: Near, first: int, count: int) -> None:
    for at in range(first, first + count, AT_ONCE):
        near.connect(at, min(AT_ONCE, first + count - at))


def idle(near: Near, count: int, seconds: float) -> tuple[float, float]:
    """Bytes for each of ``count`` connections, which say nothing; CPU milliseconds a second."""
    _connect(near, 0, 1)  # what the first one needs is not the others'
    before = near.memory()["RssAnon"]
    _connect(near, 1, count)
    each = (near.memory()["RssAnon"] - before) / count
    cpu, start = near.cpu(), time.monotonic()
    time.sleep(seconds)  # this is what is measured: nothing happens
    used = (near.cpu() - cpu) / 1e6 / (time.monotonic() - start)
    near.ask(count, 1, 64)  # it is all still there
    near.disconnect(0, count + 1)
    return each, used


def _rate(near: Near, to_host: bool, first: int, count: int, amount: int) -> float:
    """GB/s."""
    each = max(amount // count // PIECE, 1) * PIECE
    return each * count / (near.send if to_host else near.receive)(first, count, each, PIECE)


def busy(near: Near, to_host: bool, count: int, amount: int) -> tuple[float, float]:
    """GB/s of so many flows together, and that by that of one."""
    _connect(near, 0, count)
    one = _rate(near, to_host, 0, 1, amount)
    total = _rate(near, to_host, 0, count, amount)
    near.disconnect(0, count)
    return total, total / one


def stuck(near: Near, amount: int, times: int) -> tuple[int, float, float]:
    """Bytes that were taken for a flow whose far end reads nothing; another's rate and answers, by what they were before."""
    _connect(near, 0, 2)

    def other() -> tuple[float, float]:
        return _rate(near, True, 0, 1, amount), statistics.median(near.ask(0, times, 64))

    before, taken, after = other(), near.stuff(1), other()
    near.abort(1)  # vhost-device-vsock does not answer a close before all that it took is read
    near.disconnect(0, 1)
    return taken, after[0] / before[0], after[1] / before[1]


def all_of_it(
    folder: Path, names: Sequence[str], steady: Steady, *,
    connections: int, flows: int, rounds: int, amount: int, seconds: float,
) -> Found:  # fmt: skip
    """``connections`` idle, ``flows`` busy ones, ``amount`` bytes a measurement. A name that cannot has its words instead."""
    found: Found = {}

    def note(what: str, name: str, value: Any) -> None:
        found.setdefault(what, {}).setdefault(name, []).append(value)

    with started(folder, tuple(names), max(connections, flows) + 1) as nears:
        for name, near in nears.items():
            if name in (DIRECT, RELAY):
                continue
            # vhost-device-vsock takes two descriptors for each
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 100
            count = min(connections, most) if name == OTHER_VSOCK else connections
            try:
                each, cpu = idle(near, count, seconds)
            except Failed as error:
                found.setdefault("failed", {})[name] = str(error)
                continue
            note("idle-bytes", name, each)
            note("idle-cpu", name, cpu)
        working = [near for near in nears.values() if near.name not in found.get("failed", {})]
        for _ in range(rounds):
            for to_host in (True, False):
                for near in working:
                    total, ratio = steady(busy, near, to_host, flows, amount)
                    key = "to-host" if to_host else "to-guest"
                    note(f"busy-{key}", near.name, total)
                    note(f"busy-{key}-by-one", near.name, ratio)
            for near in working:
                for key, value in zip(("taken", "rate", "answer"), steady(stuck, near, amount, 200), strict=True):
                    note(f"stuck-{key}", near.name, value)
    return found


def pairs(folder: Path, rounds: int, amount: int, steady: Steady) -> Found:
    """GB/s of 8 flows on one ring pair and on two, and the ratio."""
    found: Found = {}
    for name in ("1", "2"):
        (folder / name).mkdir()
    with started(folder / "1", (OFFLOAD,), 8, 1) as one, started(folder / "2", (OFFLOAD,), 8, 2) as two:
        for near in (one[OFFLOAD], two[OFFLOAD]):
            near.connect(0, 8)
        for _ in range(rounds):
            for to_host in (True, False):
                rates = [steady(_rate, nears[OFFLOAD], to_host, 0, 8, amount) for nears in (one, two)]
                key = f"pairs-{'to-host' if to_host else 'to-guest'}"
                found.setdefault(key, {}).setdefault("1", []).append(rates[0])
                found[key].setdefault("2", []).append(rates[1])
                found[key].setdefault("by-one", []).append(rates[1] / rates[0])
    return found


# ---- the report

ROWS = {
    "idle-bytes": ("{connections} idle connections: memory of the process between for each, bytes", ".0f"),
    "idle-cpu": ("its CPU meanwhile, ms a second", ".2f"),
    "busy-to-host": ("{flows} busy flows to the host, all together, GB/s", ".2f"),
    "busy-to-host-by-one": ("... : one flow", ".2f"),
    "busy-to-guest": ("{flows} busy flows to the guest, all together, GB/s", ".2f"),
    "busy-to-guest-by-one": ("... : one flow", ".2f"),
    "stuck-taken": ("taken for a flow whose far end reads nothing, bytes", ".0f"),
    "stuck-rate": ("another flow's rate meanwhile : before", ".2f"),
    "stuck-answer": ("another flow's answers meanwhile : before", ".2f"),
}


def table(found: Found, names: Sequence[str], connections: int, flows: int) -> list[str]:
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for key, (title, form) in ROWS.items():
        values = found.get(key, {})
        cells = [spread(values[name], form) if len(values.get(name, [])) > 1 else format(values[name][0], form)
                 if name in values else "" for name in names]  # fmt: skip
        lines.append(f"| {title.format(connections=f'{connections:,}', flows=f'{flows:,}')} | {' | '.join(cells)} |")
    return lines + [f"\n{name} failed: {why}" for name, why in found.get("failed", {}).items()]


def pairs_table(found: Found) -> list[str]:
    lines = ["| 8 flows of the offload device | one pair, GB/s | two, GB/s | two : one |", "|---|---|---|---|"]
    for key, columns in found.items():
        lines.append(f"| {key.removeprefix('pairs-').replace('-', ' the ')} | "
                     + " | ".join(spread(columns[name], ".2f") for name in ("1", "2", "by-one")) + " |")  # fmt: skip
    return lines


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run scale", description="Many flows, and bad ones, without a guest.")
    parser.add_argument("--connections", type=int, default=10000, metavar="N", help="idle (%(default)s)")
    parser.add_argument("--flows", type=int, default=1000, metavar="N", help="busy (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--amount", type=int, default=256, metavar="MIB", help="of a measurement (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round there")
    options = parser.parse_args(arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 20)), hard))  # what is started inherits it
    steady = Steady()
    with tempfile.TemporaryDirectory(prefix="vhostsock-bench-") as name:
        folder = Path(name)
        found = all_of_it(
            folder, options.only, steady, connections=options.connections, flows=options.flows, rounds=options.rounds,
            amount=options.amount << 20, seconds=2,
        )  # fmt: skip
        print(*table(found, options.only, options.connections, options.flows), sep="\n", flush=True)
        two = pairs(folder, options.rounds, options.amount << 20, steady)
        print("", *pairs_table(two), "", *steady.told(), sep="\n")
    if options.json:
        whole = {"machine": described(steady), "figures": found | two}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
