# SPDX-License-Identifier: BSD-3-Clause
"""The examples run, and the documentation shows what runs."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aio import in_loop
from vhostsock.testing.frontend import Frontend

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NAMES = ("writing-a-device.md", "testing-a-device.md", "policy.md", "vsock.md")
GUIDES = [(ROOT / "docs" / name).read_text() for name in NAMES]
BLOCKS = [block for guide in GUIDES for block in re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)]


@in_loop
async def test_loaded_dice_answers_a_driver(tmp_path: Path) -> None:
    path = str(tmp_path / "dice.sock")
    program = await asyncio.create_subprocess_exec(
        sys.executable, ROOT / "examples" / "loaded_dice.py", path, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        assert program.stdout
        assert await program.stdout.readline() == f"listening on {path}\n".encode()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        async with Frontend(sock) as frontend:
            await frontend.handshake()
            await frontend.start()
            for number in (1, 2):
                frontend.queues[0].submit([], [15])
                [done] = await frontend.queues[0].wait_async()
                assert done.data == (b"roll %d: 6\n" % number * 2)[:15]
            await frontend.stop()
        program.send_signal(signal.SIGINT)
        assert await program.wait() == 0
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    assert not Path(path).exists()  # noqa: ASYNC240


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_a_guide_shows_each_example_as_it_is(path: Path) -> None:
    assert path.read_text() in BLOCKS


@pytest.mark.parametrize("block", [b for b in BLOCKS if "__main__" not in b and "def test_" not in b])
def test_what_a_guide_shows_runs(block: str) -> None:
    exec(compile(block, "docs/*.md", "exec"), {"__name__": "guide"})


@pytest.mark.parametrize("block", [b for b in BLOCKS if "def test_" in b])
def test_a_test_that_a_guide_shows_passes(block: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "loaded_dice.py", tmp_path)
    (tmp_path / "test_guide.py").write_text(block)
    command = (sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "test_guide.py")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"\b{block.count('def test_')} passed", done.stdout)
