# SPDX-License-Identifier: BSD-3-Clause
"""What a fixed workload costs the engine, against a baseline that the repository keeps: ``tests/bench/run gate``.

Time tells nothing on a machine that does other work; counts do. gate.c drives ``csrc/engine`` and ``csrc/core`` by hand on one
thread, and Valgrind counts the instructions and system calls of the engine's part alone, so that two runs agree to the last,
whatever else the machine does. gate.json is the baseline: what each row cost for a unit of work, and by how much of that it may
grow. How many instructions there are is the compiler's choice, too: where it, the C library or the machine's architecture is
another one than the baseline's, only system calls are judged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["BASELINE", "Costs", "Verdict", "judged", "main", "measured"]

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
BASELINE = HERE / "gate.json"
# those of the package (vhostsock/_build_core.py)
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers",
         "-Wno-maybe-uninitialized", "-pthread"]  # fmt: skip
KINDS = ("instructions", "system calls")

Costs = dict[str, dict[str, Any]]
"""row -> {"unit": what, "instructions": for each, "system calls": for each, "of these": name of a system call -> for each}"""


class Verdict(NamedTuple):
    failures: list[str]
    notes: list[str]  # what is better than the baseline, and what was not judged


# ---- counting


def _compiler() -> str:
    return os.environ.get("CC", "cc")


def made_by() -> str:
    """What decides how many instructions there are: ``x86_64, gcc 12, glibc 2.36``."""
    done = subprocess.run([_compiler(), "-dM", "-E", "-x", "c", "-"], input="#include <features.h>\n", stdout=subprocess.PIPE,
                          text=True, check=True, timeout=100)  # fmt: skip
    macros = dict(re.findall(r"^#define (\w+) (.*)$", done.stdout, re.MULTILINE))
    clang = macros.get("__clang_major__")
    compiler = f"clang {clang}" if clang else f"gcc {macros['__GNUC__']}"
    return f"{os.uname().machine}, {compiler}, glibc {macros['__GLIBC__']}.{macros['__GLIBC_MINOR__']}"


def built(csrc: Path, work: Path) -> Path:
    """The workload with the sources in ``csrc``. Objects in ``work`` whose sources are the same serve again."""
    headers = sorted(csrc.glob("*/*.h"))
    included = csrc / "engine/vs_engine.c"
    sources = [HERE / "gate.c", *sorted(csrc.glob("core/*.c")), *sorted(set(csrc.glob("engine/*.c")) - {included})]
    common = hashlib.sha256("\0".join([made_by(), *FLAGS]).encode())
    for file in [HERE / "gate_driver.h", included, *headers]:
        common.update(file.read_bytes())
    includes = [f"-I{folder}" for folder in (csrc, csrc / "include", csrc / "core", csrc / "engine", HERE)]

    def compiled(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        target = work / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            subprocess.run([_compiler(), *FLAGS, *includes, "-c", str(source), "-o", f"{target}.tmp"], check=True, timeout=300)
            os.rename(f"{target}.tmp", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    program = work / "gate"
    subprocess.run([_compiler(), "-pthread", *map(str, objects), "-o", str(program)], check=True, timeout=100)
    return program


def _calls(log: str) -> dict[str, Counter[str]]:
    """row -> the system calls that Valgrind saw between its marks."""
    found: dict[str, Counter[str]] = {}
    row, inside = Counter[str](), False
    for line in log.splitlines():
        # one that may block has two lines, of which the second names none
        if call := re.match(r"SYSCALL\[\d+,\d+\]\( *\d+\) sys_(\w+)", line):
            row[call[1]] += inside
        elif mark := re.match(r"\*\*\d+\*\* gate: (row (.*)|begin|end)$", line):
            inside = mark[1] == "begin"
            if mark[2]:
                row = found.setdefault(mark[2], Counter())
    return found


def measured(csrc: Path, work: Path) -> Costs:
    """Every row's costs. callgrind's profile of the row NUMBER (from 1) is left in ``work``/callgrind.NUMBER."""
    program = built(csrc, work)
    for old in work.glob("callgrind*"):
        old.unlink()
    log = work / "log"
    command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={work / 'callgrind'}",
               "--trace-syscalls=yes", f"--log-file={log}", str(program)]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    calls = _calls(log.read_text())
    found: Costs = {}
    for number, line in enumerate(done.stdout.splitlines(), 1):
        name, amount, unit = re.fullmatch(r"(.*): ([\d.]+) (\w+)", line).groups()  # type: ignore[union-attr]
        units = float(amount)
        text = (work / f"callgrind.{number}").read_text()
        fields = dict(re.findall(r"^(desc: Trigger|events|summary): (.*)$", text, re.MULTILINE))
        if fields["desc: Trigger"] != f"Client Request: {name}" or fields["events"] != "Ir" or not calls[name].total():
            raise RuntimeError(f"this Valgrind counts otherwise: {fields} for {name!r}, {calls[name].total()} system calls")
        found[name] = {
            "unit": unit,
            "instructions": round(int(fields["summary"]) / units, 2),
            "system calls": round(calls[name].total() / units, 2),
            "of these": {call: round(count / units, 2) for call, count in sorted(calls[name].items()) if count},
        }
    return found


# ---- judging


def _more_of(before: dict[str, Any], cost: dict[str, Any]) -> str:
    more = {call: count - before["of these"].get(call, 0) for call, count in cost["of these"].items()}
    return "".join(f", {call} {count:+.2f}" for call, count in more.items() if count > 0)


def judged(baseline: dict[str, Any], made: str, costs: Costs) -> Verdict:
    """``costs``, as made by the tools ``made``, against gate.json."""
    verdict = Verdict([], [])
    kinds = list(KINDS)
    if made != baseline["made by"]:
        kinds.remove("instructions")
        verdict.notes.append(f"instructions are not judged: these are of {made}, the baseline's of {baseline['made by']}")
    for name in baseline["rows"].keys() ^ costs.keys():
        where = "the workload" if name in baseline["rows"] else "the baseline"
        verdict.failures.append(f"{name}: {where} has no such row")
    for name, cost in costs.items():
        before = baseline["rows"].get(name, {})
        for kind in kinds:
            if kind not in before:
                continue
            was, now, more = before[kind], cost[kind], baseline["tolerance, percent"][kind]
            change = (now / was - 1) * 100
            text = f"{name}: {kind} for a {cost['unit']}: was {was:.2f}, is {now:.2f}, {change:+.1f} %"
            if change > more:
                names = _more_of(before, cost) if kind == "system calls" else ""
                verdict.failures.append(f"{text}; it may be +{more} %{names}")
            elif change < -more:
                verdict.notes.append(f"{text}: renew the baseline, so that it stays so")
    return verdict


HOW = """Which functions cost it: tests/bench/run gate --profile 'ROW'
If it is worth it: tests/bench/run gate --renew 'WHY', and commit tests/bench/gate.json with the change."""


def table(costs: Costs) -> list[str]:
    lines = ["| workload | for a | instructions | system calls |", "|---|---|---|---|"]
    for name, cost in costs.items():
        lines.append(f"| {name} | {cost['unit']} | {cost['instructions']:.0f} | {cost['system calls']:.2f} |")
    return lines


def renewed(path: Path, baseline: dict[str, Any], made: str, costs: Costs, why: str) -> None:
    baseline |= {"made by": made, "renewed because": why, "rows": costs}
    # a row in a line: a change of the baseline reads as what it is
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(cost)}" for name, cost in costs.items())
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in baseline.items() if key != "rows")
    path.write_text(f'{{\n{head} "rows": {{\n{rows}\n }}\n}}\n')


def main(arguments: Sequence[str] | None = None) -> None:
    what = "What the engine costs, against the baseline; the exit status is 1 if it is more."
    parser = argparse.ArgumentParser(prog="tests/bench/run gate", description=what)
    parser.add_argument("--renew", metavar="WHY", help="what is counted now becomes the baseline")
    parser.add_argument("--profile", metavar="ROW", help="which functions it is that cost")
    parser.add_argument("--csrc", type=Path, default=CSRC, metavar="FOLDER", help="other sources than the repository's")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="build there, and leave it and the profiles")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vhostsock-gate-") as name:
        work = options.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        costs = measured(options.csrc.absolute(), work.absolute())
        if options.profile is not None:
            if options.profile not in costs:
                parser.error(f"no such row; there are {', '.join(map(repr, costs))}")
            profile = work / f"callgrind.{list(costs).index(options.profile) + 1}"
            subprocess.run(["callgrind_annotate", "--auto=no", "--threshold=100", str(profile)], check=True)
            return
    print("\n".join(table(costs)))
    baseline = json.loads(BASELINE.read_text())
    if options.renew:
        renewed(BASELINE, baseline, made_by(), costs, options.renew)
        return
    verdict = judged(baseline, made_by(), costs)
    print("\n".join(["", *verdict.notes, *verdict.failures, *([HOW] if verdict.failures else [])]))
    sys.exit(bool(verdict.failures))


if __name__ == "__main__":
    main()
