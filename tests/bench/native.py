# SPDX-License-Identifier: BSD-3-Clause
"""Builds the C parts of the benchmarks where they are needed, and loads them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cffi import FFI

__all__ = ["built", "declared", "loaded"]

HERE = Path(__file__).resolve().parent
CORE = HERE.parents[1] / "csrc" / "core"
INCLUDE = HERE.parents[1] / "csrc" / "include"
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
FLAGS += [f"-I{folder}" for folder in (CORE, INCLUDE, HERE)]


def built(folder: Path, name: str, *sources: Path, shared: bool = False, more: Sequence[str] = ()) -> Path:
    """Compile ``sources`` into the program (or shared object) ``name`` in ``folder``, with ``more`` for the compiler."""
    target = folder / name
    flags = [*FLAGS, *more, *(["-shared", "-fPIC"] if shared else [])]
    subprocess.run([os.environ.get("CC", "cc"), *flags, *map(str, sources), "-o", str(target)], check=True, timeout=100)
    return target


def declared(name: str) -> str:
    """What NAME.h declares between its cdef marks."""
    return "".join(re.findall(r"/\* cdef begin \*/(.*?)/\* cdef end \*/", (HERE / f"{name}.h").read_text(), re.DOTALL))


def loaded(folder: Path, name: str, prelude: str = "", *more: str) -> tuple[FFI, Any]:
    """tests/bench/NAME.c, with the files ``more`` as NAME, as a library, with what NAME.h declares between its cdef marks."""
    ffi = FFI()
    ffi.cdef(prelude + declared(name))
    sources = [HERE / f"{each}.c" for each in (name, *more)]
    return ffi, ffi.dlopen(str(built(folder, f"{name}.so", *sources, shared=True)))
