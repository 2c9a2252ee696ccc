# SPDX-License-Identifier: BSD-3-Clause
"""Hostile drivers: what a guest can write into its rings. No sentence lets a back-end die or spin of it.

Each case writes one impossibility, kicks, stops the ring (a back-end that spins does not answer) and asks for a sign of life.
Whether the ring is broken then or goes on is the back-end's choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ..proto import VirtioFeature
from ..testing.driver import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DriverQueue
from ..testing.frontend import BackendGone, Refused
from .check import Check, Probe
from .connection import Connection

__all__ = ["CHECKS"]

Case = Callable[[Connection, DriverQueue], None]
NOWHERE = 1 << 50


def _page(connection: Connection) -> int:
    return connection.memory.alloc(4096)


def _looped(connection: Connection, queue: DriverQueue) -> None:
    """Two descriptors, each the other's next."""
    page = _page(connection)
    queue.write_desc(0, page, 16, DESC_NEXT, 1)
    queue.write_desc(1, page, 16, DESC_NEXT, 0)
    queue.offer(0)


def _next_out_of_range(connection: Connection, queue: DriverQueue) -> None:
    queue.write_desc(0, _page(connection), 16, DESC_NEXT, 0xFFFF)
    queue.offer(0)


def _head_out_of_range(connection: Connection, queue: DriverQueue) -> None:
    queue.offer(0xFFFF)


def _outside(connection: Connection, queue: DriverQueue) -> None:
    queue.write_desc(0, NOWHERE, 4096, 0)
    queue.offer(0)


def _outside_to_write(connection: Connection, queue: DriverQueue) -> None:
    queue.write_desc(0, _page(connection), 64, DESC_NEXT, 1)
    queue.write_desc(1, NOWHERE, 4096, DESC_WRITE)
    queue.offer(0)


def _overflow(connection: Connection, queue: DriverQueue) -> None:
    queue.write_desc(0, (1 << 64) - 16, 0xFFFF_FFFF, DESC_WRITE)
    queue.offer(0)


def _beyond_the_end(connection: Connection, queue: DriverQueue) -> None:
    region = connection.memory.regions[0]
    queue.write_desc(0, region.gpa + region.size - 16, 4096, 0)
    queue.offer(0)


def _empty(connection: Connection, queue: DriverQueue) -> None:
    queue.write_desc(0, _page(connection), 0, 0)
    queue.offer(0)


def _writable_first(connection: Connection, queue: DriverQueue) -> None:
    page = _page(connection)
    queue.write_desc(0, page, 512, DESC_WRITE | DESC_NEXT, 1)
    queue.write_desc(1, page, 16, 0)
    queue.offer(0)


def _only_readable(connection: Connection, queue: DriverQueue) -> None:
    queue.write_desc(0, _page(connection), 1, 0)
    queue.offer(0)


def _only_writable(connection: Connection, queue: DriverQueue) -> None:
    queue.write_desc(0, _page(connection), 1, DESC_WRITE)
    queue.offer(0)


def _noise(connection: Connection, queue: DriverQueue) -> None:
    page = _page(connection)
    connection.memory.write(page, b"\xff" * 4096)
    queue.write_desc(0, page, 4096, DESC_NEXT, 1)
    queue.write_desc(1, page, 4096, DESC_WRITE)
    queue.offer(0)


Entry = tuple[int, int, int, int]  # address, length, flags, next


def _table(connection: Connection, queue: DriverQueue, entries: list[Entry], size: int | None = None) -> None:
    """Offer an indirect table; ``size``: what its descriptor says, if that is not its length."""
    table = _page(connection)
    data = b"".join(
        address.to_bytes(8, "little") + length.to_bytes(4, "little") + flags.to_bytes(2, "little") + after.to_bytes(2, "little")
        for address, length, flags, after in entries
    )
    connection.memory.write(table, data)
    queue.write_desc(0, table, len(data) if size is None else size, DESC_INDIRECT)
    queue.offer(0)


def _indirect_empty(connection: Connection, queue: DriverQueue) -> None:
    _table(connection, queue, [(_page(connection), 16, 0, 0)], size=0)


def _indirect_odd(connection: Connection, queue: DriverQueue) -> None:
    _table(connection, queue, [(_page(connection), 16, DESC_NEXT, 1)] * 2, size=24)


def _indirect_loop(connection: Connection, queue: DriverQueue) -> None:
    _table(connection, queue, [(_page(connection), 16, DESC_NEXT, 1), (_page(connection), 16, DESC_NEXT, 0)])


def _indirect_in_indirect(connection: Connection, queue: DriverQueue) -> None:
    inner = _page(connection)
    _table(connection, queue, [(inner, 16, DESC_INDIRECT, 0)])


def _indirect_outside(connection: Connection, queue: DriverQueue) -> None:
    queue.write_desc(0, NOWHERE, 64, DESC_INDIRECT)
    queue.offer(0)


def _indirect_huge(connection: Connection, queue: DriverQueue) -> None:
    queue.write_desc(0, connection.memory.regions[0].gpa, 0xFFFF_FFF0, DESC_INDIRECT)
    queue.offer(0)


def _index_jump(connection: Connection, queue: DriverQueue) -> None:
    """More requests than the ring has descriptors."""
    queue.write_desc(0, _page(connection), 16, 0)
    for _ in range(queue.num + 7):
        queue.offer(0)


async def _each(probe: Probe, cases: tuple[Case, ...]) -> None:
    for case in cases:
        connection = await probe.running()
        probe.transcript.note(f"the driver: {case.__name__.strip('_').replace('_', ' ')}")
        queue = probe.ring(connection)
        case(connection, queue)
        with contextlib.suppress(BackendGone, Refused):
            connection.kick(queue)
            await connection.settled()
            await connection.stop_ring(probe.traffic.queue)
        await probe.outlived(connection)
        connection.close()
        await probe.renewed()


async def chains_that_loop_or_leave_the_table_are_borne(probe: Probe) -> None:
    """A chain that is a circle, a next and a head outside of the table."""
    await _each(probe, (_looped, _next_out_of_range, _head_out_of_range))


async def buffers_outside_of_memory_are_borne(probe: Probe) -> None:
    """Buffers where no memory is, across its end, and beyond 2^64."""
    await _each(probe, (_outside, _outside_to_write, _overflow, _beyond_the_end))


async def requests_that_make_no_sense_to_the_device_are_borne(probe: Probe) -> None:
    """Buffers of 0 and of 1 byte, a writable one before a readable one, nothing to write into, 0xff all over."""
    await _each(probe, (_empty, _only_readable, _only_writable, _writable_first, _noise))


async def an_available_index_that_jumps_is_borne(probe: Probe) -> None:
    """avail.idx moves by more than the ring has descriptors."""
    await _each(probe, (_index_jump,))


async def indirect_tables_that_cannot_be_are_borne(probe: Probe) -> None:
    """Empty, of 24 bytes, of 4 GiB, in circles, within each other, and where no memory is."""
    cases = (_indirect_empty, _indirect_odd, _indirect_loop, _indirect_in_indirect, _indirect_outside, _indirect_huge)
    await _each(probe, cases)


_SAFETY = "a driver's mistake breaks its ring, not the back-end"
CHECKS = (
    Check(chains_that_loop_or_leave_the_table_are_borne, _SAFETY, traffic=True, hostile=True),
    Check(buffers_outside_of_memory_are_borne, _SAFETY, traffic=True, hostile=True),
    Check(requests_that_make_no_sense_to_the_device_are_borne, _SAFETY, traffic=True, hostile=True),
    Check(an_available_index_that_jumps_is_borne, _SAFETY, traffic=True, hostile=True),
    Check(indirect_tables_that_cannot_be_are_borne, _SAFETY, features=VirtioFeature.INDIRECT_DESC, traffic=True, hostile=True),
)
