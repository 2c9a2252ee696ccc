# SPDX-License-Identifier: BSD-3-Clause
"""A device and its server on an event loop in a thread, as they run in a process of their own, for drivers that block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from vhostsock.device import Device
from vhostsock.testing.frontend import Frontend, attach

__all__ = ["PATIENCE", "OnDeviceThread", "device_thread"]

PATIENCE = 30.0  # seconds for anything that must happen
T = TypeVar("T")
Runner = Callable[[Coroutine[Any, Any, None]], None]


class OnDeviceThread:
    """What a test does on the thread of the device in front of which it stands."""

    frontend: Frontend
    loop: asyncio.AbstractEventLoop

    def in_loop(self, call: Callable[[], T]) -> T:
        """``call()`` on the device's thread."""

        async def run() -> T:
            return call()

        return self.run(run())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work`` on the device's thread."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, PATIENCE), self.loop).result(PATIENCE)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until ``condition()`` holds on the device's thread: it is looked at after everything that happens there."""

        async def run() -> None:
            while not condition():  # noqa: ASYNC110  every turn of the loop may have changed it, none tells
                await asyncio.sleep(0)

        self.run(run())


@contextlib.contextmanager
def device_thread(device: Device, runner: Runner = asyncio.run, **options: Any) -> Iterator[OnDeviceThread]:
    """``device`` attached to a front-end, with its ``options``, in a thread that ``runner`` gives its loop."""
    started = threading.Event()
    there = OnDeviceThread()
    errors: list[BaseException] = []
    done = asyncio.Event()

    async def serve() -> None:
        try:
            async with attach(device, **options) as frontend:
                there.frontend, there.loop = frontend, asyncio.get_running_loop()
                started.set()
                await done.wait()
        except BaseException as error:
            errors.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=runner, args=(serve(),), name="device")
    thread.start()
    try:
        assert started.wait(PATIENCE)
        if not errors:
            yield there
    finally:
        if hasattr(there, "loop"):
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself, and the error says why
                there.loop.call_soon_threadsafe(done.set)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
