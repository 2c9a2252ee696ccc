# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what may lie in a ring: requests cut into descriptors, indirect tables, event indices, the packed format."""

from __future__ import annotations

import asyncio
import struct

from ..proto import VirtioFeature
from .check import Check, Probe
from .connection import POLL, Connection, Failed

__all__ = ["CHECKS"]

V = VirtioFeature
SIZE = 64  # descriptors
PIECE = 7  # bytes; no structure of any device has a multiple of it


async def a_request_may_be_cut_into_descriptors_anywhere(probe: Probe) -> None:
    """The same request in pieces of 7 bytes: what a descriptor holds says nothing about what it means."""
    connection = await probe.running(size=256)
    for _ in range(3):
        await probe.exchange(connection, cut=PIECE)


async def requests_in_indirect_tables_are_completed(probe: Probe) -> None:
    """A table of descriptors in one descriptor, mixed with ordinary ones."""
    connection = await probe.running()
    for count in (1, 10, 30):
        await probe.exchange(connection, count, indirect=True)
        await probe.exchange(connection, 3)


async def an_indirect_table_may_be_longer_than_a_few(probe: Probe) -> None:
    """A request in pieces of 7 bytes in a table of its own, in a ring that has no more descriptors than needed."""
    connection = await probe.running(size=256)
    await probe.exchange(connection, 8, cut=PIECE, indirect=True)


async def event_indices_lose_no_kick_and_no_call(probe: Probe) -> None:
    """EVENT_IDX: the driver kicks only where avail_event asks, and is called where used_event does; nothing gets stuck."""
    connection = await probe.running()
    for round in range(100):
        await probe.exchange(connection, 1 + round * 7 % 13)


async def a_packed_ring_completes_requests(probe: Probe) -> None:
    """The packed format: single requests, batches, and many times around the ring."""
    connection = await probe.running()
    for count in (1, 2, 5, 13, 20) * 6:
        await probe.exchange(connection, count)


async def a_packed_ring_goes_on_at_its_base(probe: Probe) -> None:
    """GET_VRING_BASE gives both places with their wrap counters, and SET_VRING_BASE takes them."""
    connection = await probe.running()
    slots = 0
    for count in (3, 20, 20, 1):
        for _ in range(count):
            number, request = probe.add(connection)
            slots += len(request.readable) + len(request.writable)
            await _to_its_end(probe, connection)
            probe.judge(number, request)
        base = await connection.stop_ring(probe.traffic.queue)
        place = slots % SIZE | (1 - slots // SIZE % 2) << 15  # the wrap counter starts as 1 and flips at each end
        if base != place | place << 16:
            raise Failed(f"after {slots} descriptors of {SIZE} the base is {base:#x}, not {place | place << 16:#x}")
        await connection.set_up_ring(probe.traffic.queue)
        await connection.enable(probe.traffic.queue, True)


async def _to_its_end(probe: Probe, connection: Connection) -> None:
    queue = probe.ring(connection)
    queue.publish()
    queue.kick()
    await probe.completions(connection)


async def a_packed_ring_takes_indirect_tables(probe: Probe) -> None:
    """Both formats' features together: a table in one packed descriptor, also with event indices where they are offered."""
    connection = await probe.running()
    for count in (1, 10, 30):
        await probe.exchange(connection, count, indirect=True)
        await probe.exchange(connection, 3)


async def requests_are_used_in_the_order_in_which_they_were_made(probe: Probe) -> None:
    """IN_ORDER: what is used at any time is all that was made up to some request, each alone or by its batch's last one."""
    connection = await probe.running()
    queue, memory = probe.ring(connection), connection.memory
    made = [probe.add(connection) for _ in range(10)]
    heads = [request.head for _, request in made]
    connection.kick(queue)
    place = 0
    while place < len(made):
        used = queue.used_idx
        while place < used:  # the element names the last one of a batch, whose other places are skipped
            head, _ = struct.unpack("<II", memory.read(queue.used + 4 + 8 * place, 8))
            if head not in heads[place:used]:
                raise Failed(
                    f"with used.idx {used}, used.ring[{place}] is descriptor {head}, which is none of {heads[place:used]}"
                )
            place = heads.index(head) + 1
        await asyncio.sleep(POLL)
    for number, request in made:
        request.data = b"".join(memory.read(gpa, size) for gpa, size in request.writable)
        probe.judge(number, request)


CHECKS = (
    Check(a_request_may_be_cut_into_descriptors_anywhere, "virtio 1.3, 2.7.4", traffic=True),
    Check(requests_in_indirect_tables_are_completed, "virtio 1.3, 2.7.5.3", features=V.INDIRECT_DESC, traffic=True),
    Check(an_indirect_table_may_be_longer_than_a_few, "virtio 1.3, 2.7.5.3", features=V.INDIRECT_DESC, traffic=True),
    Check(event_indices_lose_no_kick_and_no_call, "virtio 1.3, 2.7.7, 2.7.10", features=V.EVENT_IDX, traffic=True),
    Check(a_packed_ring_completes_requests, "virtio 1.3, 2.8", features=V.RING_PACKED, traffic=True),
    Check(a_packed_ring_goes_on_at_its_base, "GET_VRING_BASE", features=V.RING_PACKED, traffic=True),
    Check(a_packed_ring_takes_indirect_tables, "virtio 1.3, 2.8.19", features=V.RING_PACKED | V.INDIRECT_DESC, traffic=True),
    Check(requests_are_used_in_the_order_in_which_they_were_made, "virtio 1.3, 2.7.9", features=V.IN_ORDER, traffic=True),
)
