# SPDX-License-Identifier: BSD-3-Clause
"""The driver side of virtio-vsock (virtio 1.3, 5.10), without a guest.

:class:`VsockDriver` speaks the protocol over the rings it is given, as an honest guest does; :class:`Connection` is one of its
sockets, with credit in both directions. Calls block, each at most ``timeout`` seconds, then raise TimeoutError; the device may
run in this process, on another thread, or in another process::

    with GuestMemory(32 << 20) as memory, VsockDriver.in_memory(memory, cid=3) as driver:
        ...                                     # hand driver.queues to a front-end, or attach them to an engine
        connection = driver.connect(1234)       # ConnectionResetError: refused, as Linux says it
        connection.send(b"GET / HTTP/1.0\\r\\n\\r\\n")
        connection.shutdown()
        page = connection.recv_all()            # until the device's SHUTDOWN; ConnectionResetError after its RST
        connection.close()                      # SHUTDOWN of both halves, waits for RST

        driver.listen(80)
        connection = driver.accept(80)

What the device may not do (credit exceeded, bytes after its SHUTDOWN, ...) raises :class:`DeviceFault`. Hostile drivers are
made with :meth:`VsockDriver.post`, which sends any header and payload.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vhostsock._core import ffi, lib
from vhostsock.testing.driver import DeviceFault, DriverQueue
from vhostsock.testing.flow import TIMEOUT, pack
from vhostsock.testing.pairs import RingDriver

__all__ = ["Connection", "DeviceFault", "Packet", "VsockDriver"]

HDR_SIZE: int = ffi.sizeof("struct vsk_hdr")
OPS: dict[int, str] = {number: name.removeprefix("VSK_OP_") for number, name in ffi.typeof("enum vsk_op").elements.items()}
BOTH: int = lib.VSK_SHUTDOWN_RECEIVE | lib.VSK_SHUTDOWN_SEND
MAX_PAYLOAD = 65536
"""What Linux puts into one packet (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE)."""


class Packet(NamedTuple):
    """One packet of the device, in the order of struct vsk_hdr."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    payload: bytes

    @property
    def name(self) -> str:
        return OPS.get(self.op, f"op {self.op}")


def _reset() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


class Connection:
    """One socket of the guest. ``established``: RESPONSE was seen; ``eof``: the device sends no more; ``reset``: RST came."""

    def __init__(self, driver: VsockDriver, local: int, peer: int, kind: int) -> None:
        self.driver = driver
        self.local, self.peer, self.kind = local, peer, kind
        self.established = self.eof = self.reset = self.peer_deaf = self.closing = False
        self.received = bytearray()  # of the stream, not read yet
        self.messages: deque[bytes] = deque()  # seqpackets, complete
        self._partial = bytearray()
        # credit: what we can hold and have handed on; what the device told; what we sent
        self.buf_alloc, self.fwd_cnt, self.told, self.held = driver.window, 0, 0, 0
        self.peer_alloc, self.peer_fwd, self.tx_cnt = 0, 0, 0

    def __repr__(self) -> str:
        return f"<Connection {self.local} -> {self.peer}>"

    # Sending

    @property
    def credit(self) -> int:
        """Bytes that may be sent now."""
        window = min(self.peer_alloc, self.buf_alloc) if self.driver.capped else self.peer_alloc
        return max(0, window - (self.tx_cnt - self.peer_fwd))

    def try_send(self, data: bytes, flags: int = 0) -> int:
        """Send what credit and one packet allow; the bytes that were sent. ConnectionResetError after RST."""
        if self.reset:
            raise _reset()
        n = min(len(data), self.credit, self.driver.max_payload)
        if n or not data:
            self.tx_cnt += n
            self.post(lib.VSK_OP_RW, flags=flags if n == len(data) else 0, payload=data[:n])
        return n

    def send(self, data: bytes, timeout: float = TIMEOUT) -> None:
        """Send all of ``data``, waiting for credit; on a seqpacket connection that is one message."""
        flags = lib.VSK_SEQ_EOM if self.kind == lib.VSK_TYPE_SEQPACKET else 0
        view = memoryview(data)
        while True:
            if view:
                self.driver.wait(lambda: self.credit or self.reset, timeout, f"credit on {self!r}")
            # what is left tells whether this packet is the last of the message
            view = view[self.try_send(bytes(view), flags) :]
            if not view:
                return

    def shutdown(self, how: int = lib.VSK_SHUTDOWN_SEND) -> None:
        """SHUTDOWN with these VSK_SHUTDOWN_* flags."""
        self.post(lib.VSK_OP_SHUTDOWN, flags=how)

    def tell_credit(self) -> None:
        self.post(lib.VSK_OP_CREDIT_UPDATE)

    def post(self, op: int, *, flags: int = 0, payload: bytes = b"") -> None:
        """One packet with the credit as it is."""
        self.told = self.fwd_cnt
        self.driver.post(op, self.local, self.peer, type=self.kind, flags=flags, payload=payload,
                         buf_alloc=self.buf_alloc, fwd_cnt=self.fwd_cnt % 2**32)  # fmt: skip

    # Receiving

    def _forwarded(self, size: int) -> None:
        self.fwd_cnt += size
        self.held -= size
        # as Linux: when less than a packet's worth may be under way (virtio_transport_stream_do_dequeue)
        if self.buf_alloc - (self.fwd_cnt - self.told) < self.driver.max_payload and not (self.reset or self.closing):
            self.tell_credit()

    def recv(self, limit: int = 1 << 30, timeout: float = TIMEOUT) -> bytes:
        """1..``limit`` bytes, or b"" at the end of the stream. ConnectionResetError after RST, when all before it was read."""
        self.driver.wait(lambda: self.received or self.eof or self.reset, timeout, f"data on {self!r}")
        if self.received:
            data = bytes(self.received[:limit])
            del self.received[:limit]
            self._forwarded(len(data))
            return data
        if self.reset and not self.eof:
            raise _reset()
        return b""

    def recv_exactly(self, size: int, timeout: float = TIMEOUT) -> bytes:
        """``size`` bytes; EOFError if the stream ends before."""
        data = bytearray()
        while len(data) < size:
            part = self.recv(size - len(data), timeout)
            if not part:
                raise EOFError(f"{self!r}: the end after {len(data)} of {size} bytes")
            data += part
        return bytes(data)

    def recv_all(self, timeout: float = TIMEOUT) -> bytes:
        """All until the device's SHUTDOWN. ConnectionResetError if it ends in RST."""
        return b"".join(iter(lambda: self.recv(timeout=timeout), b""))

    def recv_message(self, timeout: float = TIMEOUT) -> bytes | None:
        """The next seqpacket; None at the end. ConnectionResetError after RST."""
        self.driver.wait(lambda: self.messages or self.eof or self.reset, timeout, f"a message on {self!r}")
        if self.messages:
            message = self.messages.popleft()
            self._forwarded(len(message))
            if self.told != self.fwd_cnt and not (self.reset or self.closing):
                self.tell_credit()  # as Linux after every message: the rest of the next one may wait for it
            return message
        if self.reset and not self.eof:
            raise _reset()
        return None

    # The end

    def close(self, *, wait: bool = True, timeout: float = TIMEOUT) -> None:
        """SHUTDOWN of both halves, and unless ``wait`` is false wait for RST. Only the first call counts."""
        if not self.closing and not self.reset:
            self.closing = True
            self.shutdown(BOTH)
        if wait:
            self.driver.wait(lambda: self.reset, timeout, f"RST for {self!r}")

    def abort(self) -> None:
        """RST."""
        if not self.reset:
            self.post(lib.VSK_OP_RST)
            self.driver.forget(self)

    # Inside

    def on_packet(self, p: Packet) -> None:
        if p.op != lib.VSK_OP_RST:
            self._take_credit(p)
        if p.op == lib.VSK_OP_RW:
            self._on_data(p)
        elif p.op == lib.VSK_OP_RESPONSE:
            if self.established:
                raise DeviceFault(f"{self!r}: a second RESPONSE")
            self.established = True
        elif p.op == lib.VSK_OP_SHUTDOWN:
            self.eof = self.eof or bool(p.flags & lib.VSK_SHUTDOWN_SEND)
            self.peer_deaf = self.peer_deaf or bool(p.flags & lib.VSK_SHUTDOWN_RECEIVE)
        elif p.op == lib.VSK_OP_RST:
            self.driver.forget(self)
        elif p.op == lib.VSK_OP_CREDIT_REQUEST:
            self.driver.later(self.tell_credit)
        elif p.op != lib.VSK_OP_CREDIT_UPDATE:
            raise DeviceFault(f"{self!r}: {p.name}")

    def _on_data(self, p: Packet) -> None:
        if self.eof:
            raise DeviceFault(f"{self!r}: RW after SHUTDOWN")
        self.held += len(p.payload)
        if self.fwd_cnt + self.held - self.told > self.buf_alloc:
            raise DeviceFault(f"{self!r}: {self.held} bytes held, window {self.buf_alloc}")
        if self.kind == lib.VSK_TYPE_STREAM:
            self.received += p.payload
            return
        self._partial += p.payload
        if p.flags & lib.VSK_SEQ_EOM:
            self.messages.append(bytes(self._partial))
            self._partial.clear()

    def _take_credit(self, p: Packet) -> None:
        """The device's window; it counts modulo 2^32, we do not."""
        ahead = (p.fwd_cnt - self.peer_fwd) % 2**32
        if ahead > self.tx_cnt - self.peer_fwd:
            raise DeviceFault(f"{self!r}: the device handed on {ahead} bytes of {self.tx_cnt - self.peer_fwd}")
        self.peer_fwd += ahead
        self.peer_alloc = p.buf_alloc


class VsockDriver(RingDriver):
    """The driver of a vsock device with these rings: [to the driver, from it].

    ``cid`` is the guest's, as in the config space. ``window`` is what each connection may hold in bytes. Linux posts receive
    buffers of 4 KiB, until 6.2 as a header and a payload buffer (``rx_layout=[44, 4096]``). ``capped``: no connection has more
    under way than it may hold itself, whatever the device's window is, as in Linux since 2026 (and its stable releases).
    """

    def __init__(
        self, queues: Sequence[DriverQueue], *, cid: int = 3, window: int = 262144, rx_layout: Sequence[int] = (4096,),
        rx_buffers: int = 64, capped: bool = False,
    ) -> None:  # fmt: skip
        if len(queues) != 2:
            raise ValueError("a vsock driver has two rings for packets")
        super().__init__(queues, rx_layout=rx_layout, rx_buffers=rx_buffers)
        self.cid = cid
        self.window = window
        self.capped = capped
        self.max_payload = MAX_PAYLOAD
        self.connections: dict[tuple[int, int], Connection] = {}
        self.listening: dict[int, deque[Connection]] = {}
        self.stray: deque[Packet] = deque()  # RST for what is not there
        self.log: deque[Packet] | None = None  # set to a deque to keep every packet
        self._ports = itertools.count(1024)
        self._answers: deque[Callable[[], None]] = deque()

    def later(self, answer: Callable[[], None]) -> None:
        """Call ``answer`` when all packets of this turn have been looked at: it may wait for room, and so take more."""
        self._answers.append(answer)

    def step(self) -> int:
        """Take what the device has completed, and answer it. The number of packets."""
        count = super().step()
        while self._answers:
            self._answers.popleft()()
        return count

    def post(
        self, op: int, src_port: int = 0, dst_port: int = 0, *, payload: bytes = b"", length: int | None = None,
        cuts: Sequence[int] = (), **fields: Any,
    ) -> None:  # fmt: skip
        """Send one packet; ``fields`` are those of struct vsk_hdr. ``length`` overrides hdr.len; the chain is cut into
        descriptors at the offsets ``cuts``."""
        head: dict[str, Any] = dict(
            src_cid=self.cid, dst_cid=lib.VSK_CID_HOST, src_port=src_port, dst_port=dst_port, op=op, type=lib.VSK_TYPE_STREAM,
            len=len(payload) if length is None else length,
        )  # fmt: skip
        data = pack("struct vsk_hdr", **(head | fields)) + payload
        edges = [0, *cuts, len(data)]
        self.post_raw([data[a:b] for a, b in itertools.pairwise(edges)])

    def open(self, port: int, *, kind: int = lib.VSK_TYPE_STREAM, local: int | None = None) -> Connection:
        """Send REQUEST without waiting."""
        connection = Connection(self, next(self._ports) if local is None else local, port, kind)
        self.connections[connection.local, port] = connection
        connection.post(lib.VSK_OP_REQUEST)
        return connection

    def connect(self, port: int, *, kind: int = lib.VSK_TYPE_STREAM, timeout: float = TIMEOUT) -> Connection:
        """A connection to ``port`` of the host. ConnectionResetError when it is refused."""
        connection = self.open(port, kind=kind)
        self.wait(lambda: connection.established or connection.reset, timeout, f"the answer for {connection!r}")
        if not connection.established:
            raise _reset()
        return connection

    def listen(self, port: int) -> None:
        """Take connections to ``port`` of the guest from here on."""
        self.listening.setdefault(port, deque())

    def accept(self, port: int, timeout: float = TIMEOUT) -> Connection:
        """The next connection to ``port``, which listens."""
        self.wait(lambda: self.listening[port], timeout, f"a connection to port {port}")
        return self.listening[port].popleft()

    def forget(self, connection: Connection) -> None:
        """It ended with RST: its ports are free."""
        connection.reset = True
        self.connections.pop((connection.local, connection.peer), None)

    def _on_message(self, pair: int, data: bytes) -> None:
        if len(data) < HDR_SIZE:
            raise DeviceFault(f"a packet of {len(data)} bytes")
        h = ffi.from_buffer("struct vsk_hdr *", data[:HDR_SIZE])
        p = Packet(h.src_cid, h.dst_cid, h.src_port, h.dst_port, h.len, h.type, h.op, h.flags, h.buf_alloc, h.fwd_cnt,
                   data[HDR_SIZE:])  # fmt: skip
        if self.log is not None:
            self.log.append(p)
        if p.len != len(p.payload):
            raise DeviceFault(f"{p.name}: {len(p.payload)} bytes of payload, announced {p.len}")
        if p.dst_cid != self.cid or (p.src_cid != lib.VSK_CID_HOST and p.op != lib.VSK_OP_RST):
            raise DeviceFault(f"{p.name} from {p.src_cid} to {p.dst_cid}")
        connection = self.connections.get((p.dst_port, p.src_port))
        if p.op == lib.VSK_OP_REQUEST:
            self._on_request(p, connection)
        elif connection and p.src_cid == lib.VSK_CID_HOST:
            if p.type != connection.kind:
                raise DeviceFault(f"{connection!r}: {p.name} of type {p.type}")
            connection.on_packet(p)
        elif p.op == lib.VSK_OP_RST:
            self.stray.append(p)
        else:  # a connection that we reset meanwhile
            self._refuse(p)

    def _refuse(self, p: Packet) -> None:
        self.later(lambda: self.post(lib.VSK_OP_RST, p.dst_port, p.src_port, type=p.type))

    def _on_request(self, p: Packet, connection: Connection | None) -> None:
        if connection:
            raise DeviceFault(f"{connection!r}: REQUEST for it")
        if p.dst_port not in self.listening:
            self._refuse(p)
            return
        connection = Connection(self, p.dst_port, p.src_port, p.type)
        connection.peer_alloc, connection.established = p.buf_alloc, True
        self.connections[connection.local, connection.peer] = connection
        self.later(lambda: connection.post(lib.VSK_OP_RESPONSE))
        self.listening[p.dst_port].append(connection)
