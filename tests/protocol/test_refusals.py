# SPDX-License-Identifier: BSD-3-Clause
"""Messages with replies of their own, when the device says no: the answer has the form that the front-end expects."""

from __future__ import annotations

import os
import sys

import pytest

from tests.protocol.test_framing import PROTOCOL, build, feed
from vhostsock.proto import Request, Session, SessionConfig, VirtioFeature, events, messages, wire
from vhostsock.proto.features import RING_FEATURES
from vhostsock.proto.messages import Row

REFUSABLE = [row for row in messages.TABLE.values() if row.refusal is not None]
ERROR_BITS = 0xFF  # of SET_DEVICE_STATE_FD's reply; bit 8 says that no descriptor comes with it


def ask(row: Row) -> Session:
    features = RING_FEATURES | VirtioFeature.ACCESS_PLATFORM
    some = Session(SessionConfig(features, PROTOCOL, 1))
    feed(some, wire.pack(Request.SET_PROTOCOL_FEATURES, 1, wire.U64, PROTOCOL))
    feed(some, wire.pack(Request.SET_FEATURES, 1, wire.U64, features))
    some.done()
    body, payload = build(row.payload, bytes(64)), row.payload
    least, _ = row.fds(payload.parse(body) if payload is not None else None)
    header = wire.HEADER.build({"request": row.request, "flags": wire.REQUEST_FLAGS, "size": len(body)})
    assert feed(some, bytes(header) + body, [os.eventfd(0) for _ in range(least)]) is not None
    return some


@pytest.mark.parametrize("row", REFUSABLE, ids=lambda row: row.request.name)
def test_a_refusal_is_the_reply_that_says_no(row: Row) -> None:
    some = ask(row)
    some.refuse("cannot")
    output = some.take_output()
    header, body = wire.HEADER.parse(output), output[wire.HEADER_SIZE :]
    assert (header.request, header.flags, header.size) == (row.request, wire.REPLY_FLAGS, len(body))
    assert not some.take_output_fds()
    assert not some.closed
    if row.reply is wire.U64:
        assert int.from_bytes(body, sys.byteorder) & ERROR_BITS
    elif row.reply is wire.INFLIGHT:
        assert body == bytes(len(body))  # a region of no size
    else:
        assert body == b""


def test_an_answer_takes_its_descriptor_along() -> None:
    some = ask(messages.TABLE[Request.GET_SHARED_OBJECT])
    fd = events.OwnedFd(os.eventfd(0))
    some.done(events.WithFd(None, fd))
    assert len(some.take_output()) == wire.HEADER_SIZE + 16
    assert some.take_output_fds() == [fd]
    some.close()
    assert fd.fileno() >= 0  # it is whoever sends it that closes it
    fd.close()


def test_an_answer_that_nobody_sends_closes_its_descriptor() -> None:
    some = ask(messages.TABLE[Request.GET_SHARED_OBJECT])
    fd = events.OwnedFd(os.eventfd(0))
    some.done(events.WithFd(None, fd))
    some.close()
    assert fd.fileno() == -1
