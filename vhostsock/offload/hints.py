"""What a driver may know beforehand: destinations that the policy leaves native, so that a connect to one costs no round trip.

A hint is a conservative summary of the ordered rules (VSO_HINTS, docs/offload-abi.md). The first that covers a request decides,
as the first rule does: a rule that says native to everybody becomes NATIVE, every other rule that could match becomes ASK for
all that it could match, and the default, if it is native, covers the rest. What a rule says of a uid the driver does not weigh,
so that rule is ASK; hints are for the initial namespace, so rules for others alone are left out. Where the table is too long it
is cut, and what no hint covers is asked: a hint may say ASK where the policy would say native, never the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .._core import ffi, lib
from .covers import ALL, Cover, covers_of, cut, fill, may_match
from .policy import INITIAL, Policy

__all__ = ["Hint", "hints_of", "pack_hints"]


@dataclass(frozen=True, slots=True)
class Hint:
    """``native``: else ask."""

    cover: Cover
    native: bool


def hints_of(policy: Policy, device: str) -> tuple[Hint, ...]:
    """The hints for the guest of ``device``; none when the policy wants to be asked about everything."""
    if not policy.hints or (policy.hairpin and policy.hairpin.netns == INITIAL):
        return ()
    hints: list[Hint] = []
    for rule in policy.rules:
        if may_match(rule.match, device):
            native = rule.action == "native" and rule.match.uids is None
            hints += (Hint(cover, native) for cover in covers_of(rule.match))
    if policy.default == "native":
        hints.append(Hint(ALL, native=True))
    return cut(hints, lib.VSO_HINTS_MAX, lambda hint: hint.native)


def pack_hints(hints: Iterable[Hint]) -> bytes:
    """The payload of VSO_HINTS."""
    packed = b""
    for hint in hints:
        entry = ffi.new("struct vso_hint *")
        fill(entry, hint.cover)
        entry.verdict = lib.VSO_HINT_NATIVE if hint.native else lib.VSO_HINT_ASK
        packed += bytes(ffi.buffer(entry))
    return packed
