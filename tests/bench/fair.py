# SPDX-License-Identifier: BSD-3-Clause
"""Who gets how much when many want it: ``tests/bench/run fair``. docs/performance.md keeps what it printed.

The near ends, the far ends and what is between them are those of flows.py.

1. Bulk against questions: one flow asks, 64 bytes and as many back, one question after another, while 0, 1, 8 and 64 others
   move bytes. Who answers is a process of its own. How evenly the others share what they get is from the same minutes.
2. Side by side: several back-ends, each with its driver and its far ends, do at once what one does alone in the same round.
3. A flow whose far end reads nothing: the rate of another one with it, by that of another one without it, in turns, many short
   times: the median, and where it lies with 95 % confidence.

Evenness is Jain's index, (sum x)^2 / (n * sum x^2): 1 is even, 1/n is one that has it all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.ends import DIRECT, OFFLOAD, OTHER_VSOCK, RELAY, VSOCK, Mix, Near, Tools, started
from tests.bench.machine import Steady, described
from tests.bench.plot import Bar, Panel, drawn
from tests.bench.ring import spread

__all__ = ["beside_bulk", "beside_stuck", "chart", "evenness", "main", "middle", "side_by_side", "tables"]

NAMES = (DIRECT, RELAY, OFFLOAD, VSOCK, OTHER_VSOCK)
BULK = (1, 8, 64)
QUESTIONS = 4000  # of a round, at most
MIB = 1 << 20
WAYS = {"to-host": True, "to-guest": False}
Found = dict[str, dict[str, list[float]]]  # by what was measured, then by name; one figure a round


def evenness(values: Sequence[float]) -> float:
    """Jain's index."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Between which of them the median of what they are drawn from lies, with 95 % confidence, whatever its distribution."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))  # 1.96 / 2
    low = max(math.floor(len(ordered) / 2 - half), 0)
    return ordered[low], ordered[len(ordered) - 1 - low]


def _note(found: Found, what: str, name: str, value: float) -> None:
    found.setdefault(what, {}).setdefault(name, []).append(value)


def _percentile(values: Sequence[int], part: float) -> float:
    """Microseconds."""
    return sorted(values)[min(int(len(values) * part), len(values) - 1)] / 1e3


def _note_answers(found: Found, key: str, name: str, each: Sequence[int]) -> None:
    _note(found, f"{key}-p50", name, _percentile(each, 0.5))
    _note(found, f"{key}-p99", name, _percentile(each, 0.99))


def _at_once(jobs: Sequence[Callable[[], Mix]]) -> list[Mix]:
    """Each in a thread."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        return [job.result() for job in [threads.submit(job) for job in jobs]]


# ---- bulk against questions


def _mixed(near: Near, asker: Near, to_host: bool, bulk: int, amount: int) -> tuple[Mix, list[int]]:
    """What the bulk flows came to, and what the questions took."""
    over, flows = near.over(), range(1, 1 + bulk)
    if near is asker:
        mix = near.mix(over, flows=flows, to_host=to_host, amount=amount, asker=0, most=QUESTIONS)
        return mix, mix.each
    mix, asked = _at_once([
        lambda: near.mix(over, flows=flows, to_host=to_host, amount=amount),
        lambda: asker.mix(over, asker=0, most=QUESTIONS),
    ])  # fmt: skip
    return mix, asked.each


def beside_bulk(
    folder: Path, names: Sequence[str], bulk: Sequence[int], rounds: int, seconds: float, tools: Tools, steady: Steady
) -> Found:
    """A round before the first finds how much is moved in about ``seconds``."""
    found: Found = {}
    amounts: dict[tuple[str, str, int], int] = {}
    with contextlib.ExitStack() as stack:
        nears = stack.enter_context(started(folder, tuple(names), 1 + max(bulk), tools=tools))
        askers = {}
        for name, near in nears.items():
            askers[name] = near.twin() if near.of_host else near
            if near.of_host:
                stack.callback(askers[name].close)
            askers[name].connect(0, 1, answering=True)
            near.connect(1, max(bulk))
        for number in range(-1, rounds):
            for name, near in nears.items():
                most = min(QUESTIONS, max(int(seconds * 1e4), 50))
                alone = steady(askers[name].mix, near.over(), asker=0, most=most).each
                if number >= 0:
                    _note_answers(found, "alone", name, alone)
            for way, to_host in WAYS.items():
                for count in bulk:
                    for name, near in nears.items():
                        amount = amounts.get((name, way, count), 32 * MIB // count)
                        mix, each = steady(_mixed, near, askers[name], to_host, count, amount)
                        if number < 0:
                            whole = int(amount / mix.whole * seconds * 1e9)
                            amounts[name, way, count] = max(whole, 1 << 16)
                            continue
                        rate = sum(mix.moved) / mix.took
                        key = f"{way}-{count}"
                        if each:
                            _note_answers(found, key, name, each)
                        _note(found, f"{key}-rate", name, rate)
                        if count > 1:
                            _note(found, f"{key}-even", name, evenness(mix.moved))
    return found


# ---- side by side


@contextlib.contextmanager
def _neighbours(folder: Path, names: Sequence[str], count: int, tools: Tools) -> Iterator[list[dict[str, Near]]]:
    """``count`` times all of them, each with its own far ends, and two flows: 0 to who answers, 1."""
    with contextlib.ExitStack() as stack:
        sets = []
        for number in range(count):
            own = folder / str(number)
            own.mkdir()
            nears = stack.enter_context(started(own, tuple(names), 2, tools=tools))
            for near in nears.values():
                near.connect(0, 1, answering=True)
                near.connect(1, 1)
            sets.append(nears)
        yield sets


def _all_move(nears: Sequence[Near], to_host: bool, amount: int) -> tuple[list[float], float]:
    """GB/s of each, and CPU seconds a GB of the processes between (0 without any)."""
    over, before = nears[0].over(), [near.cpu() for near in nears]

    def job(near: Near) -> Callable[[], Mix]:
        return lambda: near.mix(over, flows=range(1, 2), to_host=to_host, amount=amount)

    mixes = _at_once([job(near) for near in nears])
    used = sum(near.cpu() for near in nears) - sum(before)
    return [mix.moved[0] / mix.took for mix in mixes], used / (amount * len(nears))


def _all_ask(nears: Sequence[Near], times: int) -> list[int]:
    def job(near: Near) -> Callable[[], Mix]:
        return lambda: near.mix(near.over(), asker=0, most=times)

    return [each for mix in _at_once([job(near) for near in nears]) for each in mix.each]


def _one_asks(nears: Sequence[Near], to_host: bool, amount: int) -> list[int]:
    """The first, while the others move bytes."""
    over = nears[0].over()

    def job(near: Near) -> Callable[[], Mix]:
        return lambda: near.mix(over, flows=range(1, 2), to_host=to_host, amount=amount)

    return _at_once([lambda: nears[0].mix(over, asker=0, most=QUESTIONS), *map(job, nears[1:])])[0].each


def side_by_side(
    folder: Path, names: Sequence[str], count: int, rounds: int, seconds: float, tools: Tools, steady: Steady
) -> Found:
    """``seconds`` is about what one alone takes for the bytes of a round; ``count`` of them, for a ``count``th of it each."""
    found: Found = {}
    with _neighbours(folder, names, count, tools) as sets:
        all_of = {name: [nears[name] for nears in sets] for name in names}
        amounts: dict[tuple[str, str], int] = {}
        for number in range(-1, rounds):
            for way, to_host in WAYS.items():
                for name, nears in all_of.items():
                    amount = amounts.get((name, way), 64 * MIB)
                    [one], cpu = steady(_all_move, nears[:1], to_host, amount)
                    amounts.setdefault((name, way), max(int(one * seconds * 1e9), 1 << 20))
                    if number < 0:
                        continue
                    each, cpu_all = steady(_all_move, nears, to_host, amount // count)
                    _note(found, f"{way}-one", name, one)
                    _note(found, f"{way}-all", name, sum(each))
                    _note(found, f"{way}-all-by-one", name, sum(each) / one)
                    _note(found, f"{way}-even", name, evenness(each))
                    _note(found, f"{way}-least", name, min(each) / max(each))
                    if nears[0].pid:
                        _note(found, f"{way}-cpu-one", name, cpu)
                        _note(found, f"{way}-cpu-all", name, cpu_all)
            times = max(int(seconds * 2000), 50)
            for name, nears in all_of.items():
                shares = {way: amounts[name, way] // count for way in WAYS}
                asked = [(f"{way}-asked", steady(_one_asks, nears, WAYS[way], share)) for way, share in shares.items()]
                asked += [
                    ("ask-one", steady(_all_ask, nears[:1], times)),
                    ("ask-all", steady(_all_ask, nears, times // 2)),
                ]
                for key, values in asked:
                    if number >= 0 and values:
                        _note_answers(found, key, name, values)
        for name, nears in all_of.items():
            for key, what in (("rss", "VmRSS"), ("pss", "Pss"), ("anon", "RssAnon")):
                for memory in (near.memory() for near in nears if near.pid):
                    _note(found, f"memory-{key}", name, memory[what] / MIB)
    return found


# ---- one that is stuck


def _against(stuck: Near, free: Near, to_host: bool, amount: int, times: int) -> Iterator[tuple[float, float]]:
    """The rates of flow 0 of ``stuck`` by those of ``free`` just before or after; the CPU likewise."""
    for number in range(times):
        took, used = {}, {}
        for near in (stuck, free) if number % 2 else (free, stuck):
            before = near.cpu()
            took[near] = (near.send if to_host else near.receive)(0, 1, amount, 1 << 16)
            used[near] = near.cpu() - before
        yield took[free] / took[stuck], used[stuck] / used[free] if used[free] else 0.0


def beside_stuck(folder: Path, names: Sequence[str], rounds: int, times: int, amount: int, tools: Tools) -> Found:
    """The rate of flow 0 with a stuck flow 1, by that without, each way; and the CPU.

    Two of each take turns, ``times`` times, one of them with a stuck flow; then the other has it: what the two differ in
    otherwise is in as many figures one way as the other.
    """
    found: Found = {}
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    with started(folder / "a", tuple(names), 2, tools=tools) as a, started(folder / "b", tuple(names), 2, tools=tools) as b:
        for near in (*a.values(), *b.values()):
            near.connect(0, 1)
            near.receive(0, 1, amount, 1 << 16)
        for number in range(2 * rounds):
            for name in names:
                stuck, free = (a[name], b[name]) if number % 2 else (b[name], a[name])
                stuck.connect(1, 1)
                stuck.stuff(1)
                for way, to_host in WAYS.items():
                    for rate, cpu in _against(stuck, free, to_host, amount, times):
                        _note(found, f"stuck-{way}", name, rate)
                        if cpu:
                            _note(found, f"stuck-{way}-cpu", name, cpu)
                stuck.abort(1)  # vhost-device-vsock does not answer a close before all that it took is read
                stuck.disconnect(1, 1)
    return found


# ---- the report

ROWS: dict[str, dict[str, tuple[str, str, bool]]] = {  # table, key: words, form, less is better
    "bulk": {
        f"{key}-{part}": (f"{words}, {'median' if part == 'p50' else '99th percentile'}, us", ".0f", True)
        for part in ("p50", "p99")
        for key, words in [
            ("alone", "question and answer, nothing else"),
            *((f"{way}-{count}", f"... beside {count} flows {way.replace('-', ' the ')}") for way in WAYS for count in BULK),
        ]
    } | {
        f"{way}-{count}-rate": (f"{count} flows {way.replace('-', ' the ')} meanwhile, all together, GB/s", ".2f", False)
        for way in WAYS
        for count in BULK
    } | {
        f"{way}-{count}-even": (f"evenness of {count} flows {way.replace('-', ' the ')}", ".3f", False)
        for way in WAYS
        for count in BULK[1:]
    },
    "side": {
        key: row
        for way in WAYS
        for key, row in {
            f"{way}-one": (f"{way.replace('-', ' the ')}: one alone, GB/s", ".2f", False),
            f"{way}-all": ("... {count} at once, all together, GB/s", ".2f", False),
            f"{way}-all-by-one": ("... : one alone", ".2f", False),
            f"{way}-even": ("... evenness of the {count}", ".3f", False),
            f"{way}-least": ("... the slowest : the fastest", ".2f", False),
            f"{way}-cpu-one": ("... CPU of the process between, one alone, s/GB", ".2f", True),
            f"{way}-cpu-all": ("... of all {count}, s/GB", ".2f", True),
        }.items()
    } | {
        f"{key}-{part}": (f"{words}, {'median' if part == 'p50' else '99th percentile'}, us", ".0f", True)
        for key, words in {
            "ask-one": "question and answer, one alone", "ask-all": "... {count} ask at once",
            "to-host-asked": "... one asks, the others send", "to-guest-asked": "... one asks, the others receive",
        }.items()
        for part in ("p50", "p99")
    } | {
        "memory-rss": ("memory of each process between: resident, MiB", ".1f", True),
        "memory-pss": ("... shared parts counted once (PSS), MiB", ".1f", True),
        "memory-anon": ("... its own, MiB", ".1f", True),
    },
    "stuck": {
        "stuck-to-host": ("rate to the host beside a stuck flow : without it", ".3f", False),
        "stuck-to-guest": ("rate to the guest, likewise", ".3f", False),
        "stuck-to-host-cpu": ("CPU of the process between for the bytes to the host, likewise", ".3f", True),
        "stuck-to-guest-cpu": ("... to the guest", ".3f", True),
    },
}  # fmt: skip


def _cell(part: str, values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    if part == "stuck":
        low, high = middle(values)
        return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"
    return spread(values, form)


def tables(found: dict[str, Found], count: int) -> list[str]:
    """As Markdown, one for each part that was measured."""
    lines = []
    for part, figures in found.items():
        names = [name for name in NAMES if any(name in values for values in figures.values())]
        lines += ["", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for key, (title, form, _) in ROWS[part].items():
            if key in figures:
                cells = [_cell(part, figures[key].get(name, []), form) for name in names]
                lines.append(f"| {title.format(count=count)} | {' | '.join(cells)} |")
    return lines[1:]


def chart(found: dict[str, Found], count: int) -> str:
    """As SVG: a panel a row."""
    panels, title = [], ""
    for part, figures in found.items():
        for key, (words, form, less) in ROWS[part].items():
            title = words if not words.startswith("...") else f"{title.split(':')[0].split(', ')[0]}{words[3:]}"
            if key in figures:
                bars = [Bar(name, values, name in (OFFLOAD, VSOCK)) for name in NAMES if (values := figures[key].get(name))]
                panels.append(Panel(title.format(count=count), form, bars, less))
    return drawn(panels)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run fair", description="Who gets how much, without a guest.")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of bulk and of side (%(default)s)")
    parser.add_argument("--pairs", type=int, default=8, metavar="N", help="rounds of stuck (%(default)s)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="back-ends side by side (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, metavar="S", help="of one measurement, about (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--part", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="PART",
                        help=f"of {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the figures there")
    options = parser.parse_args(arguments)
    found: dict[str, Found] = {}
    steady = Steady()
    with tempfile.TemporaryDirectory(prefix="vhostsock-bench-") as name:
        folder, names = Path(name), options.only
        tools = Tools.built(folder)
        parts: dict[str, Callable[[Path], Found]] = {
            "bulk": lambda own: beside_bulk(own, names, BULK, options.rounds, options.seconds, tools, steady),
            "side": lambda own: side_by_side(own, names, options.count, options.rounds, options.seconds, tools, steady),
            "stuck": lambda own: beside_stuck(own, names, options.pairs, 60, 4 * MIB, tools),
        }
        for part, measure in parts.items():
            if part in options.part:
                own = folder / part
                own.mkdir()
                found[part] = measure(own)
                print(*tables({part: found[part]}, options.count), "", sep="\n", flush=True)
    print(*steady.told("*stuck*"), sep="\n")
    if options.json:
        about: dict[str, Any] = {"machine": described(steady), "seconds": options.seconds, "count": options.count}
        options.json.write_text(json.dumps(about | {"figures": found}, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(chart(found, options.count))
