"""What only a split ring has: a 16-bit index that wraps, tables behind plain descriptors, and where its three parts may be."""

from __future__ import annotations

import pytest

from tests.ring.conftest import MakePair, Pair
from vhostsock.errors import FrontendError
from vhostsock.ring import Vring
from vhostsock.testing.driver import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DriverQueue, GuestMemory


def test_plain_descriptors_may_be_followed_by_an_indirect_table(pair: Pair) -> None:
    # virtio 1.3, 2.7.5.3.2; the device ignores WRITE on the descriptor that refers to the table
    memory, queue = pair.memory, pair.queue
    first, second, room, table = (memory.alloc(16) for _ in range(4))
    memory.write(first, b"plain+")
    memory.write(second, b"table")
    memory.write(table, second.to_bytes(8, "little") + (5).to_bytes(4, "little") + DESC_NEXT.to_bytes(2, "little") + b"\1\0")
    table2 = room.to_bytes(8, "little") + (9).to_bytes(4, "little") + DESC_WRITE.to_bytes(2, "little") + b"\0\0"
    both = memory.alloc(32)
    memory.write(both, memory.read(table, 16) + table2)
    queue.write_desc(4, first, 6, DESC_NEXT, 9)
    queue.write_desc(9, both, 32, DESC_INDIRECT | DESC_WRITE)
    queue.offer(4)
    queue.publish()
    chain = pair.vring.pop()
    assert chain is not None
    assert (chain.read(), chain.writable, chain.ptr.descs) == (b"plain+table", 9, 2)


@pytest.mark.parametrize("base", [65535, 65530, 32768])
@pytest.mark.parametrize("event_idx", [False, True])
def test_indices_wrap_at_2_16(make_pair: MakePair, base: int, event_idx: bool) -> None:
    pair = make_pair(4, base=base, event_idx=event_idx)
    for i in range(50):
        requests = [pair.queue.submit([b"%d" % i], [8]) for _ in range(1 + i % 4)]
        assert pair.queue.take_kick()
        while pair.vring.enable_kick():
            pair.echo_all()
        assert pair.queue.wait(len(requests)) == requests
        assert {r.data for r in requests} == {b"%d" % i}
    assert pair.vring.stop() == (base + sum(1 + i % 4 for i in range(50))) % 65536


# Starting


def start_with(queue: DriverQueue, **change: int) -> None:
    """Start a vring whose configuration is right but for ``change``."""
    desc, avail, used = queue.addresses
    config = {"num": queue.num, "desc": desc, "avail": avail, "used": used, "base": 0, "features": queue.features} | change
    vring = Vring(2)
    try:
        vring.set_memory(queue.memory.map())
        vring.set_features(config["features"])
        if config["num"]:
            vring.set_num(config["num"])
        vring.set_addr(config["desc"], config["avail"], config["used"])
        vring.set_base(config["base"])
        vring.start()
        assert vring.running
    finally:
        vring.close()
        assert not vring.running


def test_a_right_configuration_starts(pair: Pair) -> None:
    start_with(pair.queue)


@pytest.mark.parametrize("num", [3, 0x10000, 65535, 32769, 1 << 31, (1 << 32) - 1])
def test_an_impossible_queue_size_is_refused(num: int) -> None:
    vring = Vring(2)
    with pytest.raises(FrontendError, match=rf"vring 2: queue size {num} is not a power of 2 from 1 to 32768"):
        vring.set_num(num)
    with pytest.raises(FrontendError, match="queue size 0 is not"):
        vring.set_num(0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num": 0}, "the queue size was never set"),
        ({"base": 0x10000}, "ring base 0x10000 does not fit"),
        ({"desc": 0}, "descriptor table at uva 0x0, size 0x100, is not wholly inside"),
        ({"avail": 0x1000}, "available ring at uva 0x1000, size 0x26, is not wholly inside"),
        ({"used": (1 << 64) - 4}, "used ring at uva 0xfffffffffffffffc, size 0x86, is not wholly inside"),
    ],
)
def test_an_impossible_configuration_does_not_start(pair: Pair, change: dict[str, int], reason: str) -> None:
    with pytest.raises(FrontendError, match=f"vring 2: {reason}"):
        start_with(pair.queue, **change)


@pytest.mark.parametrize(("part", "align", "off"), [("desc", 16, 8), ("desc", 16, 1), ("avail", 2, 1), ("used", 4, 2)])
def test_a_misaligned_part_does_not_start(pair: Pair, part: str, align: int, off: int) -> None:
    at = dict(zip(("desc", "avail", "used"), pair.queue.addresses, strict=True))
    with pytest.raises(FrontendError, match=rf"uva 0x[0-9a-f]+ is not aligned to {align} bytes"):
        start_with(pair.queue, **{part: at[part] + off})


@pytest.mark.parametrize(("part", "size"), [("desc", 256), ("avail", 38), ("used", 134)])
def test_a_part_must_be_mapped_to_its_last_byte(pair: Pair, part: str, size: int) -> None:
    region = pair.memory.regions[0]
    last = (region.uva + region.size - size) & ~15
    start_with(pair.queue, **{part: last})
    with pytest.raises(FrontendError, match="is not wholly inside one memory region"):
        start_with(pair.queue, **{part: last + 16})


def test_a_part_may_not_span_regions() -> None:
    with (
        GuestMemory(4096, 4096) as memory,
        DriverQueue(memory, 16) as queue,
        pytest.raises(FrontendError, match=r"descriptor table at .* is not wholly inside one memory region"),
    ):
        start_with(queue, desc=memory.regions[0].uva + 4096 - 16)


def test_a_ring_in_a_region_with_an_odd_file_offset_is_refused(pair: Pair) -> None:
    region = pair.memory.regions[0]
    odd = pair.memory.map().without_region(gpa=region.gpa, size=region.size, uva=region.uva)
    odd = odd.with_region(region.fd, gpa=region.gpa, size=0x8000, uva=region.uva, offset=3)
    pair.vring.stop()
    with pytest.raises(FrontendError, match="file offset is not aligned to 16 bytes"):
        pair.queue.attach(pair.vring, odd)


@pytest.mark.parametrize(("base", "taken"), [(0, [2, 3]), (65535, [2, 3]), (1, [1, 2, 3]), (2, [2, 3]), (3, [3])])
def test_a_base_that_the_used_ring_has_overtaken_is_lost_and_all_that_is_not_used_is_taken(
    make_pair: MakePair, base: int, taken: list[int]
) -> None:
    """As DPDK's virtio-user has it: 0, when another back-end comes. Bases with used chains missing behind them are kept."""
    pair = make_pair(4, indirect=False)
    requests = [pair.queue.submit([bytes([i])]) for i in range(4)]
    for _ in range(2 if base != 1 else 1):
        chain = pair.vring.pop()
        assert chain
        chain.complete()
    pair.vring.stop()
    other = Vring(0)
    pair.queue.base = base
    pair.queue.attach(other)
    chains = other.pop_batch(8)
    assert [chain.read() for chain in chains] == [bytes([i]) for i in taken]
    for chain in chains:
        chain.complete()
    other.flush()
    if base != 3:  # there it was the front-end that gave up one
        pair.queue.wait(4)
        assert all(request.written == 0 for request in requests)
    other.close()
