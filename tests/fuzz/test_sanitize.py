# SPDX-License-Identifier: BSD-3-Clause
"""A slice of tests/sanitize, and that its report tells a leak of ours from one of Python's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.sanitize_report import is_news, records

ROOT = Path(__file__).resolve().parents[2]

REPORT = """
=================================================================
==7==ERROR: LeakSanitizer: detected memory leaks

Direct leak of 96 byte(s) in 1 object(s) allocated from:
    #0 0x7f in calloc ../libsanitizer/asan/asan_malloc_linux.cpp:154
    #1 0x7f in vs_chain_new csrc/core/vs_chain.c:20
    #2 0x7f in _cffi_f_vs_chain_new build/vhostsock._core.c:1200
    #3 0x55 in PyObject_Vectorcall (/usr/bin/python3.11+0x1)

Direct leak of 512 byte(s) in 1 object(s) allocated from:
    #0 0x7f in malloc ../libsanitizer/asan/asan_malloc_linux.cpp:145
    #1 0x55 in PyMem_RawMalloc (/usr/bin/python3.11+0x2)
    #2 0x55 in PyInit__core build/vhostsock._core.c:9
    #3 0x7f in _cffi_f_vs_vq_pop build/vhostsock._core.c:1300

SUMMARY: AddressSanitizer: 608 byte(s) leaked in 2 allocation(s).
csrc/core/vs_split.c:10:3: runtime error: left shift of negative value -1
"""


def test_a_leak_counts_where_our_c_made_the_allocation() -> None:
    assert [is_news(record) for record in records(REPORT)] == [False, True, False, True]


@pytest.mark.long
def test_a_slice_of_the_tests_passes_under_sanitizers() -> None:
    slice_of = ["tests/ring/test_hostile.py", "tests/ring/test_lifetime.py", "tests/ring/test_sigbus.py", "tests/adversity",
                "tests/device/test_dataplane.py", "tests/engine/test_hostile.py", "tests/engine/test_listen.py"]  # fmt: skip
    done = subprocess.run([ROOT / "tests/sanitize", *slice_of], capture_output=True, text=True, timeout=115, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sanitizers: 0 findings" in done.stdout
