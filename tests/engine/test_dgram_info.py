# SPDX-License-Identifier: BSD-3-Clause
"""What drivers with VSO_F_DGRAM_INFO are told: verdicts on destinations, errors of sent datagrams, how received ones came."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from vhostsock._core import lib
from vhostsock.testing.offload import Flow, Refused

from .engine import EngineUnderTest, Event, make_uri, split_uri

INFO = lib.VSO_F_DGRAM | lib.VSO_F_DGRAM_INFO
MAPPED_LOOPBACK = bytes(10) + b"\xff\xff\x7f\0\0\1"
UDP_SEGMENT, UDP_GRO, IP_RECVTTL = 103, 104, 12  # linux/udp.h, linux/in.h; the socket module has no names for them


@pytest.fixture
def knowing() -> Iterator[EngineUnderTest]:
    """An engine whose driver has the feature."""
    engine = EngineUnderTest()
    try:
        engine.driver.hello(features=INFO)
        yield engine
    finally:
        engine.close()


@pytest.fixture
def host() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(30)
        yield sock


def uri_of(sock: socket.socket) -> str:
    return make_uri("udp", sock.getsockname())


def closed_port() -> str:
    """Where nobody listens; on loopback, so that an ICMP error comes back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return uri_of(sock)


def unconnected(engine: EngineUnderTest, uri: str) -> Flow:
    return engine.driver.connect(uri, flags=lib.VSO_OPEN_ADDR_ONLY)


def test_an_allowed_destination_is_asked_for_once(knowing: EngineUnderTest, host: socket.socket) -> None:
    flow = unconnected(knowing, uri_of(host))
    flow.ask(uri_of(host))
    flow.ask(uri_of(host))
    flow.sendto(b"hello", uri_of(host))
    assert host.recv(10) == b"hello"
    assert [e.name for e in knowing.events].count("DGRAM_DEST") == 1
    flow.close()


@pytest.mark.parametrize(
    ("verdict", "error"), [(lib.VSO_NATIVE, 0), (lib.VSO_DENY, errno.EPERM), (lib.VSO_OFFLOAD, errno.ENETUNREACH)]
)
def test_a_refused_destination_is_told_with_its_verdict(knowing: EngineUnderTest, verdict: int, error: int) -> None:
    def refuse(event: Event) -> None:
        knowing.destination(event, event.payload.decode(), None, error, verdict)

    knowing.on_dest = refuse
    flow = unconnected(knowing, "udp://10.9.9.9:9")
    for _ in range(2):  # the second is answered from what is remembered
        with pytest.raises(Refused) as refused:
            flow.ask("udp://10.9.9.9:9")
        assert (refused.value.verdict, refused.value.errno) == (verdict, error)
    flow.close()


def test_nonsense_for_a_destination_is_einval(knowing: EngineUnderTest, host: socket.socket) -> None:
    flow = unconnected(knowing, uri_of(host))
    for text in ("", "udp://\x01", "u" * 256):
        with pytest.raises(Refused) as refused:
            flow.ask(text)
        assert refused.value.errno == errno.EINVAL
    flow.close()


def test_questions_that_python_does_not_answer_are_bounded(knowing: EngineUnderTest, host: socket.socket) -> None:
    knowing.on_dest = lambda event: None
    flow = unconnected(knowing, uri_of(host))
    for port in range(1, 9):
        flow._post(lib.VSO_DEST, cookie=1000 + port, payload=b"udp://10.9.9.9:%d" % port)
    with pytest.raises(Refused) as refused:
        flow.ask("udp://10.9.9.9:10")
    assert refused.value.errno == errno.ENOBUFS
    flow.close()


def test_a_closed_port_is_told_with_its_destination_and_offender(knowing: EngineUnderTest) -> None:
    uri = closed_port()
    flow = unconnected(knowing, uri)
    flow.sendto(b"anybody?", uri)
    error = flow.recv_error()
    assert (error.head.error, error.head.origin, error.head.icmp_type, error.head.icmp_code) == (errno.ECONNREFUSED, 2, 3, 3)
    assert (error.uri, error.offender, error.data) == (uri, "udp://127.0.0.1:0", b"anybody?")
    flow.close()


def test_a_connected_flow_hears_of_its_closed_peer_and_lives_on(knowing: EngineUnderTest) -> None:
    uri = closed_port()
    flow = knowing.driver.connect(uri)
    for _ in range(2):
        flow.sendto(b"anybody?")
        assert (flow.recv_error().head.error, flow.error) == (errno.ECONNREFUSED, 0)
    flow.close()


def test_what_a_call_on_the_host_gives_is_told(knowing: EngineUnderTest, host: socket.socket) -> None:
    flow = knowing.driver.connect(uri_of(host))
    flow.sendto(bytes(65520))
    error = flow.recv_error()
    assert (error.head.error, error.head.origin) == (errno.EMSGSIZE, 0)
    flow.close()


def test_a_driver_without_the_feature_hears_no_errors(engine: EngineUnderTest) -> None:
    flow = engine.driver.connect(closed_port())
    for _ in range(5):
        flow.sendto(b"anybody?")
    engine.driver.ping()
    assert not flow.errors
    flow.close()


def test_ttl_and_tos_travel_both_ways(knowing: EngineUnderTest, host: socket.socket) -> None:
    for option in (IP_RECVTTL, socket.IP_RECVTOS):
        host.setsockopt(socket.IPPROTO_IP, option, 1)
    flow = unconnected(knowing, uri_of(host))
    flow.ask(uri_of(host))
    flow.sendto(b"x", uri_of(host), flags=lib.VSO_DG_TTL | lib.VSO_DG_TOS, ttl=7, tos=0x28)
    data, control, _, back = host.recvmsg(10, 200)
    assert data == b"x"
    assert {(kind, value[0]) for _, kind, value in control} == {(socket.IP_TTL, 7), (socket.IP_TOS, 0x28)}
    host.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 9)
    host.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)
    host.sendto(b"y", ("127.0.0.1", back[1]))
    assert flow.recvfrom()[0] == b"y"
    head, local = flow.infos.popleft()
    assert head.flags == lib.VSO_DG_TTL | lib.VSO_DG_TOS | lib.VSO_DG_LOCAL
    assert (head.ttl, head.tos, local) == (9, 0x10, MAPPED_LOOPBACK)
    flow.close()


def test_a_flow_answers_from_where_it_was_reached_and_from_nowhere_else(knowing: EngineUnderTest, host: socket.socket) -> None:
    def bind_any(event: Event) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", 0))
        knowing.bound(event, sock, make_uri("udp", sock.getsockname()))

    knowing.on_bind = bind_any
    flow = knowing.driver.bind("udp://0.0.0.0:0")
    port = split_uri(flow.local)[2]
    host.sendto(b"q", ("127.0.0.9", port))
    assert flow.recvfrom() == (b"q", uri_of(host))
    _, local = flow.infos.popleft()
    assert local == bytes(10) + b"\xff\xff\x7f\0\0\x09"
    flow.sendto(b"a", uri_of(host), flags=lib.VSO_DG_LOCAL, local=local)
    assert host.recvfrom(10) == (b"a", ("127.0.0.9", port))
    flow.sendto(b"b", uri_of(host), flags=lib.VSO_DG_LOCAL, local=local[:-1] + b"\x08")
    assert host.recvfrom(10) == (b"b", ("127.0.0.1", port))
    flow.close()


@pytest.mark.parametrize("segment", [1000, 30000], ids=["cut by the host's kernel", "above what an interface takes"])
def test_a_segmented_datagram_arrives_as_several(knowing: EngineUnderTest, host: socket.socket, segment: int) -> None:
    flow = knowing.driver.connect(uri_of(host))
    data = bytes(range(250)) * (2 * segment // 250) + b"rest"
    flow.sendto(data, flags=lib.VSO_DG_SEGMENT, segment=segment)
    assert [host.recv(65536) for _ in range(3)] == [data[:segment], data[segment : 2 * segment], b"rest"]
    flow.close()


def test_joined_datagrams_tell_their_size(knowing: EngineUnderTest, host: socket.socket) -> None:
    flow = knowing.driver.connect(uri_of(host))
    flow.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    flow.sendto(b"where")
    _, back = host.recvfrom(10)
    host.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    host.sendto(bytes(2500), back)
    got = 0
    while got < 2500:  # loopback does not cut what will be joined again, but it may
        data, _ = flow.recvfrom()
        got += len(data)
        head, _ = flow.infos.popleft()
        assert head.segment == (1000 if len(data) > 1000 else 0)
    flow.close()


@pytest.mark.parametrize("flags", [lib.VSO_DG_SEGMENT, lib.VSO_DG_LOCAL], ids=["segments of nothing", "no address"])
def test_what_makes_no_sense_is_a_protocol_error(knowing: EngineUnderTest, host: socket.socket, flags: int) -> None:
    flow = knowing.driver.connect(uri_of(host))
    flow.sendto(b"", flags=flags)
    knowing.driver.wait(lambda: flow.error)
    assert flow.error == errno.EPROTO
    flow.close()
