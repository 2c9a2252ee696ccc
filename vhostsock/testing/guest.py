# SPDX-License-Identifier: BSD-3-Clause
"""Run commands in a guest that ``qemu-scripts/boot --agent SOCKET`` started: the host's end of qemu-scripts/guest/agent.c.

One connection carries any number of commands at once. A thread reads the answers and gives each to the command that waits for
it, so `Guest` can be used from any thread. When the guest or QEMU ends, every waiting command fails at once (ConnectionError).

This file needs nothing but the standard library and can be run as a program (qemu-scripts/guest-run).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

__all__ = ["Command", "CommandError", "Guest", "Result", "in_image"]


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left: exit status as a shell shows it (128 + n for signal n), standard output and standard error."""

    command: str
    status: int
    output: bytes
    errors: bytes

    @property
    def text(self) -> str:
        """The standard output as text, without the newline at its end."""
        return self.output.decode(errors="replace").rstrip("\n")

    def __str__(self) -> str:
        parts = [f"guest command {self.command!r} ended with status {self.status}"]
        for what, data in (("output", self.output), ("errors", self.errors)):
            if data:
                parts.append(f"{what}:\n{data.decode(errors='replace')}")
        return "\n".join(parts)


class CommandError(AssertionError):
    """A command in the guest failed that was not expected to; the text holds its status and output."""


class Command:
    """A command that is running in the guest."""

    def __init__(self, command: str, limit: float, future: Future[Result]) -> None:
        self.command = command
        self._limit = limit
        self._future = future

    @property
    def done(self) -> bool:
        return self._future.done()

    def wait(self, *, check: bool = True) -> Result:
        """The command's result. With ``check``, CommandError if its status is not 0. ConnectionError if the guest is gone."""
        try:
            result = self._future.result(self._limit + 60)  # the guest keeps the limit itself; the rest is for one that hangs
        except TimeoutError:
            raise TimeoutError(f"the guest did not answer within {self._limit + 60:.0f} s: {self.command!r}") from None
        if check and result.status:
            raise CommandError(str(result))
        return result


def in_image(command: str) -> str:
    """The shell command that runs ``command`` among the programs of the guest's disk (qemu-scripts/boot --disk)."""
    return f"in-image {shlex.quote(command)}"


class Guest:
    """A connection to the agent in one guest. It may be made before the guest has booted: commands wait for the agent."""

    def __init__(self, path: str, *, connect_within: float = 20.0) -> None:
        self._socket = _connect(path, connect_within)
        self._lock = threading.Lock()  # protects _waiting and _gone, and keeps requests whole
        self._waiting: dict[int, tuple[str, Future[Result]]] = {}
        self._gone: str | None = None
        self._ids = itertools.count(1)
        self._reader = threading.Thread(target=self._read_answers, name="guest-agent", daemon=True)
        self._reader.start()

    def start(self, command: str, *, timeout: float = 30.0, input: bytes = b"") -> Command:
        """Start a shell command; the guest kills it after ``timeout`` seconds (status 137). ConnectionError: guest gone."""
        text = command.encode()
        future: Future[Result] = Future()
        with self._lock:
            if self._gone is not None:
                raise ConnectionError(self._gone)
            number = next(self._ids)
            self._waiting[number] = (command, future)
            try:
                self._socket.sendall(b"%d %d %d %d\n" % (number, timeout * 1000, len(text), len(input)) + text + input)
            except OSError as error:
                del self._waiting[number]
                raise ConnectionError(f"the guest is gone: {error}") from error
        return Command(command, timeout, future)

    def run(self, command: str, *, timeout: float = 30.0, input: bytes = b"", check: bool = True) -> Result:
        """Run a shell command to its end. Errors as `Command.wait` and `start` have them."""
        return self.start(command, timeout=timeout, input=input).wait(check=check)

    def forget(self) -> None:
        """The guest was reset: what ran in it will never answer. Every waiting command fails with ConnectionError."""
        with self._lock:
            self._fail("the guest was reset")

    def close(self) -> None:
        """End the connection; waiting commands fail with ConnectionError. May be called again."""
        with self._lock:
            self._gone = self._gone or "the connection was closed"
        with contextlib.suppress(OSError):  # the other end went first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fail(self, why: str) -> None:
        for command, future in self._waiting.values():
            future.set_exception(ConnectionError(f"{why} while {command!r} ran"))
        self._waiting.clear()

    def _read_answers(self) -> None:
        try:
            with self._socket.makefile("rb") as stream:
                while line := stream.readline():
                    number, status, output_len, errors_len = (int(word) for word in line.split())
                    output, errors = stream.read(output_len), stream.read(errors_len)
                    if len(output) + len(errors) != output_len + errors_len:
                        break
                    with self._lock:
                        command, future = self._waiting.pop(number, ("", None))
                    if future is not None:  # else: of a guest that was reset meanwhile
                        future.set_result(Result(command, status, output, errors))
            why = "the guest is gone"
        except (OSError, ValueError) as error:
            why = f"the guest's agent cannot be understood: {error}"
        with self._lock:
            self._gone = self._gone or why
            self._fail(self._gone)


def _connect(path: str, within: float) -> socket.socket:
    """Connect to QEMU's end, which comes into being a moment after QEMU was started."""
    deadline = time.monotonic() + within
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            if time.monotonic() > deadline:
                raise ConnectionError(f"cannot connect to the guest's agent at {path}: {error}; is QEMU running?") from error
            time.sleep(0.05)
        else:
            return sock


def main(argv: Sequence[str] | None = None) -> int:
    """qemu-scripts/guest-run. Exit status: the command's, or 1 with a message if the guest cannot be reached."""
    parser = argparse.ArgumentParser(prog="guest-run", description="Run a shell command in a guest that boot --agent started.")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="end the command then, default 60")
    parser.add_argument("--image", action="store_true", help="run it among the programs of the guest's disk (boot --disk)")
    parser.add_argument("socket", help="the path given to boot --agent")
    parser.add_argument("command", help="a shell command")
    options = parser.parse_args(argv)
    data = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
    try:
        with Guest(options.socket) as guest:
            command = in_image(options.command) if options.image else options.command
            result = guest.run(command, timeout=options.timeout, input=data, check=False)
    except (ConnectionError, TimeoutError) as error:
        print(f"guest-run: {error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(result.output)
    sys.stdout.flush()
    sys.stderr.buffer.write(result.errors)
    return result.status


if __name__ == "__main__":
    raise SystemExit(main())
