# SPDX-License-Identifier: BSD-3-Clause
"""docs/programs.md has a row for each test of tests/e2e/programs, in the words of its marker."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def markers() -> Iterator[tuple[str, str, str, str]]:
    """The arguments of each test's @pytest.mark.program."""
    for path in sorted((ROOT / "tests" / "e2e" / "programs").glob("test_*.py")):
        tree = ast.parse(path.read_text())
        words = {
            name.id: value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
            for name, value in zip(node.targets[0].elts, node.value.elts, strict=True)
            if isinstance(name, ast.Name) and isinstance(value, ast.Constant)
        } | {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.program":
                values = [words[arg.id] if isinstance(arg, ast.Name) else ast.literal_eval(arg) for arg in node.args]
                package, direction, did, checked = map(str, values)
                yield package, direction, did, checked


@pytest.mark.parametrize("row", list(markers()), ids=lambda row: f"{row[0]}, {row[1]}, {row[2][:30]}")
def test_program_is_in_the_table(row: tuple[str, str, str, str]) -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "programs.md").read_text().splitlines()]
    found = [cells for cells in rows if len(cells) == 6 and (cells[0].removeprefix("| "), *cells[2:5]) == row]
    assert found, f"run tests/e2e/programs/run: docs/programs.md has no row {row}"
    assert all(cells[5].startswith("passed: ") for cells in found)
