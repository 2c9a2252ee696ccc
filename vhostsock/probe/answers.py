# SPDX-License-Identifier: BSD-3-Clause
"""Checks of who answers what: acks where they are asked for, replies once, silence otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ..proto import ProtocolFeature, Request, wire
from ..testing.frontend import BackendGone
from .check import Check, Probe
from .connection import Connection, Failed, table_body

__all__ = ["CHECKS"]

P = ProtocolFeature
_WELL_FORMED = {"index": 0, "num": 0}


async def _ordinary(connection: Connection) -> AsyncIterator[tuple[Request, bytes, list[int]]]:
    """What a front-end says from the negotiation to running rings, message by message, none with a reply of its own."""
    yield Request.SET_FEATURES, wire.U64.build(connection.features), []
    regions = connection.memory.regions
    yield Request.SET_MEM_TABLE, table_body(regions), [region.fd for region in regions]
    for index, queue in enumerate(connection.queues):
        yield Request.SET_VRING_NUM, wire.VRING_STATE.build({"index": index, "num": queue.num}), []
        yield Request.SET_VRING_BASE, wire.VRING_STATE.build({"index": index, "num": queue.base}), []
        yield Request.SET_VRING_ADDR, wire.ADDRESS.build(connection.address(index)), []
        fd = wire.VRING_FD.build({"index": index, "nofd": False})
        yield Request.SET_VRING_ERR, fd, [queue.err_fd]
        yield Request.SET_VRING_CALL, fd, [queue.call_fd]
        yield Request.SET_VRING_KICK, fd, [queue.kick_fd]
        yield Request.SET_VRING_ENABLE, wire.VRING_STATE.build({"index": index, "num": 1}), []


async def a_request_that_asks_for_an_ack_gets_one_and_it_is_zero(probe: Probe) -> None:
    """With need_reply, each message of an ordinary start is answered with one u64 of 0."""
    connection = await probe.negotiated()
    async for request, body, fds in _ordinary(connection):
        ack = await connection.ack_of(request, body, fds)
        if ack:
            raise Failed(f"{request.name} was answered with {ack}")
    await connection.settled()


async def a_request_that_asks_for_no_ack_gets_none(probe: Probe) -> None:
    """Without need_reply, REPLY_ACK negotiated, nothing of an ordinary start is answered."""
    connection = await probe.negotiated()
    async for request, body, fds in _ordinary(connection):
        await connection.call(request, body, fds)
        await connection.settled()


async def a_session_without_reply_ack_is_silent_too(probe: Probe) -> None:
    """The same on a connection that has not acked REPLY_ACK, as a front-end of old would say it."""
    connection = await probe.connect()
    await connection.get_u64(Request.GET_FEATURES)
    connection.offered = int(probe.offer.features)
    await connection.call(Request.SET_OWNER)
    async for request, body, fds in _ordinary(connection):
        await connection.call(request, body, fds)
    await connection.settled()


async def a_message_with_a_reply_of_its_own_is_answered_once(probe: Probe) -> None:
    """need_reply changes nothing for a message that has a reply anyway: one comes, not an ack as well."""
    connection = await probe.negotiated()
    for request in (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM):
        if request is Request.GET_QUEUE_NUM and not connection.protocol_features & P.MQ:
            continue
        await connection.call(request, flags=wire.NEED_REPLY_FLAGS)
        await connection.raw_reply(request)
        await connection.settled()


async def a_base_that_is_asked_for_with_need_reply_comes_once(probe: Probe) -> None:
    """GET_VRING_BASE with need_reply is answered once, with the ring's number and its base."""
    connection = await probe.negotiated()
    await connection.set_up(enable=False)
    state = wire.VRING_STATE.build(_WELL_FORMED)
    await connection.call(Request.GET_VRING_BASE, state, flags=wire.NEED_REPLY_FLAGS)
    reply = await connection.raw_reply(Request.GET_VRING_BASE)
    if len(reply) != len(state):
        raise Failed(f"the reply to GET_VRING_BASE has {len(reply)} bytes of payload, not {len(state)}")
    await connection.settled()


async def a_request_that_cannot_be_carried_out_is_acked_with_non_zero(probe: Probe) -> None:
    """Ring addresses outside of all memory, asked with need_reply: the front-end is told that it failed."""
    connection = await probe.negotiated()
    await connection.set_features()
    await connection.send_memory()
    await connection.request(Request.SET_VRING_NUM, wire.VRING_STATE, {"index": 0, "num": 64})
    address = wire.ADDRESS.build({"index": 0, "flags": 0, "desc": 1 << 60, "used": 1 << 60, "avail": 1 << 60, "log": 0})
    try:
        ack = await connection.ack_of(Request.SET_VRING_ADDR, address)
        if not ack:  # it may translate them as late as at the start
            [queue, *_] = connection.queues
            fd = wire.VRING_FD.build({"index": 0, "nofd": False})
            ack = await connection.ack_of(Request.SET_VRING_KICK, fd, [queue.kick_fd])
    except BackendGone:
        raise Failed("the connection was closed, where an ack was asked for") from None
    if not ack:
        raise Failed("SET_VRING_ADDR outside of memory and the start of that ring were both acked with 0")


async def messages_may_arrive_in_pieces(probe: Probe) -> None:
    """A stream socket cuts where it likes: header and payload a byte at a time are one message all the same."""
    connection = await probe.negotiated()
    for byte in wire.pack(Request.SET_FEATURES, wire.REQUEST_FLAGS, wire.U64, connection.features):
        await connection.send(bytes([byte]))
        await connection.taken()
    await connection.settled()


async def messages_may_arrive_at_once(probe: Probe) -> None:
    """Two whole messages in one write are two messages, answered in their order."""
    connection = await probe.connect()
    message = wire.pack(Request.GET_FEATURES, wire.REQUEST_FLAGS)
    await connection.send(message + message)
    for _ in range(2):
        await connection.reply_to(Request.GET_FEATURES, wire.U64)


_ACK = "VHOST_USER_PROTOCOL_F_REPLY_ACK"
CHECKS = (
    Check(a_request_that_asks_for_an_ack_gets_one_and_it_is_zero, _ACK, P.REPLY_ACK),
    Check(a_request_that_asks_for_no_ack_gets_none, _ACK, P.REPLY_ACK),
    Check(a_session_without_reply_ack_is_silent_too, "Communication"),
    Check(a_message_with_a_reply_of_its_own_is_answered_once, _ACK, P.REPLY_ACK),
    Check(a_base_that_is_asked_for_with_need_reply_comes_once, _ACK, P.REPLY_ACK),
    Check(a_request_that_cannot_be_carried_out_is_acked_with_non_zero, _ACK, P.REPLY_ACK),
    Check(messages_may_arrive_in_pieces, "Communication"),
    Check(messages_may_arrive_at_once, "Communication"),
)
