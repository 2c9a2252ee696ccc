# SPDX-License-Identifier: BSD-3-Clause
"""Postcopy migration: the guest's memory arrives, through a real userfaultfd, when the device touches it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import select
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from vhostsock._core import ffi, lib
from vhostsock.offers import session_config
from vhostsock.proto import ProtocolFeature, Request, wire
from vhostsock.recording import Entry
from vhostsock.testing.frontend import QEMU_11_1, BackendGone, Dialect, Frontend, Refused, attach
from vhostsock.testing.memory import Region
from vhostsock.trace import line_of

PAGE = mmap.PAGESIZE
UFFDIO_COPY = 0xC028AA03
PAGEFAULT = 0x12
TABLES = Dialect("tables", QEMU_11_1.protocol_mask & ~ProtocolFeature.CONFIGURE_MEM_SLOTS, True, True, False)
NO_ACKS = Dialect("no acks", QEMU_11_1.protocol_mask & ~ProtocolFeature.REPLY_ACK, False, False, False)


class Late(Upper):
    postcopy = True


def can_be_had() -> bool:
    uffd = lib.vs_uffd_open(ffi.new("struct vs_err *"))
    if uffd >= 0:
        os.close(uffd)
    return bool(uffd >= 0)


needs_userfaultfd = pytest.mark.skipif(not can_be_had(), reason="no userfaultfd: run as root, or allow it by sysctl")


class Source:
    """The other side of the migration, with all pages: a thread that serves faults, as QEMU's does."""

    def __init__(self, uffd: int) -> None:
        self.uffd = uffd
        self.served: list[int] = []  # guest-physical addresses of pages
        self.content: dict[int, bytes] = {}  # by page; others are zeros
        self._bases: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._serve)

    def start(self, bases: dict[int, int], regions: list[Region]) -> None:
        self._bases = bases
        self._sizes = {region.gpa: region.size for region in regions}
        self._thread.start()

    def close(self) -> None:
        """As the death of a QEMU: nobody serves faults any more, and the userfaultfd is closed."""
        if self._thread.ident is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1
        os.close(self._stop)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self.uffd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while self._stop not in {fd for fd, _ in poll.poll()}:
            with contextlib.suppress(BlockingIOError):
                self._fault(os.read(self.uffd, 32))

    def _fault(self, message: bytes) -> None:
        kind, address = message[0], struct.unpack_from("=Q", message, 16)[0]
        assert kind == PAGEFAULT
        page = address // PAGE * PAGE
        [gpa] = [gpa + page - base for base, gpa in self._bases.items() if base <= page < base + self._sizes[gpa]]
        content = ctypes.create_string_buffer(self.content.get(gpa, b"").ljust(PAGE, b"\0"), PAGE)
        self.served.append(gpa)
        with contextlib.suppress(FileExistsError):
            fcntl.ioctl(self.uffd, UFFDIO_COPY, struct.pack("=QQQQq", page, ctypes.addressof(content), PAGE, 0, 0))


@contextlib.contextmanager
def source(uffd: int) -> Iterator[Source]:
    made = Source(uffd)
    try:
        yield made
    finally:
        made.close()


async def ask(frontend: Frontend, gpa: int, size: int) -> bytes:
    """A request whose readable buffer is what lies at ``gpa``."""
    queue = frontend.queues[0]
    room, used = frontend.memory.alloc(size), queue.used_idx
    head = queue.num - 2
    queue.write_desc(head, gpa, size, 1, head + 1)
    queue.write_desc(head + 1, room, size, 2)
    queue.offer(head)
    queue.publish()
    queue.kick()
    while queue.used_idx == used:
        await frontend.settled()
    return frontend.memory.read(room, size)


@needs_userfaultfd
@pytest.mark.parametrize("dialect", [QEMU_11_1, TABLES, NO_ACKS], ids=["slots", "table", "no acks"])
@in_loop
async def test_a_page_arrives_when_the_device_touches_it(dialect: Dialect) -> None:
    async with attach(Late(), started=False, memory=[1 << 20, 1 << 20], dialect=dialect) as frontend:
        with source(await frontend.postcopy_advise()) as other:
            await frontend.postcopy_listen()
            page = frontend.memory.alloc(PAGE, region=1)
            other.content[page] = b"from the source"
            bases = await frontend.send_memory_late()
            assert len(bases) == 2
            other.start(bases, list(frontend.memory.regions))
            await frontend.start()
            assert await ask(frontend, page, 15) == b"FROM THE SOURCE"
            assert page in other.served
            await frontend.postcopy_end()
            served = len(other.served)
            fresh = frontend.memory.alloc(PAGE, region=1)
            assert await ask(frontend, fresh, 4) == bytes(4)  # no faults any more: what did not arrive is empty
            assert len(other.served) == served


@needs_userfaultfd
@in_loop
async def test_memory_that_was_known_before_is_registered_too() -> None:
    async with attach(Late(), started=False) as frontend:
        with source(await frontend.postcopy_advise()) as other:
            await frontend.start()
            page = frontend.memory.alloc(PAGE)
            await frontend.postcopy_listen()
            queue = frontend.queues[0]
            queue.write_desc(0, page, 4)
            queue.offer(0)
            queue.publish()
            faulted = asyncio.create_task(asyncio.to_thread(_page_that_faults, other.uffd))
            await asyncio.sleep(0)
            queue.kick()
            await frontend.settled()
            assert await faulted  # at the ring's address here, which this front-end was not told
            await frontend.postcopy_end()


def _page_that_faults(uffd: int) -> int:
    """Wait for one fault and fill the page with zeros; the address, modulo nothing that a caller could know."""
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    poll.poll()
    address = int(struct.unpack_from("=Q", os.read(uffd, 32), 16)[0])
    content = ctypes.create_string_buffer(PAGE)
    fcntl.ioctl(uffd, UFFDIO_COPY, struct.pack("=QQQQq", address // PAGE * PAGE, ctypes.addressof(content), PAGE, 0, 0))
    return address


@needs_userfaultfd
@in_loop
async def test_a_front_end_that_dies_lets_go_of_whoever_waits_for_a_page() -> None:
    """The event loop itself hangs in the fault here, so the front-end has to die on another thread."""
    async with attach(Late(), started=False) as frontend:
        other = Source(await frontend.postcopy_advise())
        await frontend.postcopy_listen()
        page = frontend.memory.alloc(PAGE)
        await frontend.send_memory_late()
        queue = frontend.queues[0]
        queue.write_desc(0, page, 4)
        queue.offer(0)
        queue.publish()  # and the ring's own pages were written, so they are there

        def die() -> None:
            poll = select.poll()
            poll.register(other.uffd, select.POLLIN)
            poll.poll()  # somebody waits for a page
            os.close(other.uffd)
            other.uffd = -1
            frontend.sock.shutdown(2)

        undertaker = threading.Thread(target=die)
        undertaker.start()
        with contextlib.suppress(BackendGone, ConnectionError):
            await frontend.start()
            await frontend.ended()
        await asyncio.to_thread(undertaker.join)
        other.close()


@needs_userfaultfd
@in_loop
async def test_the_session_goes_on_after_a_migration_that_was_called_off() -> None:
    async with attach(Late(), started=False) as frontend:
        for _ in range(3):  # advised, and never more than that
            os.close(await frontend.postcopy_advise())
        await frontend.start()
        queue = frontend.queues[0]
        queue.submit([b"x"], [1])
        [done] = await queue.wait_async()
        assert done.data == b"X"


@in_loop
async def test_what_comes_out_of_turn_is_refused() -> None:
    async with attach(Late(), started=False) as frontend:
        with pytest.raises(Refused):
            await frontend.postcopy_listen()
        await frontend.postcopy_end()  # the end of nothing is no error
        await frontend.start()


@needs_userfaultfd
@in_loop
async def test_a_front_end_that_cannot_use_the_bases_ends_the_session() -> None:
    async with attach(Late(), started=False) as frontend:
        uffd = await frontend.postcopy_advise()
        os.close(uffd)
        await frontend.postcopy_listen()
        [region] = frontend.memory.regions
        value = {"region": {"gpa": region.gpa, "size": region.size, "uva": region.uva, "offset": region.offset}}
        await frontend.request(Request.ADD_MEM_REG, wire.MEM_REGION, value, fds=[region.fd], reply=wire.MEM_REGION)
        await frontend.send(wire.pack(Request.ADD_MEM_REG, wire.REQUEST_FLAGS, wire.U64, 1))
        await frontend.ended()


@in_loop
async def test_where_there_is_no_userfaultfd_the_migration_fails_and_not_the_device() -> None:
    async with attach(Late(), started=False) as frontend:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))  # no room for another descriptor
        try:
            with pytest.raises(Refused):
                await frontend.postcopy_advise()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await frontend.start()


def test_a_trace_shows_where_the_back_end_has_the_memory() -> None:
    region = {"gpa": 0x1000, "size": 0x2000, "uva": 0x7F0000000000, "offset": 0}
    shown = "gpa=0x1000 size=0x2000 uva=0x7f0000000000 off=0x0"
    for payload, value, text in ((wire.MEM_REGION, {"region": region}, shown), (wire.U64, 0, "ack 0")):
        body = payload.build(value)
        entry = Entry(0.0, "<-", request=Request.ADD_MEM_REG, flags=5, size=len(body), payload=body)
        assert line_of(entry).endswith(text)


@in_loop
async def test_only_a_device_that_asks_for_it_is_offered_for_postcopy() -> None:
    assert not session_config(Upper()).protocol_features & ProtocolFeature.PAGEFAULT
    assert session_config(Late()).protocol_features & ProtocolFeature.PAGEFAULT
    async with attach(Upper()) as frontend:
        with pytest.raises(BackendGone):
            await frontend.postcopy_advise()
