# SPDX-License-Identifier: BSD-3-Clause
"""Hostile front-ends: messages that break the rules. The back-end may end the session; it may not die, hang, or say "done".

Each table below is one check of several cases, each case on a connection of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
from collections.abc import Callable, Iterator

from ..proto import ProtocolFeature, Request, VirtioFeature, wire
from ..testing.driver import Region
from ..testing.frontend import BackendGone
from .check import Check, Probe
from .connection import Connection, Failed, region_body, table_body

__all__ = ["CHECKS"]

P = ProtocolFeature
HUGE = 0xFFFF_FFFF
U64_TOP = (1 << 64) - 4096
R = Request


def _state(index: int, num: int = 0) -> bytes:
    return bytes(wire.VRING_STATE.build({"index": index, "num": num}))


def _address(index: int, desc: int, used: int, avail: int) -> bytes:
    return bytes(wire.ADDRESS.build({"index": index, "flags": 0, "desc": desc, "used": used, "avail": avail, "log": 0}))


@contextlib.contextmanager
def _file(size: int) -> Iterator[int]:
    fd = os.memfd_create("vhostsock-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _eventfds(count: int = 1) -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


async def _ready(probe: Probe) -> Connection:
    """A connection on which anything could be set up now."""
    connection = await probe.negotiated()
    await connection.set_features()
    await connection.send_memory()
    return connection


async def a_ring_that_does_not_exist_is_refused(probe: Probe) -> None:
    """Each message that names a ring names one far beyond the last; index 255 where there are 8 bits for it."""
    for request in (R.SET_VRING_NUM, R.SET_VRING_BASE, R.SET_VRING_ADDR, R.SET_VRING_ENABLE):
        for index in (0x10000, HUGE):
            connection = await _ready(probe)
            body = _address(index, *connection.queues[0].addresses) if request is R.SET_VRING_ADDR else _state(index, 1)
            await probe.refused(connection, request, body, why=f"{request.name} of ring {index:#x}")
            connection.close()
            await probe.renewed()


async def a_base_of_a_ring_that_does_not_exist_is_not_told(probe: Probe) -> None:
    """GET_VRING_BASE of ring 0x10000."""
    connection = await _ready(probe)
    await connection.call(R.GET_VRING_BASE, _state(0x10000))
    with contextlib.suppress(BackendGone):
        reply = await connection.raw_reply(R.GET_VRING_BASE)
        if len(reply) == 8 and reply != bytes(8):
            index, base = struct.unpack("=II", reply)
            raise Failed(f"it was answered with ring {index:#x}, base {base}")


async def descriptors_for_rings_that_do_not_exist_are_refused(probe: Probe) -> None:
    """SET_VRING_KICK, CALL and ERR for ring 255."""
    for request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR):
        if (probe.offer.queues or 0) > 255:
            return
        connection = await _ready(probe)
        with _eventfds() as fds:
            await probe.refused(connection, request, wire.U64.build(255), tuple(fds), why=f"{request.name} of ring 255")
        connection.close()
        await probe.renewed()


async def impossible_ring_sizes_are_refused(probe: Probe) -> None:
    """SET_VRING_NUM 0, 65536 and 2^32-1: told to have failed then, or at the start of the ring."""
    for num in (0, 65536, HUGE):
        connection = await _ready(probe)
        with contextlib.suppress(BackendGone):
            if not await connection.ack_of(R.SET_VRING_NUM, _state(0, num)):
                await _must_not_start(connection, f"a ring of {num} descriptors")
        await probe.outlived(connection)
        connection.close()
        await probe.renewed()


async def _must_not_start(connection: Connection, what: str) -> None:
    queue = connection.queues[0]
    if await connection.ack_of(R.SET_VRING_ADDR, wire.ADDRESS.build(connection.address(0))):
        return
    if await connection.ack_of(R.SET_VRING_CALL, wire.U64.build(0), [queue.call_fd]):
        return
    if await connection.ack_of(R.SET_VRING_KICK, wire.U64.build(0), [queue.kick_fd]):
        return
    if await connection.ack_of(R.SET_VRING_ENABLE, _state(0, 1)):
        return
    raise Failed(f"{what} was set up, started and enabled, and all of it acked with 0")


async def rings_outside_of_memory_are_borne(probe: Probe) -> None:
    """Rings where nothing is, across the end of memory, and where adding their size overflows: started, enabled and kicked."""
    for place in (1 << 50, U64_TOP, None):
        connection = await _ready(probe)
        region, queue = connection.memory.regions[0], connection.queues[0]
        at = region.uva + region.size - 16 if place is None else place
        with contextlib.suppress(BackendGone):
            await connection.ack_of(R.SET_VRING_NUM, _state(0, 64))
            await connection.ack_of(R.SET_VRING_ADDR, _address(0, at, at, at))
            await connection.ack_of(R.SET_VRING_KICK, wire.U64.build(0), [queue.kick_fd])
            await connection.ack_of(R.SET_VRING_ENABLE, _state(0, 1))
            os.eventfd_write(queue.kick_fd, 1)
            await connection.settled()
            await connection.stop_ring(0)
        await probe.outlived(connection)
        connection.close()
        await probe.renewed()


async def a_kick_of_a_ring_that_is_not_set_up_is_borne(probe: Probe) -> None:
    """SET_VRING_KICK and SET_VRING_ENABLE with no size, no addresses and no memory, then a kick."""
    connection = await probe.negotiated()
    await connection.set_features()
    queue = connection.queues[0]
    with contextlib.suppress(BackendGone):
        await connection.ack_of(R.SET_VRING_KICK, wire.U64.build(0), [queue.kick_fd])
        await connection.ack_of(R.SET_VRING_ENABLE, _state(0, 1))
        os.eventfd_write(queue.kick_fd, 1)
        await connection.stop_ring(0)
    await probe.outlived(connection)


async def features_that_were_not_offered_are_refused(probe: Probe) -> None:
    """SET_FEATURES with a bit of no meaning (63)."""
    bit = 1 << 63
    if int(probe.offer.features) & bit:
        bit = 1 << 49
    connection = await probe.negotiated()
    body = wire.U64.build(connection.features | bit)
    await probe.refused(connection, R.SET_FEATURES, body, why=f"feature bit {bit.bit_length() - 1}, which was not offered,")


async def requests_that_nobody_knows_are_borne(probe: Probe) -> None:
    """Requests 0, 77 and 2^32-1: refused, ignored or the end of the session."""
    for request in (0, 77, HUGE):
        connection = await probe.negotiated()
        await connection.call(request, bytes(8))
        await probe.outlived(connection)
        connection.close()
        await probe.renewed()


async def other_versions_are_borne(probe: Probe) -> None:
    """Flags of version 0, 2 and 3, and a request that says it is a reply."""
    for flags in (0, 2, 3, 5, 0xFFFF_FFF1):
        connection = await probe.negotiated()
        await connection.call(R.SET_VRING_NUM, _state(0, 64), flags=flags)
        await probe.outlived(connection)
        connection.close()
        await probe.renewed()


async def payloads_that_are_too_short_are_borne(probe: Probe) -> None:
    """Each message with a payload comes with 4 bytes of it, and with none."""
    for request in (R.SET_FEATURES, R.SET_MEM_TABLE, R.SET_VRING_NUM, R.SET_VRING_ADDR, R.SET_VRING_KICK, R.GET_VRING_BASE):
        for size in (0, 4):
            connection = await probe.negotiated()
            await connection.call(request, bytes(size))
            await probe.outlived(connection)
            connection.close()
            await probe.renewed()


async def payloads_that_are_too_long_are_borne(probe: Probe) -> None:
    """SET_VRING_NUM with 4000 bytes, GET_FEATURES with 8, and a header that announces 4 GiB of which 64 KiB come."""
    for request, size in ((R.SET_VRING_NUM, 4000), (R.GET_FEATURES, 8), (R.SET_MEM_TABLE, 16000)):
        connection = await probe.negotiated()
        with contextlib.suppress(BackendGone):
            await connection.call(request, bytes(size))
            if request is R.GET_FEATURES:
                await connection.raw_reply(request)
        await probe.outlived(connection)
        connection.close()
        await probe.renewed()
    connection = await probe.negotiated()
    with contextlib.suppress(BackendGone):
        await connection.send(wire.HEADER.build({"request": R.SET_MEM_TABLE, "flags": 1, "size": HUGE}) + bytes(65536))
    connection.close()


async def a_front_end_that_leaves_within_a_message_is_borne(probe: Probe) -> None:
    """The connection ends after 5 bytes of a header, after the header, and within the payload."""
    message = wire.pack(R.SET_VRING_NUM, wire.REQUEST_FLAGS, wire.VRING_STATE, {"index": 0, "num": 64})
    for length in (5, wire.HEADER_SIZE, len(message) - 1):
        connection = await probe.negotiated()
        await connection.send(message[:length])
        connection.close()
        await probe.renewed()


_BAD_TABLES: dict[str, Callable[[Region], list[Region]]] = {
    "a region that ends beyond 2^64": lambda r: [dataclasses.replace(r, gpa=U64_TOP)],
    "a region whose front-end addresses end beyond 2^64": lambda r: [dataclasses.replace(r, uva=U64_TOP)],
    "a region of 2^63 bytes": lambda r: [dataclasses.replace(r, size=1 << 63)],
    "a region whose offset and size overflow": lambda r: [dataclasses.replace(r, offset=U64_TOP)],
    "two regions at one address": lambda r: [r, r],
}


async def impossible_memory_is_refused(probe: Probe) -> None:
    """SET_MEM_TABLE with overlaps and with sums beyond 2^64."""
    for what, make in _BAD_TABLES.items():
        connection = await probe.negotiated()
        await connection.set_features()
        regions = make(connection.memory.regions[0])
        fds = tuple(region.fd for region in regions)
        await probe.refused(connection, R.SET_MEM_TABLE, table_body(regions), fds, why=what)
        connection.close()
        await probe.renewed()


async def tables_that_contradict_themselves_are_refused(probe: Probe) -> None:
    """SET_MEM_TABLE that says 2^32-1 regions and has one, 9 that have 8 descriptors, and 2 that have one."""
    for count, sent, fds in ((HUGE, 1, 1), (9, 9, 8), (2, 2, 1)):
        connection = await probe.negotiated()
        await connection.set_features()
        region = connection.memory.regions[0]
        regions = [dataclasses.replace(region, size=4096, gpa=i << 20, uva=0x7000_0000_0000 + (i << 20)) for i in range(sent)]
        body = struct.pack("=I", count) + table_body(regions)[4:]
        why = f"a table of {count} regions with {fds} descriptors"
        await probe.refused(connection, R.SET_MEM_TABLE, body, (region.fd,) * fds, why=why)
        connection.close()
        await probe.renewed()


class _Refused(Exception):
    """The back-end has refused: there is no more to try."""


async def memory_that_ends_before_its_region_does_not_kill(probe: Probe) -> None:
    """A region of 4 MiB whose file has 4 KiB, with the rings beyond its end: touching them raises SIGBUS."""
    connection = await probe.negotiated()
    await connection.set_features()
    with _file(4096) as fd, contextlib.suppress(BackendGone, _Refused):
        region = dataclasses.replace(connection.memory.regions[0], fd=fd)
        if await connection.ack_of(R.SET_MEM_TABLE, table_body([region]), [fd]):
            raise _Refused
        queue = connection.queues[0]
        for request, body, fds in (
            (R.SET_VRING_NUM, _state(0, 64), []),
            (R.SET_VRING_BASE, _state(0, 0), []),
            (R.SET_VRING_ADDR, wire.ADDRESS.build(connection.address(0) | _beyond(region)), []),
            (R.SET_VRING_CALL, wire.U64.build(0), [queue.call_fd]),
            (R.SET_VRING_KICK, wire.U64.build(0), [queue.kick_fd]),
            (R.SET_VRING_ENABLE, _state(0, 1), []),
        ):
            if await connection.ack_of(request, body, fds):
                raise _Refused
        os.eventfd_write(queue.kick_fd, 1)
        await connection.stop_ring(0)
    await probe.outlived(connection)


def _beyond(region: Region) -> dict[str, int]:
    middle = region.uva + region.size // 2
    return {"desc": middle, "avail": middle + 0x10000, "used": middle + 0x20000}


async def descriptors_of_the_wrong_kind_are_borne(probe: Probe) -> None:
    """Memory from a pipe and from a socket; a kick and a call descriptor that are files."""
    connection = await probe.negotiated()
    await connection.set_features()
    region = connection.memory.regions[0]
    ends = os.pipe2(os.O_CLOEXEC)
    try:
        await probe.refused(connection, R.SET_MEM_TABLE, table_body([region]), (ends[0],), why="memory from a pipe")
    finally:
        os.close(ends[0])
        os.close(ends[1])
    connection.close()
    await probe.renewed()
    for request in (R.SET_VRING_CALL, R.SET_VRING_ERR, R.SET_VRING_KICK):
        connection = await _ready(probe)
        with _file(4096) as fd, contextlib.suppress(BackendGone):
            await connection.ack_of(request, wire.U64.build(0), [fd])
            await connection.stop_ring(0)
        await probe.outlived(connection)
        connection.close()
        await probe.renewed()


async def a_region_over_another_is_refused(probe: Probe) -> None:
    """ADD_MEM_REG of another file at addresses where memory is already. (The same once more is what QEMU 7.2 sends.)"""
    connection = await _ready(probe)
    region = connection.memory.regions[0]
    with _file(region.offset + region.size) as fd:
        await probe.refused(connection, R.ADD_MEM_REG, region_body(region), (fd,), why="an overlapping region")


async def a_region_without_a_descriptor_is_refused(probe: Probe) -> None:
    """ADD_MEM_REG, with which exactly one descriptor comes, with none and with two."""
    for count in (0, 2):
        connection = await _ready(probe)
        region = dataclasses.replace(connection.memory.regions[0], gpa=1 << 40, uva=1 << 46)
        fds = (region.fd,) * count
        await probe.refused(connection, R.ADD_MEM_REG, region_body(region), fds, why=f"a region with {count} descriptors")
        connection.close()
        await probe.renewed()


async def config_accesses_of_absurd_size_are_borne(probe: Probe) -> None:
    """GET_CONFIG and SET_CONFIG whose size says 4 GiB, with 4 bytes of payload, and SET_CONFIG far behind any space."""
    for request in (R.GET_CONFIG, R.SET_CONFIG):
        for offset, size in ((0, HUGE), (HUGE - 3, 4)):
            connection = await probe.negotiated()
            with contextlib.suppress(BackendGone):
                await connection.call(request, struct.pack("=III4s", offset, size, 0, bytes(4)))
                if request is R.GET_CONFIG:
                    await connection.raw_reply(request)
            await probe.outlived(connection)
            connection.close()
            await probe.renewed()


async def a_log_that_does_not_lie_in_its_file_does_not_kill(probe: Probe) -> None:
    """SET_LOG_BASE of 1 MiB in a file of 4 KiB, and with offset and size that overflow."""
    for size, offset in ((1 << 20, 0), (U64_TOP, U64_TOP), (1 << 63, 0)):
        connection = await _ready(probe)
        with _file(4096) as fd, contextlib.suppress(BackendGone):
            await connection.call(R.SET_LOG_BASE, struct.pack("=QQ", size, offset), [fd])
            await connection.raw_reply(R.SET_LOG_BASE)
        await probe.outlived(connection)
        connection.close()
        await probe.renewed()


async def an_inflight_buffer_of_absurd_size_is_not_made(probe: Probe) -> None:
    """GET_INFLIGHT_FD for 65535 queues of 65535, and SET_INFLIGHT_FD of a buffer larger than its file."""
    for queues, size in ((65535, 65535), (0, 0)):
        connection = await _ready(probe)
        with contextlib.suppress(BackendGone):
            await connection.call(R.GET_INFLIGHT_FD, struct.pack("=QQHH4x", 0, 0, queues, size))
            await connection.raw_reply(R.GET_INFLIGHT_FD)
        await probe.outlived(connection)
        connection.close()
        await probe.renewed()
    connection = await _ready(probe)
    with _file(4096) as fd, contextlib.suppress(BackendGone):
        await connection.ack_of(R.SET_INFLIGHT_FD, struct.pack("=QQHH4x", 1 << 30, 0, 1, 64), [fd])
    await probe.outlived(connection)


async def descriptors_that_nobody_asked_for_are_closed(probe: Probe) -> None:
    """Eight descriptors with GET_FEATURES, sixteen times: afterwards the back-end has no more open than before."""
    connection = await probe.negotiated()
    await connection.settled()
    before = probe.open_files()
    with _eventfds(8) as fds, contextlib.suppress(BackendGone):
        for _ in range(16):
            await connection.call(R.GET_FEATURES, fds=fds)
            await connection.raw_reply(R.GET_FEATURES)
    connection.close()
    if probe.target.ends_with_its_front_end:
        return  # and takes them with it; the next lines could not be said
    idle = await probe.connect()
    await idle.settled()
    after = probe.open_files()
    if after > before:
        raise Failed(f"it had {before} descriptors open, and has {after}")


_SAFETY = "a front-end's mistake ends its session, not the back-end"
CHECKS = (
    Check(a_ring_that_does_not_exist_is_refused, _SAFETY, P.REPLY_ACK, hostile=True),
    Check(a_base_of_a_ring_that_does_not_exist_is_not_told, _SAFETY, hostile=True),
    Check(descriptors_for_rings_that_do_not_exist_are_refused, _SAFETY, P.REPLY_ACK, hostile=True),
    Check(impossible_ring_sizes_are_refused, "virtio 1.3, 2.7", P.REPLY_ACK, hostile=True),
    Check(rings_outside_of_memory_are_borne, "A vring address description", P.REPLY_ACK, hostile=True),
    Check(a_kick_of_a_ring_that_is_not_set_up_is_borne, _SAFETY, P.REPLY_ACK, VirtioFeature.PROTOCOL_FEATURES, hostile=True),
    Check(features_that_were_not_offered_are_refused, "SET_FEATURES", P.REPLY_ACK, hostile=True),
    Check(requests_that_nobody_knows_are_borne, _SAFETY, hostile=True),
    Check(other_versions_are_borne, "Header", hostile=True),
    Check(payloads_that_are_too_short_are_borne, _SAFETY, hostile=True),
    Check(payloads_that_are_too_long_are_borne, _SAFETY, hostile=True),
    Check(a_front_end_that_leaves_within_a_message_is_borne, "Communication", hostile=True),
    Check(impossible_memory_is_refused, "Memory region description", P.REPLY_ACK, hostile=True),
    Check(tables_that_contradict_themselves_are_refused, "Multiple Memory regions description", P.REPLY_ACK, hostile=True),
    Check(memory_that_ends_before_its_region_does_not_kill, _SAFETY, P.REPLY_ACK, hostile=True),
    Check(descriptors_of_the_wrong_kind_are_borne, _SAFETY, P.REPLY_ACK, hostile=True),
    Check(a_region_over_another_is_refused, "Memory region description", P.CONFIGURE_MEM_SLOTS | P.REPLY_ACK, hostile=True),
    Check(a_region_without_a_descriptor_is_refused, "ADD_MEM_REG", P.CONFIGURE_MEM_SLOTS | P.REPLY_ACK, hostile=True),
    Check(config_accesses_of_absurd_size_are_borne, "GET_CONFIG; SET_CONFIG", P.CONFIG, hostile=True),
    Check(a_log_that_does_not_lie_in_its_file_does_not_kill, "Log description", P.LOG_SHMFD, hostile=True),
    Check(an_inflight_buffer_of_absurd_size_is_not_made, "Inflight description", P.INFLIGHT_SHMFD | P.REPLY_ACK, hostile=True),
    Check(descriptors_that_nobody_asked_for_are_closed, "Communication", hostile=True),
)
