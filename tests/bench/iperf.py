# SPDX-License-Identifier: BSD-3-Clause
"""iperf3 as Debian builds it, the same on both sides: its files for a guest's root, its server on the host, its client's word.

The client says what the receiver has counted, over the receiver's own time. A run takes a second: it knows no shorter time, and
with an amount (--bytes) it looks once a second whether that is through, and counts until then.
"""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from tests.e2e.vm import Program, script
from vhostsock.testing.guest import Result

__all__ = ["GUEST", "carried", "client", "numbers", "server"]

FOLDER = "/iperf3"
GUEST = f"{FOLDER}/ld-linux-x86-64.so.2 --library-path {FOLDER} {FOLDER}/iperf3"
GIGA = 1e9


@cache
def fetched() -> Path:
    """The program, made to run here."""
    return Path(script("fetch-program", "trixie", "iperf3", "iperf3"))


def carried() -> list[str]:
    """Arguments of mkinitramfs: the program and the libraries that it is linked with, from the same packages, in `FOLDER`."""
    root = fetched().parent / "root"
    program, loader = root / "usr/bin/iperf3", root / "usr/lib64/ld-linux-x86-64.so.2"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    listed = subprocess.run(
        [loader, "--library-path", libraries, "--list", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    files = [program, loader, libraries / "libgcc_s.so.1"]  # the C library loads that when a thread is cancelled
    files += map(Path, re.findall(r"=> (\S+/lib/\S+) \(", listed))
    return [word for file in files for word in ("--add", f"{file}={FOLDER}/{file.name}")]


def server(log: Path, address: str, port: int) -> Program:
    """One that serves test after test at that address of the host."""
    it = Program(log, [fetched(), "--server", "--forceflush", "--bind", address, "--port", str(port)])
    it.await_log("Server listening")
    return it


def client(where: str, options: str) -> str:
    """The command in a guest. ``where``: ADDRESS:PORT."""
    address, port = where.split(":")
    return f"{GUEST} --client {address} --port {port} --json --interval 0 --time 1 {options}"


def numbers(result: Result) -> list[int]:
    """Bytes that the receiver has, its nanoseconds, and the bytes that a cost is of. AssertionError if it failed."""
    said: dict[str, Any] = json.loads(result.text)
    assert "error" not in said, said["error"]
    received = said["end"]["sum_received"]
    return [received["bytes"], max(int(received["seconds"] * GIGA), 1), max(received["bytes"], 1)]
