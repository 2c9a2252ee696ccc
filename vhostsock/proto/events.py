# SPDX-License-Identifier: BSD-3-Clause
"""What the session asks its owner to do: one event class per message that the session cannot serve alone.

An event is handed out by ``Session.receive`` and stays the session's current one until it is answered with ``Session.done``
(carried out; for those with a reply, with its value) or ``Session.refuse``. File descriptors in an event are owned by the
session: ``take()`` those that are kept, what is left is closed with the answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any, Self

__all__ = [
    "AddRegion", "Announce", "BackendChannel", "ConfigRead", "ConfigWrite", "DeviceReset", "Event", "FeaturesSet",
    "InflightGet", "InflightSet", "Iotlb", "LogBase", "LogFd", "MemoryTable", "MtuSet", "OwnedFd", "PostcopyAdvise",
    "PostcopyEnd", "PostcopyListen", "Region", "RemoveRegion", "SharedObject", "StateCheck", "StateTransfer", "VringAddress",
    "VringBase", "VringCall", "VringEnable", "VringErr", "VringInbandKick", "VringKick", "VringNum", "VringStop", "WithFd",
]  # fmt: skip


class OwnedFd:
    """A received file descriptor with exactly one owner. Closed at the latest when it is collected."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The number, still owned here; -1 once taken or closed."""
        return self._fd

    def take(self) -> int:
        """Hand the descriptor to the caller, who closes it from now on."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Close it unless it was taken. Idempotent."""
        fd = self.take()
        if fd >= 0:
            # a socket may report a pending error on close; the descriptor is gone all the same
            with contextlib.suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})"


@dataclasses.dataclass(frozen=True, slots=True)
class WithFd:
    """An answer for ``Session.done`` whose reply takes a descriptor along; it is closed when the reply was sent."""

    value: Any
    fd: OwnedFd


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A piece of guest memory. gpa: guest-physical, uva: front-end virtual address; size and offset: bytes of its file."""

    gpa: int
    size: int
    uva: int
    offset: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Base. Fields are named as in the message's payload; ``fd`` is the descriptor that came with it, or None."""

    @classmethod
    def from_wire(cls, payload: Any, fds: list[OwnedFd]) -> Self:
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name == "fd":
                values["fd"] = fds[0] if fds else None
            else:
                values[field.name] = payload if field.name == "value" else payload[field.name]
        return cls(**values)

    def reply(self, value: Any) -> Any:
        """The reply's payload for the value that was given to ``Session.done``."""
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class FeaturesSet(Event):
    """SET_FEATURES: the acked virtio features. Without PROTOCOL_FEATURES among them all rings are enabled."""

    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceReset(Event):
    """RESET_DEVICE: stop and disable all rings, device state to its initial one; memory and the session stay."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryTable(Event):
    """SET_MEM_TABLE: all of guest memory, instead of what was known. As many fds as regions.

    While the session is listening (postcopy): ``done(bases)`` with the address here of each region.
    """

    regions: tuple[Region, ...]
    fds: tuple[OwnedFd, ...]

    @classmethod
    def from_wire(cls, payload: Any, fds: list[OwnedFd]) -> Self:
        return cls(tuple(_region(r) for r in payload["regions"]), tuple(fds))

    def reply(self, value: Any) -> Any:
        if value is None:
            return None
        return {"n": len(self.regions), "regions": [_based(r, base) for r, base in zip(self.regions, value, strict=True)]}


@dataclasses.dataclass(frozen=True, slots=True)
class AddRegion(Event):
    """ADD_MEM_REG. While the session is listening (postcopy): ``done([base])`` with its address here."""

    region: Region
    fd: OwnedFd

    @classmethod
    def from_wire(cls, payload: Any, fds: list[OwnedFd]) -> Self:
        return cls(_region(payload["region"]), fds[0])

    def reply(self, value: Any) -> Any:
        return None if value is None else {"region": _based(self.region, *value)}


@dataclasses.dataclass(frozen=True, slots=True)
class RemoveRegion(Event):
    """REM_MEM_REG"""

    region: Region

    @classmethod
    def from_wire(cls, payload: Any, fds: list[OwnedFd]) -> Self:
        return cls(_region(payload["region"]))


@dataclasses.dataclass(frozen=True, slots=True)
class VringNum(Event):
    """SET_VRING_NUM: the ring's size in descriptors."""

    index: int
    num: int


@dataclasses.dataclass(frozen=True, slots=True)
class VringAddress(Event):
    """SET_VRING_ADDR: where the three parts are: front-end virtual addresses, or IOVAs with ACCESS_PLATFORM.

    flags bit 0: log what is written to the used ring, which is at ``log`` there.
    """

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


@dataclasses.dataclass(frozen=True, slots=True)
class VringBase(Event):
    """SET_VRING_BASE: the next available index to look at."""

    index: int
    num: int


@dataclasses.dataclass(frozen=True, slots=True)
class VringStop(Event):
    """GET_VRING_BASE: finish what is in flight, stop the ring, ``done(base)``. The payload's num is noise (DPDK)."""

    index: int

    def reply(self, value: Any) -> Any:
        return {"index": self.index, "num": value}


@dataclasses.dataclass(frozen=True, slots=True)
class VringEnable(Event):
    """SET_VRING_ENABLE: num is 1 or 0. Tracked also while the ring is stopped."""

    index: int
    num: int


@dataclasses.dataclass(frozen=True, slots=True)
class VringKick(Event):
    """SET_VRING_KICK: start the ring. fd None: the front-end wants it polled."""

    index: int
    fd: OwnedFd | None


@dataclasses.dataclass(frozen=True, slots=True)
class VringCall(Event):
    """SET_VRING_CALL: signal used buffers here from now on. fd None: the driver polls."""

    index: int
    fd: OwnedFd | None


@dataclasses.dataclass(frozen=True, slots=True)
class VringErr(Event):
    """SET_VRING_ERR: signal a broken ring here."""

    index: int
    fd: OwnedFd | None


@dataclasses.dataclass(frozen=True, slots=True)
class BackendChannel(Event):
    """SET_BACKEND_REQ_FD: a stream socket for messages from the back-end."""

    fd: OwnedFd


@dataclasses.dataclass(frozen=True, slots=True)
class InflightGet(Event):
    """GET_INFLIGHT_FD: make memory for what is in flight, ``done(WithFd(size, fd))``. Its size and offset are noise."""

    num_queues: int
    queue_size: int

    def reply(self, value: Any) -> Any:
        return {"size": value, "offset": 0, "num_queues": self.num_queues, "queue_size": self.queue_size}


@dataclasses.dataclass(frozen=True, slots=True)
class InflightSet(Event):
    """SET_INFLIGHT_FD: use this memory, from now on or again after a crash."""

    size: int
    offset: int
    num_queues: int
    queue_size: int
    fd: OwnedFd


@dataclasses.dataclass(frozen=True, slots=True)
class LogBase(Event):
    """SET_LOG_BASE: a dirty log, instead of the one before; ``done(0)``."""

    size: int
    offset: int
    fd: OwnedFd


@dataclasses.dataclass(frozen=True, slots=True)
class LogFd(Event):
    """SET_LOG_FD: signal here when pages were marked in the log."""

    fd: OwnedFd


@dataclasses.dataclass(frozen=True, slots=True)
class ConfigRead(Event):
    """GET_CONFIG: ``done(data)`` with exactly size bytes, or ``refuse`` (an empty reply)."""

    offset: int
    size: int
    flags: int

    def reply(self, value: Any) -> Any:
        return {"offset": self.offset, "size": self.size, "flags": self.flags, "data": value}


@dataclasses.dataclass(frozen=True, slots=True)
class ConfigWrite(Event):
    """SET_CONFIG. QEMU's generic device sends the whole space for a write of one byte. flags bit 0: restored by migration."""

    offset: int
    data: bytes
    flags: int


@dataclasses.dataclass(frozen=True, slots=True)
class VringInbandKick(Event):
    """VRING_KICK, the in-band one: the driver added buffers; a ring that is stopped starts. num is reserved, to be 0."""

    index: int
    num: int


@dataclasses.dataclass(frozen=True, slots=True)
class Announce(Event):
    """SEND_RARP: tell the network where the guest lives now. The first 6 bytes of ``value`` in memory are its MAC address."""

    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class MtuSet(Event):
    """NET_SET_MTU: the MTU in bytes that the guest is told."""

    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class Iotlb(Event):
    """IOTLB_MSG: an update (iova, size, uaddr, perm) or an invalidation (iova, size) of the device IOTLB; wire.IotlbType."""

    iova: int
    size: int
    uaddr: int
    perm: int
    type: int

    def reply(self, value: Any) -> Any:
        return 0


@dataclasses.dataclass(frozen=True, slots=True)
class SharedObject(Event):
    """GET_SHARED_OBJECT: ``done(WithFd(None, fd))`` with the descriptor of what we export as uuid, or ``refuse``."""

    uuid: bytes

    def reply(self, value: Any) -> Any:
        return {"uuid": self.uuid}


@dataclasses.dataclass(frozen=True, slots=True)
class StateTransfer(Event):
    """SET_DEVICE_STATE_FD: save the device's state to fd, or load it from there; wire.TransferDirection. ``done()``: begun."""

    direction: int
    phase: int
    fd: OwnedFd

    def reply(self, value: Any) -> Any:
        return 0x100  # no error; bit 8: no descriptor, we use the front-end's


@dataclasses.dataclass(frozen=True, slots=True)
class StateCheck(Event):
    """CHECK_DEVICE_STATE: ``done()`` when the transfer succeeded, ``refuse`` when it failed."""

    def reply(self, value: Any) -> Any:
        return 0


@dataclasses.dataclass(frozen=True, slots=True)
class PostcopyAdvise(Event):
    """POSTCOPY_ADVISE: a migration may end in postcopy. ``done(WithFd({}, userfaultfd))``."""


@dataclasses.dataclass(frozen=True, slots=True)
class PostcopyListen(Event):
    """POSTCOPY_LISTEN: from here on all guest memory, known and to come, is registered with the userfaultfd."""


@dataclasses.dataclass(frozen=True, slots=True)
class PostcopyEnd(Event):
    """POSTCOPY_END: all memory has arrived; close the userfaultfd."""

    def reply(self, value: Any) -> Any:
        return 0


def _based(region: Region, base: int) -> dict[str, int]:
    return {"gpa": region.gpa, "size": region.size, "uva": base, "offset": region.offset}


def _region(fields: Any) -> Region:
    return Region(gpa=fields["gpa"], size=fields["size"], uva=fields["uva"], offset=fields["offset"])
