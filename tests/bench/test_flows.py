# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of flows works: a short slice of it. No figure is judged; that every byte arrived, both ends have counted."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.ends import DIRECT, DIRECT_UNIX, OFFLOAD, OTHER_VSOCK, RELAY, VSOCK, Failed, started
from tests.bench.flows import MEASURES, chart, measured, tables
from tests.bench.machine import Steady

KINDS = [DIRECT, RELAY, OFFLOAD, DIRECT_UNIX, VSOCK, OTHER_VSOCK]


@pytest.mark.foreign
def test_every_kind_of_flow_is_measured_in_every_way(tmp_path: Path) -> None:
    result = measured(tmp_path, KINDS, list(MEASURES), 1, 0.001, Steady(tries=1), pace=0)
    assert result.figures.keys() == {(key, name) for key in MEASURES for name in KINDS}
    assert all(figure > 0 for [figure] in result.figures.values())
    between = [name for name in KINDS if name not in (DIRECT, DIRECT_UNIX)]
    assert result.cpu.keys() == {(key, name) for key, measure in MEASURES.items() if measure.moves for name in between}
    assert all(cpu > 0 for [cpu] in result.cpu.values())
    assert all(result.memory[name]["VmHWM"] >= result.memory[name]["RssAnon"] > 0 for name in between)
    picture = ElementTree.fromstring(chart(result))
    assert len(picture.findall("{*}rect")) == 1 + len(result.figures) + len(result.cpu)
    assert len([line for line in tables(result) if line.startswith("| 1 flow to the host, 64")]) == 2


def test_bytes_that_do_not_arrive_fail_the_job(tmp_path: Path) -> None:
    """Else every figure could be one of nothing."""
    with started(tmp_path, (DIRECT, RELAY, OFFLOAD, VSOCK), 2) as nears:
        for kind, near in nears.items():
            near.connect(0, 1)
            assert near.receive(0, 1, 1 << 20, 1 << 16) > 0
            assert near.send(0, 1, 1 << 20, 1 << 10) > 0
            near.far = near.far._replace(serve=near.far.close)  # where what is accepted is closed
            near.connect(1, 1)
            with pytest.raises(Failed, match=kind):
                near.receive(1, 1, 1 << 20, 1 << 16)
