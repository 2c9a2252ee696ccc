# SPDX-License-Identifier: BSD-3-Clause
"""The message table: for every front-end message that is served, what is on the wire and when it is allowed.

A new message is a row here, a payload in wire.py, an event in events.py if the device's owner must act, and a test file. The
session reads the columns and has no branch of its own for any message:

- payload   construct of the body, None for an empty one
- event     what the owner is asked to do; None: the session answers alone (session.LOCAL says how)
- reply     construct of the message's own reply; None: an ack where need_reply asks for one, never both
- fds       how many descriptors come with it, judged by the payload
- needs     protocol feature that must be acked before
- phases    when the message is legal (see Phase)
- ring      its payload's ``index`` names a ring, to be checked against the number of queues
- driver    virtio features that must be offered (a driver that is reset has acked none, and its old IOTLB entries still go)
- forced    need_reply counts even without REPLY_ACK (QEMU sets it there and waits)
- listening the reply instead of the usual one while postcopy listens; then the message with 8 zero bytes and no descriptors is
            the front-end's word that it took the replies in
- trailing  bytes after what the payload needs are accepted (there are front-ends that send 72 bytes for one region)
- refusal   the reply that says "I could not", for a message that has its own; None: there is none, the session ends
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

from construct import Construct

from . import events, wire
from .features import ProtocolFeature, VirtioFeature
from .wire import BackendRequest, Request

__all__ = ["BACKEND_TABLE", "TABLE", "BackendRow", "Phase", "Row"]

FdRule = Callable[[Any], tuple[int, int]]  # payload -> least, most


class Phase(enum.Flag):
    """Where a session stands. It starts in NEGOTIATING, and RESET_DEVICE takes it back there.

    NEGOTIATING  no SET_FEATURES yet. QEMU already passes CALL and ERR fds here, and DPDK after a reconnect ENABLE 0 and
                 GET_VRING_BASE: what only stores a value is harmless.
    IDLE         features are acked and no ring is started (SET_VRING_KICK starts one, GET_VRING_BASE stops it).
    RUNNING      at least one ring is started.
    """

    NEGOTIATING = enum.auto()
    IDLE = enum.auto()
    RUNNING = enum.auto()


NO_FEATURE = ProtocolFeature(0)
NO_DRIVER_FEATURE = VirtioFeature(0)

ANY = Phase.NEGOTIATING | Phase.IDLE | Phase.RUNNING
NEGOTIATED = Phase.IDLE | Phase.RUNNING
STOPPED = Phase.NEGOTIATING | Phase.IDLE


def no_fds(_payload: Any) -> tuple[int, int]:
    return 0, 0


def one_fd(_payload: Any) -> tuple[int, int]:
    return 1, 1


def unused_fd(_payload: Any) -> tuple[int, int]:
    """The document allows one that has no meaning (REM_MEM_REG of older front-ends); it is closed."""
    return 0, 1


def fd_unless_nofd(payload: Any) -> tuple[int, int]:
    return (0, 0) if payload["nofd"] else (1, 1)


def fd_per_region(payload: Any) -> tuple[int, int]:
    return payload["n"], payload["n"]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    request: Request
    payload: Construct | None = None
    event: type[events.Event] | None = None
    reply: Construct | None = None
    fds: FdRule = no_fds
    needs: ProtocolFeature = NO_FEATURE
    driver: VirtioFeature = NO_DRIVER_FEATURE
    phases: Phase = ANY
    ring: bool = False
    forced: bool = False
    listening: Construct | None = None
    trailing: bool = False
    refusal: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class BackendRow:
    """A message on the back-end channel: its payload, its own reply (None: an ack), how many descriptors it takes along, how
    many its reply brings at most, and the protocol features that must be acked beside BACKEND_REQ."""

    request: BackendRequest
    payload: Construct | None = None
    reply: Construct | None = None
    fds: int = 0
    reply_fds: int = 0
    needs: ProtocolFeature = NO_FEATURE


_R, _P, _B = Request, ProtocolFeature, BackendRequest
_FAILED = bytes(wire.U64.build(1))

_ROWS = (
    # the two ends
    Row(_R.GET_FEATURES, reply=wire.U64),
    Row(_R.SET_FEATURES, wire.U64, events.FeaturesSet),
    Row(_R.SET_OWNER),
    Row(_R.RESET_OWNER),  # deprecated; the document: ignore it
    Row(_R.GET_PROTOCOL_FEATURES, reply=wire.U64),
    Row(_R.SET_PROTOCOL_FEATURES, wire.U64, phases=STOPPED),
    Row(_R.SET_BACKEND_REQ_FD, None, events.BackendChannel, fds=one_fd, needs=_P.BACKEND_REQ),
    # the device
    Row(_R.GET_QUEUE_NUM, reply=wire.U64, needs=_P.MQ),
    Row(_R.GET_CONFIG, wire.CONFIG, events.ConfigRead, wire.CONFIG, needs=_P.CONFIG, refusal=b""),
    Row(_R.SET_CONFIG, wire.CONFIG, events.ConfigWrite, needs=_P.CONFIG),
    Row(_R.SET_STATUS, wire.U64, needs=_P.STATUS),
    Row(_R.GET_STATUS, reply=wire.U64, needs=_P.STATUS),
    # no needs: QEMU 11.1 sends it as the first message to a back-end that came back (q11-vsock-qemuserver-reconnect)
    Row(_R.RESET_DEVICE, None, events.DeviceReset),
    # memory
    Row(_R.SET_MEM_TABLE, wire.MEM_TABLE, events.MemoryTable, fds=fd_per_region, trailing=True, listening=wire.MEM_TABLE),
    Row(_R.GET_MAX_MEM_SLOTS, reply=wire.U64, needs=_P.CONFIGURE_MEM_SLOTS),
    Row(
        _R.ADD_MEM_REG, wire.MEM_REGION, events.AddRegion,
        fds=one_fd, needs=_P.CONFIGURE_MEM_SLOTS, listening=wire.MEM_REGION,
    ),
    Row(_R.REM_MEM_REG, wire.MEM_REGION, events.RemoveRegion, fds=unused_fd, needs=_P.CONFIGURE_MEM_SLOTS),
    Row(_R.SET_LOG_BASE, wire.LOG, events.LogBase, wire.U64, fds=one_fd, needs=_P.LOG_SHMFD),
    Row(_R.SET_LOG_FD, None, events.LogFd, fds=one_fd, needs=_P.LOG_SHMFD),
    # rings
    Row(_R.SET_VRING_NUM, wire.VRING_STATE, events.VringNum, ring=True),
    Row(_R.SET_VRING_ADDR, wire.ADDRESS, events.VringAddress, ring=True),
    Row(_R.SET_VRING_BASE, wire.VRING_STATE, events.VringBase, ring=True),
    Row(_R.GET_VRING_BASE, wire.VRING_STATE, events.VringStop, wire.VRING_STATE, ring=True),
    Row(_R.SET_VRING_KICK, wire.VRING_FD, events.VringKick, fds=fd_unless_nofd, phases=NEGOTIATED, ring=True),
    Row(_R.SET_VRING_CALL, wire.VRING_FD, events.VringCall, fds=fd_unless_nofd, ring=True),
    Row(_R.SET_VRING_ERR, wire.VRING_FD, events.VringErr, fds=fd_unless_nofd, ring=True),
    Row(_R.SET_VRING_ENABLE, wire.VRING_STATE, events.VringEnable, ring=True),
    Row(
        _R.VRING_KICK, wire.VRING_STATE, events.VringInbandKick, needs=_P.INBAND_NOTIFICATIONS, phases=NEGOTIATED, ring=True,
    ),
    # the layout depends on the features; size 0 in the reply says that there is none
    Row(
        _R.GET_INFLIGHT_FD, wire.INFLIGHT, events.InflightGet, wire.INFLIGHT,
        needs=_P.INFLIGHT_SHMFD, phases=NEGOTIATED, refusal=bytes(24),
    ),
    Row(_R.SET_INFLIGHT_FD, wire.INFLIGHT, events.InflightSet, fds=one_fd, needs=_P.INFLIGHT_SHMFD, phases=STOPPED),
    # network devices
    Row(_R.SEND_RARP, wire.U64, events.Announce, needs=_P.RARP),
    Row(_R.NET_SET_MTU, wire.U64, events.MtuSet, needs=_P.NET_MTU),
    # behind an IOMMU; the reply is due whatever was negotiated
    Row(_R.IOTLB_MSG, wire.IOTLB, events.Iotlb, wire.U64, driver=VirtioFeature.ACCESS_PLATFORM, refusal=_FAILED),
    # shared objects and memory
    Row(_R.GET_SHARED_OBJECT, wire.UUID, events.SharedObject, wire.UUID, needs=_P.SHARED_OBJECT, refusal=b""),
    Row(_R.GET_SHMEM_CONFIG, reply=wire.SHMEM_CONFIG, needs=_P.SHMEM_MAP),
    # migration
    Row(
        _R.SET_DEVICE_STATE_FD, wire.TRANSFER, events.StateTransfer, wire.U64,
        fds=one_fd, needs=_P.DEVICE_STATE, refusal=bytes(wire.U64.build(0x101)),
    ),
    Row(_R.CHECK_DEVICE_STATE, None, events.StateCheck, wire.U64, needs=_P.DEVICE_STATE, refusal=_FAILED),
    Row(_R.POSTCOPY_ADVISE, None, events.PostcopyAdvise, wire.EMPTY, needs=_P.PAGEFAULT, refusal=b""),
    Row(_R.POSTCOPY_LISTEN, None, events.PostcopyListen, needs=_P.PAGEFAULT, forced=True),
    Row(_R.POSTCOPY_END, None, events.PostcopyEnd, wire.U64, needs=_P.PAGEFAULT, refusal=_FAILED),
)  # fmt: skip

_BACKEND_ROWS = (
    BackendRow(_B.IOTLB_MSG, wire.IOTLB),
    BackendRow(_B.CONFIG_CHANGE_MSG, needs=_P.CONFIG),
    BackendRow(_B.VRING_CALL, wire.VRING_STATE, needs=_P.INBAND_NOTIFICATIONS),
    BackendRow(_B.VRING_ERR, wire.VRING_STATE, needs=_P.INBAND_NOTIFICATIONS),
    BackendRow(_B.SHARED_OBJECT_ADD, wire.UUID, needs=_P.SHARED_OBJECT),
    BackendRow(_B.SHARED_OBJECT_REMOVE, wire.UUID, needs=_P.SHARED_OBJECT),
    BackendRow(_B.SHARED_OBJECT_LOOKUP, wire.UUID, wire.U64, reply_fds=1, needs=_P.SHARED_OBJECT),
    BackendRow(_B.SHMEM_MAP, wire.MMAP, fds=1, needs=_P.SHMEM_MAP | _P.BACKEND_SEND_FD),
    BackendRow(_B.SHMEM_UNMAP, wire.MMAP, needs=_P.SHMEM_MAP),
)

TABLE: dict[int, Row] = {row.request: row for row in _ROWS}
BACKEND_TABLE: dict[BackendRequest, BackendRow] = {row.request: row for row in _BACKEND_ROWS}
