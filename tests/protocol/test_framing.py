# SPDX-License-Identifier: BSD-3-Clause
"""What is on the wire: sizes, versions, descriptors, pieces. A broken message ends the session; its descriptors are closed."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Sequence

import pytest
from construct import Construct
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostsock.errors import FrontendError, UsageError
from vhostsock.offers import OFFERS
from vhostsock.proto import Request, Session, SessionConfig, events, wire
from vhostsock.proto.features import RING_FEATURES, ProtocolFeature
from vhostsock.proto.messages import TABLE

STATE = wire.VRING_STATE
# all that any device can have offered, but for GPA_ADDRESSES, which narrows what a memory region may be
PROTOCOL = functools.reduce(operator.or_, (offer.protocol for offer in OFFERS)) & ~ProtocolFeature.GPA_ADDRESSES
CONFIG = SessionConfig(RING_FEATURES, PROTOCOL, num_queues=2)


def session(*, negotiated: bool = True) -> Session:
    new = Session(CONFIG)
    if negotiated:
        feed(new, wire.pack(Request.SET_PROTOCOL_FEATURES, 1, wire.U64, PROTOCOL))
        feed(new, wire.pack(Request.SET_FEATURES, 1, wire.U64, RING_FEATURES))
        new.done()
    return new


def feed(into: Session, message: bytes, fds: Sequence[int] = ()) -> events.Event | None:
    """One whole message, as the server reads it: the header with the descriptors, then the rest."""
    event = into.receive(message[: wire.HEADER_SIZE], fds)
    return into.receive(message[wire.HEADER_SIZE :]) if len(message) > wire.HEADER_SIZE else event


def eventfds(count: int) -> list[int]:
    return [os.eventfd(0) for _ in range(count)]


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def state(index: int, num: int = 1) -> dict[str, int]:
    return {"index": index, "num": num}


def fd_of(index: int, *, nofd: bool = False) -> dict[str, int]:
    return {"index": index, "nofd": nofd}


def config(offset: int, size: int) -> dict[str, object]:
    return {"offset": offset, "size": size, "flags": 0, "data": bytes(size)}


def header(request: Request, size: int) -> bytes:
    return bytes(wire.HEADER.build({"request": request, "flags": 1, "size": size}))


R, pack = Request, wire.pack
# what is wrong with it -> the message, how many descriptors come with it, and what the error must say
BROKEN: dict[str, tuple[bytes, int, str]] = {
    "unknown request": (pack(99, 1), 0, "request 99: not served"),
    "known but not served": (pack(R.GPU_SET_SOCKET, 1, wire.U64, 0), 0, "GPU_SET_SOCKET: not served"),
    "version 0": (pack(R.GET_FEATURES, 0), 0, "flags 0x0"),
    "version 2": (pack(R.GET_FEATURES, 2), 0, "flags 0x2"),
    "a reply": (pack(R.GET_FEATURES, 5), 0, "flags 0x5"),
    "payload where none is": (pack(R.GET_FEATURES, 1, wire.U64, 0), 0, "8 bytes of payload, must be 0"),
    "no payload where one is": (pack(R.SET_FEATURES, 1), 0, "0 bytes of payload, must be 8"),
    "payload too long": (header(R.SET_VRING_NUM, 40) + bytes(40), 0, "40 bytes of payload, must be 8"),
    "payload too short": (header(R.SET_VRING_ADDR, 8) + bytes(8), 0, "8 bytes of payload, must be 40"),
    "payload beyond all bounds": (header(R.SET_MEM_TABLE, 4097), 0, "4097 bytes"),
    "4 GiB of config": (header(R.SET_CONFIG, 2**32 - 1), 0, "4294967295 bytes"),
    "config longer than it says": (header(R.GET_CONFIG, 20) + bytes(20), 0, "20 bytes of payload, must be 12"),
    "config beyond its end": (pack(R.GET_CONFIG, 1, wire.CONFIG, config(250, 7)), 0, "offset 250, size 7 is outside"),
    "2^32 regions": (header(R.SET_MEM_TABLE, 8) + b"\xff" * 8, 0, "too few"),
    "ring that is not there": (pack(R.SET_VRING_NUM, 1, STATE, state(2)), 0, "ring 2, but there are 2"),
    "fd for a ring that is not there": (pack(R.SET_VRING_CALL, 1, wire.VRING_FD, fd_of(255)), 1, "ring 255"),
    "fd where none is": (pack(R.GET_FEATURES, 1), 1, "1 file descriptors came"),
    "no fd where one is": (pack(R.SET_VRING_CALL, 1, wire.VRING_FD, fd_of(0)), 0, "0 file descriptors"),
    "fd in spite of the nofd bit": (pack(R.SET_VRING_CALL, 1, wire.VRING_FD, fd_of(0, nofd=True)), 1, "1 file descriptors"),
    "two fds for one": (pack(R.SET_VRING_KICK, 1, wire.VRING_FD, fd_of(0)), 2, "2 file descriptors"),
    "no channel": (pack(R.SET_BACKEND_REQ_FD, 1), 0, "0 file descriptors"),
    "fd without a region": (pack(R.SET_MEM_TABLE, 1, wire.MEM_TABLE, {"n": 0, "regions": []}), 1, "1 file descriptors"),
    "status of 9 bits": (pack(R.SET_STATUS, 1, wire.U64, 0x100), 0, "8 bits"),
    "feature not offered": (pack(R.SET_FEATURES, 1, wire.U64, 1 << 34 | 1), 0, "bit 0 | RING_PACKED was not offered"),
    "protocol feature not offered": (
        pack(R.SET_PROTOCOL_FEATURES, 1, wire.U64, 1 << 17 | 1 << 55),
        0,
        "XEN_MMAP | bit 55 was not offered",
    ),
}


@pytest.mark.parametrize(("message", "fds", "evidence"), BROKEN.values(), ids=BROKEN)
def test_a_broken_message_ends_the_session_with_the_evidence(message: bytes, fds: int, evidence: str) -> None:
    broken, given_fds = session(), eventfds(fds)
    with pytest.raises(FrontendError) as caught:
        feed(broken, message, given_fds)
    assert evidence in str(caught.value)
    assert broken.closed
    assert not any(map(is_open, given_fds))
    with pytest.raises(UsageError):
        broken.receive(b"\0")


@pytest.mark.parametrize("size", [1, 11, 12, 19])
def test_a_connection_that_ends_inside_a_message_is_an_error(size: int) -> None:
    some, message = session(), wire.pack(Request.SET_VRING_NUM, 1, STATE, state(0))
    feed(some, message[:size])
    with pytest.raises(FrontendError, match=rf"ended inside the message, {(12 if size < 12 else 20) - size} bytes early"):
        some.receive(b"")


def test_nine_descriptors_are_too_many_even_in_pieces() -> None:
    some, fds = session(), eventfds(9)
    message = wire.pack(Request.SET_MEM_TABLE, 1, wire.MEM_TABLE, {"n": 0, "regions": []})
    assert some.receive(message[:1], fds[:4]) is None
    with pytest.raises(FrontendError, match="more than 8"):
        some.receive(message[1:12], fds[4:])
    assert not any(map(is_open, fds))


def test_descriptors_that_the_kernel_dropped_end_the_session() -> None:
    some, fds = session(), eventfds(1)
    with pytest.raises(FrontendError, match="MSG_CTRUNC"):
        some.receive(bytes(12), fds, truncated=True)
    assert not is_open(fds[0])


def test_a_descriptor_that_nobody_took_is_closed_with_the_answer() -> None:
    some, fds = session(), eventfds(1)
    event = feed(some, wire.pack(Request.SET_VRING_CALL, 1, wire.VRING_FD, {"index": 1, "nofd": False}), fds)
    assert event == events.VringCall(1, event.fd)  # type: ignore[union-attr]
    assert is_open(fds[0])
    some.done()
    assert not is_open(fds[0])


def test_a_taken_descriptor_is_the_takers() -> None:
    some, fds = session(), eventfds(1)
    event = feed(some, wire.pack(Request.SET_VRING_KICK, 1, wire.VRING_FD, {"index": 0, "nofd": False}), fds)
    assert isinstance(event, events.VringKick)
    assert event.fd
    assert event.fd.take() == fds[0]
    some.done()
    some.close()
    assert is_open(fds[0])
    os.close(fds[0])


def test_the_fd_that_rem_mem_reg_may_carry_is_closed() -> None:
    some, fds = session(), eventfds(1)
    region = {"gpa": 0, "size": 4096, "uva": 0, "offset": 0}
    event = feed(some, wire.pack(Request.REM_MEM_REG, 1, wire.MEM_REGION, {"region": region}), fds)
    assert event == events.RemoveRegion(events.Region(0, 4096, 0))
    some.done()
    assert not is_open(fds[0])


@pytest.mark.parametrize("extra", [1, 32, 224])
def test_bytes_behind_a_memory_table_are_accepted(extra: int) -> None:
    some, fds = session(), eventfds(1)
    table = wire.MEM_TABLE.build({"n": 1, "regions": [{"gpa": 1, "size": 2, "uva": 3, "offset": 4}]}) + bytes(extra)
    event = feed(some, header(Request.SET_MEM_TABLE, len(table)) + table, fds)
    assert isinstance(event, events.MemoryTable)
    assert event.regions == (events.Region(1, 2, 3, 4),)
    some.close()


def test_reading_stops_at_the_end_of_each_message() -> None:
    some = session(negotiated=False)
    assert some.wanted == wire.HEADER_SIZE
    message = wire.pack(Request.SET_FEATURES, 1, wire.U64, RING_FEATURES)
    some.receive(message[:5])
    assert some.wanted == 7
    some.receive(message[5:12])
    assert some.wanted == 8
    with pytest.raises(UsageError, match="more than it wanted"):
        some.receive(message[12:] + b"\0")


def test_the_end_of_the_stream_between_messages_is_no_error() -> None:
    assert session().receive(b"") is None


def test_every_row_answers_or_asks_somebody_to() -> None:
    from vhostsock.backend import _HANDLERS
    from vhostsock.proto.session import _LOCAL

    for row in TABLE.values():
        assert (row.event in _HANDLERS) != (row.request in _LOCAL), row.request.name


def build(payload: Construct | None, data: bytes) -> bytes:
    """Some payload of the right size, filled from random bytes."""
    if payload is None:
        return b""
    if payload is wire.MEM_TABLE:
        return bytes(8) + data[:32]
    if payload is wire.CONFIG:
        return bytes(wire.CONFIG.build(config(data[0], data[1])))
    return data[: payload.sizeof()]


def bases(event: events.MemoryTable | events.AddRegion) -> list[int]:
    """Where the regions are here: any numbers will do."""
    return list(range(len(event.regions))) if isinstance(event, events.MemoryTable) else [0]


MESSAGES = st.lists(st.tuples(st.sampled_from([*TABLE, 0, 31, 2**31]), st.integers(0, 15), st.binary(min_size=40, max_size=40),
                              st.integers(0, 3)), max_size=12)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(MESSAGES, st.lists(st.integers(1, 50), min_size=1))
def test_any_messages_in_any_pieces_are_served_or_blamed_on_the_front_end(
    messages: list[tuple[int, int, bytes, int]], pieces: list[int]
) -> None:
    some, fds, cuts = Session(CONFIG), [], 0
    try:
        for request, flags, data, count in messages:
            row = TABLE.get(request)
            body = build(row.payload, data) if row else data
            message = bytes(wire.HEADER.build({"request": request, "flags": flags, "size": len(body)})) + body
            given_fds, event = eventfds(count), None
            fds += given_fds
            while message:
                size = min(some.wanted, pieces[cuts % len(pieces)])
                cuts += 1
                event = some.receive(message[:size], given_fds)
                message, given_fds = message[size:], []
            if isinstance(event, events.ConfigRead):
                some.done(bytes(event.size))
            elif isinstance(event, events.MemoryTable | events.AddRegion):
                some.done(bases(event) if some.listening else None)
            elif event:
                some.done(7)
            output = some.take_output()
            if output:
                reply = wire.HEADER.parse(output)
                assert (reply.request, reply.flags, reply.size) == (request, 5, len(output) - 12)
    except FrontendError:
        assert some.closed
    some.close()
    assert not any(map(is_open, fds))
