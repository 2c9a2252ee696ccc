# SPDX-License-Identifier: BSD-3-Clause
"""A guest with CPython's test suite, and a namespace in it whose loopback is the device's: tests run natively and offloaded."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.conftest import whole_initramfs
from tests.e2e.vm import Backend, Vm, script

IN_GUEST = Path(__file__).with_name("in_guest.py")
PACKAGES = ("python3.11", "libpython3.11-testsuite", "openssl", "ca-certificates", "iproute2")
POLICY = '[hairpin]\nnetns = "judge"\n'
NAMES = {"native": "", "offloaded": "echo judge >/proc/net/hwsock_netns; "}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test: ok, skip, fail, hang or crash, and for the others than ok why."""

    test: str
    outcome: str
    why: str

    @property
    def good(self) -> bool:
        return self.outcome in ("ok", "skip")


class JudgeGuest:
    """``run`` runs tests, natively or offloaded, each time in a new network namespace with nothing but its loopback."""

    def __init__(self, backend: Backend, vm: Vm, versions: str) -> None:
        self.backend = backend
        self.vm = vm
        self.versions = versions  # of the packages, a line each
        self._runs = 0
        vm.run("cat >/tmp/in_guest.py", input=IN_GUEST.read_bytes())
        vm.run("ln -sf /proc/self/fd /dev/fd; ln -sf fd/0 /dev/stdin; ln -sf fd/1 /dev/stdout; ln -sf fd/2 /dev/stderr")

    def run(self, how: str, names: Sequence[str], *, seconds: int, within: int,
            seen: Callable[[Outcome], None] = lambda outcome: None) -> dict[str, Outcome]:  # fmt: skip
        """The outcomes by test. ``how``: a key of NAMES. A test hangs after ``seconds``; ``within`` bounds the whole."""
        self._runs += 1
        folder = f"/tmp/judge{self._runs}"
        program = f"in-image 'cd {folder} && python3.11 /tmp/in_guest.py {folder}/results {seconds} {' '.join(names)}'"
        inner = f'ip link set lo up; {NAMES[how]}exec "$@"'
        self.vm.run(f"mkdir {folder}; echo \"{program}\" >{folder}/run")
        running = self.vm.start(f"unshare -n sh -c '{inner}' sh sh {folder}/run", timeout=within)
        outcomes: dict[str, Outcome] = {}
        lines = 0
        finished = False
        while not finished:
            finished = running.done
            text = self.vm.run(f"tail -n +{lines + 1} {folder}/results 2>/dev/null; true", timeout=600).output.decode()
            for line in text.split("\n")[:-1]:  # whole ones
                lines += 1
                said = json.loads(line)
                if "test" in said:
                    outcome = outcomes[said["test"]] = Outcome(said["test"], said["outcome"], said["why"])
                    seen(outcome)
            if not finished:
                time.sleep(1)
        running.wait()
        self.vm.run(f"rm -rf {folder}")
        return outcomes


@contextlib.contextmanager
def judge_guest(folder: Path, initramfs: str = "", *boot: str) -> Iterator[JudgeGuest]:
    """Boot it, with its back-end. Needs root, for the namespace of the host."""
    initramfs = initramfs or whole_initramfs(folder)
    disk = script("make-guest-image", *PACKAGES, timeout=1800)
    policy = folder / "policy.toml"
    policy.write_text(POLICY)
    with (
        Backend(folder, "offload", "--policy", policy, "--name", "judge") as backend,
        Vm(folder, initramfs, "--socket", backend.socket, "--memory", "1G", *boot, disk=disk) as vm,
    ):
        yield JudgeGuest(backend, vm, Path(disk).with_name("versions").read_text())
