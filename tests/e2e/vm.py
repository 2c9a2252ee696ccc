# SPDX-License-Identifier: BSD-3-Clause
"""Real processes for the end-to-end tests: the back-end (`vhostsock serve`), helpers on the host, and guests under QEMU.

Everything here is a context manager that ends what it started, by its process, also when a test fails. The guests come from the
same scripts that a user has (qemu-scripts/); commands run in them over the agent's port, see vhostsock/testing/guest.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from vhostsock.testing.guest import Command, Guest, Result, in_image

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "qemu-scripts"
BOOT = 180.0  # seconds that a kernel may take to its first program; in use are 2 to 5, and more when it checks itself
WITHIN = 300.0
"""Seconds within which anything must happen that a test awaits, on a busy machine, too; never how long something takes."""

FIRST_PROGRAM = "init: the first program runs"
"""What qemu-scripts/guest/init writes into the kernel's log, loud enough for a kernel that is told to be quiet."""
BROKEN = re.compile(r"BUG:|Oops|WARNING:|Kernel panic|unable to handle|general protection|blocked for more than|refcount_t")
T = TypeVar("T", bound="Program")


def script(name: str, *arguments: str, timeout: float = 600) -> str:
    """Run a script of qemu-scripts/; the last line it prints (a path). AssertionError with all it said if it fails."""
    command: list[str | Path] = [SCRIPTS / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout)
    assert done.returncode == 0, f"{name} {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
    return done.stdout.strip().splitlines()[-1]


def wait_until(true: Callable[[], object], what: str) -> None:
    """Look until ``true()`` is; AssertionError after `WITHIN`. For states of another process that send no event."""
    deadline = time.monotonic() + WITHIN
    while not true():
        assert time.monotonic() < deadline, f"not within {WITHIN:.0f} s: {what}"
        time.sleep(0.02)


class Program:
    """A process of ours with a log file; ``ready`` is a pattern in the log that says it is up."""

    def __init__(self, log: Path, command: Sequence[str | Path]) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)

    def await_log(self, pattern: str, start: int = 0) -> re.Match[str]:
        """The first match of ``pattern`` in the log from offset ``start`` on, once it is there."""
        expression = re.compile(pattern)

        def found() -> re.Match[str] | None:
            alive = self.process.poll() is None  # first, so that all it wrote is looked at
            match = expression.search(self.log.read_text(errors="replace")[start:])
            assert match or alive, f"{self.process.args!r} ended with status {self.process.returncode}:\n{self.log.read_text()}"
            return match

        wait_until(found, f"{pattern!r} in the log:\n{self.log.read_text()}")
        match = found()
        assert match
        return match

    def logged(self) -> int:
        """The offset of what it will log from now on."""
        return len(self.log.read_text(errors="replace"))

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process and wait for it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)
                raise AssertionError(f"{self.process.args!r} did not end on SIGTERM:\n{self.log.read_text()}") from None


class Backend(Program):
    """`vhostsock serve DEVICE` on a socket in ``folder``."""

    def __init__(self, folder: Path, device: str, *options: str | Path) -> None:
        self.socket = folder / f"{device}.sock"
        super().__init__(
            folder / f"{device}.log",
            [Path(sys.executable).with_name("vhostsock"), "serve", device, "--socket-path", self.socket, *options],
        )
        self.await_log("listening on")

    def stats(self, name: str) -> dict[str, int]:
        """The counters that the offload back-end logs on SIGUSR1, a line ``stats name=... key=value ...``."""
        start = self.logged()
        self.process.send_signal(signal.SIGUSR1)
        line = self.await_log(rf"stats name={re.escape(name)} (.*)\n", start)[1]
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}

    def idle(self, name: str) -> dict[str, int]:
        """`stats`, once the device has no flow: every event of those that it had is counted."""
        stats: dict[str, int] = {}

        def none() -> bool:
            stats.update(self.stats(name))
            return stats["flows"] == 0

        wait_until(none, "the device has no flow")
        return stats


class Qmp:
    """QEMU's control socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WITHIN)
        wait_until(lambda: self._socket.connect_ex(str(path)) == 0, f"QEMU listens on {path}")
        # bytes, and for reading only: a text stream of both drops what it has read ahead whenever it writes, and events with it
        self._stream = self._socket.makefile("rb")
        self._events: list[dict[str, Any]] = []
        self._read()
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self._stream.readline()
        assert line, "QEMU ended"
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: Any) -> Any:
        """The command's result; AssertionError with QEMU's words if it refuses."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self._read()
            if "event" in message:
                self._events.append(message)
            else:
                assert "return" in message, f"QEMU refuses {command} {arguments}: {message}"
                return message["return"]

    def await_event(self, name: str, **data: Any) -> None:
        """Take the first event of that name with that data, of those since the last taken."""
        while True:
            message = self._events.pop(0) if self._events else self._read()
            if message.get("event") == name and data.items() <= message.get("data", {}).items():
                return
            assert message.get("data", {}).get("status") != "failed", f"{message}; QEMU says {self.execute('query-migrate')}"

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


class Vm(Program):
    """A guest. ``run`` and ``start`` run shell commands in it, ``run_in_image`` and ``start_in_image`` those of its disk."""

    live: list[Vm] = []  # noqa: RUF012  # those whose consoles are watched

    def __init__(self, folder: Path, initramfs: str, *options: str | Path, boots: bool = True, disk: str = "") -> None:
        """``boots``: wait for the guest; otherwise it is one that waits for a migration. ``disk``: made by make-guest-image."""
        if disk:
            options = ("--disk", disk, *options)
        self.console = folder / "console.log"
        self._outputs = 0
        self._seen = self._booted = 0  # characters of the console: looked at for complaints, and of finished boots
        agent, qmp = folder / "agent.sock", folder / "qmp.sock"
        boot: list[str | Path] = [SCRIPTS / "boot", "--initramfs", initramfs]
        super().__init__(folder / "qemu.log", [*boot, "--console", self.console, "--agent", agent, "--qmp", qmp, *options])
        Vm.live.append(self)
        try:
            self.qmp = Qmp(qmp)
            self.guest = Guest(str(agent))
            if boots:
                self._boot()
            else:
                self._ends_when_it_dies()
        except BaseException as error:
            self.close()
            raise AssertionError(f"the guest does not boot:\n{self.log.read_text()}\n{self.console_text()[-3000:]}") from error

    def _boot(self) -> None:
        """Return when the guest runs commands.

        An emulated kernel stops before its first program, once in many hundreds of boots: nothing of ours is in it yet, and the
        reset button helps. So one boot may fail there, with a warning; what comes behind is never tried twice.
        """
        if not self._first_program():
            told = self.console_text()[-500:]
            warnings.warn(f"the kernel stopped before its first program, and was reset:\n{told}", stacklevel=2)
            self.qmp.execute("system_reset")
            self.qmp.await_event("RESET")
            assert self._first_program(), "the kernel stopped again"
        self._ends_when_it_dies()  # not sooner: the firmware resets once more by itself
        self.run("true")

    def _ends_when_it_dies(self) -> None:
        """A panic reboots (boot's panic=-1, oops=panic). From now on QEMU ends instead, and who waits for the guest hears."""
        self.qmp.execute("set-action", reboot="shutdown")

    def _first_program(self) -> bool:
        """Whether the kernel comes to it within `BOOT`."""
        deadline = time.monotonic() + BOOT
        while FIRST_PROGRAM not in self.console_text()[self._booted :]:
            if time.monotonic() > deadline or self.process.poll() is not None:
                return False
            time.sleep(0.02)
        self._booted = len(self.console_text())
        return True

    def run(self, command: str, *, timeout: float = WITHIN, input: bytes = b"", check: bool = True) -> Result:
        """Run a shell command in the guest to its end; CommandError if it fails and ``check``.

        ConnectionError with the end of the console if there is no guest any more, because its kernel died, for one.
        """
        try:
            return self.guest.run(command, timeout=timeout, input=input, check=check)
        except ConnectionError as error:
            raise ConnectionError(f"{error}; the end of its console:\n{self.console_text()[-3000:]}") from error

    def start(self, command: str, *, timeout: float = WITHIN, input: bytes = b"") -> Command:
        """Start a shell command in the guest."""
        return self.guest.start(command, timeout=timeout, input=input)

    def start_until(self, command: str, says: str, *, timeout: float = WITHIN) -> tuple[Command, str]:
        """`start`; returns when it has printed ``says``. The second is the file in the guest that holds what it prints."""
        self._outputs += 1  # each has its own: what an earlier one said is not taken for its word
        file = f"/tmp/output{self._outputs}"
        running = self.start(f"exec {command} >{file} 2>&1", timeout=timeout)
        wait_until(lambda: says in self.run(f"cat {file}; true").text, f"{command} prints {says!r}")
        return running, file

    def run_in_image(self, command: str, *, timeout: float = 60.0, input: bytes = b"", check: bool = True) -> Result:
        """`run`, among the programs of the guest's disk."""
        return self.run(in_image(command), timeout=timeout, input=input, check=check)

    def start_in_image(self, command: str, *, timeout: float = 60.0, input: bytes = b"") -> Command:
        """`start`, among the programs of the guest's disk."""
        return self.start(in_image(command), timeout=timeout, input=input)

    def reset(self) -> None:
        """Reboot as the reset button does; returns when the new system runs commands."""
        self.qmp.execute("set-action", reboot="reset")
        self.qmp.execute("system_reset")
        self.qmp.await_event("RESET")
        self.guest.forget()
        self._boot()

    def unplug(self, device: str = "vhostsock0") -> None:
        """Hot-unplug; returns when the guest has let the device go."""
        self.qmp.execute("device_del", id=device)
        self.qmp.await_event("DEVICE_DELETED", device=device)

    def pause(self) -> None:
        self.qmp.execute("stop")

    def resume(self) -> None:
        self.qmp.execute("cont")

    def console_text(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def check_console(self) -> None:
        """AssertionError if the guest's kernel has complained since the last look."""
        text = self.console_text()
        new, self._seen = text[self._seen :], len(text)
        bad = [line for line in new.splitlines() if BROKEN.search(line) and "ommand line" not in line]
        assert not bad, "the guest's kernel complains:\n" + new[max(0, new.index(bad[0]) - 500) :][:6000]

    def close(self) -> None:
        if self in Vm.live:
            Vm.live.remove(self)
        with contextlib.ExitStack() as stack:
            stack.callback(self.check_console)
            stack.callback(super().close)
            for part in ("guest", "qmp"):
                if hasattr(self, part):
                    stack.callback(getattr(self, part).close)


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port of 127.0.0.1 that nobody used a moment ago."""
    with socket.socket(type=kind) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def readable(sock: socket.socket) -> bool:
    """Whether the socket gets something to read within `WITHIN`."""
    return bool(select.select([sock], [], [], WITHIN)[0])
