# SPDX-License-Identifier: BSD-3-Clause
"""The probe on two back-ends that are not ours, one in Rust and one in C, in the versions of a stable Debian.

The verdicts are pinned. A change is news: of the probe, if the package is the same; docs/probe.md explains each one.
"""

from __future__ import annotations

import concurrent.futures

import pytest

from tests.probe.others import BACKENDS, Backend, probe

RUST, C = (
    next(b for b in BACKENDS if (b.program, b.suite) == (name, "trixie")) for name in ("virtiofsd", "qemu-storage-daemon")
)
PATIENCE = ("--timeout", "60")

BAD = {
    RUST.name: {
        "messages_may_arrive_in_pieces": "fail",
        "the_regions_of_a_table_may_come_in_any_order": "fail",
        "a_ring_without_a_kick_descriptor_is_polled_or_refused": "hung",
        "a_reset_device_starts_from_the_beginning": "hung",
    },
    C.name: {
        "a_message_with_a_reply_of_its_own_is_answered_once": "fail",
        "a_base_that_is_asked_for_with_need_reply_comes_once": "fail",
        "a_request_that_cannot_be_carried_out_is_acked_with_non_zero": "fail",
        "a_region_that_is_not_there_cannot_be_removed": "fail",
        "a_ring_without_a_kick_descriptor_is_polled_or_refused": "hung",
        "a_part_of_the_config_space_is_that_part": "fail",
        "config_reads_outside_of_all_bounds_fail": "fail",
    },
}
# which thread of the back-end is faster decides
RACES = {"a_kick_before_set_vring_enable_is_not_lost", "a_request_that_lay_in_the_ring_before_its_start_is_completed"}


def bad(backend: Backend) -> dict[str, str]:
    """Verdicts that are no pass. Who hangs is asked again, patiently, if it should not hang: this machine may be busy."""
    verdicts = {row["check"]: row["verdict"] for row in probe(backend)["results"]}
    for check, verdict in verdicts.items():
        if verdict == "hung" and BAD[backend.name].get(check) != "hung" and check not in RACES:
            [row] = probe(backend, "--only", check, *PATIENCE)["results"]
            verdicts[check] = row["verdict"]
    return {check: verdict for check, verdict in verdicts.items() if verdict not in ("pass", "not_applicable")}


@pytest.mark.foreign
def test_verdicts_on_back_ends_of_others_are_those_that_the_document_tells() -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = dict(zip(BAD, pool.map(bad, (RUST, C)), strict=True))
    for name, verdicts in BAD.items():
        assert {check: verdict for check, verdict in found[name].items() if check not in RACES} == verdicts, name
