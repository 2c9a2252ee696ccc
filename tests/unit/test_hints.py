# SPDX-License-Identifier: BSD-3-Clause
"""What the driver is told beforehand never says more than the policy."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from vhostsock._core import ffi, lib
from vhostsock.errors import PolicyError
from vhostsock.offload.covers import ALL, SCHEMES, Cover
from vhostsock.offload.hints import Hint, hints_of, pack_hints
from vhostsock.offload.policy import INITIAL, Guest, Policy
from vhostsock.offload.policy_file import parse_policy
from vhostsock.offload.uri import InetURI

REST = Hint(ALL, native=True)


def of(text: str, device: str = "vm1") -> tuple[Hint, ...]:
    return hints_of(parse_policy(text, "policy.toml"), device)


def rule(match: str, action: str = "native") -> str:
    return f"[[rule]]\nmatch = {{ {match} }}\naction = \"{action}\"\n"


def number_of(asked: InetURI) -> int:
    """Its address as covers count."""
    return int(asked.plain) + (0xFFFF << 32 if asked.plain.version == 4 else 0)


def verdict(hints: tuple[Hint, ...], asked: InetURI) -> str:
    """As the driver does it (csrc/guest/hints.c)."""
    for hint in hints:
        cover = hint.cover
        if cover.schemes & SCHEMES[asked.scheme] and number_of(asked) in cover.addresses and asked.port in cover.ports:
            return "native" if hint.native else "ask"
    return "ask"


def test_the_closed_policy_is_one_hint() -> None:
    assert hints_of(Policy(), "vm1") == (REST,)


def test_what_is_offloaded_before_is_asked_about() -> None:
    [first, rest] = of(rule('scheme = "tcp", address = "10.0.0.5", port = 5432', "offload"))
    address = 0xFFFF0A000005
    assert first == Hint(Cover(lib.VSO_HINT_TCP, range(address, address + 1), range(5432, 5433)), native=False)
    assert rest == REST


def test_a_default_that_denies_is_asked_about() -> None:
    assert of('default = "deny"\n' + rule('address = "10.0.0.0/8"') + rule('port = 80', "offload")) == (
        Hint(Cover(5, range(0xFFFF0A000000, 0xFFFF0B000000), range(65536)), native=True),
    )


@pytest.mark.parametrize(("match", "native"), [
    ('uid = 0', False), ('device = "vm1"', True), ('device = "other"', None), ('netns = "shop"', None), ('netns = "*"', True),
    ('scheme = "icmp"', None),
])  # fmt: skip
def test_whom_a_rule_is_for(match: str, native: bool | None) -> None:
    hints = of('default = "deny"\n' + rule(match) + rule('address = "::/0"'))
    assert [hint.native for hint in hints[:-1]] == ([] if native is None else [native])


def test_a_policy_may_want_to_be_asked() -> None:
    assert of("hints = false\n" + rule('address = "10.0.0.0/8"')) == ()
    assert of('[hairpin]\nnetns = "init"\n') == ()


def test_a_table_that_is_too_long_is_cut_and_the_rest_is_asked_about() -> None:
    many = "".join(rule(f'address = "10.0.0.0/8", port = {port}') for port in range(1, 100))
    hints = of(many)
    assert len(hints) == lib.VSO_HINTS_MAX
    assert verdict(hints, InetURI("tcp", IPv4Address("10.0.0.1"), 99)) == "ask"


def test_the_wire_has_the_bounds_themselves() -> None:
    hint = Hint(Cover(5, range(0xFFFF0A000000, 0xFFFF0B000000), range(80, 90)), native=True)
    packed = ffi.from_buffer("struct vso_hint *", pack_hints([hint]))
    assert bytes(packed.first) == IPv6Address("::ffff:10.0.0.0").packed
    assert bytes(packed.last) == IPv6Address("::ffff:10.255.255.255").packed
    assert (packed.port_first, packed.port_last, packed.schemes, packed.verdict) == (80, 89, 5, lib.VSO_HINT_NATIVE)


ADDRESSES = ["10.0.0.0/8", "10.0.0.5", "10.0.0.4-10.0.0.9", "fd00::/8", "fd00::5", "127.0.0.1", "::1"]
CONDITIONS = {
    "scheme": ["tcp", "udp", "tcp6", "udp6", "icmp"], "address": ADDRESSES, "device": ["vm1", "vm2", "vm*"],
    "netns": [INITIAL, "shop", "*"],
}  # fmt: skip
RULES = st.builds(
    lambda match, port, uid, action: rule(", ".join([f'{k} = "{v}"' for k, v in match.items()] + port + uid), action),
    st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in CONDITIONS.items()}),
    st.sampled_from([[], ["port = 80"], ['port = "80-90"']]), st.sampled_from([[], ["uid = 0"]]),
    st.sampled_from(["native", "offload", "deny"]),
)  # fmt: skip
ASKED = st.builds(
    InetURI, st.sampled_from(["tcp", "udp"]),
    st.sampled_from([IPv4Address(a) for a in ("10.0.0.5", "10.0.0.6", "10.9.9.9", "127.0.0.1", "192.0.2.1")]
                    + [IPv6Address(a) for a in ("fd00::5", "::1", "2001:db8::1")]),
    st.sampled_from([1, 80, 85, 443]),
)  # fmt: skip


@given(st.lists(RULES, max_size=5), st.sampled_from(["native", "deny"]), ASKED, st.integers(0, 1))
def test_what_a_hint_calls_native_the_policy_does(rules: list[str], default: str, asked: InetURI, uid: int) -> None:
    try:
        policy = parse_policy(f'default = "{default}"\n' + "".join(rules), "policy.toml")
    except PolicyError:  # a rule that cannot match: IPv4 over tcp6
        reject()
    decided = policy.decide(asked, Guest("vm1", uid)).action
    hinted = verdict(hints_of(policy, "vm1"), asked)
    assert hinted == "ask" or decided == "native"
    if decided == "native" and not any("uid" in text or "offload" in text for text in rules):
        assert hinted == "native"
