# SPDX-License-Identifier: BSD-3-Clause
"""docs/programs.md: what was run, made from the run itself (tests/e2e/programs/run)."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

HEAD = """# Programs

Debian's packages, unmodified, in a guest without a NIC (Linux 6.1, QEMU 7.2, TCG) and on its host, talking through the device.
The guest's servers are published by a rule of the policy, the host's addresses rewritten by another. Each row is a test of
`tests/e2e/programs`, and was written by a run of them (`tests/e2e/programs/run`). Bytes and counts say how much was checked,
nothing about speed.

| package | version | direction | what was done | what was checked | result |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    package: str
    version: str
    direction: str
    did: str
    checked: str
    amount: str


def write(path: Path, rows: list[Row]) -> None:
    """Sorted by package, in the order of the tests within one."""
    lines = [
        "| " + " | ".join(astuple(row)[:-1]) + f" | passed: {row.amount} |" for row in sorted(rows, key=lambda r: r.package)
    ]
    path.write_text(HEAD + "\n".join(lines) + "\n")
