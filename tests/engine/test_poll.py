# SPDX-License-Identifier: BSD-3-Clause
"""Waiting awake for what is about to come (csrc/engine/vs_poll.c)."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from vhostsock._core import lib
from vhostsock.testing.driver import DriverQueue
from vhostsock.testing.flow import Flow

from .engine import EngineUnderTest, connection
from .test_look import Kicks

AWAKE = {"poll_ns": 2 * 10**8}  # each answer of a test comes within it, and the next question within 20 times that
EPOCHS = 5 * 64  # waits: more than one round of asleep, awake and what is kept, of which most is one of both


def converse(flow: Flow, host: socket.socket, times: int = 1) -> None:
    for _ in range(times):
        flow.send(b"question")
        assert host.recv(8) == b"question"
        host.sendall(b"answer")
        assert flow.recv_exactly(6) == b"answer"


def enabled(queue: DriverQueue) -> bool:
    """Does the device want a kick for the next message?"""
    return queue.avail_event == queue.avail_idx if queue.event_idx else not queue.used_flags


def until_awake(kicks: Kicks, flow: Flow, host: socket.socket) -> None:
    """A question is seen that nobody was kicked for."""
    kicks.decided.clear()
    while False not in kicks.decided:
        converse(flow, host)


def test_questions_in_a_conversation_need_no_kick_while_the_thread_is_awake(
    make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(config=AWAKE)
    kicks = Kicks(engine.driver.queues[1], monkeypatch)
    with connection(engine) as (flow, host):
        until_awake(kicks, flow, host)
        assert kicks.decided[:16] == [True] * 16, "first it is found out how fast it is asleep"
        converse(flow, host, EPOCHS)


def test_a_thread_that_waited_awake_in_vain_sleeps_and_can_be_kicked(
    make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(config=AWAKE | {"poll_ns": 10**6})
    kicks = Kicks(engine.driver.queues[1], monkeypatch)
    queue = engine.driver.queues[1]
    with connection(engine) as (flow, host):
        until_awake(kicks, flow, host)
        while not kicks.decided[-1]:
            while not enabled(queue):  # it may be about to wait awake, and then a kick was not needed after all
                pass
            flow.send(b"x")
            assert host.recv(1) == b"x"
        converse(flow, host, EPOCHS)


def test_an_engine_that_may_not_poll_is_kicked_for_each_question(
    make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(config={"poll_ns": 0})
    kicks = Kicks(engine.driver.queues[1], monkeypatch)
    with connection(engine) as (flow, host):
        kicks.decided.clear()
        converse(flow, host, EPOCHS)
        assert kicks.decided == [True] * EPOCHS


def test_bulk_is_not_waited_for_awake(make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(config=AWAKE)
    kicks = Kicks(engine.driver.queues[1], monkeypatch)
    with connection(engine) as (flow, host):
        kicks.decided.clear()
        for _ in range(EPOCHS):
            flow.send(bytes(32768))
            assert len(host.recv(32768, socket.MSG_WAITALL)) == 32768
            host.sendall(b"more")
            assert flow.recv_exactly(4) == b"more"
        assert False not in kicks.decided


def test_a_ring_may_stop_and_start_while_the_thread_is_awake(
    make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(config=AWAKE)
    kicks = Kicks(engine.driver.queues[1], monkeypatch)
    with connection(engine) as (flow, host):
        until_awake(kicks, flow, host)
        flow.send(b"y")  # perhaps nobody has looked yet
        engine.detach(1)
        engine.attach(1)
        assert host.recv(1) == b"y"
        converse(flow, host, EPOCHS)


def test_who_stops_the_engine_does_not_wait_for_a_thread_that_is_awake(
    make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(config={"poll_ns": 2**32 - 1})  # 4 s, which is no assertion: stop() returns
    kicks = Kicks(engine.driver.queues[1], monkeypatch)
    with connection(engine) as (flow, host):
        until_awake(kicks, flow, host)
    lib.vse_stop(engine.ptr)
