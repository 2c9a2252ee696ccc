"""What is in flight, in memory that outlives the device: every instruction may be the last, and every byte there a lie."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ring.conftest import MakePair, Pair, both_formats
from vhostsock._core import lib
from vhostsock.errors import DriverError, FrontendError
from vhostsock.memory import InflightArea

ROOT = Path(__file__).resolve().parents[2]
NUM = 16
# features, version, desc_num, last_batch_head, used_idx; then inflight, next, counter
SPLIT_HEAD, SPLIT_ENTRY = struct.Struct("=QHHHH"), struct.Struct("=B5xHQ")
PACKED_HEAD, PACKED_ENTRY = struct.Struct("=QHHHHHHBB10x"), struct.Struct("=BxHHHQHHIQ")


@pytest.fixture
def file(packed: bool) -> Iterator[int]:
    """The file of a new region for queues 0 and 1, the second of which is the pair's."""
    size, fd = InflightArea.create(num_queues=2, queue_size=NUM, packed=packed)
    assert size == os.fstat(fd).st_size
    yield fd
    os.close(fd)


def track(pair: Pair, fd: int, packed: bool, *, size: int | None = None) -> None:
    """Restart the vring with the region in ``fd``."""
    base = pair.vring.stop()
    area = InflightArea(fd, size=os.fstat(fd).st_size if size is None else size, num_queues=2, queue_size=NUM, packed=packed)
    try:
        pair.vring.set_inflight(area)
        pair.vring.set_base(base)
        pair.vring.start()
    finally:
        area.close()


def crash(pair: Pair) -> None:
    """The device is gone, whatever it held; the next one starts with what a front-end knows."""
    pair.vring.stop()
    pair.vring.set_base(pair.queue.base)
    pair.vring.start()


@pytest.mark.parametrize("packed", [0, 1], ids=["split", "packed"])
@pytest.mark.parametrize("in_order", [0, 1], ids=["any-order", "in-order"])
def test_a_device_may_die_after_any_instruction(tmp_path: Path, packed: int, in_order: int) -> None:
    program = tmp_path / "crash"
    sources = [ROOT / "tests/ring/crash.c", *sorted((ROOT / "csrc/core").glob("*.c"))]
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc/core'}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, *sources, "-o", program], check=True, timeout=60)
    done = subprocess.run([program, str(packed), str(in_order)], capture_output=True, text=True, timeout=100, check=False)
    if done.returncode == 77:
        pytest.skip("processes may not be traced here")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 5_000  # one for each instruction, and none was left out


@both_formats
def test_what_was_in_flight_comes_again_in_its_order_and_before_what_is_new(pair: Pair, file: int, packed: bool) -> None:
    track(pair, file, packed)
    requests = [pair.queue.submit([b"%d" % i], [4]) for i in range(6)]
    chains = pair.vring.pop_batch(5)
    assert not any(chain.again for chain in chains)
    for i in (3, 1):
        chains[i].write(b"done")
        chains[i].complete()
    pair.vring.flush()
    crash(pair)
    assert pair.queue.collect() == [requests[3], requests[1]]
    again = pair.vring.pop_batch(10)
    assert [(chain.read(), chain.again) for chain in again] == [(b"0", True), (b"2", True), (b"4", True), (b"5", False)]
    for chain in reversed(again):
        chain.write(b"late")
        chain.complete()
    pair.vring.flush()
    assert pair.queue.wait(4) == [requests[i] for i in (5, 4, 2, 0)]
    assert pair.queue.free == NUM


@both_formats
def test_a_completion_that_was_not_flushed_did_not_happen(pair: Pair, file: int, packed: bool) -> None:
    track(pair, file, packed)
    pair.queue.submit([b"a"])
    pair.queue.submit([b"b"])
    one, two = pair.vring.pop_batch(2)
    one.complete()
    kept = os.pread(file, 1 << 16, 0)  # what a kill leaves behind; a stop would flush
    two.complete()
    pair.vring.stop()
    assert len(pair.queue.collect()) == 2
    part = lib.vs_inflight_size(packed, NUM)
    in_flight = [kept[part + head + i * size] for head, size in [(32, 32) if packed else (16, 16)] for i in range(NUM)]
    assert sum(in_flight) == 2


@both_formats
@pytest.mark.parametrize("indirect", [False, True])
def test_chains_of_any_shape_survive_rounds_of_crashes(make_pair: MakePair, file: int, packed: bool, indirect: bool) -> None:
    draw = random.Random(7)
    pair = make_pair(NUM)
    track(pair, file, packed)
    done = sent = 0
    for _ in range(60):
        while pair.queue.free > 4:
            shape = [b"%d" % sent] * draw.randrange(1, 3), [3] * draw.randrange(2)
            pair.queue.submit(*shape, indirect=indirect)
            sent += 1
        chains = pair.vring.pop_batch(draw.randrange(1, 9))
        draw.shuffle(chains)
        for chain in chains[: draw.randrange(len(chains) + 1)]:
            chain.write(chain.read()[:3])
            chain.complete()
            if draw.random() < 0.5:
                pair.vring.flush()
        crash(pair)
        assert not pair.vring.broken, pair.vring.error
        done += len(pair.queue.collect())
    done += pair.echo_all() and len(pair.queue.collect())
    assert (done, pair.queue.in_flight) == (sent, 0)


@both_formats
def test_a_device_that_takes_over_makes_the_call_that_may_have_been_lost(pair: Pair, file: int, packed: bool) -> None:
    track(pair, file, packed)
    assert not pair.queue.take_call()
    crash(pair)
    assert pair.queue.take_call()


@both_formats
def test_an_unpopped_chain_is_not_in_flight(pair: Pair, file: int, packed: bool) -> None:
    track(pair, file, packed)
    pair.queue.submit([b"x"])
    pair.queue.submit([b"y"])
    one, two = pair.vring.pop_batch(2)
    lib.vs_vq_unpop(pair.vring.ptr, two.ptr)
    crash(pair)
    assert [(c.read(), c.again) for c in pair.vring.pop_batch(9)] == [(b"x", True), (b"y", False)]
    crash(pair)
    x, y = pair.vring.pop_batch(9)
    for chain in (y, x):
        lib.vs_vq_unpop(pair.vring.ptr, chain.ptr)
    assert pair.vring.has_available
    assert pair.vring.enable_kick()
    assert pair.echo_all() == 2
    assert len(pair.queue.collect()) == 2
    del one


@both_formats
def test_the_base_of_a_tracked_ring_is_the_next_chain_whatever_is_in_flight(pair: Pair, file: int, packed: bool) -> None:
    track(pair, file, packed)
    for _ in range(3):
        pair.queue.submit([b"x"])
    chains = pair.vring.pop_batch(3)
    assert pair.vring.stop() == (0x8000_8003 if packed else 3)
    del chains


def test_the_split_region_is_as_the_document_has_it(pair: Pair, file: int) -> None:
    track(pair, file, packed=False)
    assert SPLIT_HEAD.unpack(os.pread(file, 16, 0)) == (0, 0, 0, 0, 0)  # queue 0 is not used
    heads = [pair.queue.submit([b"%d" % i]).head for i in range(3)]
    chains = pair.vring.pop_batch(3)
    chains[0].complete()
    chains[1].complete()
    pair.vring.flush()
    part = lib.vs_inflight_size(False, NUM)
    assert (part, part % 64) == (320, 0)
    assert SPLIT_HEAD.unpack(os.pread(file, 16, part)) == (0, 1, NUM, heads[1], 2)
    entries = [SPLIT_ENTRY.unpack(os.pread(file, 16, part + 16 + 16 * i)) for i in range(NUM)]
    assert [entries[head][0] for head in heads] == [0, 0, 1]
    assert [entries[head][2] for head in heads] == [0, 1, 2]  # the order of fetching
    assert entries[heads[1]][1] == heads[0]


def test_the_packed_region_is_as_the_document_has_it(make_pair: MakePair) -> None:
    from vhostsock.testing.packed import PackedQueue

    size, file = InflightArea.create(num_queues=2, queue_size=NUM, packed=True)
    pair = make_pair(NUM)
    with PackedQueue(pair.memory, NUM) as queue:
        try:
            pair.vring.stop()
            pair.vring.set_inflight(InflightArea(file, size=size, num_queues=2, queue_size=NUM, packed=True))
            queue.attach(pair.vring)
            one = queue.submit([b"ab", b"c"], indirect=False)
            two = queue.submit([b"d"], [5], indirect=False)
            chains = pair.vring.pop_batch(2)
            chains[0].complete()
            pair.vring.flush()
            part = lib.vs_inflight_size(True, NUM)
            assert PACKED_HEAD.unpack(os.pread(file, 32, part)) == (0, 1, NUM, 0, 0, 2, 2, 1, 1)
            entries = [PACKED_ENTRY.unpack(os.pread(file, 32, part + 32 + 32 * i)) for i in range(NUM)]
            inflight, _, last, count, counter, *_ = entries[2]
            assert (inflight, last, count, counter) == (1, 3, 2, 1)
            assert [e[0] for e in entries] == [int(i == 2) for i in range(NUM)]
            assert [(e[7], e[8], e[5], e[6] & 3) for e in entries[2:4]] == [
                (1, two.readable[0][0], two.head, 1),
                (5, two.writable[0][0], two.head, 2),
            ]
            assert queue.collect() == [one]
        finally:
            os.close(file)


# What a front-end may have put there


def poke(fd: int, packed: bool, at: int, value: bytes) -> None:
    """Overwrite bytes of queue 1's part."""
    os.pwrite(fd, value, lib.vs_inflight_size(packed, NUM) + at)


def word(value: int) -> bytes:
    return value.to_bytes(2, "little")


def three_in_flight(pair: Pair, fd: int, packed: bool) -> None:
    """Chains of 1, 2 and 1 descriptors in flight, packed in entries 0, 1 to 2, and 3; one before them was completed."""
    track(pair, fd, packed)
    pair.queue.submit([b"0"])
    assert pair.echo_all() == 1
    pair.queue.collect()
    for shape in ([b"1"], [b"2", b"2"], [b"3"]):
        pair.queue.submit(shape, indirect=False)
    assert len(pair.vring.pop_batch(9)) == 3


@pytest.mark.parametrize(
    ("at", "value", "evidence"),
    [
        (14, word(65000), "used_idx is 65000, used.idx of the ring is 1"),
        (12, word(16) + word(0), "the last batch has entry 16, past the queue size 16"),
        (12, word(65535) + word(0), "the last batch has entry 65535"),
    ],
)
def test_a_split_region_that_cannot_be_breaks_the_ring(pair: Pair, file: int, at: int, value: bytes, evidence: str) -> None:
    three_in_flight(pair, file, packed=False)
    poke(file, False, at, value)
    crash(pair)
    with pytest.raises(DriverError, match=f"in-flight region: {evidence}"):
        pair.vring.pop()


def test_an_entry_past_a_smaller_ring_breaks_it(make_pair: MakePair, file: int) -> None:
    pair = make_pair(8)
    track(pair, file, packed=False)
    poke(file, False, 16 + 16 * 9, b"\1")
    crash(pair)
    with pytest.raises(DriverError, match="entry 9 is in flight, past the queue size 8"):
        pair.vring.pop()


@pytest.mark.parametrize("packed", [True], ids=["packed"])
@pytest.mark.parametrize(
    ("at", "value", "evidence"),
    [
        (16, word(16), "used place 16 or 1 is past the queue size 16"),
        (18, word(65535), "used place 1 or 65535 is past"),
        (12, word(17) + word(17), "the free list loops, or leaves the 16 entries at 17"),
        (32 + 32 * 5 + 2, word(5), "the free list loops, or leaves the 16 entries at 5"),
        (32 + 32 * 5 + 2, word(1000), "the free list loops, or leaves the 16 entries at 1000"),
        (32 + 32 * 5 + 2, word(16), "entry 6 is neither free nor in flight"),
        (32 + 32 * 0 + 2, word(0), None),  # beside the point in a chain of one
        (32 + 32 * 0 + 6, word(0), "the chain at entry 0 is no list of 0 entries to entry 0"),
        (32 + 32 * 0 + 6, word(2), "the chain at entry 0 is no list of 2 entries to entry 0"),
        (32 + 32 * 1 + 2, word(1), "the chain at entry 1 is no list of 2 entries to entry 2"),
        (32 + 32 * 1 + 2, word(9), "the chain at entry 1 is no list of 2 entries to entry 2"),
        (32 + 32 * 1 + 4, word(60000), "the chain at entry 1 is no list of 2 entries to entry 60000"),
        (32 + 32 * 1, b"\0", "entry 1 is neither free nor in flight"),
    ],
)
def test_a_packed_region_that_cannot_be_breaks_the_ring(
    pair: Pair, file: int, at: int, value: bytes, evidence: str | None
) -> None:
    three_in_flight(pair, file, packed=True)
    poke(file, True, at, value)
    crash(pair)
    if evidence is None:
        assert len(pair.vring.pop_batch(9)) == 3
        return
    with pytest.raises(DriverError, match=f"in-flight region: {evidence}"):
        pair.vring.pop()


@pytest.mark.parametrize("packed", [True], ids=["packed"])
@pytest.mark.parametrize(
    ("at", "value", "evidence"),
    [
        (24, (1 << 63).to_bytes(8, "little"), "the buffer is not in guest memory"),
        (20, b"\xff\xff\xff\xff", "the buffer is not in guest memory"),
        (16, word(16), "buffer id 16 is past the queue size 16"),
        (18, word(4), "indirect table length 1 is not a positive multiple of 16"),
    ],
)
def test_a_descriptor_from_the_region_is_judged_as_one_from_the_ring(
    pair: Pair, file: int, at: int, value: bytes, evidence: str
) -> None:
    three_in_flight(pair, file, packed=True)
    poke(file, True, 32 + at, value)
    crash(pair)
    with pytest.raises(DriverError, match=evidence):
        pair.vring.pop()


@both_formats
@pytest.mark.parametrize(
    ("at", "value", "evidence"),
    [
        (8, word(2), f"version 2 for {NUM} descriptors, should be 1 for {NUM}"),
        (10, word(8), f"version 1 for 8 descriptors, should be 1 for {NUM}"),
    ],
)
def test_a_region_that_is_not_ours_does_not_start(
    pair: Pair, file: int, packed: bool, at: int, value: bytes, evidence: str
) -> None:
    track(pair, file, packed)
    poke(file, packed, at, value)
    with pytest.raises(FrontendError, match=f"vring 1: in-flight region, queue 1: {evidence}"):
        crash(pair)


@both_formats
def test_a_region_that_is_too_small_does_not_start(make_pair: MakePair, file: int, packed: bool) -> None:
    with pytest.raises(FrontendError, match=r"2 queues of 16 need 0x[0-9a-f]+ bytes, the message says 0x100"):
        track(make_pair(NUM), file, packed, size=0x100)
    with pytest.raises(FrontendError, match=r"in-flight region: .*the file has 0x1000 bytes"):
        track(make_pair(NUM), file, packed, size=1 << 20)
    big = make_pair(32)
    with pytest.raises(FrontendError, match="queue size 32, but the in-flight region was made for 16"):
        track(big, file, packed)
    other = make_pair(NUM, index=50)
    with pytest.raises(FrontendError, match=r"this queue's part is 0x[0-9a-f]+ bytes at 0x[0-9a-f]+"):
        track(other, file, packed)


@both_formats
def test_no_content_of_the_region_does_more_than_break_the_ring(make_pair: MakePair, file: int, packed: bool) -> None:
    draw = random.Random(1)
    pair = make_pair(NUM)
    part = lib.vs_inflight_size(packed, NUM)
    broken = 0
    track(pair, file, packed)
    for _ in range(400):
        pair.queue.submit([b"x"], [1])
        held = pair.vring.pop_batch(draw.randrange(1, 4))
        for _ in range(draw.randrange(1, 6)):
            at = draw.choice([12, 14, 16, 18, 20, 21, *range(32, part)])
            poke(file, packed, at, bytes([draw.choice([0, 1, 2, NUM - 1, NUM, 255, draw.randrange(256)])]))
        crash(pair)
        try:
            for chain in pair.vring.pop_batch(64):
                chain.complete()
            pair.vring.pop_batch(1)
            pair.vring.flush()
        except DriverError:
            broken += 1
            pair.vring.stop()
            poke(file, packed, 0, bytes(part))
            pair.queue._make_ring()
            pair.queue._pending.clear()
            pair.queue.attach(pair.vring)
        else:
            pair.queue._pending.clear()
            pair.queue._make_ring()
            poke(file, packed, 0, bytes(part))
            pair.vring.stop()
            pair.queue.attach(pair.vring)
        del held
    assert broken > 50


@both_formats
def test_a_region_that_shrinks_is_the_front_ends_fault_and_kills_nobody(pair: Pair, packed: bool) -> None:
    fd = os.memfd_create("inflight")
    try:
        os.ftruncate(fd, 0x4000)
        track(pair, fd, packed)
        os.ftruncate(fd, 0)
        pair.queue.submit([b"x"])
        pair.queue.submit([b"y"])
        assert pair.vring.pop_batch(2)  # to record them hits the hole
        with pytest.raises(FrontendError, match="truncated guest memory"):
            pair.vring.pop()
    finally:
        os.close(fd)


def test_the_region_that_we_make_cannot_change_its_size(file: int) -> None:
    seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(file, 0)


@both_formats
def test_tracking_does_not_change_under_a_running_ring(pair: Pair, file: int, packed: bool) -> None:
    area = InflightArea(file, size=0x1000, num_queues=2, queue_size=NUM, packed=packed)
    with pytest.raises(FrontendError, match="cannot change while the ring runs"):
        pair.vring.set_inflight(area)
    area.close()
