# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of paths from a guest works: a short slice of it. No figure is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.guest import INSIDE, MEASURES, ROWS, measured, ratios, tables

ALL_BUT_MANY = [key for key in MEASURES if key != "many"]


@pytest.mark.foreign  # one QEMU for all paths that are compared, and that is the newest
@pytest.mark.timeout(1200)  # it may be the first to need it, a kernel and the module
def test_paths_from_a_guest_are_measured_in_turns_and_compared(tmp_path: Path) -> None:
    found = measured(tmp_path, ["offload-generic", "slirp"], 1, 10, ALL_BUT_MANY)
    assert found.figures.keys() == {"offload-generic", "slirp", INSIDE}
    assert found.figures["offload-generic"].keys() >= ROWS.keys() - {"many"}
    assert all(value > 0 for path in found.figures.values() for key, [value] in path.items() if key in ALL_BUT_MANY)
    assert ratios(found, "offload-generic", "out64") is not None
    assert len(tables(found)) > 20
