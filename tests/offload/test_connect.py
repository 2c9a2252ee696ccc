"""A connect() of the guest: the policy decides, a handler connects, the application gets the host's answer."""

from __future__ import annotations

import errno
import logging
import socket
from pathlib import Path

import pytest

from vhostsock._core import lib
from vhostsock.offload import BindDecision, Decision, InetURI, OffloadDevice, Policy
from vhostsock.offload import Guest as PolicyGuest
from vhostsock.testing.offload import Refused, pack_open

from .conftest import MakeGuest, accept, free_port, port_of, read_all, serving

TO_LOOPBACK = """
    [[rule]]
    match = { scheme = "tcp", address = "10.0.0.5" }
    action = "offload"
    rewrite = "tcp://127.0.0.1:{port}"
    """


def refusal(guest, uri: str, **options) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """Verdict and errno of a connect that must not be granted."""
    with pytest.raises(Refused) as caught:
        guest.connect(uri, **options)
    return caught.value.verdict, caught.value.errno


def test_bytes_go_both_ways_through_a_rewritten_connection(make_guest: MakeGuest, listener: socket.socket) -> None:
    guest = make_guest(TO_LOOPBACK)
    flow = guest.connect(f"tcp://10.0.0.5:{port_of(listener)}")
    with accept(listener) as server:
        assert flow.peer == f"tcp://10.0.0.5:{port_of(listener)}"
        assert flow.local == f"tcp://127.0.0.1:{server.getpeername()[1]}"
        flow.send(b"question")
        flow.shutdown()
        assert read_all(server) == b"question"
        server.sendall(b"answer")
    assert flow.recv_all() == b"answer"
    flow.close()


@pytest.mark.parametrize("local", ["tcp://10.0.2.15:4000", "tcp://0.0.0.0:4000", "tcp://10.0.2.15:0"])
def test_what_the_guest_bound_natively_stays_its_own_name(make_guest: MakeGuest, listener: socket.socket, local: str) -> None:
    flow = make_guest(TO_LOOPBACK).connect(f"tcp://10.0.0.5:{port_of(listener)}", local)
    with accept(listener) as server:
        host, port = server.getpeername()
        address, _, bound_port = local.removeprefix("tcp://").partition(":")
        shown = host if address == "0.0.0.0" else address
        assert flow.local == f"tcp://{shown}:{port if bound_port == '0' else bound_port}"
        assert host == "127.0.0.1"
    flow.close()


def test_ipv6_target_shows_its_own_names(make_guest: MakeGuest) -> None:
    guest = make_guest('[[rule]]\nmatch = { address = "::1" }\naction = "offload"')
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        flow = guest.connect(f"tcp6://::1/{port_of(listener)}")
        with accept(listener) as server:
            assert flow.local == f"tcp6://::1/{server.getpeername()[1]}"
            assert flow.peer == f"tcp6://::1/{port_of(listener)}"
        flow.close()


def test_ipv6_socket_that_is_rewritten_to_ipv4_shows_a_documentation_address(
    make_guest: MakeGuest, listener: socket.socket
) -> None:
    guest = make_guest('[[rule]]\nmatch = { scheme = "tcp6" }\naction = "offload"\nrewrite = "tcp://127.0.0.1:{port}"')
    flow = guest.connect(f"tcp6://2001:db8:1::5/{port_of(listener)}")
    with accept(listener) as server:
        assert flow.local == f"tcp6://2001:db8::2/{server.getpeername()[1]}"
    flow.close()


def test_without_a_rule_the_socket_stays_native(make_guest: MakeGuest) -> None:
    assert refusal(make_guest(), "tcp://127.0.0.1:80") == (lib.VSO_NATIVE, 0)
    assert refusal(make_guest(TO_LOOPBACK), "tcp://10.0.0.6:80") == (lib.VSO_NATIVE, 0)


def test_deny_carries_the_errno_of_the_rule(make_guest: MakeGuest) -> None:
    guest = make_guest('[[rule]]\nmatch = { port = 25 }\naction = "deny"\nerrno = "ENETUNREACH"')
    assert refusal(guest, "tcp://192.0.2.1:25") == (lib.VSO_DENY, errno.ENETUNREACH)


def test_uid_of_the_caller_counts(make_guest: MakeGuest, listener: socket.socket) -> None:
    guest = make_guest(TO_LOOPBACK.replace("}", ", uid = 1000 }", 1))
    uri = f"tcp://10.0.0.5:{port_of(listener)}"
    assert refusal(guest, uri, uid=1001) == (lib.VSO_NATIVE, 0)
    guest.connect(uri, uid=1000).close()


def test_nobody_listens_is_econnrefused(make_guest: MakeGuest) -> None:
    assert refusal(make_guest(TO_LOOPBACK), f"tcp://10.0.0.5:{free_port()}") == (lib.VSO_OFFLOAD, errno.ECONNREFUSED)


def test_host_without_a_route_is_the_hosts_errno(make_guest: MakeGuest) -> None:
    guest = make_guest('[[rule]]\nmatch = { scheme = "tcp" }\naction = "offload"\nrewrite = "tcp://255.255.255.255:80"')
    with socket.socket() as native, pytest.raises(OSError, match=r"unreachable|denied|Invalid") as caught:
        native.connect(("255.255.255.255", 80))
    assert refusal(guest, "tcp://192.0.2.1:80") == (lib.VSO_OFFLOAD, caught.value.errno)


class FullBacklog:
    """A listener whose backlog is full: a connect to it stays under way."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.clients = [socket.socket()]
        self.clients[0].connect(self.listener.getsockname())

    def __enter__(self) -> FullBacklog:
        return self

    def __exit__(self, *_: object) -> None:
        for one in [self.listener, *self.clients]:
            one.close()


def test_connect_timeout_of_the_policy_is_etimedout(make_guest: MakeGuest) -> None:
    guest = make_guest(TO_LOOPBACK + "connect_timeout = 0.05\n")
    with FullBacklog() as full:
        assert refusal(guest, f"tcp://10.0.0.5:{port_of(full.listener)}") == (lib.VSO_OFFLOAD, errno.ETIMEDOUT)


def test_close_during_connect_cancels_on_the_host(make_guest: MakeGuest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vhostsock")
    guest = make_guest(TO_LOOPBACK)
    with FullBacklog() as full:
        flow, _ = guest.open(lib.VSO_CONNECT, pack_open(f"tcp://10.0.0.5:{port_of(full.listener)}"))
        guest.until(lambda: len(guest.device._connecting) == 1)
        flow.close()
        guest.until(lambda: len(guest.device._connecting) == 0)
    assert not guest.device._flows
    assert "cancelled by the guest" in caplog.text


def test_more_connections_under_way_than_allowed_is_enobufs(make_guest: MakeGuest) -> None:
    guest = make_guest(TO_LOOPBACK, max_pending=1)
    with FullBacklog() as full:
        uri = f"tcp://10.0.0.5:{port_of(full.listener)}"
        waiting, _ = guest.open(lib.VSO_CONNECT, pack_open(uri))
        assert refusal(guest, uri) == (lib.VSO_OFFLOAD, errno.ENOBUFS)
        waiting.close()


@pytest.mark.parametrize(
    ("payload", "verdict", "code"),
    [
        (pack_open("tcp://10.0.0.5:99999"), lib.VSO_OFFLOAD, errno.EINVAL),
        (pack_open("tcp6://::ffff:10.0.0.5/80"), lib.VSO_OFFLOAD, errno.EINVAL),
        (pack_open("gopher://10.0.0.5:80"), lib.VSO_OFFLOAD, errno.EINVAL),
        (pack_open("tcp://10.0.0.5:80", "nonsense"), lib.VSO_OFFLOAD, errno.EINVAL),
        (pack_open("unix:///etc/passwd"), lib.VSO_NATIVE, 0),
        (pack_open("ipx://1.2.3"), lib.VSO_NATIVE, 0),
    ],
)
def test_request_that_is_nonsense_is_refused_and_the_next_is_served(
    make_guest: MakeGuest, listener: socket.socket, payload: bytes, verdict: int, code: int
) -> None:
    guest = make_guest(TO_LOOPBACK)
    with pytest.raises(Refused) as caught:
        guest.finish(*guest.open(lib.VSO_CONNECT, payload))
    assert (caught.value.verdict, caught.value.errno) == (verdict, code)
    guest.connect(f"tcp://10.0.0.5:{port_of(listener)}").close()


class Broken(Policy):
    """A policy with a bug."""

    def decide(self, asked: InetURI, guest: PolicyGuest) -> Decision:
        raise ZeroDivisionError

    def decide_bind(self, asked: InetURI, guest: PolicyGuest, *, v6only: bool = False) -> BindDecision:
        raise ZeroDivisionError


def test_a_bug_in_deciding_fails_its_request_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    with serving(OffloadDevice(policy=Broken())) as guest:
        for _ in range(2):
            assert refusal(guest, "tcp://192.0.2.1:80") == (lib.VSO_OFFLOAD, errno.ECONNABORTED)
            with pytest.raises(Refused):
                guest.bind("tcp://0.0.0.0:80")
        guest.until(lambda: not guest.device._flows)
    assert "guest #1: cannot serve CONNECT" in caplog.text


def test_a_bug_in_deciding_about_a_datagram_fails_its_request_and_no_other(
    make_guest: MakeGuest, caplog: pytest.LogCaptureFixture
) -> None:
    guest = make_guest('[[rule]]\nmatch = { scheme = "udp" }\naction = "offload"\nrewrite = "udp://127.0.0.1:53"\n')
    flow = guest.connect("udp://192.0.2.1:53", flags=lib.VSO_OPEN_ADDR_ONLY)
    guest.device.policy = Broken()
    for host in (2, 3):
        with pytest.raises(Refused) as caught:
            flow.ask(f"udp://192.0.2.{host}:53")
        assert (caught.value.verdict, caught.value.errno) == (lib.VSO_OFFLOAD, errno.ECONNABORTED)
    assert "vm1 #1: cannot serve DGRAM_DEST" in caplog.text
    flow.close()


UNIX = """
    [[rule]]
    match = {{ scheme = "tcp" }}
    action = "offload"
    rewrite = "unix://{path}"
    connect_timeout = {timeout}
    """


def test_tcp_request_reaches_a_unix_socket(make_guest: MakeGuest, tmp_path: Path) -> None:
    guest = make_guest(UNIX.format(path=tmp_path / "{name}-{port}", timeout=30))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "vm1-5432"))
        listener.listen()
        nodelay = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, b"\1\0\0\0")]
        flow = guest.connect("tcp://10.0.0.5:5432", options=nodelay)
        with accept(listener) as server:
            flow.send(b"question")
            assert server.recv(64) == b"question"
            server.sendall(b"answer")
        assert flow.recv_all() == b"answer"
        assert flow.local.startswith("tcp://192.0.2.2:")
        assert flow.peer == "tcp://10.0.0.5:5432"
        flow.close()


def test_unix_socket_that_is_not_there_is_econnrefused(make_guest: MakeGuest, tmp_path: Path) -> None:
    guest = make_guest(UNIX.format(path=tmp_path / "nobody", timeout=30))
    assert refusal(guest, "tcp://10.0.0.5:5432") == (lib.VSO_OFFLOAD, errno.ECONNREFUSED)


def test_unix_socket_with_a_full_backlog_is_waited_for_and_times_out(make_guest: MakeGuest, tmp_path: Path) -> None:
    guest = make_guest(UNIX.format(path=tmp_path / "busy", timeout=0.05))
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "busy"))
        listener.listen(0)
        first.connect(str(tmp_path / "busy"))
        assert refusal(guest, "tcp://10.0.0.5:5432") == (lib.VSO_OFFLOAD, errno.ETIMEDOUT)


def test_unix_socket_with_a_full_backlog_is_reached_when_there_is_room(make_guest: MakeGuest, tmp_path: Path) -> None:
    guest = make_guest(UNIX.format(path=tmp_path / "busy", timeout=30))
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "busy"))
        listener.listen(0)
        first.connect(str(tmp_path / "busy"))
        flow, cookie = guest.open(lib.VSO_CONNECT, pack_open("tcp://10.0.0.5:5432"))
        guest.until(lambda: len(guest.device._connecting) == 1)
        accept(listener).close()
        guest.finish(flow, cookie)
        with accept(listener) as server:
            server.sendall(b"at last")
        assert flow.recv_all() == b"at last"
        flow.close()


def test_options_of_the_application_are_set_on_the_host(make_guest: MakeGuest, listener: socket.socket) -> None:
    guest = make_guest(TO_LOOPBACK)
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, b"\1\0\0\0"), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, b"\x2a\0\0\0")]
    flow = guest.connect(f"tcp://10.0.0.5:{port_of(listener)}", options=options)
    assert flow.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == b"\1\0\0\0"
    assert flow.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == b"\x2a\0\0\0"
    flow.close()


def test_log_says_who_asked_for_what_and_which_rule_decided(
    make_guest: MakeGuest, listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "vhostsock.offload")
    guest = make_guest(TO_LOOPBACK)
    port = port_of(listener)
    flow = guest.connect(f"tcp://10.0.0.5:{port}")
    with accept(listener) as server:
        flow.send(b"12345")
        assert server.recv(5) == b"12345"
        server.sendall(b"abc")
        assert flow.recv_exactly(3) == b"abc"
    flow.close()
    with pytest.raises(Refused):
        guest.connect("tcp://10.0.0.6:80")
    guest.until(lambda: not guest.device._flows)
    lines = caplog.messages
    start = f"vm1 #{flow.id} tcp://10.0.0.5:{port} "
    made = f"{start}offload direct -> tcp://127.0.0.1:{port} (rule 1 at policy.toml:2) "
    assert any(line.startswith(made) and line.endswith(" ms") for line in lines)
    assert any(line.startswith(f"{start}ended: 5 bytes to the host, 3 to the guest, ") for line in lines)
    assert "vm1 #2 tcp://10.0.0.6:80 native (no rule of policy.toml matches, the default is native)" in lines
