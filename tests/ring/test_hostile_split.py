"""What only a split ring's driver can do wrong: heads, indices, and links that lead astray. As test_hostile.py otherwise."""

from __future__ import annotations

import struct

import pytest

from tests.ring.conftest import MakePair, Pair
from tests.ring.test_hostile import assert_broken
from vhostsock.errors import DriverError
from vhostsock.ring import BATCH_MAX
from vhostsock.testing.driver import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DriverQueue


def table(queue: DriverQueue, *descs: tuple[int, int, int, int]) -> int:
    """An indirect table of (addr, len, flags, next), in guest memory."""
    gpa = queue.memory.alloc(max(16, 16 * len(descs)))
    queue.memory.write(gpa, b"".join(struct.pack("<QIHH", *d) for d in descs))
    return gpa


def assert_breaks(pair: Pair, evidence: str, offered: int = 0) -> None:
    """``offered`` as head breaks the ring with ``evidence``."""
    pair.queue.offer(offered)
    assert_broken(pair, evidence)


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


def test_a_descriptor_that_comes_again_before_its_use_was_shown(pair: Pair) -> None:
    """What is completed and not flushed is the device's still; and what is kept for each chain has no room for more."""
    pair.queue.write_desc(0, pair.memory.alloc(16), 16)
    for _ in range(16):
        pair.queue.offer(0)
    pair.queue.publish()
    for chain in pair.vring.pop_batch(BATCH_MAX):
        chain.complete()
    pair.queue.offer(0)
    pair.queue.publish()
    with pytest.raises(DriverError, match="a chain is available at index 16 while 16 are in flight"):
        pair.vring.pop()


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


def test_readable_in_a_table_after_writable_outside_of_it(pair: Pair) -> None:
    buffer = pair.memory.alloc(16)
    pair.queue.write_desc(0, buffer, 16, DESC_WRITE | DESC_NEXT, 1)
    pair.queue.write_desc(1, table(pair.queue, (buffer, 16, 0, 0)), 16, DESC_INDIRECT)
    assert_breaks(pair, r"desc 1, indirect entry 0 .*: device-readable after a device-writable one")


def test_plain_and_indirect_descriptors_together_longer_than_the_queue(make_pair: MakePair) -> None:
    pair = make_pair(4)
    buffer = pair.memory.alloc(16)
    entries = [(buffer, 1, DESC_NEXT if i < 3 else 0, i + 1) for i in range(4)]
    pair.queue.write_desc(0, buffer, 1, DESC_NEXT, 1)
    pair.queue.write_desc(1, table(pair.queue, *entries), 64, DESC_INDIRECT)
    assert_breaks(pair, r"desc 1, indirect entry 3 .*: the chain has more descriptors than the queue size")


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


def test_indirect_with_next(pair: Pair) -> None:
    gpa = table(pair.queue, (pair.memory.alloc(16), 16, 0, 0))
    pair.queue.write_desc(0, gpa, 16, DESC_INDIRECT | DESC_NEXT, 1)
    assert_breaks(pair, r"desc 0 \{.*flags 0x5\}: INDIRECT and NEXT exclude one another")
