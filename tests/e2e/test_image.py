# SPDX-License-Identifier: BSD-3-Clause
"""Debian's programs on a disk of the guest: qemu-scripts/make-guest-image, boot --disk, guest-run --image."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from tests.e2e.vm import SCRIPTS, Vm, script


def test_programs_of_the_disk_run_and_what_they_write_is_thrown_away(stock_initramfs: str, tmp_path: Path) -> None:
    disk = Path(script("make-guest-image", "gawk"))
    before = hashlib.sha256(disk.read_bytes()).hexdigest()
    with Vm(tmp_path, stock_initramfs, disk=str(disk)) as vm:
        assert vm.run_in_image("gawk 'BEGIN { print PROCINFO[\"version\"] }' >/var/kept; cat /var/kept").text.startswith("5.")
        assert vm.run_in_image("echo mine >/tmp/seen; df -T / | tail -n 1").text.split()[:2] == ["/dev/vda", "ext4"]
        assert vm.run("cat /tmp/seen").text == "mine"
        command: list[str | Path] = [SCRIPTS / "guest-run", "--image", tmp_path / "agent.sock", "echo 'two  words'; exit 3"]
        vm.guest.close()  # the port serves one host at a time
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (3, "two  words\n"), done
    assert hashlib.sha256(disk.read_bytes()).hexdigest() == before


def test_a_disk_is_made_once() -> None:
    assert script("make-guest-image", "gawk") == script("make-guest-image", "gawk", "gawk")
