"""Policy: which socket requests of a guest are served, how, and which are not.

A policy is two ordered lists. ``rules`` decide on what the guest connects or sends to, ``publishes`` on what it binds; in each
the first match wins. What nothing matches gets the default: ``native`` (the device refuses, the guest's own stack takes it) or
``deny`` (the application gets an errno). Hence *default closed*: without a rule no host socket is ever made.

Two safeguards hold for every rule that offloads, because the device connects from the host's point of view:

- *Special ranges must be named.* An address in one of ``SPECIAL`` (the host's loopback, link-local with the cloud's
  metadata service, multicast, ...) is matched only by a rule whose own address lies inside that range; ``0.0.0.0/0`` or a rule
  without an address does not reach them. Rules that deny or leave native match them like any other.
- *The guest's word narrows only.* ``uid`` and ``netns`` are what the guest's kernel says; ``device`` is the name the host gave
  the device.

Everything here is a pure function of its arguments; policy_file.py reads the TOML and handlers do what was decided.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import ip_network
from typing import Final, Literal, TypeVar

from . import uri as uris
from .errnos import errno_name
from .uri import URI, Address, InetURI, URIError

__all__ = [
    "INITIAL", "BindDecision", "Decision", "Guest", "Hairpin", "Ipx", "Match", "Policy", "Publish", "Rule", "Span", "Template",
]  # fmt: skip

Action = Literal["offload", "native", "deny"]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of addresses of one IP version: one address, a prefix or a range. ``text`` is how it was written."""

    version: int
    first: int
    last: int
    text: str

    @classmethod
    def of_prefix(cls, text: str) -> Span:
        network = ip_network(text)
        return cls(network.version, int(network.network_address), int(network.broadcast_address), text)

    def holds(self, address: Address) -> bool:
        return address.version == self.version and self.first <= int(address) <= self.last

    def inside(self, other: Span) -> bool:
        return self.version == other.version and other.first <= self.first and self.last <= other.last

    def __str__(self) -> str:
        return self.text


SPECIAL: Final[tuple[tuple[Span, str], ...]] = tuple(
    (Span.of_prefix(prefix), what)
    for prefix, what in (
        ("0.0.0.0/8", "means the host itself"),
        ("127.0.0.0/8", "is the host's loopback"),
        ("169.254.0.0/16", "is link-local on the host (cloud metadata lives there)"),
        ("224.0.0.0/4", "is multicast"),
        ("255.255.255.255/32", "is broadcast"),
        ("::/128", "means the host itself"),
        ("::1/128", "is the host's loopback"),
        ("fe80::/10", "is link-local on the host"),
        ("ff00::/8", "is multicast"),
    )
)
DEFAULT_CONNECT_TIMEOUT: Final = 127.0  # seconds: Linux's own with tcp_syn_retries = 6


INITIAL: Final = "init"  # how policies call a guest's initial network namespace


@dataclass(frozen=True, slots=True)
class Guest:
    """Who asks: the device's name (the host's word), the caller's uid and its network namespace (the guest's word).

    ``netns`` is INITIAL, the name that the guest gave the namespace, or the number (an inode) of one without a name.
    """

    device: str = ""
    uid: int = 0
    netns: str = INITIAL


class Template:
    """A rewriting target: a URI with ``{address}``, ``{port}`` (what the guest asked for) and ``{name}`` (the device)."""

    PLACEHOLDERS: Final = ("address", "port", "name")
    _HOLE = re.compile(r"\{([^{}]*)\}")

    def __init__(self, text: str) -> None:
        """URIError when ``text`` uses another placeholder. That it makes a URI is known only when it is expanded."""
        for name in self._HOLE.findall(text):
            if name not in self.PLACEHOLDERS:
                raise URIError(f"{text!r}: unknown placeholder {{{name}}}; there are {{address}}, {{port}} and {{name}}")
        if "{" in self._HOLE.sub("", text) or "}" in self._HOLE.sub("", text):
            raise URIError(f"{text!r}: a brace that opens no placeholder; there are {{address}}, {{port}} and {{name}}")
        self.text = text

    def expand(self, asked: InetURI, guest: Guest) -> URI:
        return self._filled({"address": str(asked.plain), "port": str(asked.port), "name": guest.device})

    def fixed(self, device: str) -> URI | None:
        """What it makes for this device whatever is asked for; None if that matters. URIError."""
        return self._filled({"name": device}) if set(self._HOLE.findall(self.text)) <= {"name"} else None

    def _filled(self, values: dict[str, str]) -> URI:
        return uris.parse(self._HOLE.sub(lambda hole: values[hole[1]], self.text))

    def __repr__(self) -> str:
        return f"Template({self.text!r})"


def special_range(address: Address) -> tuple[Span, str] | None:
    """The row of ``SPECIAL`` that holds ``address`` (without scope)."""
    return next((row for row in SPECIAL if row[0].holds(address)), None)


@dataclass(frozen=True, slots=True)
class Match:
    """The conditions of a rule; None: any. All must hold."""

    schemes: frozenset[str] | None = None  # tcp, tcp6, udp, udp6
    addresses: tuple[Span, ...] | None = None
    ports: tuple[range, ...] | None = None
    uids: tuple[range, ...] | None = None
    devices: tuple[str, ...] | None = None  # names or shell patterns
    netns: tuple[str, ...] | None = None  # likewise; None: the initial one, so that a container without a network gains none

    def mismatch(self, asked: InetURI, guest: Guest, *, named_only: bool) -> str | None:
        """Why the request does not match, None if it does. ``named_only``: special ranges count only when named."""
        if self.schemes is not None and asked.scheme not in self.schemes:
            return f"{asked.scheme} is not {_any_of(sorted(self.schemes))}"
        spans = [span for span in self.addresses or () if span.holds(asked.plain)]
        if self.addresses is not None and not spans:
            return f"{asked.plain} is not in {_any_of(self.addresses)}"
        if self.ports is not None and not any(asked.port in ports for ports in self.ports):
            return f"port {asked.port} is not {_any_of(map(range_text, self.ports))}"
        if self.uids is not None and not any(guest.uid in uids for uids in self.uids):
            return f"uid {guest.uid} is not {_any_of(map(range_text, self.uids))}"
        if self.devices is not None and not any(fnmatchcase(guest.device, name) for name in self.devices):
            return f"device {guest.device!r} is not {_any_of(map(repr, self.devices))}"
        if (other := _other_netns(self.netns, guest)) is not None:
            return other
        special = special_range(asked.plain) if named_only else None
        if special is not None and not any(span.inside(special[0]) for span in spans):
            return f"{asked.plain} {special[1]}: only a rule that names an address in {special[0]} offloads it"
        return None


@dataclass(frozen=True, slots=True)
class Rule:
    """One ``[[rule]]``. ``number`` counts from 1, ``where`` is file:line."""

    number: int
    where: str
    match: Match
    action: Action
    errno: int = 0
    handler: str = "direct"
    rewrite: Template | None = None
    connect_timeout: float | None = None

    def mismatch(self, asked: InetURI, guest: Guest) -> str | None:
        return self.match.mismatch(asked, guest, named_only=self.action == "offload")

    def __str__(self) -> str:
        return f"rule {self.number} at {self.where}"


@dataclass(frozen=True, slots=True)
class Publish:
    """One ``[[publish]]``: what the guest binds (address and ports) and where the host listens instead.

    ``any_family``: the guest address is 0.0.0.0 or ::, and the rule serves either of them, because a dual-stack server
    binds ::; it does not serve a v6-only socket by way of 0.0.0.0. ``ports`` may hold 0, the guest's bind(0). ``host_ports``
    is None for a Unix target and for ``{port}`` (the guest's own); a range of the length of ``ports`` maps one to one;
    range(0, 1) is any free port; any other range offers its ports to a guest that asked for port 0. ``groups``: multicast
    groups that a datagram server may join on the host's ``interface`` (empty: its routes decide).
    """

    number: int
    where: str
    guest: InetURI  # its port is unused
    ports: range
    host: Template
    host_ports: range | None
    devices: tuple[str, ...] | None = None
    netns: tuple[str, ...] | None = None  # None: the initial one
    groups: tuple[Span, ...] = ()
    interface: str = ""

    @property
    def any_family(self) -> bool:
        return self.guest.address.is_unspecified

    def mismatch(self, asked: InetURI, guest: Guest, *, v6only: bool, exact: bool) -> str | None:
        """Why the bind does not match, None if it does. ``exact``: only the rule's own family counts."""
        if asked.transport != self.guest.transport:
            return f"{asked.scheme} is not {self.guest.transport}"
        same = asked.address == self.guest.address
        other = not exact and not v6only and self.any_family and asked.address.is_unspecified
        if not same and not other:
            return f"the guest binds {asked.address}, not {self.guest.address}"
        if asked.port not in self.ports:
            return f"port {asked.port} is not {range_text(self.ports)}"
        if self.devices is not None and not any(fnmatchcase(guest.device, name) for name in self.devices):
            return f"device {guest.device!r} is not {_any_of(map(repr, self.devices))}"
        return _other_netns(self.netns, guest)

    def target(self, asked: InetURI, guest: Guest) -> tuple[URI, range]:
        """Where the host listens, and which ports it may try in turn (0: any free one; empty for a Unix socket)."""
        host = self.host.expand(asked, guest)
        if not isinstance(host, InetURI):
            return host, range(0)
        if self.host_ports is None:
            ports = range(asked.port, asked.port + 1)
        elif len(self.host_ports) == len(self.ports):
            port = self.host_ports[self.ports.index(asked.port)]
            ports = range(port, port + 1)
        else:
            ports = self.host_ports
        return host.with_port(ports[0]), ports

    def __str__(self) -> str:
        return f"publish rule {self.number} at {self.where}"


@dataclass(frozen=True, slots=True)
class Hairpin:
    """``[hairpin]``: all that the guest's namespace ``netns`` does, on its loopback too, is done in a namespace of the host
    that only this guest uses. No rule is asked."""

    where: str
    netns: str

    def __str__(self) -> str:
        return f"hairpin at {self.where}"


@dataclass(frozen=True, slots=True)
class Ipx:
    """One ``[[ipx]]``: a guest as a node of IPX network ``network``. ``listen`` is the UDP address of the host where the node
    is reached, ``peers`` those of the nodes that are sent to and heard without a rule, and that get broadcasts."""

    number: int
    where: str
    network: int
    listen: InetURI
    peers: tuple[InetURI, ...] = ()
    devices: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"ipx {self.number} at {self.where}"


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on a connect or a datagram destination: ``errno`` for deny; handler, target and timeout for offload."""

    action: Action
    why: str
    errno: int = 0
    handler: str = ""
    target: URI | None = None
    connect_timeout: float = DEFAULT_CONNECT_TIMEOUT
    rule: Rule | None = None
    hairpin: Hairpin | None = None


@dataclass(frozen=True, slots=True)
class BindDecision:
    """The verdict on a bind. For offload: the host address, and the ports to try in turn (see Publish)."""

    action: Action
    why: str
    host: URI | None = None
    ports: range = range(0)
    rule: Publish | None = None
    hairpin: Hairpin | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy. ``Policy()`` is the closed one: everything stays native, nothing is published.

    ``hints``: the driver may be told which destinations are native, and then does not ask about them.
    """

    rules: tuple[Rule, ...] = ()
    publishes: tuple[Publish, ...] = ()
    default: Action = "native"  # never "offload"
    default_errno: int = 0
    connect_timeout: float = DEFAULT_CONNECT_TIMEOUT
    file: str = "the closed policy"
    hairpin: Hairpin | None = None
    ipx: tuple[Ipx, ...] = ()
    hints: bool = True

    def ipx_of(self, device: str) -> Ipx | None:
        """The table that makes this device a node of IPX; None: its guest has no IPX network."""
        return next((i for i in self.ipx if i.devices is None or any(fnmatchcase(device, name) for name in i.devices)), None)

    def decide(self, asked: InetURI, guest: Guest) -> Decision:
        """The verdict on connecting or sending to ``asked``. URIError when the rule's target makes no URI for it."""
        if self.hairpin and guest.netns == self.hairpin.netns:
            return Decision("offload", str(self.hairpin), handler="direct", target=asked, connect_timeout=self.connect_timeout,
                            hairpin=self.hairpin)  # fmt: skip
        rule = next((r for r in self.rules if r.mismatch(asked, guest) is None), None)
        if rule is None:
            return Decision(self.default, f"no rule of {self.file} matches, the default is {self.default}", self.default_errno)
        if rule.action != "offload":
            return Decision(rule.action, str(rule), rule.errno, rule=rule)
        target = rule.rewrite.expand(asked, guest) if rule.rewrite else asked
        timeout = self.connect_timeout if rule.connect_timeout is None else rule.connect_timeout
        return Decision("offload", str(rule), handler=rule.handler, target=target, connect_timeout=timeout, rule=rule)

    def decide_bind(self, asked: InetURI, guest: Guest, *, v6only: bool = False) -> BindDecision:
        """The verdict on binding ``asked``. A rule of the same family goes before one that serves it as dual-stack."""
        if self.hairpin and guest.netns == self.hairpin.netns:
            return BindDecision("offload", str(self.hairpin), asked, range(asked.port, asked.port + 1), hairpin=self.hairpin)
        for exact in (True, False):
            for rule in self.publishes:
                if rule.mismatch(asked, guest, v6only=v6only, exact=exact) is None:
                    host, ports = rule.target(asked, guest)
                    return BindDecision("offload", str(rule), host, ports, rule)
        return BindDecision("native", f"no publish rule of {self.file} matches")

    def handlers(self) -> dict[str, Rule]:
        """The handler names in use, each with the first rule that uses it."""
        names: dict[str, Rule] = {}
        for rule in self.rules:
            if rule.action == "offload":
                names.setdefault(rule.handler, rule)
        return names

    def explain(self, asked: InetURI, guest: Guest) -> Iterator[str]:
        """Lines that say what happens to a connect, and why each earlier rule did not decide."""
        decision = self.decide(asked, guest)
        yield f"{asked}: {_outcome(decision)}"
        yield f"  because of {decision.why}" if decision.rule or decision.hairpin else f"  because {decision.why}"
        for rule in self.rules if not decision.hairpin else ():
            reason = rule.mismatch(asked, guest)
            if reason is None:
                break
            yield f"  not {rule} ({rule.action}): {reason}"

    def explain_bind(self, asked: InetURI, guest: Guest, *, v6only: bool = False) -> Iterator[str]:
        """The same for a bind."""
        decision = self.decide_bind(asked, guest, v6only=v6only)
        if decision.hairpin:
            yield f"{asked}: bound in the namespace of the {decision.why}"
            return
        if decision.rule is None:
            yield f"{asked}: native, the guest's own stack binds it"
            yield f"  because {decision.why}"
        else:
            ports = f", the first free port of {range_text(decision.ports)}" if len(decision.ports) > 1 else ""
            free = ", any free port" if decision.ports == range(1) else ""
            yield f"{asked}: published as {decision.host}{ports}{free}"
            yield f"  because of {decision.why}"
        for rule in self.publishes:
            reason = rule.mismatch(asked, guest, v6only=v6only, exact=False)
            if reason is not None:
                yield f"  not {rule}: {reason}"


def _other_netns(names: tuple[str, ...] | None, guest: Guest) -> str | None:
    if any(fnmatchcase(guest.netns, name) for name in names or (INITIAL,)):
        return None
    if names is None:
        return f"it comes from namespace {guest.netns!r}, which only a rule that names it (netns) serves"
    return f"namespace {guest.netns!r} is not {_any_of(map(repr, names))}"


def _outcome(decision: Decision) -> str:
    if decision.action == "offload":
        return f"offload, handler {decision.handler} connects {decision.target}"
    if decision.action == "deny":
        return f"deny, the application gets {errno_name(decision.errno)}"
    return "native, the guest's own stack takes it"


def range_text(numbers: range) -> str:
    """ "80" or "8000-8099"."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


T = TypeVar("T")


def _any_of(items: Iterable[T]) -> str:
    return " or ".join(map(str, items))
