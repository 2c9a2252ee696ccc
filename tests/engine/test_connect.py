"""Connecting, moving bytes and closing, against real host sockets."""

from __future__ import annotations

import contextlib
import errno
import socket

import pytest

from vhostsock._core import lib
from vhostsock.testing.offload import Refused

from .engine import EngineUnderTest, Event, host_listener

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


def test_four_megabytes_each_way_through_small_windows() -> None:
    engine = EngineUnderTest(config={"buf_alloc": 8192}, window=10000, rx_buffers=4)
    try:
        engine.driver.hello()
        with host_listener() as (listener, uri):
            flow = engine.driver.connect(uri)
            host, _ = listener.accept()
            with host:
                host.settimeout(30)
                host.setblocking(False)
                sent, got, up = 0, bytearray(), 0
                back = bytearray()
                while len(got) < len(BIG) or len(back) < len(BIG):
                    if up < len(BIG):
                        up += flow.try_send(BIG[up : up + 60000])
                    with contextlib.suppress(BlockingIOError):
                        got += host.recv(1 << 20)
                    if sent < len(BIG):
                        with contextlib.suppress(BlockingIOError):
                            sent += host.send(BIG[sent : sent + 100000])
                    engine.driver.step()
                    while flow.received:
                        back += flow.recv()
                assert got == BIG
                assert back == BIG
                flow.close()
    finally:
        engine.close()
