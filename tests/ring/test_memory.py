"""The memory map: what may be mapped, and for how long it stays."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from vhostsock._core import ffi, lib
from vhostsock.errors import FrontendError, UsageError
from vhostsock.memory import MemoryMap

TOP = 1 << 64
PAGE = mmap.PAGESIZE


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def read_gpa(memory: MemoryMap, gpa: int, size: int) -> bytes | None:
    ptr = lib.vs_mem_gpa(memory.ptr, gpa, size)
    return None if ptr == ffi.NULL else bytes(ffi.buffer(ptr, size))


def test_a_region_shows_the_bytes_of_the_file(memfd: int) -> None:
    os.pwrite(memfd, b"hello", 0x2000)
    memory = MemoryMap.empty().with_region(memfd, gpa=0x10000, size=0x8000, uva=0x7000_0000)
    assert len(memory) == 1
    assert read_gpa(memory, 0x12000, 5) == b"hello"
    assert lib.vs_mem_uva(memory.ptr, 0x7000_2000, 5) == lib.vs_mem_gpa(memory.ptr, 0x12000, 5)


UNALIGNED = [(0, 0x3B10), (1, 1), (0x123, 0x456), (0xFFF, 2), (0x1001, 0xFFF), (0x1FFF, 0x2002)]


@pytest.mark.parametrize(("offset", "size"), UNALIGNED)
def test_offset_and_size_need_not_be_page_aligned(memfd: int, offset: int, size: int) -> None:
    os.pwrite(memfd, bytes(i % 251 for i in range(0x8000)), 0)
    memory = MemoryMap.empty().with_region(memfd, gpa=0x10000, size=size, uva=0, offset=offset)
    assert read_gpa(memory, 0x10000, size) == os.pread(memfd, size, offset)
    assert read_gpa(memory, 0x10000, size + 1) is None
    assert read_gpa(memory, 0x10000 + size - 1, 1) == os.pread(memfd, 1, offset + size - 1)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"gpa": 0, "size": 0, "uva": 0}, "size 0"),
        ({"gpa": TOP - 0x1000, "size": 0x1000, "uva": 0}, "past the end of the address space"),
        ({"gpa": TOP - 1, "size": 0x1000, "uva": 0}, "past the end of the address space"),
        ({"gpa": 0, "size": 0x1000, "uva": TOP - 0x1000}, "past the end of the address space"),
        ({"gpa": 0, "size": 0x1000, "uva": TOP - 1}, "past the end of the address space"),
        ({"gpa": 0, "size": 0x1000, "uva": 0, "offset": TOP - 0x1000}, "past the end of any file"),
        ({"gpa": 0, "size": 0x1000, "uva": 0, "offset": TOP - 1}, "past the end of any file"),
        ({"gpa": 0, "size": 0x1000, "uva": 0, "offset": 1 << 63}, "past the end of any file"),
        ({"gpa": 0, "size": TOP - 1, "uva": 0}, "past the end of any file"),
        ({"gpa": 0, "size": (1 << 20) + 1, "uva": 0}, "the file has 0x100000 bytes"),
        ({"gpa": 0, "size": 0x1000, "uva": 0, "offset": (1 << 20) - 0xFFF}, "the file has 0x100000 bytes"),
    ],
)
def test_an_impossible_region_is_refused(memfd: int, where: dict[str, int], reason: str) -> None:
    with pytest.raises(FrontendError, match=reason):
        MemoryMap.empty().with_region(memfd, **where)
    assert lib.vs_region_count_live() == 0


def test_a_region_may_end_one_byte_below_2_64(memfd: int) -> None:
    memory = MemoryMap.empty().with_region(memfd, gpa=TOP - 0x1001, size=0x1000, uva=TOP - 0x1001)
    assert read_gpa(memory, TOP - 2, 1) == b"\0"
    assert read_gpa(memory, TOP - 2, 2) is None
    assert read_gpa(memory, TOP - 1, 1) is None
    # a length that would wrap around to something inside
    assert lib.vs_mem_gpa(memory.ptr, TOP - 2, TOP - 1) == ffi.NULL


def test_a_pipe_is_not_memory() -> None:
    r, w = os.pipe()
    try:
        with pytest.raises(FrontendError, match="not a file"):
            MemoryMap.empty().with_region(r, gpa=0, size=4096, uva=0)
    finally:
        os.close(r)
        os.close(w)


def test_a_closed_fd_is_not_memory() -> None:
    with pytest.raises(FrontendError, match="Bad file descriptor"):
        MemoryMap.empty().with_region(1 << 20, gpa=0, size=4096, uva=0)


def test_a_read_only_fd_is_refused_by_mmap() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4096)
    ro = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        with pytest.raises(FrontendError, match="mmap: Permission denied"):
            MemoryMap.empty().with_region(ro, gpa=0, size=4096, uva=0)
    finally:
        os.close(ro)
        os.close(fd)


OLD = {"gpa": 0x10000, "size": 0x2000, "uva": 0x70000}


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(0x10000, 0x2000), (0xF000, 0x1001), (0x11FFF, 1), (0x11FFF, 0x1000), (0x10001, 1), (0xF000, 0x8000), (0x10000, 1)],
)
@pytest.mark.parametrize("which", ["gpa", "uva"])
def test_an_overlap_in_gpa_or_uva_is_refused(memfd: int, which: str, gpa: int, size: int) -> None:
    memory = MemoryMap.empty().with_region(memfd, **OLD)
    new = {"gpa": 0x900000, "uva": 0x900000, "size": size}
    new[which] = OLD[which] + gpa - 0x10000
    with pytest.raises(FrontendError, match=r"overlaps \{gpa 0x10000, size 0x2000, uva 0x70000\}"):
        memory.with_region(memfd, **new)
    assert len(memory) == 1
    assert lib.vs_region_count_live() == 1


@pytest.mark.parametrize(("gpa", "uva"), [(0xF000, 0x6F000), (0x12000, 0x72000), (0xF000, 0x72000), (0x12000, 0x6F000)])
def test_adjacent_regions_do_not_overlap(memfd: int, gpa: int, uva: int) -> None:
    memory = MemoryMap.empty().with_region(memfd, **OLD).with_region(memfd, gpa=gpa, size=0x1000, uva=uva)
    assert len(memory) == 2


def test_a_region_is_removed_only_when_all_three_values_match(memfd: int) -> None:
    memory = MemoryMap.empty().with_region(memfd, **OLD)
    for wrong in ({"gpa": 0x10001}, {"size": 0x1000}, {"uva": 0}, {"gpa": 0}, {"gpa": 0x11000}):
        with pytest.raises(FrontendError, match="no memory region"):
            memory.without_region(**(OLD | wrong))
    assert len(memory.without_region(**OLD)) == 0
    assert len(memory) == 1  # a snapshot does not change


def test_the_513th_region_is_refused(memfd: int) -> None:
    memory = MemoryMap.empty()
    # not in order, so that insertion has to sort
    for i in sorted(range(lib.VS_MAX_REGIONS), key=lambda i: i * 7919 % 512):
        memory = memory.with_region(memfd, gpa=i * 0x2000, size=0x1000, uva=(511 - i) * 0x2000, offset=i % 256 * 0x1000)
    os.pwrite(memfd, b"x", 77 * 0x1000)
    assert read_gpa(memory, 77 * 0x2000, 1) == b"x"
    assert ffi.string(ffi.cast("char *", lib.vs_mem_uva(memory.ptr, (511 - 77) * 0x2000, 1))) == b"x"
    assert read_gpa(memory, 77 * 0x2000 + 0x1000, 1) is None  # the hole after it
    with pytest.raises(FrontendError, match="full: 512 regions"):
        memory.with_region(memfd, gpa=1 << 40, size=0x1000, uva=1 << 40)
    assert lib.vs_region_count_live() == 512


def test_a_snapshot_keeps_its_regions_and_shares_them(memfd: int) -> None:
    first = MemoryMap.empty().with_region(memfd, **OLD)
    second = first.with_region(memfd, gpa=0, size=0x1000, uva=0)
    assert lib.vs_region_count_live() == 2
    first.close()
    assert lib.vs_region_count_live() == 2
    third = second.without_region(**OLD)
    assert lib.vs_region_count_live() == 2
    second.close()
    assert lib.vs_region_count_live() == 1
    third.close()
    third.close()
    assert lib.vs_region_count_live() == 0
    with pytest.raises(UsageError, match="closed"):
        len(third)


def test_the_fd_may_be_closed_after_mapping(memfd: int) -> None:
    fd = os.dup(memfd)
    memory = MemoryMap.empty().with_region(fd, **OLD)
    os.close(fd)
    os.pwrite(memfd, b"still", 0)
    assert read_gpa(memory, 0x10000, 5) == b"still"


def test_a_hugetlb_file_is_mapped_in_its_own_units() -> None:
    # no huge page need be there: the mapping reserves none, and is not touched
    fd = os.memfd_create("ram", os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, 64 << 20)
        memory = MemoryMap.empty().with_region(fd, gpa=0, size=(1 << 20) + 5, uva=0, offset=(33 << 20) + 0x1000)
    finally:
        os.close(fd)
    start = int(ffi.cast("uintptr_t", lib.vs_mem_gpa(memory.ptr, 0, (1 << 20) + 5)))
    assert start % (1 << 20) == 0x1000
    memory.close()
    assert lib.vs_region_count_live() == 0


def test_guest_memory_is_left_out_of_core_dumps(memfd: int) -> None:
    memory = MemoryMap.empty().with_region(memfd, **OLD)
    start = int(ffi.cast("uintptr_t", lib.vs_mem_gpa(memory.ptr, 0x10000, 1)))
    with open("/proc/self/smaps") as smaps:
        blocks = smaps.read().split(f"{start:x}-")
    flags = next(line for line in blocks[1].splitlines() if line.startswith("VmFlags:"))
    assert "dd" in flags.split()
