# SPDX-License-Identifier: BSD-3-Clause
"""A guest with a device that has a state of its own, saved to a file and gone on with from there (DEVICE_STATE)."""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.vm import Program, Vm, script
from vhostsock.trace import trace

HERE = Path(__file__).resolve().parent
SIZE = 300_000  # several times what a pipe holds


def serve(stack: ExitStack, folder: Path, state: bytes) -> Path:
    """The device in a new folder, with this state; its socket."""
    folder.mkdir()
    (folder / "state").write_bytes(state)
    paths = [str(folder / name) for name in ("state.sock", "record", "state")]
    command = [sys.executable, str(HERE / "serve_state.py"), *paths]
    stack.enter_context(Program(folder / "state.log", command)).await_log("listening")
    return folder / "state.sock"


def messages(folder: Path) -> str:
    return "\n".join(trace(str(folder / "record")))


@pytest.mark.foreign
@pytest.mark.parametrize("suite", ["trixie", "trixie-backports"])
def test_a_device_goes_on_with_the_state_that_was_saved(suite: str, stock_initramfs: str, tmp_path: Path) -> None:
    state = random.randbytes(SIZE)
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "saved"
    options = ("--qemu", script("fetch-qemu", suite), "--carrier", "fs", "--socket")
    with ExitStack() as stack:
        first, second = serve(stack, here, state), serve(stack, there, b"")
        with Vm(here, stock_initramfs, *options, first) as vm:
            vm.run("test -e /sys/bus/virtio/drivers/virtiofs/virtio*; echo kept >/tmp/kept")
            vm.pause()
            vm.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            vm.qmp.execute("migrate", uri=f"file:{file}")
            vm.qmp.await_event("MIGRATION", status="completed")
        assert (there / "state").read_bytes() == b""
        with Vm(there, stock_initramfs, *options, second, "--", "-incoming", "defer", boots=False) as vm:
            vm.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            vm.qmp.execute("migrate-incoming", uri=f"file:{file}")
            vm.qmp.await_event("MIGRATION", status="completed")
            vm.resume()
            assert vm.run("cat /tmp/kept").text == "kept"
            assert (there / "state").read_bytes() == state
            vm.reset()  # and the device is one like any other
            vm.run("test -e /sys/bus/virtio/drivers/virtiofs/virtio*")
    assert "-> CHECK_DEVICE_STATE" in messages(here)
    assert "-> CHECK_DEVICE_STATE" in messages(there)
