# SPDX-License-Identifier: BSD-3-Clause
"""Streams that the engine connects by itself, and what it leaves to Python (csrc/engine/vs_route.c)."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vhostsock._core import ffi, lib
from vhostsock.offload.uri import InetURI
from vhostsock.testing.offload import Refused, pack_open

from .engine import EngineUnderTest, Event, host_listener

MakeEngine = Callable[..., EngineUnderTest]
LOW = ipaddress.IPv6Address("::ffff:10.0.0.0").packed
HIGH = ipaddress.IPv6Address("::ffff:10.0.0.255").packed


def config(*routes: dict[str, Any]) -> dict[str, Any]:
    """Of an engine with these routes; what they do not say is: TCP over IPv4 to any port of 10.0.0.0/24."""
    base = {"first": LOW, "last": HIGH, "port_last": 65535, "schemes": lib.VSO_HINT_TCP, "dial": 1}
    return {"nr_routes": len(routes), "routes": ffi.new("struct vse_route[]", [base | route for route in routes])}


def to(address: tuple[str, int]) -> dict[str, Any]:
    """The target of a route."""
    sockaddr = InetURI("tcp", ipaddress.ip_address(address[0]), address[1]).sockaddr()
    return {"target": sockaddr, "target_len": len(sockaddr)}


def asked(engine: EngineUnderTest, uri: str, **fields: Any) -> bool:
    """Whether Python is asked about a connect to ``uri``; it is refused then."""
    seen: list[Event] = []

    def refuse(event: Event) -> None:
        seen.append(event)
        engine.refuse(event, lib.VSO_DENY, errno.EACCES)

    engine.on_connect = refuse
    with contextlib.suppress(Refused):
        engine.driver.connect(uri, **fields).close()
    return bool(seen)


def dialed(engine: EngineUnderTest, event: Event) -> tuple[int, int]:
    fd = ffi.new("int *", -1)
    return int(lib.vse_dialed(engine.ptr, event.handle, fd)), int(fd[0])


def test_a_route_connects_and_python_hears_of_it(make_engine: MakeEngine) -> None:
    with host_listener() as (listener, _):
        engine = make_engine(config=config({"rule": 7, **to(listener.getsockname())}))
        flow = engine.driver.connect("tcp://10.0.0.5:80")
        host, address = listener.accept()
        with host:
            assert (flow.local, flow.peer) == (f"tcp://127.0.0.1:{address[1]}", "tcp://10.0.0.5:80")
            flow.send(b"ping")
            assert host.recv(16) == b"ping"
            event = engine.wait_event("ROUTED")
            assert (event.flow, event.error, event.payload) == (flow.id, 7, b"tcp://10.0.0.5:80")
            flow.close()
            assert host.recv(1) == b""
        assert engine.wait_event("ENDED").handle == event.handle


def test_a_route_without_a_target_connects_to_what_is_asked_for(make_engine: MakeEngine) -> None:
    with host_listener(socket.AF_INET6) as (listener, uri):
        any6 = {"first": bytes(16), "last": b"\xff" * 16, "schemes": lib.VSO_HINT_TCP6}
        engine = make_engine(config=config(any6))
        flow = engine.driver.connect(uri)
        listener.accept()[0].close()
        assert flow.peer == uri
        assert engine.wait_event("ROUTED").payload == uri.encode()


def test_connections_beyond_the_logs_are_counted_and_not_told(make_engine: MakeEngine) -> None:
    with host_listener() as (listener, _):
        engine = make_engine(config=config(to(listener.getsockname())) | {"log_flows": 1})
        made = unlogged = 0
        while not unlogged:  # two in one second
            flow = engine.driver.connect("tcp://10.0.0.5:80")
            listener.accept()[0].close()
            flow.close()
            made += 1
            unlogged += lib.vse_unlogged(engine.ptr)
        engine.take_events()
        names = [event.name for event in engine.events]
        assert names.count("ROUTED") == names.count("ENDED") == made - 1
        assert unlogged == 2


@pytest.mark.parametrize("uri", [
    "tcp://10.0.1.0:80", "tcp6://2001:db8::1/80", "tcp://10.0.0.5:080", "tcp://10.0.0.05:80", "tcp://10.0.0.5:65616",
    "tcp://10.0.0.5", "tcp6://::ffff:10.0.0.5/80", "tcp://10.0.0.5:80x", "tcp:/10.0.0.5:80", "tcp://:80", "x",
])  # fmt: skip
def test_what_no_route_covers_is_asked(make_engine: MakeEngine, uri: str) -> None:
    with host_listener() as (listener, _):
        engine = make_engine(config=config(to(listener.getsockname())))
        assert not asked(engine, "tcp://10.0.0.5:80")
        assert asked(engine, uri)


@pytest.mark.parametrize("fields", [{"netns": 4026532008}, {"name": "shop"}, {"local": "tcp://10.0.2.15:40000"}])
def test_a_request_that_says_more_than_an_address_is_asked(make_engine: MakeEngine, fields: dict[str, Any]) -> None:
    with host_listener() as (listener, _):
        assert asked(make_engine(config=config(to(listener.getsockname()))), "tcp://10.0.0.5:80", **fields)


def test_the_first_route_decides(make_engine: MakeEngine) -> None:
    with host_listener() as (listener, _):
        engine = make_engine(config=config({"port_first": 443, "port_last": 443, "dial": 0}, to(listener.getsockname())))
        assert asked(engine, "tcp://10.0.0.5:443")
        assert not asked(engine, "tcp://10.0.0.5:442")


def test_python_hears_how_it_failed(make_engine: MakeEngine) -> None:
    with host_listener() as (listener, _):
        address = listener.getsockname()
    engine = make_engine(config=config(to(address)))
    found: list[tuple[int, int]] = []

    def refuse(event: Event) -> None:
        found.extend([dialed(engine, event), dialed(engine, event)])
        engine.refuse(event, lib.VSO_OFFLOAD, -found[0][0])

    engine.on_connect = refuse
    with pytest.raises(Refused) as refused:
        engine.driver.connect("tcp://10.0.0.5:80")
    assert refused.value.errno == errno.ECONNREFUSED
    assert found == [(-errno.ECONNREFUSED, -1), (0, -1)]  # told once


@contextlib.contextmanager
def full_listener() -> Iterator[tuple[str, int]]:
    """The address of a listener whose backlog is full: connects hang."""
    with host_listener(backlog=0) as (listener, _), socket.create_connection(listener.getsockname()):
        yield listener.getsockname()


def test_python_takes_a_connect_that_is_under_way(make_engine: MakeEngine) -> None:
    with full_listener() as address:
        engine = make_engine(config=config(to(address)))
        found: list[int] = []

        def take(event: Event) -> None:
            code, fd = dialed(engine, event)
            assert code == 0
            found.append(fd)
            engine.refuse(event, lib.VSO_OFFLOAD, errno.ETIMEDOUT)

        engine.on_connect = take
        with pytest.raises(Refused):
            engine.driver.connect("tcp://10.0.0.5:80")
        with socket.socket(fileno=found[0]) as sock:
            assert sock.connect_ex(address) == errno.EALREADY


@pytest.mark.parametrize("leave", ["refused", "closed by the driver", "the engine's end"])
def test_what_nobody_takes_is_closed(make_engine: MakeEngine, leave: str) -> None:
    with full_listener() as address:
        engine = make_engine(config=config(to(address)))
        asked_of: list[Event] = []
        engine.on_connect = asked_of.append
        before = len(os.listdir("/proc/self/fd"))
        flow, _ = engine.driver.open(lib.VSO_CONNECT, pack_open("tcp://10.0.0.5:80"))
        engine.driver.wait(lambda: asked_of, what="CONNECT")
        assert len(os.listdir("/proc/self/fd")) == before + 1
        if leave == "refused":
            engine.refuse(asked_of[0], lib.VSO_NATIVE, 0)
        elif leave == "closed by the driver":
            flow.close()
        else:
            lib.vse_stop(engine.ptr)
        assert len(os.listdir("/proc/self/fd")) == before


def test_more_routes_than_there_may_be_are_refused() -> None:
    settings = dict(pairs=1, max_flows=16, buf_alloc=4096, buf_total=1 << 20)
    err = ffi.new("struct vs_err *")
    for wrong in (config(*[{}] * (lib.VSE_ROUTES_MAX + 1)), config({"target_len": 29})):
        assert lib.vse_new(ffi.new("struct vse_config *", settings | wrong), err) == ffi.NULL
        assert err.code == errno.EINVAL
