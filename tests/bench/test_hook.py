# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of the hook works: a short slice of it. No figure is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.hook import CALLS, WITH, WITHOUT, measured, table


@pytest.mark.e2e
@pytest.mark.timeout(1200)  # it may be the first to need a kernel and the module
def test_calls_are_timed_in_a_guest_with_the_module_and_in_one_without(tmp_path: Path) -> None:
    found = measured(tmp_path, 2, 20)
    assert found.keys() == {(guest, call) for guest in (WITH, WITHOUT) for call in CALLS}
    assert all(len(values) == 2 and min(values) > 0 for values in found.values())
    assert len(table(found)) == 2 + len(CALLS)
