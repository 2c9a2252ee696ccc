"""What a driver may know beforehand: destinations that the policy leaves native, so that a connect to one costs no round trip.

A hint is a conservative summary of the ordered rules (VSO_HINTS, docs/offload-abi.md). The first that covers a request decides,
as the first rule does: a rule that says native to everybody becomes NATIVE, every other rule that could match becomes ASK for
all that it could match, and the default, if it is native, covers the rest. What a rule says of a uid the driver does not weigh,
so that rule is ASK; hints are for the initial namespace, so rules for others alone are left out. Where the table is too long it
is cut, and what no hint covers is asked: a hint may say ASK where the policy would say native, never the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Final

from .._core import ffi, lib
from .policy import INITIAL, Match, Policy, Span

__all__ = ["Hint", "hints_of", "pack_hints"]

SCHEMES: Final = {"tcp": lib.VSO_HINT_TCP, "tcp6": lib.VSO_HINT_TCP6, "udp": lib.VSO_HINT_UDP, "udp6": lib.VSO_HINT_UDP6}
_VERSIONS: Final = {4: SCHEMES["tcp"] | SCHEMES["udp"], 6: SCHEMES["tcp6"] | SCHEMES["udp6"]}
_MAPPED: Final = 0xFFFF << 32  # ::ffff:0:0, where IPv4 lies in IPv6
_ALL_ADDRESSES: Final = range(1 << 128)
_ALL_PORTS: Final = range(1 << 16)


@dataclass(frozen=True, slots=True)
class Hint:
    """``addresses`` as 128-bit numbers, IPv4 mapped; ``schemes``: bits of SCHEMES; ``native``: else ask."""

    schemes: int
    addresses: range
    ports: range
    native: bool


def hints_of(policy: Policy, device: str) -> tuple[Hint, ...]:
    """The hints for the guest of ``device``; none when the policy wants to be asked about everything."""
    if not policy.hints or (policy.hairpin and policy.hairpin.netns == INITIAL):
        return ()
    hints: list[Hint] = []
    for rule in policy.rules:
        if _may_match(rule.match, device):
            hints += _covered(rule.match, native=rule.action == "native" and rule.match.uids is None)
    if policy.default == "native":
        hints.append(Hint(sum(SCHEMES.values()), _ALL_ADDRESSES, _ALL_PORTS, native=True))
    del hints[lib.VSO_HINTS_MAX :]
    while hints and not hints[-1].native:
        hints.pop()
    return tuple(hints)


def _may_match(match: Match, device: str) -> bool:
    if match.devices is not None and not any(fnmatchcase(device, name) for name in match.devices):
        return False
    return any(fnmatchcase(INITIAL, name) for name in match.netns or (INITIAL,))


def _covered(match: Match, *, native: bool) -> Iterator[Hint]:
    schemes = sum(bit for name, bit in SCHEMES.items() if match.schemes is None or name in match.schemes)
    spans = [(schemes, _ALL_ADDRESSES)] if match.addresses is None else [_span(schemes, span) for span in match.addresses]
    for (bits, addresses), ports in product(spans, match.ports or (_ALL_PORTS,)):
        if bits:
            yield Hint(bits, addresses, ports, native)


def _span(schemes: int, span: Span) -> tuple[int, range]:
    base = _MAPPED if span.version == 4 else 0
    return schemes & _VERSIONS[span.version], range(base + span.first, base + span.last + 1)


def pack_hints(hints: Iterable[Hint]) -> bytes:
    """The payload of VSO_HINTS."""
    packed = b""
    for hint in hints:
        packed += bytes(ffi.buffer(ffi.new("struct vso_hint *", {
            "first": hint.addresses[0].to_bytes(16), "last": hint.addresses[-1].to_bytes(16),
            "port_first": hint.ports[0], "port_last": hint.ports[-1], "schemes": hint.schemes,
            "verdict": lib.VSO_HINT_NATIVE if hint.native else lib.VSO_HINT_ASK,
        })))  # fmt: skip
    return packed
