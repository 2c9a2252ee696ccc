# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of who gets how much works: a short slice of it. No figure is judged; both ends have counted the bytes."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import fair
from tests.bench.ends import DIRECT, OFFLOAD, RELAY, VSOCK, Failed, Tools, started
from tests.bench.machine import Steady

NAMES = (DIRECT, RELAY, OFFLOAD, VSOCK)


def test_evenness_is_one_for_equal_shares_and_one_part_when_one_has_it_all() -> None:
    assert fair.evenness([3, 3, 3, 3]) == 1
    assert fair.evenness([7, 0, 0, 0]) == 0.25
    assert fair.evenness([1, 2, 3]) == pytest.approx(36 / 42)


def test_the_interval_of_a_median_narrows_with_more_values_and_holds_it() -> None:
    few, many = fair.middle(range(10)), fair.middle(range(1000))
    assert few == (1, 8)  # binomial(10, 1/2): 2 to 8 of them lie below with 0.98, as a table of the sign test has it
    assert many == (469, 530)
    assert fair.middle([5.0]) == (5.0, 5.0)


@pytest.mark.foreign
def test_questions_beside_bulk_and_back_ends_side_by_side_and_a_stuck_flow_are_measured(tmp_path: Path) -> None:
    for part in fair.ROWS:
        (tmp_path / part).mkdir()
    tools = Tools.built(tmp_path)
    found = {
        "bulk": fair.beside_bulk(tmp_path / "bulk", NAMES, (1, 8), 1, 0.01, tools, Steady(tries=1)),
        "side": fair.side_by_side(tmp_path / "side", (RELAY, OFFLOAD), 2, 1, 0.01, tools, Steady(tries=1)),
        "stuck": fair.beside_stuck(tmp_path / "stuck", (DIRECT, OFFLOAD), 1, 2, 1 << 20, tools),
    }
    for part, figures in found.items():
        assert figures.keys() <= fair.ROWS[part].keys()
        for key, values in figures.items():  # one of two may have moved nothing yet when the other was through
            assert all(value > 0 or key.endswith("-least") for each in values.values() for value in each)
    assert set(found["bulk"]["to-guest-8-even"]) == set(NAMES)
    assert set(found["side"]["ask-all-p99"]) == set(found["side"]["memory-pss"]) == {RELAY, OFFLOAD}
    assert set(found["stuck"]["stuck-to-guest"]) == {DIRECT, OFFLOAD}
    assert set(found["stuck"]["stuck-to-host-cpu"]) == {OFFLOAD}
    assert len([line for line in fair.tables(found, 2) if line.startswith("| ...")]) > 20
    assert len(ElementTree.fromstring(fair.chart(found, 2)).findall("{*}rect")) > 100


@pytest.mark.foreign
def test_bytes_of_a_mix_that_do_not_arrive_fail_it(tmp_path: Path) -> None:
    """Else every figure could be one of nothing."""
    with started(tmp_path, (DIRECT, OFFLOAD), 2) as nears:
        for kind, near in nears.items():
            near.connect(0, 1)
            near.far = near.far._replace(serve=near.far.close)  # where what is accepted is closed
            near.connect(1, 1)
            with pytest.raises(Failed, match=kind):
                near.mix(near.over(), flows=range(1, 2), to_host=False, amount=1 << 20)
