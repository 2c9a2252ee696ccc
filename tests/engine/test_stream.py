"""How streams end, and what a slow side may cost."""

from __future__ import annotations

import errno
import resource
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from fcntl import ioctl
from typing import Any

import pytest

from vhostsock._core import lib
from vhostsock.testing.offload import Flow, Message, pack, pack_open

from .engine import EngineUnderTest, connection, recv_until_end, reset


def read_to_error(flow: Flow) -> tuple[bytes, int]:
    data = bytearray()
    while True:
        try:
            part = flow.recv()
        except OSError as error:
            return bytes(data), error.errno or 0
        assert part, "a clean EOF"
        data += part


def fill(engine: EngineUnderTest, flow: Flow) -> int:
    """Send until the engine holds bytes that the host does not take and no credit is left."""
    total = 0
    while flow.credit or not engine.stats.buffered:
        total += flow.try_send(b"x" * flow.credit)
        engine.driver.ping()
    return total


def test_the_guest_shuts_down_its_side_and_still_receives(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        flow.send(b"request")
        flow.shutdown()
        assert recv_until_end(host) == b"request"
        host.sendall(b"answer")
        host.close()
        assert flow.recv_all() == b"answer"
        flow.close()


def test_flows_that_alternate_in_one_batch_keep_their_bytes_and_their_ends(engine: EngineUnderTest) -> None:
    with connection(engine) as (one, host_one), connection(engine) as (two, host_two):
        sent = {one: b"", two: b""}
        lib.vse_lock(engine.ptr)  # the engine finds all of it at once
        try:
            for number in range(24):
                for flow in (one, two):
                    if flow is two or number < 12:
                        part = bytes([65 + number]) * (1 + 37 * number)
                        assert flow.try_send(part) == len(part)
                        sent[flow] += part
                if number == 11:
                    one.shutdown()
        finally:
            lib.vse_unlock(engine.ptr)
        two.shutdown()
        assert recv_until_end(host_one) == sent[one]
        assert recv_until_end(host_two) == sent[two]


def test_the_host_shuts_down_its_side_and_still_receives(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        host.sendall(b"greeting")
        host.shutdown(socket.SHUT_WR)
        assert flow.recv_all() == b"greeting"
        flow.send(b"and now this")
        flow.close()
        assert recv_until_end(host) == b"and now this"


def test_a_shutdown_before_the_answer_to_connect_is_not_lost(engine: EngineUnderTest) -> None:
    ours, theirs = socket.socketpair()
    asked: list[Any] = []
    engine.on_connect = asked.append
    flow, cookie = engine.driver.open(lib.VSO_CONNECT, pack_open("tcp://10.0.0.1:1"))
    flow.shutdown()
    engine.driver.ping()
    engine.driver.wait(lambda: asked)
    with theirs:
        engine.connected(asked[0], ours, "tcp://10.0.0.2:1", "tcp://10.0.0.1:1")
        engine.driver.finish(flow, cookie)
        assert theirs.recv(1) == b""
        flow.close()


def test_data_comes_before_eof_through_any_window(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(window=100)
    with connection(engine) as (flow, host):
        host.sendall(b"0123456789" * 1000)
        host.close()
        assert flow.recv_all() == b"0123456789" * 1000
        flow.close()


def test_what_waits_at_the_host_fills_small_buffers_to_the_brim(make_engine: Callable[..., EngineUnderTest]) -> None:
    """One read fills many; those that it does not need are the next ones to be filled."""
    engine = make_engine(window=0, rx_size=2048, rx_buffers=64)
    room = 2048 - len(pack("struct vso_hdr"))
    for size in (20 * room + 1, 1, 3 * room, 7 * room - 1):
        with connection(engine) as (flow, host):
            data = (bytes(range(251)) * (size // 251 + 1))[:size]
            host.sendall(data)
            while ioctl(host, termios.TIOCOUTQ, bytes(4)) != bytes(4):  # until the engine's socket has all of it
                engine.driver.ping()
            engine.driver.log = deque()
            flow.buf_alloc = size
            flow.tell_credit()
            assert flow.recv_exactly(size) == data
            sizes = [len(message.payload) for message in engine.driver.log if message.type == lib.VSO_DATA]
            assert sizes == [room] * (size // room) + [size % room] * bool(size % room)
            flow.close()


def test_the_small_last_piece_of_a_buffer_is_used_by_who_needs_it_alone(make_engine: Callable[..., EngineUnderTest]) -> None:
    """A message that just fits a buffer is one; of a stream that fills several the large pieces are enough."""
    engine = make_engine(window=0, rx_size=(8192, 8192, 1024), rx_buffers=64)
    large = 2 * 8192 - len(pack("struct vso_hdr"))
    for size, wanted in ((large + 1024, [large + 1024]), (6 * large, [large + 1024, *[large] * 4, large - 1024])):
        with connection(engine) as (flow, host):
            host.sendall(bytes(size))
            while ioctl(host, termios.TIOCOUTQ, bytes(4)) != bytes(4):  # until the engine's socket has all of it
                engine.driver.ping()
            engine.driver.log = deque()
            flow.buf_alloc = size
            flow.tell_credit()
            assert flow.recv_exactly(size) == bytes(size)
            assert [len(message.payload) for message in engine.driver.log if message.type == lib.VSO_DATA] == wanted
            flow.close()


def test_data_comes_before_a_reset_through_any_window(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(window=100)
    with connection(engine) as (flow, host):
        host.sendall(b"0123456789" * 1000)
        reset(host)
        assert read_to_error(flow) == (b"0123456789" * 1000, errno.ECONNRESET)
        flow.close()


@pytest.mark.parametrize("end", ["eof", "reset"])
def test_the_end_of_the_stream_needs_no_credit(make_engine: Callable[..., EngineUnderTest], end: str) -> None:
    engine = make_engine(window=0)
    with connection(engine) as (flow, host):
        if end == "reset":
            reset(host)
            engine.driver.wait(lambda: flow.error)
            assert flow.error == errno.ECONNRESET
        else:
            host.close()
            engine.driver.wait(lambda: flow.eof)
        flow.close()


def test_a_reset_after_eof_is_still_told(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        host.shutdown(socket.SHUT_WR)
        engine.driver.wait(lambda: flow.eof)
        reset(host)
        engine.driver.wait(lambda: flow.error)
        flow.close()


def test_a_write_into_a_reset_gets_the_error_and_never_a_clean_eof(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(window=10)
    with connection(engine) as (flow, host):
        host.sendall(b"0123456789abcdef")
        engine.driver.wait(lambda: len(flow.received) == 10)
        reset(host)
        # the guest does not read: a window's worth of writes into nothing ends it
        engine.driver.wait(lambda: flow.error or flow.try_send(b"x" * 20000) < 0)
        assert bytes(flow.received) == b"0123456789"
        assert not flow.eof
        flow.close()


def test_an_aborting_close_resets_the_host(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        flow.send(b"x")
        assert host.recv(1) == b"x"
        flow.close(abort=True)
        with pytest.raises(ConnectionResetError):
            host.recv(1)


def test_a_plain_close_with_unread_bytes_still_delivers_what_was_sent(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(window=0)
    with connection(engine) as (flow, host):
        host.sendall(b"nobody reads this")
        flow.send(b"last words")
        flow.close()
        assert recv_until_end(host) == b"last words"


def test_close_is_answered_at_once_and_the_rest_still_reaches_a_slow_host(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        total = fill(engine, flow)
        assert engine.stats.buffered > 0
        flow.close()
        assert not [e for e in engine.events if e.name == "ENDED"]
        assert len(recv_until_end(host)) == total
        ended = engine.wait_event("ENDED")
        assert (ended.to_host, ended.error) == (total, 0)
        assert engine.stats.buffered == 0


def test_a_lingering_flow_whose_host_dies_is_gone(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        fill(engine, flow)
        flow.close()
        reset(host)
        assert engine.wait_event("ENDED").error in (errno.ECONNRESET, errno.EPIPE)
        assert engine.stats.flows == 0


def test_a_lingering_flow_ends_in_a_reset_when_its_time_is_up(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(config={"linger_ms": 1})
    with connection(engine) as (flow, host):
        total = fill(engine, flow)
        flow.close()
        ended = engine.wait_event("ENDED")
        assert ended.error == errno.ETIMEDOUT
        assert ended.to_host < total
        with pytest.raises(ConnectionResetError):
            recv_until_end(host)


def test_more_lingering_flows_than_are_kept_abort_the_oldest(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(config={"max_flows": 2000})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for i in range(1025):
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            engine.on_connect = lambda event, ours=ours: engine.connected(event, ours, "", event.uri)  # type: ignore[misc]
            flow = engine.driver.connect(f"tcp://10.0.0.1:{i + 1}")
            flow.try_send(bytes(30000))
            flow.close()
        ended = engine.wait_event("ENDED")
        assert (ended.flow, ended.error) == (1, errno.ETIMEDOUT)
        assert engine.stats.flows == 1024


def test_a_slow_host_slows_its_own_flow_alone_and_holds_no_ring_slot(engine: EngineUnderTest) -> None:
    with connection(engine) as (slow, slow_host), connection(engine) as (fast, fast_host):
        fill(engine, slow)
        engine.driver.ping()
        assert engine.driver.queues[1].in_flight == 0
        fast.send(b"passes by")
        assert fast_host.recv(100) == b"passes by"
        slow.close(abort=True)
        fast.close()
        with pytest.raises(ConnectionResetError):
            recv_until_end(slow_host)


def test_buffers_over_all_flows_are_bounded_and_beyond_is_enobufs(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(config={"buf_alloc": 1 << 20, "buf_total": 300000})
    with connection(engine) as (flow, host):
        engine.driver.wait(lambda: flow.error or flow.try_send(b"x" * 100000) < 0)
        assert flow.error == errno.ENOBUFS
        with pytest.raises(ConnectionResetError):
            recv_until_end(host)
        flow.close()
        assert engine.stats.buffered == 0


def test_what_arrives_after_the_guest_shut_down_reading_is_dropped(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(window=1000)
    with connection(engine) as (flow, host):
        flow.shutdown(lib.VSO_SHUT_RECV)
        host.sendall(bytes(4 << 20))
        host.close()
        engine.driver.wait(lambda: flow.eof)
        assert not flow.received
        flow.close()


def test_small_messages_of_many_flows_all_arrive(engine: EngineUnderTest) -> None:
    with ExitStack() as stack:
        pairs = [stack.enter_context(connection(engine)) for _ in range(20)]
        for round_ in range(50):
            for i, (flow, _) in enumerate(pairs):
                flow.send(struct.pack("<II", i, round_))
        for i, (flow, host) in enumerate(pairs):
            flow.close()
            assert recv_until_end(host) == b"".join(struct.pack("<II", i, r) for r in range(50))


def test_two_flows_with_much_to_say_take_turns(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(window=0)
    with connection(engine) as (one, host_one), connection(engine) as (two, host_two):
        for host in (host_one, host_two):
            host.setblocking(False)
            host.send(bytes(2 << 20))
        engine.driver.ping()  # both are known to be readable now
        engine.driver.log = log = deque[Message]()
        for flow in (one, two):
            flow.buf_alloc = flow.promised = 2 << 20
        queue = engine.driver.queues[1]
        for flow in (one, two):  # in one batch
            queue.add([pack("struct vso_hdr", type=lib.VSO_CREDIT, flow=flow.id, buf_alloc=2 << 20)])
        queue.publish()
        queue.kick()
        engine.driver.wait(lambda: sum(m.type == lib.VSO_DATA for m in log) >= 12)
        first = [m.flow for m in log if m.type == lib.VSO_DATA][:12]
        assert set(first) == {one.id, two.id}
        one.close(abort=True)
        two.close(abort=True)
