"""What a chain holds, and what becomes of it when the ring, the memory table or the object goes first."""

from __future__ import annotations

import pytest

from tests.ring.conftest import MakePair, Pair, both_formats
from vhostsock._core import ffi, lib
from vhostsock.errors import DriverError, FrontendError
from vhostsock.memory import MemoryMap
from vhostsock.testing.driver import DESC_WRITE
from vhostsock.testing.packed import PackedQueue

pytestmark = both_formats


def base(pair: Pair, avail: int, used: int | None = None) -> int:
    """The base of a ring whose chains have one descriptor each: ``avail`` were taken and ``used`` (all of them) completed."""
    if isinstance(pair.queue, PackedQueue):
        return 0x8000_8000 | avail | (avail if used is None else used) << 16
    return avail


def two_regions(make_pair: MakePair) -> tuple[Pair, int, MemoryMap]:
    """A pair with the ring in one region and a buffer in another; the buffer's address, and the map without that region."""
    pair = make_pair(sizes=(1 << 16, 1 << 16))
    data = pair.memory.regions[1]
    return pair, pair.memory.alloc(64, region=1), pair.memory.map().without_region(gpa=data.gpa, size=data.size, uva=data.uva)


def test_a_chain_in_flight_keeps_its_memory_mapped(make_pair: MakePair) -> None:
    pair, buffer, without = two_regions(make_pair)
    pair.memory.write(buffer, b"still here")
    pair.queue.offer_chain((buffer, 10, 0), (buffer + 16, 16, DESC_WRITE))
    pair.queue.publish()
    chain = pair.vring.pop()
    assert chain is not None
    assert lib.vs_region_count_live() == 3  # the ring's two, and the one that is left in the new map
    pair.vring.set_memory(without)
    assert lib.vs_region_count_live() == 3
    assert chain.read() == b"still here"
    assert chain.write(b"written") == 7
    chain.complete()
    assert lib.vs_region_count_live() == 1
    assert pair.memory.read(buffer + 16, 7) == b"written"
    assert pair.vring.flush()


def test_a_buffer_in_a_removed_region_breaks_the_ring(make_pair: MakePair) -> None:
    pair, buffer, without = two_regions(make_pair)
    pair.vring.set_memory(without)
    pair.queue.offer_chain((buffer, 10, 0))
    pair.queue.publish()
    with pytest.raises(DriverError, match=r"desc 0 .*: the buffer is not in guest memory"):
        pair.vring.pop()


def test_a_ring_survives_that_its_region_is_mapped_anew(pair: Pair) -> None:
    old, new = pair.memory.map(), pair.memory.map()
    pair.vring.set_memory(old)
    old.close()
    pair.queue.submit([b"one"], [3])
    pair.vring.set_memory(new)
    new.close()
    assert pair.echo_all() == 1
    assert pair.queue.wait()[0].data == b"one"
    assert lib.vs_region_count_live() == 1


def test_a_ring_that_leaves_the_map_is_broken_and_the_front_end_told(pair: Pair) -> None:
    pair.queue.submit([b"x"], [4])
    chain = pair.vring.pop()
    assert chain is not None
    with pytest.raises(FrontendError, match=r"after a change of the memory table: descriptor \w+ .* is not wholly"):
        pair.vring.set_memory(MemoryMap.empty())
    assert pair.vring.broken
    with pytest.raises(FrontendError):
        pair.vring.pop()
    assert chain.read() == b"x"
    chain.complete()
    assert pair.queue.collect() == []
    assert pair.vring.stop() == base(pair, 0)  # the driver never heard of its completion


def test_an_idle_ring_may_lose_its_memory(pair: Pair) -> None:
    pair.vring.stop()
    pair.vring.set_memory(MemoryMap.empty())
    with pytest.raises(FrontendError, match="is not wholly inside"):
        pair.vring.start()


def test_completion_after_a_stop_is_harmless(pair: Pair) -> None:
    pair.queue.submit([b"x"], [4])
    chain = pair.vring.pop()
    assert chain is not None
    pair.vring.stop()
    assert chain.read() == b"x"
    chain.write(b"late")
    chain.complete()
    chain.complete()
    assert chain.completed
    assert pair.queue.collect() == []


def test_completion_after_a_restart_does_not_reach_the_new_run(pair: Pair) -> None:
    pair.queue.submit([b"x"], [4])
    old = pair.vring.pop()
    assert old is not None
    pair.vring.set_base(pair.vring.stop())
    pair.vring.start()
    again = pair.vring.pop()
    assert again is not None
    old.complete()
    pair.vring.flush()
    assert pair.queue.collect() == []
    again.write(b"once")
    again.complete()
    pair.vring.flush()
    assert pair.queue.wait()[0].data == b"once"


def test_completion_after_close_is_harmless(pair: Pair) -> None:
    pair.queue.submit([b"x"], [4])
    chain = pair.vring.pop()
    assert chain is not None
    pair.vring.close()
    pair.vring.close()
    assert chain.read() == b"x"
    chain.complete()
    assert lib.vs_region_count_live() == 0


def test_a_forgotten_chain_gives_its_memory_back(make_pair: MakePair) -> None:
    pair, buffer, without = two_regions(make_pair)
    pair.queue.offer_chain((buffer, 10, 0))
    pair.queue.publish()
    chain = pair.vring.pop()
    pair.vring.set_memory(without)
    assert lib.vs_region_count_live() == 3
    del chain
    assert lib.vs_region_count_live() == 1


def test_a_pop_into_a_chain_that_was_not_given_back_lets_its_memory_go(make_pair: MakePair) -> None:
    pair, _, without = two_regions(make_pair)
    for _ in range(2):
        pair.queue.submit([b"x"])
    chain = ffi.gc(lib.vs_chain_new(), lib.vs_chain_free)
    assert lib.vs_vq_pop(pair.vring.ptr, chain) == 1
    pair.vring.set_memory(without)
    assert lib.vs_region_count_live() == 3
    assert lib.vs_vq_pop(pair.vring.ptr, chain) == 1
    assert lib.vs_region_count_live() == 1


# What stop() reports


def test_the_base_is_the_next_chain(pair: Pair) -> None:
    for n in range(3):
        pair.queue.submit([b"x"])
        pair.echo_all()
        pair.queue.wait()
        assert pair.vring.stop() == base(pair, n + 1)
        assert pair.vring.stop() == base(pair, n + 1)
        pair.vring.start()  # without SET_VRING_BASE: where it stopped


def test_chains_held_over_a_stop_come_again(pair: Pair) -> None:
    for i in range(5):
        pair.queue.add([b"%d" % i], [1])
    pair.queue.publish()
    chains = pair.vring.pop_batch(4)
    for chain in chains[:2]:
        chain.write(chain.read())
        chain.complete()
    assert pair.vring.stop() == base(pair, 2)
    pair.vring.start()
    assert [c.read() for c in pair.vring.pop_batch(9)] == [b"2", b"3", b"4"]


def test_chains_pushed_before_a_stop_are_published_by_it(pair: Pair) -> None:
    request = pair.queue.submit([b"a"], [1])
    chain = pair.vring.pop()
    assert chain is not None
    chain.write(b"A")
    chain.complete()
    assert pair.vring.stop() == base(pair, 1)
    assert pair.queue.wait() == [request]
    assert request.data == b"A"


def test_out_of_order_completion_leaves_the_base_at_the_next_chain(pair: Pair) -> None:
    for i in range(4):
        pair.queue.add([b"%d" % i])
    pair.queue.publish()
    zero, one, two, three = pair.vring.pop_batch(4)
    two.complete()
    zero.complete()
    pair.vring.flush()
    assert pair.vring.stop() == base(pair, 4, 2)  # 1 and 3 are lost; 1 could not be taken again without 2
    del one, three


def test_a_hole_that_was_filled_is_forgotten(pair: Pair) -> None:
    for i in range(4):
        pair.queue.add([b"%d" % i])
    pair.queue.publish()
    zero, one = pair.vring.pop_batch(2)
    one.complete()
    zero.complete()
    assert len(pair.vring.pop_batch(2)) == 2
    assert pair.vring.stop() == base(pair, 2)
