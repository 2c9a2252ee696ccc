# SPDX-License-Identifier: BSD-3-Clause
"""Front-ends come and go for hours, and the server stays as it was.

    tests/fuzz/run soak [--seconds N]

A real ``vhostsock serve echo`` in a process of its own. Honest front-ends start, send requests, pause, reboot, and leave
politely or in the middle of a request; between them come the hostile ones of tests/fuzz/session.py. Now and then the
server itself is killed and comes back on the same path. While nobody is connected the server is counted:

    as many descriptors and threads as when it had served its first sessions, and at most a few mappings more
    resident memory at most SLACK above that
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.session import Session
from vhostsock import state
from vhostsock.testing.frontend import QEMU_7_2, QEMU_11_1, BackendGone, Frontend

WARM_UP = 60  # sessions before the first count: caches and pools fill
COUNT_EVERY = 50
KILL_EVERY = 1000
SLACK = 16 << 10  # KiB of resident memory
MAPPINGS = 24  # the allocator's own coming and going


@dataclasses.dataclass(frozen=True)
class Counts:
    fds: int
    threads: int
    mappings: int
    rss: int  # KiB

    @classmethod
    def of(cls, pid: int) -> Counts:
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
        with open(f"/proc/{pid}/maps") as file:
            mappings = sum(1 for _ in file)
        return cls(len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), mappings, int(status["VmRSS"].split()[0]))

    def grown(self, first: Counts) -> str:
        """What is more than it was; empty when nothing is."""
        found = []
        if self.fds > first.fds or self.threads > first.threads:
            found.append(f"{self.fds} descriptors and {self.threads} threads, were {first.fds} and {first.threads}")
        if self.mappings > first.mappings + MAPPINGS:
            found.append(f"{self.mappings} mappings, were {first.mappings}")
        if self.rss > first.rss + SLACK:
            found.append(f"{self.rss} KiB resident, were {first.rss}")
        return "; ".join(found)


class Soak:
    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "soak.sock")
        self.log = open(os.path.join(folder, "log"), "w")  # noqa: SIM115 - as long as the soak
        self.server: subprocess.Popen[bytes] | None = None
        self.random = random.Random()
        self.sessions = self.requests = self.hostile = self.kills = 0
        self.first: Counts | None = None
        self.last: Counts | None = None
        self.since = 0  # the server's sessions

    def start(self) -> None:
        command = [sys.executable, "-m", "vhostsock", "serve", "echo", "--socket-path", self.path]
        self.server = subprocess.Popen(command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)
        self.first, self.since = None, 0

    def stop(self) -> int:
        assert self.server
        self.server.terminate()
        self.log.close()
        return self.server.wait(30)

    def last_words(self) -> list[str]:
        return Path(self.log.name).read_text().splitlines()[-10:]

    async def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        async with asyncio.timeout(30):
            while True:
                assert self.server
                if self.server.poll() is not None:
                    raise RuntimeError(f"the server ended with {self.server.returncode}")
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                    sock.connect(self.path)
                    return sock
                await asyncio.sleep(0.01)

    async def honest(self) -> None:
        dialect = self.random.choice([QEMU_7_2, QEMU_11_1])
        async with Frontend(await self.connect(), dialect=dialect, config=True) as frontend:
            await frontend.handshake()
            await frontend.start()
            for _ in range(self.random.randrange(1, 4)):
                for size in (1, 100, 5000):
                    frontend.queues[0].submit([bytes(size)], [size])
                await frontend.queues[0].wait_async(3)
                self.requests += 3
                await self.random.choice([frontend.settled, frontend.reboot, frontend.reset_device])()
            if self.random.random() < 0.5:
                frontend.queues[0].submit([bytes(5000)], [5000])  # and away

    async def one(self) -> str:
        """A session; returns what is wrong afterwards."""
        assert self.server
        self.sessions += 1
        self.since += 1
        if self.sessions % 2:
            await self.honest()
        else:
            self.hostile += 1
            sock = await self.connect()
            await asyncio.wait_for(Session(self.random.randrange(1 << 48)).run(sock), 60)
            sock.close()
        if self.sessions % KILL_EVERY == 0:
            self.kills += 1
            self.server.kill()
            self.server.wait(30)
            self.start()
        elif self.since >= WARM_UP and self.since % COUNT_EVERY == 0:
            await self.honest()  # which it answers only when the one before is over; this one may still be
            return await self.count()
        return ""

    async def count(self) -> str:
        assert self.server
        if self.first is None:
            await asyncio.sleep(0.2)  # not waited for by anything: what is counted too early is only counted again
            self.first = self.last = Counts.of(self.server.pid)
            return ""
        until, grown = time.monotonic() + 20, "?"
        while grown and time.monotonic() < until:
            self.last = Counts.of(self.server.pid)
            grown = self.last.grown(self.first)
            await asyncio.sleep(0.05)
        return grown


async def run(seconds: float) -> int:
    state.STALL = 0.05
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(folder)
        soak.start()
        wrong = ""
        try:
            while not wrong and time.monotonic() < until:
                wrong = await soak.one()
            wrong = wrong or await soak.count()
        except (RuntimeError, TimeoutError, BackendGone) as error:
            wrong = f"{type(error).__name__}: {error}"
        status = soak.stop()
        if wrong or status:
            what = wrong or f"the server ended with {status}"
            words = [f"soak: {what} after {soak.sessions} sessions; its last words:", *soak.last_words()]
            print(*words, sep="\n", file=sys.stderr)
            return 1
    print(f"soak: {soak.sessions} sessions ({soak.hostile} hostile), {soak.requests} requests, {soak.kills} kills")
    print(f"first counted {soak.first}, last {soak.last}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    sys.exit(asyncio.run(run(parser.parse_args().seconds)))
