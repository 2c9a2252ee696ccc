"""One socket of a pretended guest: messages of the offload protocol, and a flow with its credit (see ``testing.offload``)."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from vhostsock._core import ffi, lib
from vhostsock.errors import VhostsockError
from vhostsock.testing.driver import DeviceFault

if TYPE_CHECKING:
    from vhostsock.testing.offload import OffloadDriver

__all__ = ["Flow", "Message", "Refused", "pack", "pack_open", "pack_options"]

NAMES = {number: name.removeprefix("VSO_") for number, name in ffi.typeof("enum vso_type").elements.items()}
TIMEOUT = 30.0
WITH_CREDIT = (
    lib.VSO_DATA, lib.VSO_URGENT, lib.VSO_CREDIT, lib.VSO_SHUTDOWN, lib.VSO_SOCKOPT_REPLY, lib.VSO_CONNECT_REPLY,
)  # fmt: skip


class Refused(VhostsockError):
    """CONNECT, BIND or LISTEN was not granted: ``verdict`` VSO_OFFLOAD (the host tried: ``errno``), VSO_NATIVE or VSO_DENY."""

    def __init__(self, verdict: int, error: int) -> None:
        name = {lib.VSO_OFFLOAD: "the host failed", lib.VSO_NATIVE: "native", lib.VSO_DENY: "denied"}.get(verdict, "?")
        super().__init__(f"{name}: {errno.errorcode.get(error, error)}" if error else name)
        self.verdict = verdict
        self.errno = error


class Message(NamedTuple):
    """One message of the device, in the order of the wire."""

    pair: int
    type: int
    flow: int
    arg: int
    buf_alloc: int
    fwd_cnt: int
    cookie: int
    payload: bytes

    @property
    def name(self) -> str:
        name: str = NAMES.get(self.type, str(self.type))
        return name

    def struct(self, ctype: str) -> tuple[Any, bytes]:
        """The payload as that C struct, and the bytes behind it. DeviceFault if it is too short."""
        size = ffi.sizeof(ctype)
        if len(self.payload) < size:
            raise DeviceFault(f"{self.name}: {len(self.payload)} bytes of payload, {ctype} has {size}")
        value = ffi.new(f"{ctype} *")
        ffi.buffer(value)[:] = self.payload[:size]
        return value, self.payload[size:]

    def uris(self, ctype: str) -> tuple[Any, str, str]:
        """The struct, and the local and the peer URI behind it."""
        value, rest = self.struct(ctype)
        if len(rest) != value.local_len + value.peer_len:
            raise DeviceFault(f"{self.name}: {len(rest)} bytes of URIs, announced {value.local_len} + {value.peer_len}")
        return value, rest[: value.local_len].decode("ascii"), rest[value.local_len :].decode("ascii")


class DatagramError(NamedTuple):
    """What became of a datagram: struct vso_error, where it went, who said so, and as much of it as is known."""

    head: Any
    uri: str
    offender: str
    data: bytes


def pack(ctype: str, **fields: Any) -> bytes:
    """The bytes of a C struct of vso_abi.h with these fields, zeros elsewhere."""
    return bytes(ffi.buffer(ffi.new(f"{ctype} *", fields)))


def pack_options(options: Iterable[tuple[int, int, bytes]]) -> bytes:
    """(level, name, value) for CONNECT and BIND."""
    return b"".join(
        pack("struct vso_sockopt", level=level, name=name, len=len(value)) + value + bytes(-len(value) % 8)
        for level, name, value in options
    )


def pack_open(
    uri: str | bytes, local: str | bytes = b"", options: bytes = b"", *, flags: int = 0, comm: bytes = b"test", name: str = "",
    **fields: Any,
) -> bytes:  # fmt: skip
    """The payload of CONNECT and BIND. ``name``: of the network namespace (with VSO_F_NETNS)."""
    uri = uri.encode() if isinstance(uri, str) else uri
    local = local.encode() if isinstance(local, str) else local
    lengths = dict(uri_len=len(uri), local_len=len(local), opts_len=len(options), name_len=len(name))
    head = lengths | dict(flags=flags, comm=comm) | fields
    return pack("struct vso_open", **head) + uri + local + options + name.encode()


class Flow:
    """One socket of the guest. ``local``, ``peer``: its URIs; ``error``: RESET's errno (0: none); ``eof``: the host's FIN."""

    def __init__(self, driver: OffloadDriver, flow_id: int, pair: int, buf_alloc: int) -> None:
        self.driver = driver
        self.id = flow_id
        self.pair = pair
        self.local = self.peer = ""
        self.eof = False
        self.error = 0
        self.closed = False  # CLOSED was received: the id is free
        self.closing = False
        self.received = bytearray()  # from the host, not read yet
        self.urgent: list[tuple[int, int]] = []  # each urgent byte, and how many of the stream lay before it; -1: on its way
        self.datagrams: deque[tuple[bytes, str]] = deque()
        self.infos: deque[tuple[Any, bytes]] = deque(maxlen=1024)  # of each: struct vso_dgram, VSO_DG_LOCAL's bytes
        self.errors: deque[DatagramError] = deque()
        self.accepted: deque[Flow] = deque()
        self.replies: dict[int, Message] = {}  # by cookie
        # credit: what we can hold and have handed on; what the device told; what we sent
        self.buf_alloc, self.fwd_cnt, self.told = buf_alloc, 0, 0
        self.promised = buf_alloc  # what the device may go by
        self.peer_alloc, self.peer_fwd, self.tx_cnt = 0, 0, 0
        self.listening = False

    def __repr__(self) -> str:
        return f"<Flow {self.id:#x} {self.local} -> {self.peer}>"

    # Sending

    @property
    def credit(self) -> int:
        """Bytes that may be sent now."""
        return max(0, self.peer_alloc - (self.tx_cnt - self.peer_fwd))

    def try_send(self, data: bytes) -> int:
        """Send what credit and the largest payload allow in one message; the bytes that were sent. OSError after RESET."""
        self._alive()
        n = min(len(data), self.credit, self.driver.max_payload)
        if n:
            self.tx_cnt += n
            self._post(lib.VSO_DATA, payload=data[:n])
        return n

    def send(self, data: bytes, timeout: float = TIMEOUT) -> None:
        """Send all of ``data``, waiting for credit. OSError after RESET."""
        view = memoryview(data)
        while view:
            self.driver.wait(lambda: self.credit or self.error, timeout, f"credit on {self!r}")
            view = view[self.try_send(bytes(view[: self.driver.max_payload])) :]

    def send_urgent(self, byte: int) -> None:
        """Send one byte as urgent data, for which there must be credit (with VSO_F_URGENT). OSError after RESET."""
        self._alive()
        self.tx_cnt += 1
        self._post(lib.VSO_URGENT, payload=bytes([byte]))

    def shutdown(self, how: int = lib.VSO_SHUT_SEND) -> None:
        """Say that no more is sent (VSO_SHUT_SEND), or read (VSO_SHUT_RECV)."""
        self._post(lib.VSO_SHUTDOWN, arg=how)

    # Receiving

    def recv(self, limit: int = 1 << 30, timeout: float = TIMEOUT) -> bytes:
        """1..``limit`` bytes, or b"" at the host's EOF. OSError after RESET when all before it was read."""
        self.driver.wait(lambda: self.received or self.eof or self.error, timeout, f"data on {self!r}")
        if self.received:
            data = bytes(self.received[:limit])
            del self.received[:limit]
            self.fwd_cnt += len(data)
            if self.fwd_cnt - self.told >= self.buf_alloc // 2 and not (self.error or self.closing):
                self.tell_credit()
            return data
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return b""

    def recv_exactly(self, size: int, timeout: float = TIMEOUT) -> bytes:
        """``size`` bytes; EOFError if the stream ends before."""
        data = bytearray()
        while len(data) < size:
            part = self.recv(size - len(data), timeout)
            if not part:
                raise EOFError(f"{self!r}: EOF after {len(data)} of {size} bytes")
            data += part
        return bytes(data)

    def recv_all(self, timeout: float = TIMEOUT) -> bytes:
        """All until the host's EOF. OSError if it ends in RESET."""
        return b"".join(iter(lambda: self.recv(timeout=timeout), b""))

    def tell_credit(self) -> None:
        """Send CREDIT with the window as it is."""
        self._post(lib.VSO_CREDIT)

    # Listening

    def listen(self, backlog: int = 16, timeout: float = TIMEOUT) -> None:
        """LISTEN, or a new backlog for a listening flow. Refused."""
        if not self.listening:
            self.buf_alloc = self.fwd_cnt = 0
        self.buf_alloc = backlog
        reply = self._call(lib.VSO_LISTEN, lib.VSO_LISTEN_REPLY, timeout, arg=backlog)
        self.local = self.driver.granted(reply)[0]
        self.listening = True

    def accept(self, timeout: float = TIMEOUT, *, open_window: bool = True) -> Flow:
        """The next connection; opens its window and gives the place in the backlog back."""
        self.driver.wait(lambda: self.accepted or self.error, timeout, f"a connection on {self!r}")
        if not self.accepted:
            raise OSError(self.error, os.strerror(self.error))
        flow = self.accepted.popleft()
        self.fwd_cnt += 1
        self.tell_credit()
        if open_window:
            flow.tell_credit()
        return flow

    # Datagrams

    def sendto(self, data: bytes, uri: str = "", *, local: bytes = b"", **how: int) -> None:
        """One datagram to ``uri`` (the connected peer). ``how``: members of struct vso_dgram; ``local``: for VSO_DG_LOCAL."""
        self._alive()
        self._post(lib.VSO_DGRAM, payload=pack("struct vso_dgram", uri_len=len(uri), **how) + uri.encode() + local + data)

    def ask(self, uri: str, timeout: float = TIMEOUT) -> None:
        """DEST: may this unconnected flow send there? Refused."""
        self.driver.granted(self._call(lib.VSO_DEST, lib.VSO_DEST_REPLY, timeout, payload=uri.encode()))

    def group(self, uri: str, *, join: bool = True, timeout: float = TIMEOUT) -> None:
        """GROUP: join or leave a multicast group. Refused."""
        arg = lib.VSO_GROUP_JOIN if join else lib.VSO_GROUP_LEAVE
        self.driver.granted(self._call(lib.VSO_GROUP, lib.VSO_DEST_REPLY, timeout, arg=arg, payload=uri.encode()))

    def recv_error(self, timeout: float = TIMEOUT) -> DatagramError:
        """The next ERROR: what became of a datagram that was sent."""
        self.driver.wait(lambda: self.errors or self.error, timeout, f"an error on {self!r}")
        return self.errors.popleft()

    def recvfrom(self, timeout: float = TIMEOUT) -> tuple[bytes, str]:
        """The next datagram and its source's URI."""
        self.driver.wait(lambda: self.datagrams or self.error, timeout, f"a datagram on {self!r}")
        if not self.datagrams:
            raise OSError(self.error, os.strerror(self.error))
        return self.datagrams.popleft()

    # Options and the end

    def setsockopt(self, level: int, name: int, value: int | bytes, timeout: float = TIMEOUT) -> None:
        """OSError with the errno of the answer."""
        raw = value if isinstance(value, bytes) else value.to_bytes(4, "little", signed=True)
        self._sockopt(lib.VSO_SETSOCKOPT, level, name, len(raw), raw, timeout)

    def getsockopt(self, level: int, name: int, size: int = 4, timeout: float = TIMEOUT) -> bytes:
        """The value, up to ``size`` bytes. OSError with the errno of the answer."""
        return self._sockopt(lib.VSO_GETSOCKOPT, level, name, size, b"", timeout)

    def _sockopt(self, kind: int, level: int, name: int, size: int, raw: bytes, timeout: float) -> bytes:
        payload = pack("struct vso_sockopt", level=level, name=name, len=size) + raw
        reply = self._call(kind, lib.VSO_SOCKOPT_REPLY, timeout, payload=payload)
        if reply.arg:
            raise OSError(reply.arg, os.strerror(reply.arg))
        head, value = reply.struct("struct vso_sockopt")
        if head.len != len(value):
            raise DeviceFault(f"SOCKOPT_REPLY: {len(value)} bytes of value, announced {head.len}")
        return value

    def close(self, *, abort: bool = False, wait: bool = True, timeout: float = TIMEOUT) -> None:
        """CLOSE, and unless ``wait`` is false wait for CLOSED. Only the first call counts."""
        if not self.closing and not self.closed:
            self.closing = True
            self._post(lib.VSO_CLOSE, arg=lib.VSO_CLOSE_ABORT if abort else 0)
        if wait:
            self.driver.wait(lambda: self.closed, timeout, f"CLOSED for {self!r}")

    # Inside

    def _alive(self) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    def _post(self, kind: int, *, arg: int = 0, cookie: int = 0, payload: bytes = b"") -> None:
        self.told, self.promised = self.fwd_cnt, self.buf_alloc
        self.driver.post(
            kind, self.id, arg=arg, cookie=cookie, payload=payload, pair=self.pair,
            buf_alloc=self.buf_alloc, fwd_cnt=self.fwd_cnt % 2**32,
        )  # fmt: skip

    def _call(self, kind: int, reply: int, timeout: float, *, arg: int = 0, payload: bytes = b"") -> Message:
        cookie = self.driver.new_cookie()
        self._post(kind, arg=arg, cookie=cookie, payload=payload)
        self.driver.wait(lambda: cookie in self.replies or self.error, timeout, f"the answer to {NAMES[kind]} on {self!r}")
        self._alive()
        message = self.replies.pop(cookie)
        if message.type != reply:
            raise DeviceFault(f"{message.name} answers {NAMES[kind]}")
        return message

    def _on_message(self, m: Message) -> None:
        if self.closed:
            raise DeviceFault(f"{m.name} for flow {self.id:#x} after its CLOSED")
        if m.type in WITH_CREDIT:
            self._take_credit(m)
        if m.type == lib.VSO_URGENT:
            if m.payload not in (b"", bytes([m.arg])):
                raise DeviceFault(f"URGENT of {m.arg} with {m.payload!r}")
            self.urgent.append((m.arg, self.fwd_cnt + len(self.received) if m.payload else -1))
        if m.type in (lib.VSO_DATA, lib.VSO_URGENT):
            if self.eof or self.error:
                raise DeviceFault(f"DATA on flow {self.id:#x} after its end")
            self.received += m.payload
            if self.fwd_cnt + len(self.received) - self.told > self.promised:
                raise DeviceFault(f"flow {self.id:#x}: {len(self.received)} bytes waiting, window {self.promised}")
        elif m.type == lib.VSO_SHUTDOWN:
            self.eof = self.eof or bool(m.arg & lib.VSO_SHUT_SEND)
        elif m.type == lib.VSO_RESET:
            if not m.arg:
                raise DeviceFault(f"RESET without an errno on flow {self.id:#x}")
            self.error = m.arg
        elif m.type == lib.VSO_CLOSED:
            if not self.closing:
                raise DeviceFault(f"CLOSED for flow {self.id:#x}, which nobody closed")
            self.closed = True
        elif m.type == lib.VSO_DGRAM:
            head, rest = m.struct("struct vso_dgram")
            start = head.uri_len + (lib.VSO_LOCAL_LEN if head.flags & lib.VSO_DG_LOCAL else 0)
            self.datagrams.append((rest[start:], rest[: head.uri_len].decode("ascii")))
            self.infos.append((head, rest[head.uri_len : start]))
        elif m.type == lib.VSO_ERROR:
            head, rest = m.struct("struct vso_error")
            middle, start = head.uri_len, head.uri_len + head.offender_len
            uri, offender = rest[:middle].decode("ascii"), rest[middle:start].decode("ascii")
            self.errors.append(DatagramError(head, uri, offender, rest[start:]))
        elif m.type == lib.VSO_ACCEPT:
            self._on_accept(m)
        elif m.type != lib.VSO_CREDIT:
            self.replies[m.cookie] = m

    def _take_credit(self, m: Message) -> None:
        """The device's window; it counts modulo 2^32, we do not."""
        if m.type == lib.VSO_SOCKOPT_REPLY and not m.buf_alloc:
            return  # not a connected stream
        ahead = (m.fwd_cnt - self.peer_fwd) % 2**32
        if ahead > self.tx_cnt - self.peer_fwd:
            raise DeviceFault(f"flow {self.id:#x}: the device handed on {ahead} bytes of {self.tx_cnt - self.peer_fwd}")
        self.peer_fwd += ahead
        self.peer_alloc = m.buf_alloc

    def _on_accept(self, m: Message) -> None:
        head, local, peer = m.uris("struct vso_accept")
        if not head.new_flow & lib.VSO_FLOW_DEVICE or head.new_flow in self.driver.flows:
            raise DeviceFault(f"ACCEPT names flow {head.new_flow:#x}")
        flow = Flow(self.driver, head.new_flow, self.pair, self.driver.window)
        flow.local, flow.peer, flow.peer_alloc = local, peer, head.buf_alloc
        flow.promised = lib.VSO_EARLY_MAX if self.driver.agreed & lib.VSO_F_EARLY_DATA else 0
        self.driver.flows[flow.id] = flow
        self.accepted.append(flow)
        if len(self.accepted) > self.buf_alloc:
            raise DeviceFault(f"flow {self.id:#x}: {len(self.accepted)} connections for a backlog of {self.buf_alloc}")
