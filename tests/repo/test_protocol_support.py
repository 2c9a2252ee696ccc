# SPDX-License-Identifier: BSD-3-Clause
"""docs/protocol-support.md says what the code does."""

from __future__ import annotations

import re

import pytest

from tests.data.protocol_support import BACKEND_MESSAGES, FACTS, PAGE, page
from vhostsock.devices.rng import Rng
from vhostsock.offers import session_config
from vhostsock.proto import ProtocolFeature, Request, VirtioFeature, messages, wire


def rows_of(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading, by their second cell."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*\|$", section, re.MULTILINE)]
    return {row[1]: row for row in cells[2:]}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "docs/protocol-support.md is stale: run  python -m tests.data.protocol_support"


def test_a_message_that_is_no_longer_served_makes_the_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(messages.TABLE, Request.GET_CONFIG)
    assert page() != PAGE.read_text()


def test_every_message_and_bit_has_a_row() -> None:
    text = PAGE.read_text()
    assert rows_of(text, "Messages of the front-end").keys() == set(Request.__members__)
    assert rows_of(text, "Protocol features").keys() == set(ProtocolFeature.__members__)
    assert rows_of(text, "Ring features").keys() == set(VirtioFeature.__members__)
    assert all(BACKEND_MESSAGES[request] == request.name for request in wire.BackendRequest)


ATTRIBUTES = ("packed", "in_order", "inflight", "migratable")


@pytest.mark.parametrize("attribute", [None, *ATTRIBUTES])
def test_what_the_page_says_is_what_a_device_offers(attribute: str | None) -> None:
    device, words = Rng(), {"always"}
    for name in ATTRIBUTES:
        setattr(device, name, name == attribute)
    if attribute:
        words.add(f"for `{attribute} = True`")
    text, config = PAGE.read_text(), session_config(device)
    for heading, kind, offered in (
        ("Protocol features", ProtocolFeature, config.protocol_features),
        ("Ring features", VirtioFeature, config.features),
    ):
        said = {name for name, row in rows_of(text, heading).items() if row[2] in words}
        assert said == {bit.name for bit in kind if bit & offered}


def test_facts_are_about_bits_that_have_a_row() -> None:
    assert all(bit in type(bit) and (bit.name or "") in type(bit).__members__ for bit in FACTS)
