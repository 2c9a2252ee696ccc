# SPDX-License-Identifier: BSD-3-Clause
"""Replies, acks, and what is allowed when."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.protocol.test_framing import CONFIG, PROTOCOL, feed, session
from vhostsock.errors import FrontendError, UsageError
from vhostsock.proto import Request, Session, SessionConfig, events, wire
from vhostsock.proto.features import RING_FEATURES, ProtocolFeature, VirtioFeature, names

ACK = wire.NEED_REPLY_FLAGS
NUM = (wire.VRING_STATE, {"index": 0, "num": 256})


def answer(output: bytes) -> tuple[int, int, bytes]:
    header = wire.HEADER.parse(output)
    assert header.size == len(output) - wire.HEADER_SIZE
    return header.request, header.flags, output[wire.HEADER_SIZE :]


def u64(value: int) -> bytes:
    return bytes(wire.U64.build(value))


def kick(some: Session, *, ack: bool = False) -> events.Event | None:
    payload = {"index": 0, "nofd": False}
    return feed(some, wire.pack(Request.SET_VRING_KICK, ACK if ack else 1, wire.VRING_FD, payload), [os.eventfd(0)])


@pytest.mark.parametrize(
    ("request_", "value"),
    [
        (Request.GET_FEATURES, RING_FEATURES),
        (Request.GET_PROTOCOL_FEATURES, PROTOCOL),
        (Request.GET_QUEUE_NUM, 2),
        (Request.GET_MAX_MEM_SLOTS, 512),
        (Request.GET_STATUS, 0),
    ],
)
@pytest.mark.parametrize("flags", [1, ACK])
def test_a_reply_has_flags_5_and_is_never_acked_too(request_: Request, value: int, flags: int) -> None:
    some = session()
    assert feed(some, wire.pack(request_, flags)) is None
    assert answer(some.take_output()) == (request_, 0x5, u64(value))


def test_an_ack_waits_until_the_event_is_carried_out() -> None:
    some = session()
    event = feed(some, wire.pack(Request.SET_VRING_NUM, ACK, *NUM))
    assert event == events.VringNum(0, 256)
    assert some.take_output() == b""
    some.done()
    assert answer(some.take_output()) == (Request.SET_VRING_NUM, 0x5, u64(0))


def test_no_ack_where_none_was_asked_for() -> None:
    some = session()
    feed(some, wire.pack(Request.SET_VRING_NUM, 1, *NUM))
    some.done()
    assert some.take_output() == b""


def test_need_reply_means_nothing_before_reply_ack_is_acked() -> None:
    some = Session(CONFIG)
    assert feed(some, wire.pack(Request.SET_OWNER, ACK)) is None
    assert some.take_output() == b""
    feed(some, wire.pack(Request.SET_PROTOCOL_FEATURES, 1, wire.U64, ProtocolFeature.MQ))
    feed(some, wire.pack(Request.SET_OWNER, ACK))
    assert some.take_output() == b""


def test_the_message_that_acks_reply_ack_can_ask_for_an_ack_itself() -> None:
    some = Session(CONFIG)
    feed(some, wire.pack(Request.SET_PROTOCOL_FEATURES, ACK, wire.U64, ProtocolFeature.REPLY_ACK))
    assert answer(some.take_output()) == (Request.SET_PROTOCOL_FEATURES, 0x5, u64(0))


def test_a_refused_request_is_nacked_and_the_session_goes_on() -> None:
    some = session()
    feed(some, wire.pack(Request.SET_VRING_NUM, ACK, *NUM))
    some.refuse("no such size")
    request, flags, body = answer(some.take_output())
    assert (request, flags) == (Request.SET_VRING_NUM, 0x5)
    assert wire.U64.parse(body) != 0
    feed(some, wire.pack(Request.GET_FEATURES, 1))
    assert some.take_output()


def test_a_refused_request_without_an_ack_ends_the_session() -> None:
    some = session()
    feed(some, wire.pack(Request.SET_VRING_NUM, 1, *NUM))
    with pytest.raises(FrontendError, match="SET_VRING_NUM: no such size"):
        some.refuse("no such size")
    assert some.closed


def test_what_a_driver_did_wrong_does_not_end_the_session() -> None:
    some = session()
    payload = {"offset": 0, "size": 1, "flags": 0, "data": b"x"}
    feed(some, wire.pack(Request.SET_CONFIG, 1, wire.CONFIG, payload))
    some.refuse("read-only", fatal=False)
    assert some.take_output() == b""
    feed(some, wire.pack(Request.SET_CONFIG, ACK, wire.CONFIG, payload))
    some.refuse("read-only", fatal=False)
    assert answer(some.take_output())[2] != u64(0)


def test_get_config_is_answered_in_its_own_shape_or_empty() -> None:
    some = session()
    payload = {"offset": 4, "size": 3, "flags": 0, "data": bytes(3)}
    feed(some, wire.pack(Request.GET_CONFIG, 1, wire.CONFIG, payload))
    some.done(b"abc")
    assert answer(some.take_output())[2] == wire.CONFIG.build({**payload, "data": b"abc"})
    feed(some, wire.pack(Request.GET_CONFIG, 1, wire.CONFIG, payload))
    some.refuse("cannot")
    assert answer(some.take_output()) == (Request.GET_CONFIG, 0x5, b"")
    assert not some.closed


def test_get_vring_base_reports_the_base_and_ignores_the_noise_in_num() -> None:
    some = session()
    event = feed(some, wire.pack(Request.GET_VRING_BASE, 1, wire.VRING_STATE, {"index": 1, "num": 0x555B}))
    assert event == events.VringStop(1)
    some.done(9)
    assert answer(some.take_output()) == (Request.GET_VRING_BASE, 0x5, wire.VRING_STATE.build({"index": 1, "num": 9}))


def test_a_ring_cannot_start_before_features_are_agreed() -> None:
    with pytest.raises(FrontendError, match="SET_VRING_KICK: not allowed before SET_FEATURES"):
        kick(session(negotiated=False))


def test_protocol_features_cannot_change_while_rings_are_started() -> None:
    some = session()
    kick(some)
    some.done()
    with pytest.raises(FrontendError, match="not allowed while rings are started"):
        feed(some, wire.pack(Request.SET_PROTOCOL_FEATURES, 1, wire.U64, 0))


def test_features_change_while_rings_are_started_only_for_the_dirty_log() -> None:
    some = Session(SessionConfig(RING_FEATURES | VirtioFeature.LOG_ALL, PROTOCOL, 1))
    feed(some, wire.pack(Request.SET_FEATURES, 1, wire.U64, RING_FEATURES))
    some.done()
    kick(some)
    some.done()
    feed(some, wire.pack(Request.SET_FEATURES, 1, wire.U64, RING_FEATURES | VirtioFeature.LOG_ALL))
    some.done()
    with pytest.raises(FrontendError, match="changes EVENT_IDX while rings are started"):
        feed(some, wire.pack(Request.SET_FEATURES, 1, wire.U64, RING_FEATURES & ~VirtioFeature.EVENT_IDX))


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.GET_QUEUE_NUM, ()),
        (Request.GET_STATUS, ()),
        (Request.SET_STATUS, (wire.U64, 0)),
        (Request.GET_MAX_MEM_SLOTS, ()),
        (Request.GET_CONFIG, (wire.CONFIG, {"offset": 0, "size": 0, "flags": 0, "data": b""})),
    ],
)
def test_what_was_not_negotiated_is_refused(request_: Request, payload: tuple[Any, ...]) -> None:
    with pytest.raises(FrontendError, match="was not negotiated"):
        feed(session(negotiated=False), wire.pack(request_, 1, *payload))


def test_reset_owner_is_tolerated() -> None:
    some = session()
    kick(some)
    some.done()
    assert feed(some, wire.pack(Request.RESET_OWNER, ACK)) is None
    assert answer(some.take_output())[2] == u64(0)
    assert some.started == {0}


def test_reset_device_forgets_features_status_and_rings_but_not_the_protocol() -> None:
    some = session()
    feed(some, wire.pack(Request.SET_STATUS, 1, wire.U64, 0xF))
    kick(some)
    some.done()
    assert isinstance(feed(some, wire.pack(Request.RESET_DEVICE, 1)), events.DeviceReset)
    some.done()
    assert (some.features, some.status, some.started) == (0, 0, set())
    assert some.protocol_features == PROTOCOL
    with pytest.raises(FrontendError, match="before SET_FEATURES"):
        kick(some)


def test_a_kick_that_was_refused_starts_nothing() -> None:
    some = session()
    kick(some, ack=True)
    some.refuse("ring not in memory")
    assert some.started == set()


def test_a_bit_that_qemu_acks_without_implementing_it_cannot_be_offered() -> None:
    with pytest.raises(UsageError, match="XEN_MMAP must not be offered"):
        SessionConfig(RING_FEATURES, PROTOCOL | ProtocolFeature.XEN_MMAP, 1)


@pytest.mark.parametrize(
    ("acked", "missing"),
    [
        (ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.REPLY_ACK, "BACKEND_REQ"),
        (ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ, "REPLY_ACK"),
        (ProtocolFeature.GET_VRING_BASE_INFLIGHT, "INFLIGHT_SHMFD"),
    ],
)
def test_a_protocol_feature_cannot_be_acked_without_what_it_needs(acked: ProtocolFeature, missing: str) -> None:
    some = Session(SessionConfig(RING_FEATURES, PROTOCOL | acked, 1))
    with pytest.raises(FrontendError, match=f"without {missing}"):
        feed(some, wire.pack(Request.SET_PROTOCOL_FEATURES, 1, wire.U64, acked))


@pytest.mark.parametrize("queues", [0, 257])
def test_a_device_has_1_to_256_queues(queues: int) -> None:
    with pytest.raises(UsageError, match=f"not {queues}"):
        SessionConfig(RING_FEATURES, PROTOCOL, queues)


def test_names_of_bits_are_for_people() -> None:
    assert names(VirtioFeature(0)) == "none"
    assert names(VirtioFeature(1 << 32 | 1 << 29 | 1)) == "bit 0 | EVENT_IDX | VERSION_1"
