"""Listeners of the guest on host addresses: published by a rule, owned by their device, gone with their flow."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.device_thread import PATIENCE
from vhostsock._core import lib
from vhostsock.offload.handlers import listen
from vhostsock.testing.offload import Refused

from .conftest import MakeGuest, free_port, port_of, read_all

ON = b"\1\0\0\0"
REUSEADDR = (socket.SOL_SOCKET, socket.SO_REUSEADDR, ON)
REUSEPORT = (socket.SOL_SOCKET, socket.SO_REUSEPORT, ON)
V6ONLY = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, ON)


def publish(guest: str, host: str) -> str:
    return f'[[publish]]\nguest = "{guest}"\nhost = "{host}"\n'


def host_port(guest) -> int:  # type: ignore[no-untyped-def]
    """The host port of the guest's only listener."""
    (listener,) = guest.in_loop(lambda: [flow.listener for flow in guest.device._flows.values() if flow.listener])
    port: int = listener.host.port
    return port


def dial(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=PATIENCE)


@pytest.mark.parametrize("bound", ["tcp://0.0.0.0:8080", "tcp6://::/8080"])
def test_a_client_of_the_host_reaches_the_guest(make_guest: MakeGuest, bound: str) -> None:
    guest = make_guest(publish("tcp://0.0.0.0:8080", "tcp://127.0.0.1:0"))
    flow = guest.bind(bound)
    assert flow.local == bound
    flow.listen()
    with dial(host_port(guest)) as client:
        accepted = flow.accept()
        assert accepted.peer == f"tcp://127.0.0.1:{port_of(client)}"
        assert accepted.local == "tcp://127.0.0.1:8080"
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv_all() == b"question"
        accepted.send(b"answer")
        accepted.close()
        assert read_all(client) == b"answer"
    flow.close()


def test_a_datagram_server_answers_whoever_sent_to_it_and_nobody_else(make_guest: MakeGuest) -> None:
    guest = make_guest(publish("udp://0.0.0.0:5353", "udp://127.0.0.1:0"))
    flow = guest.bind("udp://0.0.0.0:5353")
    assert flow.local == "udp://0.0.0.0:5353"
    with socket.socket(type=socket.SOCK_DGRAM) as client, socket.socket(type=socket.SOCK_DGRAM) as stranger:
        for sock in (client, stranger):
            sock.bind(("127.0.0.1", 0))
            sock.settimeout(PATIENCE)
        client.sendto(b"question", ("127.0.0.1", host_port(guest)))
        question, source = flow.recvfrom()
        assert (question, source) == (b"question", f"udp://127.0.0.1:{port_of(client)}")
        flow.sendto(b"unasked", f"udp://127.0.0.1:{port_of(stranger)}")
        flow.sendto(b"answer", source)
        assert client.recvfrom(100) == (b"answer", ("127.0.0.1", host_port(guest)))
        # the one to the stranger went before: had it been let through, it would be here
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.recv(100)
    flow.close()


def test_a_datagram_port_is_shared_with_no_other_socket_of_the_host(make_guest: MakeGuest) -> None:
    guest = make_guest(publish("udp://0.0.0.0:5353", "udp://127.0.0.1:0"))
    flow = guest.bind("udp://0.0.0.0:5353", options=[REUSEADDR])
    with socket.socket(type=socket.SOCK_DGRAM) as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", host_port(guest)))
    flow.close()


def test_datagram_sockets_of_a_guest_share_a_port_and_each_answers_the_clients_of_all(make_guest: MakeGuest) -> None:
    guest = make_guest(publish("udp://0.0.0.0:5353", "udp://127.0.0.1:0"))
    flows = [guest.bind("udp://0.0.0.0:5353", options=[REUSEADDR]) for _ in range(2)]
    [(host, holders)] = guest.in_loop(lambda: list(guest.device._listeners._ports.items()))
    assert holders == 2, "the same port of the host, also where any would do"
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(4)]
        for client in clients:
            client.settimeout(PATIENCE)
            client.connect(host.name())
            client.send(b"question")
            source = f"udp://127.0.0.1:{port_of(client)}"
            guest.wait(lambda: any(flow.datagrams for flow in flows), PATIENCE)
            [got] = [flow for flow in flows if flow.datagrams]
            assert got.recvfrom() == (b"question", source)
            for flow in flows:
                flow.sendto(b"answer", source)
                assert client.recv(100) == b"answer"
        stranger = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        stranger.bind(("127.0.0.1", 0))
        flows[0].sendto(b"unasked", f"udp://127.0.0.1:{port_of(stranger)}")
        flows[0].sendto(b"once more", source)
        assert client.recv(100) == b"once more"
        # the one to the stranger went before: had it been let through, it would be here
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.recv(100)
    for flow in flows:
        flow.close()
    guest.until(lambda: not guest.device._listeners._ports)
    assert not guest.device._listeners._shared


@pytest.mark.parametrize(("first", "second"), [([REUSEADDR], []), ([], [REUSEADDR]), ([], [])])
def test_a_datagram_port_is_not_shared_unless_both_asked_for_it(make_guest: MakeGuest, first: Any, second: Any) -> None:
    guest = make_guest(publish("udp://0.0.0.0:5353", f"udp://127.0.0.1:{free_port()}"))
    guest.bind("udp://0.0.0.0:5353", options=first)
    with pytest.raises(Refused) as caught:
        guest.bind("udp://0.0.0.0:5353", options=second)
    assert caught.value.errno == errno.EADDRINUSE


def test_so_many_sockets_share_a_port_and_no_more(make_guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "SHARE_MAX", 3)
    guest = make_guest(publish("udp://0.0.0.0:5353", f"udp://127.0.0.1:{free_port()}"))
    for _ in range(3):
        guest.bind("udp://0.0.0.0:5353", options=[REUSEADDR])
    with pytest.raises(Refused) as caught:
        guest.bind("udp://0.0.0.0:5353", options=[REUSEADDR])
    assert caught.value.errno == errno.ENOBUFS


def test_a_datagram_server_that_no_rule_publishes_stays_native(make_guest: MakeGuest) -> None:
    guest = make_guest(publish("tcp://0.0.0.0:5353", "tcp://127.0.0.1:0"))
    with pytest.raises(Refused) as refused:
        guest.bind("udp://0.0.0.0:5353")
    assert refused.value.verdict == lib.VSO_NATIVE


def test_ipv6_host_address(make_guest: MakeGuest) -> None:
    guest = make_guest(publish("tcp6://::/8080", "tcp6://::1/0"))
    flow = guest.bind("tcp6://::/8080", [V6ONLY])
    flow.listen()
    with dial(host_port(guest), "::1") as client:
        assert flow.accept().peer == f"tcp6://::1/{port_of(client)}"
    flow.close()


def test_without_a_rule_a_listener_stays_native(make_guest: MakeGuest) -> None:
    guest = make_guest(publish("tcp://0.0.0.0:8080", "tcp://127.0.0.1:0"))
    for uri, options in [("tcp://0.0.0.0:8081", []), ("udp://0.0.0.0:8080", []), ("tcp://127.0.0.1:8080", []),
                         ("tcp6://::/8080", [V6ONLY])]:  # fmt: skip
        with pytest.raises(Refused) as caught:
            guest.bind(uri, options)
        assert (caught.value.verdict, caught.value.errno) == (lib.VSO_NATIVE, 0), uri


def test_port_0_gets_the_real_port_of_the_host(make_guest: MakeGuest) -> None:
    guest = make_guest(publish("tcp://0.0.0.0:0", "tcp://127.0.0.1:0"))
    flow = guest.bind("tcp://0.0.0.0:0")
    port = int(flow.local.rpartition(":")[2])
    assert port == host_port(guest) != 0
    flow.listen()
    with dial(port):
        assert flow.accept().local == f"tcp://127.0.0.1:{port}"
    flow.close()


def test_port_0_takes_the_first_free_port_of_a_range(make_guest: MakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = port_of(taken)
        guest = make_guest(publish("tcp://0.0.0.0:0", f"tcp://127.0.0.1:{first}-{min(first + 50, 65535)}"))
        one, other = guest.bind("tcp://0.0.0.0:0"), guest.bind("tcp://0.0.0.0:0")
        ports = [int(flow.local.rpartition(":")[2]) for flow in (one, other)]
        assert first < ports[0] < ports[1]


def test_port_in_use_on_the_host_is_eaddrinuse_at_bind(make_guest: MakeGuest, listener: socket.socket) -> None:
    guest = make_guest(publish("tcp://0.0.0.0:8080", f"tcp://127.0.0.1:{port_of(listener)}"))
    for options in ([], [REUSEADDR], [REUSEADDR, REUSEPORT]):
        with pytest.raises(Refused) as caught:
            guest.bind("tcp://0.0.0.0:8080", options)
        assert (caught.value.verdict, caught.value.errno) == (lib.VSO_OFFLOAD, errno.EADDRINUSE)


def test_two_guests_never_share_a_port_whatever_they_ask_for(make_guest: MakeGuest) -> None:
    rule = publish("tcp://0.0.0.0:8080", f"tcp://127.0.0.1:{free_port()}")
    one, other = make_guest(rule), make_guest(rule, name="vm2")
    flow = one.bind("tcp://0.0.0.0:8080", [REUSEADDR, REUSEPORT])
    flow.listen()
    with pytest.raises(Refused) as caught:
        other.bind("tcp://0.0.0.0:8080", [REUSEADDR, REUSEPORT])
    assert caught.value.errno == errno.EADDRINUSE
    flow.close()
    one.until(lambda: not one.device._flows)
    other.bind("tcp://0.0.0.0:8080", [REUSEADDR, REUSEPORT]).close()


def test_workers_of_one_guest_share_a_port_that_they_asked_to_share(make_guest: MakeGuest) -> None:
    port = free_port()
    guest = make_guest(publish("tcp://0.0.0.0:8080", f"tcp://127.0.0.1:{port}"))
    workers = [guest.bind("tcp://0.0.0.0:8080", [REUSEPORT]) for _ in range(2)]
    for worker in workers:
        worker.listen()
    with dial(port):
        guest.wait(lambda: any(worker.accepted for worker in workers), PATIENCE)


def test_a_port_is_free_again_when_its_flow_is_closed(make_guest: MakeGuest) -> None:
    port = free_port()
    guest = make_guest(publish("tcp://0.0.0.0:8080", f"tcp://127.0.0.1:{port}"))
    for _ in range(3):
        flow = guest.bind("tcp://0.0.0.0:8080")
        flow.listen()
        flow.close()
    with pytest.raises(ConnectionRefusedError):
        dial(port)


def test_a_bound_socket_that_connects_gives_its_port_back(make_guest: MakeGuest, listener: socket.socket) -> None:
    port = free_port()
    guest = make_guest(
        publish("tcp://0.0.0.0:8080", f"tcp://127.0.0.1:{port}")
        + '[[rule]]\nmatch = { address = "127.0.0.1" }\naction = "offload"\n'
    )
    flow = guest.bind("tcp://0.0.0.0:8080")
    guest.connect(f"tcp://127.0.0.1:{port_of(listener)}", flow=flow)
    assert flow.local == "tcp://127.0.0.1:8080"
    with socket.create_server(("127.0.0.1", port)):
        guest.until(lambda: not guest.device._listeners._ports)
    flow.close()


def test_guest_is_published_on_a_unix_socket(make_guest: MakeGuest, tmp_path: Path) -> None:
    guest = make_guest(publish("tcp://0.0.0.0:80", f"unix://{tmp_path}/{{name}}-{{port}}.sock"))
    path = tmp_path / "vm1-80.sock"
    flow = guest.bind("tcp://0.0.0.0:80")
    flow.listen()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        accepted = flow.accept()
        accepted.send(b"hello")
        accepted.close()
        assert read_all(client) == b"hello"
    flow.close()
    guest.until(lambda: not guest.device._flows)
    assert not path.exists()


def test_left_over_socket_file_is_replaced_and_any_other_file_is_not(make_guest: MakeGuest, tmp_path: Path) -> None:
    path = tmp_path / "g.sock"
    guest = make_guest(publish("tcp://0.0.0.0:80", f"unix://{path}"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    guest.bind("tcp://0.0.0.0:80").close()
    guest.until(lambda: not guest.device._flows)
    path.write_text("precious")
    with pytest.raises(Refused) as caught:
        guest.bind("tcp://0.0.0.0:80")
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_text() == "precious"


def test_socket_that_somebody_listens_on_is_not_replaced(make_guest: MakeGuest, tmp_path: Path) -> None:
    path = tmp_path / "g.sock"
    guest = make_guest(publish("tcp://0.0.0.0:80", f"unix://{path}"))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(Refused) as caught:
            guest.bind("tcp://0.0.0.0:80")
    assert caught.value.errno == errno.EADDRINUSE


def test_unix_target_in_no_directory_is_eaddrnotavail(make_guest: MakeGuest, tmp_path: Path) -> None:
    guest = make_guest(publish("tcp://0.0.0.0:80", f"unix://{tmp_path}/none/g.sock"))
    with pytest.raises(Refused) as caught:
        guest.bind("tcp://0.0.0.0:80")
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_everything_published_is_gone_when_the_front_end_goes(tmp_path: Path) -> None:
    from vhostsock.offload import OffloadDevice, parse_policy

    from .conftest import serving

    port = free_port()
    policy = parse_policy(publish("tcp://0.0.0.0:80", f"unix://{tmp_path}/g.sock") + publish("tcp://0.0.0.0:81", f"tcp://127.0.0.1:{port}"))
    device = OffloadDevice(policy=policy)
    for _ in range(2):  # the same device serves the next front-end
        with serving(device) as guest:
            for bound in ("tcp://0.0.0.0:80", "tcp://0.0.0.0:81"):
                guest.bind(bound).listen()
            assert stat.S_ISSOCK(os.stat(tmp_path / "g.sock").st_mode)
        assert not list(tmp_path.iterdir())
        with pytest.raises(ConnectionRefusedError):
            dial(port)


def test_log_tells_what_is_published_and_who_came(make_guest: MakeGuest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vhostsock.offload")
    port = free_port()
    guest = make_guest(publish("tcp://0.0.0.0:8080", f"tcp://127.0.0.1:{port}"))
    flow = guest.bind("tcp://0.0.0.0:8080")
    flow.listen()
    with dial(port) as client:
        flow.accept().close()
        peer = f"tcp://127.0.0.1:{port_of(client)}"
    flow.close()
    guest.until(lambda: not guest.device._flows)
    start = f"vm1 #{flow.id} tcp://0.0.0.0:8080 "
    assert f"{start}published as tcp://127.0.0.1:{port} (publish rule 1 at policy.toml:1)" in caplog.messages
    assert f"{start}accepted {peer}" in caplog.messages
