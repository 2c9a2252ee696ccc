# SPDX-License-Identifier: BSD-3-Clause
"""The messages that only some devices get, a method each: the base of vhostsock.testing.frontend.Frontend.

Each asks for what QEMU asks for and checks the answer's form. Refused: the back-end's answer was no.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from construct import Construct

from ..errors import VhostsockError
from ..proto import wire
from ..proto.wire import Request, TransferDirection

__all__ = ["TIMEOUT", "Messages", "Refused"]

TIMEOUT = 30.0
NO_FD = 0x100  # bit 8 of the answer to SET_DEVICE_STATE_FD


class Refused(VhostsockError):
    """The back-end answered a request with a failure ack."""


class Messages:
    """``reply_fds``: descriptors that came with the last reply; the caller takes and closes them."""

    def __init__(self) -> None:
        self.reply_fds: list[int] = []

    async def request(
        self,
        request: Request,
        payload: Construct | None = None,
        value: Any = None,
        *,
        fds: Sequence[int] = (),
        reply: Construct | None = None,
        ack: bool = False,
    ) -> Any:
        raise NotImplementedError

    # ---- in-band notifications

    async def inband_kick(self, index: int) -> None:
        """VRING_KICK, and wait until it was carried out, as the document wants it."""
        await self.request(Request.VRING_KICK, wire.VRING_STATE, {"index": index, "num": 0}, ack=True)

    # ---- network devices

    async def announce(self, mac: bytes) -> None:
        """SEND_RARP"""
        await self.request(Request.SEND_RARP, wire.U64, wire.U64.parse(mac.ljust(8, b"\0")), ack=True)

    async def set_mtu(self, mtu: int) -> None:
        await self.request(Request.NET_SET_MTU, wire.U64, mtu, ack=True)

    # ---- shared objects and memory

    async def shared_object(self, name: uuid.UUID) -> int | None:
        """GET_SHARED_OBJECT: a descriptor, the caller's to close; None when the back-end has none of that name."""
        try:
            answer = await self.request(Request.GET_SHARED_OBJECT, wire.UUID, {"uuid": name.bytes}, reply=wire.UUID)
        except Refused:
            return None
        assert answer.uuid == name.bytes
        return self.take_fd()

    async def shmem_sizes(self) -> dict[int, int]:
        """GET_SHMEM_CONFIG: bytes of each shared memory region that there is."""
        answer = await self.request(Request.GET_SHMEM_CONFIG, reply=wire.SHMEM_CONFIG)
        sizes = {shmid: size for shmid, size in enumerate(answer.sizes) if size}
        assert answer.n == len(sizes)
        return sizes

    # ---- migration

    async def transfer_state(self, direction: int, fd: int, *, phase: int = 0) -> None:
        """SET_DEVICE_STATE_FD with a descriptor, which stays the caller's."""
        value = {"direction": direction, "phase": phase}
        answer = await self.request(Request.SET_DEVICE_STATE_FD, wire.TRANSFER, value, fds=[fd], reply=wire.U64)
        if answer & 0xFF:
            assert answer & NO_FD
            raise Refused(f"SET_DEVICE_STATE_FD: {answer:#x}")
        assert answer == NO_FD, "the back-end sends a channel of its own, and no descriptor with it"

    async def check_state(self) -> None:
        """CHECK_DEVICE_STATE"""
        if await self.request(Request.CHECK_DEVICE_STATE, reply=wire.U64):
            raise Refused("CHECK_DEVICE_STATE")

    async def save_state(self) -> bytes:
        """The device's state, as a migration reads it at its source."""
        with pipe() as (reader, writer):
            await self.transfer_state(TransferDirection.SAVE, writer[0])
            os.close(writer.pop())
            data = await asyncio.wait_for(asyncio.to_thread(_read_all, reader[0]), TIMEOUT)
        await self.check_state()
        return data

    async def load_state(self, data: bytes) -> None:
        """Give the device a state, as at a migration's destination."""
        with pipe() as (reader, writer):
            await self.transfer_state(TransferDirection.LOAD, reader[0])
            os.close(reader.pop())
            # a back-end that has read enough may close its end
            with contextlib.suppress(BrokenPipeError):
                await asyncio.wait_for(asyncio.to_thread(_write_all, writer[0], data), TIMEOUT)
        await self.check_state()

    async def set_log(self, fd: int, size: int, *, offset: int = 0) -> None:
        """SET_LOG_BASE: a dirty log of ``size`` bytes, a bit for each 4 KiB from guest-physical address 0 on."""
        await self.request(Request.SET_LOG_BASE, wire.LOG, {"size": size, "offset": offset}, fds=[fd], reply=wire.U64)

    async def postcopy_advise(self) -> int:
        """POSTCOPY_ADVISE: the userfaultfd, the caller's to close. Refused when the back-end has none."""
        await self.request(Request.POSTCOPY_ADVISE, reply=wire.EMPTY)
        if not self.reply_fds:
            raise Refused("POSTCOPY_ADVISE")
        return self.take_fd()

    async def postcopy_end(self) -> None:
        """POSTCOPY_END"""
        if await self.request(Request.POSTCOPY_END, reply=wire.U64):
            raise Refused("POSTCOPY_END")

    def take_fd(self) -> int:
        """The one descriptor of the last reply."""
        [fd] = self.reply_fds
        self.reply_fds = []
        return fd


@contextlib.contextmanager
def pipe() -> Iterator[tuple[list[int], list[int]]]:
    """A pipe's two ends; closed at the end unless they were popped."""
    ends = [[fd] for fd in os.pipe()]
    try:
        yield ends[0], ends[1]
    finally:
        for fd in ends[0] + ends[1]:
            os.close(fd)


def _read_all(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        return file.read()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
