# SPDX-License-Identifier: BSD-3-Clause
"""Builds the C parts of the benchmarks where they are needed, and loads them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from cffi import FFI

__all__ = ["built", "loaded"]

HERE = Path(__file__).resolve().parent
CORE = HERE.parents[1] / "csrc" / "core"
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CORE}", f"-I{HERE}"]


def built(folder: Path, name: str, *sources: Path, shared: bool = False) -> Path:
    """Compile ``sources`` into the program (or shared object) ``name`` in ``folder``."""
    target = folder / name
    flags = [*FLAGS, "-shared", "-fPIC"] if shared else FLAGS
    subprocess.run([os.environ.get("CC", "cc"), *flags, *map(str, sources), "-o", str(target)], check=True, timeout=100)
    return target


def loaded(folder: Path, name: str, prelude: str = "") -> tuple[FFI, Any]:
    """tests/bench/NAME.c as a library, with what NAME.h declares between its cdef marks."""
    header = (HERE / f"{name}.h").read_text()
    ffi = FFI()
    ffi.cdef(prelude + "".join(re.findall(r"/\* cdef begin \*/(.*?)/\* cdef end \*/", header, re.DOTALL)))
    return ffi, ffi.dlopen(str(built(folder, f"{name}.so", HERE / f"{name}.c", shared=True)))
