"""What only a packed ring has: wrap counters, buffer ids, event areas, bases of two halves; hostile and honest drivers."""

from __future__ import annotations

import random
import struct
from collections import deque

import pytest

from tests.ring.conftest import MakePair, Pair
from vhostsock.errors import DriverError, FrontendError
from vhostsock.ring import Chain, Vring
from vhostsock.testing.driver import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DeviceFault, Request, RingFull
from vhostsock.testing.packed import AVAIL, DESC, DISABLE, ENABLE, FRESH_BASE, USED, PackedQueue


@pytest.fixture
def packed() -> bool:
    return True


def queue_of(pair: Pair) -> PackedQueue:
    assert isinstance(pair.queue, PackedQueue)
    return pair.queue


def base(avail: int, avail_wrap: int, used: int, used_wrap: int) -> int:
    return avail | avail_wrap << 15 | used << 16 | used_wrap << 31


@pytest.mark.parametrize("num", [2, 3, 7, 100, 32767, 32768])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_ring_of_any_size_goes_round(make_pair: MakePair, num: int, event_idx: bool) -> None:
    pair = make_pair(num, sizes=(8 << 20,), event_idx=event_idx)
    for lap in range(3 if num <= 100 else 1):
        requests = [pair.queue.add([b"%d.%d" % (lap, i)], [12], indirect=True) for i in range(num)]
        pair.queue.publish()
        assert pair.queue.kick()
        assert pair.echo_all() == num
        assert not pair.vring.enable_kick()
        assert pair.queue.wait(num) == requests
        assert [r.data for r in requests] == [b"%d.%d" % (lap, i) for i in range(num)]
    assert pair.vring.stop() == base(0, 0, 0, 0)  # an odd number of laps


# The base


@pytest.mark.parametrize("at", [0, 5])
def test_the_16_bit_base_of_dpdk_stands_for_both_halves(make_pair: MakePair, at: int) -> None:
    pair = make_pair(base=base(at, 1, at, 1))
    pair.vring.stop()
    pair.vring.set_base(0x8000 | at)
    pair.vring.start()
    pair.queue.submit([b"x"], [1])
    assert pair.echo_all() == 1
    assert pair.queue.wait()[0].data == b"x"
    assert pair.vring.stop() == base(at + 1, 1, at + 1, 1)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (base(16, 1, 0, 1), "avail place 16 or used place 0 is past the queue size 16"),
        (base(0, 1, 16, 1), "avail place 0 or used place 16 is past"),
        (base(3, 1, 4, 1), r"from used place 4 \(wrap 1\) to avail place 3 \(wrap 1\) there are not 0 to 16"),
        (base(5, 0, 4, 1), r"from used place 4 \(wrap 1\) to avail place 5 \(wrap 0\) there are not 0 to 16"),
    ],
)
def test_an_impossible_base_does_not_start(pair: Pair, value: int, reason: str) -> None:
    pair.vring.stop()
    pair.vring.set_base(value)
    with pytest.raises(FrontendError, match=reason):
        pair.vring.start()


@pytest.mark.parametrize("indirect", [False, True])
def test_chains_in_flight_over_a_stop_come_again(pair: Pair, indirect: bool) -> None:
    for lap in range(7):  # over the edge of the ring, too
        requests = [pair.queue.submit([b"%d" % i, b"+"], [8], indirect=indirect) for i in range(4)]
        chains = pair.vring.pop_batch(3)
        chains[0].write(chains[0].read())
        chains[0].complete()
        stopped = pair.vring.stop()
        assert stopped & 0xFFFF == stopped >> 16, lap
        pair.vring.set_base(stopped)
        pair.vring.start()
        chains[1].complete()  # late, and of no effect
        assert pair.echo_all() == 3
        assert pair.queue.wait(4) == requests
        assert [r.data for r in requests] == [b"%d+" % i for i in range(4)]


def test_chains_lost_by_a_stop_out_of_order_keep_their_slots(pair: Pair) -> None:
    requests = [pair.queue.submit([b"%d" % i], [1]) for i in range(4)]
    zero, one, two, three = pair.vring.pop_batch(4)
    two.complete()
    assert pair.vring.stop() == base(4, 1, 1, 1)
    pair.vring.start()
    assert pair.vring.pop() is None
    assert pair.queue.collect() == [requests[2]]
    more = pair.queue.submit([b"z"], [1])
    assert pair.echo_all() == 1
    assert pair.queue.wait() == [more]
    assert more.data == b"z"
    del zero, one, three


@pytest.mark.parametrize("num", [3, 100])
def test_a_size_that_is_no_power_of_two_does_not_start_as_split(num: int) -> None:
    vring = Vring(2)
    vring.set_features(1 << 34)
    vring.set_num(num)
    vring.set_features(0)
    with pytest.raises(FrontendError, match=f"queue size {num} of a split ring is not a power of 2"):
        vring.start()
    with pytest.raises(FrontendError, match=f"queue size {num} is not a power of 2"):
        vring.set_num(num)


@pytest.mark.parametrize(
    ("part", "off", "reason"),
    [
        (0, 8, "descriptor ring at .* is not aligned to 16"),
        (1, 2, "driver event area at .* is not aligned to 4"),
        (2, 1, "device event area at .* is not aligned to 4"),
        (0, 1 << 30, "descriptor ring at .*, size 0x100, is not wholly inside"),
        (1, 1 << 30, "driver event area at .*, size 0x4, is not wholly inside"),
    ],
)
def test_a_part_that_is_misplaced_does_not_start(pair: Pair, part: int, off: int, reason: str) -> None:
    at = list(pair.queue.addresses)
    at[part] += off
    pair.vring.stop()
    pair.vring.set_addr(at[0], at[1], at[2])
    with pytest.raises(FrontendError, match=reason):
        pair.vring.start()


# Hostile drivers

OK = 0x4000_0000
GONE = 0xDEAD_0000_0000


@pytest.mark.parametrize(
    ("descs", "reason"),
    [
        ([(OK, 4, 0, 16)], "desc 0 .*: buffer id 16 is past the queue size 16"),
        ([(OK, 4, 0, 65535)], "buffer id 65535"),
        ([(GONE, 4, 0, 0)], "desc 0 .*: the buffer is not in guest memory"),
        ([(2**64 - 1, 4, 0, 0)], "the buffer is not in guest memory"),
        ([(OK, 4, DESC_WRITE | DESC_NEXT, 0), (OK, 4, 0, 0)], "desc 1 .*: device-readable after a device-writable one"),
        ([(OK, 4, DESC_NEXT, 0)], r"the chain goes on, but the next descriptor \(flags 0x8080\) is not available"),
        ([(OK, 4, DESC_NEXT, 0)] * 16, "desc 15 .*: the chain goes on|more descriptors are available than the queue has"),
        ([(OK, 4, DESC_NEXT, 0), (OK, 16, DESC_INDIRECT, 0)], "desc 1 .*: INDIRECT and NEXT exclude one another"),
        ([(OK, 16, DESC_INDIRECT | DESC_NEXT, 0)], "desc 0 .*: INDIRECT and NEXT exclude one another"),
        ([(OK, 0, DESC_INDIRECT, 0)], "indirect table length 0 is not a positive multiple of 16"),
        ([(OK, 17, DESC_INDIRECT, 0)], "indirect table length 17 is not"),
        ([(OK, 16 * 17, DESC_INDIRECT, 0)], "indirect table has 17 entries, a chain may have 16"),
        ([(GONE, 16, DESC_INDIRECT, 0)], "the indirect table is not wholly inside one memory region"),
    ],
)
def test_a_driver_that_breaks_a_rule_breaks_the_ring(pair: Pair, descs: list[tuple[int, int, int, int]], reason: str) -> None:
    queue = queue_of(pair)
    # behind the chain: used on the lap before last, as a running ring has it
    for i in range(queue.num):
        queue.write_desc(i, 0, 0, AVAIL | USED)
    for i, (addr, size, flags, name) in enumerate(descs):
        queue.write_desc(i, addr, size, flags | AVAIL, name)
    with pytest.raises(DriverError, match=reason):
        pair.vring.pop()
    assert pair.vring.broken
    assert pair.vring.pop_batch(0) == []


def test_nested_indirect_tables_break_the_ring(pair: Pair) -> None:
    table = pair.memory.alloc(32)
    pair.memory.write(table, struct.pack("<QIHHQIHH", OK, 4, 0, 0, OK, 16, 0, DESC_INDIRECT))
    queue_of(pair).write_desc(0, table, 32, DESC_INDIRECT | AVAIL, 3)
    with pytest.raises(DriverError, match=r"desc 0, indirect entry 1 .*: indirect inside an indirect table"):
        pair.vring.pop()


def test_indirect_without_the_feature_breaks_the_ring(make_pair: MakePair) -> None:
    pair = make_pair(indirect=False)
    queue_of(pair).write_desc(0, OK, 16, DESC_INDIRECT | AVAIL)
    with pytest.raises(DriverError, match="VIRTIO_RING_F_INDIRECT_DESC was not negotiated"):
        pair.vring.pop()


def test_more_than_a_lap_breaks_the_ring(make_pair: MakePair) -> None:
    pair = make_pair(4)
    for _ in range(4):
        pair.queue.submit([b"x"])
    chains = pair.vring.pop_batch(4)
    assert pair.vring.pop() is None
    queue_of(pair).write_desc(0, OK, 1, USED)  # available on the next lap, while the first is still outstanding
    with pytest.raises(DriverError, match=r"desc 0 .*: more descriptors are available than the queue has"):
        pair.vring.pop()
    del chains


def test_a_slot_that_comes_again_before_its_use_was_shown_breaks_the_ring(make_pair: MakePair) -> None:
    pair = make_pair(4)
    for _ in range(4):
        pair.queue.submit([b"x"])
    for chain in pair.vring.pop_batch(4):
        chain.complete()
    queue_of(pair).write_desc(0, OK, 1, USED)
    with pytest.raises(DriverError, match=r"desc 0 .*: more descriptors are available than the queue has"):
        pair.vring.pop()


# Notification


def one(pair: Pair, n: int = 1) -> bool:
    """n requests are completed and flushed at once; was the driver called?"""
    for _ in range(n):
        pair.queue.submit([b"x"])
    assert pair.echo_all() == n
    assert len(pair.queue.collect()) == n
    return pair.queue.take_call()


@pytest.mark.parametrize("event_idx", [False, True])
def test_the_driver_event_flags_decide_on_the_call(make_pair: MakePair, event_idx: bool) -> None:
    pair = make_pair(event_idx=event_idx)
    queue = queue_of(pair)
    for flags, called in [(ENABLE, True), (DISABLE, False), (3, True), (DISABLE | 0x100, False)]:
        queue.driver_event = (0, flags)
        assert one(pair) == called


@pytest.mark.parametrize("event", range(10))
@pytest.mark.parametrize("start", [base(0, 1, 0, 1), base(4, 1, 4, 1), base(3, 0, 3, 0)])
def test_a_call_is_made_for_the_place_asked_for_and_no_other(make_pair: MakePair, start: int, event: int) -> None:
    pair = make_pair(10, base=start)
    queue = queue_of(pair)
    at = (start & 0x7FFF) + event
    wrap = (start >> 15 & 1) ^ (at >= 10)
    queue.driver_event = (at % 10 | wrap << 15, DESC)
    assert [one(pair, n) for n in (2, 3, 1)] == [event < 2, 2 <= event < 5, event == 5]


@pytest.mark.parametrize("event_idx", [False, True])
def test_kicks_come_only_when_asked_for(make_pair: MakePair, event_idx: bool) -> None:
    pair = make_pair(5, event_idx=event_idx)
    for _ in range(12):
        assert not pair.vring.enable_kick()
        pair.queue.submit([b"x"])
        assert pair.queue.take_kick()
        pair.vring.disable_kick()
        pair.queue.submit([b"x"])
        assert not pair.queue.take_kick()
        assert pair.vring.enable_kick()  # came meanwhile
        assert pair.echo_all() == 2
        pair.queue.wait(2)


def test_the_driver_notices_a_device_that_uses_what_was_not_sent(pair: Pair) -> None:
    queue = queue_of(pair)
    queue.write_desc(0, 0, 0, AVAIL | USED)
    with pytest.raises(DeviceFault, match="no request in flight"):
        queue.collect()


# Against a plain model: a list of what was sent, and of what was answered


@pytest.mark.parametrize("seed", range(40))
def test_random_honest_traffic_is_neither_lost_nor_doubled(make_pair: MakePair, seed: int) -> None:
    draw = random.Random(seed)
    num = draw.choice([1, 2, 3, 5, 8, 13])
    at = draw.randrange(num)
    wrap = draw.randrange(2)
    pair = make_pair(num, base=base(at, wrap, at, wrap), event_idx=draw.random() < 0.5, indirect=draw.random() < 0.5)
    added: list[Request] = []
    offered: deque[Request] = deque()
    held: list[tuple[Request, Chain]] = []
    pushed: list[tuple[Request, bytes]] = []
    used: list[tuple[Request, bytes]] = []
    in_order = True
    for step in range(400):
        match draw.randrange(7):
            case 0:
                shape = [draw.randrange(3), draw.randrange(3)]
                if sum(shape) and sum(shape) <= num:
                    try:
                        added.append(pair.queue.add([b"%d" % step] * shape[0], [2] * shape[1]))
                    except RingFull:
                        assert pair.queue.in_flight
            case 1:
                pair.queue.publish()
                pair.queue.kick()
                offered += added
                added = []
            case 2:
                for chain in pair.vring.pop_batch(draw.randrange(1, 5)):
                    request = offered.popleft()
                    assert chain.read() == b"".join(pair.memory.read(a, n) for a, n in request.readable)
                    assert chain.writable == request.room
                    held.append((request, chain))
            case 3 if held:
                which = draw.randrange(len(held)) if draw.random() < 0.3 else 0
                in_order = in_order and which == 0
                request, chain = held.pop(which)
                data = draw.randbytes(draw.randrange(1 + request.room))
                chain.write(data)
                chain.complete()
                pushed.append((request, data))
                in_order = in_order or not held
            case 4:
                pair.vring.flush()
                used += pushed
                pushed = []
            case 5:
                done = pair.queue.collect()
                assert [(r, r.data) for r in done] == used
                used = []
            case 6 if in_order:
                stopped = pair.vring.stop()
                used += pushed
                pushed = []
                offered.extendleft(request for request, _ in reversed(held))
                held = []
                pair.vring.set_base(stopped)
                pair.vring.start()
        assert not pair.vring.broken, pair.vring.error
        assert pair.vring.has_available == bool(offered)


def test_a_fresh_ring_starts_as_qemu_says(pair: Pair) -> None:
    assert pair.queue.base == FRESH_BASE
    assert pair.vring.stop() == FRESH_BASE
