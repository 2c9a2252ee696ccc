# SPDX-License-Identifier: BSD-3-Clause
"""The driver is told what is native, if it wants to know and there is something to tell."""

from __future__ import annotations

import pytest

from vhostsock._core import lib
from vhostsock.offload.hints import hints_of, pack_hints
from vhostsock.offload.policy_file import parse_policy

from .conftest import MakeGuest

POLICY = '[[rule]]\nmatch = { scheme = "tcp", address = "10.0.0.5" }\naction = "offload"\n'


def test_hints_come_right_behind_the_answer_to_hello(make_guest: MakeGuest) -> None:
    guest = make_guest(POLICY)
    guest.hello(features=lib.VSO_F_HINTS)
    guest.ping()
    [message] = [m for m in guest.stray if m.type == lib.VSO_HINTS]
    assert message.flow == 0
    assert message.payload == pack_hints(hints_of(parse_policy(POLICY, "policy.toml"), "guest"))


@pytest.mark.parametrize(("policy", "features"), [
    (POLICY, 0), ('default = "deny"', lib.VSO_F_HINTS), ("hints = false\n" + POLICY, lib.VSO_F_HINTS),
])  # fmt: skip
def test_no_hints_come_unasked_or_without_content(make_guest: MakeGuest, policy: str, features: int) -> None:
    guest = make_guest(policy)
    assert not guest.hello(features=features).features & lib.VSO_F_HINTS
    guest.ping()
    assert all(m.type != lib.VSO_HINTS for m in guest.stray)
