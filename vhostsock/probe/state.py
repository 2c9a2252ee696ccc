# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what a device keeps beside its rings: reset, in-flight tracking, the dirty log, its own state."""

from __future__ import annotations

import asyncio
import mmap
import os
import struct

from ..proto import ProtocolFeature, Request, VirtioFeature, wire
from .check import Check, NotApplicable, Probe
from .connection import POLL, Connection, Failed

__all__ = ["CHECKS"]

P, V = ProtocolFeature, VirtioFeature
PAGE = 4096  # VHOST_LOG_PAGE
VRING_F_LOG = 1
INFLIGHT = struct.Struct("=QQHH4x")  # mmap size, mmap offset, queues, their size; the C structure is padded to 24 bytes
SAVE, LOAD = 0, 1
MOST_STATE = 64 << 20  # bytes
NO_FD = 1 << 8
SPLIT_HEADER, SPLIT_ENTRY = 16, 16  # bytes of QueueRegionSplit without desc[], and of DescStateSplit


async def a_reset_device_starts_from_the_beginning(probe: Probe) -> None:
    """RESET_DEVICE while rings run: they stop, and the device can be set up again on the same connection, from base 0."""
    connection = await probe.running()
    await probe.exchange(connection, 3)
    await connection.request(Request.RESET_DEVICE)
    connection.renew_queues()
    await connection.set_up()
    await probe.exchange(connection, 3)


async def a_reset_device_leaves_its_rings_alone(probe: Probe) -> None:
    """A request that is kicked after RESET_DEVICE stays in the ring."""
    connection = await probe.running()
    await probe.exchange(connection)
    await connection.request(Request.RESET_DEVICE)
    await connection.settled()
    probe.add(connection)
    connection.kick(probe.ring(connection))
    for _ in range(3):
        await connection.settled()
    if probe.ring(connection).collect():
        raise Failed("a request was completed after RESET_DEVICE")


async def _inflight(connection: Connection, queues: int, size: int) -> tuple[int, int, int]:
    """GET_INFLIGHT_FD: (descriptor, mmap size, mmap offset)."""
    await connection.call(Request.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, size))
    reply = await connection.raw_reply(Request.GET_INFLIGHT_FD)
    if len(reply) != INFLIGHT.size:
        raise Failed(f"the reply to GET_INFLIGHT_FD has {len(reply)} bytes of payload, not {INFLIGHT.size}")
    length, offset, _, _ = INFLIGHT.unpack(reply)
    if not connection.fds:
        raise Failed("GET_INFLIGHT_FD was answered without a descriptor")
    return connection.fds[-1], length, offset


async def the_inflight_buffer_has_room_for_all_queues(probe: Probe) -> None:
    """GET_INFLIGHT_FD: the buffer lies in its file, and holds a region of the document's layout for each queue."""
    connection = await probe.negotiated()
    await connection.set_features()
    queues, size = len(connection.queues), 64
    fd, length, offset = await _inflight(connection, queues, size)
    least = queues * (SPLIT_HEADER + size * SPLIT_ENTRY)
    if length < least:
        raise Failed(f"the buffer has {length} bytes, {queues} queue(s) of {size} need {least}")
    if os.fstat(fd).st_size < offset + length:
        raise Failed(f"the buffer ends at {offset + length} of a file of {os.fstat(fd).st_size} bytes")
    with mmap.mmap(fd, length, offset=offset) as buffer:
        if any(buffer[:]):
            raise Failed("a new buffer is not all zero (a version of 0 says that it was never used)")


async def requests_are_served_with_an_inflight_buffer(probe: Probe) -> None:
    """SET_INFLIGHT_FD gives the buffer back; afterwards no request is marked in it."""
    connection = await probe.negotiated()
    await connection.set_features()
    queues, size = len(connection.queues), 64
    fd, length, offset = await _inflight(connection, queues, size)
    await connection.carried_out(Request.SET_INFLIGHT_FD, INFLIGHT.pack(length, offset, queues, size), [fd])
    await connection.set_up()
    await probe.exchange(connection, 5)
    await connection.stop_ring(probe.traffic.queue)
    with mmap.mmap(fd, length, offset=offset) as buffer:
        at = SPLIT_HEADER + probe.traffic.queue * (length // queues)
        marked = [i for i in range(size) if buffer[at + i * SPLIT_ENTRY]]
        if marked:
            raise Failed(f"descriptors {marked} are marked as in flight, but all requests were completed")


async def what_the_device_writes_is_in_the_dirty_log(probe: Probe) -> None:
    """LOG_ALL acked on a running ring: the pages of the used ring and of a request's writable buffer have their bits set."""
    connection = await probe.negotiated()
    await connection.set_up()
    await probe.exchange(connection)
    top = max(region.gpa + region.size for region in connection.memory.regions)
    length = top // PAGE // 8
    file = os.memfd_create("vhostsock-probe-log", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, length)
        await connection.call(Request.SET_LOG_BASE, struct.pack("=QQ", length, 0), [file])
        await connection.raw_reply(Request.SET_LOG_BASE)
        await connection.carried_out(Request.SET_FEATURES, wire.U64.build(connection.features | V.LOG_ALL))
        index, queue = probe.traffic.queue, probe.ring(connection)
        address = connection.address(index) | {"flags": VRING_F_LOG, "log": queue.used}
        await connection.carried_out(Request.SET_VRING_ADDR, wire.ADDRESS.build(address))
        number, request = probe.add(connection)
        places = [("the used ring", queue.used), *(("a buffer", gpa) for gpa, _ in request.writable[:1])]
        queue.publish()
        queue.kick()
        await probe.completions(connection)
        probe.judge(number, request)
        await connection.stop_ring(index)
        for what, gpa in places:
            page = gpa // PAGE
            if not os.pread(file, 1, page // 8)[0] >> page % 8 & 1:
                raise Failed(f"{what} was written at {gpa:#x}, but the log has no bit for its page")
    finally:
        os.close(file)


async def the_state_of_a_stopped_device_can_be_saved_and_loaded(probe: Probe) -> None:
    """SET_DEVICE_STATE_FD with a pipe to write to, until it ends, then CHECK_DEVICE_STATE; the same the other way round."""
    connection = await probe.negotiated()
    await connection.set_features()
    state = await _transfer(connection, SAVE, b"")
    probe.transcript.note(f"the state has {len(state)} bytes")
    connection.close()
    if probe.target.ends_with_its_front_end:
        raise NotApplicable("it was saved; it ends with its front-end, so nobody is there to load it")
    connection = await probe.negotiated()
    await connection.set_features()
    await _transfer(connection, LOAD, state)


async def _transfer(connection: Connection, direction: int, state: bytes) -> bytes:
    """Save or load through a pipe of ours; what was saved."""
    ends = list(os.pipe2(os.O_CLOEXEC))
    ours, theirs = ends if direction == SAVE else reversed(ends)
    try:
        await connection.call(Request.SET_DEVICE_STATE_FD, struct.pack("=II", direction, 0), [theirs])
        os.close(theirs)
        ends.remove(theirs)
        reply = struct.unpack("=Q", await connection.raw_reply(Request.SET_DEVICE_STATE_FD))[0]
        if reply & 0xFF:
            raise Failed(f"SET_DEVICE_STATE_FD was refused ({reply:#x})")
        if not reply & NO_FD:
            raise NotApplicable("it has a channel of its own")
        if direction == LOAD:
            await _write_all(ours, state)
            os.close(ours)
            ends.remove(ours)
        else:
            state = await _read_all(ours)
    finally:
        for fd in ends:
            os.close(fd)
    result = await connection.get_u64(Request.CHECK_DEVICE_STATE)
    if result:
        raise Failed(f"CHECK_DEVICE_STATE says {result} after the {'save' if direction == SAVE else 'load'}")
    return state


async def _read_all(fd: int) -> bytes:
    """What comes until the other end is closed."""
    os.set_blocking(fd, False)
    data = b""
    while True:
        try:
            piece = os.read(fd, 65536)
        except BlockingIOError:
            await asyncio.sleep(POLL)
            continue
        if not piece:
            return data
        data += piece
        if len(data) > MOST_STATE:
            raise Failed(f"the state has more than {MOST_STATE} bytes")


async def _write_all(fd: int, data: bytes) -> None:
    os.set_blocking(fd, False)
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            await asyncio.sleep(POLL)


CHECKS = (
    Check(a_reset_device_starts_from_the_beginning, "RESET_DEVICE", P.RESET_DEVICE, traffic=True),
    Check(a_reset_device_leaves_its_rings_alone, "RESET_DEVICE", P.RESET_DEVICE, traffic=True),
    Check(the_inflight_buffer_has_room_for_all_queues, "Inflight I/O tracking", P.INFLIGHT_SHMFD),
    Check(requests_are_served_with_an_inflight_buffer, "Inflight I/O tracking", P.INFLIGHT_SHMFD, traffic=True),
    Check(what_the_device_writes_is_in_the_dirty_log, "Migration", P.LOG_SHMFD, V.LOG_ALL, traffic=True),
    Check(the_state_of_a_stopped_device_can_be_saved_and_loaded, "Migrating back-end state", P.DEVICE_STATE),
)
