# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the first messages: who offers what, and what may be asked when."""

from __future__ import annotations

from ..proto import ProtocolFeature, Request, VirtioFeature, wire
from ..proto.features import names
from .check import Check, NotApplicable, Probe
from .connection import Failed

__all__ = ["CHECKS"]

P = ProtocolFeature
# "only if": bits that mean nothing without another
_REST_ON = {
    P.GET_VRING_BASE_INFLIGHT: P.INFLIGHT_SHMFD,
    P.BACKEND_SEND_FD: P.BACKEND_REQ,
    P.HOST_NOTIFIER: P.BACKEND_REQ,
    P.SHMEM_MAP: P.BACKEND_REQ,
}
STATUS_DRIVER = 3  # ACKNOWLEDGE and DRIVER (virtio 1.3, 2.1)


async def features_are_offered_before_anything_else_is_said(probe: Probe) -> None:
    """GET_FEATURES as the first message is answered with a u64, flags 0x5, and no other reply follows."""
    connection = await probe.connect()
    first = await connection.get_u64(Request.GET_FEATURES)
    second = await connection.get_u64(Request.GET_FEATURES)
    if first != second:
        raise Failed(f"GET_FEATURES was answered with {first:#x}, and then with {second:#x}")


async def protocol_features_are_negotiated_before_set_features(probe: Probe) -> None:
    """GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES work on a connection that has seen no SET_FEATURES."""
    connection = await probe.connect()
    offered = await connection.get_u64(Request.GET_PROTOCOL_FEATURES)
    await connection.request(Request.SET_PROTOCOL_FEATURES, wire.U64, offered & (P.MQ | P.REPLY_ACK))
    if offered != await connection.get_u64(Request.GET_PROTOCOL_FEATURES):
        raise Failed("GET_PROTOCOL_FEATURES gives another answer after SET_PROTOCOL_FEATURES")


async def protocol_bits_come_with_those_they_rest_on(probe: Probe) -> None:
    """A bit whose text requires another is not offered without it."""
    offered = probe.offer.protocol
    for bit, needed in _REST_ON.items():
        if offered & bit and not offered & needed:
            raise Failed(f"{names(bit)} is offered without {names(needed)}, which it rests on")


async def all_offered_features_may_be_acked(probe: Probe) -> None:
    """SET_FEATURES with every bit that was offered is carried out."""
    connection = await probe.negotiated()
    await connection.carried_out(Request.SET_FEATURES, wire.U64.build(int(probe.offer.features & ~VirtioFeature.LOG_ALL)))


async def no_features_but_version_1_may_be_acked(probe: Probe) -> None:
    """A driver that takes VERSION_1 alone is served."""
    connection = await probe.negotiated()
    await connection.carried_out(Request.SET_FEATURES, wire.U64.build(int(VirtioFeature.VERSION_1 & probe.offer.features)))


async def the_number_of_queues_is_told(probe: Probe) -> None:
    """GET_QUEUE_NUM is answered with a u64 that is at least 1."""
    connection = await probe.negotiated()
    number = await connection.get_u64(Request.GET_QUEUE_NUM)
    if number < 1:
        raise Failed("GET_QUEUE_NUM says 0")


async def reset_owner_is_borne(probe: Probe) -> None:
    """RESET_OWNER, deprecated; "recommended that back-ends either ignore this message, or use it to disable all rings"."""
    connection = await probe.negotiated()
    await connection.request(Request.RESET_OWNER)
    await connection.settled()


async def a_status_reads_back(probe: Probe) -> None:
    """GET_STATUS gives the device status that SET_STATUS has set."""
    connection = await probe.negotiated()
    await connection.carried_out(Request.SET_STATUS, wire.U64.build(STATUS_DRIVER))
    status = await connection.get_u64(Request.GET_STATUS)
    if status & 0x7F != STATUS_DRIVER:  # 0x80, FAILED, would be the device's to say
        raise Failed(f"SET_STATUS {STATUS_DRIVER:#x}, but GET_STATUS says {status:#x}")


async def a_channel_of_its_own_is_taken(probe: Probe) -> None:
    """SET_BACKEND_REQ_FD with a socket is carried out, also a second time."""
    connection = await probe.negotiated()
    if not connection.channel:
        raise NotApplicable("the front-end opened no channel")
    await connection.open_channel()
    await connection.settled()


_BIT_30 = VirtioFeature.PROTOCOL_FEATURES
CHECKS = (
    Check(features_are_offered_before_anything_else_is_said, "Header; GET_FEATURES"),
    Check(protocol_features_are_negotiated_before_set_features, "SET_PROTOCOL_FEATURES", features=_BIT_30),
    Check(protocol_bits_come_with_those_they_rest_on, "Protocol features", features=_BIT_30),
    Check(all_offered_features_may_be_acked, "SET_FEATURES"),
    Check(no_features_but_version_1_may_be_acked, "Ring states"),
    Check(the_number_of_queues_is_told, "GET_QUEUE_NUM", P.MQ),
    Check(reset_owner_is_borne, "RESET_OWNER (a recommendation)"),
    Check(a_status_reads_back, "SET_STATUS; GET_STATUS", P.STATUS),
    Check(a_channel_of_its_own_is_taken, "SET_BACKEND_REQ_FD", P.BACKEND_REQ),
)
