# SPDX-License-Identifier: BSD-3-Clause
"""Waiting awake for what is about to come (csrc/engine/vs_poll.c)."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from vhostsock._core import lib
from vhostsock.testing.driver import DriverQueue
from vhostsock.testing.flow import Flow

from .engine import EngineUnderTest, connection
from .test_look import Kicks

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
AWAKE = 2 * 10**8  # ns: each answer of a test comes within it, and the next question within 20 times that
EPOCHS = 5 * 64  # waits: more than one round of asleep, awake and what is kept, of which most is one of both


class Talk(NamedTuple):
    """A connection, and what its driver decided about kicks."""

    engine: EngineUnderTest
    kicks: Kicks
    flow: Flow
    host: socket.socket

    def converse(self, times: int = 1, question: bytes = b"question") -> None:
        for _ in range(times):
            self.flow.send(question)
            assert self.host.recv(len(question), socket.MSG_WAITALL) == question
            self.host.sendall(b"answer")
            assert self.flow.recv_exactly(6) == b"answer"

    def until_awake(self) -> None:
        """A question is seen that nobody was kicked for."""
        self.kicks.decided.clear()
        while False not in self.kicks.decided:
            self.converse()


@pytest.fixture
def talk(make_engine: Callable[..., EngineUnderTest], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Talk]]:
    with ExitStack() as stack:

        def begin(poll_ns: int) -> Talk:
            engine = make_engine(config={"poll_ns": poll_ns})
            kicks = Kicks(engine.driver.queues[1], monkeypatch)
            return Talk(engine, kicks, *stack.enter_context(connection(engine)))

        yield begin


def test_what_is_faster_is_found_and_other_traffic_does_not_stand_in_its_way(tmp_path: Path) -> None:
    engine, core = CSRC / "engine", CSRC / "core"
    sources = [HERE / "poll_learn.c", *sorted(core.glob("*.c")), *sorted(set(engine.glob("*.c")) - {engine / "vs_poll.c"})]
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-pthread"]
    flags += [f"-I{folder}" for folder in (engine, core, CSRC / "include")]
    program = tmp_path / "poll_learn"
    subprocess.run([os.environ.get("CC", "cc"), *flags, *map(str, sources), "-o", str(program)], check=True, timeout=100)
    done = subprocess.run([program], capture_output=True, text=True, timeout=100)
    assert done.stdout == "ok\n", done.stderr


def enabled(queue: DriverQueue) -> bool:
    """Does the device want a kick for the next message?"""
    return queue.avail_event == queue.avail_idx if queue.event_idx else not queue.used_flags


def test_questions_in_a_conversation_need_no_kick_while_the_thread_is_awake(talk: Callable[[int], Talk]) -> None:
    it = talk(AWAKE)
    it.until_awake()
    assert it.kicks.decided[:16] == [True] * 16, "first it is found out how fast it is asleep"
    it.converse(EPOCHS)


def test_a_thread_that_waited_awake_in_vain_sleeps_and_can_be_kicked(talk: Callable[[int], Talk]) -> None:
    it = talk(10**6)
    it.until_awake()
    while not it.kicks.decided[-1]:
        while not enabled(it.engine.driver.queues[1]):  # about to wait awake, perhaps: then no kick is needed after all
            pass
        it.flow.send(b"x")
        assert it.host.recv(1) == b"x"
    it.converse(EPOCHS)


def test_an_engine_that_may_not_poll_is_kicked_for_each_question(talk: Callable[[int], Talk]) -> None:
    it = talk(0)
    it.kicks.decided.clear()
    it.converse(EPOCHS)
    assert it.kicks.decided == [True] * EPOCHS


def test_a_driver_that_wants_no_calls_is_awake_itself_and_the_thread_sleeps(
    talk: Callable[[int], Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = talk(AWAKE)
    monkeypatch.setattr(it.engine.driver.queues[0], "enable_calls", lambda: True)  # there may be more: look again
    it.kicks.decided.clear()
    it.converse(EPOCHS)
    assert it.kicks.decided == [True] * EPOCHS


def test_bulk_is_not_waited_for_awake(talk: Callable[[int], Talk]) -> None:
    it = talk(AWAKE)
    it.kicks.decided.clear()
    it.converse(EPOCHS, bytes(32768))
    assert False not in it.kicks.decided


def test_a_ring_may_stop_and_start_while_the_thread_is_awake(talk: Callable[[int], Talk]) -> None:
    it = talk(AWAKE)
    it.until_awake()
    it.flow.send(b"y")  # perhaps nobody has looked yet
    it.engine.detach(1)
    it.engine.attach(1)
    assert it.host.recv(1) == b"y"
    it.converse(EPOCHS)


def test_who_stops_the_engine_does_not_wait_for_a_thread_that_is_awake(talk: Callable[[int], Talk]) -> None:
    it = talk(2**32 - 1)  # 4 s, which is no assertion: stop() returns
    it.until_awake()
    lib.vse_stop(it.engine.ptr)
