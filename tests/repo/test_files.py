# SPDX-License-Identifier: BSD-3-Clause
"""What every file of the repository owes: a bounded length, a licence, no trace of the machine it was written on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# first matching prefix and suffix: at most so many lines
LIMITS = [
    ("csrc/guest/", "", 700),
    ("tests/e2e/guest/", "", 700),
    ("", ".sh", 300),
    ("", "", 500),
]
CODE = {".py", ".c", ".h", ".sh"}
ELSEWHERE = re.compile(r"/(?:root|work|srv|mnt|opt/\w+|home/(?!user\b)\w+|tmp/\w+/\w+)/")  # a place that not every machine has


def tracked() -> list[Path]:
    """Files that git knows; in an unpacked source archive, every file that is no product."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    names = done.stdout.split("\0") if done.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    return sorted(p for name in names if name and (p := ROOT / name).is_file() and ".cache" not in p.relative_to(ROOT).parts)


FILES = tracked()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


def is_code(path: Path) -> bool:
    return path.suffix in CODE or text_of(path).startswith("#!")


def is_bash(path: Path) -> bool:
    return path.suffix == ".sh" or text_of(path).startswith("#!/bin/bash")


def test_the_repository_is_seen() -> None:
    assert {"setup.py", "csrc/include/vso_abi.h", "tests/run"} <= {name(p) for p in FILES}


@pytest.mark.parametrize("path", [p for p in FILES if is_code(p) or p.suffix == ".md"], ids=name)
def test_file_is_about_one_subject(path: Path) -> None:
    lines = text_of(path).count("\n")
    limit = next(n for prefix, suffix, n in LIMITS if name(path).startswith(prefix) and name(path).endswith(suffix))
    assert lines <= limit, f"{name(path)} has {lines} lines, at most {limit}: it wants to be two files"


# Python is under the library's licence as a whole (LICENSE); C is under three, so there each file says its own
@pytest.mark.parametrize("path", [p for p in FILES if is_code(p) and p.suffix != ".py"], ids=name)
def test_licence_is_said(path: Path) -> None:
    head = "\n".join(text_of(path).splitlines()[:5])
    licence = re.search(r"SPDX-License-Identifier: ([^*\n]+?)\s*(?:\*/)?$", head, re.MULTILINE)
    assert licence, f"{name(path)}: no SPDX-License-Identifier in its first lines"
    words = set(re.split(r" (?:AND|OR) ", licence[1]))
    allowed = {p.stem for p in (ROOT / "LICENSES").glob("*.txt")}
    assert words <= allowed, f"{name(path)}: {licence[1]} has no text in LICENSES/"
    if name(path).startswith("csrc/guest/"):
        assert words == {"GPL-2.0-only"}


@pytest.mark.parametrize("path", [p for p in FILES if text_of(p)], ids=name)
def test_no_path_of_the_machine_it_was_written_on(path: Path) -> None:
    if path == Path(__file__):
        return
    found = ELSEWHERE.search(text_of(path))
    assert not found, f"{name(path)}: {found[0] if found else ''}"


@pytest.mark.parametrize("path", [p for p in FILES if is_bash(p)], ids=name)
def test_script_is_valid_and_strict(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    text = text_of(path)
    if path.suffix != ".sh" and "exec " not in text.splitlines()[-1]:
        assert "set -euo pipefail" in text, f"{name(path)}: goes on after an error"


@pytest.mark.parametrize("path", [p for p in FILES if is_bash(p) and p.suffix != ".sh"], ids=name)
def test_script_explains_itself(path: Path) -> None:
    if "usage" not in text_of(path):
        assert len(text_of(path).splitlines()) < 10, f"{name(path)}: has no --help"
        return
    done = subprocess.run([str(path), "--help"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
