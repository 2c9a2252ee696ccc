# SPDX-License-Identifier: BSD-3-Clause
"""docs/socket-semantics.md: all behaviours are there, and each names claims that exist and are run, or says what is open."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/socket-semantics.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| \d", line)]
BEHAVIOURS = 59


@functools.cache
def claims(file: str) -> frozenset[str]:
    """The claims of a guest program (that it also runs), or the tests of a file of pytest; empty when there is no such file."""
    program = ROOT / "tests/e2e/guest" / f"{file}.c"
    if program.exists():
        text = program.read_text()
        run = re.findall(r"^\t+C\((\w+)\);", text, re.MULTILINE) + re.findall(r"run_check\(.*, (\w+)\);", text)
        return frozenset(re.findall(r"^static void (\w+)\(void\)", text, re.MULTILINE)) & frozenset(run)
    tests = [path.read_text() for path in (ROOT / "tests").rglob(file)]
    return frozenset(re.findall(r"def (test_\w+)\(", "".join(tests)))


def test_every_behaviour_has_its_row() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, BEHAVIOURS + 1))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_claims_that_exist_or_says_what_is_open(row: list[str]) -> None:
    assert len(row) == 4, "number, behaviour, what we do, shown by"
    named = re.findall(r"`([\w.]+)::(\w+)`", row[3])
    assert len(named) == row[3].count("`") / 2, "a claim is `file::name`"
    assert named or re.match(r"open: \w", row[3]), "a row without a claim says why"
    missing = [f"{file}::{claim}" for file, claim in named if claim not in claims(file)]
    assert not missing, f"no such claims, or never run: {missing}"


def test_a_misspelt_claim_is_noticed() -> None:
    assert "loopback_stays_native" in claims("takeover_check")
    assert "loopback_stay_native" not in claims("takeover_check")
    assert not claims("takeovr_check")
