"""The offload messages as construct Structs, derived from ``vso_abi.h``.

The header is the one place where a wire number is written. cffi reads its text (``_build_core.py``), and here each
construct Struct is made from ``ffi.typeof(...)``: names, offsets and sizes are the C compiler's, so Python and C cannot drift.
What a header cannot say, which variable parts follow which struct, is the table ``LAYOUTS``.

This is for control messages, traces and tests: construct takes microseconds per struct, and data never comes through Python.
A malformed message raises RequestError; the guest wrote it.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import construct

from .._core import ffi, lib
from ..errors import RequestError, UsageError

__all__ = ["LAYOUTS", "TYPE_NAMES", "Message", "Open", "Option", "pack_options", "parse_open", "parse_options", "struct_of"]

_INTEGERS: Final = {
    "uint8_t": construct.Int8ul, "uint16_t": construct.Int16ul, "uint32_t": construct.Int32ul, "uint64_t": construct.Int64ul,
    "int8_t": construct.Int8sl, "int16_t": construct.Int16sl, "int32_t": construct.Int32sl, "int64_t": construct.Int64sl,
}  # fmt: skip


def struct_of(name: str) -> Any:
    """The construct Struct of a C type such as ``"struct vso_hdr"``: integers, arrays, structs; char arrays become bytes.

    Holes that the compiler leaves become padding, so the sizes agree. UsageError for pointers, unions and bit fields, which
    have no place on a wire.
    """
    return _construct_of(ffi.typeof(name))


def _construct_of(ctype: Any) -> Any:
    if ctype.kind == "primitive" and ctype.cname in _INTEGERS:
        return _INTEGERS[ctype.cname]
    if ctype.kind == "array" and ctype.item.cname == "char":
        return construct.Bytes(ctype.length)
    if ctype.kind == "array" and ctype.length is not None:
        return construct.Array(ctype.length, _construct_of(ctype.item))
    if ctype.kind != "struct":
        raise UsageError(f"{ctype.cname}: a {ctype.kind} has no place on the wire; use fixed-width integers")
    members: list[Any] = []
    position = 0
    for name, member in ctype.fields:
        if member.bitsize != -1:
            raise UsageError(f"{ctype.cname}.{name}: a bit field has no fixed place on the wire")
        if member.offset > position:
            members.append(construct.Padding(member.offset - position))
        members.append(construct.Renamed(_construct_of(member.type), newname=name))
        position = member.offset + ffi.sizeof(member.type)
    if ffi.sizeof(ctype) > position:
        members.append(construct.Padding(ffi.sizeof(ctype) - position))
    return construct.Struct(*members)


TYPE_NAMES: Final[Mapping[int, str]] = {
    number: name.removeprefix("VSO_") for number, name in ffi.typeof("enum vso_type").elements.items()
}
TYPES: Final[Mapping[str, int]] = {name: number for number, name in TYPE_NAMES.items()}
VERDICT_NAMES: Final[Mapping[int, str]] = {
    number: name.removeprefix("VSO_").lower() for number, name in ffi.typeof("enum vso_verdict").elements.items()
}
VERDICTS: Final[Mapping[str, int]] = {name: number for number, name in VERDICT_NAMES.items()}

HEADER: Final = struct_of("struct vso_hdr")
HELLO: Final = struct_of("struct vso_hello")
OPEN: Final = struct_of("struct vso_open")
REPLY: Final = struct_of("struct vso_reply")
ACCEPT: Final = struct_of("struct vso_accept")
SOCKOPT: Final = struct_of("struct vso_sockopt")
DGRAM: Final = struct_of("struct vso_dgram")
ERROR: Final = struct_of("struct vso_error")


class Layout(NamedTuple):
    """The payload of a message type: a struct (None: none), then parts. A part is (name, the struct's member that holds its
    length, or "" for all the rest)."""

    struct: Any = None
    parts: tuple[tuple[str, str], ...] = ()


_URIS: Final = (("local", "local_len"), ("peer", "peer_len"))
_OPEN: Final = (("uri", "uri_len"), ("local", "local_len"), ("opts", "opts_len"), ("name", "name_len"))
_HAIRPIN: Final = (("hairpin", "hairpin_len"),)
LAYOUTS: Final[Mapping[str, Layout]] = {
    "DATA": Layout(None, (("data", ""),)),
    "CREDIT": Layout(),
    "SHUTDOWN": Layout(),
    "DGRAM": Layout(DGRAM, (("uri", "uri_len"), ("data", ""))),
    "PING": Layout(),
    "PONG": Layout(),
    "URGENT": Layout(None, (("data", ""),)),
    "HELLO": Layout(HELLO, _HAIRPIN),
    "CONNECT": Layout(OPEN, _OPEN),
    "BIND": Layout(OPEN, _OPEN),
    "LISTEN": Layout(),
    "CLOSE": Layout(),
    "SETSOCKOPT": Layout(SOCKOPT, (("value", ""),)),
    "GETSOCKOPT": Layout(SOCKOPT),
    "HELLO_REPLY": Layout(HELLO, _HAIRPIN),
    "CONNECT_REPLY": Layout(REPLY, _URIS),
    "BIND_REPLY": Layout(REPLY, _URIS),
    "LISTEN_REPLY": Layout(REPLY, _URIS),
    "ACCEPT": Layout(ACCEPT, _URIS),
    "CLOSED": Layout(),
    "RESET": Layout(),
    "SOCKOPT_REPLY": Layout(SOCKOPT, (("value", ""),)),
    "DEST": Layout(None, (("uri", ""),)),
    "GROUP": Layout(None, (("uri", ""),)),
    "DEST_REPLY": Layout(REPLY, _URIS),
    "HINTS": Layout(None, (("hints", ""),)),
    "ERROR": Layout(ERROR, (("uri", "uri_len"), ("offender", "offender_len"), ("data", ""))),
}


def _members(of: Any) -> Iterator[str]:
    return (member.name for member in of.subcons if member.name)


def _is_reserved(name: str) -> bool:
    return name.startswith("reserved")


@functools.cache
def _plain(of: Any) -> tuple[tuple[str, ...], struct.Struct]:
    """The members of a construct Struct that has neither arrays nor structs in it, and the same as a struct.Struct.

    Every request for a connection is parsed, and construct takes longer for that than the host for connecting.
    """
    codes = [sub.fmtstr[1:] if isinstance(sub, construct.FormatField) else f"{sub.sizeof()}s" for _, sub in _subcons(of)]
    plain = struct.Struct("<" + "".join(codes))
    assert plain.size == of.sizeof()
    return tuple(_members(of)), plain


def _split(layout: Layout, payload: bytes, what: str) -> tuple[dict[str, int | bytes], dict[str, bytes]]:
    fields: dict[str, int | bytes] = {}
    position = 0
    if layout.struct is not None:
        members, plain = _plain(layout.struct)
        position = plain.size
        if len(payload) < position:
            raise RequestError(f"{what}: {len(payload)} bytes of payload, its struct has {position}")
        fields = dict(zip(members, plain.unpack_from(payload), strict=True))
    parts: dict[str, bytes] = {}
    for name, length in layout.parts:
        end = position + int(fields.pop(length)) if length else len(payload)
        if end > len(payload):
            raise RequestError(f"{what}: {name} ends at byte {end} of a payload of {len(payload)}")
        parts[name], position = payload[position:end], end
    if position != len(payload):
        raise RequestError(f"{what}: {len(payload) - position} bytes beyond its last part")
    named = {name: value for name, value in fields.items() if not _is_reserved(name)}
    return {name: value.rstrip(b"\0") if isinstance(value, bytes) else value for name, value in named.items()}, parts


def _join(layout: Layout, fields: Mapping[str, int | bytes], parts: Mapping[str, bytes], what: str) -> bytes:
    unknown = set(parts) - {name for name, _ in layout.parts}
    if unknown:
        raise UsageError(f"{what} has no part {sorted(unknown)}")
    body = b"".join(parts.get(name, b"") for name, _ in layout.parts)
    if layout.struct is None:
        if fields:
            raise UsageError(f"{what} has no struct, so no fields {sorted(fields)}")
        return body
    names = list(_members(layout.struct))
    unknown = set(fields) - set(names)
    if unknown:
        raise UsageError(f"{what} has no field {sorted(unknown)}; it has {names}")
    values: dict[str, Any] = {name: b"" if isinstance(s, construct.Bytes) else 0 for name, s in _subcons(layout.struct)}
    values |= fields
    values |= {length: len(parts.get(name, b"")) for name, length in layout.parts if length}
    for name, sub in _subcons(layout.struct):
        if isinstance(sub, construct.Bytes):
            values[name] = values[name].ljust(sub.length, b"\0")
    return bytes(layout.struct.build(values)) + body


def _subcons(of: Any) -> Iterator[tuple[str, Any]]:
    return ((member.name, member.subcon) for member in of.subcons if member.name)


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``fields`` are its struct's members without lengths and reserved ones, ``parts`` the bytes behind it."""

    type: str  # a name of TYPE_NAMES
    flow: int = 0
    arg: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0
    cookie: int = 0
    fields: Mapping[str, int | bytes] = field(default_factory=dict)
    parts: Mapping[str, bytes] = field(default_factory=dict)

    def pack(self) -> bytes:
        """Header and payload. UsageError for names that the type does not have."""
        if self.type not in LAYOUTS:
            raise UsageError(f"{self.type!r} is no message; the types are {', '.join(LAYOUTS)}")
        payload = _join(LAYOUTS[self.type], self.fields, self.parts, self.type)
        header = HEADER.build(
            {"type": TYPES[self.type], "flags": 0, "flow": self.flow, "len": len(payload), "arg": self.arg, "reserved": 0,
             "buf_alloc": self.buf_alloc, "fwd_cnt": self.fwd_cnt, "cookie": self.cookie}
        )  # fmt: skip
        return bytes(header) + payload

    @classmethod
    def parse(cls, data: bytes) -> Message:
        """The message in ``data``, which holds exactly one. RequestError when it does not."""
        size = HEADER.sizeof()
        if len(data) < size:
            raise RequestError(f"a message of {len(data)} bytes, its header has {size}")
        header = HEADER.parse(data[:size])
        name = TYPE_NAMES.get(header.type)
        if name is None:
            raise RequestError(f"unknown message type {header.type}")
        if header.len != len(data) - size:
            raise RequestError(f"{name}: {len(data) - size} bytes of payload, the header says {header.len}")
        fields, parts = _split(LAYOUTS[name], data[size:], name)
        return cls(name, header.flow, header.arg, header.buf_alloc, header.fwd_cnt, header.cookie, fields, parts)


class Option(NamedTuple):
    """One socket option with its value, as setsockopt() takes it."""

    level: int
    name: int
    value: bytes


def parse_options(data: bytes) -> tuple[Option, ...]:
    """The options of CONNECT and BIND: struct vso_sockopt and value, each value padded to 8 bytes. RequestError."""
    options = []
    members, plain = _plain(SOCKOPT)
    position, size = 0, plain.size
    while position < len(data):
        if len(data) - position < size:
            raise RequestError(f"options: {len(data) - position} bytes left at byte {position}, a header has {size}")
        header = dict(zip(members, plain.unpack_from(data, position), strict=True))
        position += size
        length = header["len"]
        if length > lib.VSO_OPTVAL_MAX or length > len(data) - position:
            raise RequestError(f"options: a value of {length} bytes at byte {position} of {len(data)}")
        options.append(Option(header["level"], header["name"], data[position : position + length]))
        position += (length + 7) & ~7
    return tuple(options)


def pack_options(options: tuple[Option, ...]) -> bytes:
    """The inverse of parse_options()."""
    packed = b""
    for level, name, value in options:
        header = SOCKOPT.build({"level": level, "name": name, "len": len(value), "reserved": 0})
        packed += header + value + bytes(-len(value) % 8)
    return packed


@dataclass(frozen=True, slots=True)
class Open:
    """The payload of CONNECT and BIND, decoded. URIs are still text: the guest wrote them. ``comm`` is printable."""

    uri: str
    local: str
    options: tuple[Option, ...]
    opts: bytes  # the same, as they came
    flags: int
    netns: int
    name: str  # of the namespace, printable, "" if the guest gave none
    uid: int
    pid: int
    comm: str
    sndbuf: int
    rcvbuf: int

    def option(self, level: int, name: int) -> int:
        """An integer option's value, 0 when it was not sent."""
        return next((int.from_bytes(o.value[:4], "little") for o in self.options if (o.level, o.name) == (level, name)), 0)


def _printable(text: bytes) -> str:
    return "".join(c if c.isprintable() else "?" for c in text.decode("ascii", "replace"))


def parse_open(payload: bytes) -> Open:
    """Decode the payload of CONNECT or BIND. RequestError when it is malformed."""
    fields, parts = _split(LAYOUTS["CONNECT"], payload, "open request")
    try:
        uri, local = parts["uri"].decode("ascii"), parts["local"].decode("ascii")
    except UnicodeDecodeError as error:
        raise RequestError(f"open request: a URI is ASCII, byte {error.start} of it is not") from None
    numbers = {name: value for name, value in fields.items() if isinstance(value, int)}
    comm = _printable(bytes(fields["comm"]).partition(b"\0")[0])
    name = _printable(parts["name"])
    return Open(uri, local, parse_options(parts["opts"]), parts["opts"], name=name, comm=comm, **numbers)
