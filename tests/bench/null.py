# SPDX-License-Identifier: BSD-3-Clause
"""A null disk on this library, in three ways: fills what the driver may read with zeros, whatever it asks for.

handle  a coroutine a request (Device.handle)
batch   a call for up to 64 requests (Device.handle_batch)
c       a data plane in C, on a thread of its own (device.c, compiled into FOLDER); no Python a request
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from tests.bench.native import loaded
from vhostsock import Chain, Device, Queue, Server
from vhostsock._core import ffi, lib

ROOT = Path(__file__).resolve().parents[2]
ZEROS = bytes(1 << 16)
BATCH = 64


class Handle(Device):
    virtio_id = 2
    packed = True

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(ZEROS[: chain.writable])


class Batch(Device):
    virtio_id = 2
    packed = True

    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
        for chain in chains:
            chain.write(ZEROS[: chain.writable])
            chain.complete()


class InC(Device):
    """The ring is the thread's from queue_started to queue_stopped."""

    virtio_id = 2
    packed = True
    folder = Path()

    def __init__(self) -> None:
        self._ffi, self._device = loaded(self.folder, "device", "struct vs_vq; struct vs_chain;")
        self._calls = self._ffi.new("struct ring_calls *")
        for name, function in (
            ("pop_many", "vs_vq_pop_many"), ("push", "vs_vq_push"), ("flush", "vs_vq_flush"),
            ("disable_kick", "vs_vq_disable_kick"), ("enable_kick", "vs_vq_enable_kick"),
        ):  # fmt: skip
            setattr(self._calls, name, self._ffi.cast("void *", int(ffi.cast("uintptr_t", ffi.addressof(lib, function)))))
        self._chains = ffi.new("struct vs_chain *[]", [lib.vs_chain_new() for _ in range(BATCH)])
        self._stop = -1
        self._thread: threading.Thread | None = None

    def queue_started(self, queue: Queue) -> None:
        self._stop = os.eventfd(0)
        ring = self._ffi.cast("struct vs_vq *", int(ffi.cast("uintptr_t", queue.vring.ptr)))
        chains = self._ffi.cast("struct vs_chain **", int(ffi.cast("uintptr_t", self._chains)))
        arguments = (self._calls, ring, chains, BATCH, queue.kick_fd, self._stop)
        self._thread = threading.Thread(target=self._device.null_serve, args=arguments)
        self._thread.start()

    def queue_stopped(self, queue: Queue) -> None:
        if self._thread:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._stop)
            self._thread = None


KINDS: dict[str, type[Device]] = {"handle": Handle, "batch": Batch, "c": InC}


def command_of(kind: str, path: str, folder: str) -> list[str]:
    """The command that serves the disk at ``path``; the installed package comes before this checkout."""
    program = f"import sys; sys.path.append({str(ROOT)!r}); from tests.bench.null import serve; serve(*sys.argv[1:])"
    return [sys.executable, "-c", program, kind, path, folder]


def serve(kind: str, path: str, folder: str) -> None:
    import uvloop

    InC.folder = Path(folder)

    async def main() -> None:
        async with Server(KINDS[kind](), path=path) as server:
            await server.serve_forever()

    uvloop.run(main())
