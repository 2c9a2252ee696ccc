"""What the engine may connect without asking: the rules that offload a stream directly, as a table (csrc/engine/vs_route.c).

As hints.py does for the driver, and with the same care: the first entry that covers a request decides, as the first rule does.
A rule becomes DIAL where all that the engine does is what the direct handler would; where it says more (a uid, another handler,
a target that depends on what is asked for), or something else than offload, it becomes ASK for all that it could match. A
special range that the rule does not name is ASK before it. What no entry covers is asked, so a table that is too long is cut.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .._core import ffi, lib
from .covers import Cover, covers_of, cut, fill, may_match, of_span
from .policy import INITIAL, SPECIAL, Policy, Rule
from .uri import InetURI, URIError

__all__ = ["Route", "pack_routes", "routes_of"]

_AF_INET: Final = socket.AF_INET.to_bytes(2, sys.byteorder)  # how a sockaddr of IPv4 begins
_SCHEME: Final = {4: lib.VSO_HINT_TCP, 6: lib.VSO_HINT_TCP6}


@dataclass(frozen=True, slots=True)
class Route:
    """``dial``: else ask. ``target``: a sockaddr, empty for what is asked. ``rule``: its index in Policy.rules."""

    cover: Cover
    dial: bool
    target: bytes = b""
    rule: int = 0


def routes_of(policy: Policy, device: str) -> tuple[Route, ...]:
    """The routes for the guest of ``device``."""
    if policy.hairpin and policy.hairpin.netns == INITIAL:
        return ()
    routes: list[Route] = []
    for index, rule in enumerate(policy.rules):
        if may_match(rule.match, device):
            routes += _routes(rule, index, device)
    return cut(routes, lib.VSE_ROUTES_MAX, lambda route: route.dial)


def _routes(rule: Rule, index: int, device: str) -> Iterator[Route]:
    covers = [
        Cover(scheme, cover.addresses, cover.ports)
        for cover in covers_of(rule.match) for scheme in _SCHEME.values() if cover.schemes & scheme
    ]  # fmt: skip
    target = _target(rule, device) if _is_direct(rule) else None
    if target is None:
        yield from (Route(cover, dial=False) for cover in covers)
        return
    for special, _ in SPECIAL:
        named = any(span.inside(special) for span in rule.match.addresses or ())
        if not named and any(cover.meets(of_span(special)) for cover in covers):
            yield Route(of_span(special), dial=False)
    for cover in covers:
        if target == b"":
            yield Route(cover, dial=True, rule=index)
        else:
            # a socket of the other family has no name that the guest's could show: Python makes one up
            same = cover.schemes == _SCHEME[4 if target[:2] == _AF_INET else 6]
            yield Route(cover, same, target if same else b"", index)


def _is_direct(rule: Rule) -> bool:
    return rule.action == "offload" and rule.handler == "direct" and rule.match.uids is None


def _target(rule: Rule, device: str) -> bytes | None:
    """The sockaddr, empty for the one that is asked for, None when only Python can tell."""
    if rule.rewrite is None:
        return b""
    try:
        target = rule.rewrite.fixed(device)
        return target.sockaddr() if isinstance(target, InetURI) and target.transport == "tcp" else None
    except (URIError, OSError):
        return None


def pack_routes(routes: Sequence[Route]) -> Any:
    """``struct vse_route[]``, for as long as it is kept."""
    packed = ffi.new("struct vse_route[]", len(routes))
    for entry, route in zip(packed, routes, strict=True):
        fill(entry, route.cover)
        entry.dial, entry.rule = route.dial, route.rule
        entry.target_len = len(route.target)
        ffi.memmove(entry.target, route.target, len(route.target))
    return packed
