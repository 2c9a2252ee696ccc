# SPDX-License-Identifier: BSD-3-Clause
"""The network device against the fake driver: packets and buffers of any shape, and headers that nobody should believe."""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.aio import in_loop
from vhostsock.devices.net import MAX_FRAME, Loopback, Net
from vhostsock.devices.net_header import Header, NetFeature
from vhostsock.proto.wire import BackendRequest
from vhostsock.testing.driver import DriverQueue, Request
from vhostsock.testing.frontend import attach
from vhostsock.testing.plugin import AttachedGuest, VhostUser

pytest_plugins = ["vhostsock.testing.plugin"]

MAC = bytes.fromhex("525400a1b2c3")
NUM_BUFFERS = struct.Struct("<H")
NEEDS_CSUM = 1


def frame(size: int, seed: int = 0) -> bytes:
    return (bytes([2, 0, 0, 0, 0, seed & 0xFF]) + MAC + b"\x88\xb5" + bytes((seed + i) & 0xFF for i in range(size)))[:size]


def sent(data: bytes, header: Header | None = None) -> bytes:
    """A packet as the driver puts it into a queue."""
    return (header or Header()).pack() + NUM_BUFFERS.pack(0) + data


def received(done: Sequence[Request]) -> list[tuple[Header, bytes]]:
    """Packets out of used receive buffers, with as many buffers for each as its header says."""
    packets, rest = [], list(done)
    while rest:
        [count] = NUM_BUFFERS.unpack_from(rest[0].data, 10)
        assert 1 <= count <= len(rest)
        data = b"".join(request.data for request in rest[:count])
        packets.append((Header.parse(data), data[12:]))
        del rest[:count]
    return packets


class Nic:
    """A driver's view of a loopback device of one pair."""

    def __init__(self, vhost_user: VhostUser, device: Net | None = None, **options: object) -> None:
        self.device = device or Net(Loopback(), mac=MAC)
        self.guest: AttachedGuest = vhost_user(self.device, **options)

    @property
    def rx(self) -> DriverQueue:
        return self.guest.frontend.queues[0]

    @property
    def tx(self) -> DriverQueue:
        return self.guest.frontend.queues[1]

    def give(self, count: int, size: int = 1526) -> None:
        for _ in range(count):
            self.rx.submit([], [size])

    def send(self, data: bytes, header: Header | None = None) -> None:
        self.tx.submit([sent(data, header)])

    def take(self, buffers: int) -> list[tuple[Header, bytes]]:
        done: list[Request] = []
        while len(done) < buffers:
            done += self.guest.run(self.rx.wait_async(buffers - len(done)))
        return received(done)

    def settle(self, count: int = 1) -> list[Request]:
        """So many packets were taken out of the transmit queue."""
        done: list[Request] = []
        while len(done) < count:
            done += self.guest.run(self.tx.wait_async(count - len(done)))
        return done


IN_ORDER = 1 << 35
PACKED = ~0
SPLIT = ~(1 << 34)


def without(feature: NetFeature, ring: int = SPLIT) -> int:
    """What a driver acks at most that knows all but this feature; ``~feature`` would lack all bits above the highest known."""
    return ring & ~int(feature)


@pytest.mark.parametrize("ring", [SPLIT & ~IN_ORDER, PACKED & ~IN_ORDER, SPLIT, PACKED],
                         ids=["split", "packed", "split in order", "packed in order"])  # fmt: skip
@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "whole"])
def test_what_is_sent_comes_back_in_order(vhost_user: VhostUser, ring: int, mergeable: bool) -> None:
    nic = Nic(vhost_user, accept=ring if mergeable else without(NetFeature.MRG_RXBUF, ring))
    packets = [frame(60 + 7 * i, i) for i in range(40)]
    nic.give(40)
    for packet in packets:
        nic.send(packet)
    assert [data for _, data in nic.take(40)] == packets
    assert all(request.written == 0 for request in nic.settle(40))


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 3), (12,), (11, 13), (4, 4, 4, 20)])
def test_a_header_may_span_descriptors(vhost_user: VhostUser, cuts: tuple[int, ...]) -> None:
    nic = Nic(vhost_user)
    data, parts = sent(frame(200)), []
    for cut in cuts:
        parts.append(data[:cut])
        data = data[cut:]
    nic.give(1)
    nic.tx.submit([*parts, data])
    assert nic.take(1) == [(Header(), frame(200))]


def test_a_large_packet_takes_as_many_mergeable_buffers_as_it_needs(vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user)
    nic.give(7, 200)
    nic.send(frame(1000))
    nic.send(frame(100))
    assert [len(data) for _, data in nic.take(7)] == [1000, 100]  # 1012 bytes in six of 200, then one


def test_a_packet_waits_in_its_ring_until_there_is_room_for_all_of_it(vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user)
    nic.give(2, 100)
    nic.send(frame(300))
    nic.guest.run(nic.guest.frontend.settled())
    assert nic.rx.collect() == nic.tx.collect() == []
    nic.give(2, 120)  # one more than it needs
    assert [data for _, data in nic.take(3)] == [frame(300)]
    nic.settle()


def test_a_packet_that_all_of_the_ring_cannot_hold_is_dropped_and_blocks_nothing(vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user, size=16)
    nic.give(16, 100)
    nic.send(frame(1600))
    nic.send(frame(80))
    assert nic.take(1) == [(Header(), frame(80))]
    assert nic.device.counters["rx_dropped"] == 1


def test_without_mergeable_buffers_a_packet_fits_or_is_dropped(vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user, accept=without(NetFeature.MRG_RXBUF))
    nic.give(1, 100)
    nic.send(frame(89))
    nic.send(frame(88))
    assert nic.take(1) == [(Header(), frame(88))]
    assert nic.device.counters["rx_dropped"] == 1


def test_packets_and_buffers_that_wait_survive_a_pause(vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user)
    nic.give(3, 100)
    for i in range(5):
        nic.send(frame(80, i))
    assert [data for _, data in nic.take(3)] == [frame(80, i) for i in range(3)]
    nic.guest.pause()
    nic.guest.resume()
    nic.give(2, 100)
    assert [data for _, data in nic.take(2)] == [frame(80, i) for i in (3, 4)]
    nic.settle(5)
    assert nic.device.counters["rx_packets"] == 5


def test_buffers_of_before_a_reboot_are_not_written_to(vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user)
    nic.give(4)
    nic.guest.reboot()
    nic.give(1, 100)
    nic.send(frame(80))
    assert nic.take(1) == [(Header(), frame(80))]


# ---- headers

HOSTILE = {
    "checksum half behind the packet": Header(NEEDS_CSUM, csum_start=50, csum_offset=9),
    "checksum all behind the packet": Header(NEEDS_CSUM, csum_start=34, csum_offset=26),
    "checksum start far behind": Header(NEEDS_CSUM, csum_start=0xFFFF),
    "sum of start and offset beyond 16 bits": Header(NEEDS_CSUM, csum_start=0xFFFE, csum_offset=0xFFFE),
    "segmentation that was not negotiated": Header(NEEDS_CSUM, gso_type=1, gso_size=1000, csum_start=34, csum_offset=16),
    "unknown segmentation": Header(NEEDS_CSUM, gso_type=0x7F, gso_size=1000),
    "segmentation of nothing": Header(gso_type=0x80),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_header_that_cannot_be_believed_costs_its_packet_alone(vhost_user: VhostUser, what: str) -> None:
    nic = Nic(vhost_user, accept=SPLIT)
    nic.give(1)
    nic.send(frame(60), HOSTILE[what])
    nic.send(frame(70))
    assert nic.take(1) == [(Header(), frame(70))]
    assert nic.device.counters["tx_refused"] == 1


@pytest.mark.parametrize("at", [0, 30, 58])
def test_a_checksum_anywhere_in_the_packet_is_passed_on_to_a_guest_that_takes_it(vhost_user: VhostUser, at: int) -> None:
    nic = Nic(vhost_user)
    header = Header(NEEDS_CSUM, csum_start=0, csum_offset=at)
    nic.give(1)
    nic.send(frame(60), header)
    assert nic.take(1) == [(header, frame(60))]


@pytest.mark.parametrize("size", [60, 61])
def test_a_checksum_is_computed_for_a_guest_that_wants_it_so(vhost_user: VhostUser, size: int) -> None:
    nic = Nic(vhost_user, accept=without(NetFeature.GUEST_CSUM))
    nic.give(1)
    nic.send(frame(size), Header(NEEDS_CSUM, csum_start=34, csum_offset=6))
    [(header, data)] = nic.take(1)
    assert header == Header()
    assert (data[:40], data[42:]) == (frame(size)[:40], frame(size)[42:])
    # RFC 1071: the complement of the sum over all of it, what stood in the checksum's place included
    plain = frame(size)[34:] + b"\0" * (size % 2)
    assert struct.unpack(">H", data[40:42])[0] == (0xFFFF - sum(struct.unpack(f">{len(plain) // 2}H", plain)) % 0xFFFF)


def test_a_checksum_that_was_not_negotiated_is_refused(vhost_user: VhostUser) -> None:
    nic = Nic(vhost_user, accept=without(NetFeature.CSUM))
    nic.send(frame(60), Header(NEEDS_CSUM, csum_start=34, csum_offset=6))
    nic.settle()
    assert nic.device.counters["tx_refused"] == 1


@pytest.mark.parametrize("size", [0, 13, MAX_FRAME + 1])
def test_a_packet_of_no_possible_size_is_refused(vhost_user: VhostUser, size: int) -> None:
    nic = Nic(vhost_user)
    nic.send(frame(size))
    nic.settle()
    assert nic.device.counters["tx_refused"] == 1


@pytest.mark.parametrize("queue", [0, 1])
def test_a_request_too_short_for_a_header_breaks_its_ring(
    vhost_user: VhostUser, queue: int, caplog: pytest.LogCaptureFixture
) -> None:
    nic = Nic(vhost_user)
    short = nic.guest.frontend.queues[queue]
    with caplog.at_level(logging.WARNING, "vhostsock.device"):
        short.submit(*(([], [11]) if queue == 0 else ([bytes(11)], [])))
        nic.guest.run(nic.guest.frontend.settled())
        nic.guest.run(nic.guest.frontend.settled())
    assert "shorter than" in caplog.text
    nic.guest.reboot()
    nic.give(1)
    nic.send(frame(60))
    assert nic.take(1) == [(Header(), frame(60))]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.tuples(st.integers(0, 255), st.integers(0, 255), *[st.integers(0, 65535)] * 4),
    size=st.integers(0, 90),
    cuts=st.lists(st.integers(1, 40), max_size=5),
    rooms=st.lists(st.integers(12, 60), min_size=1, max_size=8),
)
def test_no_packet_of_any_shape_disturbs_the_device(
    nic: Nic, header: tuple[int, ...], size: int, cuts: list[int], rooms: list[int]
) -> None:
    data, parts = sent(frame(size), Header(*header)), []
    for cut in cuts:
        parts.append(data[:cut])
        data = data[cut:]
    before = sum(nic.device.counters[name] for name in ("rx_packets", "rx_dropped", "tx_refused"))
    for room in rooms:
        nic.rx.submit([], [room])
    nic.give(4, 64)  # enough for any of these, so that none is left waiting
    nic.tx.submit([part for part in [*parts, data] if part])
    nic.settle()
    nic.guest.run(nic.guest.frontend.settled())
    nic.rx.collect()
    assert sum(nic.device.counters[name] for name in ("rx_packets", "rx_dropped", "tx_refused")) == before + 1
    nic.guest.check()
    nic.guest.reboot()


@pytest.fixture
def nic(vhost_user: VhostUser) -> Nic:
    return Nic(vhost_user)


# ---- config space, link and pairs


def test_the_config_space_holds_address_status_pairs_and_mtu(vhost_user: VhostUser) -> None:
    guest = vhost_user(Net(Loopback(), mac=MAC, mtu=1280, pairs=3))
    assert guest.read_config(0, 12) == MAC + bytes.fromhex("0100 0300 0005")
    assert guest.frontend.features & (NetFeature.MTU | NetFeature.MQ) == NetFeature.MTU | NetFeature.MQ


@in_loop
async def test_the_guest_is_told_when_the_link_goes_and_comes() -> None:
    device = Net(Loopback())
    async with attach(device) as frontend:
        for up in (False, True):
            device.set_link(up)
            device.set_link(up)  # nothing new
            assert await frontend.backend_request() == BackendRequest.CONFIG_CHANGE_MSG
            assert (await frontend.read_config(6, 2))[0] == up
        assert frontend.channel
        with pytest.raises(BlockingIOError):
            frontend.channel.sock.recv(1)


@pytest.mark.parametrize(
    ("command", "ack", "active"),
    [(b"\4\0\3\0", b"\0", 3), (b"\4\0\0\0", b"\1", 1), (b"\4\0\4\0", b"\1", 1), (b"\4\0\3", b"\1", 1), (b"\4", b"\1", 1),
     (b"\4\1\2\0", b"\1", 1), (b"\0\0\1", b"\1", 1)],
)  # fmt: skip
def test_the_driver_chooses_how_many_pairs_it_uses(vhost_user: VhostUser, command: bytes, ack: bytes, active: int) -> None:
    device = Net(Loopback(), pairs=3)
    guest = vhost_user(device)
    assert guest.request(command, room=1, queue=6) == ack
    assert [device.in_use(pair) for pair in device.pairs] == [index < active for index in range(3)]
    guest.reboot()
    guest.run(guest.frontend.settled())
    assert [device.in_use(pair) for pair in device.pairs] == [True, False, False]


def test_a_driver_that_knows_of_one_pair_has_its_control_queue_behind_that(vhost_user: VhostUser) -> None:
    guest = vhost_user(Net(Loopback(), pairs=2), accept=without(NetFeature.MQ), queues=3)
    assert guest.request(b"\0\0\1", room=1, queue=2) == b"\1"


def test_each_pair_gives_back_its_own_packets(vhost_user: VhostUser) -> None:
    guest = vhost_user(Net(Loopback(), pairs=2))
    queues = guest.frontend.queues
    for pair in (0, 1):
        queues[2 * pair].submit([], [100])
        queues[2 * pair + 1].submit([sent(frame(60, pair))])
    for pair in (0, 1):
        [done] = guest.run(queues[2 * pair].wait_async())
        assert received([done]) == [(Header(), frame(60, pair))]


@pytest.mark.parametrize(
    "wrong", [{"pairs": 0}, {"pairs": 65}, {"mtu": 67}, {"mtu": 65536}, {"mac": b"\1" * 6}, {"mac": MAC[1:]}]
)
def test_what_no_network_card_can_have_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"may be|is no address"):
        Net(Loopback(), **wrong)  # type: ignore[arg-type]
