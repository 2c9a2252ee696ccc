# SPDX-License-Identifier: BSD-3-Clause
"""Replays recorded sessions of QEMU 7.2, 10.0, 11.1 and DPDK: same messages in, same replies out.

The session is configured with what the recorded back-end offered. What only a real device knows (the base that GET_VRING_BASE
reports, contents of the config space, whether something could be carried out) is answered as recorded; the traces of QEMU have
only the size of a config space. ``vhostsock trace`` prints in the same form, so any recording can become a fixture.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vhostsock.proto import Request, Session, SessionConfig, events, wire
from vhostsock.proto.messages import TABLE

TRACES = Path(__file__).parent.parent / "data" / "traces"

# QEMU gave up before its first message
SILENT = {"q11-testdev-id63-ABORT", "q11-testdev-id4-reconnect", "q11-vsock-reconnect", "q72-rng-reconnect"}


class Line(NamedTuple):
    kind: str  # "connection", "->" or "<-"
    name: str
    text: str


def lines_of(trace: Iterable[str]) -> Iterator[Line]:
    for text in trace:
        match = re.match(r"\s*[\d.]+ (==|->|<-) (\w+)\s*(.*)", text)
        if match and (match[1] != "==" or match[2] == "connection"):
            yield Line("connection" if match[1] == "==" else match[1], match[2], match[3])


def numbers(text: str) -> dict[str, int]:
    return {key: int(value, 0) for key, value in re.findall(r"(\w+)=(0x[0-9a-f]+|\d+)\b", text)}


def regions(text: str) -> list[dict[str, int]]:
    found = re.findall(r"gpa=(\S+) size=(\S+) uva=(\S+) off=([0-9a-fx]+)", text)
    return [dict(zip(("gpa", "size", "uva", "offset"), (int(v, 0) for v in region), strict=True)) for region in found]


def payload_of(name: str, text: str) -> Any:
    """The value to build the message's payload from; ``text`` is what the trace shows after the descriptors."""
    n = numbers(text.partition("payload=")[0])
    if name == "SET_VRING_ADDR":
        return {"index": n["vq"], **{key: n[key] for key in ("flags", "desc", "used", "avail", "log")}}
    if name in ("SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR"):
        return {"index": n["vq"], "nofd": bool(n["nofd"])}
    if "VRING" in name:
        return {"index": n["vq"], "num": n["num"]}
    if name == "SET_MEM_TABLE":
        return {"n": n["n"], "regions": regions(text)}
    if name in ("ADD_MEM_REG", "REM_MEM_REG"):
        return {"region": regions(text)[0]}
    if name in ("GET_CONFIG", "SET_CONFIG"):
        data = re.search(r"payload=([0-9a-f]+)$", text)
        content = bytes.fromhex(data[1]) if data else bytes(n["size"])
        return {"offset": n["offset"], "size": n["size"], "flags": n["flags"], "data": content}
    if name in ("GET_INFLIGHT_FD", "SET_INFLIGHT_FD"):
        return {"size": n["mmap_size"], "offset": n["off"], "num_queues": n["nq"], "queue_size": n["qsz"]}
    if name == "SET_LOG_BASE":
        return {"size": n["size"], "offset": n["off"]}
    if name == "IOTLB_MSG":
        return wire.IOTLB.parse(bytes.fromhex(text.strip()))
    if name == "SET_DEVICE_STATE_FD":
        return {"direction": n["direction"], "phase": n["phase"]}
    return int(text.split()[0], 0)


def make_fd(what: str) -> int:
    if what.startswith("/memfd"):
        fd = os.memfd_create("guest")
        os.ftruncate(fd, numbers(what)["size"])
        return fd
    if what == "socket":
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours.detach()
    return os.eventfd(0)


def send(session: Session, line: Line) -> events.Event | None:
    """Feed one recorded message as the kernel would deliver it: header with the descriptors, then the payload."""
    head, _, tail = re.fullmatch(r"id=(\d+ flags=\S+ size=\d+) fds=(\[)(.*)", line.text).groups()  # type: ignore[union-attr]
    depth, end = 1, 0
    while depth:  # descriptor names have brackets of their own: anon_inode:[eventfd]
        depth += {"[": 1, "]": -1}.get(tail[end], 0)
        end += 1
    descriptors, rest = [d for d in tail[: end - 1].split(", ") if d], tail[end:].strip()
    request, flags, size = (int(v, 0) for v in re.findall(r"0x[0-9a-f]+|\d+", re.sub(r"\(\w+\)", "", head)))
    row = TABLE.get(request)
    body = row.payload.build(payload_of(line.name, rest)) if row and row.payload else bytes(size if row is None else 0)
    assert len(body) == size
    message = wire.HEADER.build({"request": request, "flags": flags, "size": size}) + body
    event = session.receive(message[:12], [make_fd(d) for d in descriptors])
    return session.receive(message[12:]) if size else event


def replay(trace: Iterable[str]) -> int:
    """Returns the number of messages fed. Raises FrontendError where the session does."""
    session, fed, recorded = None, 0, list(lines_of(trace))
    for at, line in enumerate(recorded):
        if line.kind == "connection":
            offered = numbers(line.text)
            if session:
                session.close()
            config = SessionConfig(offered["features"], offered["pf"], offered.get("queues", 8), offered.get("slots", 32))
            session = Session(config)
        elif line.kind == "->":
            assert session
            fed += 1
            answer = recorded[at + 1] if at + 1 < len(recorded) and recorded[at + 1].kind == "<-" else None
            event = send(session, line)
            if event and answer and was_refused(answer):
                session.refuse("as recorded")
            elif isinstance(event, events.VringStop):
                assert answer
                session.done(numbers(answer.text)["base"])
            elif isinstance(event, events.ConfigRead):
                assert answer
                session.done(config_in(answer) or bytes(event.size))
            elif isinstance(event, events.InflightGet):
                assert answer
                session.done(events.WithFd(numbers(answer.text)["mmap_size"], events.OwnedFd(os.memfd_create("inflight"))))
            elif isinstance(event, events.LogBase):
                session.done(0)
            elif event:
                session.done()
            sent = session.take_output_fds()
            check_reply(line.name, session.take_output(), answer, len(sent))
    assert session
    session.close()
    return fed


def was_refused(answer: Line) -> bool:
    return bool(re.search(r"ack [1-9]|GET_CONFIG.*size=0", f"{answer.name} {answer.text}"))


def config_in(answer: Line) -> bytes:
    found = re.search(r"bytes ([0-9a-f]+)$", answer.text)
    return bytes.fromhex(found[1]) if found else b""


def check_reply(name: str, output: bytes, answer: Line | None, fds: int) -> None:
    assert fds == (numbers(answer.text).get("fds", 0) if answer else 0)
    if answer is None:
        assert output == b"", f"{name}: QEMU was sent a reply that it does not expect"
        return
    header, body = wire.HEADER.parse(output), output[wire.HEADER_SIZE :]
    assert (answer.name, header.flags) == (name, 0x5)
    assert header.request == Request[name]
    assert header.size == len(body) == numbers(answer.text)["size"]
    value = answer.text.partition(" ")[2].strip()
    if name == "GET_VRING_BASE":
        assert wire.VRING_STATE.parse(body) == {"index": numbers(value)["vq"], "num": numbers(value)["base"]}
    elif name == "GET_INFLIGHT_FD":
        assert wire.INFLIGHT.parse(body) == payload_of(name, f"{value} off=0") | {"padding": 0}
    elif name != "GET_CONFIG":
        said = value.removeprefix("ack ").split()[0]
        assert wire.U64.parse(body) == (0x100 if value == "ok nofd" else int(said, 0))


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.txt")), ids=lambda p: p.stem)
def test_replies_equal_the_recorded_ones(path: Path) -> None:
    assert (replay(path.read_text().splitlines()) == 0) == (path.stem in SILENT)


def test_every_named_trace_exists() -> None:
    assert {path.stem for path in TRACES.glob("*.txt")} >= SILENT
