"""What a rule could match, as ranges that C can look through: hints.py tells the driver of them, routes.py the engine.

A cover says less than a Match: it knows nothing of uids, and only TCP and UDP from the guest's initial namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, Final, TypeVar

from .._core import lib
from .policy import INITIAL, Match, Span

__all__ = ["ALL", "SCHEMES", "Cover", "covers_of", "cut", "fill", "may_match", "of_span"]

SCHEMES: Final = {"tcp": lib.VSO_HINT_TCP, "tcp6": lib.VSO_HINT_TCP6, "udp": lib.VSO_HINT_UDP, "udp6": lib.VSO_HINT_UDP6}
_VERSIONS: Final = {4: SCHEMES["tcp"] | SCHEMES["udp"], 6: SCHEMES["tcp6"] | SCHEMES["udp6"]}
T = TypeVar("T")
_MAPPED: Final = 0xFFFF << 32  # ::ffff:0:0, where IPv4 lies in IPv6


@dataclass(frozen=True, slots=True)
class Cover:
    """``schemes``: bits of SCHEMES. ``addresses``: 128-bit numbers, IPv4 mapped."""

    schemes: int
    addresses: range
    ports: range

    def meets(self, other: Cover) -> bool:
        """Whether some request is in both."""
        return bool(self.schemes & other.schemes) and all(
            a.start < b.stop and b.start < a.stop for a, b in ((self.addresses, other.addresses), (self.ports, other.ports))
        )


ALL: Final = Cover(sum(SCHEMES.values()), range(1 << 128), range(1 << 16))


def may_match(match: Match, device: str) -> bool:
    """Whether the rule is for this device's initial namespace at all."""
    if match.devices is not None and not any(fnmatchcase(device, name) for name in match.devices):
        return False
    return any(fnmatchcase(INITIAL, name) for name in match.netns or (INITIAL,))


def covers_of(match: Match) -> Iterator[Cover]:
    """Everything that the rule could match, whoever asks."""
    schemes = sum(bit for name, bit in SCHEMES.items() if match.schemes is None or name in match.schemes)
    spans = [ALL] if match.addresses is None else [of_span(span) for span in match.addresses]
    for span, ports in product(spans, match.ports or (ALL.ports,)):
        if bits := span.schemes & schemes:
            yield Cover(bits, span.addresses, ports)


def of_span(span: Span) -> Cover:
    """All that is at these addresses."""
    base = _MAPPED if span.version == 4 else 0
    return Cover(_VERSIONS[span.version], range(base + span.first, base + span.last + 1), ALL.ports)


def cut(entries: list[T], most: int, decides: Callable[[T], bool]) -> tuple[T, ...]:
    """As many as there may be; and since what none covers is asked, not those at the end that only say so."""
    del entries[most:]
    while entries and not decides(entries[-1]):
        entries.pop()
    return tuple(entries)


def fill(entry: Any, cover: Cover) -> None:
    """Set these members of a struct vso_hint or vse_route, which both have."""
    entry.first, entry.last = cover.addresses[0].to_bytes(16), cover.addresses[-1].to_bytes(16)
    entry.port_first, entry.port_last, entry.schemes = cover.ports[0], cover.ports[-1], cover.schemes
