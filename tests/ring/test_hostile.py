"""A driver that breaks the rules breaks its own ring, with the evidence, and nothing else."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import pytest

from tests.ring.conftest import MakePair, Pair
from vhostsock.errors import DriverError
from vhostsock.ring import BATCH_MAX
from vhostsock.testing.driver import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DriverQueue

TOP = 1 << 64


def table(queue: DriverQueue, *descs: tuple[int, int, int, int]) -> int:
    """An indirect table of (addr, len, flags, next), in guest memory."""
    gpa = queue.memory.alloc(max(16, 16 * len(descs)))
    queue.memory.write(gpa, b"".join(struct.pack("<QIHH", *d) for d in descs))
    return gpa


def assert_breaks(pair: Pair, evidence: str, offered: int = 0) -> None:
    """``offered`` as head breaks the ring with ``evidence``; the ring stays broken and silent until it is stopped."""
    pair.queue.offer(offered)
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
    assert pair.vring.stop() == 0
    assert not pair.vring.broken
    assert re.match(evidence, pair.vring.error)


def test_head_past_the_queue_size(pair: Pair) -> None:
    assert_breaks(pair, r"avail.ring\[0\]: head 16 is past the queue size 16", offered=16)


@pytest.mark.parametrize("jump", [17, 32767, 65535])
def test_avail_index_that_jumps_over_the_queue_size(pair: Pair, jump: int) -> None:
    pair.queue.avail_idx = jump
    with pytest.raises(DriverError, match=rf"avail.idx moved from 0 to {jump}, more than the queue size 16"):
        pair.vring.pop()


def test_more_chains_than_descriptors_in_flight(pair: Pair) -> None:
    pair.queue.write_desc(0, pair.memory.alloc(16), 16)
    for _ in range(16):
        pair.queue.offer(0)
    pair.queue.publish()
    chains = pair.vring.pop_batch(BATCH_MAX)
    assert len(chains) == 16
    pair.queue.offer(0)
    pair.queue.publish()
    with pytest.raises(DriverError, match="a chain is available at index 16 while 16 are in flight"):
        pair.vring.pop()


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
    evidence = rf"\{{addr {addr:#x}, len {size:#x}, flags {flags:#x}\}}: the buffer is not in guest memory"
    if indirect:
        pair.queue.write_desc(7, table(pair.queue, (addr, size, flags, 0)), 16, DESC_INDIRECT)
        evidence = "desc 7, indirect entry 0 " + evidence
    else:
        pair.queue.write_desc(7, addr, size, flags)
        evidence = "desc 7 " + evidence
    assert_breaks(pair, evidence, offered=7)


def test_a_hole_between_regions_is_not_memory(make_pair: MakePair) -> None:
    pair = make_pair(sizes=(1 << 16, 1 << 16, 1 << 16))
    middle = pair.memory.regions[1]
    without = pair.memory.map().without_region(gpa=middle.gpa, size=middle.size, uva=middle.uva)
    pair.vring.set_memory(without)
    pair.queue.write_desc(0, middle.gpa - 1, (1 << 16) + 2)
    assert_breaks(pair, r"desc 0 .*: the buffer is not in guest memory")


@pytest.mark.parametrize("next_", [16, 17, 65535])
def test_next_past_the_queue_size(pair: Pair, next_: int) -> None:
    pair.queue.write_desc(0, pair.memory.alloc(16), 16, DESC_NEXT, next_)
    assert_breaks(pair, rf"desc 0 .*: next {next_} is past the queue size 16")


@pytest.mark.parametrize("loop", [[0], [0, 1], [0, 3, 5, 9]])
def test_a_chain_that_loops(pair: Pair, loop: list[int]) -> None:
    for this, following in zip(loop, [*loop[1:], loop[0]], strict=True):
        pair.queue.write_desc(this, pair.memory.alloc(16), 16, DESC_NEXT, following)
    assert_breaks(pair, r"desc \d+ .*: the chain loops")


def test_a_loop_of_empty_descriptors_ends_too(pair: Pair) -> None:
    pair.queue.write_desc(0, 0, 0, DESC_NEXT, 0)
    assert_breaks(pair, r"desc 0 .*: the chain loops")


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 0), (0, 16), (0, 0)])
def test_readable_after_writable(pair: Pair, indirect: bool, sizes: tuple[int, int]) -> None:
    buffer = pair.memory.alloc(16)
    descs = [(buffer, sizes[0], DESC_WRITE | DESC_NEXT, 1), (buffer, sizes[1], 0, 0)]
    if indirect:
        pair.queue.write_desc(0, table(pair.queue, *descs), 32, DESC_INDIRECT)
    else:
        for i, desc in enumerate(descs):
            pair.queue.write_desc(i, *desc)
    assert_breaks(pair, r"desc .*: device-readable after a device-writable one")


def test_readable_in_a_table_after_writable_outside_of_it(pair: Pair) -> None:
    buffer = pair.memory.alloc(16)
    pair.queue.write_desc(0, buffer, 16, DESC_WRITE | DESC_NEXT, 1)
    pair.queue.write_desc(1, table(pair.queue, (buffer, 16, 0, 0)), 16, DESC_INDIRECT)
    assert_breaks(pair, r"desc 1, indirect entry 0 .*: device-readable after a device-writable one")


def test_indirect_without_the_feature(make_pair: MakePair) -> None:
    pair = make_pair(indirect=False)
    pair.queue.write_desc(0, table(pair.queue, (pair.memory.alloc(16), 16, 0, 0)), 16, DESC_INDIRECT)
    assert_breaks(pair, r"desc 0 \{.*flags 0x4\}: indirect, but VIRTIO_RING_F_INDIRECT_DESC was not negotiated")


def test_indirect_with_next(pair: Pair) -> None:
    gpa = table(pair.queue, (pair.memory.alloc(16), 16, 0, 0))
    pair.queue.write_desc(0, gpa, 16, DESC_INDIRECT | DESC_NEXT, 1)
    assert_breaks(pair, r"desc 0 \{.*flags 0x5\}: INDIRECT and NEXT exclude one another")


def test_indirect_inside_an_indirect_table(pair: Pair) -> None:
    inner = table(pair.queue, (pair.memory.alloc(16), 16, 0, 0))
    outer = table(pair.queue, (inner, 16, DESC_INDIRECT, 0))
    pair.queue.write_desc(3, outer, 16, DESC_INDIRECT)
    assert_breaks(pair, rf"desc 3, indirect entry 0 \{{addr {inner:#x}.*\}}: indirect inside an indirect table", offered=3)


@pytest.mark.parametrize("size", [0, 1, 15, 17, 24, 0xFFFF_FFFF])
def test_indirect_table_length_that_is_not_a_multiple_of_16(pair: Pair, size: int) -> None:
    gpa = table(pair.queue, (pair.memory.alloc(16), 16, 0, 0))
    pair.queue.write_desc(7, gpa, size, DESC_INDIRECT)
    evidence = rf"desc 7 \{{addr {gpa:#x}, len {size:#x}, flags 0x4\}}: indirect table length {size} is not a positive"
    assert_breaks(pair, evidence, offered=7)


@pytest.mark.parametrize("entries", [17, 1024, 0x0FFF_FFFF])
def test_indirect_table_longer_than_queue_marks_vring_broken(pair: Pair, entries: int) -> None:
    pair.queue.write_desc(0, pair.memory.alloc(16 * 17), 16 * entries, DESC_INDIRECT)
    assert_breaks(pair, rf"desc 0 .*: indirect table has {entries} entries, a chain may have 16")


def test_a_table_of_more_than_1024_entries_in_a_longer_queue(make_pair: MakePair) -> None:
    pair = make_pair(2048)
    pair.queue.write_desc(0, pair.memory.alloc(16 * 1025), 16 * 1025, DESC_INDIRECT)
    assert_breaks(pair, r"desc 0 .*: indirect table has 1025 entries, a chain may have 1024")


def test_a_direct_chain_of_more_than_1024_descriptors(make_pair: MakePair) -> None:
    pair = make_pair(2048)
    buffer = pair.memory.alloc(16)
    for i in range(1025):
        pair.queue.write_desc(i, buffer, 16, DESC_NEXT if i < 1024 else 0, i + 1)
    assert_breaks(pair, r"desc 1024 .*: the chain loops, or has more descriptors than the queue size")


def test_plain_and_indirect_descriptors_together_longer_than_the_queue(make_pair: MakePair) -> None:
    pair = make_pair(4)
    buffer = pair.memory.alloc(16)
    entries = [(buffer, 1, DESC_NEXT if i < 3 else 0, i + 1) for i in range(4)]
    pair.queue.write_desc(0, buffer, 1, DESC_NEXT, 1)
    pair.queue.write_desc(1, table(pair.queue, *entries), 64, DESC_INDIRECT)
    assert_breaks(pair, r"desc 1, indirect entry 3 .*: the chain has more descriptors than the queue size")


@pytest.mark.parametrize("at", ["outside", "end", "spanning", "wrapping"])
def test_an_indirect_table_that_is_not_in_one_region(make_pair: MakePair, at: str) -> None:
    pair = make_pair(sizes=(1 << 16, 1 << 16))
    last = pair.memory.regions[1]
    gpa = {"outside": 0x1000, "end": last.gpa + last.size - 16, "spanning": last.gpa - 16, "wrapping": TOP - 16}[at]
    pair.queue.write_desc(0, gpa, 32, DESC_INDIRECT)
    assert_breaks(pair, rf"desc 0 \{{addr {gpa:#x}.*: the indirect table is not wholly inside one memory region")


@pytest.mark.parametrize("loop", [[0], [0, 1], [0, 3, 2]])
def test_a_chain_that_loops_inside_its_table(pair: Pair, loop: list[int]) -> None:
    buffer = pair.memory.alloc(16)
    follows = dict(zip(loop, [*loop[1:], loop[0]], strict=True))
    entries = [(buffer, 16, DESC_NEXT, follows.get(i, 0)) for i in range(4)]
    pair.queue.write_desc(0, table(pair.queue, *entries), 64, DESC_INDIRECT)
    assert_breaks(pair, r"desc 0, indirect entry \d .*: the chain in the indirect table loops")


def test_next_past_the_end_of_the_table(pair: Pair) -> None:
    gpa = table(pair.queue, (pair.memory.alloc(16), 16, DESC_NEXT, 2), (pair.memory.alloc(16), 16, 0, 0))
    pair.queue.write_desc(0, gpa, 32, DESC_INDIRECT)
    assert_breaks(pair, r"desc 0, indirect entry 0 .*: next 2 is past the table's 2 entries")


def test_a_chain_of_more_than_2_32_bytes(make_pair: MakePair) -> None:
    # 8 buffers of 1 GiB in a sparse region of 1 GiB
    pair = make_pair(sizes=(1 << 30,))
    gpa = pair.memory.regions[0].gpa
    for i in range(8):
        pair.queue.write_desc(i, gpa, 1 << 30, DESC_WRITE | (DESC_NEXT if i < 7 else 0), i + 1)
    assert_breaks(pair, r"desc 4 .*: the chain has more than 2\^32 bytes")


def test_a_chain_in_more_than_2048_pieces(make_pair: MakePair) -> None:
    pair = make_pair(sizes=(1 << 16, *[4096] * 300))
    start = pair.memory.regions[0].gpa
    for i in range(7):  # each of them is cut in 301 by the regions
        pair.queue.write_desc(i, start, (1 << 16) + 300 * 4096, DESC_WRITE | (DESC_NEXT if i < 6 else 0), i + 1)
    assert_breaks(pair, r"desc 6 .*: the chain is in too many pieces")


def test_the_chains_before_the_bad_one_are_delivered(pair: Pair) -> None:
    pair.queue.add([b"good"])
    pair.queue.add([b"also good"])
    pair.queue.offer(99)
    pair.queue.publish()
    assert [c.read() for c in pair.vring.pop_batch(16)] == [b"good", b"also good"]
    with pytest.raises(DriverError, match="head 99"):
        pair.vring.pop_batch(16)


def test_a_broken_ring_is_not_written_to(pair: Pair) -> None:
    pair.queue.add([b"good"])
    pair.queue.offer(99)
    pair.queue.publish()
    [chain] = pair.vring.pop_batch(16)
    with pytest.raises(DriverError):
        pair.vring.pop()
    chain.complete()
    assert not pair.vring.flush()
    assert pair.queue.used_idx == 0


def test_the_next_start_is_a_new_chance(pair: Pair) -> None:
    pair.queue.write_desc(0, 0, 1)
    assert_breaks(pair, "desc 0")
    pair.queue.write_desc(0, pair.memory.alloc(16), 1)
    pair.vring.start()
    assert pair.vring.error == ""
    chain = pair.vring.pop()
    assert chain is not None
    assert chain.readable == 1
