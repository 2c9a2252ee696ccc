# SPDX-License-Identifier: BSD-3-Clause
"""IPX over UDP (RFC 1234): guests as nodes, and what comes from the UDP side as the test wants it, byte by byte."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest

from tests.device_thread import PATIENCE
from vhostsock._core import lib
from vhostsock.offload.uri import IpxURI
from vhostsock.testing.offload import Flow, Refused

from .conftest import Guest, MakeGuest

FEATURES = lib.VSO_F_DGRAM | lib.VSO_F_DGRAM_INFO | lib.VSO_F_IPX
NETWORK = 0xA1
EVERYBODY = (1 << 48) - 1
PORT = 2130
_numbers = itertools.count(1)


class Place:
    """A loopback address that is this test's alone, where a node is."""

    def __init__(self) -> None:
        number = os.getpid() << 8 | next(_numbers)
        self.host = f"127.{number >> 16 & 63 | 64}.{number >> 8 & 255}.{number & 255}"
        self.udp = f"udp://{self.host}:{PORT}"
        self.node = IpxURI.node_at(IPv4Address(self.host), PORT)

    def at(self, number: int) -> str:
        return str(IpxURI(NETWORK, self.node, number))


def packet(to: int, source: int, data: bytes = b"data", *, number: int = 0x4000, sender: int = 0x5000, network: int = NETWORK,
           checksum: int = 0xFFFF, length: int | None = None, hops: int = 0, kind: int = 4, of: int = NETWORK) -> bytes:
    """An IPX packet to node ``to`` from node ``source``, good unless said otherwise."""
    size = 30 + len(data) if length is None else length
    return (
        checksum.to_bytes(2, "big") + size.to_bytes(2, "big") + bytes((hops, kind))
        + network.to_bytes(4, "big") + to.to_bytes(6, "big") + number.to_bytes(2, "big")
        + of.to_bytes(4, "big") + source.to_bytes(6, "big") + sender.to_bytes(2, "big") + data
    )  # fmt: skip


class Peer(Place):
    """A node that is the test itself."""

    def __init__(self) -> None:
        super().__init__()
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((self.host, PORT))
        self.sock.settimeout(PATIENCE)

    def send(self, data: bytes, to: Place) -> None:
        self.sock.sendto(data, (to.host, PORT))


@pytest.fixture
def peer() -> Iterator[Peer]:
    one = Peer()
    with one.sock:
        yield one


MakeNode = Callable[..., tuple[Guest, Place]]


@pytest.fixture
def make_node(make_guest: MakeGuest) -> MakeNode:
    def make(*peers: Place, place: Place | None = None, more: str = "") -> tuple[Guest, Place]:
        place = place or Place()
        names = ", ".join(f'"{p.udp}"' for p in peers)
        known = f"peers = [{names}]" if peers else ""
        guest = make_guest(f'{more}\n[[ipx]]\nnetwork = "{NETWORK:08x}"\nlisten = "{place.udp}"\n{known}\n')
        guest.hello(features=FEATURES)
        return guest, place

    return make


def bound(guest: Guest, number: int = 0x4000) -> Flow:
    return guest.bind(f"ipx://00000000.000000000000.{number:04x}")


def test_two_guests_exchange_datagrams_both_ways(make_node: MakeNode) -> None:
    place, other = Place(), Place()
    first, _ = make_node(other, place=place)
    second, _ = make_node(place, place=other)
    a, b = bound(first, 0x4001), bound(second, 0x4002)
    assert (a.local, b.local) == (place.at(0x4001), other.at(0x4002))
    for size in (0, 1, 546, 60000):
        a.sendto(bytes(range(256)) * (size // 256) + b"x" * (size % 256), other.at(0x4002), tos=size % 200)
        data, source = b.recvfrom()
        assert (len(data), source, b.infos[-1][0].tos, b.infos[-1][0].ttl) == (size, place.at(0x4001), size % 200, 0)
        b.sendto(data, source)
        assert a.recvfrom() == (data, other.at(0x4002))


def test_a_broadcast_reaches_every_peer_and_the_own_node_once(make_node: MakeNode, peer: Peer) -> None:
    place, other = Place(), Place()
    first, _ = make_node(other, peer, place=place)
    second, _ = make_node(place, place=other)
    a, own, b = bound(first, 0x4001), bound(first, 0x4002), bound(second, 0x4002)
    a.sendto(b"anybody?", str(IpxURI(NETWORK, EVERYBODY, 0x4002)))
    for flow in (own, b):
        assert flow.recvfrom() == (b"anybody?", place.at(0x4001))
    assert peer.sock.recv(100) == packet(EVERYBODY, place.node, b"anybody?", number=0x4002, sender=0x4001, kind=0)
    a.sendto(b"again", str(IpxURI(0, EVERYBODY, 0x4002)))
    for flow in (own, b):
        assert flow.recvfrom()[0] == b"again"


def test_a_header_is_as_rfc_1234_has_it(make_node: MakeNode, peer: Peer) -> None:
    guest, place = make_node(peer)
    flow = bound(guest, 0x4567)
    flow.sendto(b"hello", peer.at(0x8901), tos=17)
    assert peer.sock.recvfrom(100) == (
        packet(peer.node, place.node, b"hello", number=0x8901, sender=0x4567, kind=17), (place.host, PORT)
    )  # fmt: skip
    peer.send(packet(place.node, peer.node, b"padded\0", number=0x4567, length=36, hops=3, kind=20), place)
    assert flow.recvfrom() == (b"padded", peer.at(0x5000))
    assert (flow.infos[-1][0].ttl, flow.infos[-1][0].tos) == (3, 20)


def test_port_213_is_the_node_of_the_rfc() -> None:
    assert IpxURI.node_at(IPv4Address("10.1.2.3"), 213) == 0x00000A010203
    assert str(IpxURI(NETWORK, 0x00000A010203, 1).endpoint.with_port(1)) == "ipx://10.1.2.3:1"
    assert IpxURI(NETWORK, 0x00000A010203, 1).endpoint.port == 213
    assert IpxURI(NETWORK, IpxURI.node_at(IPv4Address("10.1.2.3"), 2130), 1).endpoint.port == 2130


def test_what_is_no_packet_for_this_node_is_dropped_and_counted(make_node: MakeNode, peer: Peer) -> None:
    guest, place = make_node(peer)
    flow = bound(guest)
    to, me = place.node, peer.node
    bad = [
        b"", b"x", packet(to, me)[:29], packet(to, me, length=29), packet(to, me, length=35), packet(to, me, length=0xFFFF),
        packet(to, me, checksum=0), packet(to, me, checksum=0xFFFE), packet(to, me, hops=16), packet(to, me, network=2),
        packet(to + 1, me), packet(to, me, of=2), packet(to, me, number=0x4001), packet(to, me, number=0),
        packet(to, to), packet(to, me + 1), packet(to, EVERYBODY),  # it speaks for another node
    ]  # fmt: skip
    for data in bad:
        peer.send(data, place)
    peer.send(packet(to, me, b"good", network=0, of=0, hops=15), place)
    assert flow.recvfrom() == (b"good", peer.at(0x5000))
    assert guest.device.stats().dgrams_dropped == len(bad)


def test_who_is_no_peer_is_heard_once_the_flow_has_sent_to_it(make_node: MakeNode, peer: Peer) -> None:
    rule = f'[[rule]]\nmatch = {{ scheme = "ipx", address = "{peer.host}", port = {PORT} }}\naction = "offload"'
    guest, place = make_node(more=rule)
    flow, second = bound(guest), bound(guest, 0x4001)
    peer.send(packet(place.node, peer.node, b"early"), place)
    guest.until(lambda: guest.device.stats().dgrams_dropped == 1)
    flow.sendto(b"hello", peer.at(1))
    assert peer.sock.recv(100).endswith(b"hello")
    peer.send(packet(place.node, peer.node, b"to another flow", number=0x4001), place)
    peer.send(packet(place.node, peer.node, b"answer"), place)
    assert flow.recvfrom() == (b"answer", peer.at(0x5000))
    assert guest.device.stats().dgrams_dropped == 2
    second.close()
    flow.close()


def test_the_policy_decides_on_each_destination(make_node: MakeNode, peer: Peer) -> None:
    denied, unknown = Place(), Place()
    rules = f"""
[[rule]]
match = {{ scheme = "ipx", address = "{denied.host}" }}
action = "deny"
errno = "EPERM"
[[rule]]
match = {{}}
action = "offload"
"""
    guest, _ = make_node(peer, more=rules)
    flow = bound(guest)
    flow.ask(peer.at(1))
    flow.ask(str(IpxURI(0, EVERYBODY, 1)))
    for uri, expected in {
        denied.at(1): (lib.VSO_DENY, errno.EPERM),
        unknown.at(1): (lib.VSO_OFFLOAD, errno.ENETUNREACH),  # the host's loopback must be named
        str(IpxURI(2, peer.node, 1)): (lib.VSO_OFFLOAD, errno.ENETUNREACH),
        peer.at(1).upper().replace("IPX", "ipx"): (lib.VSO_OFFLOAD, errno.EINVAL),  # one address, one text
        "ipx://1.2.3": (lib.VSO_OFFLOAD, errno.EINVAL),
        f"udp://{peer.host}:{PORT}": (lib.VSO_OFFLOAD, errno.EAFNOSUPPORT),
    }.items():
        with pytest.raises(Refused) as caught:
            flow.ask(uri)
        assert (caught.value.verdict, caught.value.errno) == expected, uri


def test_socket_numbers_are_given_in_the_dynamic_range_and_taken_once(make_node: MakeNode) -> None:
    guest, place = make_node()
    first, second = bound(guest, 0), bound(guest, 0)
    assert (first.local, second.local) == (place.at(0x4000), place.at(0x4001))
    with pytest.raises(Refused) as caught:
        bound(guest, 0x4000)
    assert caught.value.errno == errno.EADDRINUSE
    first.close()
    assert bound(guest, 0x4000).local == place.at(0x4000)
    with pytest.raises(Refused) as caught:
        guest.bind("ipx://00000002.000000000000.4005")
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_without_a_table_there_is_no_ipx(make_guest: MakeGuest) -> None:
    others = '[[ipx]]\nnetwork = "000000a1"\nlisten = "udp://127.0.0.1"\ndevice = "x"'
    guest = make_guest(f'[[rule]]\nmatch = {{}}\naction = "offload"\n{others}')
    guest.hello(features=FEATURES)
    with pytest.raises(Refused) as caught:
        bound(guest)
    assert (caught.value.verdict, caught.value.errno) == (lib.VSO_NATIVE, 0)


def test_a_place_that_is_taken_is_no_interface_to_the_guest(
    make_node: MakeNode, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    guest, _ = make_node(place=peer)
    with pytest.raises(Refused) as caught:
        bound(guest)
    assert (caught.value.verdict, caught.value.errno) == (lib.VSO_OFFLOAD, errno.EADDRNOTAVAIL)
    guest.until(lambda: f"listen on {peer.udp}: Address already in use" in caplog.text)
    peer.sock.close()
    bound(guest).close()


def test_a_driver_that_does_not_know_ipx_stays_native_and_one_that_does_may_not_connect(make_node: MakeNode) -> None:
    guest, place = make_node()
    with pytest.raises(Refused) as caught:
        guest.connect(place.at(1))
    assert caught.value.errno == errno.EINVAL
    guest.hello(features=lib.VSO_F_DGRAM)
    with pytest.raises(Refused) as caught:
        bound(guest)
    assert caught.value.verdict == lib.VSO_NATIVE


def test_a_datagram_without_a_destination_or_too_long_for_a_packet_hurts_only_itself(make_node: MakeNode, peer: Peer) -> None:
    guest, _ = make_node(peer)
    flow, other = bound(guest, 0), bound(guest, 0)
    other.ask(peer.at(1))
    other.sendto(bytes(65536), peer.at(1))
    assert other.recv_error().head.error == errno.EMSGSIZE
    flow.sendto(b"where?")
    with pytest.raises(OSError, match="Protocol error"):
        flow.recvfrom()
    other.sendto(b"goes on", peer.at(1))
    assert peer.sock.recv(100).endswith(b"goes on")


def test_packets_wait_in_the_hosts_socket_while_the_guest_has_no_chains(make_node: MakeNode, peer: Peer) -> None:
    guest, place = make_node(peer)
    flow = bound(guest)
    many = 4 * 32  # chains that the driver keeps posted
    for number in range(many):
        peer.send(packet(place.node, peer.node, number.to_bytes(4, "big")), place)
    assert [int.from_bytes(flow.recvfrom()[0], "big") for _ in range(many)] == list(range(many))
    assert not guest.device.stats().dgrams_dropped


def test_a_new_driver_starts_with_free_numbers(make_node: MakeNode) -> None:
    guest, place = make_node()
    bound(guest, 0x4000)
    guest.flows.clear()
    guest.hello(features=FEATURES)
    assert bound(guest, 0x4000).local == place.at(0x4000)
