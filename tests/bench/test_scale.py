# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of many flows works: a short slice of it. No figure is judged; both ends have counted the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.ends import OFFLOAD, RELAY, VSOCK
from tests.bench.machine import Steady
from tests.bench.scale import ROWS, all_of_it, pairs, pairs_table, table


@pytest.mark.foreign
def test_many_flows_and_one_that_is_stuck_are_measured(tmp_path: Path) -> None:
    names = (RELAY, OFFLOAD, VSOCK)
    found = all_of_it(tmp_path, names, Steady(tries=1), connections=300, flows=40, rounds=1, amount=8 << 20, seconds=0.01)
    assert "failed" not in found
    assert {key: set(values) for key, values in found.items()} == {
        key: {OFFLOAD, VSOCK} if key.startswith("idle") else set(names) for key in ROWS
    }
    for name in names:
        assert found["stuck-taken"][name][0] > 1 << 16
        assert found["busy-to-host"][name][0] > 0
    assert len(table(found, names, 300, 40)) == 2 + len(ROWS)


@pytest.mark.foreign
def test_two_ring_pairs_are_measured_beside_one(tmp_path: Path) -> None:
    found = pairs(tmp_path, 1, 8 << 20, Steady(tries=1))
    assert all(figure > 0 for columns in found.values() for [figure] in columns.values())
    assert len(pairs_table(found)) == 2 + 2
