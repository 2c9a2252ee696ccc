# SPDX-License-Identifier: BSD-3-Clause
"""The guests of the tests: one that does not come to its first program is reset, once; one whose kernel dies is gone."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.e2e import vm
from tests.e2e.conftest import hears_of_its_death


def test_a_kernel_that_stops_while_it_boots_is_reset(initramfs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = vm.Vm._first_program

    def stopped(guest: vm.Vm) -> bool:
        vm.wait_until(lambda: "Linux version" in guest.console_text(), "the kernel begins")  # the firmware bears no reset
        monkeypatch.setattr(vm.Vm, "_first_program", look)
        return False

    monkeypatch.setattr(vm.Vm, "_first_program", stopped)
    with pytest.warns(UserWarning, match="stopped before its first program"), vm.Vm(tmp_path, initramfs) as guest:
        assert guest.run("echo up").text == "up"


def test_a_kernel_that_is_told_to_be_quiet_boots_and_whoever_waits_for_one_that_dies_hears_of_it(
    initramfs: str, tmp_path: Path
) -> None:
    """Not by a limit of time: neither the boot's nor the command's is over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one that counts as stopped is reset with a warning
        with vm.Vm(tmp_path, initramfs, "--append", "quiet") as guest:
            assert "Run /init" not in guest.console_text(), "this kernel is not quiet"
            hears_of_its_death(guest, "echo c >/proc/sysrq-trigger")
