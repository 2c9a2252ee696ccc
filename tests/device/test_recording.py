# SPDX-License-Identifier: BSD-3-Clause
"""A recorded session prints as the traces do, replays as one of them, and never harms the session."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from tests.device.test_cli import COMMAND, connected, exercise, failing, serving
from tests.protocol.test_traces import replay
from vhostsock import Chain, Device, Queue
from vhostsock.errors import FrontendError, UsageError
from vhostsock.proto import Request, VirtioFeature, wire
from vhostsock.recording import Entry, Recorder, describe_fd, read_recording
from vhostsock.testing.frontend import QEMU_7_2, QEMU_11_1, Dialect, Refused, attach
from vhostsock.trace import line_of, trace


class Configured(Device):
    """Two queues and a config space of four bytes, of which the first can be written."""

    virtio_id = 39
    num_queues = 2
    config = b"\1\2\3\4"

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(chain.read())

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        if offset:
            super().write_config(offset, data, flags)
        self.config = data + self.config[1:]


async def record_a_life(path: Path, dialect: Dialect) -> None:
    """Start, I/O, config both ways, a refusal, a notice, pause, reboot, end."""
    with Recorder(str(path)) as recorder:
        device = Configured()
        async with attach(device, tap=recorder, dialect=dialect) as frontend:
            frontend.queues[1].submit([b"ping"], [4])
            await frontend.queues[1].wait_async()
            assert await frontend.read_config(1, 2) == b"\2\3"
            await frontend.write_config(0, b"\7")
            with pytest.raises(Refused):
                await frontend.write_config(3, b"\7")
            device.config_changed()
            await frontend.backend_request()
            await frontend.pause()
            await frontend.resume()
            await frontend.reboot()
            sent = len(frontend.sent)
    assert sum(entry.kind == "->" for entry in read_recording(str(path))) == sent


@pytest.mark.parametrize("dialect", [QEMU_7_2, QEMU_11_1], ids=lambda d: d.name)
@in_loop
async def test_a_recorded_session_replays_with_the_same_replies(dialect: Dialect, tmp_path: Path) -> None:
    await record_a_life(tmp_path / "r", dialect)
    lines = list(trace(str(tmp_path / "r")))
    assert replay(lines) == sum(" -> " in line for line in lines) > 40


@in_loop
async def test_a_reply_that_was_tampered_with_does_not_replay(tmp_path: Path) -> None:
    await record_a_life(tmp_path / "r", QEMU_11_1)
    lines = list(trace(str(tmp_path / "r")))
    at = next(n for n, line in enumerate(lines) if "<- GET_QUEUE_NUM" in line)
    lines[at] = lines[at].replace("0x2", "0x3")
    with pytest.raises(AssertionError):
        replay(lines)


@in_loop
async def test_the_trace_shows_what_was_said(tmp_path: Path) -> None:
    await record_a_life(tmp_path / "r", QEMU_11_1)
    text = "\n".join(line[9:] for line in trace(str(tmp_path / "r")))
    for line in (
        "-> SET_VRING_CALL         id=13 flags=0x9(NEED_REPLY) size=8 fds=[anon_inode:[eventfd]] vq=1 nofd=0",
        "<- SET_VRING_CALL         size=8 ack 0",
        "-> SET_BACKEND_REQ_FD     id=21 flags=0x9(NEED_REPLY) size=0 fds=[socket]",
        "-> GET_CONFIG             id=24 flags=0x1 size=14 fds=[] offset=1 size=2 flags=0 payload=2 bytes",
        "<- GET_CONFIG             size=14 2 bytes 0203",
        "<- SET_CONFIG             size=8 ack 1",
        "=> CONFIG_CHANGE_MSG      flags=0x1 size=0",
        "<- GET_VRING_BASE         size=8 vq=1 base=0x1",
        "== ring 1 started",
        "== ring 1 stopped",
        "== front-end closed the connection",
    ):
        assert f"\n{line}\n" in f"\n{text}\n"
    assert "VERSION_1" in text
    assert "seals=" in text


@in_loop
async def test_the_message_that_ends_a_session_is_in_the_recording(tmp_path: Path) -> None:
    path = str(tmp_path / "r")
    with Recorder(path) as recorder:
        async with attach(Upper(), tap=recorder, started=False) as frontend:
            await frontend.send(wire.HEADER.build({"request": 99, "flags": 1, "size": 8}) + bytes(8))
            await frontend.ended()
    message, end = list(trace(path))[-2:]
    assert message[9:] == "-> REQUEST_99             id=99 flags=0x1 size=8 fds=[]  (0 bytes were read)"
    assert end[9:] == "== session ended: request 99: not served by this back-end"
    with pytest.raises(FrontendError, match=r"^request 99"):
        replay(trace(path))


@in_loop
async def test_a_full_disk_ends_the_recording_and_not_the_session(caplog: pytest.LogCaptureFixture) -> None:
    with Recorder("/dev/full") as recorder:
        async with attach(Upper(), tap=recorder) as frontend:
            frontend.queues[0].submit([b"ping"], [4])
            [done] = await frontend.queues[0].wait_async()
            assert done.data == b"PING"
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == [
        "/dev/full: the recording ends here: No space left on device"
    ]


@in_loop
async def test_a_recording_has_a_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r"
    with Recorder(str(path), limit=1000) as recorder:
        async with attach(Upper(), tap=recorder) as frontend:
            await frontend.settled()
    assert 500 < path.stat().st_size <= 1000
    assert "the recording ends here: it has reached the limit of 1000 bytes" in caplog.text
    assert list(trace(str(path)))


@pytest.fixture
def descriptors() -> Iterator[dict[str, int]]:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    memory = os.memfd_create("ram\nid=1", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 4096)
    with ours, theirs:
        yield {"socket": ours.fileno(), "pipe:": reading, "/memfd:ram\nid=1 size=0x1000 seals=0x0": memory}
    for fd in (reading, writing, memory):
        os.close(fd)


def test_descriptors_are_described(descriptors: dict[str, int]) -> None:
    for text, fd in descriptors.items():
        assert describe_fd(fd).startswith(text)
    assert describe_fd(-1).startswith("unknown")


def test_what_a_front_end_names_its_memory_stays_on_its_line() -> None:
    line = line_of(Entry(0.0, "->", request=Request.SET_LOG_FD, flags=1, fds=("/memfd:x\n\x1b[2J",)))
    assert line.endswith("fds=[/memfd:x\\n\\x1b[2J]")


def test_bits_without_a_name_are_shown() -> None:
    value = VirtioFeature.VERSION_1 | 1 << 63
    line = line_of(Entry(0.0, "->", request=Request.SET_FEATURES, flags=1, size=8, payload=wire.U64.build(value)))
    assert line.endswith("0x8000000100000000 = VERSION_1|bit63")


def test_a_file_that_is_no_recording_is_refused_by_name_and_line(tmp_path: Path) -> None:
    path = tmp_path / "r"
    first = json.dumps({"vhostsock-recording": 1, "byteorder": "little"})
    for content, text in {
        b"": "not a recording",
        b"\xff\x00": "not a recording",
        b"[]\n": "not a recording",
        first.replace("1", "2", 1).encode() + b"\n": "version 2",
        first.replace("little", "big").encode() + b"\n": "big-endian",
        first.encode() + b"\nhello\n": ":2: not a line",
        first.encode() + b'\n{"t": 0, "kind": "->", "request": "x", "flags": 1, "size": 0, "payload": ""}\n': ":2: not a line",
        first.encode() + b'\n{"t": 0, "kind": "??"}\n': ":2: not a line",
        first.encode() + b"\n" + b"[" * 100_000 + b"\n": ":2: not a line",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UsageError, match=text):
            list(trace(str(path)))


def test_a_recording_cut_short_is_read_to_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "r"
    Recorder(str(path)).close()
    with path.open("ab") as file:
        file.write(b'{"t": 1, "kind": "==", "text": "x"}\n{"t": 2, "ki')
    assert [line[9:] for line in trace(str(path))] == ["== x", "== the recording ends within a line"]


# ---- the command


@in_loop
async def test_a_served_device_is_recorded_and_its_recording_printed(tmp_path: Path) -> None:
    path, record = str(tmp_path / "x.sock"), tmp_path / "r"
    with serving("echo", "--socket-path", path, "--record", str(record)):
        for _ in range(2):
            await exercise(connected(path), "echo")
    lines = list(trace(str(record)))
    assert sum("== connection" in line for line in lines) == 2
    assert replay(lines) > 20


def test_a_recording_that_cannot_be_written_is_an_error_before_anything_is_served(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    status, text = failing("serve", "rng", "--socket-path", path, "--record", str(tmp_path))
    assert (status, text) == (1, f"vhostsock: {tmp_path}: cannot record there: Is a directory\n")
    assert not os.path.exists(path)


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    with Recorder(str(tmp_path / "r")) as recorder:
        recorder.noted("seen enough")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*COMMAND, "trace", str(tmp_path / "r")], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_trace_says_what_is_wrong_with_its_file(tmp_path: Path) -> None:
    status, text = failing("trace", str(tmp_path / "none"))
    assert (status, text) == (1, f"vhostsock: {tmp_path / 'none'}: No such file or directory\n")
    status, text = failing("trace", os.devnull)
    assert (status, text.count("\n")) == (1, 1)
    assert "not a recording" in text
