# SPDX-License-Identifier: BSD-3-Clause
"""Connections that the guest begins: where they lead, and what becomes of them."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest

from vhostsock._core import lib
from vhostsock.errors import UsageError
from vhostsock.offload import Request
from vhostsock.testing.vsock import Connection
from vhostsock.vsock import VsockDevice

from .conftest import CID, Guest, MakeGuest, accept, listener_at, read_all

DATA = bytes(range(256)) * 4096  # 1 MiB


def test_port_leads_to_the_unix_socket_of_its_number(guest: Guest) -> None:
    with listener_at(guest.path, 52) as server:
        connection = guest.connect(52)
        with accept(server) as host:
            connection.send(b"ping")
            assert host.recv(100) == b"ping"
            host.sendall(b"pong")
            assert connection.recv() == b"pong"
            connection.close()
            assert host.recv(1) == b""


def test_port_where_nobody_listens_is_refused(guest: Guest) -> None:
    with pytest.raises(ConnectionResetError):
        guest.connect(53)


def test_without_any_route_every_connection_is_refused(make_guest: MakeGuest) -> None:
    guest = make_guest(uds_path=None)
    with pytest.raises(ConnectionResetError):
        guest.connect(52)


def test_forward_leads_to_tcp_before_the_unix_socket(make_guest: MakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        guest = make_guest(forwards={52: f"tcp://127.0.0.1:{server.getsockname()[1]}"})
        with listener_at(guest.path, 52):
            connection = guest.connect(52)
            with accept(server) as host:
                connection.send(b"over tcp")
                assert host.recv(100) == b"over tcp"
                connection.close()


def test_forward_to_a_function_in_this_process(make_guest: MakeGuest) -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> None:
        writer.write(f"{request.uri} {(await reader.read()).decode().upper()}".encode())
        await writer.drain()

    guest = make_guest(forwards={7: shout})
    connection = guest.connect(7)
    connection.send(b"hello")
    connection.shutdown()
    assert connection.recv_all() == b"vsock://2:7 HELLO"
    connection.close()


def test_function_that_fails_resets_the_connection(make_guest: MakeGuest) -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> None:
        raise RuntimeError("on purpose")

    guest = make_guest(forwards={7: fail})
    connection = guest.connect(7)
    with pytest.raises(ConnectionResetError):
        connection.recv_all()


def echo_to(host: socket.socket) -> threading.Thread:
    """Echo everything until the end of the stream, on a thread."""

    def run() -> None:
        while data := host.recv(1 << 16):
            host.sendall(data)
        host.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def exchange(connection: Connection, data: bytes) -> bytes:
    """Send all of ``data`` to an echo, reading meanwhile: both directions have a window."""
    back, sent = bytearray(), 0
    while len(back) < len(data):
        connection.driver.wait(lambda: connection.received or (connection.credit and sent < len(data)))  # noqa: B023
        if sent < len(data) and connection.credit:
            sent += connection.try_send(data[sent : sent + 65536])
        if connection.received:
            back += connection.recv()
    return bytes(back)


@pytest.mark.parametrize("rx_layout", [(4096,), (44, 4096), (100, 1, 3000)], ids=["linear", "header-apart", "odd"])
def test_a_mebibyte_each_way_arrives_whole_in_buffers_of_any_layout(make_guest: MakeGuest, rx_layout: tuple[int, ...]) -> None:
    guest = make_guest(driver={"rx_layout": rx_layout}, frontend={"size": 256})
    with listener_at(guest.path, 52) as server:
        connection = guest.connect(52)
        with accept(server) as host:
            thread = echo_to(host)
            assert exchange(connection, DATA) == DATA
            connection.shutdown()
            assert connection.recv() == b""
            thread.join()
            connection.close()


@pytest.mark.parametrize("cuts", [(44,), (1,), (43, 45), (20, 44, 50)])
def test_header_and_payload_may_share_descriptors_in_any_way(guest: Guest, cuts: tuple[int, ...]) -> None:
    with listener_at(guest.path, 52) as server:
        connection = guest.connect(52)
        with accept(server) as host:
            connection.tx_cnt += 65536
            guest.post(lib.VSK_OP_RW, connection.local, 52, payload=DATA[:65536], cuts=cuts, buf_alloc=connection.buf_alloc)
            with host.makefile("rb") as file:  # MSG_WAITALL does not wait where there is a timeout
                assert file.read(65536) == DATA[:65536]
            connection.close()


def test_half_close_of_the_guest_is_the_end_of_file_and_the_host_goes_on(guest: Guest) -> None:
    with listener_at(guest.path, 52) as server:
        connection = guest.connect(52)
        with accept(server) as host:
            connection.send(b"question")
            connection.shutdown()
            assert read_all(host) == b"question"
            host.sendall(b"answer")
            assert connection.recv() == b"answer"
            host.shutdown(socket.SHUT_WR)
            assert connection.recv() == b""
            assert not connection.reset
            connection.close()


def test_half_close_of_the_host_leaves_the_other_half(guest: Guest) -> None:
    with listener_at(guest.path, 52) as server:
        connection = guest.connect(52)
        with accept(server) as host:
            host.sendall(b"bye")
            host.shutdown(socket.SHUT_WR)
            assert connection.recv_all() == b"bye"
            connection.send(b"still here")
            assert host.recv(100) == b"still here"
            connection.close()
            assert host.recv(1) == b""


def test_close_is_answered_at_once_and_the_rest_still_reaches_a_slow_host(guest: Guest) -> None:
    with listener_at(guest.path, 52) as server:
        connection = guest.connect(52)
        with accept(server) as host:
            sent = 0
            while connection.credit:  # more than the host's socket takes: it does not read
                sent += connection.try_send(bytes(min(65536, connection.credit)))
                guest.step()
            connection.close()  # waits for RST
            assert guest.device.stats().buffered
            assert len(read_all(host)) == sent


def test_reset_of_the_guest_is_no_clean_end(make_guest: MakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        guest = make_guest(forwards={52: f"tcp://127.0.0.1:{server.getsockname()[1]}"})
        connection = guest.connect(52)
        with accept(server) as host:
            connection.send(b"half a mess")
            assert host.recv(100) == b"half a mess"
            connection.abort()
            with pytest.raises(ConnectionResetError):
                host.recv(1)


def test_reset_of_the_host_reaches_the_guest_after_what_was_sent_before(make_guest: MakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        guest = make_guest(forwards={52: f"tcp://127.0.0.1:{server.getsockname()[1]}"})
        connection = guest.connect(52)
        with accept(server) as host:
            host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with pytest.raises(ConnectionResetError):
            connection.recv()
        assert not guest.device.stats().flows


def test_ports_are_free_again_as_soon_as_rst_was_said(guest: Guest) -> None:
    with listener_at(guest.path, 52) as server:
        for _ in range(20):
            connection = guest.open(52, local=5000)
            guest.wait(lambda: connection.established)  # noqa: B023
            with accept(server):
                connection.close()
    guest.until(lambda: not guest.device._flows)


def test_a_connection_that_is_given_up_before_its_answer_is_forgotten(make_guest: MakeGuest) -> None:
    async def forever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> None:
        await asyncio.Event().wait()

    class Slow:
        async def connect(self, request: Request) -> None:
            await asyncio.Event().wait()

    guest = make_guest(forwards={7: Slow()})
    connection = guest.open(7)
    guest.until(lambda: guest.device._connecting)
    connection.close()
    guest.until(lambda: not guest.device._connecting)
    assert not guest.device._flows


def test_connect_timeout_refuses(make_guest: MakeGuest) -> None:
    class Slow:
        async def connect(self, request: Request) -> None:
            await asyncio.Event().wait()

    guest = make_guest(forwards={7: Slow()}, connect_timeout=0.01)
    with pytest.raises(ConnectionResetError):
        guest.connect(7)


def test_one_connection_more_than_max_flows_is_refused(make_guest: MakeGuest) -> None:
    guest = make_guest(max_flows=2)
    with listener_at(guest.path, 52):
        kept = [guest.connect(52), guest.connect(52)]
        with pytest.raises(ConnectionResetError):
            guest.connect(52)
        kept.pop().close()
        guest.connect(52).close()
        kept.pop().close()


def test_config_space_holds_the_cid(guest: Guest) -> None:
    assert guest.run(guest.frontend.read_config(0, 8)) == CID.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"guest_cid": 2}, "3 to 4294967294"),
        ({"guest_cid": 0xFFFFFFFF}, "3 to"),
        ({"forwards": {1 << 32: "tcp://127.0.0.1:1"}}, "4294967296"),
        ({"forwards": {1: "udp://127.0.0.1:1"}}, "tcp, tcp6 or unix"),
        ({"forwards": {1: "localhost:1"}}, "scheme"),
        ({"publish": {"tcp://127.0.0.1:0": -1}}, "-1"),
        ({"uds_path": "/" + "x" * 107}, "too long"),
        ({"uds_path": "/no/such/folder/v"}, "no such folder"),
        ({"max_flows": 0}, "max_flows"),
        ({"busy_poll": 1001}, "busy_poll must be 0..1000 microseconds"),
    ],
)
def test_wrong_argument_is_named_when_the_device_is_made(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        VsockDevice(**({"guest_cid": 3} | wrong))  # type: ignore[arg-type]


def test_path_that_another_program_listens_on_fails_the_session(make_guest: MakeGuest, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "v"))
        other.listen()
        with pytest.raises(Exception, match="closed the connection"):
            make_guest()
