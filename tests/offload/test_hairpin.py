# SPDX-License-Identifier: BSD-3-Clause
"""A namespace of the guest whose loopback is the device's, in a namespace of the host (docs/hairpin.md)."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from typing import Any

import pytest

from vhostsock._core import lib
from vhostsock.testing.offload import Refused

from .conftest import Guest, MakeGuest, free_port

POLICY = '[hairpin]\nnetns = "judge"\n'
FROM: dict[str, Any] = {"netns": 4026532008, "name": "judge"}
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace: root")


@pytest.fixture
def guest(make_guest: MakeGuest) -> Guest:
    guest = make_guest(POLICY)
    answer = guest.hello(features=lib.VSO_F_DGRAM | lib.VSO_F_NETNS)
    assert answer.hairpin_len == len("judge")
    return guest


def test_a_driver_that_knows_no_namespaces_hears_of_no_hairpin(make_guest: MakeGuest) -> None:
    assert make_guest(POLICY).hello(features=lib.VSO_F_DGRAM).hairpin_len == 0


def test_both_ends_of_a_stream_are_the_guests(guest: Guest) -> None:
    listener = guest.bind("tcp://127.0.0.1:0", **FROM)
    listener.listen()
    guest.log = deque()
    flow = guest.connect(listener.local, **FROM)
    server = listener.accept()
    order = [m.name for m in guest.log if m.name in ("CONNECT_REPLY", "ACCEPT")]
    assert order == ["CONNECT_REPLY", "ACCEPT"], "who accepts finds the other end connected"
    assert (flow.local, flow.peer) == (server.peer, server.local)
    assert flow.peer == listener.local
    flow.send(b"to myself")
    assert server.recv() == b"to myself"


def test_the_hosts_own_loopback_is_another_one(guest: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        with pytest.raises(Refused) as refused:
            guest.connect(f"tcp://127.0.0.1:{there.getsockname()[1]}", **FROM)
        assert refused.value.errno == errno.ECONNREFUSED
        guest.bind(f"tcp://127.0.0.1:{there.getsockname()[1]}", **FROM).close()
    with pytest.raises(Refused) as refused:
        guest.connect("tcp://192.0.2.1:80", **FROM)
    assert refused.value.errno == errno.ENETUNREACH


def test_other_namespaces_of_the_guest_stay_native(guest: Guest) -> None:
    strangers: list[dict[str, Any]] = [{}, {"netns": 4026532009}, {"netns": 4026532009, "name": "office"}]
    for who in strangers:
        with pytest.raises(Refused) as refused:
            guest.connect(f"tcp://127.0.0.1:{free_port()}", **who)
        assert refused.value.verdict == lib.VSO_NATIVE


def test_a_bound_socket_connects_from_its_address(guest: Guest) -> None:
    listener = guest.bind("tcp://127.0.0.1:0", **FROM)
    listener.listen()
    bound = guest.bind("tcp://127.0.0.1:0", **FROM)
    local = bound.local
    guest.connect(listener.local, flow=bound, **FROM)
    assert bound.local == local
    assert listener.accept().peer == local


def test_a_taken_port_is_in_use_and_a_shared_one_is_not(guest: Guest) -> None:
    first = guest.bind("tcp://127.0.0.1:0", **FROM)
    with pytest.raises(Refused) as refused:
        guest.bind(first.local, **FROM)
    assert refused.value.errno == errno.EADDRINUSE
    share = [(socket.SOL_SOCKET, socket.SO_REUSEPORT, b"\1\0\0\0")]
    one = guest.bind("udp://127.0.0.1:0", share, **FROM)
    assert guest.bind(one.local, share, **FROM).local == one.local


def test_a_datagram_socket_gets_a_peer_another_and_none(guest: Guest) -> None:
    # ports of their choice: one that the kernel chose is given back with the peer (net/ipv4/udp.c, __udp_disconnect)
    one, two, three = (guest.bind(f"udp://127.0.0.1:{port}", **FROM) for port in (5001, 5002, 5003))
    for peer in (two, three):
        guest.connect(peer.local, flow=one, **FROM)
        assert one.peer == peer.local
        one.sendto(b"hello")
        assert peer.recvfrom() == (b"hello", one.local)
    guest.connect("udp://0.0.0.0:0", flow=one, flags=lib.VSO_OPEN_ADDR_ONLY, **FROM)
    two.sendto(b"from anybody", one.local)
    assert one.recvfrom() == (b"from anybody", two.local)


def test_names_that_are_no_names_are_refused(guest: Guest) -> None:
    for name in ("two words", "x" * 64):
        with pytest.raises(Refused) as refused:
            guest.connect("tcp://127.0.0.1:80", netns=1, name=name)
        assert refused.value.errno == errno.EINVAL
