"""Connecting, moving bytes and closing, against real host sockets."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable

import pytest

from vhostsock._core import lib
from vhostsock.testing.offload import Refused, pack_open

from .engine import EngineUnderTest, Event, connection, host_listener

BIG = bytes(range(256)) * 4096 * 4  # 4 MiB


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_bytes_arrive_both_ways_over_both_families(engine: EngineUnderTest, family: int) -> None:
    with host_listener(family) as (listener, uri):
        flow = engine.driver.connect(uri)
        host, address = listener.accept()
        with host:
            host.settimeout(30)
            assert flow.peer == uri
            assert flow.local.endswith(str(address[1]))
            flow.send(b"ping")
            assert host.recv(16) == b"ping"
            host.sendall(b"pong")
            assert flow.recv() == b"pong"
            flow.close()
            assert host.recv(1) == b""


def test_a_refused_connection_gives_the_hosts_errno_and_frees_the_id(engine: EngineUnderTest) -> None:
    with host_listener() as (_, uri):
        pass
    with pytest.raises(Refused) as refused:
        engine.driver.connect(uri)
    assert (refused.value.verdict, refused.value.errno) == (lib.VSO_OFFLOAD, errno.ECONNREFUSED)
    assert engine.stats.flows == 0


@pytest.mark.parametrize(("verdict", "error"), [(lib.VSO_NATIVE, 0), (lib.VSO_DENY, errno.EACCES)])
def test_verdicts_pass_through(engine: EngineUnderTest, verdict: int, error: int) -> None:
    def refuse(event: Event) -> None:
        engine.refuse(event, verdict, error)

    engine.on_connect = refuse
    with pytest.raises(Refused) as refused:
        engine.driver.connect("tcp://192.0.2.1:80")
    assert (refused.value.verdict, refused.value.errno) == (verdict, error)


def test_four_megabytes_each_way_through_small_windows(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(config={"buf_alloc": 8192}, window=10000, rx_buffers=4)
    with connection(engine) as (flow, host):
        host.setblocking(False)
        up = down = 0
        at_host, at_guest = bytearray(), bytearray()
        while len(at_host) < len(BIG) or len(at_guest) < len(BIG):
            up += flow.try_send(BIG[up : up + 60000])
            with contextlib.suppress(BlockingIOError):
                at_host += host.recv(1 << 20)
            with contextlib.suppress(BlockingIOError):
                down += host.send(BIG[down : down + 100000])
            engine.driver.step()
            if flow.received:
                at_guest += flow.recv()
        assert at_host == BIG
        assert at_guest == BIG
        flow.close()


def test_an_answer_for_a_cancelled_request_finds_it_stale_and_closes_the_descriptor(engine: EngineUnderTest) -> None:
    asked: list[Event] = []
    engine.on_connect = asked.append
    flow, _ = engine.driver.open(lib.VSO_CONNECT, pack_open("tcp://192.0.2.1:80"))
    engine.driver.wait(lambda: asked)
    flow.close()
    assert engine.wait_event("CANCEL").handle == asked[0].handle
    ours, theirs = socket.socketpair()
    with theirs:
        assert engine.connected(asked[0], ours, "tcp://0.0.0.0:1", "tcp://192.0.2.1:80") == -errno.ESTALE
        assert theirs.recv(1) == b""
    assert engine.refuse(asked[0], lib.VSO_DENY, errno.EACCES) == -errno.ESTALE


def test_a_descriptor_of_the_wrong_kind_is_refused_and_the_request_still_open(engine: EngineUnderTest) -> None:
    codes: list[int] = []

    def answer(event: Event) -> None:
        codes.append(engine.connected(event, socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "", ""))
        codes.append(engine.refuse(event, lib.VSO_OFFLOAD, errno.EIO))

    engine.on_connect = answer
    with pytest.raises(Refused) as refused:
        engine.driver.connect("tcp://192.0.2.1:80")
    assert codes == [-errno.EPROTOTYPE, 0]
    assert refused.value.errno == errno.EIO


def test_any_connected_stream_descriptor_serves_a_connect(engine: EngineUnderTest) -> None:
    ours, theirs = socket.socketpair()
    engine.on_connect = lambda event: engine.connected(event, ours, "tcp://10.0.0.2:1", "tcp://10.0.0.1:2")
    with theirs:
        flow = engine.driver.connect("tcp://10.0.0.1:2")
        assert (flow.local, flow.peer) == ("tcp://10.0.0.2:1", "tcp://10.0.0.1:2")
        flow.send(b"to an asyncio handler, say")
        assert theirs.recv(100) == b"to an asyncio handler, say"
        flow.close()


def test_one_flow_too_many_is_refused_with_enfile(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(config={"max_flows": 2})
    with connection(engine) as (one, _), connection(engine) as (two, _):
        with pytest.raises(Refused) as refused:
            engine.driver.connect("tcp://127.0.0.1:1")
        assert refused.value.errno == errno.ENFILE
        one.close()
        with connection(engine) as (three, _):
            three.close()
        two.close()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        pack_open(""),
        pack_open("tcp://1.2.3.4:5")[:-1],
        pack_open("tcp://1.2.3.4:5") + b"x",
        pack_open("tcp://1.2.3.4:\n"),
        pack_open(b"tcp://1.2.3.4:5\0"),
        pack_open("tcp://1.2.3.4:5", flags=lib.VSO_OPEN_ADDR_ONLY),
        pack_open("tcp://1.2.3.4:5", options=b"12345678"),
        pack_open("x" * 256),
    ],
)
def test_a_malformed_connect_is_refused_with_einval(engine: EngineUnderTest, payload: bytes) -> None:
    with pytest.raises(Refused) as refused:
        engine.driver.finish(*engine.driver.open(lib.VSO_CONNECT, payload))
    assert refused.value.errno == errno.EINVAL
    assert engine.stats.flows == 0
    engine.driver.ping()


def test_events_tell_the_story_of_a_flow_and_no_byte_needs_one(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        for _ in range(100):
            flow.send(bytes(1000))
            host.sendall(bytes(500))
        assert len(flow.recv_exactly(50000)) == 50000
        flow.close()
        ended = engine.wait_event("ENDED")
        assert (ended.flow, ended.error, ended.to_host, ended.to_guest) == (flow.id, 0, 100000, 50000)
        assert engine.stats.events == 3  # HELLO, CONNECT, ENDED
        assert (engine.stats.to_host, engine.stats.to_guest) == (100000, 50000)


def test_the_window_is_no_larger_than_the_send_buffer_of_the_application(engine: EngineUnderTest) -> None:
    with host_listener() as (listener, uri):
        for sndbuf, window in ((0, 262144), (8192, 8192), (1, 4096), (1 << 30, 262144)):
            flow = engine.driver.connect(uri, sndbuf=sndbuf)
            assert flow.peer_alloc == window
            host, _ = listener.accept()
            with host:
                flow.close()


def test_accepted_flows_inherit_the_window_of_their_listener(engine: EngineUnderTest) -> None:
    flow = engine.driver.bind("tcp://127.0.0.1:0", sndbuf=8192)
    flow.listen(1)
    address, port = flow.local.removeprefix("tcp://").split(":")
    with socket.create_connection((address, int(port)), 30):
        assert flow.accept().peer_alloc == 8192
