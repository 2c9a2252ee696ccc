# SPDX-License-Identifier: BSD-3-Clause
"""A recording as text, one line a message: ``vhostsock trace FILE``.

    0.128 == connection 0 (features=0x170000000 pf=0x1a229 queues=1 slots=512)
    0.142 -> SET_VRING_KICK         id=12 flags=0x9(NEED_REPLY) size=8 fds=[anon_inode:[eventfd]] vq=0 nofd=0
    0.142 <- SET_VRING_KICK         size=8 ack 0
    4.332 => CONFIG_CHANGE_MSG      flags=0x1 size=0

``->`` comes from the front-end, ``<-`` is our reply, ``=>`` our message on the back-end channel and ``<=`` the answer to one,
``==`` is no message at all.
What a message carries is shown by its row in proto/messages.py; a payload without a row, or one that does not parse, in
hexadecimal. Whatever a front-end can put into a recording stays on its line: characters that do not print are escaped.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

from construct import Construct, ConstructError

from .proto import ProtocolFeature, Request, VirtioFeature, wire
from .proto.features import names
from .proto.messages import BACKEND_TABLE, TABLE
from .recording import Entry, read_recording

__all__ = ["line_of", "trace"]


def trace(path: str) -> Iterator[str]:
    """The lines of a recording. UsageError when the file is none."""
    return map(line_of, read_recording(path))


def line_of(entry: Entry) -> str:
    """One entry as one line, without its end."""
    text = _TEXTS[entry.kind](entry)
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"{entry.time:8.3f} {'==' if entry.kind == 'connection' else entry.kind} {printable}".rstrip()


def _connection(entry: Entry) -> str:
    offer = entry.offer
    return (
        f"connection {offer['number']} (features={offer['features']:#x} pf={offer['protocol_features']:#x}"
        f" queues={offer['queues']} slots={offer['slots']})"
    )


def _request(entry: Entry) -> str:
    flags = f"{entry.flags:#x}{'(NEED_REPLY)' if entry.flags & wire.Flag.NEED_REPLY else ''}"
    row = TABLE.get(entry.request)
    head = f"{_name(Request, entry.request)} id={entry.request} flags={flags} size={entry.size} fds=[{', '.join(entry.fds)}]"
    return f"{head} {_payload(entry, row.payload if row else None)}"


def _reply(entry: Entry) -> str:
    row = TABLE.get(entry.request)
    own = row.reply if row else None
    if row and row.listening and entry.size != wire.U64.sizeof():  # postcopy: where the memory is here
        own = row.listening
    if own is None and len(entry.payload) == wire.U64.sizeof():
        text = f"ack {wire.U64.parse(entry.payload)}"
    elif own is wire.CONFIG and entry.payload:
        data = entry.payload[wire.HEADER_SIZE :]  # offset, size and flags are those of the request
        text = f"{len(data)} bytes {data.hex()}"
    else:
        text = _payload(entry, own)
        if entry.request == Request.GET_VRING_BASE:
            text = text.replace("num=", "base=")
    return f"{_name(Request, entry.request)} size={entry.size} {text}"


def _channel(entry: Entry) -> str:
    fds = f" fds=[{', '.join(entry.fds)}]" if entry.fds else ""
    name = _name(wire.BackendRequest, entry.request)
    return f"{name} flags={entry.flags:#x} size={entry.size}{fds} {_channel_payload(entry)}"


def _channel_payload(entry: Entry) -> str:
    if entry.kind == "<=":
        return _payload(entry, wire.U64)
    row = BACKEND_TABLE.get(entry.request)  # type: ignore[call-overload]
    return _payload(entry, row.payload if row else None)


_TEXTS: dict[str, Callable[[Entry], str]] = {
    "connection": _connection, "->": _request, "<-": _reply, "=>": _channel, "<=": _channel, "==": lambda entry: entry.text,
}  # fmt: skip


def _name(kind: type[Request] | type[wire.BackendRequest], number: int) -> str:
    name = kind(number).name if number in kind._value2member_map_ else f"REQUEST_{number}"
    return f"{name:<22}"


# ---- payloads


def _payload(entry: Entry, payload: Construct | None) -> str:
    if len(entry.payload) < entry.size:
        return f"{entry.payload.hex()} ({len(entry.payload)} bytes were read)"
    if not entry.payload:
        return ""
    try:
        return _SHOW[payload](entry.request, payload.parse(entry.payload)) if payload else entry.payload.hex()
    except ConstructError:
        return entry.payload.hex()


def _u64(request: int, value: int) -> str:
    kind = _BITS.get(request)
    return f"{value:#x} = {names(kind(value)).replace(' ', '')}" if kind else f"{value:#x}"


def _region(fields: Any) -> str:
    return f"gpa={fields.gpa:#x} size={fields.size:#x} uva={fields.uva:#x} off={fields.offset:#x}"


def _address(_request: int, fields: Any) -> str:
    parts = " ".join(f"{name}={fields[name]:#x}" for name in ("desc", "used", "avail", "log"))
    return f"vq={fields.index} flags={fields.flags} {parts}"


def _config(request: int, fields: Any) -> str:
    data = fields.data.hex() if request == Request.SET_CONFIG else f"{len(fields.data)} bytes"
    return f"offset={fields.offset} size={fields.size} flags={fields.flags} payload={data}"



def _iotlb(_request: int, fields: Any) -> str:
    numbers = " ".join(f"{name}={fields[name]:#x}" for name in ("iova", "size", "uaddr"))
    return f"{_IOTLB_TYPES.get(fields.type, fields.type)} {numbers} perm={fields.perm}"


_IOTLB_TYPES = {kind.value: kind.name for kind in wire.IotlbType}

_BITS: dict[int, type[VirtioFeature] | type[ProtocolFeature]] = {
    Request.GET_FEATURES: VirtioFeature,
    Request.SET_FEATURES: VirtioFeature,
    Request.GET_PROTOCOL_FEATURES: ProtocolFeature,
    Request.SET_PROTOCOL_FEATURES: ProtocolFeature,
}

_SHOW: dict[Construct, Callable[[int, Any], str]] = {
    wire.U64: _u64,
    wire.VRING_STATE: lambda _, fields: f"vq={fields.index} num={fields.num:#x}",
    wire.VRING_FD: lambda _, fields: f"vq={fields['index']} nofd={int(fields['nofd'])}",
    wire.ADDRESS: _address,
    wire.MEM_TABLE: lambda _, fields: f"n={fields.n} " + " ".join(f"[{_region(region)}]" for region in fields.regions),
    wire.MEM_REGION: lambda _, fields: _region(fields.region),
    wire.CONFIG: _config,
    wire.INFLIGHT: lambda _, fields: (
        f"mmap_size={fields.size:#x} off={fields.offset:#x} nq={fields.num_queues} qsz={fields.queue_size}"
    ),
    wire.LOG: lambda _, fields: f"size={fields.size:#x} off={fields.offset:#x}",
    wire.IOTLB: _iotlb,
    wire.TRANSFER: lambda _, fields: f"direction={fields.direction} phase={fields.phase}",
    wire.UUID: lambda _, fields: str(uuid.UUID(bytes=fields.uuid)),
    wire.SHMEM_CONFIG: lambda _, fields: f"n={fields.n} "
    + " ".join(f"{shmid}:{size:#x}" for shmid, size in enumerate(fields.sizes) if size),
    wire.MMAP: lambda _, f: f"shmid={f.shmid} fd_off={f.fd_offset:#x} off={f.shm_offset:#x} len={f.len:#x} flags={f.flags}",
}
