# SPDX-License-Identifier: BSD-3-Clause
"""A device whose data plane is the engine: what the socket devices have in common, whatever they say to their drivers.

An engine lives as long as a front-end's session. When the front-end goes, its guest's memory goes, and with it every flow. The
engine hands over what needs a decision as events; the device answers them in ``_answer``, on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from ..device import Device, Queue
from ..errors import FrontendError
from .engine import Engine, Event, Stats
from .guestlog import LIMIT, GuestLog

__all__ = ["EngineDevice"]


class EngineDevice(Device):
    """``limits`` are Engine's arguments. UsageError: one of them is out of range."""

    def __init__(self, name: str, logger: logging.Logger, limits: Mapping[str, Any]) -> None:
        self.name = name
        self._logger = logger
        self._log = GuestLog(name, logger=logger)
        self._limits = {"log_flows": LIMIT // 2, **limits}  # each has a line when it begins, and one when it ends
        self._engine: Engine | None = None
        self._last_stats = Stats()
        self._tasks: set[asyncio.Task[None]] = set()  # all of ours that are not done
        self._queues: dict[int, Queue] = {}
        Engine(**self._limits).close()  # complains about a limit now, not when a front-end comes

    # ---- what the devices do differently

    def _answer(self, event: Event) -> None:
        """Answer one event. An exception is a bug: it is logged, and ``_unanswered`` clears up."""
        raise NotImplementedError

    def _unanswered(self, event: Event) -> None:
        """Whoever waits for the answer must not wait for ever."""

    def _forget_flows(self) -> None:
        """The session is over, and the engine with all its flows is gone."""

    # ---- life

    async def connected(self) -> None:
        self._engine = Engine(**self._limits)
        self._engine.start()
        asyncio.get_running_loop().add_reader(self._engine.event_fd, self._take_events)

    async def disconnected(self) -> None:
        engine = self._engine
        if engine is None:
            return
        asyncio.get_running_loop().remove_reader(engine.event_fd)
        engine.forget()
        self._settle()
        self.report()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._last_stats = engine.stats()
        self._engine = None
        engine.close()
        self._forget_flows()

    def reset(self) -> None:
        if self._engine:
            self._engine.forget()
            self._settle()

    def queue_started(self, queue: Queue) -> None:
        assert self._engine is not None
        self._queues[queue.index] = queue
        self._engine.attach(queue.index, queue.vring.ptr, queue.kick_fd)

    async def queue_draining(self, queue: Queue) -> None:
        """Nothing to wait for: no chain stays with the engine between two batches."""

    def queue_stopped(self, queue: Queue) -> None:
        assert self._engine is not None
        self._engine.detach(queue.index)
        self._queues.pop(queue.index, None)

    def quiesced(self) -> contextlib.AbstractContextManager[None]:
        return self._engine.locked() if self._engine else contextlib.nullcontext()

    def stats(self) -> Stats:
        """The engine's figures; after the front-end has gone, the last ones."""
        return self._engine.stats() if self._engine else self._last_stats

    def report(self) -> None:
        """Log one line of figures. ``events`` counts what Python was handed: it does not grow with the bytes."""
        self._log.flush()
        figures = self.stats()._asdict()
        first = {key: figures.pop(key) for key in ("flows", "to_host", "to_guest", "events", "wakeups")}
        text = " ".join(f"{key}={value}" for key, value in (first | figures).items())
        self._logger.info("stats name=%s %s", self.name, text)

    # ---- events and tasks

    def _take_events(self) -> bool:
        """Answer one batch; False when there was nothing."""
        if self._engine is None:
            return False
        events = self._engine.events()
        self._log.left_out(self._engine.unlogged())
        for event in events:
            try:
                self._answer(event)
            except Exception:
                self._logger.exception("%s #%d: cannot serve %s", self.name, event.flow, event.kind)
                self._unanswered(event)
        return bool(events)

    def _settle(self) -> None:
        while self._take_events():
            pass

    def _broken(self, event: Event) -> None:
        self._log(logging.ERROR, "ring %d is broken: %s", event.flow, event.payload.decode("utf-8", "replace"))
        queue = self._queues.get(event.flow)
        if queue and queue.memory and queue.memory.poisoned:
            queue.fail(FrontendError(f"ring {queue.index}: the guest memory was truncated under its mapping"))

    def _keep(self, task: asyncio.Task[None], *kinds: set[asyncio.Task[None]]) -> None:
        """Remember a task until it is done, as one of ours and of these kinds. ``disconnected`` cancels it."""
        for tasks in (self._tasks, *kinds):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
