# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of paths from a guest works: a short slice of it. No figure is judged."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.guest import COPY_FROM, COPY_TO, INSIDE, IPERF, MEASURES, ROWS, UDP, measured, panels, ratios, tables
from tests.bench.machine import Steady
from tests.bench.paths import PATHS
from tests.bench.plot import drawn
from tests.netns import may_make_namespaces

CHOSEN = [key for key in MEASURES if key not in ("many", "iperf-in", "iperf-8")]
"""Without what takes a second and more each time and is like another."""
SOME = {by: [row for key in CHOSEN if MEASURES[key].by == by for row in MEASURES[key].figures] for by in (UDP, IPERF)}
"""Rows that not every path has."""
NOT_EVERYWHERE = (COPY_FROM, COPY_TO, *chain(*SOME.values()), "iperf")
EVERYWHERE = [row for row in ROWS if row != "many" and not row.endswith("-backend") and not row.startswith(NOT_EVERYWHERE)]


@pytest.mark.foreign  # one QEMU for all paths that are compared, and that is the newest
@pytest.mark.timeout(1200)  # it may be the first to need it, a kernel and the module
def test_paths_from_a_guest_are_measured_in_turns_and_compared(tmp_path: Path) -> None:
    names = [name for name in PATHS if name != "offload-fs" and (name != "tap" or may_make_namespaces())]
    found = measured(tmp_path, names, 1, 10, CHOSEN, Steady(tries=1))
    assert found.figures.keys() == {*names, INSIDE}
    assert all(rows.keys() >= set(EVERYWHERE) for name, rows in found.figures.items() if name != INSIDE)
    # a machine may be so busy that no datagram comes, and that nothing does in the one second of iperf3
    streams = [key for key in CHOSEN if MEASURES[key].by not in SOME]
    assert all(value > 0 for rows in found.figures.values() for key, [value] in rows.items() if key in streams)
    for rows in SOME.values():
        carry = {name for name, figures in found.figures.items() if figures.keys() & set(rows)}
        assert carry == set(names) - {"vsock", "vhost-device-vsock"}
        assert all(found.figures[name].keys() >= set(rows) for name in carry)
    assert {name for name, rows in found.figures.items() if rows.keys() >= {COPY_FROM, COPY_TO}} == {"offload-generic", "vsock"}
    assert ratios(found, "offload-generic", "out64") is not None
    assert len(tables(found)) > 20
    drawing = ElementTree.fromstring(drawn(panels(found)))
    assert sum(each.text == PATHS["slirp"].title for each in drawing.iter("{http://www.w3.org/2000/svg}text")) > len(streams)
