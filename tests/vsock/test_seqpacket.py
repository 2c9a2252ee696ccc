# SPDX-License-Identifier: BSD-3-Clause
"""Seqpackets: messages keep their bounds both ways, whatever they are cut into and whoever is slow."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhostsock._core import lib
from vhostsock.testing.vsock import Connection

from .conftest import MakeGuest, accept, client_of, listener_at
from .engine import VsockEngine
from .test_credit import pattern

SEQPACKET: int = lib.VSK_TYPE_SEQPACKET
SIZES = [0, 1, 4052, 4053, 70000, 200000]


@contextlib.contextmanager
def connected(**options: object) -> Iterator[tuple[VsockEngine, Connection, socket.socket]]:
    """An engine with a seqpacket connection, and the host's end of that."""
    engine = VsockEngine(**options)  # type: ignore[arg-type]
    try:
        connection = engine.driver.connect(52, kind=SEQPACKET)
        yield engine, connection, engine.pop_host(connection.local)
    finally:
        engine.close()


@pytest.mark.parametrize("size", SIZES)
def test_message_of_the_guest_arrives_as_one(size: int) -> None:
    with connected() as (_, connection, host):
        connection.send(pattern(0, size, 0))
        assert host.recv(1 << 20) == pattern(0, size, 0)
        connection.close()


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_message_of_the_host_arrives_as_one(size: int) -> None:
    with connected() as (_, connection, host):
        host.sendall(pattern(0, size, 0))
        assert connection.recv_message() == pattern(0, size, 0)
        connection.close()


def test_empty_message_of_the_host_is_a_message_and_shutdown_the_end() -> None:
    with connected() as (_, connection, host):
        for data in (b"", b"x", b""):
            host.send(data)
        assert [connection.recv_message() for _ in range(3)] == [b"", b"x", b""]
        host.shutdown(socket.SHUT_WR)
        assert connection.recv_message() is None
        connection.close()


def test_messages_before_the_end_are_not_lost_behind_an_empty_one() -> None:
    with connected(window=10) as (_, connection, host):
        host.send(b"0123456789")  # the window is full, what follows waits in the socket
        for data in (b"", b"x"):
            host.send(data)
        host.shutdown(socket.SHUT_WR)
        assert [connection.recv_message() for _ in range(4)] == [b"0123456789", b"", b"x", None]


def test_messages_queue_for_a_slow_host_and_keep_their_bounds() -> None:
    with connected() as (engine, connection, host):
        sent: list[bytes] = []
        sizes = itertools.cycle([40000, 0, 60000, 1, 65536, 50000])
        while engine.stats.buffered < 100000:
            sent.append(pattern(0, next(sizes), len(sent)))
            connection.send(sent[-1])
            engine.driver.step()
        connection.shutdown()
        assert [host.recv(1 << 20) for _ in sent] == sent
        assert host.recv(1) == b""
        connection.close()


def test_close_lingers_until_the_host_has_every_message() -> None:
    with connected() as (_, connection, host):
        for number in range(4):
            connection.send(pattern(0, 60000, number))
        connection.close()
        assert [host.recv(1 << 20) for _ in range(4)] == [pattern(0, 60000, number) for number in range(4)]
        assert host.recv(1) == b""


def test_rest_of_a_message_gets_its_credit() -> None:
    """100000 of 262144 bytes were forwarded and not told, less than half; the message needs all of the window."""
    with connected() as (_, connection, host):
        connection.send(bytes(100000))
        assert len(host.recv(1 << 20)) == 100000
        host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        connection.send(bytes(200000))
        assert len(host.recv(1 << 20)) == 200000
        connection.close()


def test_message_without_an_end_that_fills_the_window_resets() -> None:
    with connected() as (engine, connection, _):
        for _ in range(4):
            connection.tx_cnt += 65536
            connection.post(lib.VSK_OP_RW, payload=bytes(65536))
        engine.driver.wait(lambda: connection.reset)
        assert engine.stats.buffered == 0


def test_shutdown_within_a_message_resets() -> None:
    with connected() as (engine, connection, _):
        connection.tx_cnt += 1
        connection.post(lib.VSK_OP_RW, payload=b"x")
        connection.shutdown()
        engine.driver.wait(lambda: connection.reset)


def test_empty_messages_to_a_host_that_does_not_read_are_bounded() -> None:
    with connected() as (engine, connection, _):
        for _ in range(100000):
            if connection.reset:
                break
            connection.try_send(b"", lib.VSK_SEQ_EOM)
            engine.driver.step()
        engine.driver.wait(lambda: connection.reset)
        assert engine.stats.buffered == 0


def test_message_larger_than_the_guest_can_hold_resets() -> None:
    with connected(window=1000) as (_, connection, host):
        host.send(bytes(1001))
        with pytest.raises(ConnectionResetError):
            connection.recv_message()


def test_host_of_another_kind_refuses(make_guest: MakeGuest) -> None:
    guest = make_guest()
    with listener_at(guest.path, 52), pytest.raises(ConnectionResetError):
        guest.connect(52, kind=SEQPACKET)
    with listener_at(guest.path, 53, socket.SOCK_SEQPACKET), pytest.raises(ConnectionResetError):
        guest.connect(53)


def test_port_leads_to_the_seqpacket_socket_of_its_number(make_guest: MakeGuest) -> None:
    guest = make_guest()
    with listener_at(guest.path, 52, socket.SOCK_SEQPACKET) as server:
        connection = guest.connect(52, kind=SEQPACKET)
        with accept(server) as host:
            connection.send(b"a message")
            assert host.recv(100) == b"a message"
            connection.close()


def test_client_with_seqpackets_says_connect_as_a_message(make_guest: MakeGuest, tmp_path: Path) -> None:
    guest = make_guest(seqpacket_path=tmp_path / "s")
    guest.listen(7)
    with client_of(tmp_path / "s", socket.SOCK_SEQPACKET) as client:
        client.send(b"CONNECT 7\n")
        client.send(b"first")
        connection = guest.accept(7)
        assert connection.kind == SEQPACKET
        assert client.recv(100) == b"OK %d\n" % connection.peer
        assert connection.recv_message() == b"first"
        connection.send(b"second")
        assert client.recv(100) == b"second"
        connection.close()


def test_seqpackets_that_were_not_negotiated_are_refused(make_guest: MakeGuest) -> None:
    guest = make_guest(frontend={"accept": ~(1 << lib.VSK_F_SEQPACKET | 1 << 34)})
    with listener_at(guest.path, 52, socket.SOCK_SEQPACKET), pytest.raises(ConnectionResetError):
        guest.connect(52, kind=SEQPACKET)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    guest_sizes=st.lists(st.sampled_from([0, 1, 5, 100, 999, 3000]), max_size=30),
    host_sizes=st.lists(st.sampled_from([1, 5, 100, 999, 3000]), max_size=30),
    window=st.sampled_from([3000, 5000, 100000]), buf_alloc=st.sampled_from([3000, 5000, 100000]),
    rx_layout=st.sampled_from([(4096,), (44, 200), (300,)]), lazy=st.integers(0, 20),
)  # fmt: skip
def test_random_messages_lose_nothing_and_never_stall(
    guest_sizes: list[int], host_sizes: list[int], window: int, buf_alloc: int, rx_layout: tuple[int, ...], lazy: int
) -> None:
    with connected(window=window, rx_layout=rx_layout, config={"buf_alloc": buf_alloc}) as (engine, connection, host):
        host.setblocking(False)
        engine.driver.watch(host.fileno(), lambda: None)
        to_host = deque(pattern(0, size, 0) for size in guest_sizes)
        to_guest = deque(pattern(0, size, 1) for size in host_sizes)
        got_host: list[int] = []
        got_guest: list[int] = []

        def guest_can_send() -> bool:
            return bool(to_host) and (not to_host[0] or connection.credit > 0)

        while len(got_host) < len(guest_sizes) or len(got_guest) < len(host_sizes):
            engine.driver.step()
            if guest_can_send():
                data = to_host.popleft()
                rest = data[connection.try_send(data, lib.VSK_SEQ_EOM) :]
                if rest:
                    to_host.appendleft(rest)
            if to_guest:
                with contextlib.suppress(BlockingIOError):
                    host.send(to_guest[0])
                    to_guest.popleft()
            if lazy:
                lazy -= 1
                continue
            with contextlib.suppress(BlockingIOError):
                got_host.append(len(host.recv(1 << 20)))
            while connection.messages:
                got_guest.append(len(connection.recv_message() or b""))
            if len(got_host) < len(guest_sizes) or len(got_guest) < len(host_sizes):
                engine.driver.wait(lambda: connection.messages or guest_can_send() or to_guest or readable(host), timeout=10)
        assert (got_host, got_guest) == (guest_sizes, host_sizes)
        connection.close()


def readable(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True
