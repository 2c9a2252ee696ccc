"""A driver that breaks the rules breaks its own ring, with the evidence, and nothing else. What both formats have in common."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.ring.conftest import MakePair, Pair, both_formats
from vhostsock.errors import DriverError
from vhostsock.testing.driver import DESC_INDIRECT, DESC_WRITE

TOP = 1 << 64
pytestmark = both_formats


def assert_broken(pair: Pair, evidence: str) -> None:
    """What was offered breaks the ring with ``evidence``; the ring stays broken and silent until it is stopped."""
    pair.queue.publish()
    with pytest.raises(DriverError, match=rf"^vring 1: {evidence}") as caught:
        pair.vring.pop()
    assert caught.value.vring == 1
    assert pair.vring.broken
    assert pair.vring.running
    assert pair.queue._take(pair.queue.err_fd)
    with pytest.raises(DriverError):
        pair.vring.pop_batch(4)
    assert not pair.vring.flush()
    assert not pair.queue._take(pair.queue.err_fd)  # said once
    assert pair.vring.stop() == pair.queue.base
    assert not pair.vring.broken
    assert re.match(evidence, pair.vring.error)


BUFFERS: list[tuple[str, Callable[[int, int], tuple[int, int]]]] = [
    ("below all memory", lambda start, end: (start - 1, 1)),
    ("reaches below memory", lambda start, end: (start - 1, 2)),
    ("first byte past memory", lambda start, end: (end, 1)),
    ("last byte past memory", lambda start, end: (end - 1, 2)),
    ("over all memory and more", lambda start, end: (start, end - start + 1)),
    ("wraps 2^64", lambda start, end: (TOP - 1, 2)),
    ("wraps 2^64 into memory", lambda start, end: (TOP - 16, 0xFFFF_FFFF)),
    ("null", lambda start, end: (0, 1)),
    ("as long as can be", lambda start, end: (start, 0xFFFF_FFFF)),
]


@pytest.mark.parametrize("flags", [0, DESC_WRITE])
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(("what", "buffer"), BUFFERS, ids=[what for what, _ in BUFFERS])
def test_a_buffer_that_is_not_all_memory(
    pair: Pair, what: str, buffer: Callable[[int, int], tuple[int, int]], indirect: bool, flags: int
) -> None:
    region = pair.memory.regions[0]
    addr, size = buffer(region.gpa, region.gpa + region.size)
    pair.queue.offer_chain(pair.queue.make_table((addr, size, flags)) if indirect else (addr, size, flags))
    where = "desc 0, indirect entry 0" if indirect else "desc 0"
    assert_broken(pair, rf"{where} \{{addr {addr:#x}, len {size:#x}, flags 0x[0-9a-f]+\}}: the buffer is not in guest memory")


def test_a_hole_between_regions_is_not_memory(make_pair: MakePair) -> None:
    pair = make_pair(sizes=(1 << 16, 1 << 16, 1 << 16))
    middle = pair.memory.regions[1]
    without = pair.memory.map().without_region(gpa=middle.gpa, size=middle.size, uva=middle.uva)
    pair.vring.set_memory(without)
    pair.queue.offer_chain((middle.gpa - 1, (1 << 16) + 2, 0))
    assert_broken(pair, r"desc 0 .*: the buffer is not in guest memory")


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 0), (0, 16), (0, 0)])
def test_readable_after_writable(pair: Pair, indirect: bool, sizes: tuple[int, int]) -> None:
    buffer = pair.memory.alloc(16)
    descs = [(buffer, sizes[0], DESC_WRITE), (buffer, sizes[1], 0)]
    pair.queue.offer_chain(*([pair.queue.make_table(*descs)] if indirect else descs))
    assert_broken(pair, r"desc .*: device-readable after a device-writable one")


def test_indirect_without_the_feature(make_pair: MakePair) -> None:
    pair = make_pair(indirect=False)
    pair.queue.offer_chain(pair.queue.make_table((pair.memory.alloc(16), 16, 0)))
    assert_broken(pair, r"desc 0 \{.*\}: indirect, but VIRTIO_RING_F_INDIRECT_DESC was not negotiated")


def test_indirect_that_goes_on(pair: Pair) -> None:
    buffer = pair.memory.alloc(16)
    pair.queue.offer_chain(pair.queue.make_table((buffer, 16, 0)), (buffer, 16, 0))
    assert_broken(pair, r"desc 0 \{.*\}: INDIRECT and NEXT exclude one another")


def test_indirect_inside_an_indirect_table(pair: Pair) -> None:
    inner = pair.queue.make_table((pair.memory.alloc(16), 16, 0))
    pair.queue.offer_chain(pair.queue.make_table(inner))
    assert_broken(pair, rf"desc 0, indirect entry 0 \{{addr {inner[0]:#x}.*\}}: indirect inside an indirect table")


@pytest.mark.parametrize("size", [0, 1, 15, 17, 24, 0xFFFF_FFFF])
def test_indirect_table_length_that_is_not_a_multiple_of_16(pair: Pair, size: int) -> None:
    gpa, _, flags = pair.queue.make_table((pair.memory.alloc(16), 16, 0))
    pair.queue.offer_chain((gpa, size, flags))
    assert_broken(pair, rf"desc 0 \{{addr {gpa:#x}, len {size:#x}, .*\}}: indirect table length {size} is not a positive")


@pytest.mark.parametrize("entries", [17, 1024, 0x0FFF_FFFF])
def test_indirect_table_longer_than_queue_marks_vring_broken(pair: Pair, entries: int) -> None:
    pair.queue.offer_chain((pair.memory.alloc(16 * 17), 16 * entries, DESC_INDIRECT))
    assert_broken(pair, rf"desc 0 .*: indirect table has {entries} entries, a chain may have 16")


def test_a_table_of_more_than_1024_entries_in_a_longer_queue(make_pair: MakePair) -> None:
    pair = make_pair(2048)
    pair.queue.offer_chain((pair.memory.alloc(16 * 1025), 16 * 1025, DESC_INDIRECT))
    assert_broken(pair, r"desc 0 .*: indirect table has 1025 entries, a chain may have 1024")


def test_a_direct_chain_of_more_than_1024_descriptors(make_pair: MakePair) -> None:
    pair = make_pair(2048)
    pair.queue.offer_chain(*[(pair.memory.alloc(16), 16, 0)] * 1025)
    assert_broken(pair, r"desc 1024 .*: the chain (loops, or )?has more descriptors than the queue size")


@pytest.mark.parametrize("at", ["outside", "end", "spanning", "wrapping"])
def test_an_indirect_table_that_is_not_in_one_region(make_pair: MakePair, at: str) -> None:
    pair = make_pair(sizes=(1 << 16, 1 << 16))
    last = pair.memory.regions[1]
    gpa = {"outside": 0x1000, "end": last.gpa + last.size - 16, "spanning": last.gpa - 16, "wrapping": TOP - 16}[at]
    pair.queue.offer_chain((gpa, 32, DESC_INDIRECT))
    assert_broken(pair, rf"desc 0 \{{addr {gpa:#x}.*: the indirect table is not wholly inside one memory region")


def test_a_chain_of_more_than_2_32_bytes(make_pair: MakePair) -> None:
    # 8 buffers of 1 GiB in a sparse region of 1 GiB
    pair = make_pair(sizes=(1 << 30,))
    pair.queue.offer_chain(*[(pair.memory.regions[0].gpa, 1 << 30, DESC_WRITE)] * 8)
    assert_broken(pair, r"desc 4 .*: the chain has more than 2\^32 bytes")


def test_a_chain_in_more_than_2048_pieces(make_pair: MakePair) -> None:
    pair = make_pair(sizes=(1 << 16, *[4096] * 300))
    start = pair.memory.regions[0].gpa
    pair.queue.offer_chain(*[(start, (1 << 16) + 300 * 4096, DESC_WRITE)] * 7)  # each of them is cut in 301 by the regions
    assert_broken(pair, r"desc 6 .*: the chain is in too many pieces")


def test_the_chains_before_the_bad_one_are_delivered(pair: Pair) -> None:
    pair.queue.add([b"good"])
    pair.queue.add([b"also good"])
    pair.queue.offer_chain((0, 1, 0))
    pair.queue.publish()
    assert [c.read() for c in pair.vring.pop_batch(16)] == [b"good", b"also good"]
    with pytest.raises(DriverError, match=r"desc 2 .*: the buffer is not in guest memory"):
        pair.vring.pop_batch(16)


def test_a_broken_ring_is_not_written_to(pair: Pair) -> None:
    pair.queue.add([b"good"])
    pair.queue.offer_chain((0, 1, 0))
    pair.queue.publish()
    [chain] = pair.vring.pop_batch(16)
    with pytest.raises(DriverError):
        pair.vring.pop()
    before = pair.memory.read(pair.memory.regions[0].gpa, pair.memory.regions[0].size)
    chain.complete()
    assert not pair.vring.flush()
    pair.vring.disable_kick()
    assert not pair.vring.enable_kick()
    assert pair.memory.read(pair.memory.regions[0].gpa, pair.memory.regions[0].size) == before


def test_the_next_start_is_a_new_chance(pair: Pair) -> None:
    pair.queue.offer_chain((0, 1, 0))
    assert_broken(pair, "desc 0")
    good = pair.memory.alloc(16)
    pair.memory.write(pair.queue.desc, good.to_bytes(8, "little"))
    pair.vring.start()
    assert pair.vring.error == ""
    chain = pair.vring.pop()
    assert chain is not None
    assert chain.readable == 1
