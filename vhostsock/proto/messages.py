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
from .features import ProtocolFeature
from .wire import Request

__all__ = ["TABLE", "Phase", "Row"]

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
    phases: Phase = ANY
    ring: bool = False
    trailing: bool = False
    refusal: bytes | None = None


_R, _P = Request, ProtocolFeature

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
    Row(_R.SET_MEM_TABLE, wire.MEM_TABLE, events.MemoryTable, fds=fd_per_region, trailing=True),
    Row(_R.GET_MAX_MEM_SLOTS, reply=wire.U64, needs=_P.CONFIGURE_MEM_SLOTS),
    Row(_R.ADD_MEM_REG, wire.MEM_REGION, events.AddRegion, fds=one_fd, needs=_P.CONFIGURE_MEM_SLOTS),
    Row(_R.REM_MEM_REG, wire.MEM_REGION, events.RemoveRegion, fds=unused_fd, needs=_P.CONFIGURE_MEM_SLOTS),
    # rings
    Row(_R.SET_VRING_NUM, wire.VRING_STATE, events.VringNum, ring=True),
    Row(_R.SET_VRING_ADDR, wire.ADDRESS, events.VringAddress, ring=True),
    Row(_R.SET_VRING_BASE, wire.VRING_STATE, events.VringBase, ring=True),
    Row(_R.GET_VRING_BASE, wire.VRING_STATE, events.VringStop, wire.VRING_STATE, ring=True),
    Row(_R.SET_VRING_KICK, wire.VRING_FD, events.VringKick, fds=fd_unless_nofd, phases=NEGOTIATED, ring=True),
    Row(_R.SET_VRING_CALL, wire.VRING_FD, events.VringCall, fds=fd_unless_nofd, ring=True),
    Row(_R.SET_VRING_ERR, wire.VRING_FD, events.VringErr, fds=fd_unless_nofd, ring=True),
    Row(_R.SET_VRING_ENABLE, wire.VRING_STATE, events.VringEnable, ring=True),
)

TABLE: dict[int, Row] = {row.request: row for row in _ROWS}
