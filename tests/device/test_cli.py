# SPDX-License-Identifier: BSD-3-Clause
"""The ``vhostsock`` command, run as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.aio import in_loop
from vhostsock.cli import DEVICES
from vhostsock.testing.frontend import Frontend

COMMAND = (sys.executable, "-P", "-m", "vhostsock")  # the installed one, wherever the tests are run


@contextlib.contextmanager
def serving(*arguments: str, fds: Sequence[int] = (), shell: str = "") -> Iterator[subprocess.Popen[str]]:
    """A ``vhostsock serve`` that has said that it listens; on exit it is stopped and must have ended well."""
    command = ["bash", "-c", shell, "bash", *COMMAND, "serve", *arguments] if shell else [*COMMAND, "serve", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=fds)
    try:
        assert process.stdout
        assert process.stdout.readline().startswith("listening on ")
        yield process
        process.terminate()
        output = process.communicate(timeout=30)
        assert process.returncode == 0, output
    finally:
        if process.returncode is None:
            process.kill()
            process.communicate()


async def exercise(sock: socket.socket, device: str) -> None:
    async with Frontend(sock) as frontend:
        await frontend.handshake()
        await frontend.start()
        frontend.queues[0].submit([b"ping"] if device == "echo" else [], [4])
        [done] = await frontend.queues[0].wait_async()
        assert done.written == 4
        assert device != "echo" or done.data == b"ping"


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


@pytest.mark.parametrize("device", ["rng", "echo"])
@in_loop
async def test_a_device_is_served_on_a_path(device: str, tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    with serving(device, "--socket-path", path):
        for _ in range(2):
            await exercise(connected(path), device)
    assert not os.path.exists(path)  # noqa: ASYNC240


@in_loop
async def test_a_listening_descriptor_is_served(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with serving("echo", "--fd", str(listener.fileno()), fds=[listener.fileno()]):
            await exercise(connected(path), "echo")


@in_loop
async def test_a_service_managers_socket_is_served(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        with serving("echo", fds=[fd], shell=f'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&{fd}'):
            await exercise(connected(path), "echo")


@in_loop
async def test_a_connected_descriptor_is_served_until_it_closes() -> None:
    ours, theirs = socket.socketpair()
    with ours, serving("echo", "--fd", str(ours.fileno()), fds=[ours.fileno()]) as process:
        ours.close()
        await exercise(theirs, "echo")
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@in_loop
async def test_a_signal_stops_a_running_session_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    with serving("echo", "--socket-path", path) as process:
        async with Frontend(connected(path)) as frontend:
            await frontend.handshake()
            await frontend.start()
            await frontend.settled()
            process.send_signal(number)
            await frontend.ended()
            assert process.wait(timeout=30) == 0
    assert not os.path.exists(path)  # noqa: ASYNC240


def failing(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_errors_are_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    status, text = failing("serve", "rng")
    assert (status, text.count("\n")) == (1, 1)
    assert "--socket-path PATH or --fd N" in text
    (tmp_path / "file").write_text("")
    status, text = failing("serve", "rng", "--socket-path", str(tmp_path / "file"))
    assert (status, text) == (1, f"vhostsock: {tmp_path / 'file'}: is there and is not a socket; choose another path\n")
    status, text = failing("serve", "rng", "--socket-path", str(tmp_path / "no" / "such"))
    assert (status, text) == (1, f"vhostsock: {tmp_path / 'no' / 'such'}: cannot listen: No such file or directory\n")
    status, text = failing("serve", "rng", "--socket-path", "/" + "x" * 200)
    assert (status, text) == (1, f"vhostsock: /{'x' * 200}: cannot listen: AF_UNIX path too long\n")
    status, text = failing("serve", "rng", "--fd", "77")
    assert (status, text) == (1, "vhostsock: descriptor 77 cannot be served: Bad file descriptor\n")
    status, text = failing("serve", "rng", LISTEN_PID="1", LISTEN_FDS="1")  # not for us
    assert (status, text.count("\n")) == (1, 1)


OWN_OPTIONS = {
    "input": ["events", "kind", "name", "serial"],
    "net": ["loopback", "mac", "mtu", "pairs", "tap"],
    "offload": ["busy-poll", "max-flows", "name", "pairs", "policy"],
    "blk": [
        *("blk-file", "block-size", "num-queues", "postcopy", "read-only"),
        *("seg-max", "serial", "shared", "threads", "write-through"),
    ],
    "vsock": ["busy-poll", "forward", "guest-cid", "max-flows", "name", "publish", "seqpacket-path", "uds-path"],
}


@pytest.mark.parametrize("others", [(), ("--fd", "no number"), ("--socket-path", "/no/such/x", "--unknown")])
@pytest.mark.parametrize("device", DEVICES)
def test_capabilities_are_printed_whatever_else_is_on_the_command_line(device: str, others: tuple[str, ...]) -> None:
    command = [*COMMAND, "serve", device, *others, "--print-capabilities"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    capabilities = json.loads(done.stdout)
    assert capabilities == {"type": {"blk": "block"}.get(device, device), "features": OWN_OPTIONS.get(device, [])}


def test_a_capability_is_an_option() -> None:
    usage = subprocess.run([*COMMAND, "serve", "offload", "--help"], capture_output=True, text=True, timeout=60, check=True)
    done = subprocess.run([*COMMAND, "serve", "offload", "--print-capabilities"], capture_output=True, timeout=60, check=True)
    assert all(f"--{feature} " in usage.stdout for feature in json.loads(done.stdout)["features"])


def test_a_wrong_command_line_is_status_2() -> None:
    assert failing("serve")[0] == 2
    assert failing("serve", "nothing")[0] == 2
    assert failing("serve", "--print-capabilities")[0] == 2
    assert failing("serve", "rng", "--socket-path", "x", "--fd", "3")[0] == 2
    status, text = failing("qemu-args", "--socket-path", "x", "--pairs", "0")
    assert status == 2
    assert "0 ring pairs" in text


@pytest.mark.parametrize(
    ("options", "named"),
    [((), "--loopback"), (("--loopback", "--pairs", "65"), "1..64"), (("--loopback", "--mac", "52:54"), "52:54:00:12:34:56")],
)
def test_a_network_card_that_cannot_be_is_status_2_and_says_what_can(options: tuple[str, ...], named: str) -> None:
    status, text = failing("serve", "net", "--socket-path", "never-made", *options)
    assert status == 2
    assert named in text


def test_help_names_every_device() -> None:
    done = subprocess.run([*COMMAND, "serve", "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert all(name in done.stdout and row.help.split(",")[0] in done.stdout for name, row in DEVICES.items())
