# SPDX-License-Identifier: BSD-3-Clause
"""The network card on a real tap, in a namespace of its own: packets both ways, queues, offloads, link and errors."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests.device.test_net import MAC, Nic, frame, received, sent, without
from tests.netns import Namespace, may_make_namespaces
from vhostsock.devices.net import Net
from vhostsock.devices.net_header import Header, NetFeature
from vhostsock.devices.tap import Tap
from vhostsock.errors import RequestError
from vhostsock.testing.driver import Request
from vhostsock.testing.plugin import VhostUser

pytest_plugins = ["vhostsock.testing.plugin"]
pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="needs root and /dev/net/tun")

TYPE = 0x88B5
HOST = bytes.fromhex("020000000001")


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespace() as space:
        yield space


class Cable:
    """A tap in a namespace, a card on it, and a socket at the host's end."""

    def __init__(self, space: Namespace, pairs: int = 1) -> None:
        self.space = space
        self.tap = space.run(Tap, "tap0", pairs)
        self.net = Net(self.tap, mac=MAC, pairs=pairs)
        self.sock = space.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(TYPE))
        self.sock.bind(("tap0", TYPE))
        self.sock.settimeout(20)

    def take(self) -> bytes:
        """The next frame that came out of the tap."""
        while True:
            data, (_, _, kind, *_) = self.sock.recvfrom(70000)
            if kind != socket.PACKET_OUTGOING:
                return data


@pytest.fixture
def cable(request: pytest.FixtureRequest, space: Namespace) -> Iterator[Cable]:
    """To be asked for before ``vhost_user``: the card goes first."""
    cable = Cable(space, getattr(request, "param", 1))
    yield cable
    cable.sock.close()
    cable.tap.close()


def ours(nic: Nic, count: int) -> list[bytes]:
    """So many frames of our type from the receive queue; a new interface is also sent what the host's kernel has to say."""
    found: list[bytes] = []
    while len(found) < count:
        done: list[Request] = nic.guest.run(nic.rx.wait_async(1))
        found += [data for _, data in received(done) if data[12:14] == TYPE.to_bytes(2, "big")]
    return found


def test_packets_go_out_of_the_tap_and_come_in(cable: Cable, vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user, cable.net)
    nic.give(40)
    for i in range(10):
        nic.send(frame(60 + 100 * i, i))
        nic.settle()
        assert cable.take() == frame(60 + 100 * i, i)
    for i in range(10):
        cable.sock.send(MAC + HOST + frame(100 + i, i)[12:])
    assert ours(nic, 10) == [MAC + HOST + frame(100 + i, i)[12:] for i in range(10)]


def test_packets_wait_in_the_tap_while_the_guest_has_no_room(cable: Cable, vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user, cable.net)
    nic.guest.run(nic.guest.frontend.settled())
    for i in range(20):
        cable.sock.send(frame(1000, i))
    nic.give(60, 600)
    assert ours(nic, 20) == [frame(1000, i) for i in range(20)]
    assert cable.net.counters["rx_dropped"] == 0


@pytest.mark.parametrize("takes", [True, False])
def test_the_kernel_leaves_checksums_to_a_guest_that_takes_them(cable: Cable, vhost_user: VhostUser, takes: bool) -> None:
    features = without(NetFeature(0)) if takes else without(NetFeature.GUEST_CSUM)
    nic = Nic(vhost_user, cable.net, accept=features)
    nic.give(60)
    cable.space.address("tap0", "192.0.2.1", 24)
    with cable.space.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.sendto(b"x" * 100, ("192.0.2.255", 9))
    found: list[Header] = []
    while not found:
        for header, data in received(nic.guest.run(nic.rx.wait_async(1))):
            if data[12:14] == b"\x08\x00" and data[23] == socket.IPPROTO_UDP and data[36:38] == b"\0\x09":
                found.append(header)
    assert found == [Header(1, csum_start=34, csum_offset=6) if takes else Header()]


def test_a_packet_that_the_kernel_does_not_believe_costs_itself(cable: Cable, vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user, cable.net)
    nic.send(frame(60), Header(1, gso_type=1, hdr_len=20, gso_size=9000, csum_start=0, csum_offset=0))  # no TCP anywhere
    nic.send(frame(70))
    nic.settle(2)
    assert cable.take() == frame(70)
    assert cable.net.counters["tx_dropped"] == 1


def test_the_link_follows_the_tap(cable: Cable, vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user, cable.net)
    assert nic.guest.read_config(6, 2) == b"\1\0"
    for state, status in (("down", b"\0\0"), ("up", b"\1\0")):
        cable.space.link("set", "tap0", state=state)
        nic.guest.run(nic.guest.frontend.backend_request())
        assert nic.guest.read_config(6, 2) == status


def test_the_guest_is_told_the_mtu_of_the_tap_and_none_beyond_it(cable: Cable, vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user, cable.net)
    assert nic.guest.read_config(10, 2) == (1500).to_bytes(2, "little")
    with pytest.raises(RequestError, match="takes 1500"):
        cable.net.set_mtu(1501)
    cable.net.set_mtu(1500)
    with pytest.raises(ValueError, match="takes 1500"):
        Net(cable.tap, mtu=9000)


def test_the_network_is_told_where_a_guest_went(cable: Cable) -> None:
    with cable.space.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x8035)) as sock:
        sock.bind(("tap0", 0x8035))
        sock.settimeout(20)
        cable.net.announce(MAC)
        data = sock.recv(100)
    assert data[:14] == b"\xff" * 6 + MAC + b"\x80\x35"
    assert (data[14:22], data[22:28], data[32:38]) == (bytes.fromhex("0001080006040003"), MAC, MAC)


@pytest.mark.parametrize("cable", [4], indirect=True)
def test_only_the_pairs_in_use_get_packets(cable: Cable, vhost_user: VhostUser) -> None:
    guest = vhost_user(cable.net)
    queues = guest.frontend.queues
    for queue in queues[:8:2]:
        for _ in range(30):
            queue.submit([], [1526])
    assert guest.request(b"\4\0\2\0", room=1, queue=8) == b"\0"
    for i in range(20):  # flows that the kernel would spread over all four
        cable.sock.send(frame(60, i))

    async def arrived() -> list[int]:
        found = [0] * 4
        while sum(found) < 20:
            for pair, queue in enumerate(queues[:8:2]):
                found[pair] += sum(data[12:14] == TYPE.to_bytes(2, "big") for _, data in received(queue.collect()))
            await asyncio.sleep(0)
        return found

    assert guest.run(arrived())[2:] == [0, 0]
    queues[3].submit([sent(frame(64))])  # the second pair sends
    guest.run(queues[3].wait_async())
    assert cable.take() == frame(64)


@pytest.mark.parametrize(("name", "text"), [("lo", "it is no tap"), ("much-too-long-a-name", "1 to 15 bytes")])
def test_what_cannot_be_opened_is_said(space: Namespace, name: str, text: str) -> None:
    with pytest.raises(OSError, match=text):
        space.run(Tap, name)


def test_a_tap_that_somebody_uses_is_said(space: Namespace) -> None:
    with contextlib.closing(space.run(Tap, "tap0")), pytest.raises(OSError, match="somebody uses it"):
        space.run(Tap, "tap0")
