# SPDX-License-Identifier: BSD-3-Clause
"""The carrier table: which QEMU arguments attach a back-end."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vhostsock.qemu import CARRIERS, main, qemu_args

PROGRAM = Path(__file__).resolve().parents[2] / "vhostsock" / "qemu.py"


def device(args: list[str]) -> str:
    return args[args.index("-device") + 1]


@pytest.mark.parametrize(("carrier", "pairs", "rings"), [("fs", 1, "num-request-queues=1"), ("fs", 4, "num-request-queues=7"),
                                                         ("generic", 1, "num_vqs=2"), ("generic", 4, "num_vqs=8")])  # fmt: skip
def test_carrier_is_asked_for_two_rings_a_pair(carrier: str, pairs: int, rings: str) -> None:
    assert rings in device(qemu_args("/s", carrier=carrier, pairs=pairs)).split(",")


@pytest.mark.parametrize("carrier", CARRIERS)
def test_guest_memory_is_shared_with_every_carrier(carrier: str) -> None:
    args = qemu_args("/s", carrier=carrier, memory="1G")
    memory = args[args.index("-object") + 1]
    assert "share=on" in memory
    assert "size=1G" in memory
    assert args[args.index("-m") + 1] == "1G"


def test_fs_tag_is_what_the_guest_driver_looks_for() -> None:
    assert "tag=vhostsock0" in device(qemu_args("/s", carrier="fs")).split(",")


def test_generic_takes_any_virtio_id() -> None:
    assert "virtio-id=39" in device(qemu_args("/s", carrier="generic")).split(",")
    assert "virtio-id=18" in device(qemu_args("/s", carrier="generic", virtio_id=18)).split(",")


def test_generic_has_a_config_space_if_it_is_told_its_size() -> None:
    assert "config_size=136" in device(qemu_args("/s", carrier="generic", virtio_id=18, config_size=136)).split(",")
    assert "config_size" not in device(qemu_args("/s", carrier="generic"))


def test_a_network_card_has_its_back_end_in_front_of_it() -> None:
    args = qemu_args("/s", carrier="net", pairs=4)
    netdev = args.index("-netdev")
    assert args[netdev + 1] == "vhost-user,id=vhostsock0-netdev,chardev=vhostsock0-socket,queues=4"
    assert {"virtio-net-pci", "netdev=vhostsock0-netdev", "mq=on"} <= set(device(args).split(","))
    assert args.index("-chardev") < netdev < args.index("-device")


def test_blk_is_asked_for_queues() -> None:
    assert "num-queues=4" in device(qemu_args("/s", carrier="blk", queues=4)).split(",")


@pytest.mark.parametrize(("options", "chardev"), [({}, ""), ({"reconnect": 1}, ",reconnect=1"),
                                                  ({"reconnect_ms": 250}, ",reconnect-ms=250")])  # fmt: skip
def test_blk_can_outlive_its_back_end(options: dict[str, int], chardev: str) -> None:
    assert f"socket,id=vhostsock0-socket,path=/s{chardev}" in qemu_args("/s", carrier="blk", **options)  # type: ignore[arg-type]


def test_vsock_carrier_is_qemus_own_device_with_one_pair() -> None:
    assert device(qemu_args("/s", carrier="vsock")).split(",")[0] == "vhost-user-vsock-pci"
    with pytest.raises(ValueError, match=r"1\.\.1"):
        qemu_args("/s", carrier="vsock", pairs=2)


def test_comma_in_the_path_is_escaped_for_qemu() -> None:
    assert "socket,id=vhostsock0-socket,path=/tmp/a,,b c" in qemu_args("/tmp/a,b c")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"carrier": "pigeon"}, "fs, generic"),
        ({"pairs": 0}, r"1\.\.64"),
        ({"pairs": 65}, r"1\.\.64"),
        ({"carrier": "rng", "pairs": 2}, r"1\.\.1"),
        ({"memory": "lots"}, "256M"),
        ({"name": "eth0"}, "vhostsock"),
        ({"virtio_id": 18}, "generic"),
        ({"config_size": 8}, "generic"),
        ({"carrier": "generic", "config_size": 257}, r"0\.\.256"),
        ({"carrier": "fs", "queues": 2}, r"1\.\.1"),
        ({"carrier": "blk", "queues": 65}, r"1\.\.64"),
        ({"carrier": "fs", "reconnect": 1}, "blk can"),
        ({"carrier": "blk", "reconnect": 1, "reconnect_ms": 1}, "one of the two"),
    ],
)
def test_wrong_argument_is_named_with_what_it_may_be(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        qemu_args("/s", **wrong)  # type: ignore[arg-type]


def test_command_prints_what_a_shell_splits_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket-path", "/tmp/a b"]) == 0
    assert shlex.split(capsys.readouterr().out) == qemu_args("/tmp/a b")


def test_command_refuses_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--socket-path", "/s", "--pairs", "0"])
    assert exited.value.code == 2
    assert "1..64" in capsys.readouterr().err


def test_runs_before_anything_is_built() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", str(PROGRAM), "--one-per-line", "--socket-path", "/s"],
                          capture_output=True, text=True, timeout=20, check=True)  # fmt: skip
    assert done.stdout.splitlines() == qemu_args("/s")
