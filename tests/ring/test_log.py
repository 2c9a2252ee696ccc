"""The dirty log has every page that the device wrote to, and no other; and what is past its end is the front-end's fault."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.ring.conftest import MakePair, Pair, both_formats
from vhostsock._core import lib
from vhostsock.errors import FrontendError
from vhostsock.memory import DirtyLog
from vhostsock.ring import Chain
from vhostsock.testing.driver import RingFull
from vhostsock.testing.memory import PAGE, DirtyPages, pages
from vhostsock.testing.packed import PackedQueue


@pytest.fixture
def dirty(pair: Pair) -> Iterator[DirtyPages]:
    """A log of the pair's memory, which its vring does not use yet."""
    with DirtyPages(pair.memory) as log:
        yield log


def use(pair: Pair, dirty: DirtyPages, *, data: bool = True, ring: bool = True, address: int | None = None) -> None:
    log = DirtyLog(dirty.fd, size=dirty.size)
    pair.vring.set_log(log, data=data, ring=ring, address=pair.queue.used if address is None else address)
    log.close()


def ring_pages(pair: Pair, used: int | None = None) -> set[int]:
    """Where the device may write in the ring; used: where the used part is taken to be."""
    packed = isinstance(pair.queue, PackedQueue)
    descs = pages(pair.queue.desc, 16 * pair.queue.num) if packed else set()
    return descs | pages(pair.queue.used if used is None else used, 4 if packed else 6 + 8 * pair.queue.num)


@both_formats
@pytest.mark.parametrize(
    ("room", "written", "marked"),
    [
        ([3 * PAGE], 3 * PAGE, 3),
        ([3 * PAGE], PAGE + 1, 2),
        ([3 * PAGE], PAGE, 1),
        ([3 * PAGE], 1, 1),
        ([3 * PAGE], 0, 0),
        ([PAGE, 2 * PAGE, PAGE], PAGE + 1, 2),
        ([40 * PAGE], 40 * PAGE, 40),
    ],
)
def test_of_a_buffer_the_pages_are_marked_that_were_written(
    pair: Pair, dirty: DirtyPages, room: list[int], written: int, marked: int
) -> None:
    use(pair, dirty, ring=False)
    request = pair.queue.submit([b"x" * PAGE], room)
    chain = pair.vring.pop()
    assert chain is not None
    chain.write(bytes(written))
    assert dirty.take() == set()  # not before it is completed
    chain.complete()
    pair.vring.flush()
    expected: set[int] = set()
    for gpa, size in request.writable:
        expected |= pages(gpa, min(size, written)) if written else set()
        written -= min(size, written)
    assert len(expected) == marked
    assert dirty.take() == expected


@both_formats
def test_bytes_are_marked_that_the_completion_does_not_count(pair: Pair, dirty: DirtyPages) -> None:
    # a device that puts a status behind data that it did not write: 2.7.8.2 lets it count nothing at all
    use(pair, dirty, ring=False)
    request = pair.queue.submit([], [2 * PAGE, 1])
    chain = pair.vring.pop()
    assert chain is not None
    assert lib.vs_chain_write(chain.ptr, 2 * PAGE, b"!", 1) == 1
    pair.vring.push(chain, 0)
    assert dirty.take() >= pages(*request.writable[1])


@both_formats
def test_of_a_ring_the_pages_are_marked_that_the_device_writes(pair: Pair, dirty: DirtyPages) -> None:
    use(pair, dirty, data=False)
    pair.queue.submit([b"x"], [4])
    pair.echo_all()
    assert dirty.take() == ring_pages(pair)


@both_formats
def test_the_used_part_is_in_the_log_where_the_front_end_says(pair: Pair, dirty: DirtyPages) -> None:
    elsewhere = pair.memory.regions[0].gpa + 77 * PAGE
    use(pair, dirty, data=False, address=elsewhere)
    pair.vring.disable_kick()
    pair.queue.submit([b"x"])
    pair.echo_all()
    pair.vring.enable_kick()
    assert dirty.take() == ring_pages(pair, elsewhere)


@both_formats
def test_nothing_is_marked_unless_it_was_asked_for_and_logging_changes_on_a_running_ring(
    pair: Pair, dirty: DirtyPages
) -> None:
    for data, ring in ((False, False), (True, False), (False, True), (True, True)):
        use(pair, dirty, data=data, ring=ring)
        request = pair.queue.submit([b"x"], [2 * PAGE])
        assert pair.echo_all() == 1
        pair.queue.wait()
        marked = dirty.take()
        assert (request.writable[0][0] in marked, pair.queue.used // PAGE * PAGE in marked) == (data, ring)
    pair.vring.set_log(None)
    pair.queue.submit([b"x"], [2 * PAGE])
    assert pair.echo_all() == 1
    assert dirty.take() == set()


@both_formats
@pytest.mark.parametrize("missing", [1, 2, 1000])
def test_a_write_past_the_end_of_the_log_is_the_front_ends_fault(pair: Pair, dirty: DirtyPages, missing: int) -> None:
    region = pair.memory.regions[0]
    last = region.gpa + region.size - PAGE
    size = dirty.size - missing
    os.ftruncate(dirty.fd, 1 << 20)
    log = DirtyLog(dirty.fd, size=size)
    pair.vring.set_log(log, data=True, ring=False)
    log.close()
    free = last - pair.memory._tops[0]
    pair.memory.alloc(1 << (free.bit_length() - 2))
    while pair.memory._tops[0] < last:
        pair.memory.alloc(PAGE)
    request = pair.queue.submit([], [PAGE])
    assert request.writable[0][0] == last
    chain = pair.vring.pop()
    assert chain is not None
    chain.write(b"x")
    chain.complete()
    assert not pair.vring.flush()  # it would be lost to the destination: better it fails loudly
    with pytest.raises(FrontendError, match=rf"a write at gpa {last:#x}, size 0x1, is past the end of the dirty log, which"):
        pair.vring.pop()
    assert os.pread(dirty.fd, 1 << 20, size) == bytes((1 << 20) - size)


@both_formats
@pytest.mark.parametrize("address", [1 << 40, (1 << 64) - 1, (1 << 64) - 4, (1 << 63)])
def test_a_place_for_the_ring_past_the_end_of_the_log_is_the_front_ends_fault(
    pair: Pair, dirty: DirtyPages, address: int
) -> None:
    use(pair, dirty, data=False, address=address)
    pair.queue.submit([b"x"])
    pair.vring.disable_kick()
    with pytest.raises(FrontendError, match="is past the end of the dirty log"):  # noqa: PT012
        pair.echo_all()
        pair.vring.enable_kick()
        pair.vring.pop()
    assert dirty.take() <= pages(pair.queue.desc, 16 * pair.queue.num)


@both_formats
def test_a_log_that_shrinks_is_the_front_ends_fault_and_kills_nobody(pair: Pair, dirty: DirtyPages) -> None:
    log = DirtyLog(dirty.fd, size=dirty.size)
    pair.vring.set_log(log, address=pair.queue.used)
    os.ftruncate(dirty.fd, 0)
    for _ in range(2):
        pair.queue.submit([b"x"], [4])
    for chain in pair.vring.pop_batch(2):
        chain.complete()
    pair.vring.flush()
    with pytest.raises(FrontendError, match="truncated"):
        pair.vring.pop()
    os.ftruncate(dirty.fd, dirty.size)
    log.close()


@pytest.mark.parametrize(
    ("size", "offset", "reason"),
    [
        (0, 0, "has size 0"),
        (1 << 40, 0, "the file has"),
        (1, 1 << 40, "the file has"),
        ((1 << 64) - 1, 2, "is past the end of any file|runs past"),
    ],
)
def test_a_log_that_cannot_be_is_refused(dirty: DirtyPages, size: int, offset: int, reason: str) -> None:
    with pytest.raises(FrontendError, match=f"dirty log: .*({reason})"):
        DirtyLog(dirty.fd, size=size, offset=offset)


def test_a_log_may_begin_anywhere_in_its_file(pair: Pair) -> None:
    with DirtyPages(pair.memory) as dirty:
        os.ftruncate(dirty.fd, 3 * dirty.size)
        log = DirtyLog(dirty.fd, size=dirty.size, offset=dirty.size + 5)
        pair.vring.set_log(log, ring=False)
        log.close()
        request = pair.queue.submit([], [1])
        chain = pair.vring.pop()
        assert chain is not None
        chain.write(b"x")
        chain.complete()
        page = request.writable[0][0] // PAGE
        assert os.pread(dirty.fd, 1, dirty.size + 5 + page // 8) == bytes([1 << page % 8])
        assert dirty.take() == set()


@both_formats
def test_the_front_end_is_told_once_a_batch(pair: Pair, dirty: DirtyPages) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        log = DirtyLog(dirty.fd, size=dirty.size)
        log.set_notify(fd)
        pair.vring.set_log(log, ring=False)
        for _ in range(5):
            pair.queue.submit([b"x"], [4])
        pair.echo_all()
        assert os.eventfd_read(fd) == 1
        pair.queue.submit([b"x"])
        pair.echo_all()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)  # nothing was marked
        with pytest.raises(FrontendError, match="SET_LOG_FD: the descriptor must be"):
            log.set_notify(dirty.fd)
        log.close()
    finally:
        os.close(fd)


# Against the memory itself


@both_formats
@pytest.mark.parametrize("seed", range(3))
def test_no_page_changes_that_is_not_in_the_log(make_pair: MakePair, seed: int) -> None:
    draw = random.Random(seed)
    pair = make_pair(8, sizes=(1 << 16, 1 << 16), event_idx=draw.random() < 0.5)
    memory = pair.memory
    start, size = memory.regions[0].gpa, 1 << 17
    held: list[Chain] = []
    changed = 0
    with DirtyPages(memory) as dirty:
        use(pair, dirty)
        for _ in range(200):
            try:
                pair.queue.submit([b"x"] * draw.randrange(1, 3), [draw.choice([1, 100, 5000, 9000])] * draw.randrange(3))
            except (RingFull, MemoryError):
                pair.queue.collect()
            before = memory.read(start, size)
            match draw.randrange(5):
                case 0 | 1:
                    held += pair.vring.pop_batch(draw.randrange(1, 4))
                case 2 | 3 if held:
                    chain = held.pop(draw.randrange(len(held)))
                    chain.write(draw.randbytes(draw.randrange(1 + chain.writable)))
                    chain.complete()
                case 4:
                    pair.vring.flush()
                    if draw.random() < 0.5:
                        pair.vring.disable_kick()
                    else:
                        pair.vring.enable_kick()
            after = memory.read(start, size)
            differ = {start + at for at in range(0, size, PAGE) if before[at : at + PAGE] != after[at : at + PAGE]}
            changed += len(differ)
            assert differ <= dirty.take()
    assert not pair.vring.broken, pair.vring.error
    assert changed > 50
