# SPDX-License-Identifier: BSD-3-Clause
"""Multicast groups of published datagram servers: joined on the host where the rule names them, on its loopback here."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device_thread import PATIENCE
from vhostsock._core import lib
from vhostsock.testing.offload import Flow, Refused

from .conftest import Guest, MakeGuest

FEATURES = lib.VSO_F_DGRAM | lib.VSO_F_DGRAM_INFO | lib.VSO_F_GROUP
RUN = f"239.77.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"  # nobody else's group
PUBLISH = f"""
    [[publish]]
    guest = "udp://0.0.0.0:*"
    host = "udp://0.0.0.0:0"
    groups = ["{RUN}"]
    interface = "lo"
    """


@pytest.fixture
def sender() -> Iterator[socket.socket]:
    """Sends to groups over the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=4x4xi", 1))
        one.bind(("127.0.0.1", 0))
        one.settimeout(PATIENCE)
        yield one


def serving(make_guest: MakeGuest, policy: str = PUBLISH) -> tuple[Guest, Flow, int]:
    guest = make_guest(policy)
    guest.hello(features=FEATURES)
    flow = guest.bind("udp://0.0.0.0:0")
    return guest, flow, int(flow.local.rpartition(":")[2])


def refusal(flow: Flow, uri: str, *, join: bool = True) -> tuple[int, int]:
    with pytest.raises(Refused) as caught:
        flow.group(uri, join=join)
    return caught.value.verdict, caught.value.errno


def test_a_group_that_the_rule_names_is_heard_from_joining_to_leaving(make_guest: MakeGuest, sender: socket.socket) -> None:
    _, flow, port = serving(make_guest)
    sender.sendto(b"early", (RUN, port))
    flow.group(f"udp://{RUN}:0")
    sender.sendto(b"heard", (RUN, port))
    data, source = flow.recvfrom()
    assert data == b"heard"
    assert flow.infos[-1][1][12:] == socket.inet_aton(RUN)
    flow.sendto(b"answer", source)
    assert sender.recv(100) == b"answer"
    assert refusal(flow, f"udp://{RUN}:0") == (lib.VSO_OFFLOAD, errno.EADDRINUSE)
    flow.group(f"udp://{RUN}:0", join=False)
    sender.sendto(b"late", (RUN, port))
    sender.sendto(b"unicast", ("127.0.0.1", port))
    assert flow.recvfrom()[0] == b"unicast"


def test_what_no_rule_names_is_native(make_guest: MakeGuest) -> None:
    _, flow, _ = serving(make_guest)
    native = (lib.VSO_NATIVE, 0)
    assert refusal(flow, "udp://239.78.0.1:0") == native
    assert refusal(flow, "udp6://ff15::1/0") == native  # not this socket's family
    assert refusal(flow, f"udp://{RUN}:0", join=False) == native  # it was never joined
    assert refusal(flow, "ipx://1.2.3") == (lib.VSO_OFFLOAD, errno.EINVAL)
    assert refusal(flow, "") == (lib.VSO_OFFLOAD, errno.EINVAL)


def test_a_socket_that_is_not_published_joins_nothing_on_the_host(make_guest: MakeGuest) -> None:
    rule = '[[rule]]\nmatch = { scheme = "udp", address = "127.0.0.1" }\naction = "offload"\n'
    guest = make_guest(rule + PUBLISH.replace("    ", ""))
    guest.hello(features=FEATURES)
    flow = guest.connect("udp://127.0.0.1:9", flags=lib.VSO_OPEN_ADDR_ONLY)
    assert refusal(flow, f"udp://{RUN}:0") == (lib.VSO_NATIVE, 0)


def test_an_interface_that_the_host_does_not_have_is_enodev(make_guest: MakeGuest) -> None:
    _, flow, _ = serving(make_guest, PUBLISH.replace('"lo"', '"nosuch0"'))
    assert refusal(flow, f"udp://{RUN}:0") == (lib.VSO_OFFLOAD, errno.ENODEV)


def test_what_others_on_the_host_joined_is_not_heard(make_guest: MakeGuest, sender: socket.socket) -> None:
    _, flow, port = serving(make_guest)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(RUN) + struct.pack("=4xi", 1))
        sender.sendto(b"to the other", (RUN, port))
        sender.sendto(b"to us", ("127.0.0.1", port))
        assert flow.recvfrom()[0] == b"to us"


def test_a_driver_that_does_not_know_groups_stays_native(make_guest: MakeGuest) -> None:
    guest = make_guest(PUBLISH)
    assert refusal(guest.bind("udp://0.0.0.0:0"), f"udp://{RUN}:0") == (lib.VSO_NATIVE, 0)


def test_ipv6_groups_are_joined_too(make_guest: MakeGuest) -> None:
    policy = '[[publish]]\nguest = "udp6://::/0"\nhost = "udp6://::/0"\ngroups = "ff15::/16"\ninterface = "lo"'
    guest = make_guest(policy)
    guest.hello(features=FEATURES)
    flow = guest.bind("udp6://::/0")
    group = f"ff15::77:{os.getpid() & 0xFFFF or 1:x}"
    wanted = f"lo {socket.inet_pton(socket.AF_INET6, group).hex()}"

    def joined() -> bool:  # the loopback has no route for groups of IPv6, so nothing can be sent there
        return any(wanted in " ".join(line.split()) for line in Path("/proc/net/igmp6").read_text().splitlines())

    assert not joined()
    flow.group(f"udp6://{group}/0")
    assert joined()
    flow.group(f"udp6://{group}/0", join=False)
    assert not joined()
