# SPDX-License-Identifier: BSD-3-Clause
"""The processes and connections that flows.py compares: what is started, and the near ends that put load on it.

    near end (load.c, in this process) --- direct, relay, or a back-end --- far end (far.c)

All run all the time; who is not measured waits in its poll.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cffi import FFI

from tests.bench.native import HERE, built, declared, loaded
from tests.probe.others import BACKENDS, fetched
from vhostsock._core import lib
from vhostsock.proto import VirtioFeature
from vhostsock.testing.flow import pack, pack_open, pack_options
from vhostsock.testing.frontend import Frontend

__all__ = ["DIRECT", "DIRECT_UNIX", "OFFLOAD", "OTHER_VSOCK", "RELAY", "VSOCK", "Failed", "Mix", "Near", "Tools", "started"]

DIRECT, RELAY, OFFLOAD, VSOCK, OTHER_VSOCK = "direct", "relay", "offload", "vsock", "vhost-device-vsock"
DIRECT_UNIX = "direct-unix"
RING = 128  # descriptors, what QEMU gives vhost-user-fs and vhost-user-vsock
MEMORY = 1 << 24
CID = 3
SERVE, CLOSE, ANSWER = 1000, 1001, 1002  # ports of the far ends, as a vsock guest says them
POLICY = """
[[rule]]
match = { scheme = "tcp", address = "127.0.0.1" }
action = "offload"
"""


class Failed(Exception):
    """A job failed: the near end's words."""


class Far(NamedTuple):
    """Ports of the far ends on loopback: serving, closing what it accepts, and serving in a process of its own."""

    serve: int
    close: int
    answer: int


class Mix(NamedTuple):
    """What bulk flows and questions beside them came to, until it was over: load.h, struct load_mix.

    took    nanoseconds until then
    whole   nanoseconds until all the bytes had moved
    moved   bytes of each bulk flow
    each    nanoseconds of each question and its answer
    """

    took: int
    whole: int
    moved: list[int]
    each: list[int]


class Tools(NamedTuple):
    """What started() needs, compiled."""

    library: tuple[FFI, Any]
    far: Path
    relay: Path

    @classmethod
    def built(cls, folder: Path) -> Tools:
        library = loaded(folder, "load", declared("driver"), "load_rings", "load_mix", "driver")
        return cls(library, built(folder, "far", HERE / "far.c"), built(folder, "relay", HERE / "relay.c"))


class Near:
    """``flows`` flows to the far end, over one path.

    far   where to connect; cycle() connects where the far end closes what it accepts
    pid   of the process in between, 0 without one
    unix  sockets: the far ends are Unix sockets, at this path with _PORT behind it
    """

    def __init__(
        self, name: str, library: tuple[FFI, Any], kind: str, pid: int, flows: int, far: Sequence[int], pairs: int = 1,
        unix: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.pid, self.far, self._unix = name, pid, Far(*far), unix
        self._ffi, self._lib = library
        self._load = self._ffi.new("struct load *")
        self._flows = self._ffi.new("struct load_flow[]", flows)
        self._load.kind = getattr(self._lib, f"LOAD_{kind}")
        self._load.pairs, self._load.flows, self._load.n_flows, self._load.cid = pairs, self._flows, flows, CID
        self._frontend: Frontend | None = None
        self._ram: Any = None

    def _check(self, result: int) -> int:
        if result < 0:
            raise Failed(f"{self.name}: {self._ffi.string(self._load.why).decode()}")
        return result

    # ---- set-up

    async def attach(self, sock: socket.socket) -> None:
        """The rings, with the buffers that the guests' drivers have; for an offload device, HELLO."""
        offload = self._load.kind == self._lib.LOAD_OFFLOAD
        accept = VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.VERSION_1 | VirtioFeature.EVENT_IDX
        pairs = self._load.pairs
        frontend = Frontend(sock, queues=2 * pairs, size=RING, memory=(MEMORY * pairs,), accept=int(accept))
        self._frontend = frontend
        await frontend.handshake()
        await frontend.start()
        memory = frontend.memory
        view, _ = memory.at(memory.regions[0].gpa, 1)
        self._ram = self._ffi.from_buffer(view)
        # csrc/guest/pair.c; Linux's virtio-vsock since 6.2, a buffer for each descriptor
        rx = [32768, 32768, 4096] if offload else [4096]
        for index, queue in enumerate(frontend.queues):
            drv = getattr(self._load.pair[index // 2], "tx" if index % 2 else "rx")
            buffers = [self._lib.LOAD_HEAD, self._lib.LOAD_PIECE] if index % 2 else rx
            depth = min(RING // len(buffers), 32 if buffers is rx and offload else RING)
            for name, value in {
                "ram": self._ram, "gpa": memory.regions[0].gpa, "desc": queue.desc, "avail": queue.avail, "used": queue.used,
                "buffers": memory.alloc(depth * sum(buffers)), "num": queue.num, "depth": depth, "descs": len(buffers),
                "n_out": len(buffers) if index % 2 else 0, "packed": 0, "event_idx": queue.event_idx,
                "kick_fd": queue.kick_fd, "call_fd": queue.call_fd,
            }.items():  # fmt: skip
                setattr(drv, name, value)
            drv.len[0 : len(buffers)] = buffers
        self.begin()
        if offload:
            hello = pack(
                "struct vso_hello", magic=lib.VSO_MAGIC, abi_major=lib.VSO_ABI_MAJOR, abi_minor=lib.VSO_ABI_MINOR, pairs=pairs,
                epoch=1, features=0, max_payload=sum(rx) - 32,
            )  # fmt: skip
            if self._check(self._lib.load_hello(self._load, hello, len(hello))):
                raise Failed(f"{self.name}: HELLO is refused")

    def begin(self) -> None:
        self._check(self._lib.load_init(self._load))

    def close(self) -> None:
        self._lib.load_end(self._load)
        if self._frontend:
            self._ffi.release(self._ram)
            self._frontend.close()

    def _aim(self, port: int) -> None:
        self._load.port = port
        if self._unix:
            address = struct.pack("=H", socket.AF_UNIX) + f"{self._unix}_{port}".encode() + b"\0"
        else:
            address = struct.pack("=HH4s8x", socket.AF_INET, socket.htons(port), socket.inet_aton("127.0.0.1"))
        self._ffi.memmove(self._load.address, address, len(address))
        self._load.address_len = len(address)
        nodelay = (socket.IPPROTO_TCP, socket.TCP_NODELAY, struct.pack("=i", 1))
        payload = pack_open(f"tcp://127.0.0.1:{port}", options=pack_options([nodelay]))
        self._ffi.memmove(self._load.open, payload, len(payload))
        self._load.open_len = len(payload)

    def twin(self) -> Near:
        """Another near end on the same path, for a thread of its own: sockets have no rings to share. The caller closes it."""
        near = Near(self.name, (self._ffi, self._lib), "SOCKETS", self.pid, self._load.n_flows, self.far, unix=self._unix)
        near.begin()
        return near

    @property
    def of_host(self) -> bool:
        """A program of the host, with sockets."""
        return bool(self._load.kind == self._lib.LOAD_SOCKETS)

    # ---- jobs: nanoseconds. Failed

    def connect(self, first: int, count: int, answering: bool = False) -> int:
        """``answering``: to the far end that does nothing else, as long as nobody else is sent to it."""
        self._aim(self.far.answer if answering else self.far.serve)
        return self._check(self._lib.load_connect(self._load, first, count))

    def disconnect(self, first: int, count: int) -> int:
        return self._check(self._lib.load_close(self._load, first, count))

    def abort(self, flow: int) -> int:
        return self._check(self._lib.load_abort(self._load, flow))

    def send(self, first: int, count: int, amount: int, size: int) -> int:
        """``amount`` bytes on each of these flows, in messages of ``size``; until the far end has said that it got them."""
        return self._check(self._lib.load_send(self._load, first, count, amount, size))

    def receive(self, first: int, count: int, amount: int, size: int) -> int:
        return self._check(self._lib.load_receive(self._load, first, count, amount, size))

    def ask(self, flow: int, times: int, size: int) -> list[int]:
        """What each request and its answer took, ns."""
        each = self._ffi.new("uint32_t[]", times)
        self._check(self._lib.load_ask(self._load, flow, times, size, each))
        return list(each)

    def cycle(self, first: int, parallel: int, total: int) -> int:
        """So many connections, made, ended by the far end, and closed."""
        self._aim(self.far.close)
        return self._check(self._lib.load_cycle(self._load, first, parallel, total))

    def stuff(self, flow: int) -> int:
        """Send until nothing is taken any more, to a far end that reads nothing. Bytes."""
        return self._check(self._lib.load_stuff(self._load, flow))

    def over(self) -> Any:
        """What mixes share that are measured together."""
        return self._ffi.new("int *", 0)

    def mix(
        self, over: Any, *, flows: range = range(0), to_host: bool = True, amount: int = 0, size: int = 1 << 16,
        asker: int | None = None, most: int = 0,
    ) -> Mix:  # fmt: skip
        """``amount`` bytes on each of ``flows``, and at most so many questions of 64 bytes of ``asker`` meanwhile."""
        each, moved = self._ffi.new("uint32_t[]", max(most, 1)), self._ffi.new("uint64_t[]", max(len(flows), 1))
        mix = self._ffi.new("struct load_mix *", {
            "first": flows.start, "count": len(flows), "to_host": to_host, "amount": amount, "size": size, "question": 64,
            "asker": self._load.n_flows if asker is None else asker, "most": most, "over": over, "each": each, "moved": moved,
        })  # fmt: skip
        whole = self._check(self._lib.load_mix(self._load, mix))
        return Mix(mix.took, whole, list(moved[0 : len(flows)]), list(each[0 : mix.asked]))

    # ---- the process in between

    def cpu(self) -> int:
        """Nanoseconds that the process in between has used; 0 without one."""
        return self._check(self._lib.load_cpu(self.pid)) if self.pid else 0

    def memory(self) -> dict[str, int]:
        """Of the process in between, bytes: VmHWM (peak), RssAnon (its own now), RssShmem (the guest's), VmRSS.

        Pss: as VmRSS, but what is shared with others (the interpreter, the guest's memory) counts for each in part.
        """
        if not self.pid:
            return {}
        text = "".join(Path(f"/proc/{self.pid}/{name}").read_text() for name in ("status", "smaps_rollup"))
        found = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.endswith("kB")}
        return {name: int(found[name]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon", "RssShmem", "Pss")}


@contextlib.contextmanager
def _program(*command: str | Path) -> Iterator[tuple[int, list[int]]]:
    """Its pid, and the ports that it printed before it was ready."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            lines = list(iter(lambda: process.stdout.readline().strip(), "ready"))  # type: ignore[union-attr]
            yield process.pid, [int(line) for line in lines]
        finally:
            process.terminate()


@contextlib.contextmanager
def _backend(path: Path, *command: str | Path) -> Iterator[tuple[int, socket.socket]]:
    """Its pid, and a connection to the socket at ``path``."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process, socket.socket(socket.AF_UNIX) as sock:
        try:
            while sock.connect_ex(str(path)):
                if process.poll() is not None:
                    raise Failed(f"{command[0]} ended with status {process.returncode}")
                asyncio.run(asyncio.sleep(0.002))
            yield process.pid, sock
        finally:
            sock.close()
            process.terminate()


def other_vsock() -> Path:
    [backend] = [backend for backend in BACKENDS if backend.program == OTHER_VSOCK]
    return fetched(backend)


@contextlib.contextmanager
def started(
    folder: Path, names: tuple[str, ...], flows: int, pairs: int = 1, tools: Tools | None = None
) -> Iterator[dict[str, Near]]:
    """The near ends of these names, with room for so many flows each, none connected yet. ``tools``: from an earlier time."""
    policy = folder / "policy.toml"
    policy.write_text(POLICY)
    listeners, answering = ["serve:tcp", "close:tcp"], ["serve:tcp"]
    for name in names:
        if name in (DIRECT_UNIX, VSOCK, OTHER_VSOCK):
            listeners += [f"serve:{folder}/{name}_{SERVE}", f"close:{folder}/{name}_{CLOSE}"]
            answering.append(f"serve:{folder}/{name}_{ANSWER}")
    serve = (sys.executable, "-m", "vhostsock", "serve")
    quiet = ("--log-level", "error", "--max-flows", str(max(flows, 4096)))
    tools = tools or Tools.built(folder)
    library = tools.library
    with contextlib.ExitStack() as stack:
        _, ports = stack.enter_context(_program(tools.far, *listeners))
        ports += stack.enter_context(_program(tools.far, *answering))[1]
        found = {}
        for name in names:
            path = folder / f"{name}.sock"
            sock = None
            guest = ("--uds-path", folder / name, "--guest-cid", str(CID))
            match name:
                case "direct":
                    near = Near(name, library, "SOCKETS", 0, flows, ports)
                case "direct-unix":
                    near = Near(name, library, "SOCKETS", 0, flows, (SERVE, CLOSE, ANSWER), unix=folder / name)
                case "relay":
                    pid, own = stack.enter_context(_program(tools.relay, *map(str, ports)))
                    near = Near(name, library, "SOCKETS", pid, flows, own)
                case "offload":
                    more = (*quiet, "--socket-path", path, "--policy", policy, "--pairs", str(pairs))
                    pid, sock = stack.enter_context(_backend(path, *serve, "offload", *more))
                    near = Near(name, library, "OFFLOAD", pid, flows, ports, pairs)
                case "vsock":
                    pid, sock = stack.enter_context(_backend(path, *serve, "vsock", *quiet, "--socket-path", path, *guest))
                    near = Near(name, library, "VSOCK", pid, flows, (SERVE, CLOSE, ANSWER))
                case _:
                    pid, sock = stack.enter_context(_backend(path, other_vsock(), "--socket", path, *guest))
                    near = Near(name, library, "VSOCK", pid, flows, (SERVE, CLOSE, ANSWER))
            if sock:
                asyncio.run(near.attach(sock))
            else:
                near.begin()
            stack.callback(near.close)
            found[name] = near
        yield found
