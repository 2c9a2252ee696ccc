# SPDX-License-Identifier: BSD-3-Clause
"""Urgent data of TCP, both ways: told at once, and in its place in the stream."""

from __future__ import annotations

import errno
import fcntl
import socket
from collections.abc import Callable

import pytest

from vhostsock._core import lib

from .engine import EngineUnderTest, connection, recv_until_end

MakeEngine = Callable[..., EngineUnderTest]
FEATURES = lib.VSO_F_DGRAM | lib.VSO_F_URGENT
COMING = -1


def knowing(make_engine: MakeEngine, **driver: int) -> EngineUnderTest:
    """An engine and a driver that both know of urgent data."""
    engine = make_engine(hello=False, config={"features": FEATURES}, **driver)
    engine.driver.hello(features=FEATURES)
    return engine


@pytest.fixture
def engine(make_engine: MakeEngine) -> EngineUnderTest:
    return knowing(make_engine)


def test_an_urgent_byte_of_the_host_is_told_and_comes_in_its_place(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        host.sendall(b"before")
        host.send(b"U", socket.MSG_OOB)
        host.sendall(b"after")
        assert flow.recv_exactly(12) == b"beforeUafter"
        assert flow.urgent == [(ord("U"), COMING), (ord("U"), 6)]
        host.close()
        assert flow.recv() == b""
        flow.close()


def test_it_is_told_when_the_window_is_full_and_comes_when_there_is_room(make_engine: MakeEngine) -> None:
    engine = knowing(make_engine, window=1000)
    with connection(engine) as (flow, host):
        host.sendall(bytes(1000))
        engine.driver.wait(lambda: len(flow.received) == 1000)
        host.send(b"U", socket.MSG_OOB)
        host.sendall(b"after")
        host.shutdown(socket.SHUT_WR)
        engine.driver.wait(lambda: flow.urgent)
        assert flow.urgent == [(ord("U"), COMING)]
        assert flow.recv_exactly(1006) == bytes(1000) + b"Uafter"
        assert flow.urgent[1:] == [(ord("U"), 1000)]
        assert flow.recv() == b"", "the end comes behind it"
        flow.close()


def test_a_newer_one_makes_the_older_a_byte_like_others(make_engine: MakeEngine) -> None:
    engine = knowing(make_engine, window=100)
    with connection(engine) as (flow, host):
        host.sendall(bytes(200))
        engine.driver.wait(lambda: len(flow.received) == 100)
        for byte in (b"1", b"2"):
            host.send(byte, socket.MSG_OOB)
            engine.driver.wait(lambda byte=byte: flow.urgent and flow.urgent[-1] == (ord(byte), COMING))  # type: ignore[misc]
        assert flow.recv_exactly(202) == bytes(200) + b"12"
        assert flow.urgent[2:] == [(ord("2"), 201)]
        flow.close()


def test_many_come_one_after_the_other(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        for number in range(100):
            host.sendall(b"ab")
            host.send(bytes([number]), socket.MSG_OOB)
            assert flow.recv_exactly(3) == b"ab" + bytes([number])
        assert [where for _, where in flow.urgent if where != COMING] == [3 * i + 2 for i in range(100)]
        flow.close()


def test_the_host_gets_an_urgent_byte_in_its_place(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        flow.send(b"before")
        flow.send_urgent(ord("U"))
        flow.send(b"after")
        flow.shutdown()
        engine.driver.ping()
        assert host.recv(100, socket.MSG_WAITALL) == b"before", "a read stops at the mark"
        assert host.recv(1, socket.MSG_OOB) == b"U"
        assert recv_until_end(host) == b"after"
        flow.close()


def test_one_that_waits_behind_what_the_host_does_not_take_is_urgent_still(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        sent = 0
        while flow.credit > 10 or not engine.stats.buffered:
            sent += flow.try_send(bytes(min(flow.credit - 10, 65536)))
            engine.driver.ping()
        flow.send_urgent(ord("1"))
        flow.send(b"xy")
        flow.send_urgent(ord("2"))
        flow.send(b"z")
        flow.shutdown()
        host.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        got = 0
        while got < sent + 3:  # whatever of it was urgent before the second came: the mark is in front of the second
            got += len(host.recv(min(65536, sent + 3 - got)))
        engine.driver.wait(lambda: not engine.stats.buffered)
        assert int.from_bytes(_at_mark(host), "little") == 1
        assert recv_until_end(host) == b"2z"
        flow.close()


def _at_mark(sock: socket.socket) -> bytes:
    return fcntl.ioctl(sock, 0x8905, bytes(4))  # SIOCATMARK


@pytest.mark.parametrize("payload", [b"", b"ab"], ids=["nothing", "two bytes"])
def test_an_urgent_message_has_one_byte(engine: EngineUnderTest, payload: bytes) -> None:
    with connection(engine) as (flow, _):
        flow._post(lib.VSO_URGENT, payload=payload)
        engine.driver.wait(lambda: flow.error)
        assert flow.error == errno.EPROTO
        flow.close()


def test_without_the_feature_there_is_none(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with connection(engine) as (flow, host):
        host.sendall(b"before")
        host.send(b"U", socket.MSG_OOB)
        host.sendall(b"after")
        assert flow.recv_exactly(11) == b"beforeafter"
        assert not flow.urgent
        flow.send_urgent(1)
        engine.driver.wait(lambda: flow.error)
        assert flow.error == errno.EPROTO
        flow.close()
