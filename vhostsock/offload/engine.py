"""The C data plane (csrc/engine/vs_engine.h) as a Python object: answers go in, events come out.

Calls may be made from any thread and wait for at most one bounded batch of the engine's own. An answer for a flow that is gone
meanwhile is no error; it closes the descriptor that came with it and returns False.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from .._core import ffi, lib
from ..errors import UsageError

__all__ = ["EVENT_NAMES", "Engine", "Event", "Stats"]

FEATURES: Final = (
    lib.VSO_F_DGRAM | lib.VSO_F_DGRAM_INFO | lib.VSO_F_NETNS | lib.VSO_F_PING | lib.VSO_F_IPX | lib.VSO_F_URGENT
    | lib.VSO_F_GROUP | lib.VSO_F_LATE_CLOSED | lib.VSO_F_EARLY_DATA
)
BUSY_POLL_MAX: Final = 1000  # microseconds; who expects more to come of spinning for longer is mistaken
BATCH: Final = 64  # events taken in one call
EVENT_NAMES: Final[dict[int, str]] = {
    number: name.removeprefix("VSE_EV_") for number, name in ffi.typeof("enum vse_event_type").elements.items()
}


class Event(NamedTuple):
    """One event; its members are those of struct vse_event. ``kind`` is a name of EVENT_NAMES."""

    kind: str
    flow: int
    handle: int
    error: int
    to_host: int
    to_guest: int
    payload: bytes


class Stats(NamedTuple):
    """struct vse_stats: flows now and ever, bytes and datagrams each way, and how often anybody was woken for it."""

    flows: int = 0
    opened: int = 0
    ended: int = 0
    to_host: int = 0
    to_guest: int = 0
    dgrams_to_host: int = 0
    dgrams_to_guest: int = 0
    dgrams_dropped: int = 0
    msgs_in: int = 0
    msgs_out: int = 0
    events: int = 0
    wakeups: int = 0
    buffered: int = 0


class Engine:
    """One engine and its thread. UsageError: a limit is out of range. OSError: the host has no resources for it."""

    def __init__(self, *, pairs: int, max_flows: int, buf_alloc: int, buf_total: int, guest_cid: int | None = None,
                 hairpin: str = "", hints: bytes = b"", routes: Any = (), ports: Any = (), ports_path: str = "",
                 log_flows: int = 0, busy_poll: int = 0) -> None:
        """``guest_cid``: speak virtio-vsock with that guest, not the offload protocol. ``hairpin``: the guest's network
        namespace whose loopback is the device's, too. ``hints``: the payload of VSO_HINTS, see hints.py. ``routes``: an
        array of struct vse_route, see routes.py. ``ports``, ``ports_path``: vsock, an array of struct vse_port and where other
        ports of the host lead, see vs_engine.h. ``log_flows``: of routes, a second, that are told for the log; 0: all.
        ``busy_poll``: how long the thread may wait awake where that is faster, microseconds, see vs_poll.c; 0: not at all."""
        if not 0 <= busy_poll <= BUSY_POLL_MAX:
            raise UsageError(f"busy_poll must be 0..{BUSY_POLL_MAX} microseconds, not {busy_poll}")
        config = ffi.new("struct vse_config *", {
            "pairs": pairs, "max_flows": max_flows, "buf_alloc": buf_alloc, "buf_total": buf_total, "features": FEATURES,
            "dialect": lib.VSE_OFFLOAD if guest_cid is None else lib.VSE_VSOCK, "guest_cid": guest_cid or 0,
            "hairpin": hairpin.encode(), "nr_hints": len(hints) // ffi.sizeof("struct vso_hint"),
            "nr_routes": len(routes), "routes": routes or ffi.NULL, "nr_ports": len(ports), "ports": ports or ffi.NULL,
            "ports_path": os.fsencode(ports_path), "log_flows": log_flows, "poll_ns": busy_poll * 1000,
        })  # fmt: skip
        if config.nr_hints <= lib.VSO_HINTS_MAX:  # else vse_new complains
            ffi.memmove(config.hints, hints, len(hints))
        if hints:
            config.features |= lib.VSO_F_HINTS
        err = ffi.new("struct vs_err *")
        pointer = lib.vse_new(config, err)
        if not pointer:
            raise UsageError(_text(err)) if err.code == errno.EINVAL else OSError(err.code, _text(err))
        self._engine: Any = ffi.gc(pointer, lib.vse_free)
        self._batch = ffi.new("struct vse_event[]", BATCH)
        self.event_fd: int = lib.vse_event_fd(pointer)

    def start(self) -> None:
        """Start the thread."""
        err = ffi.new("struct vs_err *")
        if lib.vse_start(self._engine, err):
            raise OSError(err.code, _text(err))

    def close(self) -> None:
        """Stop the thread, reset all flows, free everything. Idempotent."""
        if self._engine is not None:
            self.event_fd = -1
            ffi.release(self._engine)
            self._engine = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The thread does not touch rings or guest memory meanwhile."""
        lib.vse_lock(self._engine)
        try:
            yield
        finally:
            lib.vse_unlock(self._engine)

    def attach(self, ring: int, vq: Any, kick_fd: int) -> None:
        """Serve a running vring (a struct vs_vq pointer) until ``detach``. OSError."""
        err = ffi.new("struct vs_err *")
        if lib.vse_ring_attach(self._engine, ring, vq, kick_fd, err):
            raise OSError(err.code, _text(err))

    def detach(self, ring: int) -> None:
        lib.vse_ring_detach(self._engine, ring)

    def events(self) -> list[Event]:
        """What happened, in order; at most BATCH. The event fd stays readable while there is more."""
        count = lib.vse_events(self._engine, self._batch, BATCH)
        return [
            Event(EVENT_NAMES[e.type], e.flow, e.handle, e.error, e.to_host, e.to_guest, bytes(ffi.buffer(e.payload, e.len)))
            for e in self._batch[0:count]
        ]

    def unlogged(self) -> int:
        """Lines that the log lacks, since the last call: of routes' connections, while nobody took the events."""
        return int(lib.vse_unlogged(self._engine))

    def connected(self, handle: int, fd: int, local: str, peer: str) -> bool:
        """Answer a CONNECT with a connected descriptor, which is the engine's from here on. OSError: the request failed
        with it (and was answered so)."""
        return self._answered(handle, lib.vse_connected(self._engine, handle, fd, local.encode(), peer.encode()))

    def dialed(self, handle: int) -> socket.socket | None:
        """What a route has begun for a CONNECT: a socket that is connecting; None: nothing. OSError: it failed so."""
        fd = ffi.new("int *", -1)
        code = lib.vse_dialed(self._engine, handle, fd)
        if code not in (0, -errno.ESTALE):
            raise OSError(-code, os.strerror(-code))
        return socket.socket(fileno=fd[0]) if fd[0] >= 0 else None

    def connect(self, handle: int, sock: socket.socket, address: bytes) -> bool:
        """Answer a CONNECT by connecting ``sock`` to ``address``, a sockaddr, with its real names. False: that takes time;
        finish it and call ``connected``. OSError: it failed, and the request is not answered. True: the engine has ``sock``."""
        code = lib.vse_connect(self._engine, handle, sock.fileno(), address, len(address))
        if code == -errno.EINPROGRESS:
            return False
        if code:
            raise OSError(-code, os.strerror(-code))
        sock.detach()
        return True

    def bound(self, handle: int, fd: int, local: str) -> bool:
        """Answer a BIND with a bound descriptor. As ``connected``."""
        return self._answered(handle, lib.vse_bound(self._engine, handle, fd, local.encode()))

    def _answered(self, handle: int, code: int) -> bool:
        if code not in (0, -errno.ESTALE):
            self.refuse(handle, lib.VSO_OFFLOAD, -code)
            raise OSError(-code, os.strerror(-code))
        return code == 0

    def refuse(self, handle: int, verdict: int, error: int) -> bool:
        """Answer a CONNECT or BIND with a verdict and an errno."""
        return bool(lib.vse_refuse(self._engine, handle, verdict, error) == 0)

    def destination(self, handle: int, uri: str, address: bytes, verdict: int = lib.VSO_OFFLOAD, error: int = 0) -> bool:
        """Answer a DGRAM_DEST: the sockaddr that ``uri`` stands for; or another verdict, or an errno, if it is refused."""
        return bool(lib.vse_dgram_dest(self._engine, handle, uri.encode(), address, len(address), verdict, error) == 0)

    def client(self, handle: int, uri: str) -> bytes | None:
        """The sockaddr of ``uri`` if a datagram came from it to the server that this flow is."""
        address = ffi.new("uint8_t[128]")
        length = lib.vse_dgram_client(self._engine, handle, uri.encode(), address, len(address))
        return bytes(ffi.buffer(address, length)) if length > 0 else None

    def call(self, fd: int, port: int, *, greet: bool) -> int:
        """vsock: announce a connection of the host to ``port`` of the guest; its handle. ``greet``: tell ``fd`` "OK <port>"
        when the guest takes it. OSError: there is no driver that could answer (ENOTCONN), or no room (EAGAIN, ENFILE)."""
        handle = ffi.new("uint64_t *")
        code = lib.vse_call(self._engine, fd, port, greet, handle)
        if code:
            raise OSError(-code, os.strerror(-code))
        return int(handle[0])

    def group(self, handle: int, verdict: int, error: int) -> bool:
        """Answer a GROUP."""
        return bool(lib.vse_group(self._engine, handle, verdict, error) == 0)

    def ipx_open(self, sock: socket.socket, network: int, peers: Sequence[int]) -> None:
        """Make the guest a node of IPX, reached at ``sock`` (UDP, bound to an IPv4 address), which is the engine's from now on.
        ``peers``: nodes that are heard and get broadcasts. OSError."""
        nodes = b"".join(peer.to_bytes(6, "big") for peer in peers)
        code = lib.vse_ipx_open(self._engine, sock.detach(), network, nodes, len(peers))
        if code:
            raise OSError(-code, os.strerror(-code))

    def ipx_bound(self, handle: int, number: int) -> str | None:
        """Answer a BIND of IPX with a socket number (0: a free one); the address. None: the flow is gone. OSError: it failed,
        and the request was answered so."""
        local = ffi.new("char[]", lib.VSO_URI_MAX + 1)
        taken = self._answered(handle, lib.vse_ipx_bound(self._engine, handle, number, local))
        return ffi.string(local).decode() if taken else None

    def duplicate(self, handle: int) -> socket.socket:
        """The host's socket of a flow once more, for the caller. OSError: it has none (any more)."""
        fd = lib.vse_dup(self._engine, handle)
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd))
        return socket.socket(fileno=fd)

    def reset(self, handle: int, error: int) -> bool:
        """End one flow: RESET to the driver, RST on the host."""
        return bool(lib.vse_reset_flow(self._engine, handle, error) == 0)

    def forget(self) -> None:
        """End every flow without a word to the driver, which is gone or starts anew."""
        lib.vse_reset_all(self._engine, True)

    def stats(self) -> Stats:
        raw = ffi.new("struct vse_stats *")
        lib.vse_get_stats(self._engine, raw)
        return Stats(*(getattr(raw, name) for name in Stats._fields))


def _text(err: Any) -> str:
    return str(ffi.string(err.text).decode(errors="replace"))
