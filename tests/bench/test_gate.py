# SPDX-License-Identifier: BSD-3-Clause
"""The engine costs no more than the baseline says; and the gate that judges it can fail."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.bench.gate import BASELINE, Costs, judged, renewed, table

ROOT = Path(__file__).resolve().parents[2]
STORED = json.loads(BASELINE.read_text())
MADE = STORED["made by"]
ROW = "in, bulk"
PLANTED = """
#include <unistd.h>
static ssize_t two_calls(int fd, struct msghdr *msg, int flags)
{
	return getppid() < 0 ? -1 : recvmsg(fd, msg, flags);
}
#define recvmsg two_calls
"""


def worse(kind: str, percent: float) -> Costs:
    rows: Costs = copy.deepcopy(STORED["rows"])
    rows[ROW][kind] *= 1 + percent / 100
    return rows


def test_the_baseline_passes_itself() -> None:
    assert judged(STORED, MADE, STORED["rows"]) == ([], [])
    assert len(table(STORED["rows"])) == 2 + len(STORED["rows"])


@pytest.mark.parametrize("kind", ["instructions", "system calls"])
def test_more_than_the_tolerance_fails_with_the_row_and_both_figures(kind: str) -> None:
    allowed = STORED["tolerance, percent"][kind]
    assert judged(STORED, MADE, worse(kind, allowed - 0.1)) == ([], [])
    [failure] = judged(STORED, MADE, worse(kind, allowed + 0.1)).failures
    was = STORED["rows"][ROW][kind]
    for part in (ROW, kind, f"was {was:.2f}", f"is {was * (1 + (allowed + 0.1) / 100):.2f}", f"+{allowed + 0.1:.1f} %"):
        assert part in failure


def test_what_became_cheaper_is_told_and_no_failure() -> None:
    failures, [note] = judged(STORED, MADE, worse("system calls", -10))
    assert not failures
    assert "-10.0 %: renew" in note


def test_another_compiler_leaves_the_system_calls_to_be_judged() -> None:
    failures, [note] = judged(STORED, "x86_64, gcc 99, glibc 2.36", worse("instructions", 50))
    assert not failures
    assert "gcc 99" in note
    assert MADE in note
    assert judged(STORED, "x86_64, gcc 99, glibc 2.36", worse("system calls", 50)).failures


def test_a_row_that_is_missing_on_either_side_fails() -> None:
    rows = {name: cost for name, cost in STORED["rows"].items() if name != ROW}
    assert judged(STORED, MADE, rows).failures == [f"{ROW}: the workload has no such row"]
    assert judged(STORED | {"rows": rows}, MADE, STORED["rows"]).failures == [f"{ROW}: the baseline has no such row"]


def test_a_renewed_baseline_holds_what_was_counted_and_why(tmp_path: Path) -> None:
    renewed(tmp_path / "gate.json", dict(STORED), MADE, worse("instructions", 50), "it does more now")
    stored = json.loads((tmp_path / "gate.json").read_text())
    assert stored["renewed because"] == "it does more now"
    assert judged(stored, MADE, worse("instructions", 50)) == ([], [])


@pytest.mark.long
@pytest.mark.timeout(600)  # it may be the first to need valgrind
def test_the_engine_costs_no_more_than_the_baseline_and_one_that_does_is_found(tmp_path: Path) -> None:
    def gate(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([ROOT / "tests/bench/run", "gate", "--work", str(tmp_path / "work"), *arguments],
                              capture_output=True, text=True, timeout=290, check=False)  # fmt: skip

    done = gate()
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/engine/vs_stream.c"
    head, priv, body = source.read_text().partition('#include "vse_priv.h"\n')
    assert "recvmsg(" in body, "the engine reads elsewhere now: plant the call there"
    source.write_text(head + priv + PLANTED + body)
    done = gate("--csrc", str(tmp_path / "csrc"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{ROW}: system calls for a MiB: was" in done.stdout
    assert ", getppid +" in done.stdout
    assert "tests/bench/run gate --renew" in done.stdout
