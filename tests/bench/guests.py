# SPDX-License-Identifier: BSD-3-Clause
"""Guests side by side, and flows of a guest beside one that is stuck: ``tests/bench/run guests``. docs/performance.md has it.

1. Side by side: several guests of each path, each with its back-end and its far end, move bytes for the same span of time; and
   one of them alone, in the same round. All of them run all the time.
2. Stuck: the rate of a flow in a guest beside another one that the host's program does not read (held), or that the guest's own
   program does not read (unread), by that of the same flow without it, in turns, many short times: the median, and where it
   lies with 95 % confidence, as fair.py has it without guests.

The paths are those of guest.py. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.fair import Found, evenness, middle
from tests.bench.guest import cpu, rate
from tests.bench.machine import Steady, described
from tests.bench.paths import PATHS, Open, Shop
from tests.bench.ring import spread
from tests.e2e.vm import Program
from tests.netns import may_make_namespaces

__all__ = ["PARTS", "beside_stuck", "main", "side_by_side", "tables"]

SIDE = ("offload-generic", "slirp", "passt-vhost-user")
STUCK = ("offload-generic", "vsock", "slirp", "passt-vhost-user", "tap", "vhost-device-vsock")
WAYS = {"out": "to the host", "in": "to the guest"}
KINDS = {"held": "a flow that the host's program does not read", "unread": "a flow that the guest's program does not read"}
PIECE, MIB, GIGA, MEGABIT = 1 << 16, 1 << 20, 1e9, 1e6
LIMIT = 0.95  # what a flow beside a stuck one shall have at least of its rate


def _note(found: Found, what: str, name: str, *values: float) -> None:
    found.setdefault(what, {}).setdefault(name, []).extend(values)


def _spans(paths: Sequence[Open], way: str, milliseconds: int) -> list[tuple[int, int]]:
    """Bytes and nanoseconds of each of them, all at once."""
    running = [each.vm.start(f"near {each.where} span-{way} {PIECE} {milliseconds}", timeout=300) for each in paths]
    return [(int(moved), int(took)) for moved, took in (each.wait().text.split() for each in running)]


def _used(paths: Sequence[Open]) -> float:
    return sum(cpu(each.backend) + cpu(each.vm) for each in paths)


# ---- side by side


def _memory(program: Program, what: str) -> float:
    """MiB: Rss, or Pss, where what is shared with others (the interpreter, a guest's memory) counts for each in part."""
    lines = Path(f"/proc/{program.process.pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) * 1024 / MIB


def _note_memory(found: Found, name: str, paths: Sequence[Open]) -> None:
    _note(found, "qemu-pss", name, sum(_memory(each.vm, "Pss") for each in paths))
    backends = [each.backend for each in paths if each.backend]
    if backends:
        _note(found, "memory-rss", name, *(_memory(each, "Rss") for each in backends))
        _note(found, "memory-pss", name, *(_memory(each, "Pss") for each in backends))


def _together(paths: Sequence[Open], way: str, milliseconds: int) -> tuple[list[tuple[int, int]], float]:
    before = _used(paths)
    spans = _spans(paths, way, milliseconds)
    return spans, _used(paths) - before


def side_by_side(folder: Path, names: Sequence[str], count: int, rounds: int, milliseconds: int, steady: Steady) -> Found:
    """``count`` guests of each path."""
    found: Found = {}
    with contextlib.ExitStack() as stack:
        shop = Shop(folder)
        shops = [shop.within(str(number)) for number in range(count)]
        opened = {name: [stack.enter_context(PATHS[name].start(each, name)) for each in shops] for name in names}
        for number in range(-1, rounds):  # the first one finds windows closed and code that is not translated
            for way in WAYS:
                for name, paths in opened.items():
                    [one] = map(rate, steady(_spans, paths[:1], way, milliseconds))
                    spans, used = steady(_together, paths, way, milliseconds)
                    if number < 0:
                        continue
                    each = [rate(span) for span in spans]
                    _note(found, f"{way}-one", name, one)
                    _note(found, f"{way}-all", name, sum(each))
                    _note(found, f"{way}-all-by-one", name, sum(each) / one)
                    _note(found, f"{way}-even", name, evenness(each))
                    _note(found, f"{way}-least", name, min(each) / max(each))
                    # before the span that is counted a quarter of it is moved, too, at no other rate
                    _note(found, f"{way}-cpu", name, used / (sum(moved for moved, _ in spans) * 1.25 / GIGA))
        for name, paths in opened.items():
            _note_memory(found, name, paths)
    return found


# ---- one that is stuck


def _amount(opened: Open, way: str, milliseconds: int) -> int:
    """Bytes that take about that, in whole writes."""
    [(moved, took)] = _spans([opened], way, 10 * milliseconds)
    return max(int(moved / took * milliseconds * MEGABIT) // PIECE, 1) * PIECE


def beside_stuck(folder: Path, names: Sequence[str], rounds: int, times: int, milliseconds: int) -> Found:
    """``times`` pairs of each kind in each of the rounds, of some ``milliseconds``."""
    found: Found = {}
    with contextlib.ExitStack() as stack:
        shop = Shop(folder)
        opened = {name: stack.enter_context(PATHS[name].start(shop, name)) for name in names}
        amounts = {name: [_amount(each, way, milliseconds) for way in WAYS] for name, each in opened.items()}
        for _ in range(rounds):
            for kind in KINDS:
                for name, each in opened.items():
                    out, into = amounts[name]
                    for line in each.vm.run(f"near {each.where} {kind} {out} {into} {times}").text.splitlines():
                        out_with, out_without, in_with, in_without = map(int, line.split())
                        _note(found, f"{kind}-out", name, out_without / out_with)
                        _note(found, f"{kind}-in", name, in_without / in_with)
    return found


# ---- the report

PARTS = {  # part, key: words, form
    "side": {
        key: row
        for way, words in WAYS.items()
        for key, row in {
            f"{way}-one": (f"{words}: one alone, Mbit/s", ".0f"),
            f"{way}-all": ("... {count} at once, all together, Mbit/s", ".0f"),
            f"{way}-all-by-one": ("... : one alone", ".2f"),
            f"{way}-even": ("... evenness of the {count}", ".3f"),
            f"{way}-least": ("... the slowest : the fastest", ".2f"),
            f"{way}-cpu": ("... CPU of all {count} and their QEMUs, s/GB", ".2f"),
        }.items()
    } | {
        "memory-rss": ("memory of each back-end: resident, MiB", ".1f"),
        "memory-pss": ("... shared parts counted once (PSS), MiB", ".1f"),
        "qemu-pss": ("memory of the {count} QEMUs with their guests, all together (PSS), MiB", ".0f"),
    },
    "stuck": {
        f"{kind}-{way}": (f"rate {there} beside {words} : without it", ".3f")
        for kind, words in KINDS.items()
        for way, there in WAYS.items()
    },
}  # fmt: skip


def _cell(part: str, values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    if part == "side":
        return spread(values, form) if len(values) > 1 else format(values[0], form)
    low, high = middle(values)
    median = sorted(values)[len(values) // 2]
    return f"{median:{form}} ({low:{form}} to {high:{form}}){'' if median >= LIMIT else ', below'}"


def tables(found: dict[str, Found], count: int) -> list[str]:
    """As Markdown, one for each part that was measured."""
    lines: list[str] = []
    for part, figures in found.items():
        names = [name for name in PATHS if any(name in values for values in figures.values())]
        lines += ["", f"| | {' | '.join(PATHS[name].title for name in names)} |", "|---|" + "---|" * len(names)]
        for key, (title, form) in PARTS[part].items():
            if key in figures:
                cells = [_cell(part, figures[key].get(name, []), form) for name in names]
                lines.append(f"| {title.format(count=count)} | {' | '.join(cells)} |")
    return lines[1:]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run guests", description="Guests side by side, and beside a stuck flow.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of side (%(default)s)")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="guests side by side (%(default)s)")
    parser.add_argument("--ms", type=int, default=400, help="of a span of side, about (%(default)s)")
    parser.add_argument("--times", type=int, default=30, metavar="N", help="pairs of stuck, twice (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PATHS, metavar="PATH", help=f"of {', '.join(PATHS)}")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round there")
    options = parser.parse_args(arguments)
    steady = Steady()
    stuck = [name for name in STUCK if name != "tap" or may_make_namespaces()]
    parts: dict[str, Callable[[Path], Found]] = {
        "side": lambda own: side_by_side(own, options.only or SIDE, options.count, options.rounds, options.ms, steady),
        "stuck": lambda own: beside_stuck(own, options.only or stuck, 2, options.times, 20),
    }
    found: dict[str, Found] = {}
    for part, measure in parts.items():
        if part in options.part:
            with tempfile.TemporaryDirectory(prefix="vhostsock-bench-") as name:
                found[part] = measure(Path(name))
            print(*tables({part: found[part]}, options.count), "", sep="\n", flush=True)
    print(*steady.told("those that are stuck"), sep="\n")
    if options.json:
        about: dict[str, Any] = {"machine": described(steady), "count": options.count}
        options.json.write_text(json.dumps(about | {"figures": found}, indent=1) + "\n")
