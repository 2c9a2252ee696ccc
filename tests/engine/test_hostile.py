"""A guest that does what no driver may: each thing has its defined outcome, and the engine serves on."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from typing import Any

import pytest

from vhostsock._core import lib
from vhostsock.testing.offload import Flow, pack, pack_open

from .engine import EngineUnderTest, connection, recv_until_end

HELLO = pack("struct vso_hello", magic=lib.VSO_MAGIC, abi_major=lib.VSO_ABI_MAJOR)


def header(**fields: Any) -> bytes:
    return pack("struct vso_hdr", **fields)


def wait_broken(engine: EngineUnderTest, ring: int) -> str:
    """The evidence; the error fd is signalled and the vring is broken with the same words."""
    event = engine.wait_event("BROKEN")
    assert event.flow == ring
    assert select.select([engine.driver.queues[ring].err_fd], [], [], 30)[0]
    assert engine.vrings[ring].broken
    text = event.payload.decode()
    assert engine.vrings[ring].error == text
    return text


@pytest.mark.parametrize(
    ("readable", "writable", "evidence"),
    [
        ([b"short"], [], "5 bytes, less than a header"),
        ([header(type=lib.VSO_DATA, flow=1, len=10) + b"123"], [], "announces 10 of payload"),
        ([header(type=lib.VSO_DATA, flow=1, len=0xFFFFFFFF)], [], "announces 4294967295"),
        ([header(type=lib.VSO_PING)], [64], "1 writable buffers"),
        ([header(type=0)], [], "message type 0"),
        ([header(type=9)], [], "message type 9"),
        ([header(type=lib.VSO_RESET, flow=1)], [], f"message type {lib.VSO_RESET}"),
        ([header(type=0xFFFF)], [], "message type 65535"),
        ([header(type=lib.VSO_HELLO, len=48) + bytes(48)], [], "without the magic"),
        ([header(type=lib.VSO_HELLO, len=20) + HELLO[:20]], [], "HELLO"),
        ([header(type=lib.VSO_CONNECT, flow=0, len=1) + b"x"], [], "opens flow 0"),
        ([header(type=lib.VSO_BIND, flow=0x80000001, len=1) + b"x"], [], "opens flow 0x80000001"),
    ],
)
def test_a_message_that_cannot_be_breaks_the_ring_with_evidence(
    engine: EngineUnderTest, readable: list[bytes], writable: list[int], evidence: str
) -> None:
    with connection(engine) as (flow, host):
        flow.send(b"served before it")
        engine.driver.post_raw(readable, writable)
        assert evidence in wait_broken(engine, 1)
        assert host.recv(100) == b"served before it"
        # the other direction goes on, and set up anew the ring works again: the flow is still there
        host.sendall(b"still here")
        assert flow.recv() == b"still here"
        engine.renew(1)
        flow.close()
        assert host.recv(1) == b""


@pytest.mark.parametrize("size", [31, 100, 2047])
def test_a_chain_to_the_driver_that_is_too_small_breaks_that_ring(
    make_engine: Callable[..., EngineUnderTest], size: int
) -> None:
    engine = make_engine(hello=False, rx_size=size)
    engine.driver.post(lib.VSO_HELLO, payload=HELLO)
    assert f"{size} writable bytes" in wait_broken(engine, 0)


def test_a_readable_buffer_in_a_chain_to_the_driver_breaks_that_ring(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(hello=False, rx_buffers=0)
    engine.driver.queues[0].submit([b"from here?"], [4096])
    engine.driver.post(lib.VSO_HELLO, payload=HELLO)
    assert "10 readable" in wait_broken(engine, 0)


def test_nothing_but_hello_is_taken_before_hello(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(hello=False)
    engine.driver.post(lib.VSO_PING, cookie=1)
    assert "before HELLO" in wait_broken(engine, 1)


def test_hello_on_another_pair_breaks_the_ring(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(pairs=2)
    engine.driver.post(lib.VSO_HELLO, payload=HELLO, pair=1)
    assert "off pair 0" in wait_broken(engine, 3)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (lib.VSO_CONNECT, {}),
        (lib.VSO_BIND, {}),
        (lib.VSO_LISTEN, {"arg": 1, "buf_alloc": 1}),
        (lib.VSO_DGRAM, {"payload": bytes(8)}),
        (lib.VSO_SHUTDOWN, {"arg": 4}),
        (lib.VSO_CREDIT, {"fwd_cnt": 1}),  # handed on what was never sent
        (lib.VSO_CREDIT, {"fwd_cnt": 0xFFFFFFFF}),
        (lib.VSO_DATA, {"payload": bytes(262144), "buf_alloc": 1}),
    ],
)
def test_what_a_connected_flow_may_not_get_resets_it_with_eproto(
    make_engine: Callable[..., EngineUnderTest], kind: int, fields: dict[str, Any]
) -> None:
    engine = make_engine(config={"buf_alloc": 100000})
    with connection(engine) as (flow, host):
        engine.driver.post(kind, flow.id, **fields)
        engine.driver.wait(lambda: flow.error)
        assert flow.error == errno.EPROTO
        with pytest.raises(ConnectionResetError):
            recv_until_end(host)
        flow.close()
        assert engine.stats.flows == 0
        engine.driver.ping()


def test_data_after_shutdown_resets_the_flow(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, _):
        flow.shutdown()
        flow.try_send(b"but one more thing")
        engine.driver.wait(lambda: flow.error)
        assert flow.error == errno.EPROTO
        flow.close()


def test_a_message_on_another_pair_than_its_flows_resets_it(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(pairs=2)
    with connection(engine, pair=1) as (flow, host):
        flow.send(b"on its pair")
        assert host.recv(100) == b"on its pair"
        engine.driver.post(lib.VSO_DATA, flow.id, payload=b"x", pair=0)
        engine.driver.wait(lambda: flow.error)
        assert flow.error == errno.EPROTO
        flow.close()


def test_data_before_the_answer_to_connect_resets_the_flow(engine: EngineUnderTest) -> None:
    engine.on_connect = lambda event: None
    flow, _ = engine.driver.open(lib.VSO_CONNECT, pack_open("tcp://10.0.0.1:1"))
    engine.driver.post(lib.VSO_DATA, flow.id, payload=b"early", buf_alloc=flow.buf_alloc)
    engine.driver.wait(lambda: flow.error)
    assert flow.error == errno.EPROTO
    assert engine.wait_event("CANCEL")
    flow.close()


def test_messages_for_flows_that_are_not_there_are_ignored_and_close_is_answered(engine: EngineUnderTest) -> None:
    driver = engine.driver
    for kind in (lib.VSO_DATA, lib.VSO_CREDIT, lib.VSO_SHUTDOWN, lib.VSO_DGRAM, lib.VSO_LISTEN, lib.VSO_SETSOCKOPT):
        for stranger in (0, 77, 0x80000077, 0xFFFFFFFF):
            driver.post(kind, stranger, payload=b"12345678")
    driver.ping()
    flow = driver.flows[77] = Flow(driver, 77, 0, 0)
    flow.close()
    assert flow.closed


def test_messages_after_a_reset_are_ignored_until_close(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, _):
        engine.driver.post(lib.VSO_LISTEN, flow.id)
        engine.driver.wait(lambda: flow.error)
        for kind in (lib.VSO_DATA, lib.VSO_CREDIT, lib.VSO_SHUTDOWN, lib.VSO_DGRAM, lib.VSO_LISTEN, lib.VSO_CONNECT):
            engine.driver.post(kind, flow.id, payload=b"12345678")
        engine.driver.ping()
        flow.close()


def test_a_header_may_span_descriptors_and_bytes_behind_the_payload_are_ignored(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        flow.tx_cnt += 10
        engine.driver.post(
            lib.VSO_DATA, flow.id, payload=b"0123456789trailing", length=10, cuts=[1, 2, 7, 31, 33, 34],
            buf_alloc=flow.buf_alloc,
        )  # fmt: skip
        engine.driver.post(lib.VSO_PING, cookie=9, cuts=[16])
        assert host.recv(100) == b"0123456789"
        flow.close()
        assert host.recv(100) == b""


def test_a_driver_that_posts_no_chains_cannot_make_the_engine_grow(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(hello=False, rx_buffers=0)
    driver, queue = engine.driver, engine.driver.queues[1]
    driver.post(lib.VSO_HELLO, payload=HELLO, cookie=1)
    # answers pile up until the engine stops reading (64 KiB of them), then its ring fills up and stays full
    sent, full = 1, False
    while not full:
        queue.collect()
        if queue.free:
            sent += 1
            queue.submit([header(type=lib.VSO_PING, cookie=sent)])
        full = not queue.free and engine.stats.msgs_in >= 65536 // 32 - 2
    assert engine.stats.msgs_in <= 65536 // 32 + 64
    # with chains again, all that was accepted is answered, in order
    for _ in range(64):
        driver.queues[0].add(writable=[4096])
    driver.queues[0].publish()
    driver.queues[0].kick()
    driver.wait(lambda: len(driver.stray) == sent)
    assert [m.cookie for m in driver.stray] == list(range(1, sent + 1))


def test_memory_truncated_under_the_engine_breaks_the_ring_and_resets_the_hosts(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        flow.send(b"x")
        assert host.recv(1) == b"x"
        region = engine.memory.regions[0]
        # a page of payload that no longer exists; the rings are at the start and stay
        gpa = engine.memory.alloc(4096)
        queue = engine.driver.queues[1]
        os.ftruncate(region.fd, (gpa - region.gpa) // 4096 * 4096)
        head = queue._free.pop()
        queue.write_desc(head, gpa, 4096, 0, 0)
        queue.offer(head)
        queue.publish()
        queue.kick()
        event = engine.wait_event("BROKEN")
        assert "truncated" in event.payload.decode() or "header" in event.payload.decode()
        with pytest.raises(ConnectionResetError):
            recv_until_end(host)
        os.ftruncate(region.fd, region.size)
