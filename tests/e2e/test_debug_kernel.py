# SPDX-License-Identifier: BSD-3-Clause
"""The guest module on a kernel that checks itself (build-debug-kernel): KASAN, lockdep, sleeping while atomic, kmemleak.

What the kernel says on its console fails the test in whose time it says it. By hand: tests/run --debug-kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import hears_of_its_death, initramfs_of
from tests.e2e.site import Site, site
from tests.e2e.vm import Vm, script, wait_until

pytestmark = [pytest.mark.debug, pytest.mark.timeout(3600)]
DIE = "echo 1 >/proc/sys/vm/panic_on_oom; echo 4000000 >/proc/sys/vm/min_free_kbytes; tail /dev/zero"  # it has no SysRq


def booted(kernel: str) -> tuple[str, ...]:
    """Options of a guest of that kernel, on a QEMU with processors that run in parallel."""
    return ("--qemu", script("fetch-qemu", "trixie"), "--kernel", kernel, "--memory", "1G", "--smp", "2")


@contextmanager
def debug_site(folder: Path, *build: str) -> Iterator[Site]:
    """build: more options of build-guest-module."""
    kernel = script("build-debug-kernel", timeout=7200)
    root = initramfs_of(folder, kernel, script("build-guest-module", "--headers", f"{kernel}/headers", *build))
    with site(folder, root, *booted(kernel), pairs=2) as it:
        yield it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with debug_site(tmp_path_factory.mktemp("site")) as it:
        yield it


def scan_for_leaks(place: Site) -> str:
    """What kmemleak finds that names our module, after two scans: the first may see what is on its way."""
    place.vm.run("grep -q ' /sys/kernel/debug ' /proc/mounts || mount -t debugfs debug /sys/kernel/debug")
    for _ in range(2):
        place.vm.run("echo scan >/sys/kernel/debug/kmemleak", timeout=300)
    return place.vm.run("grep -B12 virtio_socket /sys/kernel/debug/kmemleak; true", timeout=100).text


def test_the_kernel_checks_itself(place: Site) -> None:
    """Or else the tests below say little."""
    place.vm.run("test -e /proc/lockdep_stats")
    assert "KernelAddressSanitizer initialized" in place.vm.run("dmesg").text


def test_takeover_claims_hold(place: Site) -> None:
    place.check("takeover_check 10.0.0.5 7000 fd00::5 7000 192.0.2.1", timeout=1200)
    wait_until(lambda: place.backend.stats("vm1")["flows"] == 0, "the device has no flow")


@pytest.mark.parametrize(("host", "denied"), [("10.0.0.5", "10.66.0.0 80 13"), ("fd00::5", "")], ids=["IPv4", "IPv6"])
def test_stream_claims_hold(place: Site, host: str, denied: str) -> None:
    place.check_streams(host, denied)


def test_datagram_claims_hold(place: Site) -> None:
    place.check_datagrams()


def test_listener_and_datagram_server_claims_hold(place: Site) -> None:
    place.check_listener()
    place.check_datagram_server()


def test_pages_are_used_again_and_let_go(place: Site) -> None:
    place.check("pages_check 10.0.0.5 7000", timeout=1200)


def test_windows_grow_for_who_needs_them(place: Site) -> None:
    place.check("window_check 10.0.0.5 7000", timeout=1200)


def test_who_waits_looks_before_sleeping(place: Site) -> None:
    place.check("look_check 10.0.0.5 7000", timeout=1200)


def test_lives_leave_nothing(place: Site) -> None:
    """The last test of this file says it: kmemleak knows, and KASAN's quarantine makes counts of objects mean little."""
    place.check("LIVES_UNCOUNTED=1 life_check 10.0.0.5 7000 7001 7004 192.0.2.1 150", timeout=1200)


def test_all_who_wait_hear_that_the_guest_was_suspended(place: Site) -> None:
    place.check_gone(place.suspend_and_wake, back=True)


def test_all_who_wait_hear_that_the_device_was_unplugged(place: Site) -> None:
    place.check_gone(place.vm.unplug)
    place.plug_again()


def test_locks_are_taken_in_one_order_and_nothing_was_leaked(place: Site) -> None:
    locks = place.vm.run("cat /proc/lockdep_stats").text.split()
    assert locks[locks.index("debug_locks:") + 1] == "1", "lockdep gave up: it found something"
    leaks = scan_for_leaks(place)
    assert not leaks, leaks


def test_threads_that_linger_between_two_steps_spoil_nothing(tmp_path: Path) -> None:
    with debug_site(tmp_path, "--races") as races:
        races.check_races()
        leaks = scan_for_leaks(races)
        assert not leaks, leaks


def test_whoever_waits_for_this_kernel_hears_at_once_that_it_died(tmp_path: Path) -> None:
    """Or else each test above would end by its limit of time."""
    kernel = script("build-debug-kernel", timeout=7200)
    root = script("mkinitramfs", "--kernel", kernel, "-o", str(tmp_path / "root.cpio"))
    with Vm(tmp_path, root, *booted(kernel)) as guest:
        hears_of_its_death(guest, DIE)
