"""Listening: the port the guest sees, the backlog, and running out of things."""

from __future__ import annotations

import errno
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostsock._core import lib
from vhostsock.testing.offload import Flow, Refused

from .engine import EngineUnderTest, Event, recv_until_end, split_uri


def dial(uri: str) -> socket.socket:
    _, host, port = split_uri(uri)
    sock = socket.create_connection((host, port), timeout=30)
    return sock


@pytest.mark.parametrize("uri", ["tcp://127.0.0.1:0", "tcp6://::1/0"])
def test_a_host_reaches_a_listening_guest(engine: EngineUnderTest, uri: str) -> None:
    listener = engine.driver.bind(uri)
    assert split_uri(listener.local)[2]
    listener.listen()
    with dial(listener.local) as host:
        flow = listener.accept()
        assert flow.local == listener.local
        assert split_uri(flow.peer)[2] == host.getsockname()[1]
        host.sendall(b"hello guest")
        assert flow.recv() == b"hello guest"
        flow.send(b"hello host")
        flow.close()
        assert recv_until_end(host) == b"hello host"
    assert engine.wait_event("ACCEPTED").handle
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        dial(listener.local)


def bind_as(engine: EngineUnderTest, sock: socket.socket, local: str) -> Flow:
    """The guest binds `local`, the host serves it with `sock`, as a publish rule would."""
    engine.on_bind = lambda event: engine.bound(event, sock, local)
    return engine.driver.bind(local)


@pytest.mark.parametrize(
    ("bound", "family", "shown"),
    [
        ("tcp://0.0.0.0:80", socket.AF_INET, "tcp://127.0.0.1:80"),
        ("tcp://10.1.2.3:80", socket.AF_INET, "tcp://10.1.2.3:80"),
        ("tcp6://::/80", socket.AF_INET6, "tcp6://::1/80"),
        ("tcp6://::/80", socket.AF_INET, "tcp://127.0.0.1:80"),
        ("tcp://0.0.0.0:80", socket.AF_INET6, "tcp://192.0.2.2:80"),
    ],
)
def test_the_guest_sees_its_own_port_and_a_real_address(engine: EngineUnderTest, bound: str, family: int, shown: str) -> None:
    sock = socket.socket(family)
    sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    address = sock.getsockname()[:2]
    listener = bind_as(engine, sock, bound)
    listener.listen()
    with socket.create_connection(address, timeout=30) as host:
        flow = listener.accept()
        assert flow.local == shown
        if bound.startswith("tcp:") and family == socket.AF_INET6:
            assert flow.peer.startswith("tcp://192.0.2.1:")  # an IPv4 socket cannot show who it was
        else:
            assert split_uri(flow.peer)[1:] == host.getsockname()[:2]
        flow.close()
    listener.close()


def test_a_unix_socket_shows_an_address_that_nobody_has(engine: EngineUnderTest, tmp_path: Path) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "published"))
    listener = bind_as(engine, sock, "tcp://0.0.0.0:80")
    listener.listen()
    with socket.socket(socket.AF_UNIX) as host:
        host.connect(str(tmp_path / "published"))
        flow = listener.accept()
        assert flow.local == "tcp://192.0.2.2:80"
        assert flow.peer.startswith("tcp://192.0.2.1:")
        flow.close()
        assert host.recv(1) == b""
    listener.close()


def test_connections_are_announced_up_to_the_backlog_and_go_on_with_accept(engine: EngineUnderTest) -> None:
    listener = engine.driver.bind("tcp://127.0.0.1:0")
    listener.listen(2)
    hosts = [dial(listener.local) for _ in range(3)]
    engine.driver.wait(lambda: len(listener.accepted) == 2)
    engine.driver.ping()
    assert len(listener.accepted) == 2
    flows = [listener.accept() for _ in range(3)]
    assert [split_uri(flow.peer)[2] for flow in flows] == [host.getsockname()[1] for host in hosts]
    for flow, host in zip(flows, hosts, strict=True):
        flow.close()
        host.close()
    listener.close()


def test_a_longer_backlog_can_be_asked_for_later(engine: EngineUnderTest) -> None:
    listener = engine.driver.bind("tcp://127.0.0.1:0")
    listener.listen(1)
    hosts = [dial(listener.local) for _ in range(2)]
    engine.driver.wait(lambda: len(listener.accepted) == 1)
    listener.listen(2)
    engine.driver.wait(lambda: len(listener.accepted) == 2)
    for host in hosts:
        listener.accept().close()
        host.close()
    listener.close()


def test_an_address_in_use_at_listen_fails_listen_and_leaves_the_flow_bound(engine: EngineUnderTest) -> None:
    def reuse(event: Event) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(split_uri(event.uri)[1:])
        engine.bound(event, sock, f"tcp://127.0.0.1:{sock.getsockname()[1]}")

    engine.on_bind = reuse
    first = engine.driver.bind("tcp://127.0.0.1:0")
    second = engine.driver.bind(first.local)
    first.listen()
    with pytest.raises(Refused) as refused:
        second.listen()
    assert (refused.value.verdict, refused.value.errno) == (lib.VSO_OFFLOAD, errno.EADDRINUSE)
    first.close()
    second.listen()
    with dial(second.local) as host:
        second.accept().close()
        assert host.recv(1) == b""
    second.close()


def test_bind_then_connect_and_a_refusal_in_between_leaves_it_bound(engine: EngineUnderTest) -> None:
    flow = engine.driver.bind("tcp://127.0.0.1:0")
    engine.on_connect = lambda event: engine.refuse(event, lib.VSO_DENY, errno.EACCES)
    with pytest.raises(Refused):
        engine.driver.connect("tcp://10.0.0.1:1", flow=flow)
    ours, theirs = socket.socketpair()
    engine.on_connect = lambda event: engine.connected(event, ours, flow.local, "tcp://10.0.0.1:2")
    with theirs:
        engine.driver.connect("tcp://10.0.0.1:2", flow=flow)
        flow.send(b"x")
        assert theirs.recv(1) == b"x"
        flow.close()
    assert engine.stats.flows == 0


def test_the_guest_refuses_an_announced_connection_with_close(engine: EngineUnderTest) -> None:
    listener = engine.driver.bind("tcp://127.0.0.1:0")
    listener.listen()
    with dial(listener.local) as host:
        listener.accept(open_window=False).close(abort=True)
        with pytest.raises(ConnectionResetError):
            host.recv(1)
    listener.close()


def test_nothing_is_sent_on_an_announced_flow_before_its_window_opens(engine: EngineUnderTest) -> None:
    listener = engine.driver.bind("tcp://127.0.0.1:0")
    listener.listen()
    with dial(listener.local) as host:
        host.sendall(b"impatient")
        flow = listener.accept(open_window=False)
        engine.driver.ping()
        assert not flow.received
        flow.tell_credit()
        assert flow.recv() == b"impatient"
        flow.close()
    listener.close()


def test_a_driver_that_knows_of_early_data_gets_it_with_the_announcement_and_no_more_than_that(
    make_engine: Callable[..., EngineUnderTest],
) -> None:
    engine = make_engine(hello=False, config={"features": lib.VSO_F_EARLY_DATA})
    engine.driver.hello(features=lib.VSO_F_EARLY_DATA)
    listener = engine.driver.bind("tcp://127.0.0.1:0")
    listener.listen()
    data = bytes(range(256)) * 64
    with dial(listener.local) as host:
        host.sendall(data)
        host.shutdown(socket.SHUT_WR)
        flow = listener.accept(open_window=False)
        engine.driver.wait(lambda: len(flow.received) == lib.VSO_EARLY_MAX)
        engine.driver.ping()
        assert len(flow.received) == lib.VSO_EARLY_MAX
        flow.tell_credit()
        assert flow.recv_all() == data
        flow.close()
    listener.close()


def test_out_of_flows_connections_wait_until_one_ends(make_engine: Callable[..., EngineUnderTest]) -> None:
    engine = make_engine(config={"max_flows": 2})
    listener = engine.driver.bind("tcp://127.0.0.1:0")
    listener.listen()
    with dial(listener.local) as one, dial(listener.local) as two:
        first = listener.accept()
        engine.driver.ping()
        assert not listener.accepted
        first.close()
        second = listener.accept()
        assert split_uri(second.peer)[2] == two.getsockname()[1]
        assert one.recv(1) == b""
        second.close()
    listener.close()


def test_out_of_descriptors_a_listener_waits_without_spinning(engine: EngineUnderTest) -> None:
    listener = engine.driver.bind("tcp://127.0.0.1:0")
    listener.listen()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with dial(listener.local) as first:
        listener.accept().close()
        assert first.recv(1) == b""
    spare = socket.socket()
    next_fd = spare.fileno()
    with spare:
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_fd + 1, hard))
        try:
            spare.settimeout(30)
            spare.connect(("127.0.0.1", split_uri(listener.local)[2]))
            before = engine.stats.wakeups
            for _ in range(20):
                engine.driver.ping()
            assert not listener.accepted
            assert engine.stats.wakeups - before < 500
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        flow = listener.accept()
        flow.close()
        assert spare.recv(1) == b""
    listener.close()
