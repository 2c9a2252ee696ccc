"""Socket options: one whitelist, real answers, real errors."""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
from typing import Any

import pytest

from vhostsock._core import ffi, lib
from vhostsock.testing.offload import pack, pack_open, pack_options

from .engine import EngineUnderTest, Event, connection

NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY)
ONE = struct.pack("<i", 1)


def test_options_reach_the_host_socket_and_are_read_back(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, _):
        assert flow.getsockopt(*NODELAY) == bytes(4)
        flow.setsockopt(*NODELAY, 1)
        assert flow.getsockopt(*NODELAY) == ONE
        flow.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        assert flow.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
        flow.close()


def test_tcp_info_is_the_hosts_and_a_short_buffer_truncates_it(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, _):
        info = flow.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        assert len(info) >= 192
        assert info[0] == 1  # TCP_ESTABLISHED
        assert flow.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0] == 1
        flow.close()


def test_a_send_buffer_that_is_set_later_bounds_the_window_from_the_answer_on(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, host):
        assert flow.peer_alloc == 262144
        for sndbuf, window in ((4096, 8192), (0, 4096), (65536, 131072), ((1 << 31) - 1, 262144)):
            flow.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
            assert flow.peer_alloc == window
        while flow.credit or not engine.stats.buffered:
            flow.try_send(bytes(65536))
            engine.driver.ping()
        flow.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        assert flow.peer_alloc == 8192
        assert not flow.credit
        sent = flow.tx_cnt
        while sent:  # what was under way by the larger window is no fault
            sent -= len(host.recv(min(sent, 1 << 20)))
        flow.send(bytes(100000))
        received = 0
        while received < 100000:
            received += len(host.recv(1 << 20))
        flow.close()


def test_the_queue_level_tells_what_the_hosts_socket_holds(engine: EngineUnderTest) -> None:
    queue, out, unsent = lib.VSO_SOL_QUEUE, lib.VSO_QUEUE_OUT, lib.VSO_QUEUE_UNSENT
    with connection(engine) as (flow, host):
        assert flow.getsockopt(queue, out) == flow.getsockopt(queue, unsent) == bytes(4)
        while flow.credit or not engine.stats.buffered:
            flow.try_send(bytes(65536))
            engine.driver.ping()
        held = int.from_bytes(flow.getsockopt(queue, out), "little")
        assert held >= int.from_bytes(flow.getsockopt(queue, unsent), "little") > 0
        sent = flow.tx_cnt
        while sent:
            sent -= len(host.recv(min(sent, 1 << 20)))
        while flow.getsockopt(queue, out) != bytes(4):  # until the acknowledgement of the last
            pass
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOPROTOOPT))):
            flow.getsockopt(queue, 3)
        flow.close()


@pytest.mark.parametrize(
    ("level", "name"),
    [(socket.SOL_SOCKET, socket.SO_MARK), (socket.SOL_SOCKET, socket.SO_LINGER), (socket.SOL_SOCKET, 9999),
     (socket.IPPROTO_IP, 19), (socket.IPPROTO_TCP, 31), (0x7FFFFFFF, 1)],
)  # fmt: skip
def test_what_is_not_on_the_list_is_enoprotoopt_and_never_a_silent_success(
    engine: EngineUnderTest, level: int, name: int
) -> None:
    with connection(engine) as (flow, _):
        for call in (lambda: flow.setsockopt(level, name, 1), lambda: flow.getsockopt(level, name)):
            with pytest.raises(OSError, match=rf"Errno {errno.ENOPROTOOPT}\b"):
                call()
        flow.close()


def test_the_hosts_own_error_passes_through(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, _):
        with pytest.raises(OSError, match=rf"Errno {errno.ENOENT}\b"):
            flow.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"no such algorithm")
        flow.close()


def test_a_unix_socket_has_no_tcp_options(engine: EngineUnderTest) -> None:
    ours, theirs = socket.socketpair()
    engine.on_connect = lambda event: engine.connected(event, ours, "tcp://10.0.0.2:1", "tcp://10.0.0.1:1")
    with theirs:
        flow = engine.driver.connect("tcp://10.0.0.1:1", options=[(*NODELAY, ONE)])  # applied as far as it goes
        with pytest.raises(OSError, match=rf"Errno {errno.ENOPROTOOPT}\b"):
            flow.setsockopt(*NODELAY, 1)
        flow.close()


def test_options_that_come_with_connect_and_before_its_answer_are_applied(engine: EngineUnderTest) -> None:
    asked: list[Event] = []
    engine.on_connect = asked.append
    options = pack_options([(*NODELAY, ONE), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, ONE)])
    flow, cookie = engine.driver.open(lib.VSO_CONNECT, pack_open("tcp://10.0.0.1:1", options=options))
    flow.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
    with pytest.raises(OSError, match=rf"Errno {errno.ENOPROTOOPT}\b"):
        flow.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)
    engine.driver.wait(lambda: asked)
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        probe = sock.dup()
        engine.connected(asked[0], sock, "", "")
        engine.driver.finish(flow, cookie)
    with probe:
        assert probe.getsockopt(*NODELAY)
        assert probe.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
    flow.close()


@pytest.mark.parametrize(
    "payload",
    [b"", bytes(15), pack("struct vso_sockopt", level=6, name=1, len=8) + bytes(4),
     pack("struct vso_sockopt", level=6, name=1, len=0xFFFFFFFF),
     pack("struct vso_sockopt", level=6, name=1, len=513) + bytes(513)],
)  # fmt: skip
def test_a_malformed_option_is_einval(engine: EngineUnderTest, payload: bytes) -> None:
    with connection(engine) as (flow, _):
        for cookie, kind in enumerate((lib.VSO_SETSOCKOPT, lib.VSO_GETSOCKOPT), 1000):
            if kind == lib.VSO_GETSOCKOPT and payload[8:12] == pack("struct vso_sockopt", len=8)[8:12]:
                continue  # room for 8 bytes is a fair question
            flow._post(kind, cookie=cookie, payload=payload)
            engine.driver.wait(lambda c=cookie: c in flow.replies)  # type: ignore[misc]
            assert flow.replies[cookie].arg == errno.EINVAL
        flow.close()


def test_options_of_a_dead_flow_are_answered_with_enotconn(engine: EngineUnderTest) -> None:
    with connection(engine) as (flow, _):
        lib.vse_reset_all(engine.ptr, False)
        engine.driver.wait(lambda: flow.error)
        flow._post(lib.VSO_GETSOCKOPT, cookie=5000, payload=pack("struct vso_sockopt", level=6, name=1, len=4))
        engine.driver.wait(lambda: 5000 in flow.replies)
        assert flow.replies[5000].arg == errno.ENOTCONN
        flow.close()


def test_apply_opts_names_the_first_failure_and_applies_the_rest() -> None:
    def apply(sock: socket.socket, raw: bytes) -> int:
        return int(lib.vse_apply_opts(sock.fileno(), ffi.from_buffer(raw), len(raw)))

    good: tuple[Any, ...] = (*NODELAY, ONE)
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        assert apply(tcp, pack_options([good])) == 0
        assert apply(unix, pack_options([good])) == -errno.ENOPROTOOPT
        tcp.setsockopt(*NODELAY, 0)
        assert apply(tcp, pack_options([(socket.SOL_SOCKET, socket.SO_MARK, ONE), good])) == -errno.ENOPROTOOPT
        assert tcp.getsockopt(*NODELAY)
        assert apply(tcp, b"short") == -errno.EINVAL
