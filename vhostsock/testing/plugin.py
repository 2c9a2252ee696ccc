# SPDX-License-Identifier: BSD-3-Clause
"""A pytest plugin for the tests of a device: the ``vhost_user`` fixture. docs/testing-a-device.md is its guide.

    pytest_plugins = ["vhostsock.testing.plugin"]

    def test_echo(vhost_user):
        guest = vhost_user(Echo())
        assert guest.request(b"ping", room=4) == b"ping"

It is asked for by name and not registered as an entry point: every pytest run in an environment that has vhostsock would import
the library and its compiled extension, whether it tests a device or not.

The tests are plain functions. The device, its server and the front-end share one event loop, which runs while a method of
``AttachedGuest`` waits and stands still in between, so nothing happens behind a test's back.

PYTEST_DONT_REWRITE: a test may import this module for its names as well, and pytest would warn that it came too late for
assertions that are not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

import pytest

from ..device import Device
from ..proto.wire import BackendRequest
from .frontend import BackendGone, Frontend, attach
from .messages import TIMEOUT

__all__ = ["AttachedGuest", "DeviceFailed", "VhostUser", "vhost_user"]

T = TypeVar("T")


class DeviceFailed(AssertionError):
    """The device raised what its author did not mean to; the library has logged it and gone on, the test must not."""


class AttachedGuest:
    """A guest that has the device: its driver, and what QEMU tells the device on its behalf.

    frontend    the whole of the other end (testing/frontend.py), for what is not here; its coroutines go to ``run``
    failures    exceptions that escaped from the device. The test fails at its end for one that is still here: clear it if
                it was meant to be
    """

    frontend: Frontend

    def __init__(self, runner: asyncio.Runner) -> None:
        self.failures: list[BaseException] = []
        self._runner = runner

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns, run on the device's loop. TimeoutError after 30 seconds.

        Where the device took the whole session down, DeviceFailed tells with what.
        """

        async def bounded() -> T:
            async with asyncio.timeout(TIMEOUT):
                try:
                    return await work
                except (BackendGone, ConnectionError):
                    await self._session_over()
                    raise

        try:
            return self._runner.run(bounded())
        except (BackendGone, ConnectionError):
            self.check()
            raise

    async def _session_over(self) -> None:
        """Wait until the server has told the log why it closed the connection."""
        for task in asyncio.all_tasks():
            if task.get_name().startswith("vhostsock server"):
                await asyncio.wait([task])

    def check(self) -> None:
        """Raise DeviceFailed for the first exception that escaped from the device; those known so far are dealt with then."""
        failures, self.failures = self.failures, []
        if failures:
            raise DeviceFailed(f"the device raised {failures[0]!r}") from failures[0]

    def request(self, data: bytes = b"", room: int = 0, *, queue: int = 0) -> bytes:
        """One request, to its end: ``data`` for the device to read and ``room`` bytes to write into. Returns what it wrote."""
        return self.run(self._request(data, room, queue))

    async def _request(self, data: bytes, room: int, queue: int) -> bytes:
        driver = self.frontend.queues[queue]
        submitted = driver.submit([data] if data else [], [room] if room else [])
        while submitted.written is None:
            await driver.wait_async()
        return submitted.data

    def read_config(self, offset: int, size: int) -> bytes:
        """The driver reads ``size`` bytes of the config space. Refused (testing/frontend.py) when the device did."""
        return self.run(self.frontend.read_config(offset, size))

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the config space. Refused when the device did."""
        self.run(self.frontend.write_config(offset, data))

    def config_change(self) -> None:
        """Wait for the configuration interrupt that the device caused with ``config_changed()``."""
        request = self.run(self.frontend.backend_request())
        assert request is BackendRequest.CONFIG_CHANGE_MSG, f"{request.name} came instead of a configuration change"

    def broken(self, queue: int = 0) -> None:
        """Wait until the device says that the driver has broken the queue (its error descriptor is signalled)."""
        self.run(self._broken(self.frontend.queues[queue].err_fd))

    async def _broken(self, fd: int) -> None:
        signalled = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(fd, signalled.set)
        try:
            await signalled.wait()
        finally:
            loop.remove_reader(fd)
        os.eventfd_read(fd)

    def pause(self) -> None:
        """QEMU's stop: all queues stop."""
        self.run(self.frontend.pause())

    def resume(self) -> None:
        """QEMU's cont: they go on where they stopped."""
        self.run(self.frontend.resume())

    def reboot(self) -> None:
        """The guest starts anew, with queues elsewhere in its memory."""
        self.run(self.frontend.reboot())


class VhostUser(Protocol):
    """The type of the fixture's value, for annotations."""

    def __call__(self, device: Device, **options: Any) -> AttachedGuest: ...


class _Failures(logging.Handler):
    """Keeps the exceptions that the library logs: those that escaped from a device."""

    def __init__(self, keep: Callable[[BaseException], None]) -> None:
        super().__init__(logging.ERROR)
        self._keep = keep

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self._keep(record.exc_info[1])


@pytest.fixture
def vhost_user() -> Iterator[VhostUser]:
    """``vhost_user(device, **options)`` gives a guest the device; options are those of ``testing.frontend.attach``.

    Returns an AttachedGuest. When the test is over the guest goes, the device is disconnected, and an exception that escaped
    from the device fails the test with DeviceFailed. Several devices in one test have a loop each.
    """
    with contextlib.ExitStack() as stack:

        def start(device: Device, **options: Any) -> AttachedGuest:
            return stack.enter_context(_attached(device, options))

        yield start


@contextlib.contextmanager
def _attached(device: Device, options: dict[str, Any]) -> Iterator[AttachedGuest]:
    log = logging.getLogger("vhostsock")
    with asyncio.Runner() as runner:
        guest = AttachedGuest(runner)
        handler = _Failures(lambda error: guest.failures.append(error))
        log.addHandler(handler)
        try:
            attachment = attach(device, **options)
            guest.frontend = guest.run(attachment.__aenter__())
            try:
                yield guest
            finally:
                guest.run(attachment.__aexit__(None, None, None))
        finally:
            log.removeHandler(handler)
    guest.check()
