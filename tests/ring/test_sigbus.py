"""A front-end that truncates guest memory under our mapping ends its session, never the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.ring.conftest import MakePair, Pair
from vhostsock._core import ffi, lib
from vhostsock.errors import FrontendError
from vhostsock.memory import MemoryMap


def truncated(size: int = 1 << 20, left: int = 0, offset: int = 0) -> MemoryMap:
    fd = os.memfd_create("ram")
    try:
        os.ftruncate(fd, size + offset)
        os.pwrite(fd, b"\xaa" * (size + offset), 0)
        memory = MemoryMap.empty().with_region(fd, gpa=0, size=size, uva=0, offset=offset)
        os.ftruncate(fd, left)
    finally:
        os.close(fd)
    return memory


def byte_at(memory: MemoryMap, gpa: int) -> int:
    return int(ffi.cast("uint8_t *", lib.vs_mem_gpa(memory.ptr, gpa, 1))[0])


def test_a_load_from_truncated_memory_finds_zeros_and_poisons_the_map() -> None:
    memory = truncated()
    assert not memory.poisoned
    assert byte_at(memory, 0x4321) == 0
    assert memory.poisoned


def test_a_store_to_truncated_memory_completes() -> None:
    memory = truncated(offset=0x123)
    ptr = ffi.cast("uint8_t *", lib.vs_mem_gpa(memory.ptr, 0xFFFFF, 1))
    ptr[0] = 7
    assert memory.poisoned
    assert byte_at(memory, 0) == 0


def test_memory_that_is_left_stays_readable_until_the_first_fault() -> None:
    memory = truncated(left=0x1000)
    assert byte_at(memory, 0xFFF) == 0xAA
    assert not memory.poisoned
    assert byte_at(memory, 0x1000) == 0
    assert memory.poisoned


def test_only_the_truncated_region_is_poisoned() -> None:
    victim, other = truncated(), truncated(left=1 << 20)
    byte_at(victim, 0)
    assert victim.poisoned
    assert not other.poisoned
    assert byte_at(other, 0) == 0xAA
    fresh = truncated(left=1 << 20)  # may get the same guard and the same address later
    victim.close()
    again = truncated(left=1 << 20)
    assert not fresh.poisoned
    assert not again.poisoned


def test_more_regions_than_a_chunk_of_guards_are_guarded() -> None:
    maps = [truncated(size=0x1000) for _ in range(200)]
    assert [byte_at(m, 0) for m in maps] == [0] * 200
    assert all(m.poisoned for m in maps)


def test_threads_may_fault_and_map_at_the_same_time() -> None:
    seen: list[bool] = []

    def work() -> None:
        for _ in range(50):
            memory = truncated(size=0x3000)
            seen.append(byte_at(memory, 0x2000) == 0 and memory.poisoned)
            memory.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == [True] * 200


def test_a_ring_in_truncated_memory_breaks_and_blames_the_front_end(pair: Pair) -> None:
    pair.queue.submit([b"x"])
    os.ftruncate(pair.memory.regions[0].fd, 0)
    with pytest.raises(FrontendError, match="truncated guest memory"):
        pair.vring.pop()
    assert pair.vring.broken
    assert pair.vring.stop() == 0


def test_a_buffer_in_truncated_memory_reads_as_zeros(make_pair: MakePair) -> None:
    pair = make_pair(sizes=(1 << 16, 1 << 16), indirect=False)
    buffer = pair.memory.alloc(64, region=1)
    pair.memory.write(buffer, b"\xaa" * 64)
    pair.queue.write_desc(0, buffer, 64)
    pair.queue.offer(0)
    pair.queue.publish()
    chain = pair.vring.pop()
    assert chain is not None
    os.ftruncate(pair.memory.regions[1].fd, 0)
    assert chain.read() == bytes(64)
    with pytest.raises(FrontendError, match="truncated guest memory"):
        pair.vring.pop()
    chain.complete()


FOREIGN = """
import ctypes, faulthandler, mmap, os, signal, sys
from vhostsock.memory import MemoryMap
if sys.argv[1] == "faulthandler":
    faulthandler.enable()
elif sys.argv[1] == "ignore":
    signal.signal(signal.SIGBUS, signal.SIG_IGN)
fd = os.memfd_create("ram")
os.ftruncate(fd, 4096)
guarded = MemoryMap.empty().with_region(fd, gpa=0, size=4096, uva=0)
view = mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
if sys.argv[2] == "fault":
    view[0]
else:
    os.kill(os.getpid(), signal.SIGBUS)
print("survived")
"""


@pytest.mark.parametrize(
    ("before", "how", "survives"),
    [
        ("default", "fault", False),
        ("default", "kill", False),
        ("faulthandler", "fault", False),
        ("ignore", "fault", False),  # the kernel does not let a fault be ignored
        ("ignore", "kill", True),
    ],
)
def test_a_fault_elsewhere_goes_to_the_handler_that_was_there(before: str, how: str, survives: bool) -> None:
    # under a sanitizer, its own handler would be the one that was there
    env = os.environ | {"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":handle_sigbus=0"}
    command = [sys.executable, "-P", "-c", FOREIGN, before, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.returncode == (0 if survives else -signal.SIGBUS), done.stderr
    assert done.stdout == ("survived\n" if survives else "")
    assert ("Fatal Python error: Bus error" in done.stderr) == (before == "faulthandler")
