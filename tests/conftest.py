"""Fixtures for every test: whatever a test takes, it gives back."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from vhostsock._core import lib


def _open_fds() -> dict[int, str]:
    """Each open fd of this process and what it refers to."""
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listdir itself used
            continue
    return fds


def _live_tasks() -> set[asyncio.Task[Any]]:
    """asyncio tasks that are not done, of any loop; all_tasks() would want a running one. The set's name changed in 3.12."""
    known: Any = getattr(asyncio.tasks, "_scheduled_tasks", None) or getattr(asyncio.tasks, "_all_tasks", ())
    return {task for task in list(known) if not task.done()}


def pytest_configure() -> None:
    """A run started in the background of a script has SIGINT ignored, and so would the programs that tests end with it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # no test is a race
    settings.load_profile("any machine")


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = report.failed or item.stash.get(_failed, False)
    return report


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves an fd open, guest memory mapped, or an asyncio task unfinished."""
    # what is alive now is not this test's: frozen, so that the collection afterwards looks at its objects only
    gc.freeze()
    fds, regions, tasks = _open_fds(), lib.vs_region_count_live(), _live_tasks()
    yield
    if request.node.stash.get(_failed, False):
        return  # the traceback keeps alive what the test used, and is news enough
    gc.collect()
    give_up = time.monotonic() + 30
    while (leaked := {fd: name for fd, name in _open_fds().items() if fds.get(fd) != name}) and time.monotonic() < give_up:
        time.sleep(0.01)  # a thread that plays a program of the host closes when it sees the end of its peer, just now
    assert not leaked, f"open fds left behind: {leaked}"
    assert lib.vs_region_count_live() <= regions, f"guest memory regions left mapped: {lib.vs_region_count_live() - regions}"
    assert not _live_tasks() - tasks, f"asyncio tasks left running: {_live_tasks() - tasks}"
