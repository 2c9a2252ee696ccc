# SPDX-License-Identifier: BSD-3-Clause
"""The back-end's half of a vhost-user session, without any I/O.

Bytes and file descriptors go in, events and replies come out. The session knows the wire, what is offered and acked, which
phase it is in and the device status; it knows nothing of rings, memory or sockets. Its owner carries the events out.

    session.wanted                      bytes of the next read: never more, so that descriptors are attributed to their message
    session.receive(data, fds)          an Event to carry out, or None: read on
    session.done(value) / .refuse(why)  the answer to that event
    session.take_output()               bytes to send, and
    session.take_output_fds()           the descriptors that go with the first of them
    session.close()                     closes every descriptor that nobody took

One message at a time: an event is answered before the next byte goes in. That keeps replies in order and gives each message a
world in which all earlier ones have had their effect, which is what a front-end that asks for no acks relies on.

Whose fault. ``receive`` raises FrontendError when the protocol is broken (unknown request, bad size, wrong descriptors, a ring
that does not exist, bits that were not offered, a message out of phase); the session is closed then. ``refuse`` is for a
well-formed message that cannot be carried out: where the front-end asked for an ack it learns so and the session goes on,
where it did not ask nobody would know, and the session must end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from construct import Construct, ConstructError, Container, SizeofError

from ..errors import FrontendError, UsageError
from . import events, wire
from .features import NEVER_OFFERED, REQUIRES, ProtocolFeature, VirtioFeature, names
from .messages import TABLE, Phase, Row
from .wire import Flag, Request

__all__ = ["Session", "SessionConfig"]


@dataclasses.dataclass(frozen=True, slots=True)
class SessionConfig:
    """What the back-end offers. Raises UsageError for what must not be offered.

    features: virtio bits; protocol_features: protocol bits; num_queues: 1..256 (a ring index has 8 bits in SET_VRING_KICK);
    max_mem_slots: regions that the memory map holds (VS_MAX_REGIONS); shmem: sizes of the virtio shared memory regions, the
    place being the id (GET_SHMEM_CONFIG).
    """

    features: int
    protocol_features: int
    num_queues: int
    max_mem_slots: int = 512
    shmem: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("features", "protocol_features"):
            # the inverse of an IntFlag has only the bits that are named: not what a check for unknown bits wants
            object.__setattr__(self, name, int(getattr(self, name)))
        bad = ProtocolFeature(self.protocol_features) & NEVER_OFFERED
        if bad:
            raise UsageError(f"protocol features {names(bad)} must not be offered: QEMU acks them without implementing them")
        if not 1 <= self.num_queues <= 256:
            raise UsageError(f"a device has 1 to 256 queues, not {self.num_queues}")


class Session:
    """See the module text. Attributes are for reading:

    features            acked virtio bits, 0 before SET_FEATURES and after RESET_DEVICE
    protocol_features   acked protocol bits
    status              the device status as last set (virtio 1.3, 2.1); stored for the front-end only
    started             indices of the rings between SET_VRING_KICK and GET_VRING_BASE
    listening           between POSTCOPY_LISTEN and POSTCOPY_END
    """

    def __init__(self, config: SessionConfig) -> None:
        self.config = config
        self.features = VirtioFeature(0)
        self.protocol_features = ProtocolFeature(0)
        self.status = 0
        self.started: set[int] = set()
        self.listening = False
        self.closed = False
        self._negotiated = False
        self._bases_sent = False  # and not yet confirmed
        self._buffer = bytearray()
        self._fds: list[events.OwnedFd] = []
        self._header: Container[Any] | None = None
        self._current: tuple[Row, events.Event] | None = None
        self._output = bytearray()
        self._output_fds: list[events.OwnedFd] = []

    @property
    def phase(self) -> Phase:
        if self.started:
            return Phase.RUNNING
        return Phase.IDLE if self._negotiated else Phase.NEGOTIATING

    @property
    def wanted(self) -> int:
        """How many bytes the message under way still lacks: of its header, then of its payload."""
        return (wire.HEADER_SIZE if self._header is None else self._header.size) - len(self._buffer)

    # ---- input

    def receive(self, data: bytes, fds: Sequence[int] = (), *, truncated: bool = False) -> events.Event | None:
        """Take up to ``wanted`` bytes and the descriptors that came with them; they are the session's from here on.

        truncated: the kernel dropped descriptors (MSG_CTRUNC). Empty data is the end of the stream. Returns the event to
        carry out, or None. Raises FrontendError, and then the session is closed.
        """
        self._fds += [events.OwnedFd(fd) for fd in fds]
        if self.closed or self._current is not None or len(data) > max(self.wanted, 0):
            raise UsageError("the session is closed, waits for an answer, or was given more than it wanted")
        try:
            return self._receive(data, truncated)
        except FrontendError:
            self.close()
            raise

    def _receive(self, data: bytes, truncated: bool) -> events.Event | None:
        if truncated:
            raise FrontendError(
                f"{self._where()}: descriptors were lost (MSG_CTRUNC): more than {wire.MAX_FDS}, or this process is out of them"
            )
        if len(self._fds) > wire.MAX_FDS:
            raise FrontendError(f"{self._where()}: more than {wire.MAX_FDS} file descriptors")
        if not data:
            if self._buffer or self._header is not None:
                raise FrontendError(f"{self._where()}: the connection ended inside the message, {self.wanted} bytes early")
            return None
        self._buffer += data
        if self._header is None and not self.wanted:
            header = wire.HEADER.parse(bytes(self._buffer))
            self._buffer.clear()
            self._header = header
            self._check_header(header)
        if self._header is None or self.wanted:
            return None
        return self._dispatch(self._header, bytes(self._buffer))

    def _where(self) -> str:
        return _name(self._header.request) if self._header is not None else "message header"

    def _check_header(self, header: Container[Any]) -> None:
        """All that can be said before the payload is read, so that nothing is buffered for a message that is refused."""
        name, row = self._where(), TABLE.get(header.request)
        if header.flags & Flag.VERSION_MASK != Flag.VERSION or header.flags & Flag.REPLY:
            raise FrontendError(f"{name}: flags {header.flags:#x}: this is not a version 1 request")
        if row is None:
            raise FrontendError(f"{name}: not served by this back-end")
        if row.needs & ~self.protocol_features:
            raise FrontendError(f"{name}: protocol feature {names(row.needs)} was not negotiated")
        if row.driver & ~self.config.features:
            raise FrontendError(f"{name}: {names(row.driver)} was not offered")
        if not row.phases & self.phase:
            raise FrontendError(f"{name}: not allowed {_PHASE_TEXT[self.phase]}")
        fixed = wire.U64.sizeof() if self._confirms_bases(row, header.size) else _fixed_size(row.payload)
        if header.size > wire.MAX_PAYLOAD or (fixed is not None and header.size != fixed):
            raise FrontendError(f"{name}: {header.size} bytes of payload, must be {fixed if fixed is not None else 'less'}")

    def _dispatch(self, header: Container[Any], body: bytes) -> events.Event | None:
        row = TABLE[header.request]
        if self._confirms_bases(row, header.size):
            if any(body) or self._fds:
                raise FrontendError(f"{row.request.name}: the front-end has no use for the bases of memory that it was sent")
            self._bases_sent = False
            self._next()
            return None
        payload = self._parse(row, body)
        least, most = row.fds(payload)
        if not least <= len(self._fds) <= most:
            raise FrontendError(f"{row.request.name}: {len(self._fds)} file descriptors came with it, must be {most}")
        if row.ring and payload["index"] >= self.config.num_queues:
            raise FrontendError(f"{row.request.name}: ring {payload['index']}, but there are {self.config.num_queues}")
        check = _CHECKS.get(row.request)
        if check:
            check(self, payload)
        if row.event is None:
            self._finish(row, _LOCAL[row.request](self, payload))
            return None
        event = row.event.from_wire(payload, self._fds)
        self._current = row, event
        return event

    def _confirms_bases(self, row: Row, size: int) -> bool:
        """QEMU sends the last message of its memory again with 8 zero bytes, without an ack, when it knows where we see it."""
        return self._bases_sent and row.listening is not None and size == wire.U64.sizeof()

    def _parse(self, row: Row, body: bytes) -> Any:
        if row.payload is None:
            return None
        try:
            payload = row.payload.parse(body)
            used = len(row.payload.build(payload))
        except ConstructError:
            raise FrontendError(f"{row.request.name}: {len(body)} bytes are too few for what they announce") from None
        if used != len(body) and not row.trailing:
            raise FrontendError(f"{row.request.name}: {len(body)} bytes of payload, must be {used}")
        return payload

    # ---- answers

    def done(self, value: Any = None) -> None:
        """The current event is carried out. value: what its reply carries (the base for VringStop, bytes for ConfigRead)."""
        row, event = self._take_current()
        effect = _EFFECTS.get(type(event))
        if effect:
            effect(self, event)
        if isinstance(value, events.WithFd):
            self._output_fds = [value.fd]
            value = value.value
        self._finish(row, event.reply(value))

    def refuse(self, reason: str, *, fatal: bool = True) -> None:
        """The current event cannot be carried out. Raises FrontendError(reason) when the front-end cannot be told.

        The reason is for the error; on the wire there is only a non-zero ack, or the empty reply of GET_CONFIG. fatal False:
        it is no fault of the front-end (a driver writes to a config space that has nothing to write), so go on untold.
        """
        row, _ = self._take_current()
        if row.refusal is not None:
            self._reply(row.request, wire.RAW, row.refusal)
            self._next()
        elif row.reply is None and not self._own_reply(row) and (self._wants_ack(row) or not fatal):
            self._finish(row, 1)
        else:
            self.close()
            raise FrontendError(f"{row.request.name}: {reason}")

    def take_output(self) -> bytes:
        """What is to be sent now, in order."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def take_output_fds(self) -> list[events.OwnedFd]:
        """The descriptors that go with the first byte of what ``take_output`` gave; to be closed when that was sent."""
        fds, self._output_fds = self._output_fds, []
        return fds

    def close(self) -> None:
        """End the session: close every descriptor that was not taken. Idempotent."""
        self.closed = True
        self._current = None
        for fd in self._fds + self._output_fds:
            fd.close()
        self._fds.clear()
        self._output_fds.clear()

    def _take_current(self) -> tuple[Row, events.Event]:
        if self._current is None:
            raise UsageError("no event waits for an answer")
        current, self._current = self._current, None
        return current

    def _wants_ack(self, row: Row) -> bool:
        assert self._header is not None
        acks = row.forced or self.protocol_features & ProtocolFeature.REPLY_ACK
        return bool(self._header.flags & Flag.NEED_REPLY and acks)

    def _own_reply(self, row: Row) -> Construct | None:
        return row.listening if self.listening and row.listening is not None else row.reply

    def _finish(self, row: Row, value: Any) -> None:
        reply = self._own_reply(row)
        if reply is not None:
            self._bases_sent |= reply is row.listening
            self._reply(row.request, reply, value)
        elif self._wants_ack(row):  # need_reply without REPLY_ACK means nothing; some front-ends set it early
            self._reply(row.request, wire.U64, value or 0)
        self._next()

    def _reply(self, request: Request, payload: Construct | None, value: Any) -> None:
        self._output += wire.pack(request, wire.REPLY_FLAGS, payload, value)

    def _next(self) -> None:
        for fd in self._fds:
            fd.close()
        self._fds.clear()
        self._buffer.clear()
        self._header = None

    # ---- what the session serves alone, checks, and keeps

    def _check_features(self, value: int) -> None:
        unknown = value & ~self.config.features
        if unknown:
            raise FrontendError(f"SET_FEATURES: {names(VirtioFeature(unknown))} was not offered")
        changed = (value ^ self.features) & ~int(VirtioFeature.LOG_ALL)
        if changed and self.phase is Phase.RUNNING:
            raise FrontendError(f"SET_FEATURES: changes {names(VirtioFeature(changed))} while rings are started")

    def _set_protocol_features(self, value: int) -> None:
        unknown = value & ~self.config.protocol_features
        if unknown:
            raise FrontendError(f"SET_PROTOCOL_FEATURES: {names(ProtocolFeature(unknown))} was not offered")
        for bit, wanted in REQUIRES.items():
            if value & bit and wanted & ~value:
                raise FrontendError(f"SET_PROTOCOL_FEATURES: {names(bit)} without {names(wanted & ~ProtocolFeature(value))}")
        self.protocol_features = ProtocolFeature(value)

    def _check_reserved(self, payload: Any) -> None:
        if payload["num"]:
            raise FrontendError(f"VRING_KICK: ring {payload['index']}: num is {payload['num']}, must be 0")

    def _check_regions(self, payload: Any) -> None:
        """With GPA_ADDRESSES every address is a guest-physical one, and the regions say so; then all else works as without."""
        if not self.protocol_features & ProtocolFeature.GPA_ADDRESSES:
            return
        for region in payload["regions"] if "regions" in payload else [payload["region"]]:
            if region["uva"] != region["gpa"]:
                gpa, uva = region["gpa"], region["uva"]
                raise FrontendError(f"memory region at gpa {gpa:#x} has user address {uva:#x}: with GPA_ADDRESSES both are one")

    def _shmem_config(self) -> dict[str, Any]:
        sizes = self.config.shmem
        return {"n": sum(size > 0 for size in sizes), "sizes": [*sizes, *[0] * (wire.SHMEM_REGIONS - len(sizes))]}

    def _listen(self, _event: events.PostcopyListen) -> None:
        self.listening = True

    def _end(self, _event: events.PostcopyEnd) -> None:
        self.listening = self._bases_sent = False

    def _check_config(self, payload: Any) -> None:
        if payload["size"] > wire.CONFIG_MAX or payload["offset"] > wire.CONFIG_MAX - payload["size"]:
            raise FrontendError(
                f"config space has {wire.CONFIG_MAX} bytes: offset {payload['offset']}, size {payload['size']} is outside"
            )

    def _set_status(self, value: int) -> None:
        if value > 0xFF:
            raise FrontendError(f"SET_STATUS: {value:#x}: a device status has 8 bits")
        self.status = value

    def _features_set(self, event: events.FeaturesSet) -> None:
        self.features = VirtioFeature(event.value)
        self._negotiated = True

    def _device_reset(self, _event: events.DeviceReset) -> None:
        self.features = VirtioFeature(0)
        self.status = 0
        self.started.clear()
        self._negotiated = False


_LOCAL: dict[Request, Callable[[Session, Any], Any]] = {
    Request.GET_FEATURES: lambda session, _: session.config.features,
    Request.SET_OWNER: lambda session, _: None,
    Request.RESET_OWNER: lambda session, _: None,
    Request.GET_PROTOCOL_FEATURES: lambda session, _: session.config.protocol_features,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.GET_QUEUE_NUM: lambda session, _: session.config.num_queues,
    Request.SET_STATUS: Session._set_status,
    Request.GET_STATUS: lambda session, _: session.status,
    Request.GET_MAX_MEM_SLOTS: lambda session, _: session.config.max_mem_slots,
    Request.GET_SHMEM_CONFIG: lambda session, _: session._shmem_config(),
}

_CHECKS: dict[Request, Callable[[Session, Any], None]] = {
    Request.SET_FEATURES: Session._check_features,
    Request.GET_CONFIG: Session._check_config,
    Request.SET_CONFIG: Session._check_config,
    Request.VRING_KICK: Session._check_reserved,
    Request.SET_MEM_TABLE: Session._check_regions,
    Request.ADD_MEM_REG: Session._check_regions,
    Request.REM_MEM_REG: Session._check_regions,
}

_EFFECTS: dict[type[events.Event], Callable[[Session, Any], None]] = {
    events.FeaturesSet: Session._features_set,
    events.DeviceReset: Session._device_reset,
    events.VringKick: lambda session, event: session.started.add(event.index),
    events.VringInbandKick: lambda session, event: session.started.add(event.index),
    events.PostcopyListen: Session._listen,
    events.PostcopyEnd: Session._end,
    events.VringStop: lambda session, event: session.started.discard(event.index),
}

_PHASE_TEXT = {
    Phase.NEGOTIATING: "before SET_FEATURES",
    Phase.IDLE: "while no ring is started",
    Phase.RUNNING: "while rings are started",
}


def _name(request: int) -> str:
    return Request(request).name if request in Request._value2member_map_ else f"request {request}"


def _fixed_size(payload: Construct | None) -> int | None:
    """The size of a payload that has only one, None for one that depends on its content."""
    if payload is None:
        return 0
    try:
        return int(payload.sizeof())
    except SizeofError:
        return None
