"""What a policy decides: first match wins, default closed, special ranges by name only."""

from __future__ import annotations

import errno
import textwrap
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostsock.offload.policy import SPECIAL, Guest, Policy
from vhostsock.offload.policy_file import parse_policy
from vhostsock.offload.uri import InetURI, parse_inet

VM1 = Guest("vm1", uid=1000)


def policy(text: str) -> Policy:
    return parse_policy(textwrap.dedent(text), "policy.toml")


def verdict(text: str, asked: str, guest: Guest = VM1) -> str:
    """The decision in one line: "offload direct tcp://...", "native" or "deny EACCES"."""
    decision = policy(text).decide(parse_inet(asked), guest)
    if decision.action == "offload":
        return f"offload {decision.handler} {decision.target}"
    return f"deny {errno.errorcode[decision.errno]}" if decision.action == "deny" else decision.action


def published(text: str, asked: str, guest: Guest = VM1, *, v6only: bool = False) -> tuple[str, range] | None:
    decision = policy(text).decide_bind(parse_inet(asked), guest, v6only=v6only)
    return (str(decision.host), decision.ports) if decision.action == "offload" else None


def test_without_a_rule_everything_is_native_and_nothing_is_published() -> None:
    for closed in (Policy(), policy("")):
        assert closed.decide(parse_inet("tcp://192.0.2.1:80"), VM1).action == "native"
        assert closed.decide(parse_inet("udp6://2001:db8::1/53"), VM1).action == "native"
        assert closed.decide_bind(parse_inet("tcp://0.0.0.0:80"), VM1).action == "native"


def test_default_deny_gives_its_errno() -> None:
    assert verdict('default = "deny"', "tcp://192.0.2.1:80") == "deny EACCES"
    assert verdict('default = "deny"\nerrno = "ENETUNREACH"', "tcp://192.0.2.1:80") == "deny ENETUNREACH"


def test_default_deny_does_not_touch_binds() -> None:
    assert published('default = "deny"', "tcp://0.0.0.0:80") is None


ORDERED = """
    [[rule]]
    match = { scheme = "tcp", address = "10.0.0.5", port = 5432 }
    action = "offload"
    rewrite = "tcp://127.0.0.1:15432"

    [[rule]]
    match = { address = "10.0.0.0/8" }
    action = "deny"
    errno = "EHOSTUNREACH"

    [[rule]]
    match = { scheme = "tcp" }
    action = "offload"
    """


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("tcp://10.0.0.5:5432", "offload direct tcp://127.0.0.1:15432"),
        ("tcp://10.0.0.5:5433", "deny EHOSTUNREACH"),
        ("udp://10.0.0.5:5432", "deny EHOSTUNREACH"),
        ("tcp://192.0.2.1:80", "offload direct tcp://192.0.2.1:80"),
        ("tcp6://2001:db8::1/80", "offload direct tcp6://2001:db8::1/80"),
        ("udp://192.0.2.1:53", "native"),
    ],
)
def test_first_matching_rule_decides(asked: str, expected: str) -> None:
    assert verdict(ORDERED, asked) == expected


def one(match: str, more: str = "") -> str:
    return f"[[rule]]\nmatch = {{ {match} }}\naction = \"offload\"\n{more}"


@pytest.mark.parametrize(
    ("match", "hits", "misses"),
    [
        ('scheme = "tcp6"', ["tcp6://2001:db8::1/1"], ["tcp://192.0.2.1:1", "udp6://2001:db8::1/1"]),
        ('scheme = "tcp"', ["tcp6://2001:db8::1/1", "tcp://192.0.2.1:1"], ["udp://192.0.2.1:1"]),
        ('scheme = ["tcp", "udp6"]', ["tcp://192.0.2.1:1", "udp6://2001:db8::1/1"], ["udp://192.0.2.1:1"]),
        ('address = "0.0.0.0/0"', ["tcp://192.0.2.1:1"], ["tcp6://2001:db8::1/1"]),
        ('address = "::/0"', ["tcp6://2001:db8::1/1"], ["tcp://192.0.2.1:1"]),
        ('address = ["192.0.2.1", "2001:db8::/32"]', ["tcp://192.0.2.1:1", "udp6://2001:db8::1/1"], ["tcp://192.0.2.2:1"]),
        ('address = "192.0.2.9-192.0.2.11"', ["udp://192.0.2.9:1", "udp://192.0.2.11:1"], ["udp://192.0.2.8:1", "udp://192.0.2.12:1"]),
        ("port = 80", ["tcp://192.0.2.1:80"], ["tcp://192.0.2.1:81"]),
        ('port = "80-82"', ["tcp://192.0.2.1:80", "tcp://192.0.2.1:82"], ["tcp://192.0.2.1:79", "tcp://192.0.2.1:83"]),
        ('port = [22, "80-82", "443"]', ["tcp://192.0.2.1:22", "tcp://192.0.2.1:443"], ["tcp://192.0.2.1:23"]),
        ("uid = 1000", ["tcp://192.0.2.1:1"], []),
        ("uid = [0, 1]", [], ["tcp://192.0.2.1:1"]),
        ('device = "vm1"', ["tcp://192.0.2.1:1"], []),
        ('device = ["vm2", "vm?"]', ["tcp://192.0.2.1:1"], []),
        ('device = "vm2"', [], ["tcp://192.0.2.1:1"]),
        ('direction = "out"', ["tcp://192.0.2.1:1"], []),
    ],
)  # fmt: skip
def test_conditions(match: str, hits: list[str], misses: list[str]) -> None:
    for asked in hits:
        assert verdict(one(match), asked).startswith("offload"), asked
    for asked in misses:
        assert verdict(one(match), asked) == "native", asked


def test_scope_does_not_hide_an_address_from_a_rule() -> None:
    text = '[[rule]]\nmatch = { address = "2001:db8::1" }\naction = "deny"'
    assert verdict(text, "tcp6://2001:db8::1%2/80") == "deny EACCES"


@pytest.mark.parametrize("span", [span for span, _ in SPECIAL], ids=str)
def test_special_range_is_offloaded_only_by_a_rule_that_names_it(span) -> None:  # type: ignore[no-untyped-def]
    address = IPv4Address(span.first) if span.version == 4 else IPv6Address(span.first)
    asked = str(InetURI("tcp", address, 80))
    everything = "0.0.0.0/0" if span.version == 4 else "::/0"
    assert verdict("[[rule]]\nmatch = {}\naction = \"offload\"", asked) == "native"
    assert verdict(one(f'address = "{everything}"'), asked) == "native"
    assert verdict(one(f'address = ["{everything}", "{address}"]'), asked).startswith("offload")
    assert verdict(one(f'address = "{span}"'), asked).startswith("offload")
    assert verdict("[[rule]]\nmatch = {}\naction = \"deny\"", asked) == "deny EACCES"


def test_a_range_across_a_special_one_does_not_name_it() -> None:
    assert verdict(one('address = "126.0.0.0-128.0.0.0"'), "tcp://127.0.0.1:80") == "native"


@given(st.ip_addresses(v=4), st.integers(1, 65535))
def test_a_host_without_special_rules_is_never_reached_on_its_loopback(address: IPv4Address, port: int) -> None:
    decision = policy("[[rule]]\nmatch = {}\naction = \"offload\"").decide(InetURI("tcp", address, port), VM1)
    assert not (decision.action == "offload" and (address.is_loopback or address.is_unspecified or address.is_link_local))


@pytest.mark.parametrize(
    ("match", "rewrite", "asked", "expected"),
    [
        ('scheme = "tcp"', "tcp://127.0.0.1:{port}", "tcp://10.0.0.5:99", "offload direct tcp://127.0.0.1:99"),
        ('scheme = "tcp"', "tcp://127.0.0.1:{port}", "tcp6://2001:db8::1/99", "offload direct tcp://127.0.0.1:99"),
        ('scheme = "udp"', "udp://127.0.0.53:53", "udp://10.0.2.3:53", "offload direct udp://127.0.0.53:53"),
        ('scheme = "tcp", address = "10.0.0.0/8"', "tcp://{address}:8080", "tcp://10.1.2.3:80", "offload direct tcp://10.1.2.3:8080"),
        ('scheme = "tcp"', "unix:///run/{name}/{port}", "tcp://10.0.0.5:99", "offload unix unix:///run/vm1/99"),
        ('scheme = "tcp"', "unix:///run/{address}", "tcp6://2001:db8::1%3/9", "offload unix unix:///run/2001:db8::1"),
    ],
)  # fmt: skip
def test_rewriting(match: str, rewrite: str, asked: str, expected: str) -> None:
    assert verdict(one(match, f'rewrite = "{rewrite}"'), asked) == expected


def test_in_process_handler_gets_its_target() -> None:
    assert verdict(one('scheme = "tcp"', 'handler = "hello"'), "tcp://10.0.0.5:1") == "offload hello tcp://10.0.0.5:1"


def test_connect_timeout_of_the_rule_goes_before_that_of_the_file() -> None:
    text = "connect_timeout = 5\n" + one('scheme = "tcp"', "connect_timeout = 0.5") + "\n" + one('scheme = "udp"')
    assert policy(text).decide(parse_inet("tcp://192.0.2.1:1"), VM1).connect_timeout == 0.5
    assert policy(text).decide(parse_inet("udp://192.0.2.1:1"), VM1).connect_timeout == 5


def publish(guest: str, host: str = "", more: str = "") -> str:
    line = f'host = "{host}"\n' if host else ""
    return f'[[publish]]\nguest = "{guest}"\n{line}{more}\n'


@pytest.mark.parametrize(
    ("guest", "host", "asked", "expected"),
    [
        ("tcp://0.0.0.0:80", "tcp://127.0.0.1:8080", "tcp://0.0.0.0:80", ("tcp://127.0.0.1:8080", range(8080, 8081))),
        ("tcp://0.0.0.0:80", "", "tcp://0.0.0.0:80", ("tcp://127.0.0.1:80", range(80, 81))),
        ("tcp://0.0.0.0:80", "tcp://127.0.0.1:0", "tcp://0.0.0.0:80", ("tcp://127.0.0.1:0", range(0, 1))),
        ("tcp://0.0.0.0:80", "tcp6://::1/8080", "tcp://0.0.0.0:80", ("tcp6://::1/8080", range(8080, 8081))),
        ("tcp://10.0.2.15:80", "tcp://127.0.0.1:8080", "tcp://10.0.2.15:80", ("tcp://127.0.0.1:8080", range(8080, 8081))),
        ("tcp://0.0.0.0:80-89", "tcp://127.0.0.1:9000-9009", "tcp://0.0.0.0:83", ("tcp://127.0.0.1:9003", range(9003, 9004))),
        ("tcp://0.0.0.0:8000-8009", "tcp://0.0.0.0:{port}", "tcp://0.0.0.0:8003", ("tcp://0.0.0.0:8003", range(8003, 8004))),
        ("tcp://0.0.0.0:0", "tcp://127.0.0.1:0", "tcp://0.0.0.0:0", ("tcp://127.0.0.1:0", range(0, 1))),
        ("tcp://0.0.0.0:0", "tcp://127.0.0.1:9000-9009", "tcp://0.0.0.0:0", ("tcp://127.0.0.1:9000", range(9000, 9010))),
        ("tcp://0.0.0.0:*", "tcp://127.0.0.1:{port}", "tcp://0.0.0.0:0", ("tcp://127.0.0.1:0", range(0, 1))),
        ("tcp://0.0.0.0:*", "", "tcp://0.0.0.0:8080", ("tcp://127.0.0.1:8080", range(8080, 8081))),
        ("tcp://0.0.0.0:80", "unix:///run/{name}/{port}.sock", "tcp://0.0.0.0:80", ("unix:///run/vm1/80.sock", range(0))),
        ("tcp://0.0.0.0:80", "", "tcp://0.0.0.0:81", None),
        ("tcp://0.0.0.0:80", "", "tcp://0.0.0.0:0", None),
        ("tcp://0.0.0.0:80", "", "udp://0.0.0.0:80", None),
        ("tcp://0.0.0.0:80", "", "tcp://127.0.0.1:80", None),
        ("tcp://0.0.0.0:80", "", "tcp://10.0.2.15:80", None),
        ("tcp://10.0.2.15:80", "", "tcp://0.0.0.0:80", None),
    ],
)  # fmt: skip
def test_publish(guest: str, host: str, asked: str, expected: tuple[str, range] | None) -> None:
    assert published(publish(guest, host), asked) == expected


def test_any_address_of_one_family_publishes_a_dual_stack_server_of_the_other() -> None:
    text = publish("tcp://0.0.0.0:80", "tcp://127.0.0.1:8080")
    assert published(text, "tcp6://::/80") is not None
    assert published(text, "tcp6://::/80", v6only=True) is None


def test_a_publish_rule_of_the_same_family_goes_first() -> None:
    text = publish("tcp://0.0.0.0:80", "tcp://127.0.0.1:8080") + publish("tcp6://::/80", "tcp6://::1/8080")
    assert published(text, "tcp6://::/80", v6only=True) == ("tcp6://::1/8080", range(8080, 8081))
    assert published(text, "tcp6://::/80") == ("tcp6://::1/8080", range(8080, 8081))
    assert published(text, "tcp://0.0.0.0:80") == ("tcp://127.0.0.1:8080", range(8080, 8081))


def test_publish_for_one_device_only() -> None:
    text = publish("tcp://0.0.0.0:80", "", 'device = "vm2"')
    assert published(text, "tcp://0.0.0.0:80") is None
    assert published(text, "tcp://0.0.0.0:80", Guest("vm2")) is not None


def test_explain_names_the_rule_that_decides_and_why_earlier_ones_do_not() -> None:
    lines = list(policy(ORDERED).explain(parse_inet("udp://10.0.0.5:5432"), VM1))
    assert lines == [
        "udp://10.0.0.5:5432: deny, the application gets EHOSTUNREACH",
        "  because of rule 2 at policy.toml:7",
        "  not rule 1 at policy.toml:2 (offload): udp is not tcp or tcp6",
    ]


def test_explain_tells_that_a_special_range_must_be_named() -> None:
    lines = list(policy("[[rule]]\nmatch = {}\naction = \"offload\"").explain(parse_inet("tcp://169.254.169.254:80"), VM1))
    assert lines[0] == "tcp://169.254.169.254:80: native, the guest's own stack takes it"
    assert "only a rule that names an address in 169.254.0.0/16" in lines[2]


def test_explain_bind() -> None:
    text = publish("tcp://0.0.0.0:80", "tcp://127.0.0.1:8080")
    assert list(policy(text).explain_bind(parse_inet("tcp://0.0.0.0:80"), VM1)) == [
        "tcp://0.0.0.0:80: published as tcp://127.0.0.1:8080",
        "  because of publish rule 1 at policy.toml:1",
    ]
    assert list(policy(text).explain_bind(parse_inet("tcp://0.0.0.0:81"), VM1)) == [
        "tcp://0.0.0.0:81: native, the guest's own stack binds it",
        "  because no publish rule of policy.toml matches",
        "  not publish rule 1 at policy.toml:1: port 81 is not 80",
    ]


def test_handlers_in_use_are_listed_with_their_first_rule() -> None:
    text = ORDERED + one('scheme = "tcp"', 'handler = "hello"').replace("\n", "\n    ")
    assert {name: rule.number for name, rule in policy(text).handlers().items()} == {"direct": 1, "hello": 4}


NAMESPACES = """
    [[rule]]
    match = { address = "10.0.0.5" }
    action = "offload"

    [[rule]]
    match = { netns = ["shop*", "4026532008"] }
    action = "offload"

    [[publish]]
    guest = "tcp://0.0.0.0:80"

    [[publish]]
    guest = "tcp://0.0.0.0:81"
    netns = "*"

    [hairpin]
    netns = "judge"
    """


@pytest.mark.parametrize(
    ("netns", "address", "expected"),
    [
        ("init", "10.0.0.5", "offload direct tcp://10.0.0.5:80"),
        ("init", "10.0.0.6", "native"),
        ("office", "10.0.0.5", "native"),
        ("shop1", "10.0.0.5", "offload direct tcp://10.0.0.5:80"),
        ("4026532008", "10.0.0.6", "offload direct tcp://10.0.0.6:80"),
        ("4026532009", "10.0.0.6", "native"),
        ("shop1", "127.0.0.1", "native"),
        ("judge", "127.0.0.1", "offload direct tcp://127.0.0.1:80"),
        ("judge", "10.0.0.7", "offload direct tcp://10.0.0.7:80"),
    ],
)
def test_rules_serve_the_initial_namespace_unless_they_name_others(netns: str, address: str, expected: str) -> None:
    assert verdict(NAMESPACES, f"tcp://{address}:80", Guest("vm1", netns=netns)) == expected


def test_publish_rules_serve_the_initial_namespace_unless_they_name_others() -> None:
    def ports(netns: str) -> list[int]:
        guest = Guest("vm1", netns=netns)
        return [port for port in (80, 81, 82) if published(NAMESPACES, f"tcp://0.0.0.0:{port}", guest)]

    assert ports("init") == [80, 81]
    assert ports("shop1") == [81]
    assert ports("judge") == [80, 81, 82]
    assert published(NAMESPACES, "udp6://::1/0", Guest("vm1", netns="judge")) == ("udp6://::1/0", range(1))


def test_the_namespace_is_part_of_the_explanation() -> None:
    lines = list(policy(NAMESPACES).explain(parse_inet("tcp://10.0.0.5:80"), Guest("vm1", netns="office")))
    assert any("which only a rule that names it (netns) serves" in line for line in lines)
    assert any("namespace 'office' is not 'shop*' or '4026532008'" in line for line in lines)
    lines = list(policy(NAMESPACES).explain(parse_inet("tcp://127.0.0.1:80"), Guest("vm1", netns="judge")))
    assert lines[1:] == ["  because of hairpin at policy.toml:17"]
    bound = policy(NAMESPACES).explain_bind(parse_inet("tcp6://::1/80"), Guest("vm1", netns="judge"))
    assert "hairpin at policy.toml:17" in next(iter(bound))
