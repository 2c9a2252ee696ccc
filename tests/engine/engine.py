"""The engine under test: real rings in a memfd, real host sockets, and Python's part of the bargain in the test's own thread.

:class:`EngineUnderTest` answers the engine's events while the driver waits (OffloadDriver.watch), so a test has one thread of
its own besides the engine's, and nothing races.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vhostsock._core import ffi, lib
from vhostsock.ring import Vring
from vhostsock.testing.driver import DriverQueue, GuestMemory
from vhostsock.testing.offload import Flow, OffloadDriver

EVENTS = {
    number: name.removeprefix("VSE_EV_") for number, name in ffi.typeof("enum vse_event_type").elements.items()
}


@dataclass(frozen=True)
class Event:
    name: str
    flow: int
    handle: int
    error: int
    payload: bytes
    to_host: int
    to_guest: int

    @property
    def uri(self) -> str:
        head = ffi.from_buffer("struct vso_open *", self.payload)
        size = ffi.sizeof("struct vso_open")
        return self.payload[size : size + head.uri_len].decode()


def split_uri(uri: str) -> tuple[str, str, int]:
    """(scheme, host, port) of tcp://h:p, tcp6://h/p and the udp ones."""
    match = re.fullmatch(r"(tcp|udp)(?:://([\d.]+):|6://([\da-f:]+)/)(\d+)", uri)
    assert match, uri
    return match[1], match[2] or match[3], int(match[4])


def make_uri(kind: str, address: tuple[Any, ...]) -> str:
    host = ipaddress.ip_address(address[0])
    return f"{kind}://{host}:{address[1]}" if host.version == 4 else f"{kind}6://{host}/{address[1]}"


class EngineUnderTest:
    """An engine on its rings, a driver on the other side, and the answers in between: replace ``on_*`` to answer otherwise."""

    def __init__(
        self, *, pairs: int = 1, memory: int = 64 << 20, num: int = 256, config: dict[str, int] | None = None,
        driver_class: type[OffloadDriver] = OffloadDriver, **driver: Any,
    ) -> None:  # fmt: skip
        err = ffi.new("struct vs_err *")
        features = lib.VSO_F_DGRAM | lib.VSO_F_DGRAM_INFO
        settings = dict(pairs=pairs, max_flows=1024, buf_alloc=262144, buf_total=64 << 20, features=features)
        self.ptr = lib.vse_new(ffi.new("struct vse_config *", settings | (config or {})), err)
        assert self.ptr != ffi.NULL, ffi.string(err.text)
        self.closing = contextlib.ExitStack()
        self.closing.callback(lib.vse_free, self.ptr)
        self.memory = self.closing.enter_context(GuestMemory(memory))
        self.driver = self.closing.enter_context(driver_class.in_memory(self.memory, pairs, num, **driver))
        self.vrings = [Vring(i) for i in range(2 * pairs)]
        self.map = self.memory.map()
        self.closing.callback(self.map.close)
        for vring in self.vrings:
            self.closing.callback(vring.close)
        self.closing.callback(lib.vse_stop, self.ptr)
        self.events: deque[Event] = deque()  # every event, for the test to look at
        self.on_connect: Callable[[Event], object] = self.connect_for_real
        self.on_bind: Callable[[Event], object] = self.bind_for_real
        self.on_dest: Callable[[Event], object] = self.send_for_real
        self._buffer = ffi.new("struct vse_event[16]")
        for i in range(2 * pairs):
            self.attach(i)
        self.driver.watch(lib.vse_event_fd(self.ptr), self.take_events)
        assert lib.vse_start(self.ptr, err) == 0, ffi.string(err.text)

    def attach(self, ring: int) -> None:
        queue, vring = self.driver.queues[ring], self.vrings[ring]
        queue.attach(vring, self.map)
        err = ffi.new("struct vs_err *")
        assert lib.vse_ring_attach(self.ptr, ring, vring.ptr, queue.kick_fd, err) == 0, ffi.string(err.text)

    def detach(self, ring: int) -> None:
        """As GET_VRING_BASE does; attach() goes on where it was."""
        lib.vse_ring_detach(self.ptr, ring)
        self.driver.queues[ring].base = self.vrings[ring].stop()

    def renew(self, ring: int) -> None:
        """As a driver that resets a broken ring: a new ring in its place."""
        self.detach(ring)
        self.driver.queues[ring].close()
        self.driver.replace(ring, DriverQueue(self.memory, self.driver.queues[ring].num))
        self.attach(ring)

    def close(self) -> None:
        self.closing.close()

    @property
    def stats(self) -> Any:
        stats = ffi.new("struct vse_stats *")
        lib.vse_get_stats(self.ptr, stats)
        return stats

    # Python's part

    def take_events(self) -> None:
        for i in range(lib.vse_events(self.ptr, self._buffer, 16)):
            e = self._buffer[i]
            payload = bytes(ffi.buffer(e.payload)[: e.len])
            event = Event(EVENTS[e.type], e.flow, e.handle, e.error, payload, e.to_host, e.to_guest)
            self.events.append(event)
            answer = {"CONNECT": self.on_connect, "BIND": self.on_bind, "DGRAM_DEST": self.on_dest}.get(event.name)
            if answer:
                answer(event)

    def wait_event(self, name: str) -> Event:
        """The next event of that name; earlier ones of other names are dropped."""
        def found() -> bool:
            while self.events and self.events[0].name != name:
                self.events.popleft()
            return bool(self.events)

        self.driver.wait(found, what=f"event {name}")
        return self.events.popleft()

    def connected(self, event: Event, sock: socket.socket, local: str, peer: str) -> int:
        return int(lib.vse_connected(self.ptr, event.handle, sock.detach(), local.encode(), peer.encode()))

    def bound(self, event: Event, sock: socket.socket, local: str) -> int:
        return int(lib.vse_bound(self.ptr, event.handle, sock.detach(), local.encode()))

    def refuse(self, event: Event, verdict: int, error: int) -> int:
        return int(lib.vse_refuse(self.ptr, event.handle, verdict, error))

    def _socket(self, uri: str) -> tuple[str, socket.socket, tuple[str, int]]:
        kind, host, port = split_uri(uri)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return kind, socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM), (host, port)

    def connect_for_real(self, event: Event) -> None:
        kind, sock, address = self._socket(event.uri)
        only = ffi.from_buffer("struct vso_open *", event.payload).flags & lib.VSO_OPEN_ADDR_ONLY
        try:
            if only:
                sock.bind(("", 0))
            else:
                sock.connect(address)
        except OSError as error:
            sock.close()
            self.refuse(event, lib.VSO_OFFLOAD, error.errno or errno.EIO)
            return
        self.connected(event, sock, make_uri(kind, sock.getsockname()), event.uri)

    def bind_for_real(self, event: Event) -> None:
        kind, sock, address = self._socket(event.uri)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError as error:
            sock.close()
            self.refuse(event, lib.VSO_OFFLOAD, error.errno or errno.EIO)
            return
        self.bound(event, sock, make_uri(kind, sock.getsockname()))

    def send_for_real(self, event: Event) -> None:
        _, host, port = split_uri(event.payload.decode())
        self.destination(event, event.payload.decode(), (host, port))

    def destination(self, event: Event, uri: str, address: tuple[str, int] | None, error: int = 0,
                    verdict: int = lib.VSO_OFFLOAD) -> int:  # fmt: skip
        raw = b"" if address is None else (
            socket.AF_INET.to_bytes(2, "little") + address[1].to_bytes(2, "big") + socket.inet_aton(address[0]) + bytes(8)
        )  # fmt: skip
        return int(lib.vse_dgram_dest(self.ptr, event.handle, uri.encode(), raw, len(raw), verdict, error))


@contextlib.contextmanager
def host_listener(family: int = socket.AF_INET, backlog: int = 128) -> Iterator[tuple[socket.socket, str]]:
    """A listening host socket on loopback and its URI; accepted sockets time out after 30 s."""
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        sock.listen(backlog)
        sock.settimeout(30)
        yield sock, make_uri("tcp", sock.getsockname())


@contextlib.contextmanager
def connection(engine: EngineUnderTest, **options: Any) -> Iterator[tuple[Flow, socket.socket]]:
    """A flow of the guest and the host socket at its other end."""
    with host_listener() as (listener, uri):
        flow = engine.driver.connect(uri, **options)
        host, _ = listener.accept()
    with host:
        host.settimeout(30)
        yield flow, host


def recv_until_end(sock: socket.socket) -> bytes:
    """All until EOF; OSError if it ends in a reset."""
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
