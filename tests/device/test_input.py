# SPDX-License-Identifier: BSD-3-Clause
"""The input device: questions to its config space, reports to the guest and lamps from it, and the socket with the lines."""

from __future__ import annotations

import asyncio
import os
import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.aio import in_loop
from vhostsock import UsageError
from vhostsock.devices.input import (
    ABS_INFO,
    CONFIG_SIZE,
    EV_BITS,
    ID_DEVIDS,
    ID_NAME,
    ID_SERIAL,
    PENDING_MAX,
    PROFILES,
    Event,
    Input,
)
from vhostsock.devices.input_codes import CODES, EventType, code_name
from vhostsock.devices.input_socket import CLIENTS_MAX, SocketInput, parse_line
from vhostsock.testing.frontend import Frontend, attach
from vhostsock.testing.plugin import AttachedGuest, VhostUser

pytest_plugins = ["vhostsock.testing.plugin"]

SYN = Event(0, 0, 0)
PRESS, RELEASE = Event(1, 30, 1), Event(1, 30, 0)


def answer(guest: AttachedGuest, select: int, subsel: int = 0) -> bytes:
    """As a driver asks: a byte at a time."""
    guest.write_config(0, bytes([select]))
    guest.write_config(1, bytes([subsel]))
    config = guest.read_config(0, CONFIG_SIZE)
    assert config[:2] == bytes([select, subsel])
    assert not any(config[8 + config[2] :])
    return config[8 : 8 + config[2]]


def codes(bits: bytes) -> set[int]:
    return {8 * i + bit for i, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}


# ---- config space


def test_a_tablet_says_what_it_is(vhost_user: VhostUser) -> None:
    guest = vhost_user(Input(PROFILES["tablet"], name="Zeichenbrett äöü", serial="42"))
    assert answer(guest, ID_NAME).decode() == "Zeichenbrett äöü"
    assert answer(guest, ID_SERIAL) == b"42"
    assert struct.unpack("<4H", answer(guest, ID_DEVIDS)) == (6, 0, 3, 1)
    assert codes(answer(guest, EV_BITS, EventType.EV_ABS)) == {0, 1}
    assert codes(answer(guest, EV_BITS, EventType.EV_KEY)) == {0x110, 0x111, 0x112, 0x113, 0x114}
    assert struct.unpack("<5i", answer(guest, ABS_INFO, 1)) == (0, 0x7FFF, 0, 0, 0)


@pytest.mark.parametrize(("select", "subsel"), [(0, 0), (ID_NAME, 1), (EV_BITS, EventType.EV_ABS), (ABS_INFO, 0), (0xFF, 0xFF)])
def test_to_what_it_knows_nothing_of_it_has_no_answer(vhost_user: VhostUser, select: int, subsel: int) -> None:
    assert answer(vhost_user(Input()), select, subsel) == b""


def test_of_a_write_to_the_whole_space_only_the_question_counts(vhost_user: VhostUser) -> None:
    guest = vhost_user(Input(name="kbd"))
    stale = bytes([ID_NAME, 0, 99]).ljust(CONFIG_SIZE, b"\xee")  # as QEMU's generic device sends it
    guest.write_config(0, stale)
    assert guest.read_config(0, 12) == bytes([ID_NAME, 0, 3, 0, 0, 0, 0, 0]) + b"kbd\0"
    guest.write_config(2, bytes(134))  # nothing of the question
    assert guest.read_config(8, 3) == b"kbd"
    guest.write_config(1, bytes([7]) + bytes(134))
    assert guest.read_config(0, 3) == bytes([ID_NAME, 7, 0])


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="128"):
        Input(name="ä" * 65)


def test_names_of_codes_are_those_of_the_kernel() -> None:
    path = Path("/usr/include/linux/input-event-codes.h")
    if not path.exists():
        pytest.skip("the kernel's headers are not installed")
    defined = re.findall(r"^#define (\w+)\s+(0x[0-9a-f]+|\d+)\b", path.read_text(), re.MULTILINE)
    kernel = {name: int(number, 0) for name, number in defined}
    for kind, names in CODES.items():
        assert kernel[kind.name] == kind
        assert {name: kernel[name] for name in names} == names


# ---- events


def buffers(guest: AttachedGuest, count: int) -> None:
    for _ in range(count):
        guest.frontend.queues[0].submit([], [8])


def taken(guest: AttachedGuest, count: int) -> list[Event]:
    done: list[Event] = []
    while len(done) < count:
        used = guest.run(guest.frontend.queues[0].wait_async(count - len(done)))
        done += [Event(*struct.unpack("<HHi", request.data)) for request in used]
    return done


def test_a_report_reaches_the_guest_event_by_event_once_it_is_complete(vhost_user: VhostUser) -> None:
    device = Input()
    guest = vhost_user(device)
    buffers(guest, 8)
    guest.run(guest.frontend.settled())
    assert device.inject([PRESS])
    guest.run(guest.frontend.settled())
    assert guest.frontend.queues[0].collect() == []
    assert device.inject([SYN, RELEASE, SYN])
    assert taken(guest, 4) == [PRESS, SYN, RELEASE, SYN]


def test_events_wait_for_buffers_also_across_a_pause(vhost_user: VhostUser) -> None:
    device = Input(PROFILES["mouse"])
    guest = vhost_user(device)
    guest.run(guest.frontend.settled())
    moves = [Event(EventType.EV_REL, 0, -i) for i in range(20)]
    for move in moves:
        assert device.inject([move, SYN])
    buffers(guest, 3)
    assert taken(guest, 3) == [moves[0], SYN, moves[1]]
    buffers(guest, 1)
    guest.pause()
    guest.resume()
    buffers(guest, 36)
    assert [event for event in [moves[0], SYN, moves[1], *taken(guest, 37)] if event != SYN] == moves


def test_whole_reports_are_dropped_when_the_guest_takes_none(vhost_user: VhostUser) -> None:
    device = Input()
    guest = vhost_user(device)
    guest.run(guest.frontend.settled())
    results = [device.inject([PRESS, SYN]) for _ in range(PENDING_MAX)]
    assert results == [True] * (PENDING_MAX // 2) + [False] * (PENDING_MAX // 2)
    assert not device.inject([PRESS] * (PENDING_MAX + 5) + [SYN])  # one that could never fit
    guest.reboot()  # and what waited is no news to the next driver
    buffers(guest, 2)
    guest.run(guest.frontend.settled())
    device.inject([RELEASE, SYN])
    assert taken(guest, 2) == [RELEASE, SYN]


def test_without_a_driver_events_go_nowhere() -> None:
    assert not Input().inject([PRESS, SYN])


@pytest.mark.parametrize("event", [Event(1, 0x110, 1), Event(2, 0, 1), Event(21, 0, 1), Event(1, 30, 1 << 31)])
def test_a_keyboard_sends_nothing_that_it_has_not_announced(event: Event) -> None:
    with pytest.raises(UsageError, match="keyboard cannot send"):
        Input().inject([event])


def test_a_lamp_of_the_guest_is_told(vhost_user: VhostUser) -> None:
    told: list[Event] = []
    guest = vhost_user(Input(on_event=told.append))
    guest.request(struct.pack("<HHi", 17, 1, 1), queue=1)
    assert told == [Event(17, 1, 1)]


@pytest.mark.parametrize("queue", [0, 1])
def test_a_request_too_short_for_an_event_breaks_its_ring(
    vhost_user: VhostUser, queue: int, caplog: pytest.LogCaptureFixture
) -> None:
    guest = vhost_user(Input())
    guest.frontend.queues[queue].submit(*(([], [7]) if queue == 0 else ([bytes(7)], [])))
    guest.run(guest.frontend.settled())
    guest.run(guest.frontend.settled())
    assert "an event has 8" in caplog.text


# ---- the socket


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("EV_KEY KEY_A 1", PRESS),
        ("1 30 0  # released", RELEASE),
        ("EV_SYN SYN_REPORT 0", SYN),
        ("EV_REL REL_X -0x10", Event(2, 0, -16)),
        ("0x15 0x3 7", Event(21, 3, 7)),
        ("", None),
        ("   # nothing", None),
    ],
)
def test_a_line_is_an_event_in_the_words_of_evdev(line: str, event: Event | None) -> None:
    assert parse_line(line) == event
    if event:
        assert parse_line(" ".join((*code_name(event.type, event.code), str(event.value)))) == event


@pytest.mark.parametrize("line", ["EV_KEY", "EV_KEY KEY_NONE 1", "EV_NONE 1 1", "1 2 x", "1 70000 1", "-1 2 3", "1 2 3 4"])
def test_a_line_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_line(line)


@asynccontextmanager
async def keyboard(tmp_path: Path) -> AsyncIterator[tuple[Frontend, str]]:
    path = str(tmp_path / "events")
    device = SocketInput(path, PROFILES["keyboard"])
    try:
        async with attach(device) as frontend:
            yield frontend, path
    finally:
        device.close()
    assert not os.path.exists(path)  # noqa: ASYNC240


@in_loop
async def test_lines_become_keys_and_lamps_become_lines(tmp_path: Path) -> None:
    async with keyboard(tmp_path) as (frontend, path):
        reader, writer = await asyncio.open_unix_connection(path)
        for _ in range(2):
            frontend.queues[0].submit([], [8])
        writer.write(b"nonsense\nEV_KEY BTN_LEFT 1\nEV_KEY KEY_A 1\nEV_SYN SYN_REPORT 0\n")
        done = await frontend.queues[0].wait_async(2)
        assert [struct.unpack("<HHi", request.data) for request in done] == [PRESS, SYN]
        assert (await reader.readline()).startswith(b"error: a line is TYPE CODE VALUE")
        assert b"cannot send this" in await reader.readline()
        frontend.queues[1].submit([struct.pack("<HHi", 17, 1, 1)])
        assert await reader.readline() == b"EV_LED LED_CAPSL 1\n"
        writer.write(b"x" * 1000 + b"\n")
        assert b"too long" in await reader.readline()
        assert await reader.read() == b""
        writer.close()


@in_loop
async def test_clients_are_bounded_and_end_with_the_front_end(tmp_path: Path) -> None:
    async with keyboard(tmp_path) as (frontend, path):
        clients = [await asyncio.open_unix_connection(path) for _ in range(CLIENTS_MAX + 1)]
        assert await clients[-1][0].readline() == b"error: too many clients\n"
        frontend.close()
        for reader, writer in clients:
            assert await reader.read() == b""
            writer.close()


@in_loop
async def test_a_client_may_come_before_the_front_end_and_is_told_that_there_is_no_driver(tmp_path: Path) -> None:
    path = str(tmp_path / "events")
    device = SocketInput(path, PROFILES["keyboard"])
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"EV_SYN SYN_REPORT 0\n")
    async with attach(device, started=False):
        assert b"takes no events" in await reader.readline()
    writer.close()
    device.close()
