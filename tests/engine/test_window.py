# SPDX-License-Identifier: BSD-3-Clause
"""The window of a stream to the host grows for a flow that has its pair to itself (csrc/engine/vs_window.c)."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from vhostsock.testing.flow import Flow, Message

from .engine import EngineUnderTest, connection

BASE, TIMES = 65536, 4
AT_ONCE = 1  # grow_ns: each time that the window is looked at
# How fast the machine is nobody knows: a flow sends until its window is what is waited for, or the time limit ends the test.


@pytest.fixture
def engine(make_engine: Callable[..., EngineUnderTest]) -> EngineUnderTest:
    return make_engine(config={"buf_alloc": BASE, "grow_ns": AT_ONCE})


@contextmanager
def read_by_somebody(host: socket.socket) -> Iterator[None]:
    """All that comes is read and forgotten, in a thread, until the other end has shut down or the test has failed."""

    def read() -> None:
        while host.recv(1 << 20):
            pass

    thread = threading.Thread(target=read)
    host.setblocking(True)
    thread.start()
    try:
        yield
    except BaseException:
        host.shutdown(socket.SHUT_RDWR)
        raise
    finally:
        thread.join()


def send_until_told(flow: Flow, window: int) -> set[int]:
    """Send until this window has been told, maybe for a moment. All that were told since this began."""
    flow.driver.log = log = deque[Message]()
    while window not in (told := {m.buf_alloc for m in log if m.flow == flow.id}):
        flow.send(bytes(BASE))
    return told


def test_the_window_of_a_flow_that_is_alone_doubles_up_to_four_times_and_no_further(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host), read_by_somebody(host):
        assert flow.peer_alloc == BASE
        assert send_until_told(flow, TIMES * BASE) <= {BASE, 2 * BASE, 4 * BASE}
        for _ in range(64):
            flow.send(bytes(BASE))
            assert flow.peer_alloc <= TIMES * BASE
        flow.shutdown()


def test_it_is_what_it_was_when_another_flow_is_heard(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host), connection(engine) as (other, asked), read_by_somebody(host):
        send_until_told(flow, TIMES * BASE)
        other.send(b"question")
        assert asked.recv(8, socket.MSG_WAITALL) == b"question"
        send_until_told(flow, BASE)
        send_until_told(flow, TIMES * BASE)
        flow.shutdown()


def test_what_was_sent_before_the_driver_heard_of_the_smaller_one_is_no_fault(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host), connection(engine) as (other, _):
        with read_by_somebody(host):
            send_until_told(flow, TIMES * BASE)
            other.send(b"question")
            flow.send(bytes(TIMES * BASE))
            flow.shutdown()
        assert not flow.error


def test_for_a_host_socket_that_takes_nothing_no_more_is_held_than_the_largest_window(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, _):
        while flow.credit:
            flow.send(bytes(min(flow.credit, BASE)))
            engine.driver.ping()
        assert flow.peer_alloc <= TIMES * BASE
        assert engine.stats.buffered <= TIMES * BASE
        flow.close(abort=True)


def test_a_window_that_the_application_has_chosen_stays(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host), read_by_somebody(host):
        flow.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, (BASE // 4).to_bytes(4, "little"))
        for _ in range(256):
            flow.send(bytes(BASE // 4))
        assert flow.peer_alloc == BASE // 2
        flow.shutdown()


def test_all_together_may_have_a_quarter_of_the_buffers(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(pairs=2, config={"buf_alloc": BASE, "grow_ns": AT_ONCE, "buf_total": 4 * BASE})
    with connection(engine) as (flow, host), read_by_somebody(host):
        send_until_told(flow, 2 * BASE)
        for _ in range(64):
            flow.send(bytes(BASE))
        assert flow.peer_alloc <= 2 * BASE
        flow.shutdown()
