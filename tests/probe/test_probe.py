# SPDX-License-Identifier: BSD-3-Clause
"""``vhostsock probe`` as a command, and what it says of this project's own devices: nothing bad."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostsock.cli import main
from vhostsock.probe.table import CHECKS
from vhostsock.probe.traffic import TRAFFIC

COMMAND = (sys.executable, "-m", "vhostsock")
# of this project, with the arguments that they need; {folder}: a folder with an image
OWN_DEVICES = {
    "echo": (),
    "rng": (),
    "blk": ("--image", "{folder}/disk.img"),
    "vsock": ("--uds-path", "{folder}/vsock"),
}


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, "probe", *arguments], capture_output=True, text=True, timeout=100, check=False)


@contextlib.contextmanager
def served(device: str, folder: Path) -> Iterator[str]:
    """A back-end process with the device; gives the path of its socket."""
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    path = folder / "socket"
    more = [argument.format(folder=folder) for argument in OWN_DEVICES[device]]
    arguments = [*COMMAND, "serve", device, "--socket-path", str(path), "--log-level", "error", *more]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.readline()  # it listens
        try:
            yield str(path)
        finally:
            process.terminate()


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Verdict by check."""
    return {row["check"]: row for row in json.loads(done.stdout)["results"]}


@pytest.mark.parametrize("device", OWN_DEVICES)
def test_devices_of_this_project_pass_every_check_that_applies(device: str, tmp_path: Path) -> None:
    with served(device, tmp_path) as path:
        done = probe(path, "--device", device, "--hostile", "--json")
    rows = report(done)
    assert done.returncode == 0, [row for row in rows.values() if row["verdict"] not in ("pass", "not_applicable")]
    assert rows.keys() == {check.name for check in CHECKS}
    for row in rows.values():
        if row["verdict"] == "not_applicable":
            assert row["detail"].endswith("is not offered") or "--exec" in row["detail"] or "no config space" in row["detail"]


def test_back_end_that_is_started_for_each_check_passes_too() -> None:
    command = shlex.join([*COMMAND, "serve", "echo", "--socket-path", "{socket}", "--log-level", "error"])
    done = probe("--exec", command, "--device", "echo", "--only", "it_ends_*", "--only", "a_request_is_completed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "2 pass"


def test_report_names_what_is_offered(tmp_path: Path) -> None:
    with served("rng", tmp_path) as path:
        done = probe(path, "--only", "features_*")
    assert "EVENT_IDX" in done.stdout
    assert "REPLY_ACK" in done.stdout
    assert "pass  features_are_offered_before_anything_else_is_said" in done.stdout


def test_bad_verdict_is_shown_with_clause_and_transcript_and_sets_the_exit_status(tmp_path: Path) -> None:
    silent = tmp_path / "silent.py"
    silent.write_text(SILENT)
    command = shlex.join([sys.executable, str(silent), "{socket}"])
    done = probe("--exec", command, "--device", "rng", "--only", "a_request_is_completed")
    assert done.returncode == 1
    assert "FAIL  a_request_is_completed\n      request 0 was completed wrongly: no byte was written" in done.stdout
    assert "-> SET_VRING_ENABLE" in done.stdout
    assert "it rests on: Ring states" in done.stdout


SILENT = """
import asyncio, sys
from vhostsock import Device, Server

class Silent(Device):
    virtio_id = 4
    async def handle(self, queue, chain):
        pass

async def main():
    async with Server(Silent(), path=sys.argv[1]) as server:
        await server.serve_forever()

asyncio.run(main())
"""


def test_back_end_that_does_not_start_is_reported_with_its_status() -> None:
    done = probe("--exec", "false {socket}")
    assert done.returncode == 1
    assert done.stderr == "vhostsock: it ended with status 1\n"


def test_socket_that_nobody_listens_on_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(tmp_path / "nobody")]) == 1
    assert "nobody: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "say which back-end"),
        (("--exec", "true"), "needs {socket}"),
        (("socket", "--only", "nonsense"), "no check matches nonsense"),
        (("socket", "--timeout", "0"), "--timeout must be more than 0"),
    ],
)
def test_wrong_command_line_is_explained(arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["probe", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status
    assert text in capsys.readouterr().err


def test_list_says_what_each_check_claims_and_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--list", "--hostile"]) == 0
    listing = capsys.readouterr().out
    for check in CHECKS:
        assert check.text
        assert check.clause
        assert f"\n    {check.text}\n    [{check.clause}]" in listing


def test_names_of_checks_are_unique_claims() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.hostile == (check.run.__module__.rsplit(".", 1)[1].startswith("hostile")) for check in CHECKS)


def test_traffic_of_each_device_type_is_told_from_nonsense() -> None:
    for name, row in TRAFFIC.items():
        readable, writable = row.request(1)
        assert readable or writable, name
        assert row.judge(1, b"\x01" if not writable else b""), f"{name}: anything will do as an answer"
