# SPDX-License-Identifier: BSD-3-Clause
"""The outcome of a probe: lines for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .check import Check, Result, Verdict

__all__ = ["as_json", "line_of", "listing", "summary"]

EVIDENCE = 24  # lines at the end of a transcript that a report shows


def listing(checks: Sequence[Check]) -> list[str]:
    """What each check claims, and what the claim rests on."""
    lines = []
    for check in checks:
        lines += [f"{check.name}{'  (hostile)' if check.hostile else ''}", f"    {check.text}", f"    [{check.clause}]"]
    return lines


def line_of(result: Result, *, verbose: bool = False) -> list[str]:
    """A result: one line, and for a bad one its reason and the evidence."""
    lines = [f"{result.verdict.value:<5} {result.check.name}"]
    if result.detail:
        lines.append(f"      {result.detail}")
    if result.verdict.bad or verbose:
        lines += [f"      | {line}" for line in result.evidence[-EVIDENCE:]]
    if result.verdict.bad:
        lines.append(f"      it rests on: {result.check.clause}")
    return lines


def summary(results: Sequence[Result]) -> str:
    counts = {verdict: sum(result.verdict is verdict for result in results) for verdict in Verdict}
    return ", ".join(f"{count} {verdict.value.lower()}" for verdict, count in counts.items() if count)


def as_json(results: Sequence[Result], offer: Sequence[str]) -> str:
    """One object: what is offered, and each result with its whole transcript."""
    rows = [
        {
            "check": result.check.name,
            "clause": result.check.clause,
            "hostile": result.check.hostile,
            "verdict": result.verdict.name.lower(),
            "detail": result.detail,
            "evidence": result.evidence,
        }
        for result in results
    ]
    return json.dumps({"offer": list(offer), "results": rows}, indent=1)
