# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of the rings works: a short slice of it. No figure is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.ring import DEPTHS, core, core_table, peer_table, peers, rates

pytestmark = pytest.mark.long


def test_core_does_chains_in_every_configuration(tmp_path: Path) -> None:
    found = core(tmp_path, 1, 0.1)
    assert len(found) == 2 * 2 * 3 * 2
    assert all(rate > 0 for [rate] in found.values())
    assert len(core_table(found)) == 2 + 12


def test_driver_and_null_disks_do_requests_at_every_depth(tmp_path: Path) -> None:
    chosen = [peer._replace(base=peer.name) for peer in peers(Path("unused")) if "null disk" in peer.name]
    assert len(chosen) == 4
    found = rates(tmp_path, chosen, 1, 0.01)
    assert found.keys() == {(peer.name, depth) for peer in chosen for depth in DEPTHS}
    assert len(peer_table(chosen, found)) == 2 + 4 * len(DEPTHS)
