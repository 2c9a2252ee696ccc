# SPDX-License-Identifier: BSD-3-Clause
"""What the engine connects without asking is what the policy would have had connected."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from vhostsock._core import ffi, lib
from vhostsock.errors import PolicyError
from vhostsock.offload.covers import SCHEMES
from vhostsock.offload.policy import Guest, Policy
from vhostsock.offload.policy_file import parse_policy
from vhostsock.offload.routes import Route, pack_routes, routes_of
from vhostsock.offload.uri import InetURI

from .test_hints import ASKED, CONDITIONS, number_of, rule

TARGETS = [
    'rewrite = "tcp://127.0.0.1:5432"', 'rewrite = "tcp6://::1/80"', 'rewrite = "unix:///run/{name}.sock"',
    'rewrite = "tcp://{address}:81"', 'handler = "other"', "",
]  # fmt: skip


def of(text: str, device: str = "vm1") -> tuple[Route, ...]:
    return routes_of(parse_policy(text, "policy.toml"), device)


def found(routes: tuple[Route, ...], asked: InetURI) -> Route | None:
    """As the engine looks it up."""
    for route in routes:
        cover = route.cover
        if cover.schemes & SCHEMES[asked.scheme] and number_of(asked) in cover.addresses and asked.port in cover.ports:
            return route
    return None


def offload(match: str, target: str = "") -> str:
    return rule(match, "offload") + target + "\n"


@pytest.mark.parametrize(("text", "dials"), [
    (offload('scheme = "tcp", address = "10.0.0.5"'), True),
    (offload('scheme = "tcp", address = "10.0.0.5"', 'rewrite = "tcp://127.0.0.1:80"'), True),
    (offload('scheme = "tcp", address = "10.0.0.5"', 'rewrite = "tcp6://::1/80"'), False),  # another family: a made-up name
    (offload('scheme = "tcp", address = "10.0.0.5"', 'rewrite = "tcp://{address}:81"'), False),
    (offload('scheme = "tcp", address = "10.0.0.5"', 'rewrite = "unix:///run/{name}.sock"\nhandler = "unix"'), False),
    (offload('scheme = "tcp", address = "10.0.0.5", uid = 0'), False),
    (offload('scheme = "tcp", address = "10.0.0.5", device = "vm2"'), False),
    (offload('scheme = "udp", address = "10.0.0.5"'), False),
    (rule('address = "10.0.0.0/24"', "deny") + offload('scheme = "tcp"'), False),
    (offload('scheme = "tcp"'), True),
])  # fmt: skip
def test_what_is_dialed(text: str, dials: bool) -> None:
    route = found(of(text), InetURI("tcp", IPv4Address("10.0.0.5"), 80))
    assert (route is not None and route.dial) == dials


def test_a_special_range_that_no_rule_names_is_asked_about() -> None:
    routes = of(offload('scheme = "tcp"'))
    for address in (IPv4Address("127.0.0.1"), IPv4Address("169.254.169.254"), IPv6Address("::1")):
        route = found(routes, InetURI("tcp", address, 80))
        assert route
        assert not route.dial


def test_the_engine_gets_the_target_and_the_rule() -> None:
    text = rule('address = "10.0.0.9"') + offload('scheme = "tcp", address = "10.0.0.5"', 'rewrite = "tcp://127.0.0.1:5432"')
    packed: Any = pack_routes(of(text))
    [entry] = [e for e in packed if e.dial]
    assert (entry.rule, entry.schemes) == (1, lib.VSO_HINT_TCP)
    assert bytes(ffi.buffer(entry.target, entry.target_len)) == InetURI("tcp", IPv4Address("127.0.0.1"), 5432).sockaddr()


def test_a_policy_that_dials_nothing_has_no_routes() -> None:
    assert routes_of(Policy(), "vm1") == ()
    assert of('default = "deny"\n' + rule('address = "10.0.0.0/8"')) == ()


RULES = st.builds(
    lambda match, port, uid, action, target: rule(", ".join([f'{k} = "{v}"' for k, v in match.items()] + port + uid), action)
    + (target + "\n" if action == "offload" else ""),
    st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in CONDITIONS.items()}),
    st.sampled_from([[], ["port = 80"], ['port = "80-90"']]), st.sampled_from([[], ["uid = 0"]]),
    st.sampled_from(["native", "offload", "offload", "deny"]), st.sampled_from(TARGETS),
)  # fmt: skip


@given(st.lists(RULES, max_size=5), ASKED, st.integers(0, 1))
def test_what_is_dialed_the_policy_has_connected_directly_and_there(rules: list[str], asked: InetURI, uid: int) -> None:
    try:
        policy = parse_policy("".join(rules), "policy.toml")
    except PolicyError:  # a rule that cannot match or whose target cannot be
        reject()
    route = found(routes_of(policy, "vm1"), asked)
    if route is None or not route.dial or asked.transport != "tcp":
        return
    decision = policy.decide(asked, Guest("vm1", uid))
    assert (decision.action, decision.handler) == ("offload", "direct")
    assert isinstance(decision.target, InetURI)
    assert decision.target.sockaddr() == (route.target or asked.sockaddr())
    assert decision.rule is policy.rules[route.rule]
