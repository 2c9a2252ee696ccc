# SPDX-License-Identifier: BSD-3-Clause
"""What the sockets of a back-end cost, without a guest: ``tests/bench/run flows``. docs/performance.md keeps what it printed.

The near end (load.c: a guest's driver, or a program of the host) and the far end (far.c) are the same for all; between them is

direct              nothing: a TCP connection over loopback
relay               a minimal relay in C (relay.c), which is what anything costs that TCP connections pass through
offload             ``vhostsock serve offload``, to the same TCP far end
direct-unix         nothing, but a connection of Unix sockets: what the two that follow end in
vsock               ``vhostsock serve vsock``, to a Unix socket as it demands
vhost-device-vsock  rust-vmm's device as Debian has it, to a Unix socket, with the same driver

All of them run all the time and take turns in each round; a ratio is of two neighbours in one round. Figures are
min - median - max of the rounds. Each amount is chosen so that a measurement takes about ``--seconds``, by what two rounds
before the first gave, which are forgotten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.bench.ends import DIRECT, DIRECT_UNIX, OFFLOAD, OTHER_VSOCK, RELAY, VSOCK, Near, started
from tests.bench.machine import Steady, described
from tests.bench.plot import Bar, Panel, drawn
from tests.bench.ring import spread

__all__ = ["MEASURES", "Result", "chart", "main", "measured", "tables"]

FLOWS = 8  # that move bytes; those that cycle() makes come behind them
PARALLEL = 32
SECONDS = 0.5
KIB, MIB = 1 << 10, 1 << 20


class Measure(NamedTuple):
    """run(near, amount) does that much and returns nanoseconds: in all, or of the median where ``unit`` is a time."""

    title: str
    unit: str
    run: Callable[[Near, int], float]
    amount: int  # bytes in all, or times: at first
    moves: bool = True  # bytes, so that there is a cost of a byte


def _bulk(to_host: bool, flows: int, size: int) -> Callable[[Near, int], float]:
    def run(near: Near, amount: int) -> float:
        job = near.send if to_host else near.receive
        return job(0, flows, max(amount // flows // size, 1) * size, size)

    return run


def _median_answer(near: Near, amount: int) -> float:
    return statistics.median(near.ask(0, amount, 64))


def _cycles(parallel: int) -> Callable[[Near, int], float]:
    def run(near: Near, amount: int) -> float:
        return near.cycle(FLOWS, parallel, amount)

    return run


MEASURES = {
    "to-host": Measure("1 flow to the host, 64 KiB messages", "GB/s", _bulk(True, 1, 64 * KIB), 16 * MIB),
    "to-guest": Measure("1 flow to the guest, 64 KiB messages", "GB/s", _bulk(False, 1, 64 * KIB), 16 * MIB),
    "to-host-8": Measure("8 flows to the host, 64 KiB messages", "GB/s", _bulk(True, 8, 64 * KIB), 16 * MIB),
    "to-guest-8": Measure("8 flows to the guest, 64 KiB messages", "GB/s", _bulk(False, 8, 64 * KIB), 16 * MIB),
    "to-host-1k": Measure("1 flow to the host, 1 KiB messages", "GB/s", _bulk(True, 1, KIB), 2 * MIB),
    "to-guest-1k": Measure("1 flow to the guest, 1 KiB messages", "GB/s", _bulk(False, 1, KIB), 2 * MIB),
    "answer": Measure("64 bytes there and back, median", "us", _median_answer, 500, False),
    "connect-1": Measure("connect, accept, close; one after another", "k/s", _cycles(1), 50, False),
    "connect-32": Measure("connect, accept, close; 32 at once", "k/s", _cycles(PARALLEL), 200, False),
}


class Result(NamedTuple):
    """Of each round by (measure, name): the figure in the measure's unit, and CPU seconds of the process in between for a GB.

    memory, by name: of that process, at the end, as Near.memory() has it.
    """

    figures: dict[tuple[str, str], list[float]]
    cpu: dict[tuple[str, str], list[float]]
    memory: dict[str, dict[str, int]]


def _figure(measure: Measure, amount: int, took: float) -> float:
    match measure.unit:
        case "us":
            return took / 1e3
        case "k/s":
            return amount / took * 1e6
    return amount / took


def _cost(measure: Measure, near: Near, amount: int) -> tuple[float, float]:
    """The figure, and nanoseconds of CPU that the process in between used for it."""
    before = near.cpu()
    figure = _figure(measure, amount, measure.run(near, amount))
    return figure, near.cpu() - before


def measured(
    folder: Path, names: Sequence[str], chosen: Sequence[str], rounds: int, seconds: float, steady: Steady, pace: int = 2
) -> Result:
    """``pace`` rounds come before the first. Failed when a job fails, or bytes are missing."""
    result = Result({}, {}, {})
    with started(folder, tuple(names), FLOWS + PARALLEL) as nears:
        amounts = {(key, name): MEASURES[key].amount for key in chosen for name in names}
        for near in nears.values():
            near.connect(0, FLOWS)
        for number in range(-pace, rounds):
            for key in chosen:
                measure = MEASURES[key]
                for name, near in nears.items():
                    amount = amounts[key, name]
                    if number < 0:
                        figure, _ = _cost(measure, near, amount)
                        rate = 1e6 / figure if measure.unit == "us" else figure * (1e9 if measure.moves else 1e3)
                        amounts[key, name] = max(int(rate * seconds), measure.amount)
                        continue
                    figure, cpu = steady(_cost, measure, near, amount)
                    result.figures.setdefault((key, name), []).append(figure)
                    if measure.moves and near.pid:
                        result.cpu.setdefault((key, name), []).append(cpu / amount)
        for name, near in nears.items():
            result.memory[name] = near.memory()
            near.disconnect(0, FLOWS)
    return result


# ---- the report


def _ratio(values: dict[tuple[str, str], list[float]], key: str, name: str, base: str, form: str = ".2f") -> str:
    if (key, name) not in values or (key, base) not in values:
        return ""
    return spread([a / b for a, b in zip(values[key, name], values[key, base], strict=True)], form)


def _rates(result: Result, names: Sequence[str], ratios: Sequence[tuple[str, str]]) -> list[str]:
    heads = [*names, *(f"{name} : {base}" for name, base in ratios)]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for key, measure in MEASURES.items():
        if (key, names[0]) in result.figures:
            cells = [spread(result.figures[key, name], ".1f" if measure.unit == "us" else ".2f") for name in names]
            cells += [_ratio(result.figures, key, name, base) for name, base in ratios]
            lines.append(f"| {measure.title}, {measure.unit} | {' | '.join(cells)} |")
    for key, measure in MEASURES.items():
        if any((key, name) in result.cpu for name in names):
            cells = [spread(values, ".2f") if (values := result.cpu.get((key, name))) else "" for name in names]
            cells += [_ratio(result.cpu, key, name, base) for name, base in ratios]
            lines.append(f"| CPU of the process between: {measure.title}, s/GB | {' | '.join(cells)} |")
    memory = [f"{m['VmHWM'] / MIB:.1f} ({m['RssAnon'] / MIB:.1f})" if (m := result.memory.get(name)) else "" for name in names]
    return [*lines, f"| its memory: peak (of its own at the end), MiB | {' | '.join([*memory, *['' for _ in ratios]])} |"]


TABLES = (
    ((DIRECT, RELAY, OFFLOAD), ((OFFLOAD, RELAY), (OFFLOAD, DIRECT))),
    ((DIRECT_UNIX, VSOCK, OTHER_VSOCK), ((VSOCK, OTHER_VSOCK), (VSOCK, DIRECT_UNIX))),
)


def tables(result: Result) -> list[str]:
    """As Markdown: one of TCP, one of vsock, as far as they were measured."""
    names = {name for _, name in result.figures}
    lines = []
    for columns, ratios in TABLES:
        if here := [name for name in columns if name in names]:
            lines += [*_rates(result, here, [pair for pair in ratios if set(pair) <= names]), ""]
    return lines[:-1]


def as_json(result: Result, options: argparse.Namespace, steady: Steady) -> str:
    def nested(values: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, list[float]]]:
        found: dict[str, dict[str, list[float]]] = {}
        for (key, name), each in values.items():
            found.setdefault(key, {})[name] = each
        return found

    return json.dumps(
        {
            "machine": described(steady), "rounds": options.rounds, "seconds": options.seconds,
            "units": {key: measure.unit for key, measure in MEASURES.items()},
            "figures": nested(result.figures), "cpu_seconds_per_gb": nested(result.cpu), "memory_bytes": result.memory,
        },
        indent=1,
    )  # fmt: skip


def chart(result: Result) -> str:
    """As SVG: a panel a measure, and one for its cost where it has one."""
    names = [name for columns, _ in TABLES for name in columns if any(key[1] == name for key in result.figures)]

    def panel(values: dict[tuple[str, str], list[float]], key: str, title: str, form: str, less: bool) -> Panel:
        return Panel(title, form, [Bar(name, values.get((key, name), []), name in (OFFLOAD, VSOCK)) for name in names], less)

    panels = []
    for key, measure in MEASURES.items():
        if (key, names[0]) in result.figures:
            less = measure.unit == "us"
            panels.append(panel(result.figures, key, f"{measure.title}, {measure.unit}", ".1f" if less else ".2f", less))
    for key, measure in MEASURES.items():
        if any((key, name) in result.cpu for name in names):
            panels.append(panel(result.cpu, key, f"CPU of the process between, {measure.title}, s/GB", ".2f", True))
    return drawn(panels)


def main(arguments: Sequence[str]) -> None:
    every = [name for columns, _ in TABLES for name in columns]
    parser = argparse.ArgumentParser(prog="tests/bench/run flows", description="Sockets of a back-end, without a guest.")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="of one measurement, about (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME", help=f"of {', '.join(every)}")
    parser.add_argument("--measure", nargs="+", choices=list(MEASURES), default=list(MEASURES), metavar="KEY",
                        help=f"of {', '.join(MEASURES)}")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the figures there")
    options = parser.parse_args(arguments)
    steady = Steady()
    with tempfile.TemporaryDirectory(prefix="vhostsock-bench-") as name:
        result = measured(Path(name), options.only, options.measure, options.rounds, options.seconds, steady)
    if options.json:
        options.json.write_text(as_json(result, options, steady) + "\n")
    if options.svg:
        options.svg.write_text(chart(result))
    print(*tables(result), "", *steady.told(), sep="\n", file=sys.stdout)
