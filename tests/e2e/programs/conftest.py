# SPDX-License-Identifier: BSD-3-Clause
"""One guest for all programs, and the table of what they did: docs/programs.md.

A slice runs every day, as part of tests/run --e2e; the rest is marked ``by_hand`` and has an entry of its own, `run`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.programs.house import FEW_PACKAGES, PACKAGES, House, house
from tests.e2e.programs.table import Row, write

HERE = Path(__file__).resolve().parent
EVERY_DAY = {
    "test_curl_downloads": "bulk, four connections at once, and one kept alive",
    "test_curl_speaks_http_2": "TLS, a name resolved over UDP, many streams on one connection",
    "test_hey": "Go's own poller, non-blocking sockets in many threads",
    "test_nginx_is_reloaded_under_load": "a listener that processes share and inherit, while it is used",
    "test_ssh_to_the_guest": "a server that forks, descriptors passed on, half-closed connections",
    "test_git_with_the_host": "sockets as another program's standard input and output; gateways of a web server",
    "test_redis_of_the_host": "many small requests, pipelines, messages that are pushed",
    "test_dig_asks_the_host": "datagrams, and glibc's resolver",
}
"""The slice, and what each adds to it. It has a disk of its own, with what it needs and no more."""
RESULTS: dict[str, Row] = {}
Done = Callable[[str], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All but the slice is run by hand, and the long run has long tests."""
    for item in items:
        if HERE in item.path.parents:
            if item.name not in EVERY_DAY:
                item.add_marker(pytest.mark.by_hand)
            if os.environ.get("VHOSTSOCK_PROGRAMS_LONG"):
                item.add_marker(pytest.mark.timeout(14400), append=False)


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest, initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    whole = any(HERE in item.path.parents and item.get_closest_marker("by_hand") for item in request.session.items)
    with house(tmp_path_factory.mktemp("programs"), initramfs, PACKAGES if whole else FEW_PACKAGES) as it:
        yield it


@pytest.fixture(autouse=True)
def _leaves_no_socket(programs: House) -> Iterator[None]:
    """What a program has opened ends with it: afterwards neither the guest's module nor the device holds anything."""
    yield
    programs.settled()


@pytest.fixture
def done(request: pytest.FixtureRequest, programs: House) -> Done:
    """Called at the end of a test with the amount: its row of the table is complete."""

    def note(amount: str) -> None:
        marker = request.node.get_closest_marker("program")
        assert marker, "a test of a program says what it does: @pytest.mark.program(package, direction, did, checked)"
        package, direction, did, checked = marker.args
        RESULTS[request.node.name] = Row(package, programs.version(package), direction, did, checked, amount)

    return note


def pytest_sessionfinish() -> None:
    out = os.environ.get("VHOSTSOCK_PROGRAMS_TABLE")
    if out and RESULTS:
        write(Path(out), list(RESULTS.values()))
