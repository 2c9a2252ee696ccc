# SPDX-License-Identifier: BSD-3-Clause
"""Adds up what several gcov builds of the same sources counted: ``coverage_report.py FOLDER [--uncovered]``."""

from __future__ import annotations

import collections
import gzip
import json
import subprocess
import sys
from pathlib import Path

Lines = dict[int, int]
Branches = dict[tuple[int, int], int]


def main(folder: Path, uncovered: bool) -> int:
    lines: dict[str, Lines] = collections.defaultdict(dict)
    branches: dict[str, Branches] = collections.defaultdict(dict)
    for counts in folder.rglob("*.gcda"):
        done = subprocess.run(["gcov", "--json-format", "--branch-probabilities", "--stdout", str(counts)],
                              capture_output=True, check=True, cwd=folder)  # fmt: skip
        for text in done.stdout.splitlines():
            add(json.loads(text if text[:1] == b"{" else gzip.decompress(text)), lines, branches)
    total = [0, 0, 0, 0]
    print(f"{'':26} {'lines':>18} {'branches':>18}")
    for name in sorted(lines):
        figures = [sum(map(bool, lines[name].values())), len(lines[name]),
                   sum(map(bool, branches[name].values())), len(branches[name])]  # fmt: skip
        total = [a + b for a, b in zip(total, figures, strict=True)]
        print(row(name, figures))
        if uncovered:
            print("    not reached:", ", ".join(str(n) for n, count in sorted(lines[name].items()) if not count) or "nothing")
    print(row("all", total))
    return 0 if lines else 1


def add(report: dict[str, object], lines: dict[str, Lines], branches: dict[str, Branches]) -> None:
    files = report["files"]
    assert isinstance(files, list)
    for file in files:
        parts = Path(file["file"]).parts[-3:]
        if len(parts) < 3 or parts[0] != "csrc" or parts[1] not in ("core", "engine"):
            continue
        name = "/".join(parts[1:])
        for line in file["lines"]:
            number = line["line_number"]
            lines[name][number] = lines[name].get(number, 0) + line["count"]
            for at, branch in enumerate(line["branches"]):
                branches[name][number, at] = branches[name].get((number, at), 0) + branch["count"]


def row(name: str, figures: list[int]) -> str:
    reached, of, taken, ways = figures
    return f"{name:26} {reached:6} of {of:<6} {share(reached, of)} {taken:6} of {ways:<6} {share(taken, ways)}"


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:4.0f}%" if whole else "    -"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--uncovered" in sys.argv))
