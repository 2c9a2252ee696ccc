# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the memory table and of memory slots."""

from __future__ import annotations

import dataclasses
import os

from ..proto import ProtocolFeature, Request
from ..testing.driver import GuestMemory
from ..testing.memory import Region
from .check import Check, Probe
from .connection import Connection, Failed, region_body

__all__ = ["CHECKS"]

P = ProtocolFeature
PAGE = 4096
MOST_SLOTS = 512  # that are filled; more is promised by nobody known


async def a_table_of_eight_regions_is_taken(probe: Probe) -> None:
    """SET_MEM_TABLE with as many regions as a message can have."""
    connection = await probe.negotiated(memory=(1 << 20,) * 8)
    await connection.set_features()
    await connection.send_table(connection.memory.regions)


async def a_table_replaces_the_one_before(probe: Probe) -> None:
    """A second SET_MEM_TABLE with the same front-end addresses in another file: requests are served from the new memory."""
    connection = await probe.negotiated()
    await connection.set_features()
    with GuestMemory(1 << 22) as other:
        await connection.send_table(other.regions)
    await connection.send_table(connection.memory.regions)
    await connection.set_up()
    await probe.exchange(connection)


async def memory_behind_an_offset_of_its_file_is_found(probe: Probe) -> None:
    """A region whose mmap offset is not 0, as a guest's memory above 4 GiB has it, holds the rings."""
    connection = await probe.negotiated()
    await connection.set_features()
    await connection.send_table(_halves(connection))
    await connection.set_up()
    await probe.exchange(connection, 8)


async def the_regions_of_a_table_may_come_in_any_order(probe: Probe) -> None:
    """Nothing says that SET_MEM_TABLE is sorted by address."""
    connection = await probe.negotiated()
    await connection.set_features()
    await connection.send_table(_halves(connection)[::-1])
    await connection.set_up()
    await probe.exchange(connection)


def _halves(connection: Connection) -> list[Region]:
    """The connection's memory as two regions, the rings anew in the second one."""
    [whole] = connection.memory.regions
    half = whole.size // 2
    connection.memory.alloc(half)
    connection.renew_queues()
    low = dataclasses.replace(whole, size=half)
    return [low, dataclasses.replace(whole, gpa=whole.gpa + half, uva=whole.uva + half, size=half, offset=half)]


async def memory_is_added_and_removed_by_slots(probe: Probe) -> None:
    """ADD_MEM_REG of two regions, REM_MEM_REG of the one that no ring needs, by address and size, without a descriptor."""
    connection = await probe.negotiated(memory=(1 << 22, 1 << 20))
    await connection.set_up()
    await probe.exchange(connection)
    await connection.remove_region(connection.memory.regions[1])
    await probe.exchange(connection)


async def a_removed_region_may_be_added_again(probe: Probe) -> None:
    """What REM_MEM_REG has removed is no region any more: ADD_MEM_REG of another file at the same place is carried out."""
    connection = await probe.negotiated(memory=(1 << 20, 1 << 20))
    await connection.set_features()
    await connection.send_memory()
    with GuestMemory(1 << 20) as other:
        region = connection.memory.regions[1]
        for fd in (other.regions[0].fd, region.fd, other.regions[0].fd):
            await connection.remove_region(region)
            await connection.add_region(dataclasses.replace(region, fd=fd, offset=0))


async def as_many_slots_as_promised_can_be_filled(probe: Probe) -> None:
    """ADD_MEM_REG as often as GET_MAX_MEM_SLOTS says."""
    connection = await probe.negotiated(memory=(1 << 20,))
    await connection.set_features()
    slots = min(await connection.get_u64(Request.GET_MAX_MEM_SLOTS), MOST_SLOTS)
    if not slots:
        raise Failed("GET_MAX_MEM_SLOTS says 0")
    file = os.memfd_create("vhostsock-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, slots * PAGE)
        for slot in range(slots):
            region = Region(file, slot * PAGE, PAGE, 0x10_0000_0000 + slot * PAGE, slot * PAGE)
            await connection.add_region(region)
    finally:
        os.close(file)


async def a_region_that_is_not_there_cannot_be_removed(probe: Probe) -> None:
    """REM_MEM_REG of what was never added is told to have failed."""
    connection = await probe.negotiated(memory=(1 << 20, 1 << 20))
    await connection.set_features()
    await connection.send_memory()
    stranger = dataclasses.replace(connection.memory.regions[0], gpa=1 << 50, uva=1 << 45)
    await probe.refused(connection, Request.REM_MEM_REG, region_body(stranger), why="the removal of an unknown region")


_SLOTS = P.CONFIGURE_MEM_SLOTS
CHECKS = (
    Check(a_table_of_eight_regions_is_taken, "SET_MEM_TABLE"),
    Check(a_table_replaces_the_one_before, "SET_MEM_TABLE", traffic=True),
    Check(memory_behind_an_offset_of_its_file_is_found, "Memory region description", traffic=True),
    Check(the_regions_of_a_table_may_come_in_any_order, "SET_MEM_TABLE", traffic=True),
    Check(memory_is_added_and_removed_by_slots, "ADD_MEM_REG; REM_MEM_REG", _SLOTS, traffic=True),
    Check(a_removed_region_may_be_added_again, "ADD_MEM_REG; REM_MEM_REG", _SLOTS),
    Check(as_many_slots_as_promised_can_be_filled, "GET_MAX_MEM_SLOTS", _SLOTS),
    Check(a_region_that_is_not_there_cannot_be_removed, "REM_MEM_REG", _SLOTS | P.REPLY_ACK),
)
