# SPDX-License-Identifier: BSD-3-Clause
"""What a back-end offers: bits by the names of the specifications, queues, memory slots, the config space."""

from __future__ import annotations

import dataclasses

from ..proto import ProtocolFeature, Request, VirtioFeature, wire
from ..testing.frontend import Refused
from .connection import Connection
from .traffic import Traffic

__all__ = ["Offer", "discover"]

_ASKED = ProtocolFeature.MQ | ProtocolFeature.CONFIG | ProtocolFeature.CONFIGURE_MEM_SLOTS


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """queues, slots, config: None where the back-end has no message for it. config: what was read; empty: it refused."""

    features: VirtioFeature
    protocol: ProtocolFeature
    queues: int | None = None
    slots: int | None = None
    config: bytes | None = None

    def lines(self, traffic: Traffic | None) -> list[str]:
        """For people, a subject a line."""
        own = traffic.feature_names if traffic else {}
        virtio = [own.get(bit) or VirtioFeature(1 << bit).name or f"bit {bit}" for bit in _bits(self.features)]
        protocol = [ProtocolFeature(1 << bit).name or f"bit {bit}" for bit in _bits(self.protocol)]
        lines = [
            f"virtio features    {int(self.features):#x} = {' '.join(virtio) or 'none'}",
            f"protocol features  {int(self.protocol):#x} = {' '.join(protocol) or 'none'}",
            f"queues             {self.queues if self.queues is not None else 'not told (no MQ)'}",
            f"memory slots       {self.slots if self.slots is not None else 'not told (no CONFIGURE_MEM_SLOTS)'}",
        ]
        if self.config is not None:
            lines.append(f"config space       {self.config.hex(' ', -4) or 'refused'}")
        return lines


def _bits(value: int) -> list[int]:
    return [bit for bit in range(int(value).bit_length()) if int(value) >> bit & 1]


async def discover(connection: Connection, config_size: int) -> Offer:
    """Ask a back-end that nobody has spoken to yet. config_size: bytes of the config space to read, 0: none."""
    features = VirtioFeature(await connection.get_u64(Request.GET_FEATURES))
    if not features & VirtioFeature.PROTOCOL_FEATURES:
        return Offer(features, ProtocolFeature(0))
    protocol = ProtocolFeature(await connection.get_u64(Request.GET_PROTOCOL_FEATURES))
    await connection.request(Request.SET_PROTOCOL_FEATURES, wire.U64, protocol & _ASKED)
    queues = slots = config = None
    if protocol & ProtocolFeature.MQ:
        queues = await connection.get_u64(Request.GET_QUEUE_NUM)
    if protocol & ProtocolFeature.CONFIGURE_MEM_SLOTS:
        slots = await connection.get_u64(Request.GET_MAX_MEM_SLOTS)
    if protocol & ProtocolFeature.CONFIG and config_size:
        try:
            config = await connection.read_config(0, config_size)
        except Refused:
            config = b""
    return Offer(features, protocol, queues, slots, config)
