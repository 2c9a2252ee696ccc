# SPDX-License-Identifier: BSD-3-Clause
"""Back-ends of others, as Debian packages them, and the probe's verdicts on them.

    tests/bench/run others          probes all of BACKENDS and prints the table of docs/probe.md

Each is started for each check. What they serve is harmless: an empty folder, a disk of zeros, a port that nobody listens on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["BACKENDS", "Backend", "fetched", "main", "probe"]

ROOT = Path(__file__).resolve().parents[2]
QSD = (
    "--blockdev driver=null-co,node-name=disk,read-zeroes=on,size=1048576"
    " --export type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={socket},writable=on"
)


class Backend(NamedTuple):
    """suite, package, program: as fetch-program has them; {folder} in the arguments is an empty folder."""

    title: str
    device: str
    suite: str
    package: str
    program: str
    arguments: str

    @property
    def name(self) -> str:
        return f"{self.program}-{self.suite}"


FS = "--socket-path {socket} --shared-dir {folder} --sandbox none --seccomp none"
BACKENDS = (
    Backend("virtiofsd", "fs", "trixie", "virtiofsd", "virtiofsd", FS),
    Backend("virtiofsd", "fs", "sid", "virtiofsd", "virtiofsd", FS),
    Backend(
        "vhost-device-vsock", "vsock", "sid", "vhost-device-vsock", "vhost-device-vsock",
        "--guest-cid 3 --uds-path {folder}/vsock --socket {socket}",
    ),
    Backend("qemu-storage-daemon", "blk", "trixie", "qemu-utils", "qemu-storage-daemon", QSD),
    Backend("qemu-storage-daemon", "blk", "sid", "qemu-utils", "qemu-storage-daemon", QSD),
    Backend("passt", "net", "trixie", "passt", "passt", "--vhost-user -f -s {socket}"),
    Backend("passt", "net", "sid", "passt", "passt", "--vhost-user -f -s {socket}"),
)  # fmt: skip


def fetched(backend: Backend) -> Path:
    arguments = [str(ROOT / "qemu-scripts" / "fetch-program"), backend.suite, backend.package, backend.program]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return Path(done.stdout.strip())


def probe(backend: Backend, *more: str) -> dict[str, Any]:
    """The probe's JSON on it."""
    program = fetched(backend)
    with tempfile.TemporaryDirectory(prefix="vhostsock-others-") as folder:
        command = f"{program} {backend.arguments.replace('{folder}', folder)}"
        arguments = [sys.executable, "-m", "vhostsock", "probe", "--exec", command, "--device", backend.device, "--json", *more]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode in (0, 1), done.stderr
    return dict(json.loads(done.stdout))


def version_of(backend: Backend) -> str:
    """Of the upstream project, as Debian's version has it."""
    version = (fetched(backend).parent / "VERSION").read_text().strip()
    dated = re.search(r"git(\d{8})", version)
    return dated[1] if dated else re.sub(r"^\d+:|[-+].*$", "", version)


def main(_arguments: Sequence[str] = ()) -> None:
    answers = {backend.name: probe(backend, "--hostile") for backend in BACKENDS}
    rows = {name: {row["check"]: row for row in answer["results"]} for name, answer in answers.items()}
    words = {"pass": "·", "not_applicable": "-", "fail": "FAIL", "died": "DIED", "hung": "HUNG"}
    print("| check | " + " | ".join(f"{backend.title} {version_of(backend)}" for backend in BACKENDS) + " |")
    print("|---|" + "---|" * len(BACKENDS))
    for check in next(iter(rows.values())):
        verdicts = [words[row[check]["verdict"]] for row in rows.values()]
        if set(verdicts) - {"·", "-"}:
            print(f"| `{check}` | " + " | ".join(verdicts) + " |")
    for word in ("pass", "fail", "died", "hung", "not_applicable"):
        counts = [str(sum(row["verdict"] == word for row in checks.values())) for checks in rows.values()]
        print(f"| *{word.replace('not_applicable', 'not applicable')}* | " + " | ".join(counts) + " |")
    for name, checks in rows.items():
        for check, row in checks.items():
            if row["verdict"] in ("fail", "died", "hung"):
                words_of_it = [line.strip() for line in row["evidence"] if "its output" in line][-1:]
                print(name, check, row["verdict"], row["detail"], *words_of_it, sep=" | ", file=sys.stderr)
