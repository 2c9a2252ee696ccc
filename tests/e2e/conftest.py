# SPDX-License-Identifier: BSD-3-Clause
"""What the end-to-end tests share: the guest's files, made once a run; and the kernel's complaints, which fail the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.vm import WITHIN, Vm, script

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of this folder are marked, and come last: what is quick to tell is told first."""
    items.sort(key=lambda item: HERE in item.path.parents)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def stock_initramfs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A guest with nothing of ours but the agent: busybox and stock modules."""
    script("fetch-qemu")
    return script("mkinitramfs", "-o", str(tmp_path_factory.mktemp("initramfs") / "stock.cpio"))


def whole_initramfs(folder: Path, suite: str = "bookworm", *build: str) -> str:
    """A guest's root for the cloud kernel of that Debian suite: busybox, stock modules, ours, every program of tests/e2e/guest.

    build: more options of build-guest-module.
    """
    return initramfs_of(folder, script("fetch-kernel", suite), script("build-guest-module", "--suite", suite, *build))


def initramfs_of(folder: Path, kernel: str, module: str) -> str:
    """The same for a folder of fetch-kernel, and with a module built for it."""
    programs = [word for path in sorted((HERE / "guest").glob("*.c")) for word in ("--program", str(path))]
    return script("mkinitramfs", "--kernel", kernel, "--module", module, *programs, "-o", str(folder / "root.cpio"))


def hears_of_its_death(guest: Vm, how: str) -> None:
    """Its kernel dies of the command ``how``: who waits for the command hears of it before its limit, and of what it died."""
    with pytest.raises(ConnectionError, match=r"gone while .*; the end of its console:[^$]*Kernel panic"):
        guest.run(how, timeout=10 * WITHIN)
    guest.process.wait(WITHIN)
    with pytest.raises(AssertionError, match="the guest's kernel complains"):
        guest.check_console()


@pytest.fixture(scope="session")
def device_initramfs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Busybox, stock modules, and the program that looks whether frames come back."""
    out = tmp_path_factory.mktemp("initramfs") / "devices.cpio"
    return script("mkinitramfs", "--program", str(HERE / "guest" / "loop_check.c"), "-o", str(out))


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """That of bookworm, which most tests boot."""
    script("fetch-qemu")
    return whole_initramfs(tmp_path_factory.mktemp("initramfs"))


@pytest.fixture(scope="session")
def disk_initramfs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Busybox, stock modules, and the program that loads a disk."""
    script("fetch-qemu")
    out = tmp_path_factory.mktemp("initramfs") / "disk.cpio"
    return script("mkinitramfs", "--program", str(HERE / "guest" / "disk_load.c"), "-o", str(out))


@pytest.fixture(autouse=True)
def guest_kernel_does_not_complain() -> Iterator[None]:
    """Fail a test in whose time the kernel of a guest said BUG, Oops, WARNING, panic or the like."""
    yield
    for vm in Vm.live:
        vm.check_console()
