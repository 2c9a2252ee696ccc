"""No notification is lost between a driver and a device that sleep whenever they may (race.c says how that is provoked)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.ring.conftest import both_formats

pytestmark = pytest.mark.long  # seconds of two threads that do nothing else

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built from the same C files as the extension module."""
    program = tmp_path_factory.mktemp("race") / "race"
    sources = [ROOT / "tests/ring/race.c", *sorted((ROOT / "csrc/core").glob("*.c"))]
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc/core'}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, *sources, "-o", program], check=True, timeout=60)
    return program


@pytest.mark.parametrize(
    ("rounds", "num", "event_idx", "spinner"),
    [
        (200_000, 2, 0, "driver"),  # the device falls asleep while the driver adds: the barrier in enable_kick()
        (200_000, 2, 0, "device"),  # the driver falls asleep while the device completes: the barrier in publish()
        (30_000, 2, 1, "driver"),
        (30_000, 2, 1, "device"),
        (30_000, 8, 1, "none"),
    ],
)
@both_formats
def test_no_notification_is_lost(race: Path, rounds: int, num: int, event_idx: int, spinner: str, packed: bool) -> None:
    command = [str(race), str(rounds), str(num), str(event_idx), spinner, str(int(packed))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
