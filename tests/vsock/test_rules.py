# SPDX-License-Identifier: BSD-3-Clause
"""What a driver may do wrong, one by one: the connection is reset or the ring is broken, and nothing else is harmed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vhostsock._core import ffi, lib
from vhostsock.offload.abi import struct_of
from vhostsock.testing.flow import pack
from vhostsock.testing.vsock import Connection, VsockDriver

from .engine import CID, VsockEngine


@pytest.fixture
def engine() -> Iterator[VsockEngine]:
    engine = VsockEngine()
    yield engine
    engine.close()


def still_serves(engine: VsockEngine) -> None:
    """A connection works."""
    connection = engine.driver.connect(99)
    connection.send(b"x")
    assert engine.hosts[connection.local].recv(1) == b"x"
    connection.close()


def why_broken(engine: VsockEngine, ring: int) -> str:
    """Wait until the ring is broken; the evidence."""
    event = engine.wait_event("BROKEN")
    assert event.flow == ring
    assert os.eventfd_read(engine.driver.queues[ring].err_fd)
    return event.payload.decode()


def rst_for(driver: VsockDriver, src_port: int, dst_port: int, *, cid: int = lib.VSK_CID_HOST) -> None:
    """Wait for the RST that answers a packet from ``src_port`` to ``dst_port``."""
    driver.wait(lambda: driver.stray)
    p = driver.stray.popleft()
    assert (p.op, p.src_cid, p.src_port, p.dst_cid, p.dst_port) == (lib.VSK_OP_RST, cid, dst_port, CID, src_port)


@pytest.mark.parametrize(("chain", "writable", "named"), [
    (bytes(43), (), "43 bytes, less than a header"),
    (pack("struct vsk_hdr", op=5, type=1, len=11) + bytes(10), (), "announces 11 of payload"),
    (pack("struct vsk_hdr", op=5, type=1, len=0xFFFFFFFF), (), "announces 4294967295"),
    (pack("struct vsk_hdr", op=3), (8,), "1 writable buffers"),
])  # fmt: skip
def test_malformed_chain_breaks_the_ring_with_the_evidence(
    engine: VsockEngine, chain: bytes, writable: tuple[int, ...], named: str
) -> None:
    engine.driver.post_raw([chain], writable)
    assert named in why_broken(engine, 1)


@pytest.mark.parametrize("layout", [(44,), (8,)])
def test_receive_buffer_without_room_for_a_byte_breaks_the_ring(layout: tuple[int, ...]) -> None:
    engine = VsockEngine(rx_layout=layout)
    engine.driver.post(lib.VSK_OP_RW, 1, 2)
    assert "not 0 and 45 or more" in why_broken(engine, 0)
    engine.close()


@pytest.mark.parametrize("op", [0, lib.VSK_OP_RESPONSE, lib.VSK_OP_SHUTDOWN, lib.VSK_OP_RW, lib.VSK_OP_CREDIT_UPDATE, 8, 65535])
def test_packet_about_no_connection_is_answered_with_rst(engine: VsockEngine, op: int) -> None:
    engine.driver.post(op, 1000, 52)
    rst_for(engine.driver, 1000, 52)
    still_serves(engine)


def test_rst_about_no_connection_is_not_answered(engine: VsockEngine) -> None:
    engine.driver.post(lib.VSK_OP_RST, 1000, 52)
    still_serves(engine)
    assert not engine.driver.stray


def test_request_of_an_unknown_type_is_answered_with_rst(engine: VsockEngine) -> None:
    engine.driver.post(lib.VSK_OP_REQUEST, 1000, 52, type=3)
    rst_for(engine.driver, 1000, 52)
    assert not engine.hosts


def test_request_to_another_context_is_refused_in_its_name(engine: VsockEngine) -> None:
    engine.driver.post(lib.VSK_OP_REQUEST, 1000, 52, dst_cid=7)
    rst_for(engine.driver, 1000, 52, cid=7)
    assert not engine.hosts


def test_request_in_the_name_of_another_guest_is_refused(engine: VsockEngine) -> None:
    engine.driver.post(lib.VSK_OP_REQUEST, 1000, 52, src_cid=CID + 1)
    rst_for(engine.driver, 1000, 52)
    assert not engine.hosts


def _again(connection: Connection) -> None:
    connection.post(lib.VSK_OP_REQUEST)


def _unknown_op(connection: Connection) -> None:
    connection.post(8)


def _unasked_response(connection: Connection) -> None:
    connection.post(lib.VSK_OP_RESPONSE)


def _other_type(connection: Connection) -> None:
    connection.kind = 2
    connection.post(lib.VSK_OP_CREDIT_UPDATE)
    connection.kind = 1


def _beyond_credit(connection: Connection) -> None:
    for _ in range(12):  # of which the host's socket takes 3 or 4, and the window is 4
        connection.tx_cnt += 65536
        connection.post(lib.VSK_OP_RW, payload=bytes(65536))


def _beyond_credit_at_once(connection: Connection) -> None:
    connection.post(lib.VSK_OP_RW, payload=bytes(262145))


def _forwarded_what_was_never_sent(connection: Connection) -> None:
    connection.fwd_cnt = 1
    connection.tell_credit()


def _forwarded_count_goes_back(connection: Connection) -> None:
    connection.fwd_cnt = -1
    connection.tell_credit()


def _data_after_shutdown(connection: Connection) -> None:
    connection.shutdown()
    connection.post(lib.VSK_OP_RW, payload=b"x")


@pytest.mark.parametrize("wrong", [
    _again, _unknown_op, _unasked_response, _other_type, _beyond_credit, _beyond_credit_at_once, _forwarded_what_was_never_sent,
    _forwarded_count_goes_back, _data_after_shutdown,
])  # fmt: skip
def test_connection_that_breaks_a_rule_is_reset_alone(engine: VsockEngine, wrong: object) -> None:
    other, connection = engine.driver.connect(52), engine.driver.connect(52)
    host = engine.pop_host(connection.local)
    wrong(connection)  # type: ignore[operator]
    engine.driver.wait(lambda: connection.reset)
    while host.recv(1 << 20):
        pass
    other.send(b"unharmed")
    assert engine.hosts[other.local].recv(100) == b"unharmed"
    assert engine.stats.flows == 1
    other.close()


def test_data_before_the_answer_resets(engine: VsockEngine) -> None:
    engine.on_connect = lambda event: None
    connection = engine.driver.open(52)
    engine.wait_event("CONNECT")
    connection.post(lib.VSK_OP_RW)
    engine.driver.wait(lambda: connection.reset)
    engine.wait_event("CANCEL")


def test_credit_request_is_answered(engine: VsockEngine) -> None:
    connection = engine.driver.connect(52)
    connection.send(b"12345")
    assert engine.hosts[connection.local].recv(5) == b"12345"
    connection.post(lib.VSK_OP_CREDIT_REQUEST)
    engine.driver.wait(lambda: connection.peer_fwd == 5)
    assert connection.peer_alloc == 262144
    connection.close()


def test_driver_that_posts_no_buffers_cannot_make_the_engine_grow() -> None:
    engine = VsockEngine(rx_buffers=0)
    driver, queue = engine.driver, engine.driver.queues[1]
    most = 65536 // 44 + 1  # answers of 44 bytes each pile up until the engine stops reading
    while queue.free or engine.stats.msgs_in < most:
        queue.collect()
        if queue.free:
            queue.submit([pack("struct vsk_hdr", op=5, type=1, src_cid=CID, dst_cid=2)])
    assert engine.stats.msgs_in <= most + 64
    for _ in range(64):
        driver.queues[0].add(writable=[4096])
    driver.queues[0].publish()
    driver.queues[0].kick()
    driver.wait(lambda: len(driver.stray) > most + 64)  # it goes on
    engine.close()


def test_close_of_the_engine_says_rst_to_every_connection(engine: VsockEngine) -> None:
    connections = [engine.driver.connect(52) for _ in range(3)]
    lib.vse_stop(engine.ptr)
    engine.driver.wait(lambda: all(connection.reset for connection in connections))


def test_a_call_needs_a_driver_and_the_right_kind_of_socket(engine: VsockEngine) -> None:
    handle = ffi.new("uint64_t *")
    assert lib.vse_call(engine.ptr, os.eventfd(0), 1, True, handle) == -88  # ENOTSOCK
    engine.detach(0)
    assert lib.vse_call(engine.ptr, os.eventfd(0), 1, True, handle) < 0
    engine.attach(0)
    assert engine.stats.flows == 0


@pytest.mark.parametrize("name", ["hdr", "event", "config"])
def test_construct_and_c_agree_on_the_wire_structs(name: str) -> None:
    struct, ctype = struct_of(f"struct vsk_{name}"), ffi.typeof(f"struct vsk_{name}")
    assert struct.sizeof() == ffi.sizeof(ctype)
    data = bytes(range(1, struct.sizeof() + 1))
    fields = struct.parse(data)
    assert {name: getattr(ffi.from_buffer(f"{ctype.cname} *", data), name) for name, _ in ctype.fields} == {
        name: fields[name] for name, _ in ctype.fields
    }
    assert struct.build(fields) == data


def test_header_is_that_of_the_specification() -> None:
    """virtio 1.3, 5.10.6: le64 for the CIDs, le16 for type and op, le32 for the rest, in the order of this call."""
    data = struct_of("struct vsk_hdr").build(dict(
        src_cid=3, dst_cid=2, src_port=0x11121314, dst_port=0x21222324, len=5, type=1, op=5, flags=2, buf_alloc=6, fwd_cnt=7,
    ))  # fmt: skip
    assert data.hex(" ", 4) == (
        "03000000 00000000 02000000 00000000 14131211 24232221 05000000 01000500 02000000 06000000 07000000"
    )
