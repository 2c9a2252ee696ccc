# SPDX-License-Identifier: BSD-3-Clause
"""Connections that the host begins: the CONNECT line, published addresses, and guests that do not answer."""

from __future__ import annotations

import contextlib
import socket
from itertools import pairwise

import pytest

from .conftest import Guest, MakeGuest, client_of, read_all, read_line


def test_connect_line_reaches_the_listening_port_and_is_answered(guest: Guest) -> None:
    guest.listen(1234)
    with guest.host_connects(1234) as client:
        connection = guest.accept(1234)
        answer = read_line(client)
        assert answer == b"OK %d\n" % connection.peer
        assert 1 << 30 <= connection.peer < 1 << 31
        client.sendall(b"to the guest")
        assert connection.recv() == b"to the guest"
        connection.send(b"to the host")
        assert client.recv(100) == b"to the host"
        connection.close()
        assert client.recv(1) == b""


def test_what_stands_behind_the_line_belongs_to_the_guest(guest: Guest) -> None:
    guest.listen(1234)
    with client_of(guest.path) as client:
        client.sendall(b"CONNECT 1234\nand more\nlines")
        connection = guest.accept(1234)
        assert connection.recv_exactly(14) == b"and more\nlines"
        connection.close()


def test_line_may_come_in_pieces_and_in_any_case(guest: Guest) -> None:
    guest.listen(1234)
    with client_of(guest.path) as client:
        for piece in (b"con", b"nect 12", b"34\r"):
            client.sendall(piece)
            guest.until(lambda: guest.device._clients)
        client.sendall(b"\n")
        connection = guest.accept(1234)
        assert read_line(client).startswith(b"OK ")
        connection.close()


def test_port_where_the_guest_does_not_listen_closes_the_client(guest: Guest) -> None:
    with guest.host_connects(9) as client:
        guest.wait(lambda: guest.queues[1].in_flight == 0 and guest.device.stats().ended == 1)
        assert read_all(client) == b""


WRONG_LINES = [b"GET / HTTP/1.0\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"\n", b"x" * 200]


@pytest.mark.parametrize("line", WRONG_LINES)
def test_client_that_says_something_else_is_closed(guest: Guest, line: bytes) -> None:
    with client_of(guest.path) as client:
        client.sendall(line)
        with contextlib.suppress(ConnectionResetError):  # it had said more than was read
            assert client.recv(1) == b""
    assert not guest.device.stats().opened


def test_client_that_leaves_before_its_line_is_forgotten(guest: Guest) -> None:
    with client_of(guest.path) as client:
        guest.until(lambda: guest.device._clients)
        client.sendall(b"CONN")
    guest.until(lambda: not guest.device._clients)
    assert not guest.device.stats().opened


def test_client_that_says_nothing_is_closed(make_guest: MakeGuest) -> None:
    guest = make_guest(connect_timeout=0.01)
    with client_of(guest.path) as client:
        assert client.recv(1) == b""


def test_guest_that_does_not_answer_is_given_up(make_guest: MakeGuest) -> None:
    guest = make_guest(connect_timeout=0.01, driver={"rx_buffers": 0})  # REQUEST finds no buffer
    with guest.host_connects(1234) as client:
        assert client.recv(1) == b""
    guest.until(lambda: not guest.device._flows)


def test_clients_are_refused_while_no_driver_runs(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.run(guest.frontend.stop())
    with guest.host_connects(1234) as client:
        assert client.recv(1) == b""
    assert not guest.device.stats().opened


def test_published_address_leads_to_its_port_without_a_word(make_guest: MakeGuest) -> None:
    guest = make_guest(publish={"tcp://127.0.0.1:0": 22}, uds_path=None)
    guest.listen(22)
    (uri,) = guest.in_loop(lambda: guest.device.listening)
    with socket.create_connection(("127.0.0.1", int(uri.rpartition(":")[2]))) as client:
        connection = guest.accept(22)
        connection.send(b"SSH-2.0")
        assert client.recv(100) == b"SSH-2.0"
        connection.close()


def test_many_connections_one_after_the_other_each_with_ports_of_its_own(guest: Guest) -> None:
    guest.listen(1234)
    ports = []
    for number in range(50):
        with guest.host_connects(1234) as client:
            connection = guest.accept(1234)
            assert read_line(client) == b"OK %d\n" % connection.peer
            client.sendall(b"%d" % number)
            assert connection.recv() == b"%d" % number
            ports.append(connection.peer)
            connection.close()
    assert all(b > a for a, b in pairwise(ports))
    guest.until(lambda: not guest.device._flows)


def test_many_connections_at_once(guest: Guest) -> None:
    guest.listen(1234)
    clients = [guest.host_connects(1234) for _ in range(50)]
    connections = {guest.accept(1234).peer for _ in clients}
    assert {int(read_line(client)[3:]) for client in clients} == connections
    for client in clients:
        client.close()
    guest.wait(lambda: all(connection.eof or connection.reset for connection in guest.connections.values()))
    for connection in list(guest.connections.values()):
        connection.close()


def test_bytes_of_the_guest_come_behind_the_answer(guest: Guest) -> None:
    guest.listen(1234)
    with guest.host_connects(1234) as client:
        connection = guest.accept(1234)
        connection.send(b"first")
        connection.close()
        assert read_all(client) == b"OK %d\nfirst" % connection.peer


