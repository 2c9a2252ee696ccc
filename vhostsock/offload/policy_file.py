"""Read a policy file (TOML). The forms are described in docs/policy.md.

Each table has a row per key: the parser of its value. Whatever is wrong raises PolicyError as ``file:line: table, key: what is
wrong; what to write instead``. An unknown key is an error too, with the nearest known one: a rule that silently lost a
condition would allow more than its author meant.
"""

from __future__ import annotations

import difflib
import errno
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Final, cast

from .._core import lib
from ..errors import PolicyError
from .errnos import errno_number
from .policy import Action, Guest, Hairpin, Ipx, Match, Policy, Publish, Rule, Span, Template, range_text
from .toml_lines import Lines
from .uri import IPX_UDP_PORT, InetURI, Transport, UnixURI, URIError, parse_inet

__all__ = ["load_policy", "parse_policy"]

_SCHEMES: Final = {  # the transport's name stands for both families
    "tcp": ("tcp", "tcp6"), "udp": ("udp", "udp6"), "tcp6": ("tcp6",), "udp6": ("udp6",),
    "icmp": ("icmp", "icmp6"), "icmp6": ("icmp6",), "ipx": ("ipx",),
}  # fmt: skip
_ALL_SCHEMES: Final = frozenset(("tcp", "tcp6", "udp", "udp6"))
_GROUPS: Final = (Span.of_prefix("224.0.0.0/4"), Span.of_prefix("ff00::/8"))
_MAPPED: Final = Span.of_prefix("::ffff:0:0/96")
_RANGE = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")
_PUBLISHED = re.compile(r"((?:tcp|udp)6?)://(.*)[:/]([^:/]*)")
BUILT_IN: Final = ("direct", "unix")


class _Bad(Exception):
    """A value is wrong: ``key`` of the table at hand, and the text for its author."""

    def __init__(self, key: str | None, text: str) -> None:
        super().__init__(text)
        self.key = key


def load_policy(path: str | Path) -> Policy:
    """The policy in the file ``path``. PolicyError when it cannot be read or is wrong."""
    try:
        data = Path(path).read_bytes()
        text = data.decode()
    except OSError as error:
        raise PolicyError(f"{path}: cannot read the policy: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PolicyError(f"{path}:{line}: not UTF-8, which TOML requires; save the file as UTF-8") from error
    return parse_policy(text, str(path))


def parse_policy(text: str, file: str = "policy") -> Policy:
    """The policy in ``text``; ``file`` is what errors and ``Rule.where`` call it."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        line = at[1] if at else len(text.splitlines()) or 1
        raise PolicyError(f"{file}:{line}: not TOML: {re.sub(r' *[(]at .*[)]$', '', str(error))}") from error
    return _Reader(file, Lines(text)).policy(document)


# --- values: each takes the key's name and its value, and raises _Bad ---


def _list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _string(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Bad(key, f"{value!r} is no text; write it in quotes")
    return value


def _choice(key: str, value: Any, choices: Iterable[str]) -> str:
    if value not in (choices := list(choices)):
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise _Bad(key, f"{value!r} is unknown; {hint}write one of {', '.join(map(repr, choices))}")
    return cast(str, value)


def _schemes(key: str, value: Any) -> frozenset[str]:
    return frozenset(scheme for item in _list_of(value) for scheme in _SCHEMES[_choice(key, item, _SCHEMES)])


def _numbers(what: str, low: int, high: int, example: str) -> Callable[[str, Any], tuple[range, ...]]:
    def one(key: str, value: Any) -> range:
        match = _RANGE.fullmatch(value) if isinstance(value, str) else None
        if isinstance(value, int) and not isinstance(value, bool):
            first = last = value
        elif match:
            first, last = int(match[1]), int(match[2] or match[1])
        else:
            raise _Bad(key, f"{value!r} is no {what}; write {example}")
        if not low <= first <= last <= high:
            raise _Bad(key, f"{value!r} is no {what} or range of them in {low}..{high}; write {example}")
        return range(first, last + 1)

    return lambda key, value: tuple(one(key, item) for item in _nonempty(key, value))


def _nonempty(key: str, value: Any) -> list[Any]:
    items = _list_of(value)
    if not items:
        raise _Bad(key, "an empty list matches nothing; remove the key to match all")
    return items


_ports = _numbers("port", 1, 65535, '80, "8000-8099" or a list like [80, 443]')
_uids = _numbers("uid", 0, 2**32 - 2, '1000, "1000-1999" or a list like [0, 1000]')


def _addresses(key: str, value: Any) -> tuple[Span, ...]:
    return tuple(_address(key, item) for item in _nonempty(key, value))


def _address(key: str, value: Any) -> Span:
    text = _string(key, value)
    if "%" in text:
        raise _Bad(key, f"{text!r}: rules match without the scope; write the address without %...")
    first, dash, last = text.partition("-")
    try:
        if dash:
            low, high = ip_address(first.strip()), ip_address(last.strip())
            span = Span(low.version, int(low), int(high), text)
            if low.version != high.version or span.first > span.last:
                raise _Bad(key, f"{text!r} is an empty range; write the lower address first, both of one version")
        else:
            span = Span.of_prefix(text)
    except ValueError as error:
        if "host bits" in str(error):
            raise _Bad(key, f"{text!r} has bits beyond its prefix; write "
                            f'"{ip_network(text, strict=False)}" or "{text.partition("/")[0]}"') from None
        raise _Bad(key, f'{text!r} is no address; write "10.0.0.5", a prefix "10.0.0.0/8", a range "10.0.0.1-10.0.0.9" '
                        "or a list of them (names are not resolved)") from None
    if span.inside(_MAPPED):
        raise _Bad(key, f"{text!r} is IPv4-mapped, which never arrives here; write the IPv4 address")
    return span


def _devices(key: str, value: Any) -> tuple[str, ...]:
    return tuple(_string(key, item) for item in _nonempty(key, value))


_NAME = re.compile(r"[!-~]{1,63}")  # VSO_NETNS_MAX


def _netns(key: str, value: Any) -> str:
    if not _NAME.fullmatch(text := _string(key, value)):
        raise _Bad(key, f"{text!r} is no name of a namespace; write 1 to 63 printable characters without spaces")
    return text


def _namespaces(key: str, value: Any) -> tuple[str, ...]:
    return tuple(_netns(key, item) for item in _nonempty(key, value))


def _direction(key: str, value: Any) -> str:
    if value == "in":
        raise _Bad(key, 'rules decide on what the guest opens; for what reaches the guest write a [[publish]] table')
    return _choice(key, value, ["out"])


def _errno(key: str, value: Any) -> int:
    number = errno_number(value) if isinstance(value, str) else None
    if number is None:
        raise _Bad(key, f'{value!r} is no errno; write its name, such as "EACCES", "ECONNREFUSED" or "ENETUNREACH"')
    return number


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600:
        raise _Bad(key, f"{value!r} is no time; write seconds, more than 0 and at most 3600")
    return float(value)


def _template(key: str, value: Any) -> Template:
    try:
        return Template(_string(key, value))
    except URIError as error:
        raise _Bad(key, str(error)) from None


def _network(key: str, value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{8}", value) or value.lower() in ("00000000", "ffffffff"):
        raise _Bad(key, f'{value!r} is no network number; write its 8 hexadecimal digits in quotes, such as "000000a1"')
    return int(value, 16)


def _udp(key: str, value: Any) -> InetURI:
    """The UDP address of a node; the port may be missing."""
    text = _string(key, value)
    try:
        uri = parse_inet(f"{text}:{IPX_UDP_PORT}" if re.fullmatch(r"udp://[^:/]+", text) else text)
    except URIError as error:
        raise _Bad(key, str(error)) from None
    address = uri.address
    if uri.scheme != "udp" or not uri.port or address.is_unspecified or address.is_multicast or int(address) == 0xFFFFFFFF:
        raise _Bad(key, f'{text!r} is no place of a node; write "udp://10.0.0.1", an IPv4 address of one host, with ":port" '
                        f"if it is not {IPX_UDP_PORT}")
    return uri


def _action(key: str, value: Any) -> str:
    return _choice(key, value, ["offload", "native", "deny"])


def _bool(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Bad(key, f"{value!r} is neither true nor false")
    return value


def _default(key: str, value: Any) -> str:
    if value == "offload":
        raise _Bad(key, 'offloading everything must be said by a rule; write [[rule]] with match = {} as the last one')
    return _choice(key, value, ["native", "deny"])


Parser = Callable[[str, Any], Any]
_MATCH_KEYS: Final[Mapping[str, Parser]] = {
    "scheme": _schemes, "address": _addresses, "port": _ports, "uid": _uids, "device": _devices, "netns": _namespaces,
    "direction": _direction,
}  # fmt: skip


def _match(key: str, value: Any) -> Match:
    if not isinstance(value, dict):
        raise _Bad(key, f"{value!r} is no table; write match = {{ scheme = \"tcp\", port = 80 }}, or {{}} for everything")
    found = _fields(value, _MATCH_KEYS)
    return Match(*(found.get(name) for name in ("scheme", "address", "port", "uid", "device", "netns")))


_TOP_KEYS: Final[Mapping[str, Parser]] = {
    "default": _default, "errno": _errno, "connect_timeout": _seconds, "hints": _bool,
    "rule": lambda key, value: value, "publish": lambda key, value: value, "hairpin": lambda key, value: value,
    "ipx": lambda key, value: value,
}  # fmt: skip
_RULE_KEYS: Final[Mapping[str, Parser]] = {
    "match": _match, "action": _action, "handler": _string, "rewrite": _template, "errno": _errno, "connect_timeout": _seconds,
    "comment": _string,
}  # fmt: skip
_PUBLISH_KEYS: Final[Mapping[str, Parser]] = {
    "guest": _string, "host": _string, "device": _devices, "netns": _namespaces, "groups": _addresses, "interface": _string,
    "comment": _string,
}  # fmt: skip
_IPX_KEYS: Final[Mapping[str, Parser]] = {
    "network": _network, "listen": _udp, "peers": lambda key, value: tuple(_udp(key, item) for item in _nonempty(key, value)),
    "device": _devices, "comment": _string,
}  # fmt: skip
_HAIRPIN_KEYS: Final[Mapping[str, Parser]] = {"netns": _netns, "comment": _string}


def _fields(table: Mapping[str, Any], parsers: Mapping[str, Parser]) -> dict[str, Any]:
    for key in table:
        if key not in parsers:
            near = difflib.get_close_matches(key, parsers, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(parsers)}"
            raise _Bad(key, f"unknown key; {hint}")
    return {key: parsers[key](key, value) for key, value in table.items()}


def _need(found: Mapping[str, Any], key: str, advice: str) -> Any:
    if key not in found:
        raise _Bad(None, f"no {key!r}; write {advice}")
    return found[key]


def _only_for(found: Mapping[str, Any], action: str, keys: Mapping[str, str]) -> None:
    for key, belongs in keys.items():
        if key in found and action != belongs:
            raise _Bad(key, f"has no meaning with action {action!r}, only with {belongs!r}; remove it or change the action")


# --- tables ---


@dataclass
class _Reader:
    file: str
    lines: Lines

    def fail(self, table: str, number: int, bad: _Bad) -> PolicyError:
        line = self.lines.of(table, number, bad.key)
        name = f"{table} {number}" if number else table
        place = f"{name}, " if name and bad.key else f"{name}: " if name else ""
        key = f"key {bad.key!r}: " if bad.key else ""
        return PolicyError(f"{self.file}:{line}: {place}{key}{bad}")

    def policy(self, document: dict[str, Any]) -> Policy:
        try:
            found = _fields(document, _TOP_KEYS)
            if "errno" in found and found.get("default") != "deny":
                raise _Bad("errno", 'has no meaning without default = "deny"')
            for name in ("rule", "publish", "ipx"):
                if not isinstance(found.get(name, []), list) or not all(isinstance(t, dict) for t in found.get(name, [])):
                    raise _Bad(name, f"write each as a table of its own, under the line [[{name}]]")
            if not isinstance(found.get("hairpin", {}), dict):
                raise _Bad("hairpin", "there is one: write it as a table, under the line [hairpin]")
        except _Bad as bad:
            raise self.fail("", 0, bad) from None
        rules = self.tables("rule", found.get("rule", []), _rule)
        publishes = self.tables("publish", found.get("publish", []), _publish)
        hairpin = self.hairpin(found["hairpin"]) if "hairpin" in found else None
        default = cast(Action, found.get("default", "native"))
        number: int = found.get("errno", errno.EACCES) if default == "deny" else 0
        rest = {key: found[key] for key in ("connect_timeout", "hints") if key in found}
        ipx = tuple(self.tables("ipx", found.get("ipx", []), _ipx))
        return Policy(tuple(rules), tuple(publishes), default, number, file=self.file, hairpin=hairpin, ipx=ipx, **rest)

    def hairpin(self, table: dict[str, Any]) -> Hairpin:
        try:
            netns = _need(_fields(table, _HAIRPIN_KEYS), "netns", 'netns = "judge", the name of a namespace in the guest')
        except _Bad as bad:
            raise self.fail("hairpin", 0, bad) from None
        return Hairpin(f"{self.file}:{self.lines.of('hairpin', 0)}", netns)

    def tables(self, name: str, tables: list[dict[str, Any]], build: Callable[[dict[str, Any], int, str], Any]) -> list[Any]:
        made = []
        for number, table in enumerate(tables, 1):
            try:
                made.append(build(table, number, f"{self.file}:{self.lines.of(name, number)}"))
            except _Bad as bad:
                raise self.fail(name, number, bad) from None
        return made


def _rule(table: dict[str, Any], number: int, where: str) -> Rule:
    found = _fields(table, _RULE_KEYS)
    match: Match = _need(found, "match", 'match = { address = "10.0.0.5", port = 80 }, or match = {} for everything')
    action: str = _need(found, "action", 'action = "offload", "native" or "deny"')
    _only_for(found, action, {"errno": "deny", "handler": "offload", "rewrite": "offload", "connect_timeout": "offload"})
    rewrite: Template | None = found.get("rewrite")
    handler = found.get("handler", "unix" if rewrite and rewrite.text.startswith("unix:") else "direct")
    if action == "offload":
        _check_target(match, handler, rewrite)
    code: int = found.get("errno", errno.EACCES) if action == "deny" else 0
    return Rule(number, where, match, cast(Action, action), code, handler, rewrite, found.get("connect_timeout"))


def _check_target(match: Match, handler: str, rewrite: Template | None) -> None:
    """Every request that the rule matches must have a target that its handler can reach: tried with a sample of each kind."""
    schemes = match.schemes or _ALL_SCHEMES
    if match.addresses is not None:
        versions = {span.version for span in match.addresses}
        schemes = frozenset(s for s in schemes if (6 if s.endswith("6") else 4) in versions)
        if not schemes:
            raise _Bad("match", "no address of the list belongs to the scheme: IPv6 addresses need tcp6 or udp6 (or tcp, udp)")
    if handler == "unix" and rewrite is None:
        raise _Bad("handler", 'the unix handler needs a path; write rewrite = "unix:///run/name.sock"')
    for scheme in sorted(schemes):
        transport = cast(Transport, scheme.removesuffix("6"))
        if transport != "tcp" and handler != "direct":
            raise _Bad("handler" if rewrite is None else "rewrite",
                       f'handler {handler!r} serves streams, and the rule matches {transport} too; '
                       'add scheme = "tcp" to its match')
        if rewrite is None:
            continue
        if scheme == "ipx":
            raise _Bad("rewrite", "a node of IPX is where its address says; remove the key")
        address = IPv6Address("2001:db8::1") if scheme.endswith("6") else IPv4Address("192.0.2.1")
        try:
            target = rewrite.expand(InetURI(transport, address, 80), Guest("name"))
        except URIError as error:
            raise _Bad("rewrite", f"gives no URI for a {scheme} request: {error}") from None
        if isinstance(target, InetURI):
            if handler == "unix":
                raise _Bad("rewrite", 'the unix handler needs a path; write rewrite = "unix:///run/name.sock"')
            if target.transport != transport:
                raise _Bad("rewrite", f'the rule matches {transport} and the target is {target.transport}; add scheme = '
                                      f'"{target.transport}" to its match')
            if target.port == 0 and transport != "icmp":
                raise _Bad("rewrite", "port 0 cannot be connected to; write {port} for the guest's or a number 1..65535")
        elif not isinstance(target, UnixURI) or handler == "direct":
            raise _Bad("rewrite", f"handler {handler!r} cannot connect {target.scheme}")


def _ipx(table: dict[str, Any], number: int, where: str) -> Ipx:
    found = _fields(table, _IPX_KEYS)
    network: int = _need(found, "network", 'network = "000000a1"')
    listen: InetURI = _need(found, "listen", 'listen = "udp://10.0.0.1", the address of the host where the node is')
    peers: tuple[InetURI, ...] = found.get("peers", ())
    if len(peers) > lib.VSE_IPX_PEERS:
        raise _Bad("peers", f"{len(peers)} peers; a broadcast goes to each of them, and they may be {lib.VSE_IPX_PEERS}")
    return Ipx(number, where, network, listen, tuple(dict.fromkeys(p for p in peers if p != listen)), found.get("device"))


def _publish(table: dict[str, Any], number: int, where: str) -> Publish:
    found = _fields(table, _PUBLISH_KEYS)
    guest: str = _need(found, "guest", 'guest = "tcp://0.0.0.0:8080", what the program in the guest binds')
    address, ports, _ = _published("guest", guest)
    if ports is None:
        raise _Bad("guest", f'{guest!r}: {{port}} has no meaning here; write "*" for every port')
    text: str = found.get("host", f"{address.transport}://127.0.0.1:{{port}}")
    host_ports: range | None = None
    if text.startswith("unix:"):
        host = _template("host", text)
        if address.transport == "udp":
            raise _Bad("host", f'{text!r}: datagrams go to an address; write "udp://127.0.0.1:{{port}}"')
        if len(ports) > 1 and "{port}" not in text:
            raise _Bad("host", f"one path for many guest ports; put {{port}} into it: {text!r}")
    else:
        base, host_ports, host = _published("host", text)
        if base.transport != address.transport:
            raise _Bad("host", f"{text!r}: the guest binds {address.transport}, so must the host")
        _check_port_map(ports, host_ports, text)
    try:
        host.expand(InetURI(address.transport, IPv4Address("192.0.2.1"), 80), Guest("name"))
    except URIError as error:
        raise _Bad("host", str(error)) from None
    groups, interface = found.get("groups", ()), found.get("interface", "")
    _check_groups(groups, interface, address, text)
    return Publish(number, where, address, ports, host, host_ports, found.get("device"), found.get("netns"), groups, interface)


def _check_groups(groups: tuple[Span, ...], interface: str, guest: InetURI, host: str) -> None:
    if interface and not groups:
        raise _Bad("interface", "is where groups are joined; add groups, or remove the key")
    for group in groups:
        if not any(group.inside(all_groups) for all_groups in _GROUPS):
            raise _Bad("groups", f'{group.text!r} is not multicast; write "239.1.2.3", a prefix of 224.0.0.0/4 or of ff00::/8')
        wildcard = "udp6://::/" if group.version == 6 else "udp://0.0.0.0:"
        if guest.transport != "udp" or not host.startswith(wildcard):
            raise _Bad("groups", f'a group is heard by a datagram socket of any address; write host = "{wildcard}{{port}}"')


def _published(key: str, text: str) -> tuple[InetURI, range | None, Template]:
    """A URI whose port may be a range, ``*`` or ``{port}`` (no range then), and a template of it without the port."""
    parts = _PUBLISHED.fullmatch(text)
    if not parts:
        raise _Bad(key, f'{text!r} cannot stand here; write "tcp://address:port", "tcp6://address/port", or the same with '
                        'udp, with a port, a range 8000-8099 or *' + ('' if key == "guest" else " or {port}"))
    scheme, address, port = parts.groups()
    slash = "/" if scheme.endswith("6") else ":"
    try:
        base = parse_inet(f"{scheme}://{address}{slash}0")
    except URIError as error:
        raise _Bad(key, str(error)) from None
    template = Template(f"{base}")
    if port == "{port}":
        return base, None, template
    if port == "*":
        return base, range(65536), template
    (ports,) = _numbers("port", 0, 65535, '80, 8000-8099, * or 0 for any')(key, port)
    if ports[0] == 0 and len(ports) > 1:
        raise _Bad(key, f"{text!r}: 0 asks for any port and is in no range; start the range at 1, or write * for all and 0")
    return base, ports, template


def _check_port_map(guest: range, host: range | None, text: str) -> None:
    if host is None or host == range(1) or len(host) == len(guest):
        if host == range(65536):
            raise _Bad("host", f'{text!r}: write {{port}} for the same port as in the guest, or 0 for any free one')
        return
    if guest == range(1):
        return  # the guest asks for any port: it gets one of the range
    raise _Bad("host", f"{len(guest)} guest ports ({range_text(guest)}) onto {len(host)} of the host ({range_text(host)}); "
                       "write a range of the same length, {port} for the same port, or 0 for any free one")
