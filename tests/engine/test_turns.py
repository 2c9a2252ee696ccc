"""Whose turn it is: what is small does not wait for what is large, and cannot keep it waiting for ever.

Everything is in its place before the engine comes to it, so the order is the engine's alone. What it does to host sockets is
told by an epoll that nobody looks at before the end: descriptors are on its list in the order in which they became ready.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections import deque
from collections.abc import Iterator

import pytest

from vhostsock._core import lib
from vhostsock.testing.offload import Flow

from .engine import EngineUnderTest, Event

POLL, LIGHT_TURNS = 524288, 16  # VSE_POLL_BYTES and VSE_LIGHT_TURNS of vse_priv.h
MUCH, LITTLE = 100_000, b"answer"
End = tuple[Flow, socket.socket]


@contextlib.contextmanager
def connections(engine: EngineUnderTest, count: int) -> Iterator[list[End]]:
    """Over Unix sockets: what one end has sent the other has, all of it."""
    hosts: list[socket.socket] = []

    def connect(event: Event) -> None:
        own, host = socket.socketpair()
        hosts.append(stack.enter_context(host))
        assert engine.connected(event, own, "tcp://127.0.0.1:1", event.uri) == 0

    with contextlib.ExitStack() as stack:
        engine.on_connect = connect
        flows = [engine.driver.connect("tcp://127.0.0.1:2") for _ in range(count)]
        yield list(zip(flows, hosts, strict=True))


@contextlib.contextmanager
def held(engine: EngineUnderTest) -> Iterator[None]:
    """The engine finds all that the driver says meanwhile at once."""
    lib.vse_lock(engine.ptr)
    try:
        yield
    finally:
        lib.vse_unlock(engine.ptr)


@contextlib.contextmanager
def without_a_ring(engine: EngineUnderTest) -> Iterator[None]:
    """The engine sees what the hosts send meanwhile, and can do nothing about it before the end."""
    engine.detach(0)
    yield
    seen = engine.stats.msgs_in
    engine.driver.post(lib.VSO_CREDIT)  # of no flow; its kick comes behind what the hosts have sent
    engine.driver.wait(lambda: engine.stats.msgs_in > seen)
    engine.driver.log = deque()
    engine.attach(0)


def data_in_order(engine: EngineUnderTest) -> list[int]:
    """The flow of each DATA that the driver got since then."""
    assert engine.driver.log is not None
    return [message.flow for message in engine.driver.log if message.type == lib.VSO_DATA]


def receive(flow: Flow, amount: int) -> None:
    while amount:
        amount -= len(flow.recv(amount))


def move_much(engine: EngineUnderTest, ends: list[End]) -> None:
    with without_a_ring(engine):
        for _, host in ends:
            host.sendall(bytes(MUCH))
    for flow, _ in ends:
        receive(flow, MUCH)


def test_an_answer_goes_to_the_driver_before_the_bytes_of_flows_that_move_many(engine: EngineUnderTest) -> None:
    with connections(engine, 7) as [*bulk, (flow, host)]:
        move_much(engine, bulk)
        with without_a_ring(engine):
            for _, busy in bulk:
                busy.sendall(bytes(MUCH))
            host.sendall(LITTLE)  # the last to become readable
        for other, _ in bulk:
            receive(other, MUCH)
        assert flow.recv(64) == LITTLE
        assert data_in_order(engine)[0] == flow.id


def test_flows_with_little_each_do_not_keep_one_with_much_from_its_turn(engine: EngineUnderTest) -> None:
    with connections(engine, 1 + 3 * LIGHT_TURNS) as [(much, busy), *little]:
        move_much(engine, [(much, busy)])
        with without_a_ring(engine):
            busy.sendall(bytes(MUCH))
            for _, host in little:
                host.sendall(LITTLE)
        receive(much, MUCH)
        for flow, _ in little:
            assert flow.recv(64) == LITTLE
        assert data_in_order(engine).index(much.id) == LIGHT_TURNS


def test_a_flow_that_moves_many_bytes_is_light_for_one_turn(engine: EngineUnderTest) -> None:
    """All are new, so all are light: the first turn of each is short, and none has its second before all had theirs."""
    with connections(engine, 4) as bulk:
        with without_a_ring(engine):
            for _, host in bulk:
                host.sendall(bytes(MUCH))
        for flow, _ in bulk:
            receive(flow, MUCH)
        order = data_in_order(engine)
        assert set(order[:4]) == set(order[4:]) == {flow.id for flow, _ in bulk}


def order_of(ready: select.epoll, names: dict[int, str]) -> list[str]:
    return [names[fd] for fd, _ in ready.poll(0, len(names))]


@pytest.fixture
def ready() -> Iterator[select.epoll]:
    with select.epoll() as epoll:
        yield epoll


def full_batch(bulk: list[End]) -> None:
    """Two messages of some 60 KiB of each."""
    for _ in range(2):
        for flow, _ in bulk:
            assert flow.try_send(bytes(60_000)) == 60_000


def test_a_question_goes_to_its_host_before_the_bytes_of_others_in_front_of_it(
    engine: EngineUnderTest, ready: select.epoll
) -> None:
    with connections(engine, 13) as [*bulk, (flow, host)]:
        names = {peer.fileno(): "bulk" for _, peer in bulk} | {host.fileno(): "question"}
        for fd in names:
            ready.register(fd, select.EPOLLIN)
        with held(engine):
            full_batch(bulk)
            flow.send(b"question")
        engine.driver.ping()
        assert order_of(ready, names) == ["question"] + ["bulk"] * 12


def test_a_question_keeps_its_place_behind_the_bytes_of_its_own_flow(engine: EngineUnderTest) -> None:
    with connections(engine, 13) as [*bulk, (flow, host)]:
        with held(engine):
            flow.send(bytes(60_000))
            full_batch(bulk)
            flow.send(b"question")
        got = bytearray()
        while len(got) < 60_008:
            got += host.recv(1 << 17)
        assert got == bytes(60_000) + b"question"


def test_a_question_behind_the_end_of_a_flow_keeps_its_place(engine: EngineUnderTest, ready: select.epoll) -> None:
    """Nothing passes what is about more than bytes."""
    with connections(engine, 14) as [*bulk, (last, other), (flow, host)]:
        names = {peer.fileno(): "bulk" for _, peer in bulk} | {host.fileno(): "question", other.fileno(): "end"}
        for fd in names:
            ready.register(fd, select.EPOLLIN)
        with held(engine):
            full_batch(bulk)
            last.shutdown()
            flow.send(b"question")
        engine.driver.ping()
        assert order_of(ready, names) == ["bulk"] * 12 + ["end", "question"]


def test_an_answer_goes_to_the_driver_in_the_middle_of_a_batch(engine: EngineUnderTest, ready: select.epoll) -> None:
    """The host has answered; of what the driver says half a megabyte may go before that, and no more."""
    with connections(engine, 13) as [*bulk, (flow, host)]:
        queue = engine.driver.queues[0]
        names = {peer.fileno(): "bulk" for _, peer in bulk} | {queue.call_fd: "call"}
        while queue.enable_calls():
            engine.driver.step()
        queue.take_call()
        for fd in names:
            ready.register(fd, select.EPOLLIN)
        with held(engine):
            full_batch(bulk)
            host.sendall(LITTLE)
        called = select.poll()
        called.register(queue.call_fd, select.POLLIN)
        assert called.poll(30_000)
        assert engine.stats.msgs_in >= 24  # which waits for the end of the batch
        assert order_of(ready, names).index("call") <= POLL // 120_000 + 1
        assert flow.recv(64) == LITTLE


def test_a_question_behind_a_full_batch_joins_it(engine: EngineUnderTest, ready: select.epoll) -> None:
    """Place is made for it as others' bytes are served, half a megabyte at a time."""
    with connections(engine, 41) as [*bulk, (flow, host)]:
        names = {peer.fileno(): "bulk" for _, peer in bulk} | {host.fileno(): "question"}
        for fd in names:
            ready.register(fd, select.EPOLLIN)
        with held(engine):
            full_batch(bulk)  # 80 messages, and a batch is 64
            flow.send(b"question")
        engine.driver.ping()
        # a message of each flow at a time: the second is 40 messages behind the first
        assert order_of(ready, names).index("question") <= 2 * (POLL // 60_000 + 1)


def test_a_driver_may_use_its_ring_again_in_the_middle_of_a_batch(engine: EngineUnderTest, ready: select.epoll) -> None:
    with connections(engine, 12) as bulk:
        queue = engine.driver.queues[1]
        names = {peer.fileno(): "bulk" for _, peer in bulk} | {queue.call_fd: "call"}
        queue.collect()
        while queue.enable_calls():
            queue.collect()
        queue.take_call()
        for fd in names:
            ready.register(fd, select.EPOLLIN)
        with held(engine):
            full_batch(bulk)
        called = select.poll()
        called.register(queue.call_fd, select.POLLIN)
        assert called.poll(30_000)
        assert engine.stats.msgs_in >= 24  # which waits for the end of the batch
        assert order_of(ready, names).index("call") <= POLL // 120_000 + 1
