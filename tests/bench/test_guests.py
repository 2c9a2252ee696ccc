# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of guests side by side and of flows beside a stuck one works: a short slice of it. No figure is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import guests
from tests.bench.machine import Steady


@pytest.mark.foreign  # the paths are compared on the newest QEMU
@pytest.mark.timeout(1200)  # it may be the first to need it, a kernel and the module
def test_guests_side_by_side_and_flows_beside_a_stuck_one_are_measured(tmp_path: Path) -> None:
    for part in guests.PARTS:
        (tmp_path / part).mkdir()
    found = {
        "side": guests.side_by_side(tmp_path / "side", ("offload-generic",), 2, 1, 20, Steady(tries=1)),
        "stuck": guests.beside_stuck(tmp_path / "stuck", ("offload-generic", "vsock"), 1, 2, 1),
    }
    for part, figures in found.items():
        assert figures.keys() == guests.PARTS[part].keys()
        assert all(value > 0 for values in figures.values() for each in values.values() for value in each)
    assert len(found["side"]["memory-rss"]["offload-generic"]) == 2
    assert all(set(values) == {"offload-generic", "vsock"} for values in found["stuck"].values())
    lines = guests.tables(found, 2)
    assert len(lines) == len(guests.PARTS["side"]) + len(guests.PARTS["stuck"]) + 5
