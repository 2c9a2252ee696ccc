"""A well-behaved driver: requests of every shape, in every order, across every edge."""

from __future__ import annotations

import pytest

from tests.ring.conftest import MakePair, Pair, both_formats
from vhostsock._core import lib
from vhostsock.errors import FrontendError, UsageError
from vhostsock.ring import BATCH_MAX
from vhostsock.testing.driver import DESC_WRITE
from vhostsock.testing.packed import PackedQueue

pytestmark = both_formats


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        ([b"ping"], [64]),
        ([b"only to the device"], []),
        ([], [3, 4, 5]),
        ([b"a", b"bc", b"def"], [1, 1, 4]),
        ([b"x" * 5000], [10000]),
    ],
)
def test_a_request_goes_there_and_back(pair: Pair, readable: list[bytes], writable: list[int], indirect: bool) -> None:
    request = pair.queue.submit(readable, writable, indirect=indirect)
    chain = pair.vring.pop()
    assert chain is not None
    sent = b"".join(readable)
    assert (chain.readable, chain.writable) == (len(sent), sum(writable))
    assert chain.read() == sent
    assert chain.read() == b""
    answer = bytes(range(1, 1 + min(sum(writable), 250)))
    assert chain.write(answer) == len(answer)
    chain.complete()
    assert pair.queue.collect() == []  # not before the flush
    pair.vring.flush()
    assert pair.queue.wait() == [request]
    assert request.data == answer
    assert pair.vring.pop() is None
    assert pair.queue.free == pair.queue.num


def test_reads_and_writes_advance_over_descriptor_edges(pair: Pair) -> None:
    pair.queue.submit([b"abc", b"defg", b"h"], [2, 3, 1])
    chain = pair.vring.pop()
    assert chain is not None
    assert [chain.read(n) for n in (2, 0, 3, 2, 100)] == [b"ab", b"", b"cde", b"fg", b"h"]
    assert [chain.write(data) for data in (b"1", b"", b"234", bytearray(b"56789"), b"x")] == [1, 0, 3, 2, 0]
    assert chain.written == 6
    chain.complete()
    pair.vring.flush()
    assert pair.queue.wait()[0].data == b"123456"


def test_zero_length_descriptors_are_harmless(pair: Pair) -> None:
    pair.queue.offer_chain((0xDEAD_0000_0000, 0, 0), (0xDEAD_0000_0000, 0, DESC_WRITE))
    pair.queue.publish()
    chain = pair.vring.pop()
    assert chain is not None
    assert (chain.readable, chain.writable, chain.read(), chain.write(b"x")) == (0, 0, b"", 0)
    chain.complete()


def test_a_buffer_may_cross_adjacent_regions(make_pair: MakePair) -> None:
    pair = make_pair(sizes=(1 << 16, 1 << 16, 1 << 16))
    edge = pair.memory.regions[1].gpa
    pair.memory.write(edge - 3, b"\xffabcdef")
    # the second is over all of the middle region, a byte at each side
    pair.queue.offer_chain((edge - 2, 5, 0), (edge - 1, (1 << 16) + 2, DESC_WRITE))
    pair.queue.publish()
    chain = pair.vring.pop()
    assert chain is not None
    assert chain.read() == b"abcde"
    assert (chain.ptr.n_out, chain.ptr.n_in) == (2, 3)
    data = bytes(i % 253 for i in range((1 << 16) + 2))
    assert chain.write(data) == len(data)
    assert pair.memory.read(edge - 1, len(data)) == data


@pytest.mark.parametrize("num", [2, 4, 256, 32768])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_full_ring_of_every_size_echoes(make_pair: MakePair, num: int, event_idx: bool) -> None:
    pair = make_pair(num, sizes=(8 << 20,), event_idx=event_idx)
    requests = [pair.queue.add([i.to_bytes(4, "little")], [4]) for i in range(num)]
    pair.queue.publish()
    assert pair.queue.kick()
    assert pair.echo_all() == num
    assert pair.queue.wait(num) == requests
    assert [int.from_bytes(r.data, "little") for r in requests] == list(range(num))


def test_a_ring_of_one_descriptor_works(make_pair: MakePair) -> None:
    pair = make_pair(1)
    for i in range(5):
        pair.queue.submit([b"%d" % i])
        chain = pair.vring.pop()
        assert chain is not None
        assert chain.read() == b"%d" % i
        chain.complete()
        pair.vring.flush()
        assert pair.queue.wait()[0].written == 0


def test_chains_complete_in_any_order(pair: Pair) -> None:
    requests = [pair.queue.submit([b"%d" % i], [1]) for i in range(6)]
    chains = pair.vring.pop_batch(10)
    order = [3, 0, 5, 4, 1, 2]
    for i in order:
        chains[i].write(chains[i].read())
        chains[i].complete()
    pair.vring.flush()
    assert pair.queue.wait(6) == [requests[i] for i in order]
    assert [r.data for r in requests] == [b"%d" % i for i in range(6)]


def test_pop_batch_takes_at_most_the_limit(make_pair: MakePair) -> None:
    pair = make_pair(1024)
    for i in range(600):
        pair.queue.add([i.to_bytes(2, "little")])
    pair.queue.publish()
    sizes = []
    seen = []
    for limit in (0, 1, 7, 10_000, 10_000, 10_000, 1):
        batch = pair.vring.pop_batch(limit)
        sizes.append(len(batch))
        for chain in batch:
            seen.append(int.from_bytes(chain.read(), "little"))
            chain.complete()
    assert sizes == [0, 1, 7, BATCH_MAX, BATCH_MAX, 600 - 8 - 2 * BATCH_MAX, 0]
    assert seen == list(range(600))


def test_the_longest_chain_has_1024_descriptors(make_pair: MakePair) -> None:
    pair = make_pair(2048, sizes=(4 << 20,))
    for indirect in (False, True):
        request = pair.queue.submit([b"a"] * 24, [1] * 1000, indirect=indirect)
        chain = pair.vring.pop()
        assert chain is not None
        assert (chain.readable, chain.writable) == (24, 1000)
        chain.write(b"z" * 1000)
        chain.complete()
        pair.vring.flush()
        assert pair.queue.wait() == [request]
        assert request.data == b"z" * 1000


def test_unpop_puts_the_last_chain_back(pair: Pair) -> None:
    for data in (b"1", b"2", b"3"):
        pair.queue.submit([data])
    one, two, three = pair.vring.pop_batch(3)
    for chain in (three, two):
        lib.vs_vq_unpop(pair.vring.ptr, chain.ptr)
    assert [c.read() for c in pair.vring.pop_batch(3)] == [b"2", b"3"]
    assert one.read() == b"1"
    lib.vs_vq_unpop(pair.vring.ptr, one.ptr)  # a device bug, and loud
    assert pair.vring.broken
    assert "given back out of order" in pair.vring.error


def test_a_chain_of_another_vring_is_the_callers_mistake(make_pair: MakePair) -> None:
    one, other = make_pair(index=0), make_pair(index=5)
    one.queue.submit([b"x"], [4])
    chain = one.vring.pop()
    assert chain is not None
    with pytest.raises(UsageError, match="not of vring 5"):
        other.vring.push(chain, 0)
    for written in (-1, 5):
        with pytest.raises(UsageError, match="cannot complete"):
            one.vring.push(chain, written)
    one.vring.push(chain, 4)
    with pytest.raises(UsageError, match="completed"):
        one.vring.push(chain, 4)
    chain.complete()  # only the first counts
    with pytest.raises(UsageError, match="the driver's again"):
        chain.read()


def test_c_never_tells_the_driver_of_more_bytes_than_there_is_room_for(pair: Pair) -> None:
    pair.queue.submit([b"x"], [4])
    chain = pair.vring.pop()
    assert chain is not None
    lib.vs_vq_push(pair.vring.ptr, chain.ptr, 5)
    pair.vring.flush()
    assert pair.queue.wait()[0].written == 4


def test_a_running_vring_is_not_reconfigured(pair: Pair) -> None:
    with pytest.raises(FrontendError, match="queue size cannot change while the ring runs"):
        pair.vring.set_num(8)
    with pytest.raises(FrontendError, match="runs already"):
        pair.vring.start()
    pair.vring.set_addr(0, 0, 0)  # of no effect on this run
    pair.vring.set_base(9)
    pair.queue.submit([b"x"], [1])
    assert pair.echo_all() == 1
    assert pair.queue.wait()[0].data == b"x"
    assert pair.vring.stop() == pair.queue.base + (0x10001 if isinstance(pair.queue, PackedQueue) else 1)


def test_an_idle_vring_has_nothing(pair: Pair) -> None:
    pair.queue.submit([b"x"])
    pair.vring.stop()
    assert pair.vring.pop() is None
    assert pair.vring.pop_batch(4) == []
    assert not pair.vring.flush()
    assert not pair.vring.enable_kick()
    assert not pair.vring.has_available
    pair.vring.disable_kick()
    assert pair.vring.error == ""
