"""Golden vectors: the JSON entry of a message as abi.Message, and as the line that abi_decode.c prints for its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vhostsock._core import ffi, lib
from vhostsock.offload.abi import Message

HERE = Path(__file__).parent
JSON = HERE / "abi-golden.json"
HEX = HERE / "abi-golden.hex"
TEXTS = ("uri", "local", "peer", "name", "hairpin", "offender")


def entries() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads(JSON.read_text())
    return loaded


def hex_lines() -> dict[str, bytes]:
    return {name: bytes.fromhex(digits) for name, _, digits in (line.rpartition(" ") for line in HEX.read_text().splitlines())}


def message_of(entry: dict[str, Any]) -> Message:
    fields = {name: value.encode() if isinstance(value, str) else value for name, value in entry.get("fields", {}).items()}
    parts = {name: text.encode() if name in TEXTS else bytes.fromhex(text) for name, text in entry.get("parts", {}).items()}
    numbers = {key: value for key, value in entry.items() if isinstance(value, int)}
    return Message(entry["type"], fields=fields, parts=parts, **numbers)


STRUCTS = {
    "HELLO": "vso_hello", "HELLO_REPLY": "vso_hello", "CONNECT": "vso_open", "BIND": "vso_open", "ACCEPT": "vso_accept",
    "CONNECT_REPLY": "vso_reply", "BIND_REPLY": "vso_reply", "LISTEN_REPLY": "vso_reply", "DGRAM": "vso_dgram",
    "SETSOCKOPT": "vso_sockopt", "GETSOCKOPT": "vso_sockopt", "SOCKOPT_REPLY": "vso_sockopt",
    "DEST_REPLY": "vso_reply", "ERROR": "vso_error",
}  # fmt: skip
PARTS = {
    "vso_hello": ("hairpin",), "vso_open": ("uri", "local", "opts", "name"),
    "vso_reply": ("local", "peer"), "vso_accept": ("local", "peer"),
    "vso_dgram": ("uri", "data"), "vso_sockopt": ("value",),
    "vso_error": ("uri", "offender", "data"),
}  # fmt: skip


def line_of(entry: dict[str, Any]) -> str:
    """What abi_decode.c must print, from the JSON alone: construct has no part in it."""
    kind = entry["type"]
    struct = STRUCTS.get(kind)
    bare = {"DATA": ("data",), "URGENT": ("data",), "DEST": ("uri",), "GROUP": ("uri",), "HINTS": ("hints",)}
    names = PARTS.get(struct or "", bare.get(kind, ())) if kind != "GETSOCKOPT" else ()
    given: dict[str, str] = entry.get("parts", {})
    parts = {n: given.get(n, "").encode().hex() if n in TEXTS else given.get(n, "") for n in names}
    sizes = {n: len(text) // 2 for n, text in parts.items()}
    payload = sum(sizes.values()) + (ffi.sizeof(f"struct {struct}") if struct else 0)
    header = dict.fromkeys(("type", "flags", "flow", "len", "arg", "buf_alloc", "fwd_cnt", "cookie", "reserved"), 0)
    header |= {"type": getattr(lib, f"VSO_{kind}"), "len": payload}
    header |= {key: value for key, value in entry.items() if key in header and key != "type"}
    words = [f"{key}={value}" for key, value in header.items()]
    for member, _ in ffi.typeof(f"struct {struct}").fields if struct else ():
        value: Any = entry.get("fields", {}).get(member, 0)
        if member.endswith("_len"):
            value = sizes[member.removesuffix("_len")]
        if member == "comm":
            value = (value or "").encode().ljust(lib.VSO_COMM_LEN, b"\0").hex()
        words.append(f"{member}={value}")
    return " ".join(words + [f"{name}={text}" for name, text in parts.items()])
