# SPDX-License-Identifier: BSD-3-Clause
"""The guests of the tests: one that does not come to its first program is reset, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import vm


def test_a_kernel_that_stops_while_it_boots_is_reset(initramfs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "BOOT", 0.0)
    with pytest.warns(UserWarning, match="stopped before its first program"), vm.Vm(tmp_path, initramfs) as guest:
        assert guest.run("echo up").text == "up"
