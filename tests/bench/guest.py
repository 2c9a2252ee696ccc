# SPDX-License-Identifier: BSD-3-Clause
"""What a program in a guest gets from its host, by the ways there are: ``tests/bench/run guest``. docs/performance.md has it.

One guest for each path (paths.py), all of the same kernel and root; they run all the time. In each round they take turns at
each measure, so that neighbours in time are compared; a ratio is of two figures of one round. The same client (near.c) is in
every guest and the same server (far.c) on the host, and the other way round for connections into a guest; iperf3 is Debian's
(iperf.py). The floor is measured in a guest, too: both programs in it, over a Unix socket. So is what the kernel of each guest
of ours copies.

Figures are min - median - max of the rounds. Nothing else should run on the machine, and two processors are the least: the
guest's is emulated, and the back-end needs the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench import iperf
from tests.bench.machine import Steady, described
from tests.bench.paths import PATHS, Open, Shop
from tests.bench.plot import Bar, Panel, drawn
from tests.bench.ring import spread
from tests.e2e.vm import Program
from tests.netns import may_make_namespaces

__all__ = ["COPY_FROM", "COPY_TO", "INSIDE", "MEASURES", "Found", "Measure", "cpu", "main", "measured", "rate", "tables"]

INSIDE = "inside"
INSIDE_TITLE = "in the guest, AF_UNIX"
NEAR, UDP, INTO, IPERF = "near", "udp", "into", "iperf3"
MANY = 1000
TICKS = os.sysconf("SC_CLK_TCK")
MEGABIT, GIGA = 1e6, 1e9
Numbers = list[int]


class Measure(NamedTuple):
    """``command``: near.c's, with {ms}. ``figures``: what its numbers say, by name. ``moves``: bytes, which have a cost.

    ``by``: near.c in the guest, the same with datagrams, near.c on the host, or iperf3 in the guest, whose options the command
    is then. Some paths carry no datagrams, and nothing of iperf3's.
    """

    command: str
    figures: dict[str, Callable[[Numbers], float]]
    moves: bool = False
    by: str = NEAR


class Row(NamedTuple):
    """Of the table. ``target``: what the ratio of ours to the best of the others shall be, at least or (``less``) at most."""

    title: str
    form: str
    target: float | None = None
    less: bool = False


def rate(numbers: Sequence[int]) -> float:
    """Mbit/s, of bytes and nanoseconds."""
    return numbers[0] * 8 / numbers[1] * GIGA / MEGABIT


def _datagrams(way: str, size: int) -> Measure:
    """Thousands that came in a second, and how many of a hundred did not."""
    name = f"{way}-{size}"
    figures = {name: lambda n: n[0] / n[1] * GIGA / 1000, f"{name}-lost": lambda n: 100 * (1 - n[0] / n[2])}
    return Measure(f"dgram-{way} {size} {{ms}}", figures, by=UDP)


MEASURES = {
    "out64": Measure("out 65536 {ms}", {"out64": rate}, moves=True),
    "in64": Measure("in 65536 {ms}", {"in64": rate}, moves=True),
    "file64": Measure("file 65536 {ms}", {"file64": rate}, moves=True),
    "zero64": Measure("zerocopy 65536 {ms}", {"zero64": rate}, moves=True),
    "out1": Measure("out 1024 {ms}", {"out1": rate}, moves=True),
    "in1": Measure("in 1024 {ms}", {"in1": rate}, moves=True),
    "ask": Measure("ask {ms}", {"p50": lambda n: n[0] / 1000, "p99": lambda n: n[1] / 1000}),
    "cycle": Measure("cycle {ms}", {"cycle": lambda n: n[0] / n[1] * GIGA}),
    "many": Measure(f"many {MANY}", {"many": lambda n: n[1] / GIGA}),
    "into-ask": Measure("ask {ms}", {"into-p50": lambda n: n[0] / 1000, "into-p99": lambda n: n[1] / 1000}, by=INTO),
    "into-cycle": Measure("cycle {ms}", {"into-cycle": lambda n: n[0] / n[1] * GIGA}, by=INTO),
    "iperf-out": Measure("", {"iperf-out": rate}, moves=True, by=IPERF),
    "iperf-in": Measure("--reverse", {"iperf-in": rate}, moves=True, by=IPERF),
    "iperf-8": Measure("--parallel 8", {"iperf-8": rate}, moves=True, by=IPERF),
    "out-64": _datagrams("out", 64),
    "out-1400": _datagrams("out", 1400),
    "in-64": _datagrams("in", 64),
    "in-1400": _datagrams("in", 1400),
}
COPY_FROM, COPY_TO = "copy-from", "copy-to"
ROWS = {
    "out64": Row("guest to host, 64 KiB writes, Mbit/s", ".0f", 1.5),
    "in64": Row("host to guest, 64 KiB writes, Mbit/s", ".0f", 1.0),
    "file64": Row("guest to host, sendfile of 64 KiB each, Mbit/s", ".0f", 1.5),
    "zero64": Row("guest to host, 64 KiB with MSG_ZEROCOPY, Mbit/s", ".0f", 1.5),
    "out1": Row("guest to host, 1 KiB writes, Mbit/s", ".0f", 1.5),
    "in1": Row("host to guest, 1 KiB writes, Mbit/s", ".0f", 1.0),
    "p50": Row("round trip of 64 bytes, median, us", ".0f", 0.9, less=True),
    "p99": Row("round trip of 64 bytes, 99th percentile, us", ".0f", 1.0, less=True),
    "cycle": Row("connect, ask, answer, close: per second", ".0f", 1.5),
    "many": Row(f"{MANY} connections opened, then asked, s", ".2f", 1.0, less=True),
    "into-p50": Row("into the guest: round trip of 64 bytes, median, us", ".0f", 0.9, less=True),
    "into-p99": Row("into the guest: round trip of 64 bytes, 99th percentile, us", ".0f", 1.0, less=True),
    "into-cycle": Row("into the guest: connect, ask, answer, close: per second", ".0f", 1.5),
    "iperf-out": Row("iperf3, guest to host, Mbit/s", ".0f", 1.5),
    "iperf-in": Row("iperf3 -R, host to guest, Mbit/s", ".0f", 1.0),
    "iperf-8": Row("iperf3 -P 8, guest to host, Mbit/s", ".0f", 1.5),
    COPY_FROM: Row("what the guest's kernel copies from a program, Mbit/s", ".0f"),
    COPY_TO: Row("... to a program, Mbit/s", ".0f"),
    "out-64": Row("datagrams of 64 bytes to the host, thousands a second that come", ".1f"),
    "out-64-lost": Row("... : lost, %", ".1f"),
    "out-1400": Row("datagrams of 1400 bytes to the host, thousands a second that come", ".1f"),
    "out-1400-lost": Row("... : lost, %", ".1f"),
    "in-64": Row("datagrams of 64 bytes to the guest, in bursts of 32, thousands a second that come", ".1f"),
    "in-64-lost": Row("... : lost, %", ".1f"),
    "in-1400": Row("datagrams of 1400 bytes to the guest, in bursts of 32, thousands a second that come", ".1f"),
    "in-1400-lost": Row("... : lost, %", ".1f"),
    "out64-backend": Row("CPU of the back-end, s per GB, 64 KiB to the host", ".2f"),
    "in64-backend": Row("CPU of the back-end, s per GB, 64 KiB to the guest", ".2f"),
    "out64-cpu": Row("CPU with QEMU's, s per GB, 64 KiB to the host", ".2f", 1.0, less=True),
    "in64-cpu": Row("CPU with QEMU's, s per GB, 64 KiB to the guest", ".2f", 1.0, less=True),
    "file64-cpu": Row("CPU with QEMU's, s per GB, sendfile to the host", ".2f", 1.0, less=True),
    "zero64-cpu": Row("CPU with QEMU's, s per GB, MSG_ZEROCOPY to the host", ".2f", 1.0, less=True),
    "out1-cpu": Row("CPU with QEMU's, s per GB, 1 KiB to the host", ".2f", 1.0, less=True),
    "in1-cpu": Row("CPU with QEMU's, s per GB, 1 KiB to the guest", ".2f", 1.0, less=True),
    "iperf-out-cpu": Row("CPU with QEMU's, s per GB, iperf3 to the host", ".2f", 1.0, less=True),
    "iperf-in-cpu": Row("CPU with QEMU's, s per GB, iperf3 -R to the guest", ".2f", 1.0, less=True),
    "iperf-8-cpu": Row("CPU with QEMU's, s per GB, iperf3 -P 8 to the host", ".2f", 1.0, less=True),
}
COPIED = 0.8  # the share of that which a path may be expected to move


class Found(NamedTuple):
    """figures[path][row]: one for each round. peak[path]: MiB of resident memory, of QEMU and of its back-end.

    touched[path]: MiB of the guest's memory that its back-end has read or written, which are in that.
    """

    figures: dict[str, dict[str, list[float]]]
    peak: dict[str, tuple[float, float | None]]
    versions: dict[str, str]
    touched: dict[str, float]


# ---- measuring


def cpu(program: Program | None) -> float:
    """Seconds that a process has used so far, in itself and in the system (proc(5), stat: utime and stime)."""
    if program is None:
        return 0.0
    words = Path(f"/proc/{program.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS


def _memory(program: Program, what: str = "VmHWM") -> float:
    """MiB, as proc(5) has it; the peak. Memory that it shares with the guest counts where it has touched it."""
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path(f"/proc/{program.process.pid}/status").read_text(), re.MULTILINE)
    assert found, f"the kernel tells no {what}"
    return int(found[1]) / 1024


def _near(where: str, command: str, milliseconds: int) -> list[str]:
    return [where, *command.format(ms=milliseconds).split()]


def numbers(opened: Open, measure: Measure, near: Path, milliseconds: int) -> Numbers | None:
    """What the program of a measure prints. None: that path does not carry it. ``near``: near.c's program on the host."""
    if measure.by == INTO:
        text = opened.on_host([near, *_near(opened.into, measure.command, milliseconds)])
    elif measure.by == IPERF:
        return iperf.numbers(opened.vm.run(iperf.client(opened.iperf, measure.command))) if opened.iperf else None
    else:
        where = opened.udp if measure.by == UDP else opened.where
        if not where:
            return None
        text = opened.vm.run(" ".join(["near", *_near(where, measure.command, milliseconds)])).text
    return [int(word) for word in text.split()]


def _run(opened: Open, measure: Measure, near: Path, milliseconds: int) -> dict[str, float]:
    """By row; nothing where the path does not carry it."""
    backend_before, qemu_before = cpu(opened.backend), cpu(opened.vm)
    told = numbers(opened, measure, near, milliseconds)
    if told is None:
        return {}
    found = {name: figure(told) for name, figure in measure.figures.items()}
    if measure.moves:
        [name] = measure.figures
        gigabytes = told[2] / GIGA
        backend = cpu(opened.backend) - backend_before
        if opened.backend:
            found[f"{name}-backend"] = backend / gigabytes
        # a tick is the least that can be told
        found[f"{name}-cpu"] = max(backend + cpu(opened.vm) - qemu_before, 1 / TICKS) / gigabytes
    return found


def _copies(opened: Open, milliseconds: int) -> dict[str, float]:
    from_bytes, from_time, to_bytes, to_time = map(int, opened.vm.run(f"near - copy {milliseconds}").text.split())
    return {COPY_FROM: rate([from_bytes, from_time]), COPY_TO: rate([to_bytes, to_time])}


def measured(
    folder: Path, names: Sequence[str], rounds: int, milliseconds: int, chosen: Sequence[str], steady: Steady
) -> Found:
    """The figures of these paths, and of the inside of the first one's guest."""
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in (*names, INSIDE)}

    def keep(name: str, found: dict[str, float]) -> None:
        for row, figure in found.items():
            figures[name].setdefault(row, []).append(figure)

    with contextlib.ExitStack() as stack:
        shop = Shop(folder)
        opened = {name: stack.enter_context(PATHS[name].start(shop, name)) for name in names}
        first = opened[names[0]]
        first.vm.start_until("far serve:/tmp/far", "ready", timeout=86400)
        for number in range(rounds):
            for key in chosen:
                measure = MEASURES[key]
                if measure.by == IPERF and number % 2:
                    continue  # it takes a second and more, whatever ``milliseconds`` says
                for name, each in opened.items():
                    keep(name, steady(_run, each, measure, shop.near, milliseconds))
                if measure.by == NEAR:
                    inside = steady(_run, first._replace(where="unix:/tmp/far"), measure, shop.near, milliseconds)
                    keep(INSIDE, {row: figure for row, figure in inside.items() if row in measure.figures})
            for name, each in opened.items():
                if PATHS[name].ours:
                    keep(name, steady(_copies, each, milliseconds))
        peak = {name: (_memory(each.vm), _memory(each.backend) if each.backend else None) for name, each in opened.items()}
        touched = {name: _memory(each.backend, "RssShmem") for name, each in opened.items() if each.backend}
        versions = {name: each.vm.qmp.execute("query-version")["package"] for name, each in opened.items()}
        return Found(figures, peak, versions, touched)


# ---- the report


def _title(name: str) -> str:
    return INSIDE_TITLE if name == INSIDE else PATHS[name].title


def _ours(name: str) -> bool:
    return name != INSIDE and PATHS[name].ours


def ratios(found: Found, ours: str, row: str) -> tuple[str, list[float]] | None:
    """(the best of the others by its median, ours to the best of each round); None when nobody else has that row."""
    theirs = [name for name in found.peak if not PATHS[name].ours]
    others = {name: found.figures[name][row] for name in theirs if row in found.figures[name]}
    mine = found.figures[ours].get(row)
    if not others or not mine:
        return None
    best = min if ROWS[row].less else max
    name = best(others, key=lambda key: statistics.median(others[key]))
    return name, [own / best(values) for own, values in zip(mine, zip(*others.values(), strict=True), strict=True)]


def _figures(found: Found) -> list[str]:
    names = list(found.figures)
    lines = ["| | " + " | ".join(map(_title, names)) + " |", "|---|" + "---|" * len(names)]
    for key, row in ROWS.items():
        cells = [spread(found.figures[name][key], row.form) if key in found.figures[name] else "-" for name in names]
        if set(cells) != {"-"}:
            lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    for title, place in (("peak resident memory of QEMU, MiB", 0), ("peak resident memory of the back-end, MiB", 1)):
        values = [found.peak[name][place] if name in found.peak else None for name in names]
        lines.append(f"| {title} | " + " | ".join("-" if value is None else f"{value:.0f}" for value in values) + " |")
    guests = [f"{found.touched[name]:.0f}" if name in found.touched else "-" for name in names]
    lines.append("| ... pages of its guest among them, MiB | " + " | ".join(guests) + " |")
    return lines


def _verdict(values: Sequence[float], target: float, less: bool) -> str:
    middle = statistics.median(values)
    reached = middle <= target if less else middle >= target
    return f"{spread(values, '.2f')}{', reached' if reached else ''}"


def _comparison(found: Found, names: Sequence[str]) -> list[str]:
    """Of ours against the best of the others in each round, and of bulk against what the guest's kernel copies."""
    titles = " | ".join(map(_title, names))
    lines = [f"| | the best of the others | wanted | {titles} |", "|---|---|---|" + "---|" * len(names)]
    for key, row in ROWS.items():
        if row.target is None:
            continue
        compared = [ratios(found, name, key) for name in names]
        if not any(compared):
            continue
        best = next(each[0] for each in compared if each)
        cells = " | ".join(_verdict(each[1], row.target, row.less) if each else "-" for each in compared)
        lines.append(f"| {row.title} | {_title(best)} | {'<=' if row.less else '>='} {row.target:g} | {cells} |")
    for key, limit in (("out64", COPY_FROM), ("in64", COPY_TO)):
        if all(key in found.figures[name] for name in names):
            figures = [found.figures[name] for name in names]
            shares = [[a / b for a, b in zip(each[key], each[limit], strict=True)] for each in figures]
            cells = " | ".join(_verdict(values, COPIED, False) for values in shares)
            lines.append(f"| {ROWS[key].title.rpartition(',')[0]} | what the guest's kernel copies | >= {COPIED} | {cells} |")
    return lines


def tables(found: Found) -> list[str]:
    """As Markdown: the figures, what a guest copies, and the paths of ours against the others."""
    ours = [name for name in found.peak if _ours(name)]
    lines = _figures(found)
    if ours and len(ours) < len(found.peak):
        lines += ["", *_comparison(found, ours)]
    return lines


def panels(found: Found) -> list[Panel]:
    """For plot.py: the rows that have a target, a bar for each path."""
    names = [*found.peak, INSIDE]
    return [
        Panel(
            row.title, row.form, [Bar(_title(name), found.figures[name].get(key, ()), _ours(name)) for name in names], row.less
        )
        for key, row in ROWS.items()
        if row.target is not None and any(key in found.figures[name] for name in names)
    ]


def written(found: Found, options: dict[str, Any], steady: Steady) -> str:
    """All of it as JSON, by name."""
    rows = {key: row._asdict() for key, row in ROWS.items()}
    titles = {name: _title(name) for name in found.figures}
    whole = {"machine": described(steady), "options": options, "titles": titles, "rows": rows, **found._asdict()}
    return json.dumps(whole, indent=1) + "\n"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run guest", description="What a program in a guest gets, by each path.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ms", type=int, default=1000, help="of a measurement, about (%(default)s)")
    able = [name for name in PATHS if name != "tap" or may_make_namespaces()]
    parser.add_argument("--paths", default=",".join(able), help="which, with commas between them (%(default)s)")
    parser.add_argument("--only", default=",".join(MEASURES), metavar="MEASURES", help="which, likewise (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures of all rounds there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw them there")
    parser.add_argument("--from", dest="before", type=Path, metavar="FILE", help="measure nothing: those that --json wrote")
    options = parser.parse_args(arguments)
    names, chosen = options.paths.split(","), options.only.split(",")
    if unknown := set(chosen) - set(MEASURES):
        parser.error(f"no such measure: {', '.join(sorted(unknown))}")
    if unknown := set(names) - set(PATHS):
        parser.error(f"no such path: {', '.join(sorted(unknown))}; there are {', '.join(PATHS)}")
    steady = Steady()
    if options.before:
        found = Found(**{key: value for key, value in json.loads(options.before.read_text()).items() if key in Found._fields})
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(Path(folder), names, options.rounds, options.ms, chosen, steady)
        if options.json:
            options.json.write_text(written(found, {"rounds": options.rounds, "ms": options.ms}, steady))
    print(*tables(found), "", *steady.told(), sep="\n", file=sys.stdout)
    if options.svg:
        options.svg.write_text(drawn(panels(found)))
