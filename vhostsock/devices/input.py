# SPDX-License-Identifier: BSD-3-Clause
"""A keyboard, mouse or tablet (virtio 1.3, 5.8) that types and moves as this host says.

Queue 0 takes the driver's buffers, one for each event to it; queue 1 brings events of the guest (a lamp of the keyboard).

The config space answers questions: the driver writes ``select`` and ``subsel`` and reads ``size`` and the answer behind them
(5.8.5). QEMU forwards each write as one of the whole space, with whatever it read there before in the other bytes; so of a
write, only these two bytes count, and what else is in it does not.

Events make a *report*, which ends with SYN_REPORT and counts as one in the guest. Those that find no buffer wait, at most
`PENDING_MAX` of them; beyond that whole reports are dropped. While no driver is there, nothing waits: what was typed then is no
news to the next.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ..device import Device, Queue
from ..errors import DriverError, UsageError
from ..ring import Chain
from .input_codes import CODES, EventType

__all__ = ["PENDING_MAX", "PROFILES", "AbsInfo", "Event", "Input", "Profile"]

log = logging.getLogger("vhostsock.input")

PENDING_MAX = 1024  # events that wait for buffers: a second of the fastest mouse, or a page of typed text

_EVENT = struct.Struct("<HHi")  # type, code, value
_ABS_INFO = struct.Struct("<5i")
_DEVICE_IDS = struct.Struct("<4H")  # bustype, vendor, product, version
BUS_VIRTUAL = 6

CONFIG_SIZE = 136  # select, subsel, size, 5 reserved, 128 of answer (5.8.4)
ANSWER_AT, ANSWER_MAX = 8, 128
ID_NAME, ID_SERIAL, ID_DEVIDS, PROP_BITS, EV_BITS, ABS_INFO = 0x01, 0x02, 0x03, 0x10, 0x11, 0x12

EVENTS, STATUS = 0, 1  # the queues


class Event(NamedTuple):
    """type and code: numbers of input_codes.py; value: of 32 bits, signed. Of a key: 1 pressed, 0 released."""

    type: int
    code: int
    value: int


class AbsInfo(NamedTuple):
    """The range of an axis."""

    min: int
    max: int
    fuzz: int = 0
    flat: int = 0
    res: int = 0


class Profile(NamedTuple):
    """What a kind of device can say. codes: of each event type; axes: the ranges of its EV_ABS codes."""

    name: str
    product: int
    codes: Mapping[int, Iterable[int]]
    axes: Mapping[int, AbsInfo] = {}


_KEYS = CODES[EventType.EV_KEY]
_BUTTONS = [code for name, code in _KEYS.items() if name.startswith("BTN_")]
_WHEEL = CODES[EventType.EV_REL]["REL_WHEEL"]
_AXIS = AbsInfo(0, 0x7FFF)

PROFILES = {
    "keyboard": Profile("vhostsock keyboard", 1, {
        EventType.EV_KEY: [code for name, code in _KEYS.items() if name.startswith("KEY_")],
        EventType.EV_LED: CODES[EventType.EV_LED].values(),
    }),
    "mouse": Profile("vhostsock mouse", 2, {EventType.EV_KEY: _BUTTONS, EventType.EV_REL: CODES[EventType.EV_REL].values()}),
    "tablet": Profile("vhostsock tablet", 3, {
        EventType.EV_KEY: _BUTTONS, EventType.EV_REL: [_WHEEL], EventType.EV_ABS: CODES[EventType.EV_ABS].values(),
    }, dict.fromkeys(CODES[EventType.EV_ABS].values(), _AXIS)),
}  # fmt: skip


class Input(Device):
    """Serves ``-device vhost-user-input-pci``, and the generic carrier with virtio id 18.

    name      what the guest shows, at most 128 bytes of UTF-8; serial: likewise, may be empty
    on_event  called with each event that comes from the guest
    """

    virtio_id = 18
    num_queues = 2
    packed = True
    in_order = True

    def __init__(
        self,
        profile: Profile = PROFILES["keyboard"],
        *,
        name: str | None = None,
        serial: str = "",
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.on_event = on_event
        self.counters = dict.fromkeys(("to_guest", "dropped", "from_guest"), 0)
        self._profile = profile
        self._answers = _answers(profile, name if name is not None else profile.name, serial)
        self._question = bytearray(2)  # select, subsel
        self._report: list[Event] = []  # not finished yet
        self._pending: deque[Event] = deque()
        self._buffers: deque[Chain] = deque()  # at most the ring's size
        self._queue: Queue | None = None  # the event queue, while it runs

    # ---- events

    def inject(self, events: Iterable[Event]) -> bool:
        """Send the guest events; those behind the last SYN_REPORT wait for theirs. False: a report was dropped.

        UsageError: an event that this device has not said it would send. Its report is forgotten.
        """
        taken = True
        for event in events:
            if event.type == EventType.EV_SYN:
                report, self._report = [*self._report, event], []
                taken &= self._send(report)
            elif event.code not in self._profile.codes.get(event.type, ()) or not -(1 << 31) <= event.value < 1 << 31:
                self._report = []
                raise UsageError(f"{event}: a {self._profile.name} cannot send this")
            elif len(self._report) < PENDING_MAX:
                self._report.append(event)
        return taken

    def _send(self, report: list[Event]) -> bool:
        if self._queue is None or len(self._pending) + len(report) > PENDING_MAX:
            self.counters["dropped"] += len(report)
            return False
        self._pending.extend(report)
        self._deliver()
        return True

    def _deliver(self) -> None:
        while self._pending and self._buffers:
            chain = self._buffers.popleft()
            chain.write(_EVENT.pack(*self._pending.popleft()))
            chain.complete()
            self.counters["to_guest"] += 1
        if self._queue:
            self._queue.flush()

    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
        for chain in chains:
            size, what = (chain.writable, "a buffer") if queue.index == EVENTS else (chain.readable, "an event")
            if size < _EVENT.size:
                raise DriverError(f"{what} of {size} bytes, an event has {_EVENT.size}", vring=queue.index)
        if queue.index == EVENTS:
            self._buffers.extend(chains)
            self._deliver()
            return
        for chain in chains:
            event = Event(*_EVENT.unpack(chain.read(_EVENT.size)))
            chain.complete()
            self.counters["from_guest"] += 1
            self.on_event(event)

    # ---- config space

    def read_config(self, offset: int, size: int) -> bytes:
        answer = self._answers.get((self._question[0], self._question[1]), b"")
        config = (bytes(self._question) + bytes([len(answer)])).ljust(ANSWER_AT, b"\0") + answer
        return config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        part = data[: max(0, len(self._question) - offset)]
        self._question[offset : offset + len(part)] = part

    # ---- life

    def reset(self) -> None:
        self._question = bytearray(2)
        self._pending.clear()

    async def disconnected(self) -> None:
        self.reset()

    def report(self) -> None:
        log.info("stats name=input %s", " ".join(f"{key}={value}" for key, value in self.counters.items()))

    def queue_started(self, queue: Queue) -> None:
        if queue.index == EVENTS:
            self._queue = queue
        super().queue_started(queue)

    def queue_stopped(self, queue: Queue) -> None:
        super().queue_stopped(queue)
        if queue.index == EVENTS:
            self._queue = None
            self._buffers.clear()  # they come again when the queue goes on


def _answers(profile: Profile, name: str, serial: str) -> dict[tuple[int, int], bytes]:
    """What the config space says to (select, subsel); to all else, nothing. UsageError: a text that is too long."""
    answers = {(ID_DEVIDS, 0): _DEVICE_IDS.pack(BUS_VIRTUAL, 0, profile.product, 1)}
    for select, text in ((ID_NAME, name), (ID_SERIAL, serial)):
        answers[select, 0] = text.encode()
        if len(answers[select, 0]) > ANSWER_MAX:
            raise UsageError(f"{text!r} has {len(answers[select, 0])} bytes; {ANSWER_MAX} is all that an input device can say")
    for kind, codes in profile.codes.items():
        bits = sum(1 << code for code in codes)
        answers[EV_BITS, int(kind)] = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    for axis, info in profile.axes.items():
        answers[ABS_INFO, axis] = _ABS_INFO.pack(*info)
    return answers
