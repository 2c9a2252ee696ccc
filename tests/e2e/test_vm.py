# SPDX-License-Identifier: BSD-3-Clause
"""The guests of the tests: one that does not come to its first program is reset, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import vm


def test_a_kernel_that_stops_while_it_boots_is_reset(initramfs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(guest: vm.Vm) -> bool:
        vm.wait_until(lambda: "Linux version" in guest.console_text(), "the kernel begins")  # the firmware bears no reset
        return False

    monkeypatch.setattr(vm.Vm, "_first_program", stopped)
    with pytest.warns(UserWarning, match="stopped before its first program"), vm.Vm(tmp_path, initramfs) as guest:
        assert guest.run("echo up").text == "up"
