"""The driver side of the socket-offload protocol (docs/offload-abi.md), without a guest.

:class:`OffloadDriver` speaks the protocol over the rings it is given; :class:`Flow` is one socket of the pretended guest, with
credit in both directions. Calls block, each at most ``timeout`` seconds, then raise TimeoutError; the device may run in this
process, on another thread, or in another process::

    with GuestMemory(32 << 20) as memory, OffloadDriver.in_memory(memory, pairs=1) as driver:
        ...                                     # hand driver.queues to a front-end, or attach them to an engine
        driver.hello()
        flow = driver.connect("tcp://127.0.0.1:8080")
        flow.send(b"GET / HTTP/1.0\\r\\n\\r\\n")
        flow.shutdown()
        page = flow.recv_all()                  # until the host's EOF; OSError with RESET's errno
        flow.close()                            # waits for CLOSED

An asyncio program calls it in a thread (``asyncio.to_thread``). A driver belongs to one thread at a time. What the device may
not do (credit exceeded, a message for a flow that is not there, ...) raises :class:`DeviceFault`.

Hostile drivers are made with :meth:`OffloadDriver.post`, which sends any header and payload.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from vhostsock._core import ffi, lib
from vhostsock.testing.driver import DeviceFault, DriverQueue
from vhostsock.testing.flow import TIMEOUT, Flow, Message, Refused, pack, pack_open, pack_options
from vhostsock.testing.pairs import RingDriver

__all__ = ["DeviceFault", "Flow", "Message", "OffloadDriver", "Refused", "pack", "pack_open", "pack_options"]

HDR_SIZE: int = ffi.sizeof("struct vso_hdr")


class OffloadDriver(RingDriver):
    """The driver of an offload device with these rings: [to the driver, from it] for each pair, in the order of their indices.

    ``window`` is what each flow may hold in bytes; ``rx_buffers`` chains of ``rx_size`` bytes, in one piece or in pieces of
    these sizes, are kept on every to-driver ring.
    """

    def __init__(
        self, queues: Sequence[DriverQueue], *, window: int = 262144, rx_size: int | Sequence[int] = 65536, rx_buffers: int = 32
    ) -> None:
        if not queues or len(queues) % 2:
            raise ValueError("rings come in pairs")
        super().__init__(queues, rx_layout=[rx_size] if isinstance(rx_size, int) else rx_size, rx_buffers=rx_buffers)
        self.window = window
        self.max_payload: int = lib.VSO_PAYLOAD_MAX
        self.agreed = 0  # features, once HELLO was answered
        self.flows: dict[int, Flow] = {}
        self.stray: deque[Message] = deque()  # PONG, HELLO_REPLY, replies to refused opens
        self.log: deque[Message] | None = None  # set to a deque to keep every message
        self._ids = itertools.count(1)
        self._cookies = itertools.count(1)

    # Moving

    def post(
        self, kind: int, flow: int = 0, *, arg: int = 0, payload: bytes = b"", pair: int = 0, cookie: int = 0,
        buf_alloc: int = 0, fwd_cnt: int = 0, length: int | None = None, cuts: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Send one message. ``length`` overrides hdr.len; the chain is cut into descriptors at the offsets ``cuts``."""
        size = len(payload) if length is None else length
        data = pack(
            "struct vso_hdr", type=kind, flow=flow, len=size, arg=arg, buf_alloc=buf_alloc, fwd_cnt=fwd_cnt, cookie=cookie
        )
        data += payload
        edges = [0, *cuts, len(data)]
        self.post_raw([data[a:b] for a, b in itertools.pairwise(edges)], pair=pair)

    def _on_message(self, pair: int, data: bytes) -> None:
        if len(data) < HDR_SIZE:
            raise DeviceFault(f"a message of {len(data)} bytes")
        h = ffi.from_buffer("struct vso_hdr *", data)
        m = Message(pair, h.type, h.flow, h.arg, h.buf_alloc, h.fwd_cnt, h.cookie, data[HDR_SIZE:])
        if h.len != len(m.payload):
            raise DeviceFault(f"{m.name}: {len(m.payload)} bytes of payload, announced {h.len}")
        if self.log is not None:
            self.log.append(m)
        flow = self.flows.get(m.flow)
        if not m.flow:
            self.stray.append(m)
        elif flow is None:
            raise DeviceFault(f"{m.name} for flow {m.flow:#x}, which is not there")
        elif flow.pair != pair:
            raise DeviceFault(f"{m.name} for flow {m.flow:#x} on pair {pair}")
        else:
            flow._on_message(m)
            if flow.closed:
                del self.flows[flow.id]

    # The protocol

    def new_cookie(self) -> int:
        return next(self._cookies)

    def hello(
        self, epoch: int | None = None, *, features: int = lib.VSO_F_DGRAM, timeout: float = TIMEOUT, **fields: Any
    ) -> Any:
        """HELLO and its answer (``struct vso_hello``). With a new epoch every flow from before is forgotten. OSError."""
        head = dict(
            magic=lib.VSO_MAGIC, abi_major=lib.VSO_ABI_MAJOR, abi_minor=lib.VSO_ABI_MINOR, pairs=len(self.queues) // 2,
            epoch=secrets.randbits(63) if epoch is None else epoch, features=features, max_payload=lib.VSO_PAYLOAD_MAX,
        )  # fmt: skip
        cookie = self.new_cookie()
        self.post(lib.VSO_HELLO, payload=pack("struct vso_hello", **(head | fields)), cookie=cookie)
        reply = self._stray(cookie, timeout, "HELLO_REPLY")
        if reply.arg:
            raise OSError(reply.arg, os.strerror(reply.arg))
        answer, _ = reply.struct("struct vso_hello")
        self.max_payload = min(answer.max_payload, lib.VSO_PAYLOAD_MAX)
        self.agreed = answer.features
        return answer

    def ping(self, timeout: float = TIMEOUT) -> None:
        """PING, and wait for PONG: all messages before it on pair 0 have been taken."""
        cookie = self.new_cookie()
        self.post(lib.VSO_PING, cookie=cookie)
        self._stray(cookie, timeout, "PONG")

    def _stray(self, cookie: int, timeout: float, what: str) -> Message:
        self.wait(lambda: any(m.cookie == cookie for m in self.stray), timeout, what)
        message = next(m for m in self.stray if m.cookie == cookie)
        self.stray.remove(message)
        return message

    @staticmethod
    def granted(reply: Message) -> tuple[str, str]:
        """Local and peer URI of a reply that grants the request. Refused."""
        head, local, peer = reply.uris("struct vso_reply")
        if head.verdict or head.error:
            raise Refused(head.verdict, head.error)
        return local, peer

    def open(self, kind: int, payload: bytes, *, pair: int = 0, flow: Flow | None = None) -> tuple[Flow, int]:
        """Send CONNECT or BIND for a new flow (or that one) without waiting; the flow and the request's cookie."""
        if flow is None:
            flow = Flow(self, next(self._ids), pair, self.window)
            self.flows[flow.id] = flow
        cookie = self.new_cookie()
        flow._post(kind, cookie=cookie, payload=payload)
        return flow, cookie

    def finish(self, flow: Flow, cookie: int, timeout: float = TIMEOUT, *, keep: bool = False) -> Flow:
        """Wait for the answer to open(). Refused, and the flow is gone unless ``keep``; OSError on RESET."""
        self.wait(lambda: cookie in flow.replies or flow.error, timeout, f"the answer for {flow!r}")
        flow._alive()
        try:
            flow.local, flow.peer = self.granted(flow.replies.pop(cookie))
        except Refused:
            if not keep:
                del self.flows[flow.id]
            raise
        return flow

    def connect(
        self, uri: str, local: str = "", options: Iterable[tuple[int, int, bytes]] = (), *, pair: int = 0, flags: int = 0,
        flow: Flow | None = None, timeout: float = TIMEOUT, **fields: Any,
    ) -> Flow:  # fmt: skip
        """A connected flow; ``flow``: one that bind() returned. Refused."""
        payload = pack_open(uri, local, pack_options(options), flags=flags, **fields)
        return self.finish(*self.open(lib.VSO_CONNECT, payload, pair=pair, flow=flow), timeout, keep=flow is not None)

    def bind(
        self, uri: str, options: Iterable[tuple[int, int, bytes]] = (), *, pair: int = 0, timeout: float = TIMEOUT,
        **fields: Any,
    ) -> Flow:  # fmt: skip
        """A bound flow; its ``local`` has the real port. Refused."""
        payload = pack_open(uri, b"", pack_options(options), **fields)
        return self.finish(*self.open(lib.VSO_BIND, payload, pair=pair), timeout)
