# SPDX-License-Identifier: BSD-3-Clause
"""A disk of a guest for the end-to-end tests: its image, the back-end that serves it, and the load on it."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

from tests.e2e.vm import Backend, Vm

SIZE = 32 << 20
KNOWN = 8 << 20  # bytes at the start of the image that the host has written
FEATURES = {"packed": 34, "flush": 9, "discard": 13, "write zeroes": 14, "multi-queue": 12}


class Disk:
    """An image, the back-end that serves it, and a guest that has it as /dev/vda."""

    def __init__(self, image: Path, backend: Backend, vm: Vm) -> None:
        self.image = image
        self.backend = backend
        self.vm = vm

    def feature(self, name: str) -> bool:
        features = self.vm.run("cat /sys/bus/virtio/drivers/virtio_blk/virtio*/features").text  # a digit a bit, bit 0 first
        return features[FEATURES[name]] == "1"

    def sectors(self) -> int:
        return int(self.vm.run("cat /sys/block/vda/size").text)

    def check(self) -> None:
        """The guest reads what the host has, and the host what the guest wrote."""
        want = hashlib.sha256(self.image.read_bytes()[:KNOWN]).hexdigest()
        assert self.vm.run("dd if=/dev/vda iflag=direct bs=1M count=8 2>/dev/null | sha256sum").text.split()[0] == want
        data = random.randbytes(1 << 20)
        self.vm.run("dd of=/dev/vda oflag=direct iflag=fullblock bs=256k seek=100 2>/dev/null", input=data)
        assert self.image.read_bytes()[25 << 20 :][: 1 << 20] == data


def new_image(path: Path) -> Path:
    path.write_bytes(random.randbytes(KNOWN))
    os.truncate(path, SIZE)
    return path


class Load:
    """disk_load runs in the guest within the block, and must have found every byte right at its end."""

    def __init__(self, vm: Vm, threads: int = 8) -> None:
        self.vm = vm
        vm.run("rm -f /tmp/stop")
        self.command = vm.start(f"disk_load /dev/vda {threads} /tmp/stop")

    def __enter__(self) -> Load:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        self.vm.run("touch /tmp/stop", check=kind is None)
        if kind is None:
            assert self.command.wait().text.startswith("good: ")
