# SPDX-License-Identifier: BSD-3-Clause
"""Writes docs/protocol-support.md: ``python -m tests.data.protocol_support``.

What vhostsock does is read from its own tables (offers.py, proto/messages.py). What others do are facts that somebody
read in their source, at the version that heads the column; a cell that nobody looked up stays empty.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from pathlib import Path

from vhostsock.offers import OFFERS
from vhostsock.proto import ProtocolFeature, Request, VirtioFeature, messages, wire
from vhostsock.proto.features import DEVICE_FEATURES, NEVER_OFFERED, names
from vhostsock.proto.messages import Row

__all__ = ["BACKEND_MESSAGES", "FACTS", "FRONTEND", "PAGE", "QEMU", "SESSION", "WHY_NOT", "page", "traces_with"]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "protocol-support.md"

# "Back-end message types" of the vhost-user document of QEMU 11.1
BACKEND_MESSAGES = {
    1: "IOTLB_MSG", 2: "CONFIG_CHANGE_MSG", 3: "VRING_HOST_NOTIFIER_MSG", 4: "VRING_CALL", 5: "VRING_ERR",
    6: "SHARED_OBJECT_ADD", 7: "SHARED_OBJECT_REMOVE", 8: "SHARED_OBJECT_LOOKUP", 9: "SHMEM_MAP", 10: "SHMEM_UNMAP",
}  # fmt: skip

OTHERS = ("libvhost-user (QEMU 10.2)", "rust-vmm (vhost-user-backend 0.22)", "DPDK (26.11-rc0)", "SPDK (August 2026)")
FACTS: dict[enum.IntFlag, tuple[str, str, str, str]] = {
    ProtocolFeature.LOG_SHMFD: ("yes", "yes", "yes", "yes"),
    ProtocolFeature.PAGEFAULT: ("yes", "build option", "by a flag", "no"),
    ProtocolFeature.CONFIG: ("by callbacks", "yes", "opt-in", "blk"),
    ProtocolFeature.INFLIGHT_SHMFD: ("split only", "no (a stub)", "split and packed, opt-in", "yes"),
    ProtocolFeature.RESET_DEVICE: ("no", "yes", "no", "no"),
    ProtocolFeature.INBAND_NOTIFICATIONS: ("opt-in", "no", "no", "no"),
    ProtocolFeature.CONFIGURE_MEM_SLOTS: ("509 slots", "yes", "8 slots", "through DPDK"),
    ProtocolFeature.STATUS: ("no", "no", "yes", "yes"),
    ProtocolFeature.DEVICE_STATE: ("no", "yes", "no", "no"),
    ProtocolFeature.SHMEM_MAP: ("", "yes", "no", "no"),
    VirtioFeature.EVENT_IDX: ("yes", "yes", "yes", "disabled"),
    VirtioFeature.ACCESS_PLATFORM: ("no", "no", "by a flag", "no"),
    VirtioFeature.RING_PACKED: ("no", "no", "yes", "blk, opt-in"),
}

# What is not offered or served, by what it belongs to, and why
WHY_NOT: dict[str, str] = {
    "CROSS_ENDIAN, SET_VRING_ENDIAN": "for legacy devices of the other byte order; rings here are little-endian, as VERSION_1"
    " has it",
    "CRYPTO_SESSION, CREATE_CRYPTO_SESSION, CLOSE_CRYPTO_SESSION": "for crypto devices, of which there is none here",
    "GPU_SET_SOCKET": "for display devices, which have a protocol of their own behind it",
    "HOST_NOTIFIER, VRING_HOST_NOTIFIER_MSG": "gives the guest a page of real hardware to ring; a device in software has none",
    "XEN_MMAP": "for Xen; QEMU takes the bit when it is offered, and sends memory regions without it",
    "NOTIFICATION_DATA, NOTIF_CONFIG_DATA": "a kick through an eventfd carries no data",
    "RING_RESET": "no message tells a back-end that one ring was reset",
    "SR_IOV, ADMIN_VQ, ORDER_PLATFORM": "properties of a device on a real bus",
    "NOTIFY_ON_EMPTY, ANY_LAYOUT": "for legacy drivers",
}

# What each message was proven with; tests/repo holds these lists to what is there.
# SESSION: fed to the session alone, also in wrong ways (tests/protocol). FRONTEND: sent to a device by vhostsock.testing
# (tests/device).
# QEMU: sent by a real one to a device of ours in the end-to-end tests, as their recordings have it.
SESSION = [
    "GET_FEATURES", "SET_FEATURES", "SET_OWNER", "RESET_OWNER", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES",
    "SET_BACKEND_REQ_FD", "GET_QUEUE_NUM", "GET_CONFIG", "SET_CONFIG", "SET_STATUS", "GET_STATUS", "RESET_DEVICE",
    "SET_MEM_TABLE", "GET_MAX_MEM_SLOTS", "REM_MEM_REG", "SET_VRING_NUM", "SET_VRING_ADDR", "GET_VRING_BASE",
    "SET_VRING_KICK", "SET_VRING_CALL",
]  # fmt: skip
FRONTEND = [
    "GET_FEATURES", "SET_FEATURES", "SET_OWNER", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "SET_BACKEND_REQ_FD",
    "GET_QUEUE_NUM", "GET_CONFIG", "SET_CONFIG", "SET_STATUS", "GET_STATUS", "RESET_DEVICE", "SET_MEM_TABLE",
    "GET_MAX_MEM_SLOTS", "ADD_MEM_REG", "REM_MEM_REG", "SET_LOG_FD", "SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_BASE",
    "GET_VRING_BASE", "SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR", "SET_VRING_ENABLE", "VRING_KICK",
    "GET_INFLIGHT_FD", "SET_INFLIGHT_FD", "SEND_RARP", "NET_SET_MTU", "IOTLB_MSG", "GET_SHARED_OBJECT", "GET_SHMEM_CONFIG",
    "SET_DEVICE_STATE_FD", "CHECK_DEVICE_STATE", "POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END",
]  # fmt: skip
QEMU_7_2 = [
    "ADD_MEM_REG", "GET_FEATURES", "GET_MAX_MEM_SLOTS", "GET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "GET_STATUS",
    "GET_VRING_BASE", "SET_BACKEND_REQ_FD", "SET_FEATURES", "SET_OWNER", "SET_PROTOCOL_FEATURES", "SET_STATUS",
    "SET_VRING_ADDR", "SET_VRING_BASE", "SET_VRING_CALL", "SET_VRING_ENABLE", "SET_VRING_ERR", "SET_VRING_KICK",
    "SET_VRING_NUM",
]  # fmt: skip
QEMU_11_1 = [
    *QEMU_7_2,
    "CHECK_DEVICE_STATE", "GET_CONFIG", "GET_INFLIGHT_FD", "GET_SHMEM_CONFIG", "IOTLB_MSG", "POSTCOPY_ADVISE", "POSTCOPY_END",
    "POSTCOPY_LISTEN", "RESET_DEVICE", "SET_DEVICE_STATE_FD", "SET_INFLIGHT_FD",
]  # fmt: skip
QEMU = {"7.2": QEMU_7_2, "11.1": QEMU_11_1}

_FDS = {
    messages.no_fds: "",
    messages.one_fd: "1",
    messages.unused_fd: "0 or 1",
    messages.fd_unless_nofd: "1, or 0 with nofd",
    messages.fd_per_region: "1 per region",
}
_WHEN = {
    messages.ANY: "any time",
    messages.NEGOTIATED: "after SET_FEATURES",
    messages.STOPPED: "while no ring is started",
}

_TEXT = """\
# What of vhost-user is supported

Generated by `python -m tests.data.protocol_support` from the tables that the library itself works by; a test fails when it is
stale. Messages and bits are those of the vhost-user document of QEMU 11.1.

## Messages of the front-end

A message that is not served ends the session with an error that names it. Front-ends do not send it, since what it belongs to
was not offered.

{requests}

"Ack" means: only if the front-end asks for one (`need_reply`) and REPLY_ACK was negotiated.

## Messages to the front-end

On the channel that SET_BACKEND_REQ_FD opens.

{backend_requests}

## Protocol features

*Always* is offered by every device, *for ...* by one whose class says so. *Never*: QEMU takes these when they are offered and
does not implement them.

{protocol_features}

## Ring features

Bits of the virtio feature word that are not a device type's own: those (bits {device_bits}) are the device's to offer.

{ring_features}

## What is missing, and why

{why_not}

## What each message was proven with

*Session*: the protocol's state machine alone is fed with it in tests/protocol, also in wrong ways. *Front-end*: the front-end
of `vhostsock.testing` sends it to a device in tests/device. *Traces*: how many recorded sessions in tests/data/traces (of
QEMU and DPDK, with other back-ends) have it and are replayed. *QEMU*: versions that were seen to send it to a device of this
project in an end-to-end test.

{proofs}

## The other back-ends

Their columns hold what their source says at the version named, for those bits that were looked up. An empty cell means that
nobody did, not that it is missing. ACCESS_PLATFORM stands for IOTLB messages, without which it cannot work.
"""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines)


def _request(request: Request, row: Row | None) -> tuple[str, ...]:
    if row is None:
        return str(request.value), request.name, "no", "", "", "", ""
    needs = " | ".join(names(bits) for bits in (row.needs, row.driver) if bits)
    reply = "ack" if row.reply is None else "its own"
    return str(request.value), request.name, "yes", needs, _WHEN[row.phases], _FDS[row.fds], reply


def traces_with(name: str) -> int:
    """How many recorded sessions have the message."""
    return sum(f" -> {name} " in path.read_text() for path in (ROOT / "tests/data/traces").glob("*.txt"))


def _proof(name: str) -> tuple[str, ...]:
    seen = ", ".join(version for version, names in QEMU.items() if name in names)
    return name, "yes" if name in SESSION else "", "yes" if name in FRONTEND else "", str(traces_with(name) or ""), seen


def _bit(bit: enum.IntFlag, ours: str) -> tuple[str, ...]:
    assert bit.name
    return str(bit.bit_length() - 1), bit.name, ours, *FACTS.get(bit, ("",) * len(OTHERS))


def _ours(bit: ProtocolFeature | VirtioFeature) -> str:
    """Who gets the bit: ``"always"``, ``"for packed = True"``, ``"no"``, or ``"never"``."""
    if isinstance(bit, ProtocolFeature) and bit in NEVER_OFFERED:
        return "never"
    said = [o.says for o in OFFERS if bit & (o.protocol if isinstance(bit, ProtocolFeature) else o.virtio)]
    if "" in said:
        return "always"
    return "for " + " or ".join(f"`{says}`" for says in said) if said else "no"


def _ranges(bits: int) -> str:
    """``"0 to 23, 50 to 63"``"""
    found: list[list[int]] = []
    for n in range(bits.bit_length()):
        if bits >> n & 1:
            if found and found[-1][1] == n - 1:
                found[-1][1] = n
            else:
                found.append([n, n])
    return ", ".join(f"{low} to {high}" for low, high in found)


def page() -> str:
    """The text that docs/protocol-support.md must have."""
    bits = ("bit", "name", "vhostsock", *OTHERS)
    return _TEXT.format(
        requests=_table(
            ("id", "message", "served", "needs", "when", "descriptors", "reply"),
            (_request(request, messages.TABLE.get(request)) for request in Request),
        ),
        backend_requests=_table(
            ("id", "message", "sent"),
            (
                (str(number), name, "yes" if number in wire.BackendRequest._value2member_map_ else "no")
                for number, name in BACKEND_MESSAGES.items()
            ),
        ),
        protocol_features=_table(bits, (_bit(bit, _ours(bit)) for bit in ProtocolFeature)),
        ring_features=_table(bits, (_bit(bit, _ours(bit)) for bit in VirtioFeature)),
        why_not="\n".join(f"- {what}: {why}." for what, why in WHY_NOT.items()),
        proofs=_table(
            ("message", "session", "front-end", "traces", "QEMU"),
            (_proof(request.name) for request in Request if request in messages.TABLE),
        ),
        device_bits=_ranges(DEVICE_FEATURES),
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
