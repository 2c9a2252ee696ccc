"""Rings that come and go, drivers that start anew, and the end of the engine."""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable

import pytest

from vhostsock._core import ffi, lib
from vhostsock.testing.offload import Message, pack_open

from .engine import EngineUnderTest, connection, recv_until_end


def test_flows_survive_a_stop_and_continue_and_data_waits(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        for ring in (0, 1):
            engine.detach(ring)
        host.sendall(b"while you slept")
        flow.tx_cnt += 5
        engine.driver.post(lib.VSO_DATA, flow.id, payload=b"night", buf_alloc=flow.buf_alloc)
        for ring in (0, 1):
            engine.attach(ring)
        assert flow.recv() == b"while you slept"
        assert host.recv(100) == b"night"
        flow.close()


def test_answers_that_come_while_the_rings_are_away_are_kept(engine: EngineUnderTest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        flow, cookie = engine.driver.open(lib.VSO_CONNECT, pack_open(f"tcp://127.0.0.1:{server.getsockname()[1]}"))
        engine.wait_event("CONNECT")  # and it was answered
        engine.detach(0)
        engine.detach(1)
        engine.attach(1)
        engine.attach(0)
        engine.driver.finish(flow, cookie)
        flow.close()


def test_the_same_epoch_again_changes_nothing(engine: EngineUnderTest) -> None:
    first = engine.driver.hello(epoch=7)
    with connection(engine) as (flow, host):
        again = engine.driver.hello(epoch=7)
        assert ffi.buffer(first)[:] == ffi.buffer(again)[:]
        flow.send(b"still here")
        assert host.recv(100) == b"still here"
        flow.close()


def test_a_new_epoch_drops_every_flow_without_a_message(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        engine.driver.hello()
        with pytest.raises(ConnectionResetError):
            recv_until_end(host)
        assert not flow.error
        assert engine.stats.flows == 0
        engine.take_events()
        assert [e.name for e in engine.events] == ["HELLO", "CONNECT", "ENDED", "HELLO"]
        engine.driver.flows.clear()


def test_hello_settles_on_what_both_sides_have(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(hello=False, pairs=2)
    answer = engine.driver.hello(epoch=42, features=0xFF, pairs=9, max_payload=1 << 30)
    assert (answer.epoch, answer.features, answer.pairs) == (42, lib.VSO_F_DGRAM | lib.VSO_F_DGRAM_INFO, 2)
    assert (answer.max_payload, answer.max_flows) == (lib.VSO_PAYLOAD_MAX, 1024)
    assert engine.driver.hello(pairs=0).pairs == 1


def test_another_abi_major_is_answered_and_changes_nothing(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        with pytest.raises(OSError, match=rf"Errno {errno.EPROTONOSUPPORT}\b"):
            engine.driver.hello(abi_major=2)
        flow.send(b"still here")
        assert host.recv(100) == b"still here"
        flow.close()


def test_data_messages_stay_below_the_drivers_largest_payload(engine: EngineUnderTest) -> None:
    engine.driver.hello(max_payload=1000)
    with connection(engine) as (flow, host):
        engine.driver.log = log = deque[Message]()
        host.sendall(bytes(10000))
        flow.recv_exactly(10000)
        assert max(len(m.payload) for m in log) <= 1000
        flow.close()


def test_pairs_work_side_by_side(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(pairs=3)
    for pair in (2, 0, 1):
        with connection(engine, pair=pair) as (flow, host):
            flow.send(b"x" * 100000)
            flow.close()
            assert len(recv_until_end(host)) == 100000


def test_python_can_reset_a_flow(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        handle = next(e.handle for e in engine.events if e.name == "CONNECT")
        assert lib.vse_reset_flow(engine.ptr, handle, errno.ETIMEDOUT) == 0
        engine.driver.wait(lambda: flow.error)
        assert flow.error == errno.ETIMEDOUT
        with pytest.raises(ConnectionResetError):
            recv_until_end(host)
        flow.close()
        assert lib.vse_reset_flow(engine.ptr, handle, errno.ETIMEDOUT) == -errno.ESTALE


def test_after_a_quiet_reset_the_next_driver_must_say_hello(engine: EngineUnderTest) -> None:
    with connection(engine) as (_, host):
        lib.vse_reset_all(engine.ptr, True)
        with pytest.raises(ConnectionResetError):
            recv_until_end(host)
        engine.driver.flows.clear()
        engine.driver.hello()


def test_stopping_the_engine_resets_both_sides_and_takes_no_ring_with_it(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        lib.vse_stop(engine.ptr)
        engine.driver.wait(lambda: flow.error)
        assert flow.error == errno.ECONNRESET
        with pytest.raises(ConnectionResetError):
            recv_until_end(host)
        lib.vse_stop(engine.ptr)
        assert engine.vrings[0].running
        err = ffi.new("struct vs_err *")
        assert lib.vse_ring_attach(engine.ptr, 0, engine.vrings[0].ptr, -1, err) == -errno.ESHUTDOWN


def test_rings_are_attached_once_and_only_where_there_is_a_pair(engine: EngineUnderTest) -> None:
    err = ffi.new("struct vs_err *")
    assert lib.vse_ring_attach(engine.ptr, 0, engine.vrings[0].ptr, -1, err) == -errno.EBUSY
    assert lib.vse_ring_attach(engine.ptr, 2, engine.vrings[0].ptr, -1, err) == -errno.EINVAL
    assert "pair" in ffi.string(err.text).decode()
    lib.vse_ring_detach(engine.ptr, 99)


def test_who_holds_the_lock_may_call_on_while_the_thread_waits_for_it(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        lib.vse_lock(engine.ptr)
        flow.try_send(b"wake up")  # the thread comes for the lock, at some point of what follows
        for _ in range(50000):
            lib.vse_lock(engine.ptr)
            lib.vse_unlock(engine.ptr)
        engine.detach(1)
        engine.attach(1)
        lib.vse_unlock(engine.ptr)
        flow.close()
        assert recv_until_end(host) == b"wake up"


@pytest.mark.parametrize("config", [{"pairs": 0}, {"pairs": 129}, {"max_flows": 0}, {"max_flows": 1 << 21}, {"buf_alloc": 0}])
def test_an_impossible_configuration_is_refused_with_a_reason(config: dict[str, int]) -> None:
    err = ffi.new("struct vs_err *")
    settings = dict(pairs=1, max_flows=16, buf_alloc=65536, buf_total=1 << 20, features=0) | config
    assert lib.vse_new(ffi.new("struct vse_config *", settings), err) == ffi.NULL
    assert next(iter(config)) in ffi.string(err.text).decode()
