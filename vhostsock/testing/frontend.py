# SPDX-License-Identifier: BSD-3-Clause
"""A front-end in this process: plays QEMU towards a back-end, over one end of a socket pair.

    async with attach(Echo()) as frontend:                     # server, handshake, guest memory, rings: all started
        frontend.queues[0].submit([b"ping"], [16])
        [done] = await frontend.queues[0].wait_async()
        await frontend.pause(); await frontend.resume()        # what QEMU sends for stop and cont

The messages and their order are those of QEMU; a Dialect is the version's way of it, and the tests compare both with recorded
sessions. The rings and the memory are vhostsock.testing.driver's. Every wait is bounded by ``TIMEOUT`` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

from construct import Construct

from ..device import Device
from ..errors import VhostsockError
from ..proto import wire
from ..proto.features import ProtocolFeature, VirtioFeature
from ..proto.messages import TABLE
from ..proto.wire import Request
from ..recording import Tap
from ..server import Server
from .channel import FrontendChannel, receive_exactly
from .dialect import QEMU_7_2, QEMU_11_1, Dialect
from .driver import DriverQueue, GuestMemory, Region
from .iommu import SHIFT, Iommu
from .memory import DirtyPages
from .messages import TIMEOUT, Messages, Refused
from .packed import PackedQueue

__all__ = ["QEMU_7_2", "QEMU_11_1", "BackendGone", "Dialect", "Frontend", "Refused", "attach"]

STATUS_FEATURES_OK = 8


class BackendGone(VhostsockError):
    """The back-end closed the connection where a reply was due."""


class Frontend(Messages):
    """One connection to a back-end. Owns the socket, the guest memory and the queues. messages.py has the rarer messages.

    sent                every message so far as (name, header flags, payload size)
    inflight            (size, fd) of the region that the back-end tracks what is in flight in, if ``track`` and it does
    log                 the dirty log, from ``start_log`` to ``stop_log``
    features            virtio bits that ``start`` acks: what is offered, within ``accept`` (~0 takes packed rings, too)
    offered             virtio bits of the back-end, after ``handshake``
    protocol_features   acked protocol bits, after ``handshake``
    iommu               what is between driver and back-end (iommu.py); None unless asked for
    channel             our end of the back-end channel (channel.py), after ``handshake`` with BACKEND_REQ
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        queues: int = 1,
        size: int = 64,
        memory: Sequence[int] = (1 << 22,),
        dialect: Dialect = QEMU_11_1,
        accept: int = ~(VirtioFeature.RING_PACKED | VirtioFeature.LOG_ALL),
        config: bool = False,
        track: bool = False,
        protocol: int = 0,
        iommu: bool = False,
    ) -> None:
        """config: there is a config space; track: ask for an in-flight region; protocol: bits to ack beyond the dialect's."""
        super().__init__()
        sock.setblocking(False)
        self.sock = sock
        self.dialect = dialect
        self.memory = GuestMemory(*memory)
        self.size = size
        self.sent: list[tuple[str, int, int]] = []
        self.offered = 0
        self.protocol_features = ProtocolFeature(0)
        self.channel: FrontendChannel | None = None
        self.bases = [0] * queues
        self.iommu = Iommu(self) if iommu else None
        self._accept = accept if iommu else accept & ~VirtioFeature.ACCESS_PLATFORM
        self._more_protocol = ProtocolFeature(protocol) | (ProtocolFeature.CONFIG if config else ProtocolFeature(0))
        self._track = track
        self.inflight: tuple[int, int] | None = None
        self.log: DirtyPages | None = None
        self._busy = asyncio.Lock()
        self._status = 0
        self._memory_sent = False
        self.queues: list[DriverQueue] = []
        self.renew_queues()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Go away as a QEMU that is killed does: without a word."""
        self.sock.close()
        for fd in self.reply_fds:
            os.close(fd)
        self.reply_fds = []
        if self.channel:
            self.channel.close()
        for queue in self.queues:
            queue.close()
        self.memory.close()
        self._drop_inflight()
        if self.log:
            self.log.close()

    @property
    def features(self) -> int:
        return self.offered & (self._accept | VirtioFeature.LOG_ALL if self.log else self._accept)

    def renew_queues(self) -> None:
        """Forget the rings and make new ones elsewhere in memory, as a guest that boots again does."""
        for queue in self.queues:
            queue.close()
        features = self.features if self.offered else ~VirtioFeature.RING_PACKED
        kind = PackedQueue if features & VirtioFeature.RING_PACKED else DriverQueue
        self.queues = [
            kind(
                self.memory,
                self.size,
                event_idx=bool(features & VirtioFeature.EVENT_IDX),
                indirect=bool(features & VirtioFeature.INDIRECT_DESC),
                in_order=bool(self.offered and features & VirtioFeature.IN_ORDER),
            )
            for _ in self.bases
        ]
        self.bases = [queue.base for queue in self.queues]

    # ---- messages

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Raw bytes with descriptors: for hostile front-ends."""
        async with asyncio.timeout(TIMEOUT):
            loop = asyncio.get_running_loop()
            while fds:
                try:
                    data = data[socket.send_fds(self.sock, [data], list(fds)) :]
                    break
                except BlockingIOError:
                    writable = asyncio.Event()
                    loop.add_writer(self.sock, writable.set)
                    await writable.wait()
                    loop.remove_writer(self.sock)
            await loop.sock_sendall(self.sock, data)

    async def receive(self, size: int) -> bytes:
        """Exactly ``size`` bytes, with descriptors into ``reply_fds``. BackendGone when the connection ends before."""
        async with asyncio.timeout(TIMEOUT):
            try:
                data, fds = await receive_exactly(self.sock, size)
            except EOFError as error:
                raise BackendGone(str(error)) from None
        self.reply_fds += fds
        return data

    async def ended(self) -> None:
        """Wait until the back-end has closed the connection."""
        with contextlib.suppress(BackendGone):
            while True:
                await self.receive(1)

    async def request(
        self,
        request: Request,
        payload: Construct | None = None,
        value: Any = None,
        *,
        fds: Sequence[int] = (),
        reply: Construct | None = None,
        ack: bool = False,
    ) -> Any:
        """Send one message. reply: wait for it and return its payload. ack: ask for one if REPLY_ACK was acked; Refused."""
        ack = ack and bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        flags = wire.NEED_REPLY_FLAGS if ack else wire.REQUEST_FLAGS
        message = wire.pack(request, flags, payload, value)
        async with self._busy:  # one message and its answer at a time, also when an IOMMU has something to say
            self.sent.append((request.name, int(flags), len(message) - wire.HEADER_SIZE))
            await self.send(message, fds)
            if reply is not None:
                return await self.reply_to(request, reply)
            if ack and await self.reply_to(request, wire.U64):
                raise Refused(request.name)
        return None

    async def reply_to(self, request: Request, payload: Construct) -> Any:
        """Read one reply as strictly as QEMU does: request and flags must be right to the bit."""
        header = wire.HEADER.parse(await self.receive(wire.HEADER_SIZE))
        if (header.request, header.flags) != (request, wire.REPLY_FLAGS):
            raise AssertionError(f"reply to {request.name} has request {header.request}, flags {header.flags:#x}")
        body = await self.receive(header.size)
        if not body and payload is not wire.EMPTY:
            assert TABLE[request].refusal == b"", f"reply to {request.name} is empty"
            raise Refused(request.name)
        value = payload.parse(body)
        if len(payload.build(value)) != len(body):
            raise AssertionError(f"reply to {request.name} has {len(body)} bytes")
        return value

    # ---- what QEMU does

    async def handshake(self) -> None:
        """Realize: negotiate the protocol, give every ring a call and an error fd."""
        await self._negotiate()
        self.renew_queues()
        await self._set_calls_and_errs()

    async def reconnect(self, sock: socket.socket) -> None:
        """The back-end died and another one is there: as QEMU does it, rings, memory and the in-flight region being kept.

        A crashed back-end reported no base. QEMU takes used.idx for a split ring, and for a packed one what it last heard.
        """
        self.sock.close()
        sock.setblocking(False)
        self.sock = sock
        self._memory_sent = False
        await self._negotiate()
        if not self.features & VirtioFeature.RING_PACKED:
            self.bases = [queue.used_idx for queue in self.queues]
        await self._set_calls_and_errs()
        await self.start()

    async def _negotiate(self) -> None:
        self.offered = await self.request(Request.GET_FEATURES, reply=wire.U64)
        if self.offered & VirtioFeature.PROTOCOL_FEATURES:
            offered = await self.request(Request.GET_PROTOCOL_FEATURES, reply=wire.U64)
            acked = ProtocolFeature(offered & (self.dialect.protocol_mask | self._more_protocol))
            await self.request(Request.SET_PROTOCOL_FEATURES, wire.U64, acked)
            self.protocol_features = acked
        if self.protocol_features & ProtocolFeature.MQ:
            await self.request(Request.GET_QUEUE_NUM, reply=wire.U64)
        if self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            await self.request(Request.GET_MAX_MEM_SLOTS, reply=wire.U64)
        if self.protocol_features & ProtocolFeature.BACKEND_REQ:
            await self.open_channel()
        await self.request(Request.SET_OWNER)
        await self.request(Request.GET_FEATURES, reply=wire.U64)

    async def _set_calls_and_errs(self) -> None:
        if self.dialect.inband:
            return
        for index, queue in enumerate(self.queues):
            await self.set_fd(Request.SET_VRING_CALL, index, queue.call_fd)
            await self.set_fd(Request.SET_VRING_ERR, index, queue.err_fd)

    async def open_channel(self, *, room: int | None = None) -> None:
        """SET_BACKEND_REQ_FD with a new socket, in place of what ``channel`` was. room: bytes that may lie in it unread."""
        if self.channel:
            self.channel.close()
        ours, theirs = socket.socketpair()
        if room is not None:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        self.channel = FrontendChannel(ours)
        with theirs:
            await self.request(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()], ack=True)

    async def start(self) -> None:
        """The driver is ready, or the machine goes on: features, memory if it was not sent yet, all rings."""
        if self.dialect.calls_when_stopped:
            await self._set_calls()
        await self.request(Request.SET_FEATURES, wire.U64, self.features)
        if self.protocol_features & ProtocolFeature.STATUS:
            self._status = await self.request(Request.GET_STATUS, reply=wire.U64)
            if not self._status & STATUS_FEATURES_OK:
                await self.request(Request.SET_STATUS, wire.U64, self._status | STATUS_FEATURES_OK)
        if self._track and self.protocol_features & ProtocolFeature.INFLIGHT_SHMFD:
            await self.share_inflight()
        await self.send_memory()
        for index, queue in enumerate(self.queues):
            await self.set_ring(index)
            if self.dialect.inband:
                await self.inband_kick(index)
                continue
            await self.set_fd(Request.SET_VRING_KICK, index, queue.kick_fd)
            if not self.dialect.calls_when_stopped:
                await self.set_fd(Request.SET_VRING_CALL, index, queue.call_fd)
        if self.features & VirtioFeature.PROTOCOL_FEATURES:
            for index in range(len(self.queues)):
                await self.enable(index, True)
        if not self.dialect.inband:
            await self._set_calls()

    async def stop(self) -> None:
        """Disable and stop all rings; ``bases`` holds what the back-end reported."""
        if self.features & VirtioFeature.PROTOCOL_FEATURES:
            for index in range(len(self.queues)):
                await self.enable(index, False)
        for index in range(len(self.queues)):
            state = {"index": index, "num": 0}
            answer = await self.request(Request.GET_VRING_BASE, wire.VRING_STATE, state, reply=wire.VRING_STATE)
            self.bases[index] = answer.num
        if self.dialect.calls_when_stopped:
            await self._set_calls()

    pause, resume = stop, start

    async def reboot(self) -> None:
        """A guest reset, as the generic device shows it: the rings stop and come back new, with no message about it."""
        await self.stop()
        self.renew_queues()
        self._drop_inflight()
        await self.start()

    async def reset_device(self) -> None:
        """RESET_DEVICE, which QEMU sends without asking for an ack; the driver starts from new rings."""
        await self.request(Request.RESET_DEVICE)
        self.renew_queues()
        self._drop_inflight()
        await self.start()

    async def share_inflight(self) -> None:
        """GET_INFLIGHT_FD if there is no region yet, then SET_INFLIGHT_FD."""
        value = {"size": 0, "offset": 0, "num_queues": len(self.queues), "queue_size": self.size}
        if self.inflight is None:
            answer = await self.request(Request.GET_INFLIGHT_FD, wire.INFLIGHT, value, reply=wire.INFLIGHT)
            self.inflight = answer.size, self.reply_fds.pop()
        value["size"] = self.inflight[0]
        await self.request(Request.SET_INFLIGHT_FD, wire.INFLIGHT, value, fds=[self.inflight[1]], ack=True)

    async def start_log(self) -> DirtyPages:
        """A migration begins, while the rings run: SET_LOG_BASE, LOG_ALL, and VRING_F_LOG for each ring. Returns the log."""
        self.log = DirtyPages(self.memory)
        value = {"size": self.log.size, "offset": 0}
        assert not await self.request(Request.SET_LOG_BASE, wire.LOG, value, fds=[self.log.fd], reply=wire.U64)
        await self._set_logging()
        return self.log

    async def stop_log(self) -> None:
        """It ended, or failed. ``log`` is closed."""
        log, self.log = self.log, None
        await self._set_logging()
        if log:
            log.close()

    async def _set_logging(self) -> None:
        await self.request(Request.SET_FEATURES, wire.U64, self.features, ack=True)
        for index in range(len(self.queues)):
            await self.request(Request.SET_VRING_ADDR, wire.ADDRESS, self.address(index), ack=True)

    def _drop_inflight(self) -> None:
        if self.inflight:
            os.close(self.inflight[1])
        self.inflight = None

    async def send_memory(self) -> None:
        """All of guest memory, once: with memory slots a message each, else one table."""
        if self._memory_sent:
            return
        self._memory_sent = True
        regions = self.memory.regions
        if self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            for region in regions:
                await self.add_region(region)
        else:
            table = {"n": len(regions), "regions": [self._wire_region(region) for region in regions]}
            await self.request(Request.SET_MEM_TABLE, wire.MEM_TABLE, table, fds=[r.fd for r in regions], ack=True)

    async def postcopy_listen(self) -> None:
        """POSTCOPY_LISTEN. QEMU asks for an ack whether or not there are acks, and waits for it."""
        async with self._busy:
            await self.send(wire.pack(Request.POSTCOPY_LISTEN, wire.NEED_REPLY_FLAGS))
            if await self.reply_to(Request.POSTCOPY_LISTEN, wire.U64):
                raise Refused("POSTCOPY_LISTEN")

    async def send_memory_late(self) -> dict[int, int]:
        """All of guest memory while the back-end listens, and QEMU's word that it knows where: {base there: region's gpa}."""
        self._memory_sent = True
        regions, bases = self.memory.regions, dict[int, int]()
        if self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            kind = Request.ADD_MEM_REG
            for region in regions:
                value = {"region": self._wire_region(region)}
                answer = await self.request(kind, wire.MEM_REGION, value, fds=[region.fd], reply=wire.MEM_REGION)
                assert answer.region.gpa == value["region"]["gpa"]
                bases[answer.region.uva] = region.gpa
        else:
            kind = Request.SET_MEM_TABLE
            table = {"n": len(regions), "regions": [self._wire_region(region) for region in regions]}
            fds = [region.fd for region in regions]
            answer = await self.request(kind, wire.MEM_TABLE, table, fds=fds, reply=wire.MEM_TABLE)
            bases = {there.uva: region.gpa for there, region in zip(answer.regions, regions, strict=True)}
        await self.send(wire.pack(kind, wire.REQUEST_FLAGS, wire.U64, 0))
        return bases

    async def add_region(self, region: Region) -> None:
        value = {"region": self._wire_region(region)}
        await self.request(Request.ADD_MEM_REG, wire.MEM_REGION, value, fds=[region.fd], ack=True)

    async def remove_region(self, region: Region) -> None:
        await self.request(Request.REM_MEM_REG, wire.MEM_REGION, {"region": self._wire_region(region)}, ack=True)

    def _wire_region(self, region: Region) -> dict[str, int]:
        gpa = region.gpa + SHIFT if self.iommu else region.gpa
        return {"gpa": gpa, "size": region.size, "uva": gpa if self._by_gpa else region.uva, "offset": region.offset}

    @property
    def _by_gpa(self) -> bool:
        return bool(self.protocol_features & ProtocolFeature.GPA_ADDRESSES)

    async def set_ring(self, index: int) -> None:
        """SET_VRING_NUM, BASE and ADDR of a ring."""
        await self.request(Request.SET_VRING_NUM, wire.VRING_STATE, {"index": index, "num": self.queues[index].num})
        await self.request(Request.SET_VRING_BASE, wire.VRING_STATE, {"index": index, "num": self.bases[index]})
        await self.request(Request.SET_VRING_ADDR, wire.ADDRESS, self.address(index))

    def address(self, index: int) -> dict[str, int]:
        """The payload of SET_VRING_ADDR for a ring."""
        queue = self.queues[index]
        desc, avail, used = (queue.desc, queue.avail, queue.used) if self.iommu or self._by_gpa else queue.addresses
        flags, log = (1 if self.log else 0), queue.used
        return {"index": index, "flags": flags, "desc": desc, "used": used, "avail": avail, "log": log}

    async def set_fd(self, request: Request, index: int, fd: int) -> None:
        """SET_VRING_KICK, CALL or ERR; fd -1: without one."""
        value = {"index": index, "nofd": fd < 0}
        await self.request(request, wire.VRING_FD, value, fds=[fd] if fd >= 0 else [], ack=self.dialect.ack_vring_fds)

    async def enable(self, index: int, on: bool) -> None:
        value = {"index": index, "num": int(on)}
        await self.request(Request.SET_VRING_ENABLE, wire.VRING_STATE, value, ack=self.dialect.ack_enable)

    async def read_config(self, offset: int, size: int) -> bytes:
        """GET_CONFIG. Refused when the back-end could not."""
        value = {"offset": offset, "size": size, "flags": 0, "data": bytes(size)}
        answer = await self.request(Request.GET_CONFIG, wire.CONFIG, value, reply=wire.CONFIG)
        return bytes(answer.data)

    async def write_config(self, offset: int, data: bytes, flags: int = 0) -> None:
        value = {"offset": offset, "size": len(data), "flags": flags, "data": data}
        await self.request(Request.SET_CONFIG, wire.CONFIG, value, ack=True)

    async def backend_request(self) -> wire.BackendRequest:
        """The next message on the back-end channel, answered if it wants that. For those without a payload to look at."""
        assert self.channel
        message = await self.channel.receive()
        message.close()
        if message.wants_answer:
            await self.channel.answer(message.request)
        return message.request

    async def settled(self) -> None:
        """Return when the back-end has carried out every message before this one."""
        await self.request(Request.GET_FEATURES, reply=wire.U64)

    async def _set_calls(self) -> None:
        for index, queue in enumerate(self.queues):
            await self.set_fd(Request.SET_VRING_CALL, index, queue.call_fd)


@contextlib.asynccontextmanager
async def attach(
    device: Device, *, negotiated: bool = True, started: bool = True, tap: Tap | None = None, **options: Any
) -> AsyncIterator[Frontend]:
    """Serve ``device`` to a new Frontend (whose options these are) over a socket pair.

    negotiated: it has done its handshake; started: and its start; tap: the server's. On exit the front-end goes first, and the
    server has given everything back when this returns.
    """
    ours, theirs = socket.socketpair()
    options.setdefault("queues", device.num_queues)
    async with contextlib.AsyncExitStack() as stack:
        for sock in (ours, theirs):
            stack.enter_context(sock)
        server = await stack.enter_async_context(Server(device, sock=ours, tap=tap))
        frontend = await stack.enter_async_context(Frontend(theirs, config=device.has_config, **options))
        try:
            if negotiated:
                await frontend.handshake()
                if frontend.iommu:
                    serving = asyncio.create_task(frontend.iommu.serve())
                    stack.callback(serving.cancel)
                if started:
                    await frontend.start()
            yield frontend
            frontend.close()
        except BackendGone:
            await server.serve_forever()  # it is about to log why
            raise
        await server.serve_forever()
