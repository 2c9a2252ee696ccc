"""VIRTIO_F_IN_ORDER: completions wait for older ones, and a batch needs one place in the ring (virtio 1.3, 2.7.9 and 2.8.9)."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest

from tests.ring.conftest import MakePair, Pair, both_formats
from vhostsock.ring import Chain
from vhostsock.testing.driver import DeviceFault, Request, RingFull
from vhostsock.testing.packed import PackedQueue


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair(in_order=True)


def used_names(pair: Pair, count: int) -> list[int]:
    """The first used elements as they are in memory: heads, or buffer ids."""
    if isinstance(pair.queue, PackedQueue):
        return [struct.unpack("<QIHH", pair.memory.read(pair.queue.desc + 16 * i, 16))[2] for i in range(count)]
    return [struct.unpack("<II", pair.memory.read(pair.queue.used + 4 + 8 * i, 8))[0] for i in range(count)]


@both_formats
def test_a_completion_waits_for_all_that_are_older(pair: Pair) -> None:
    requests = [pair.queue.submit([b"%d" % i], [8]) for i in range(4)]
    chains = pair.vring.pop_batch(4)
    for i, visible in ((2, 0), (1, 0), (0, 3), (3, 4)):
        chains[i].write(b"answer")
        chains[i].complete()
        pair.vring.flush()
        done = pair.queue.collect()
        assert done == requests[visible - len(done) : visible]
        assert all(request.data == b"answer" for request in done)
    assert pair.queue.free == pair.queue.num


@both_formats
def test_one_used_element_stands_for_a_batch_that_was_written_whole(pair: Pair) -> None:
    before = [pair.queue.submit([b"x"], [4]) for _ in range(5)]
    names = used_names(pair, 5)
    for chain in pair.vring.pop_batch(5):
        chain.write(b"full")
        chain.complete()
    pair.vring.flush()
    # only the first place was written: it has the last request's name
    assert used_names(pair, 5) == [before[-1].head, *names[1:]]
    done = pair.queue.collect()
    assert done == before
    assert {(request.written, request.data) for request in done} == {(4, b"full")}


@both_formats
def test_what_was_not_written_whole_has_a_used_element_of_its_own(pair: Pair) -> None:
    sizes = [4, 4, 3, 4, 0, 4, 4]
    requests = [pair.queue.submit([b"x"], [4]) for _ in sizes]
    for chain, size in zip(pair.vring.pop_batch(9), sizes, strict=True):
        chain.write(b"full"[:size])
        chain.complete()
    pair.vring.flush()
    names = used_names(pair, 7)
    # the batches are 0 to 2, 3 to 4, 5 to 6: each ends with what is short, or with the last
    assert [names[0], names[3], names[5]] == [requests[2].head, requests[4].head, requests[6].head]
    assert pair.queue.collect() == requests
    assert [request.written for request in requests] == sizes


@both_formats
def test_a_batch_does_not_go_on_over_a_flush(pair: Pair) -> None:
    requests = [pair.queue.submit([b"x"]) for _ in range(4)]
    for chain in pair.vring.pop_batch(4):
        chain.complete()
        pair.vring.flush()
        assert len(pair.queue.collect()) == 1
    assert used_names(pair, 4) == [request.head for request in requests]


@both_formats
def test_what_waited_when_the_ring_stopped_comes_again(pair: Pair) -> None:
    requests = [pair.queue.submit([b"%d" % i], [8]) for i in range(4)]
    chains = pair.vring.pop_batch(4)
    for i in (0, 2, 3):
        chains[i].complete()
    pair.vring.set_base(pair.vring.stop())
    pair.vring.start()
    assert pair.queue.collect() == requests[:1]
    assert pair.echo_all() == 3
    assert pair.queue.collect() == requests[1:]
    assert [request.data for request in requests[1:]] == [b"1", b"2", b"3"]


@both_formats
@pytest.mark.parametrize("num", [1, 2, 8, 16])
def test_many_laps_in_any_order_of_completion(make_pair: MakePair, num: int, packed: bool) -> None:
    draw = random.Random(num)
    pair = make_pair(num + 1 if packed else num, in_order=True)  # packed: also where 2^16 is no multiple of the size
    held: list[Chain] = []
    sent: list[Request] = []
    done: list[Request] = []
    for _ in range(1500):
        with contextlib.suppress(RingFull):
            while draw.random() < 0.7:
                sent.append(pair.queue.submit([b"x"] * draw.randrange(1, 2 + num // 4), [2] * (num > 1), indirect=False))
        held += pair.vring.pop_batch(draw.randrange(1, 4))
        draw.shuffle(held)
        for _ in range(draw.randrange(len(held) + 1)):
            chain = held.pop()
            chain.write(b"ab"[: draw.randrange(3)])
            chain.complete()
        pair.vring.flush()
        done += pair.queue.collect()
        assert done == sent[: len(done)]
    assert not pair.vring.broken, pair.vring.error
    assert len(done) > 500


def test_the_driver_finds_a_device_that_tells_half_of_a_batch(pair: Pair) -> None:
    requests = [pair.queue.submit([b"x"]) for _ in range(3)]
    pair.memory.write(pair.queue.used + 4, struct.pack("<II", requests[2].head, 0))
    pair.queue.used_idx = 2
    with pytest.raises(DeviceFault, match="in the middle of a batch of 3"):
        pair.queue.collect()
