# SPDX-License-Identifier: BSD-3-Clause
"""The back-end that is probed: where it listens, whether the probe starts it, and whether it is still there.

How a back-end ends is not the document's business, so it is measured first: some go on listening when their front-end has
left, some end with it. One that goes on has *died* when it is gone after a check. One that ends with its front-end has died
when it ends by a signal or with the status of a Rust panic; another status than usual is its way to say why the session ended.

    SocketTarget    somebody else has started it
    ProcessTarget   the probe starts it, anew for each check
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import socket
import struct
import tempfile
from typing import NamedTuple

from ..errors import UsageError, VhostsockError
from ..testing.frontend import BackendGone, Refused
from .connection import Connection, Options, Transcript

__all__ = ["Fate", "Gone", "ProcessTarget", "SocketTarget", "Target"]

RETRY = 0.002  # seconds between two attempts to connect to one that is about to listen
PANIC = 101  # exit status of a Rust program that panicked
SILENT = "it serves no new connection"
LAST_WORDS = 12  # lines of its output that are evidence


class Gone(VhostsockError):
    """The back-end cannot be reached (any more); the text says how it ended."""


class Fate(NamedTuple):
    """What became of a back-end that is not well: it is gone, or it is there and serves nobody."""

    dead: bool
    text: str


class Target(abc.ABC):
    """limit: seconds that it gets for anything; pid: of the process that listens, where that is known; used: it has seen a
    connection since it was renewed."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.pid: int | None = None
        self.used = False
        self.ends_with_its_front_end = False

    @abc.abstractmethod
    async def connect(self, *, patient: bool = True) -> socket.socket:
        """A new connection. Gone. patient: wait while its backlog is full."""

    async def renew(self) -> None:  # noqa: B027  (nothing to do where somebody else starts it)
        """A back-end for the next check. Gone."""

    @property
    def renewable(self) -> bool:
        """Whether ``renew`` brings back one that died."""
        return False

    @abc.abstractmethod
    async def fate(self) -> Fate | None:
        """After all connections were closed: None when the back-end is well, or else what became of it."""

    async def close(self) -> None:  # noqa: B027
        """End what was started."""

    def last_words(self) -> list[str]:
        """The end of what it wrote, where that is known."""
        return []

    async def answers(self) -> bool:
        """Whether a new connection is served."""
        try:
            async with asyncio.timeout(self.limit):
                (await self.enter(Transcript(), Options())).close()
        except (TimeoutError, Gone):
            return False
        return True

    async def enter(self, transcript: Transcript, options: Options) -> Connection:
        """A new connection, on which GET_FEATURES was answered if it is not the first one. Gone, Failed.

        A back-end that makes its listening socket anew for each front-end drops those that come to the old one: so again.
        """
        while True:
            first = not self.used
            sock = await self.connect()
            try:
                connection = Connection(sock, transcript, options)
            except BaseException:
                sock.close()
                raise
            if first:
                return connection
            try:
                await connection.settled()
                return connection
            except (BackendGone, Refused):
                connection.close()
                transcript.lines.clear()
                await asyncio.sleep(RETRY)
            except BaseException:
                connection.close()
                raise


class SocketTarget(Target):
    """One that listens at ``path`` already."""

    def __init__(self, path: str, limit: float) -> None:
        super().__init__(limit)
        self.path = path

    async def connect(self, *, patient: bool = True) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            while True:
                try:
                    sock.connect(self.path)
                    break
                except BlockingIOError:  # its backlog is full
                    if not patient:
                        raise
                    await asyncio.sleep(RETRY)
        except OSError as error:
            sock.close()
            raise Gone(f"{self.path}: {error.strerror or error}") from None
        except BaseException:
            sock.close()
            raise
        self.used = True
        pid, _, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self.pid = pid if pid not in (0, os.getpid()) else None
        return sock

    async def fate(self) -> Fate | None:
        if await self.answers():
            return None
        try:
            (await self.connect()).close()
        except Gone as error:
            return Fate(True, f"nobody listens any more ({error})")
        return Fate(False, SILENT)


class ProcessTarget(SocketTarget):
    """One that ``command`` starts; "{socket}" in it is where it shall listen. UsageError when there is none."""

    def __init__(self, command: str, limit: float) -> None:
        if "{socket}" not in command:
            raise UsageError("--exec: the command needs {socket} where the back-end is told the path of its socket")
        self._folder = tempfile.mkdtemp(prefix="vhostsock-probe-")
        super().__init__(os.path.join(self._folder, "socket"), limit)
        self._command = [word.replace("{socket}", self.path) for word in shlex.split(command)]
        self._output = os.path.join(self._folder, "output")
        self._process: asyncio.subprocess.Process | None = None
        self._told_to_end = False

    async def renew(self) -> None:
        await self._end()
        self.pid, self.used, self._told_to_end = None, False, False
        with open(self._output, "wb") as output:  # noqa: ASYNC230  (a file of a few lines)
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def renewable(self) -> bool:
        return True

    async def connect(self, *, patient: bool = True) -> socket.socket:
        assert self._process, "renew() comes first"
        async with asyncio.timeout(self.limit):
            while True:
                try:
                    return await super().connect(patient=patient)
                except Gone as error:  # it may be about to listen
                    if self._process.returncode is not None:
                        raise Gone(f"it {_ended(self._process.returncode)}") from error
                    if not patient:
                        raise
                await asyncio.sleep(RETRY)

    async def fate(self) -> Fate | None:
        assert self._process, "renew() comes first"
        if self._told_to_end or (self.ends_with_its_front_end and not self.used):
            return None
        if not self.ends_with_its_front_end:
            if await self.answers():
                return None
            status = self._process.returncode
            return Fate(False, SILENT) if status is None else Fate(True, f"it {_ended(status)}")
        status = await self.ended()
        if status is None:
            return Fate(False, "it did not end with its front-end, as it does otherwise")
        return Fate(True, f"it {_ended(status)}") if status < 0 or status == PANIC or status >= 128 else None

    async def ended(self) -> int | None:
        """Its exit status, negative for a signal; None when it does not end."""
        assert self._process, "renew() comes first"
        try:
            async with asyncio.timeout(self.limit):
                return await self._process.wait()
        except TimeoutError:
            return None

    def terminate(self) -> None:
        assert self._process, "renew() comes first"
        self._told_to_end = True
        self._process.terminate()

    async def close(self) -> None:
        await self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _end(self) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            self._process = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def last_words(self) -> list[str]:
        with contextlib.suppress(OSError), open(self._output, errors="replace") as output:
            return [f"  its output: {line.rstrip()[:200]}" for line in output.readlines()[-LAST_WORDS:]]
        return []


def _ended(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}{' (a Rust panic)' if status == PANIC else ''}"
