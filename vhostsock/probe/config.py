# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the config space."""

from __future__ import annotations

from ..proto import ProtocolFeature, Request, wire
from ..testing.frontend import BackendGone, Refused
from .check import Check, NotApplicable, Probe
from .connection import Failed

__all__ = ["CHECKS"]

P = ProtocolFeature


async def as_much_of_the_config_space_comes_as_was_asked_for(probe: Probe) -> None:
    """The reply to GET_CONFIG has the offset and the size of the request, and as many bytes."""
    connection = await probe.negotiated()
    size = probe.traffic.config_size or 4
    value = {"offset": 0, "size": size, "flags": 0, "data": bytes(size)}
    try:
        answer = await connection.request(Request.GET_CONFIG, wire.CONFIG, value, reply=wire.CONFIG)
    except Refused:
        raise Failed(f"GET_CONFIG of the {size} bytes that this device type has was refused") from None
    if (answer.offset, answer.size) != (0, size):
        raise Failed(f"asked for {size} bytes at 0, answered for {answer.size} at {answer.offset}")


async def a_part_of_the_config_space_is_that_part(probe: Probe) -> None:
    """GET_CONFIG from an offset on gives what the whole has there."""
    connection = await probe.negotiated()
    size = probe.traffic.config_size
    if size < 2:
        raise NotApplicable("this device type has no config space")
    whole = await connection.read_config(0, size)
    for offset in range(1, size):
        try:
            part = await connection.read_config(offset, size - offset)
        except Refused:
            raise NotApplicable(f"it refuses to read from offset {offset} on") from None
        if part != whole[offset:]:
            raise Failed(f"from offset {offset} on {part.hex()} was read, the whole is {whole.hex()}")


async def config_reads_outside_of_all_bounds_fail(probe: Probe) -> None:
    """GET_CONFIG from an offset that no config space has: an empty reply, or the end of the connection."""
    connection = await probe.negotiated()
    value = {"offset": 0xFFFF_FFF0, "size": 64, "flags": 0, "data": bytes(64)}
    try:
        answer = await connection.request(Request.GET_CONFIG, wire.CONFIG, value, reply=wire.CONFIG)
    except (Refused, BackendGone):
        return
    raise Failed(f"64 bytes at offset 0xfffffff0 were read: {bytes(answer.data).hex()}")


_CONFIG = "GET_CONFIG"
CHECKS = (
    Check(as_much_of_the_config_space_comes_as_was_asked_for, _CONFIG, P.CONFIG, traffic=True),
    Check(a_part_of_the_config_space_is_that_part, _CONFIG, P.CONFIG, traffic=True),
    Check(config_reads_outside_of_all_bounds_fail, _CONFIG, P.CONFIG),
)
