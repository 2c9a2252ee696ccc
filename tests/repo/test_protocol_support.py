# SPDX-License-Identifier: BSD-3-Clause
"""docs/protocol-support.md says what the code does."""

from __future__ import annotations

import re

import pytest

from tests.data.protocol_support import BACKEND_MESSAGES, FACTS, FRONTEND, PAGE, QEMU, ROOT, SESSION, WHY_NOT, page, traces_with
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


def test_a_message_is_said_to_be_proven_with_what_there_is() -> None:
    session = "".join(path.read_text() for path in (ROOT / "tests/protocol").glob("*.py"))
    for name in SESSION:
        assert re.search(rf"\b(R|Request)\.{name}\b", session), f"{name} is not in tests/protocol"
    places = [*(ROOT / "vhostsock/testing").glob("*.py"), *(ROOT / "tests/device").glob("*.py")]
    frontend = "".join(path.read_text() for path in places)
    for name in FRONTEND:
        assert re.search(rf"Request\.{name}\b", frontend), f"{name} is sent by no front-end in tests/device"
    for name in {*SESSION, *FRONTEND, *(name for names in QEMU.values() for name in names)}:
        assert Request[name] in messages.TABLE


def test_every_message_that_is_served_is_proven_with_something() -> None:
    for row in messages.TABLE.values():
        name = row.request.name
        assert name in SESSION or name in FRONTEND or traces_with(name), f"{name} is served, and tested by nothing"


def test_what_is_not_served_has_a_reason() -> None:
    explained = {word.strip() for what in WHY_NOT for word in what.split(",")}
    offered_somehow = {name for table in ("Protocol features", "Ring features")
                       for name, row in rows_of(PAGE.read_text(), table).items() if row[2] not in ("no", "never")}  # fmt: skip
    missing = {request.name for request in Request if request not in messages.TABLE}
    missing |= set(BACKEND_MESSAGES.values()) - set(wire.BackendRequest.__members__)
    missing |= {*ProtocolFeature.__members__, *VirtioFeature.__members__} - offered_somehow
    assert missing == explained


def test_facts_are_about_bits_that_have_a_row() -> None:
    assert all(bit in type(bit) and (bit.name or "") in type(bit).__members__ for bit in FACTS)
