"""The wire: Python, construct and the C compiler read the same bytes in the same way."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cffi import FFI
from hypothesis import given
from hypothesis import strategies as st

from vhostsock._core import ffi, lib
from vhostsock.errors import RequestError, UsageError
from vhostsock.offload import abi

from ..data import abi_golden as golden

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"
NAMES = list(golden.entries())


def test_every_message_type_has_a_layout_and_a_golden_vector() -> None:
    assert set(abi.LAYOUTS) == set(abi.TYPE_NAMES.values())
    assert {entry["type"] for entry in golden.entries().values()} == set(abi.TYPE_NAMES.values())
    assert list(golden.hex_lines()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_python_decodes_and_encodes_the_golden_vector(name: str) -> None:
    data, message = golden.hex_lines()[name], golden.message_of(golden.entries()[name])
    parsed = abi.Message.parse(data)
    assert message.pack() == data
    assert parsed.pack() == data
    assert (parsed.type, parsed.flow, parsed.arg, parsed.cookie) == (message.type, message.flow, message.arg, message.cookie)
    assert dict(message.fields).items() <= dict(parsed.fields).items()
    assert dict(message.parts).items() <= dict(parsed.parts).items()


def test_the_c_compiler_decodes_the_golden_vectors(tmp_path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    binary = tmp_path / "abi_decode"
    command = [compiler, "-std=gnu11", "-Wall", "-Werror", f"-I{INCLUDE}", "-o", str(binary), str(golden.HERE / "abi_decode.c")]
    subprocess.run(command, check=True, timeout=60)
    text = "".join(f"{data.hex()}\n" for data in golden.hex_lines().values())
    decoded = subprocess.run([binary], input=text, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    assert decoded == [golden.line_of(entry) for entry in golden.entries().values()]


@pytest.mark.parametrize("name", ["hdr", "hello", "open", "reply", "accept", "sockopt", "dgram", "error"])
def test_struct_has_the_size_and_members_of_the_c_type(name: str) -> None:
    struct = abi.struct_of(f"struct vso_{name}")
    ctype = ffi.typeof(f"struct vso_{name}")
    assert struct.sizeof() == ffi.sizeof(ctype)
    assert [sub.name for sub in struct.subcons] == [member for member, _ in ctype.fields]


def test_struct_of_follows_holes_arrays_and_nesting(monkeypatch: pytest.MonkeyPatch) -> None:
    other = FFI()
    other.cdef("struct in { uint8_t a; uint32_t b; }; struct out { uint16_t n[3]; struct in i; char text[5]; uint64_t last; };")
    monkeypatch.setattr(abi, "ffi", other)
    raw = other.new("struct out *", {"n": [1, 2, 3], "i": {"a": 4, "b": 5}, "text": b"hello", "last": 6})
    parsed = abi.struct_of("struct out").parse(bytes(other.buffer(raw)))
    assert (list(parsed.n), parsed.i.a, parsed.i.b, parsed.text, parsed.last) == ([1, 2, 3], 4, 5, b"hello", 6)


@pytest.mark.parametrize("text", ["struct s { void *p; };", "struct s { int a : 3; };", "struct s { union { int a; } u; };"])
def test_struct_of_refuses_what_has_no_place_on_a_wire(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = FFI()
    other.cdef(text)
    monkeypatch.setattr(abi, "ffi", other)
    with pytest.raises(UsageError, match="place on the wire"):
        abi.struct_of("struct s")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_request_error(data: bytes) -> None:
    try:
        message = abi.Message.parse(data)
    except RequestError:
        return
    assert len(message.pack()) == len(data)


@given(st.sampled_from(NAMES), st.data())
def test_a_damaged_message_is_a_message_or_a_request_error(name: str, data: st.DataObject) -> None:
    raw = bytearray(golden.hex_lines()[name])
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        abi.Message.parse(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
        abi.parse_open(bytes(raw[32:]))
    except RequestError:
        return


@pytest.mark.parametrize(
    ("damage", "evidence"),
    [
        (lambda raw: raw[:31], "31 bytes, its header has 32"),
        (lambda raw: b"\x63\x00" + raw[2:], "unknown message type 99"),
        (lambda raw: raw + b"x", "76 bytes of payload, the header says 75"),
        (lambda raw: raw[:8] + b"\x00\x00\x00\x00" + raw[12:32], "0 bytes of payload, its struct has 56"),
        (lambda raw: raw[:32] + b"\x14" + raw[33:], "uri ends at byte 76 of a payload of 75"),
        (lambda raw: raw[:32] + b"\x12" + raw[33:], "1 bytes beyond its last part"),
    ],
)
def test_malformed_message_is_refused_with_the_evidence(damage, evidence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestError) as caught:
        abi.Message.parse(damage(golden.hex_lines()["connect"]))
    assert evidence in str(caught.value)


numbers = st.integers(0, 2**32 - 1)
options = st.lists(st.builds(abi.Option, numbers, numbers, st.binary(max_size=lib.VSO_OPTVAL_MAX)), max_size=8)


@given(options)
def test_options_survive_their_packing(options: list[abi.Option]) -> None:
    packed = abi.pack_options(tuple(options))
    assert len(packed) % 8 == 0
    assert abi.parse_options(packed) == tuple(options)


@pytest.mark.parametrize(
    ("data", "evidence"),
    [
        (b"\0" * 8, "8 bytes left"),
        (abi.pack_options((abi.Option(6, 1, b"\1\0\0\0"),))[:16], "a value of 4 bytes at byte 16 of 16"),
        (abi.pack_options((abi.Option(6, 1, bytes(513)),)), "a value of 513 bytes"),
    ],
)
def test_malformed_options_are_refused(data: bytes, evidence: str) -> None:
    with pytest.raises(RequestError, match=evidence):
        abi.parse_options(data)


def test_open_request_is_decoded() -> None:
    name = "connect over IPv6, bound before, with TCP_NODELAY and SO_KEEPALIVE"
    request = abi.parse_open(golden.hex_lines()[name][32:])
    assert (request.uri, request.local) == ("tcp6://2001:db8::1/443", "tcp6://2001:db8::2/40000")
    assert (request.uid, request.pid, request.comm, request.netns) == (4294967294, 1, "sixteen-bytes-xy", 4026531992)
    assert (request.option(6, 1), request.option(1, 9), request.option(1, 2)) == (1, 1, 0)


def test_a_uri_that_is_not_ascii_is_refused_and_a_strange_comm_is_made_printable() -> None:
    bad = abi.Message("CONNECT", parts={"uri": b"tcp://\xff"}).pack()
    with pytest.raises(RequestError, match="byte 6"):
        abi.parse_open(bad[32:])
    strange = abi.Message("CONNECT", fields={"comm": b"a\nb\x1b\xff\0junk"}, parts={"uri": b"x"}).pack()
    assert abi.parse_open(strange[32:]).comm == "a?b?\ufffd"


def test_packing_refuses_names_that_the_type_does_not_have() -> None:
    with pytest.raises(UsageError, match="is no message"):
        abi.Message("CONECT").pack()
    with pytest.raises(UsageError, match="no field"):
        abi.Message("CONNECT", fields={"gid": 1}).pack()
    with pytest.raises(UsageError, match="no part"):
        abi.Message("DATA", parts={"uri": b""}).pack()
    with pytest.raises(UsageError, match="no struct"):
        abi.Message("DATA", fields={"uid": 1}).pack()
