# SPDX-License-Identifier: BSD-3-Clause
"""Requests that devices of known types understand, so that a check can see a ring work. A device type is a row of TRAFFIC.

A row's request is always the same kind, one without effect on the device: a read, a question, a frame to nobody. ``judge`` says
what is wrong with what came back, None when nothing is. What a device answers *beyond* that is not the probe's business.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["TRAFFIC", "Traffic"]


class Traffic(NamedTuple):
    """virtio_id: of virtio 1.3, 5; queues: that are set up; queue: that gets the requests; config_size: bytes that are read.

    request: number -> (device-readable buffers, sizes of the device-writable ones); judge: number, what the device wrote.
    feature_names: the device type's own bits (virtio 1.3, 5.x.3).
    """

    virtio_id: int
    queues: int
    queue: int
    config_size: int
    request: Callable[[int], tuple[list[bytes], list[int]]]
    judge: Callable[[int, bytes], str | None]
    feature_names: dict[int, str]


def _nothing_written(_number: int, data: bytes) -> str | None:
    return f"{len(data)} bytes were written, where there was nothing to write into" if data else None


# virtio 1.3, 5.1: an Ethernet frame behind the 12-byte header; an ARP question for an address that nobody has (RFC 5737)
def _frame(number: int) -> tuple[list[bytes], list[int]]:
    source = bytes([2, 0, 0, 0, 0, 1])
    arp = struct.pack(">HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, source, bytes([192, 0, 2, 1]), bytes(6), bytes([192, 0, 2, 99]))
    return [bytes(12), (b"\xff" * 6 + source + b"\x08\x06" + arp).ljust(60, b"\0")], []


# 5.2.6: type IN, sector 0; 512 bytes and the status
def _sector(number: int) -> tuple[list[bytes], list[int]]:
    return [struct.pack("<IIQ", 0, 0, 0)], [512, 1]


def _sector_read(_number: int, data: bytes) -> str | None:
    if len(data) != 513:
        return f"{len(data)} bytes were written, a sector and the status are 513"
    return f"status {data[-1]}" if data[-1] else None


def _line(number: int) -> tuple[list[bytes], list[int]]:
    return [b"line %d\n" % number], []


def _entropy(_number: int) -> tuple[list[bytes], list[int]]:
    return [], [64]


def _some_entropy(_number: int, data: bytes) -> str | None:
    return None if data else "no byte was written"


# 5.10.6: a packet for a connection that does not exist, from guest 3
def _packet(number: int) -> tuple[list[bytes], list[int]]:
    return [struct.pack("<QQIIIHHIII", 3, 2, 1024 + number % 60000, 9, 0, 1, 5, 0, 65536, 0)], []  # op RW, no payload


# the FUSE protocol: FUSE_STATFS of the root; any answer to this very request will do
def _statfs(number: int) -> tuple[list[bytes], list[int]]:
    return [struct.pack("<IIQQIIII", 40, 17, number + 1, 1, 0, 0, 0, 0)], [16 + 80]


def _fuse_answer(number: int, data: bytes) -> str | None:
    if len(data) < 16:
        return f"{len(data)} bytes were written, the header of an answer has 16"
    length, _, unique = struct.unpack_from("<IiQ", data)
    if unique != number + 1:
        return f"it is the answer to {unique}, not to {number + 1}"
    return None if length == len(data) else f"it says {length} bytes, {len(data)} were written"


def _text(number: int) -> tuple[list[bytes], list[int]]:
    return [b"request %06d" % number], [14]


def _same_text(number: int, data: bytes) -> str | None:
    return None if data == b"request %06d" % number else f"{data!r} came back"


_NET = {
    0: "CSUM", 1: "GUEST_CSUM", 2: "CTRL_GUEST_OFFLOADS", 3: "MTU", 5: "MAC", 7: "GUEST_TSO4", 8: "GUEST_TSO6", 9: "GUEST_ECN",
    10: "GUEST_UFO", 11: "HOST_TSO4", 12: "HOST_TSO6", 13: "HOST_ECN", 14: "HOST_UFO", 15: "MRG_RXBUF", 16: "STATUS",
    17: "CTRL_VQ", 18: "CTRL_RX", 19: "CTRL_VLAN", 21: "GUEST_ANNOUNCE", 22: "MQ", 23: "CTRL_MAC_ADDR", 50: "DEVICE_STATS",
    51: "HASH_TUNNEL", 52: "VQ_NOTF_COAL", 53: "NOTF_COAL", 54: "GUEST_USO4", 55: "GUEST_USO6", 56: "HOST_USO",
    57: "HASH_REPORT", 59: "GUEST_HDRLEN", 60: "RSS", 61: "RSC_EXT", 62: "STANDBY", 63: "SPEED_DUPLEX",
}  # fmt: skip
_BLK = {
    1: "SIZE_MAX", 2: "SEG_MAX", 4: "GEOMETRY", 5: "RO", 6: "BLK_SIZE", 9: "FLUSH", 10: "TOPOLOGY", 11: "CONFIG_WCE", 12: "MQ",
    13: "DISCARD", 14: "WRITE_ZEROES", 15: "LIFETIME", 16: "SECURE_ERASE", 17: "ZONED",
}  # fmt: skip

TRAFFIC = {
    "net": Traffic(1, 2, 1, 12, _frame, _nothing_written, _NET),
    "blk": Traffic(2, 1, 0, 60, _sector, _sector_read, _BLK),
    "console": Traffic(3, 2, 1, 12, _line, _nothing_written, {0: "SIZE", 1: "MULTIPORT", 2: "EMERG_WRITE"}),
    "rng": Traffic(4, 1, 0, 0, _entropy, _some_entropy, {}),
    "vsock": Traffic(19, 2, 1, 8, _packet, _nothing_written, {0: "STREAM", 1: "SEQPACKET", 2: "NO_IMPLIED_STREAM"}),
    "fs": Traffic(26, 2, 1, 40, _statfs, _fuse_answer, {0: "NOTIFICATION"}),
    "echo": Traffic(39, 1, 0, 4, _text, _same_text, {}),
}
