"""The disk against a model of it, a bytearray: any sequence of requests, in any layout, several at once, does both the same."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.aio import LIMIT
from tests.blk.disk import DISCARD, FLUSH, IN, IOERR, OK, OUT, SECTOR, UNMAP, WRITE_ZEROES, Disk, disk, header, segment

SIZE = 32  # sectors

# a request: kind, sector, sectors, seed of the data and of where they are cut
Op = tuple[int, int, int, int]
OPS = st.lists(
    st.tuples(
        st.sampled_from([IN, IN, OUT, OUT, FLUSH, WRITE_ZEROES]), st.integers(0, SIZE), st.integers(1, 6), st.integers(0, 99)
    ),
    min_size=1, max_size=12,
)  # fmt: skip


def pieces(data: bytes, seed: int) -> list[bytes]:
    step = 24 + seed * 37 % 1500  # at most 129 pieces: the queue has 256 descriptors
    return [data[i : i + step] for i in range(0, len(data), step)]


def room(size: int, seed: int) -> list[int]:
    return [len(piece) for piece in pieces(bytes(size), seed)]


async def play(d: Disk, ops: Sequence[Op], model: bytearray) -> None:
    """Requests that do not touch one another's sectors go together; the model says what each must find."""
    driver = d.frontend.queues[0]
    expected: dict[object, bytes] = {}
    busy: set[int] = set()

    async def settle() -> None:
        driver.publish()
        driver.kick()
        for done in await driver.wait_async(driver.in_flight):
            assert done.data == expected.pop(done)
        busy.clear()
        assert d.image.read_bytes() == model

    for kind, sector, count, seed in ops:
        touched = set(range(sector, sector + count)) if kind != FLUSH else set(range(SIZE))
        inside = sector + count <= SIZE or kind == FLUSH
        if touched & busy or driver.free < 2:
            await settle()
        busy |= touched
        status = bytes([OK if inside else IOERR])
        span = slice(sector * SECTOR, (sector + count) * SECTOR)
        if kind == IN:
            sent = driver.add(pieces(header(IN, sector), seed), room(count * SECTOR + 1, seed))
            expected[sent] = (bytes(model[span]) if inside else bytes(count * SECTOR)) + status
            continue
        data = {OUT: bytes([seed]) * count * SECTOR, FLUSH: b""}.get(kind, segment(sector, count, UNMAP if seed % 2 else 0))
        sent = driver.add(pieces(header(kind, sector) + data, seed), [1])
        expected[sent] = status
        if inside and kind != FLUSH:
            model[span] = data if kind == OUT else bytes(count * SECTOR)
    await settle()
    assert not expected


@settings(max_examples=40, deadline=None)
@given(ops=OPS, packed=st.booleans())
def test_any_sequence_of_requests_leaves_what_a_bytearray_would_have(ops: list[Op], packed: bool) -> None:
    async def run() -> None:
        first = bytes(range(256)) * (SIZE * SECTOR // 256)
        with tempfile.TemporaryDirectory() as folder:
            async with disk(Path(folder), first, frontend={"accept": ~0, "size": 256} if packed else {"size": 256}) as d:
                await play(d, ops, bytearray(first))
                assert await d.status([header(DISCARD), segment(0, SIZE)]) == OK

    asyncio.run(asyncio.wait_for(run(), LIMIT))
