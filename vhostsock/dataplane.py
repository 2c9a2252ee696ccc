# SPDX-License-Identifier: BSD-3-Clause
"""A device's queues, and the default data plane: runs the handlers on the asyncio loop, one DataPlane per started queue.

A wake-up is a readable kick fd, a finished handler, or our own call_soon. Each takes at most BUDGET chains and then yields to
the loop, however many the driver has made available: a driver that fills its ring faster than we empty it gets its share and
not the process. Kicks are disabled while there is work (virtio 1.3, 2.7.10) and enabled when the ring was seen empty; the
enabling looks at the ring once more, since a chain may have come in between without a kick.

    asleep     kicks enabled, no run is scheduled
    scheduled  a run is due in the loop's next round
    missing    (behind an IOMMU) the next chain's memory was asked for; kicks disabled, wake() schedules a run
    full       ``concurrency`` handlers are under way: kicks disabled; the first that ends schedules a run
    closed     draining or stopped: no chain is taken any more. A kick stays in its fd: it is not read while nobody scans

Completed chains are flushed once per round of the loop, so that handlers that end together cost the guest one interrupt.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable
from typing import Protocol

from .errors import DriverError, FrontendError, RequestError
from .memory import MemoryMap
from .ring import Chain, Vring

__all__ = ["BUDGET", "DataPlane", "Handlers", "Queue"]

BUDGET = 64  # chains per wake-up: some 100 us of Python at most before other queues and connections get their turn
log = logging.getLogger("vhostsock.device")


class Queue:
    """One virtqueue of a connected device.

    index       its number in the device's virtio specification
    vring       the ring; running from queue_started to queue_stopped
    kick_fd     readable when the driver made chains available; -1 while stopped
    memory      the guest memory of now, for those that look deeper than chains
    """

    def __init__(self, index: int, on_error: Callable[[Exception], None]) -> None:
        self.index = index
        self.vring = Vring(index)
        self.kick_fd = -1
        self.memory: MemoryMap | None = None
        self.plane: DataPlane | None = None  # the default data plane, while it runs
        self.on_miss: Callable[[int, int], None] | None = None  # behind an IOMMU: ask for this IOVA and permission
        self._on_error = on_error

    def flush(self) -> None:
        """Show completed chains to the driver. Automatic, but for chains that are completed after their handler returned."""
        self.vring.flush()

    def fail(self, error: Exception) -> None:
        """End the front-end's session: its memory is gone, or it broke its promises. The server goes on listening."""
        self._on_error(error)

    def __repr__(self) -> str:
        return f"<Queue {self.index}>"


class Handlers(Protocol):
    """What the data plane needs of a device (device.Device says what each means)."""

    concurrency: int

    async def handle(self, queue: Queue, chain: Chain) -> None: ...
    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None: ...
    def refused(self, queue: Queue, chain: Chain, error: RequestError) -> None: ...


class DataPlane:
    def __init__(self, device: Handlers, queue: Queue, *, batched: bool) -> None:
        """Start: the ring is scanned in the loop's next round, and at every kick. batched: call handle_batch, not handle."""
        self._device = device
        self._queue = queue
        self._vring = queue.vring
        self._start = self._start_batch if batched else self._start_tasks
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._suspended = False
        self._run_due = False
        self._flush_due = False
        self._loop.add_reader(queue.kick_fd, self._kicked)
        self._schedule()

    def _kicked(self) -> None:
        try:
            gone = not os.read(self._queue.kick_fd, 4096)  # 8 bytes of an eventfd; all of a pipe or socket
        except BlockingIOError:
            return  # another reader of the same eventfd was faster
        except OSError:
            gone = True
        if gone:  # it would stay readable for ever
            self._lost(FrontendError(f"ring {self._queue.index}: the kick fd cannot be read any more"))
            return
        self._schedule()

    def _schedule(self) -> None:
        if not self._run_due and not self._closed:
            self._run_due = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._run_due = False
        room = min(BUDGET, self._device.concurrency - len(self._tasks))
        if self._closed or room <= 0:
            return
        self._vring.disable_kick()
        try:
            chains = self._vring.pop_batch(room)
        except DriverError as error:
            self._broken(error)
            return
        except FrontendError as error:
            self._lost(error)
            return
        if chains:
            self._start(chains)
        if self._queue.on_miss and len(chains) < room and (missing := self._vring.missing):
            self._queue.on_miss(*missing)  # and wake() follows
            return
        # a full batch: perhaps there is more. Otherwise the ring was empty; enable_kick says whether it still is.
        if len(chains) == room or self._vring.enable_kick():
            self._schedule()

    def wake(self) -> None:
        """Look at the ring again: what was missed in the IOTLB may be there."""
        self._schedule()

    def _start_batch(self, chains: list[Chain]) -> None:
        try:
            self._device.handle_batch(self._queue, chains)
        except Exception as error:
            self._report(error)
            for chain in chains:
                self._refuse(chain, error)
        self._flush()

    def _start_tasks(self, chains: list[Chain]) -> None:
        for chain in chains:
            task = self._loop.create_task(self._serve(chain))
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._ended, chain))

    async def _serve(self, chain: Chain) -> None:
        try:
            await self._device.handle(self._queue, chain)
        except Exception as error:
            self._report(error)
            self._refuse(chain, error)

    def _ended(self, chain: Chain, task: asyncio.Task[None]) -> None:
        if self._suspended and task.cancelled():
            chain.abandon()  # in flight, to come again
        else:
            chain.complete()  # here and not in the task: one that is cancelled before its first step never runs
        full = len(self._tasks) >= self._device.concurrency
        self._tasks.discard(task)
        if full:
            self._schedule()
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        self._vring.flush()
        if self._vring.broken:  # by a page that is not in the dirty log, say: the next run raises what it is
            self._schedule()
        memory = self._queue.memory
        if memory and memory.poisoned:  # the handlers read zeros, or wrote into the void
            self._lost(FrontendError("the front-end truncated guest memory that is in use"))

    def _report(self, error: Exception) -> None:
        name = type(self._device).__name__
        if isinstance(error, DriverError):
            self._vring.fail(str(error))
            self._broken(error)
        elif isinstance(error, RequestError):
            log.debug("%s, queue %d: request refused: %s", name, self._queue.index, error)
        else:
            log.error("%s, queue %d: the handler failed", name, self._queue.index, exc_info=error)

    def _refuse(self, chain: Chain, error: Exception) -> None:
        if chain.completed:
            return
        try:
            if isinstance(error, RequestError):
                self._device.refused(self._queue, chain, error)
        except Exception:
            log.exception("%s, queue %d: refused() failed", type(self._device).__name__, self._queue.index)
        finally:
            chain.complete()

    def _broken(self, error: DriverError) -> None:
        if not self._closed:
            log.warning("%s; it stays broken until the driver sets it up again", error)
            self._close_ring()

    def _lost(self, error: FrontendError) -> None:
        self._close_ring()
        self._queue.fail(error)

    def _close_ring(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._queue.kick_fd)

    async def drain(self, patience: float) -> None:
        """Take no more chains; wait ``patience`` seconds for the handlers under way, then cancel them. Flushes at the end."""
        self._close_ring()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=patience)
            for task in late:
                task.cancel()
            if late:
                log.warning("queue %d stops: cancelled %d requests that took over %g s", self._queue.index, len(late), patience)
                # one that ignores even this completes into a stopped ring later, which is harmless
                await asyncio.wait(late, timeout=patience)
        self._vring.flush()

    async def suspend(self, patience: float) -> None:
        """Take no more chains, and cancel the handlers under way. Those that end by it leave their chains in flight."""
        self._close_ring()
        self._suspended = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=patience)
            if late:  # each completes into a stopped ring later, which is harmless; that it may write to the guest is not
                log.warning("queue %d stops: %d requests are not cancelled after %g s", self._queue.index, len(late), patience)
        self._vring.flush()

    def close(self) -> None:
        """Without waiting: handlers still under way are cancelled, and complete nothing in a ring that is stopped."""
        self._close_ring()
        for task in self._tasks:
            task.cancel()
