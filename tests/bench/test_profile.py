# SPDX-License-Identifier: BSD-3-Clause
"""The instructions of a guest are counted: a short slice of the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.profile import MIB, profiled, table


@pytest.mark.e2e
@pytest.mark.timeout(1200)  # it may be the first to need a kernel and the module
def test_a_guests_instructions_for_a_mib_are_counted_by_function(tmp_path: Path) -> None:
    found = profiled(tmp_path, "in64", "offload-fs", 30)
    whole, copy = sum(found.instructions.values()), found.instructions["copy_user_generic_string"]
    assert MIB / 8 <= copy < 1.3 * MIB / 8, "bytes are copied once, eight at a time"
    assert copy < whole < 4 * copy
    assert found.calls["vso_stream_recvmsg [virtio_socket]"] >= 1
    assert table(found, 1)[2:] == [
        f"| all | {whole:.0f} | | |",
        f"| copy_user_generic_string | {copy:.0f} | {copy / whole:.1%} | {found.calls['copy_user_generic_string']:.2f} |",
    ]
