# SPDX-License-Identifier: BSD-3-Clause
"""The header in front of every packet of a network device (virtio 1.3, 5.1.6), and what of it may be believed.

    flags u8, gso_type u8, hdr_len u16, gso_size u16, csum_start u16, csum_offset u16, num_buffers u16        little-endian

The driver's header says where in the packet a checksum belongs and how to cut the packet up. Each of these numbers is the
guest's, and has led others out of their buffers (CVE-2024-11614): `check` refuses what does not lie in the packet, or what was
not negotiated, before anything is done with it. ``num_buffers`` is there with VERSION_1 or MRG_RXBUF and means something only
towards the driver.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from ..errors import RequestError

__all__ = ["CSUM_FIELD", "GSO_FEATURES", "HEADER_SIZE", "LEGACY_HEADER_SIZE", "PLAIN", "Gso", "Header", "NetFeature", "check",
           "finish_checksum", "needs_checksum"]  # fmt: skip

_HEADER = struct.Struct("<BBHHHH")
LEGACY_HEADER_SIZE = _HEADER.size  # of a driver with neither VERSION_1 nor MRG_RXBUF
HEADER_SIZE = LEGACY_HEADER_SIZE + 2
CSUM_FIELD = 2  # bytes of a checksum in a packet

NEEDS_CSUM = 1
DATA_VALID = 2
GSO_ECN = 0x80


class NetFeature(enum.IntFlag):
    """Feature bits of a network device (virtio 1.3, 5.1.3) that this one can offer. HOST_*: from the guest, GUEST_*: to it."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    MQ = 1 << 22


class Gso(enum.IntEnum):
    """How a packet is to be segmented."""

    NONE = 0
    TCPV4 = 1
    TCPV6 = 4


GSO_FEATURES = {Gso.TCPV4: NetFeature.HOST_TSO4, Gso.TCPV6: NetFeature.HOST_TSO6}


class Header(NamedTuple):
    """One packet's header without num_buffers. Sizes and places in bytes, from the start of the packet."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    @classmethod
    def parse(cls, data: bytes) -> Header:
        return cls(*_HEADER.unpack_from(data))

    def pack(self) -> bytes:
        """10 bytes."""
        return _HEADER.pack(*self)


PLAIN = Header().pack()


def needs_checksum(header: Header) -> bool:
    return bool(header.flags & NEEDS_CSUM)


def check(header: Header, size: int, acked: int) -> None:
    """RequestError unless a packet of ``size`` bytes may have this header from a driver that acked these features.

    virtio 1.3, 5.1.6.2: the driver's duties, and the device need not take a packet that breaks them.
    """
    if header.flags & NEEDS_CSUM:
        if not acked & NetFeature.CSUM:
            raise RequestError("a checksum is left to the device although CSUM was not negotiated")
        if header.csum_start + header.csum_offset + CSUM_FIELD > size:
            where = f"csum_start {header.csum_start}, csum_offset {header.csum_offset}"
            raise RequestError(f"{where}: the checksum of a packet of {size} bytes would lie behind it")
    if header.gso_type == Gso.NONE:
        return
    kind = header.gso_type & ~GSO_ECN
    wanted = GSO_FEATURES.get(Gso(kind)) if kind in GSO_FEATURES else None
    if wanted is None or not acked & wanted or header.gso_type & GSO_ECN:  # HOST_ECN is never offered
        raise RequestError(f"gso_type {header.gso_type:#x} was not negotiated")
    if not header.flags & NEEDS_CSUM:
        raise RequestError(f"gso_type {header.gso_type:#x} without a checksum to be computed")
    if not header.gso_size:
        raise RequestError(f"gso_type {header.gso_type:#x} with segments of no size")
    if header.hdr_len > size:  # a hint, but one that reaches behind the packet is no honest one
        raise RequestError(f"hdr_len {header.hdr_len} of a packet of {size} bytes")


def finish_checksum(header: Header, frame: bytes) -> bytes:
    """The packet with the checksum in it that ``header`` leaves to the device; `check` has been passed.

    The driver has put the sum over the pseudo header in the checksum's place (5.1.6.2), so the sum over all is the answer.
    """
    start = header.csum_start
    at = start + header.csum_offset
    part = frame[start:] + b"\0" * (len(frame) - start & 1)
    total = sum(struct.unpack(f">{len(part) // 2}H", part))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    value = ~total & 0xFFFF or 0xFFFF  # 0 would mean "no checksum" to UDP; the two are the same number
    return frame[:at] + value.to_bytes(CSUM_FIELD, "big") + frame[at + CSUM_FIELD :]
