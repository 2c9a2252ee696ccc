# SPDX-License-Identifier: BSD-3-Clause
"""A slice of CPython's own suites, offloaded: who wrote them knew nothing of this device. tests/judge/run runs them whole."""

from __future__ import annotations

import pytest

from tests.judge.guest import judge_guest
from tests.judge.judge import again, explanation, explanations

SLICE = (
    "test.test_epoll", "test.test_poll", "test.test_socketserver", "test.test_socket.*TCP*", "test.test_socket.BasicUDPTest",
    "test.test_socket.UDPTimeoutTest", "test.test_socket.*FileObjectClassTestCase.*", "test.test_socket.CreateServer*",
    "test.test_socket.NetworkConnection*",
)  # fmt: skip
pytestmark = pytest.mark.skipif("os.geteuid() != 0", reason="hairpin needs a network namespace of the host: root")


@pytest.mark.timeout(2400)
def test_what_passes_natively_passes_offloaded(initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with judge_guest(tmp_path_factory.mktemp("judge"), initramfs) as guest:
        outcomes = guest.run("offloaded", SLICE, seconds=300, within=1800)
        assert sum(o.outcome == "ok" for o in outcomes.values()) > 150
        known = explanations()
        failed = [test for test, outcome in outcomes.items() if not outcome.good and explanation(test, known) is None]
        assert len(failed) < 10, "\n".join(f"{outcomes[test].outcome}: {test}\n{outcomes[test].why}" for test in failed)
        # some of them measure time, and a busy machine may fail those: they have more chances, and must at least pass natively
        again(guest, "offloaded", outcomes, failed, 3)
        failed = [test for test in failed if not outcomes[test].good]
        natively = guest.run("native", failed, seconds=300, within=1800) if failed else {}
        worse = [test for test in failed if test not in natively or natively[test].good]
        assert not worse, "\n".join(f"{outcomes[test].outcome}: {test}\n{outcomes[test].why}" for test in worse)
        assert guest.backend.stats("judge")["opened"] > 300, "they went through the device"
