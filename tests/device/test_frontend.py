# SPDX-License-Identifier: BSD-3-Clause
"""The front-end of vhostsock.testing sends what QEMU sends: the same messages, flags and sizes, in the same order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.device.devices import Recorder
from vhostsock.testing.frontend import QEMU_7_2, QEMU_11_1, Dialect, Frontend, attach

TRACES = Path(__file__).parent.parent / "data" / "traces"


def recorded(name: str) -> list[tuple[str, int, int]]:
    text = (TRACES / f"{name}.txt").read_text()
    return [(m[1], int(m[2], 16), int(m[3])) for m in re.finditer(r"-> (\w+)\s+id=\d+ flags=(0x\w+)\S* size=(\d+)", text)]


async def run(frontend: Frontend, steps: str) -> list[tuple[str, int, int]]:
    for step in steps.split():
        await getattr(frontend, step)()
    return frontend.sent


@pytest.mark.parametrize(
    ("trace", "dialect", "queues", "size", "steps"),
    [
        ("q72-rng", QEMU_7_2, 1, 4, "handshake start stop"),
        ("q72-fs-virtiofs-4rings", QEMU_7_2, 4, 1024, "handshake start stop"),
        ("q11-testdev-id4-rng", QEMU_11_1, 1, 64, "handshake start stop"),
        ("q11-testdev-id4-stop-cont-reset", QEMU_11_1, 1, 64, "handshake start pause resume stop"),
        ("q11-testdev-id4-reboot-unplug", QEMU_11_1, 1, 64, "handshake start reboot stop"),
    ],
)
@in_loop
async def test_messages_are_those_that_were_recorded(trace: str, dialect: Dialect, queues: int, size: int, steps: str) -> None:
    device = Recorder(queues)
    async with attach(device, negotiated=False, size=size, memory=[1 << 24], dialect=dialect) as frontend:
        assert await run(frontend, steps) == recorded(trace)
