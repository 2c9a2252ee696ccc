# SPDX-License-Identifier: BSD-3-Clause
"""Front-ends that say anything, against the real server with a device that declares everything and runs.

    tests/fuzz/run session [--seconds N]        random sessions
    tests/fuzz/run --repeat session SEED...     these again

One number makes one session: an honest start of some length, whole exchanges in any order, recorded sessions of QEMU and DPDK
with messages left out, exchanged or bent, and messages that are made up, with descriptors of any kind, in pieces or half.
Meanwhile the driver writes what it likes into its rings, and the memory may be truncated. After each session, however it went:

    the session ends soon after the front-end goes, and the server listens on
    no descriptor is open, no guest memory mapped and no task alive that was not before
    nothing was logged as a failure of the device or the library: whatever happens is somebody's fault by name
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import random
import re
import resource
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from construct import Construct

from tests.protocol.test_traces import Line, lines_of, payload_of
from vhostsock import Chain, Device, Queue, Server, ancillary, state
from vhostsock._core import lib
from vhostsock.proto import Request, wire
from vhostsock.proto.messages import TABLE
from vhostsock.state import StateReader, StateWriter
from vhostsock.testing.driver import Region
from vhostsock.testing.frontend import QEMU_7_2, QEMU_11_1, BackendGone, Frontend, Refused

TRACES = sorted((Path(__file__).parents[1] / "data/traces").glob("*.txt"))
QUEUES = 3
PATIENCE = 20.0  # seconds that the end of a session may take on a loaded machine; the device itself waits 0.01
GROWTH = 96 << 20  # bytes that the process may grow by over a run


class Everything(Device):
    """Declares all that a device can, and echoes."""

    virtio_id = 39
    num_queues = QUEUES
    max_queue_size = 256
    packed = True
    inband = True
    shared_objects = True
    shmem = {1: 1 << 20}  # noqa: RUF012 - as an author would write it
    config = bytes(range(64))
    state_limit = 4096
    stop_timeout = 0.01
    concurrency = 4
    # of worker packages that may not be there yet; harmless where nobody reads them
    inflight = True
    migratable = True
    in_order = True

    async def handle(self, queue: Queue, chain: Chain) -> None:
        data = chain.read(4096)
        if data[:1] == b"w":
            await asyncio.sleep(0.001)
        chain.write(data)

    async def save_state(self, stream: StateWriter) -> None:
        await stream.write(b"state" * 100)

    async def load_state(self, stream: StateReader) -> None:
        await stream.read()

    def announce(self, mac: bytes) -> None:
        pass

    def set_mtu(self, mtu: int) -> None:
        pass

    def shared_object(self, name: uuid.UUID) -> int | None:
        return None

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        pass


class Listener(logging.Handler):
    """What the library says: the kinds of it are a measure of coverage, and an exception is a finding."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[str] = set()
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.kinds.add(re.sub(r"0x[0-9a-f]+|\d+", "N", text)[:60])
        if record.exc_info or "failed, session ended" in text:
            self.failures.append(logging.Formatter().format(record))


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class Session:
    """One hostile session, from its seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.fds: list[int] = []
        self.truncated = False
        self.kinds: dict[str, Callable[[], int]] = {
            "memory": lambda: self.frontend.memory.regions[0].fd,
            "kick": lambda: self.random.choice(self.frontend.queues).kick_fd,
            "call": lambda: self.random.choice(self.frontend.queues).call_fd,
            "eventfd": lambda: self.keep(os.eventfd(self.random.choice([0, 1, 2**32 - 1]))),
            "memfd": lambda: self.memfd(self.random.choice([0, 1, 4096, 0x3B10, 1 << 16])),
            "pipe": lambda: self.pair(*os.pipe()),
            "socket": lambda: self.pair(*(end.detach() for end in socket.socketpair())),
            "closed socket": self.closed_socket,
            "datagram": lambda: self.keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()),
            "listener": self.listener,
            "directory": lambda: self.keep(os.open("/", os.O_RDONLY | os.O_DIRECTORY)),
            "path": lambda: self.keep(os.open("/", os.O_PATH)),
            "zero": lambda: self.keep(os.open("/dev/zero", os.O_RDWR)),
            "null": lambda: self.keep(os.open("/dev/null", os.O_RDWR)),
            "read-only": lambda: self.keep(os.open(__file__, os.O_RDONLY)),
        }
        self.frontend: Frontend

    # ---- descriptors

    def keep(self, fd: int) -> int:
        self.fds.append(fd)
        return fd

    def pair(self, one: int, other: int) -> int:
        if self.random.random() < 0.3:
            os.close(other)
            return self.keep(one)
        self.keep(other)
        return self.keep(one)

    def memfd(self, size: int) -> int:
        fd = self.keep(os.memfd_create("fuzz"))
        os.ftruncate(fd, size)
        return fd

    def closed_socket(self) -> int:
        one, other = socket.socketpair()
        other.close()
        return self.keep(one.detach())

    def listener(self) -> int:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("")
        sock.listen()
        return self.keep(sock.detach())

    def some_fds(self, most: int) -> list[int]:
        return [self.kinds[self.random.choice(list(self.kinds))]() for _ in range(self.random.randrange(most + 1))]

    # ---- messages

    def number(self, bits: int) -> int:
        often = [0, 1, 2, 3, 7, 8, 255, 256, 4096, 1 << (bits - 1), (1 << bits) - 1]
        return self.random.choice([*often, self.random.getrandbits(bits)])

    def region(self) -> dict[str, int]:
        known = self.frontend.memory.regions[0]
        base = {"gpa": known.gpa, "size": known.size, "uva": known.uva, "offset": known.offset}
        if self.random.random() < 0.5:
            base = {"gpa": 1 << 40, "size": self.random.choice([4096, 0x3B10]), "uva": 1 << 41, "offset": 0}
        if self.random.random() < 0.5:
            base[self.random.choice(list(base))] = self.number(64)
        return base

    def value(self, request: int) -> Any:
        """A payload that may well be right."""
        index = self.random.choice([0, 0, 1, 2, QUEUES, 255, self.number(32)])
        if request == Request.SET_VRING_ADDR:
            value = self.frontend.address(index % QUEUES)
            if self.random.random() < 0.4:
                value[self.random.choice(list(value))] = self.number(32)
            return value
        if request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            return {"index": index & 0xFF, "nofd": self.random.random() < 0.2}
        if request == Request.SET_MEM_TABLE:
            count = self.random.choice([0, 1, 1, 2, 8])
            return {"n": count, "regions": [self.region() for _ in range(count)]}
        if request in (Request.ADD_MEM_REG, Request.REM_MEM_REG):
            return {"region": self.region()}
        if request in (Request.GET_CONFIG, Request.SET_CONFIG):
            size = self.random.choice([0, 1, 4, 64, 256])
            return {"offset": self.random.choice([0, 1, 60, 255]), "size": size, "flags": 0, "data": bytes(size)}
        if request == Request.SET_FEATURES:
            return self.frontend.features ^ (self.random.choice([0, 1 << 26, 1 << 34, 1 << 30, self.number(64)]))
        if request == Request.SET_DEVICE_STATE_FD:
            return {"direction": self.random.choice([0, 1, 2]), "phase": self.random.choice([0, 0, 0, 1])}
        return {"index": index, "num": self.random.choice([0, 1, 64, 3, self.number(32)])}

    def body(self, request: int) -> bytes:
        row = TABLE.get(request)
        payload: Construct | None = row.payload if row else None
        if payload is None:
            return b"" if self.random.random() < 0.8 else self.random.randbytes(8)
        try:
            data = bytes(payload.build(self.value(request)))
        except Exception:  # not of this shape: bytes of its size, or some
            try:
                data = self.random.randbytes(payload.sizeof()) if self.random.random() < 0.5 else bytes(payload.sizeof())
            except Exception:
                data = self.random.randbytes(self.random.choice([8, 24, 40]))
        return data

    def message(self) -> tuple[bytes, list[int]]:
        request = self.random.choice(list(TABLE)) if self.random.random() < 0.95 else self.random.randrange(64)
        row, body = TABLE.get(request), self.body(request)
        try:
            fds = row.fds(row.payload.parse(body) if row.payload else None)[1] if row else 0
        except Exception:
            fds = 1
        kinds = ["memory", "kick", "eventfd"] if self.random.random() < 0.6 else list(self.kinds)
        given = [self.kinds[self.random.choice(kinds)]() for _ in range(min(fds, 8))]
        if self.random.random() < 0.05:
            given = self.some_fds(12)
        flags = self.random.choice([9, 9, 9, 9, 9, 9, 9, 1, 1, self.number(32)])
        header = bytes(wire.HEADER.build({"request": request, "flags": flags, "size": len(body)}))
        return self.bend(header + body), given

    def bend(self, data: bytes) -> bytes:
        chance = self.random.random()
        if chance < 0.05:
            at = self.random.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << self.random.randrange(8)]) + data[at + 1 :]
        if chance < 0.06:
            return data[: self.random.randrange(len(data))]
        if chance < 0.07:
            return data + self.random.randbytes(self.random.choice([1, 8, 4096]))
        return data

    def recorded(self, line: Line) -> tuple[bytes, list[int]] | None:
        """A message of a trace; None for one that cannot be said in this version."""
        match = re.match(r"id=(\d+) flags=(0x[0-9a-f]+)\S* size=\d+ fds=\[(.*)", line.text)
        row = TABLE.get(int(match[1])) if match else None
        if not match or row is None:
            return None
        rest = re.sub(r"^.*?\]\s+(?=\S+=|0x|\d)", "", match[3]) if "]" in match[3] else ""
        try:
            body = row.payload.build(payload_of(line.name, rest)) if row.payload else b""
            count = row.fds(row.payload.parse(body) if row.payload else None)[1]
        except Exception:
            body, count = self.body(row.request), 1
        kind = "memory" if "MEM" in line.name else "socket" if "BACKEND" in line.name else "eventfd"
        return wire.HEADER.build({"request": row.request, "flags": int(match[2], 0), "size": len(body)}) + body, [
            self.kinds[kind]() for _ in range(min(count, 8))
        ]

    # ---- what goes on

    async def say(self, data: bytes, fds: list[int]) -> None:
        """In one piece or several; the replies are read and forgotten. OSError when the back-end has gone."""
        sock = self.frontend.sock
        while data:
            cut = len(data) if self.random.random() < 0.8 else self.random.randrange(1, len(data) + 1)
            with contextlib.suppress(BlockingIOError):
                if fds:
                    cut = socket.send_fds(sock, [data[:cut]], fds)
                    fds = []
                else:
                    cut = sock.send(data[:cut])
                data = data[cut:]
            await self.drain()

    async def drain(self) -> None:
        await asyncio.sleep(0)
        with contextlib.suppress(BlockingIOError):
            data, fds, _ = ancillary.receive(self.frontend.sock, 1 << 16)
            for fd in fds:
                os.close(fd)
            if not data:
                raise BackendGone("gone")

    def drive(self) -> None:
        """The driver does something, right or wrong."""
        queue, memory = self.random.choice(self.frontend.queues), self.frontend.memory
        what = self.random.randrange(8)
        if self.truncated:
            return  # our own mapping has no guard: only the back-end can look there now
        if what < 4:
            with contextlib.suppress(Exception):  # a ring that the device was told is elsewhere, or full
                queue.submit([self.random.choice([b"w", b"x"]) * self.random.choice([1, 100])], [64])
        elif what < 6:
            at = self.random.choice(memory.regions).gpa + self.random.randrange(1 << 14)
            memory.write(at, self.random.randbytes(self.random.choice([1, 2, 16, 256])))
        elif what == 6:
            os.eventfd_write(queue.kick_fd, 1)
        elif self.random.random() < 0.05:
            self.truncated = True
            os.ftruncate(memory.regions[0].fd, self.random.choice([0, 4096]))
            os.eventfd_write(queue.kick_fd, 1)

    async def run(self, sock: socket.socket) -> None:
        dialect = self.random.choice([QEMU_7_2, QEMU_11_1])
        self.frontend = Frontend(sock, queues=QUEUES, memory=(1 << 18,), dialect=dialect, config=True,
                                 accept=self.random.choice([~0, ~(1 << 34)]))  # fmt: skip
        try:
            async with self.frontend:
                await self.talk()
        except (BackendGone, Refused, OSError, AssertionError):
            pass  # the back-end, or the honest part of the front-end, had enough
        finally:
            for fd in self.fds:
                with contextlib.suppress(OSError):
                    os.close(fd)

    async def orderly(self) -> None:
        """Whole exchanges, each right by itself, in any order."""
        frontend = self.frontend
        dimm = Region(self.memfd(8192), 1 << 40, 8192, 1 << 41)

        async def transfer() -> None:
            if self.random.random() < 0.9:
                await frontend.stop()  # else it is a breach of the protocol
            await frontend.transfer_state(self.random.choice(list(wire.TransferDirection)), self.pair(*os.pipe()))

        exchanges: list[Callable[[], Awaitable[Any]]] = [
            frontend.start, frontend.start, frontend.stop, frontend.stop, frontend.reboot, frontend.reset_device,
            transfer, transfer, transfer, frontend.check_state,
            lambda: frontend.add_region(dimm), lambda: frontend.remove_region(dimm), lambda: frontend.read_config(0, 8),
            lambda: frontend.write_config(0, b"x"), lambda: frontend.enable(0, self.random.random() < 0.5),
            lambda: frontend.set_fd(Request.SET_VRING_KICK, 1, frontend.queues[1].kick_fd),
            lambda: frontend.set_ring(0), lambda: frontend.inband_kick(0),
        ]  # fmt: skip
        for _ in range(self.random.randrange(1, 40)):
            self.drive()
            if self.truncated:
                return
            with contextlib.suppress(Refused):
                await self.random.choice(exchanges)()

    async def talk(self) -> None:
        start = self.random.randrange(4)
        trace = [line for line in lines_of(self.random.choice(TRACES).read_text().splitlines()) if line.kind == "->"]
        if start:
            await self.frontend.handshake()
        if start > 1:
            await self.frontend.start()
        if start and self.random.random() < 0.4:
            await self.orderly()
        if self.random.random() < 0.3:
            script = [said for line in trace[: self.random.randrange(60)] if (said := self.recorded(line))]
            for at in range(len(script)):
                if self.random.random() < 0.05:
                    other = self.random.randrange(len(script))
                    script[at], script[other] = script[other], script[at]
            for data, fds in script:
                if self.random.random() < 0.95:
                    await self.say(self.bend(data) if self.random.random() < 0.1 else data, fds)
        for _ in range(self.random.randrange(40)):
            if self.random.random() < 0.5:
                self.drive()
                await self.drain()
            else:
                await self.say(*self.message())


async def run(seconds: float, seeds: list[int]) -> int:
    state.STALL = 0.05  # a pipe on which nothing moves is one of the things that are tried
    listener, device, said = Listener(), Everything(), 0
    logger = logging.getLogger("vhostsock")
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: listener.failures.append(str(context)))
    first, until, rss = random.randrange(1 << 48), time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "s")
        async with Server(device, path=path) as server:
            while seeds if seconds == 0 else time.monotonic() < until:
                seed = seeds.pop(0) if seconds == 0 else first + said
                if said == 200:
                    gc.collect()
                    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
                said += 1
                problem = await session(seed, path, server, listener)
                if problem:
                    print(f"session {seed}: {problem}\nagain: tests/fuzz/run --repeat session {seed}", file=sys.stderr)
                    return 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - rss if rss else 0
    if grown > GROWTH:
        print(f"the process grew by {grown >> 20} MiB from session 200 to {said} (from seed {first})", file=sys.stderr)
        return 1
    rate = f"{said / seconds:.0f} a second; " if seconds else ""
    print(f"session: {said} executions, {rate}{len(listener.kinds)} kinds of outcome seen; grown by {grown >> 20} MiB")
    return 0


async def session(seed: int, path: str, server: Server, listener: Listener) -> str | None:
    """Run one; returns what broke an invariant, or None."""
    if server._task is None or server._task.done():
        return "the server has stopped listening"
    fds, regions, tasks = open_fds(), lib.vs_region_count_live(), len(asyncio.all_tasks())
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    try:
        await asyncio.wait_for(Session(seed).run(sock), 3 * PATIENCE)
    except TimeoutError:
        return "the session hangs"
    finally:
        sock.close()
    until = time.monotonic() + PATIENCE
    while (open_fds(), lib.vs_region_count_live(), len(asyncio.all_tasks())) != (fds, regions, tasks):
        if time.monotonic() > until:
            gc.collect()
            names = [task.get_name() for task in asyncio.all_tasks()]
            mapped = lib.vs_region_count_live() - regions
            return f"left behind: {open_fds() - fds} descriptors, {mapped} regions; tasks {names}; server {server.address}"
        await asyncio.sleep(0)
    if listener.failures:
        return listener.failures[0]
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--repeat", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    faulthandler.enable()  # beneath the library's handler of SIGBUS: only what that one does not know comes here
    return asyncio.run(run(arguments.seconds, arguments.repeat))


if __name__ == "__main__":
    sys.exit(main())
