"""The driver of vhostsock.testing finds a device that breaks the rules, and waits as a driver does."""

from __future__ import annotations

import asyncio
import struct

import pytest

from tests.ring.conftest import Pair
from vhostsock.testing.driver import DESC_INDIRECT, DeviceFault, GuestMemory, RingFull


def use(pair: Pair, *elements: tuple[int, int], idx: int | None = None) -> None:
    """Be a device that writes the used ring as it likes."""
    for i, element in enumerate(elements):
        pair.memory.write(pair.queue.used + 4 + 8 * i, struct.pack("<II", *element))
    pair.queue.used_idx = len(elements) if idx is None else idx


def test_a_head_that_is_not_in_flight_is_a_fault(pair: Pair) -> None:
    head = pair.queue.submit([b"x"]).head
    use(pair, (head ^ 1, 0))
    with pytest.raises(DeviceFault, match="is not in flight"):
        pair.queue.collect()


def test_a_request_used_twice_is_a_fault(pair: Pair) -> None:
    head = pair.queue.submit([b"x"]).head
    pair.queue.submit([b"y"])
    use(pair, (head, 0), (head, 0))
    with pytest.raises(DeviceFault, match=f"head {head} is not in flight"):
        pair.queue.collect()


def test_more_written_than_there_was_room_for_is_a_fault(pair: Pair) -> None:
    head = pair.queue.submit([b"x"], [3, 4]).head
    use(pair, (head, 8))
    with pytest.raises(DeviceFault, match="8 bytes written, there was room for 7"):
        pair.queue.collect()


@pytest.mark.parametrize("idx", [2, 65535])
def test_a_used_index_that_jumps_is_a_fault(pair: Pair, idx: int) -> None:
    pair.queue.submit([b"x"])
    use(pair, idx=idx)
    with pytest.raises(DeviceFault, match=rf"used.idx moved from 0 to {idx} with 1 requests in flight"):
        pair.queue.collect()


def test_a_full_ring_is_said_to_be_full(pair: Pair) -> None:
    for _ in range(5):
        pair.queue.submit([b"a", b"b"], [1], indirect=False)
    with pytest.raises(RingFull, match="2 descriptors needed, 1 free"):
        pair.queue.add([b"x"], [1], indirect=False)
    pair.queue.submit([b"x"], [1], indirect=True)  # takes one
    assert (pair.queue.free, pair.queue.in_flight) == (0, 6)
    assert pair.echo_all() == 6
    assert len(pair.queue.wait(6)) == 6
    assert (pair.queue.free, pair.queue.in_flight) == (16, 0)


def test_requests_reuse_their_memory(pair: Pair) -> None:
    for i in range(200):  # 8 MiB through 1 MiB
        request = pair.queue.submit([b"%d" % i * 5000], [20000])
        pair.echo_all()
        assert pair.queue.wait() == [request]
        assert request.data == b"%d" % i * 5000
    with pytest.raises(MemoryError, match="no 1048576 bytes left"):
        pair.memory.alloc(1 << 20)


def test_memory_outside_of_the_guest_is_an_index_error() -> None:
    with GuestMemory(4096, 4096) as memory:
        end = memory.regions[1].gpa + 4096
        memory.write(end - 4097, b"across")
        assert memory.read(end - 4097, 6) == b"across"
        for gpa, size in ((end, 1), (end - 1, 2), (0, 1)):
            with pytest.raises(IndexError, match="is not in guest memory"):
                memory.read(gpa, size)
        with pytest.raises(IndexError, match="not in one region"):
            memory.at(end - 4097, 2)


def test_indirect_is_chosen_as_linux_does(pair: Pair) -> None:
    one, two = pair.queue.add([b"x"]), pair.queue.add([b"x"], [1])
    flags = [struct.unpack("<QIHH", pair.memory.read(pair.queue.desc + 16 * r.head, 16))[2] for r in (one, two)]
    assert flags == [0, DESC_INDIRECT]


def test_wait_says_when_no_call_comes(pair: Pair) -> None:
    pair.queue.submit([b"x"])
    with pytest.raises(TimeoutError, match="completed 0 of 1 requests, then made no call"):
        pair.queue.wait(timeout=0.01)


def test_waiting_on_a_loop_ends_with_the_call(pair: Pair) -> None:
    async def both() -> None:
        requests = [pair.queue.submit([b"%d" % i], [1]) for i in range(3)]
        waiter = asyncio.create_task(pair.queue.wait_async(3))
        for _ in requests:
            await asyncio.sleep(0)  # let the waiter go to sleep in between
            chain = pair.vring.pop()
            assert chain is not None
            chain.write(chain.read())
            chain.complete()
            pair.vring.flush()
        assert await waiter == requests
        assert [r.data for r in requests] == [b"0", b"1", b"2"]

    asyncio.run(both())
