# SPDX-License-Identifier: BSD-3-Clause
"""Streams of small messages need no kicks (csrc/engine/vs_look.c)."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from vhostsock.testing.driver import DriverQueue
from vhostsock.testing.flow import Flow

from .engine import EngineUnderTest, connection

SLOW = {"quick_ns": 4 * 10**9, "look_ns": 2 * 10**8}  # on any machine a test is quicker than this


class Kicks:
    """What the driver's decisions were: a kick, or none because the device wants none."""

    def __init__(self, queue: DriverQueue, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decided: list[bool] = []
        kick = queue.kick

        def counted() -> bool:
            self.decided.append(kick())
            return self.decided[-1]

        monkeypatch.setattr(queue, "kick", counted)

    def until_a_stream(self, flow: Flow, host: socket.socket) -> None:
        """One message after the other arrives, until one needs no kick."""
        self.decided.clear()
        while False not in self.decided:
            flow.send(b"x")
            assert host.recv(1) == b"x"


def test_messages_of_a_stream_arrive_without_a_kick(
    make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(config=SLOW)
    kicks = Kicks(engine.driver.queues[1], monkeypatch)
    with connection(engine) as (flow, host):
        kicks.until_a_stream(flow, host)
        assert kicks.decided.count(True) >= 5, "the first ones are served at once"


def test_who_waits_for_answers_makes_no_stream(
    make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(config=SLOW)
    kicks = Kicks(engine.driver.queues[1], monkeypatch)
    with connection(engine) as (flow, host):
        kicks.decided.clear()
        for _ in range(20):
            flow.send(b"question")
            assert host.recv(8) == b"question"
            host.sendall(b"answer")
            assert flow.recv_exactly(6) == b"answer"
        assert kicks.decided == [True] * 20


def test_a_stream_survives_a_ring_that_stops_and_starts(
    make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(config=SLOW)
    kicks = Kicks(engine.driver.queues[1], monkeypatch)
    with connection(engine) as (flow, host):
        kicks.until_a_stream(flow, host)
        flow.send(b"y")  # perhaps nobody has looked yet
        engine.detach(1)
        engine.attach(1)
        assert host.recv(1) == b"y"
        flow.send(b"z")
        assert host.recv(1) == b"z"
