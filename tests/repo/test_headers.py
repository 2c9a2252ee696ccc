# SPDX-License-Identifier: BSD-3-Clause
"""The C headers stand alone, and C, Python and the kernel agree on the sizes they declare."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from vhostsock._core import ffi

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HEADERS = sorted(p for d in ("include", "core", "engine") for p in (CSRC / d).glob("*.h"))
ABIS = {"vso_abi.h": "VSO_CHECK", "vsock_abi.h": "_Static_assert"}  # and how each asserts its sizes
abis = pytest.mark.parametrize("abi", ABIS)


def compile_c(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    includes = [f"-I{CSRC / d}" for d in ("", "include", "core", "engine")]
    return subprocess.run(
        ["gcc", "-Wall", "-Wextra", "-Werror", *includes, *options, "-fsyntax-only", "-x", "c", "-"],
        input=text, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def abi_structs(abi: str) -> list[str]:
    return re.findall(r"^struct (\w+) \{", (CSRC / "include" / abi).read_text(), re.MULTILINE)


@pytest.mark.parametrize("header", HEADERS, ids=lambda p: p.name)
@pytest.mark.parametrize("standard", ["gnu11", "gnu17"])
def test_header_compiles_alone(header: Path, standard: str) -> None:
    done = compile_c(f'#include "{header}"\n#include "{header}"\n', f"-std={standard}")
    assert done.returncode == 0, done.stderr


@abis
def test_c_and_python_agree_on_every_wire_struct(abi: str) -> None:
    structs = abi_structs(abi)
    assert structs
    checks = "".join(f'_Static_assert(sizeof(struct {n}) == {ffi.sizeof(f"struct {n}")}, "{n}");\n' for n in structs)
    done = compile_c(f'#include "{abi}"\n{checks}')
    assert done.returncode == 0, done.stderr


@abis
def test_every_wire_struct_is_asserted_in_the_header_itself(abi: str) -> None:
    asserted = set(re.findall(rf"{ABIS[abi]}\(sizeof\(struct (\w+)\)", (CSRC / "include" / abi).read_text()))
    assert asserted == set(abi_structs(abi))


@abis
def test_wire_structs_hold_no_hidden_padding(abi: str) -> None:
    done = compile_c(f'#include "{abi}"\n', "-Wpadded")
    assert done.returncode == 0, done.stderr
