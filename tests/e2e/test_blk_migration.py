# SPDX-License-Identifier: BSD-3-Clause
"""Migration of a guest that loads its disk, from one QEMU and back-end to another pair, on the same image.

What the device writes into guest memory (the data of reads, the status of requests, the used rings) QEMU cannot see: the
back-end marks those pages in the dirty log. disk_load looks again and again at buffers that only the device has written to: a
page that was not marked, and so stayed as it was when QEMU copied it first, shows as wrong bytes on the destination.

QEMU 7.2 migrates its guest stopped: under TCG it loses pages that the guest's own processor dirties while they are copied, with
any disk, also its own. What is left to see there is that rings and requests go on where they were.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.disk import Disk, new_image
from tests.e2e.vm import Backend, Vm, script, wait_until

ROUNDS = 4
INFLIGHT = ("-global", "vhost-user-blk-pci.inflight-migration=on")  # requests under way migrate, too


def migrate(source: Vm, destination: Vm, socket: Path, how: str) -> None:
    """All of it, to the end: the destination runs the guest.

    stopped    all at once
    live       memory is copied several times over while the guest runs: one that ends with the first copy would prove nothing
    postcopy   the guest runs on the destination before most of its memory is there, and the disk writes into what is not
    """
    for vm in (source, destination):
        capabilities = ["events"] + ["postcopy-ram"] * (how == "postcopy")
        vm.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": c, "state": True} for c in capabilities])
    destination.qmp.execute("migrate-incoming", uri=f"unix:{socket}")
    if how == "live":
        # as long as it expects to send this little a second it finds too much left to stop the guest for
        source.qmp.execute("migrate-set-parameters", **{"max-bandwidth": 256 << 20, "avail-switchover-bandwidth": 1})
        source.qmp.execute("migrate", uri=f"unix:{socket}")
        wait_until(lambda: source.qmp.execute("query-migrate").get("ram", {}).get("dirty-sync-count", 0) >= ROUNDS, "rounds")
        source.qmp.execute("migrate-set-parameters", **{"avail-switchover-bandwidth": 1 << 40})
    elif how == "postcopy":
        # slow enough that the guest runs over there while pages still come
        source.qmp.execute("migrate-set-parameters", **{"max-bandwidth": 16 << 20, "max-postcopy-bandwidth": 64 << 20})
        source.qmp.execute("migrate", uri=f"unix:{socket}")
        source.qmp.await_event("MIGRATION", status="active")
        source.qmp.execute("migrate-start-postcopy")
        source.qmp.await_event("MIGRATION", status="postcopy-active")
    else:
        source.pause()
        source.qmp.execute("migrate", uri=f"unix:{socket}")
    for vm in (source, destination):
        vm.qmp.await_event("MIGRATION", status="completed")
    if how == "postcopy":
        assert source.qmp.execute("query-migrate")["ram"]["postcopy-requests"] > 0  # somebody over there had to wait
    if how == "stopped":
        destination.resume()


def reads_on(guest: Vm, backend: Backend) -> int:
    """Reads that the back-end has served. AssertionError with what the load found, if that was something wrong."""
    assert guest.run("pidof disk_load", check=False).status == 0, guest.run("cat /tmp/load").text
    return backend.stats("blk")["reads"]


@pytest.mark.parametrize(
    ("suite", "how", "more"),
    [
        ("distribution", "stopped", ()),
        pytest.param("trixie-backports", "live", (), marks=pytest.mark.foreign),
        pytest.param("trixie-backports", "live", INFLIGHT, marks=pytest.mark.foreign),
        pytest.param("trixie-backports", "postcopy", (), marks=pytest.mark.foreign),
    ],
    ids=["QEMU 7.2, stopped", "QEMU 11.1, live", "QEMU 11.1, live, with the in-flight region", "QEMU 11.1, postcopy"],
)
def test_memory_that_the_disk_wrote_is_whole_after_a_migration(
    suite: str, how: str, more: tuple[str, ...], disk_initramfs: str, tmp_path: Path
) -> None:
    image = new_image(tmp_path / "image")
    qemu = script("fetch-qemu", suite)
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    serve = ["blk", "--image", image, *(("--threads", "1") if more else ())]  # so that requests wait for their turn
    serve += ["--postcopy"] * (how == "postcopy")
    with Backend(here, *serve) as first, Backend(there, *serve) as second:
        common = ("--qemu", qemu, "--carrier", "blk", "--socket")
        with (
            Vm(here, disk_initramfs, *common, first.socket, "--", *more) as source,
            Vm(there, disk_initramfs, *common, second.socket, "--", *more, "-incoming", "defer", boots=False) as destination,
        ):
            source.run("disk_load /dev/vda 8 /tmp/stop >/tmp/load 2>&1 </dev/null &")
            wait_until(lambda: first.stats("blk")["reads"] > 1000, "the load is at it")
            migrate(source, destination, tmp_path / "migration.sock", how)
            source.close()
            wait_until(lambda: reads_on(destination, second) > 500, "the load goes on over there")
            assert more or second.stats("blk")["again"] == 0  # the source has finished all before it stopped
            destination.run("touch /tmp/stop; while pidof disk_load >/dev/null; do sleep 0.1; done")
            assert destination.run("cat /tmp/load").text.startswith("good: ")
            Disk(image, second, destination).check()
            assert "I/O error" not in destination.console_text()
