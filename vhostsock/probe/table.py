# SPDX-License-Identifier: BSD-3-Clause
"""All checks, in the order in which they run."""

from __future__ import annotations

from . import answers, config, connections, formats, hostile_messages, hostile_rings, memory, negotiation, rings, state
from .check import Check

__all__ = ["CHECKS"]

CHECKS: tuple[Check, ...] = (
    *negotiation.CHECKS,
    *answers.CHECKS,
    *memory.CHECKS,
    *rings.CHECKS,
    *formats.CHECKS,
    *config.CHECKS,
    *state.CHECKS,
    *connections.CHECKS,
    *hostile_messages.CHECKS,
    *hostile_rings.CHECKS,
)
