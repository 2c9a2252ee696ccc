# SPDX-License-Identifier: BSD-3-Clause
"""The demo holds what it shows, and leaves nothing behind: not when it succeeds, not when it is interrupted at any stage."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.vm import ROOT, SCRIPTS, Program

DEMO = SCRIPTS / "demo"
IGNORED = {".cache", ".git", ".venv", "__pycache__"}


class Demo(Program):
    """The demo under a mark that all its descendants inherit."""

    def __init__(self, log: Path) -> None:
        self.mark = f"DEMO_TEST={uuid.uuid4()}"
        super().__init__(log, ["env", self.mark, DEMO])

    def processes(self) -> list[str]:
        """The command lines of all processes that the demo started and that still run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found


def files() -> set[Path]:
    """Every file of the checkout outside the cache, and what lies directly in /tmp under our names."""
    found = {Path("/tmp") / name for name in os.listdir("/tmp") if "vhostsock" in name or "demo" in name}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in IGNORED]
        found |= {Path(folder) / name for name in names}
    return found


@pytest.fixture(autouse=True)
def no_file_outside_the_cache() -> Iterator[None]:
    before = files()
    yield
    assert files() == before


def test_demo_holds_and_leaves_no_process(tmp_path: Path) -> None:
    with Demo(tmp_path / "demo.log") as demo:
        status = demo.process.wait(250)
        text = demo.log.read_text()
        assert status == 0, text
        assert not demo.processes()
    for claim in ("sha256 is the same on both sides", "Permission denied", "answers 'hello-", "All of it held"):
        assert claim in text
    calls = re.search(r"calls into Python during these 16777216 bytes: (\d+) ", text)
    assert calls
    assert int(calls[1]) <= 16


# what the demo has said when it is interrupted: while it prepares, when the back-end runs, when the guest runs
@pytest.mark.parametrize("stage", ["Getting ready", "the back-end, with this policy", "wget has it"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_demo_leaves_no_process(tmp_path: Path, stage: str, number: signal.Signals, status: int) -> None:
    with Demo(tmp_path / "demo.log") as demo:
        demo.await_log(stage)
        demo.process.send_signal(number)
        assert demo.process.wait(60) == status, demo.log.read_text()
        assert not demo.processes()
        assert "All of it held" not in demo.log.read_text()


def test_demo_fails_when_something_does_not_hold(tmp_path: Path) -> None:
    """A guest without our module: the first thing that needs it fails the demo, with what is wrong and where the logs are."""
    for name in ("csrc", "vhostsock", "qemu-scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "LICENSES", tmp_path / "LICENSES")
    demo = tmp_path / "qemu-scripts" / "demo"
    demo.write_text(DEMO.read_text().replace('--module "$module"', ""))
    assert demo.read_text() != DEMO.read_text()
    environment = {**os.environ, "VHOSTSOCK_CACHE": os.environ.get("VHOSTSOCK_CACHE", str(ROOT / ".cache"))}
    done = subprocess.run([demo], capture_output=True, text=True, timeout=1000, stdin=subprocess.DEVNULL, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED  the guest does not boot, or its module does not work" in done.stderr
    assert "All of it held" not in done.stdout
