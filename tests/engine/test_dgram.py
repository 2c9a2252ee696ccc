"""Datagram flows: destinations, sources, and what is dropped."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator

import pytest

from vhostsock._core import lib
from vhostsock.testing.offload import Flow, Refused

from .engine import EngineUnderTest, Event, make_uri, split_uri


@contextlib.contextmanager
def host_udp() -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(30)
        yield sock, make_uri("udp", sock.getsockname())


def unconnected(engine: EngineUnderTest, uri: str) -> Flow:
    """What a guest's first sendto() makes."""
    return engine.driver.connect(uri, flags=lib.VSO_OPEN_ADDR_ONLY)


def test_a_connected_flow_sends_and_receives(engine: EngineUnderTest) -> None:
    with host_udp() as (host, uri):
        flow = engine.driver.connect(uri)
        flow.sendto(b"query")
        data, address = host.recvfrom(100)
        assert data == b"query"
        host.sendto(b"answer", address)
        assert flow.recvfrom() == (b"answer", uri)
        flow.sendto(b"by name", uri)
        assert host.recv(100) == b"by name"
        flow.close()


def test_python_is_asked_once_for_each_destination(engine: EngineUnderTest) -> None:
    with host_udp() as (one, uri_one), host_udp() as (two, uri_two):
        flow = unconnected(engine, uri_one)
        for i in range(10):
            flow.sendto(b"one %d" % i, uri_one)
            flow.sendto(b"two %d" % i, uri_two)
        for i in range(10):
            engine.driver.wait(lambda: engine.stats.dgrams_to_host == 20)
            assert one.recv(100) == b"one %d" % i
            assert two.recv(100) == b"two %d" % i
        assert [e.name for e in engine.events].count("DGRAM_DEST") == 2
        flow.close()


def test_an_answer_shows_the_destination_that_the_guest_sent_to(engine: EngineUnderTest) -> None:
    with host_udp() as (host, uri):
        flow = unconnected(engine, "udp://10.0.2.3:53")
        address = split_uri(uri)[1:]
        engine.on_dest = lambda event: engine.destination(event, "udp://10.0.2.3:53", address)
        flow.sendto(b"query", "udp://10.0.2.3:53")
        engine.driver.wait(lambda: engine.stats.dgrams_to_host == 1)
        data, back = host.recvfrom(100)
        assert data == b"query"
        host.sendto(b"answer", ("127.0.0.1", back[1]))
        assert flow.recvfrom() == (b"answer", "udp://10.0.2.3:53")
        flow.close()


def test_a_stranger_shows_its_real_address(engine: EngineUnderTest) -> None:
    flow = engine.driver.bind("udp://127.0.0.1:0")
    with host_udp() as (host, uri):
        host.sendto(b"hello", split_uri(flow.local)[1:])
        assert flow.recvfrom() == (b"hello", uri)
    flow.close()


def test_a_server_answers_more_clients_at_once_than_a_client_has_destinations(engine: EngineUnderTest) -> None:
    asked: list[Event] = []
    engine.on_dest = asked.append
    flow = engine.driver.bind("udp://127.0.0.1:0")
    with contextlib.ExitStack() as stack:
        clients = dict(stack.enter_context(host_udp())[::-1] for _ in range(200))
        for uri, client in clients.items():
            client.sendto(uri.encode(), split_uri(flow.local)[1:])
        for _ in clients:
            data, source = flow.recvfrom()
            assert data == source.encode()
        for uri in clients:
            flow.sendto(b"for " + uri.encode(), uri)
        engine.driver.wait(lambda: engine.stats.dgrams_to_host == len(clients))
        assert all(client.recv(100) == b"for " + uri.encode() for uri, client in clients.items())
    assert not asked
    flow.close()


def test_datagrams_are_held_while_python_decides_and_dropped_when_it_refuses(engine: EngineUnderTest) -> None:
    asked: list[Event] = []
    engine.on_dest = asked.append
    with host_udp() as (host, uri):
        flow = unconnected(engine, uri)
        for data in (b"a", b"b", b"c"):
            flow.sendto(data, uri)
            flow.sendto(data, "udp://10.9.9.9:9")
        engine.driver.wait(lambda: len(asked) == 2)
        engine.send_for_real(asked[0])
        assert [host.recv(10) for _ in range(3)] == [b"a", b"b", b"c"]
        engine.destination(asked[1], "udp://10.9.9.9:9", None, errno.EACCES)
        assert engine.stats.dgrams_dropped == 3
        flow.sendto(b"d", "udp://10.9.9.9:9")
        engine.driver.ping()
        assert engine.stats.dgrams_dropped == 4
        assert len(asked) == 2
        flow.close()


def test_what_is_held_is_bounded(engine: EngineUnderTest) -> None:
    engine.on_dest = lambda event: None
    flow = unconnected(engine, "udp://10.9.9.9:9")
    for _ in range(10):
        flow.sendto(bytes(60000), "udp://10.9.9.9:9")
    for port in range(1, 21):
        flow.sendto(b"x", f"udp://10.9.9.9:{port}")
    engine.driver.ping()
    assert engine.stats.dgrams_dropped > 8 + 10
    flow.close()


def test_more_destinations_than_are_remembered_still_work(engine: EngineUnderTest) -> None:
    with host_udp() as (host, uri):
        address = split_uri(uri)[1:]
        engine.on_dest = lambda event: engine.destination(event, event.payload.decode(), address)
        flow = unconnected(engine, uri)
        for i in range(200):
            flow.sendto(b"%d" % i, f"udp://10.0.0.1:{i + 1}")
            engine.driver.wait(lambda i=i: engine.stats.dgrams_to_host == i + 1)  # type: ignore[misc]
            assert host.recv(10) == b"%d" % i
        flow.close()


def test_an_empty_datagram_and_the_largest_arrive(engine: EngineUnderTest) -> None:
    with host_udp() as (host, uri):
        flow = engine.driver.connect(uri)
        largest = bytes(range(256)) * 255 + bytes(227)  # 65507
        for data in (b"", largest):
            flow.sendto(data)
            got, back = host.recvfrom(70000)
            assert got == data
        host.sendto(b"", back)
        assert flow.recvfrom() == (b"", uri)
        flow.sendto(largest + b"x")  # EMSGSIZE at the host
        engine.driver.ping()
        assert engine.stats.dgrams_dropped == 1
        flow.close()


def test_a_datagram_that_does_not_fit_its_chain_is_dropped_whole(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(rx_size=2048)
    with host_udp() as (host, uri):
        flow = engine.driver.connect(uri)
        flow.sendto(b"x")
        _, back = host.recvfrom(10)
        host.sendto(bytes(3000), back)
        host.sendto(bytes(1400), back)
        assert flow.recvfrom() == (bytes(1400), uri)
        assert engine.stats.dgrams_dropped == 1
        flow.close()


def test_an_icmp_error_does_not_stop_a_flow(engine: EngineUnderTest) -> None:
    with host_udp() as (_, dead):
        pass
    flow = engine.driver.connect(dead)
    for _ in range(5):
        flow.sendto(b"anybody?")
        engine.driver.ping()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.settimeout(30)
        host.bind(split_uri(dead)[1:])
        flow.sendto(b"now?")
        assert host.recv(10) == b"now?"
    flow.close()


def test_datagrams_stay_native_when_the_feature_was_not_negotiated(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(hello=False)
    engine.driver.hello(features=0)
    with pytest.raises(Refused) as refused:
        engine.driver.connect("udp://127.0.0.1:53")
    assert refused.value.verdict == lib.VSO_NATIVE


def test_a_datagram_whose_uri_is_longer_than_the_message_resets_the_flow(engine: EngineUnderTest) -> None:
    with host_udp() as (_, uri):
        flow = engine.driver.connect(uri)
        engine.driver.post(lib.VSO_DGRAM, flow.id, payload=b"\xff\xff" + bytes(6) + b"udp://")
        engine.driver.wait(lambda: flow.error)
        assert flow.error == errno.EPROTO
        flow.close()
