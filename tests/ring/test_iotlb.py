# SPDX-License-Identifier: BSD-3-Clause
"""The device IOTLB: the table of IOVA ranges, and the views made of it and a memory map."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostsock._core import ffi, lib
from vhostsock.errors import FrontendError
from vhostsock.iotlb import Iotlb
from vhostsock.memory import MemoryMap

R, W, RW = 1, 2, 3
PAGE = 4096
TOP = 1 << 64
UVA = 0x7000_0000


@contextlib.contextmanager
def memory_of(pages: int, *, uva: int = UVA) -> Iterator[MemoryMap]:
    """Guest memory whose byte at each page's start is the page's number."""
    fd = os.memfd_create("guest")
    try:
        os.ftruncate(fd, pages * PAGE)
        for page in range(pages):
            os.pwrite(fd, bytes([page]), page * PAGE)
        yield MemoryMap.empty().with_region(fd, gpa=1 << 40, size=pages * PAGE, uva=uva)
    finally:
        os.close(fd)


def byte(view: MemoryMap, iova: int, size: int = 1) -> int | None:
    pointer = lib.vs_mem_gpa(view.ptr, iova, size)
    return None if pointer == ffi.NULL else int(ffi.cast("uint8_t *", pointer)[0])


def missing(view: MemoryMap, iova: int, size: int, perm: int = R) -> int | None:
    at = ffi.new("uint64_t *")
    return int(at[0]) if lib.vs_mem_missing(view.ptr, iova, size, perm, at) else None


def test_an_iova_is_where_the_front_end_said() -> None:
    with memory_of(4) as memory:
        tlb = Iotlb()
        tlb.update(0xF000, PAGE, UVA + 2 * PAGE, RW)
        view = tlb.view(memory)
        assert byte(view, 0xF000, PAGE) == 2
        assert byte(view, 0xEFFF) is None
        assert byte(view, 0x10000) is None
        assert byte(view, 1 << 40) is None  # the guest-physical address means nothing here


def test_a_view_outlives_what_it_was_made_of() -> None:
    with memory_of(2) as memory:
        tlb = Iotlb()
        tlb.update(0, PAGE, UVA + PAGE, RW)
        view = tlb.view(memory)
        tlb.invalidate(0, PAGE)
        memory.close()
        assert byte(view, 0) == 1
        assert tlb.entries == 0


def test_pages_that_follow_each_other_on_both_sides_are_one_range() -> None:
    with memory_of(8) as memory:
        tlb = Iotlb()
        for page in (3, 1, 2):
            tlb.update(page * PAGE, PAGE, UVA + page * PAGE, RW)
        assert byte(tlb.view(memory), PAGE, 3 * PAGE) == 1
        tlb.update(4 * PAGE, PAGE, UVA, RW)  # goes on in the guest's addresses, not in ours
        view = tlb.view(memory)
        assert byte(view, PAGE, 4 * PAGE) is None
        assert missing(view, PAGE, 4 * PAGE) is None
        tlb.update(4 * PAGE, PAGE, UVA + 4 * PAGE, R)  # goes on in both, with other permissions
        assert byte(tlb.view(memory), PAGE, 4 * PAGE) is None


def test_permissions_are_those_of_each_page() -> None:
    with memory_of(4) as memory:
        tlb = Iotlb()
        for page, perm in enumerate((RW, R, W, 0)):
            tlb.update(page * PAGE, PAGE, UVA + page * PAGE, perm)
        view = tlb.view(memory)
        assert [missing(view, 0, 4 * PAGE, perm) for perm in (R, W, RW)] == [2 * PAGE, PAGE, PAGE]
        assert missing(view, 2 * PAGE, PAGE, W) is None
        assert missing(view, 3 * PAGE - 1, 2, W) == 3 * PAGE


def test_an_entry_outside_of_guest_memory_is_a_miss_and_one_that_ends_outside_counts_up_to_there() -> None:
    with memory_of(2) as memory:
        tlb = Iotlb()
        tlb.update(0, 4 * PAGE, UVA + PAGE, RW)
        tlb.update(1 << 30, PAGE, UVA - PAGE, RW)
        view = tlb.view(memory)
        assert byte(view, 0, PAGE) == 1
        assert missing(view, 0, 4 * PAGE) == PAGE
        assert missing(view, 1 << 30, 1) == 1 << 30


def test_an_update_replaces_what_was_there_in_part() -> None:
    with memory_of(8) as memory:
        tlb = Iotlb()
        tlb.update(0, 4 * PAGE, UVA, RW)
        tlb.update(PAGE, PAGE, UVA + 7 * PAGE, RW)
        view = tlb.view(memory)
        assert [byte(view, page * PAGE) for page in range(5)] == [0, 7, 2, 3, None]
        assert tlb.entries == 3


def test_the_whole_address_space_can_be_one_entry_and_one_invalidation() -> None:
    with memory_of(1, uva=0) as memory:
        tlb = Iotlb()
        tlb.update(0, TOP - 1, 0, RW)
        assert missing(tlb.view(memory), 0, PAGE) is None
        tlb.invalidate(0, TOP - 1)
        tlb.update(TOP - PAGE, PAGE, 0, RW)
        assert missing(tlb.view(memory), TOP - PAGE, PAGE) is None
        tlb.invalidate(PAGE, TOP - 1)  # to the end of all addresses
        assert tlb.entries == 0


@pytest.mark.parametrize(
    ("iova", "size", "uva", "perm"),
    [(0, 0, 0, RW), (TOP - 1, 2, 0, RW), (0, 2, TOP - 1, RW), (0, 1, 0, 4), (0, 1, 0, 255)],
)
def test_what_no_entry_can_be_is_refused(iova: int, size: int, uva: int, perm: int) -> None:
    tlb = Iotlb()
    with pytest.raises(FrontendError, match="IOTLB update"):
        tlb.update(iova, size, uva, perm)
    with pytest.raises(FrontendError, match="IOTLB invalidation"):
        tlb.invalidate(0, 0)
    assert tlb.entries == 0


def test_a_full_table_forgets_its_oldest_entry() -> None:
    with memory_of(1) as memory:
        tlb = Iotlb()
        for page in range(lib.VS_IOTLB_MAX + 10):
            tlb.update(2 * page * PAGE, PAGE, UVA, RW)
        assert tlb.entries == lib.VS_IOTLB_MAX
        view = tlb.view(memory)
        assert missing(view, 2 * 9 * PAGE, 1) is not None
        assert missing(view, 2 * 10 * PAGE, 1) is None
        # a hole in the middle of one splits it, which needs a place, too
        tlb.update(0, 3, UVA, RW)
        tlb.invalidate(1, 1)
        assert tlb.entries == lib.VS_IOTLB_MAX


Change = tuple[bool, int, int, int, int]
CHANGES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 20), st.integers(0, 40), st.integers(0, 3)), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(CHANGES)
def test_any_changes_leave_what_a_dictionary_of_bytes_would_have(changes: list[Change]) -> None:
    with memory_of(1, uva=0) as memory:
        tlb, model = Iotlb(), dict[int, tuple[int, int]]()
        for update, iova, size, uva, perm in changes:
            if update:
                tlb.update(iova, size, uva, perm)
                model.update({iova + i: (uva + i, perm) for i in range(size)})
            else:
                tlb.invalidate(iova, size)
                for i in range(size):
                    model.pop(iova + i, None)
        view = tlb.view(memory)
        base = int(ffi.cast("uintptr_t", lib.vs_mem_uva(memory.ptr, 0, 1)))
        for iova in range(64):
            pointer = lib.vs_mem_gpa(view.ptr, iova, 1)
            if iova not in model:
                assert pointer == ffi.NULL
                continue
            uva, perm = model[iova]
            assert int(ffi.cast("uintptr_t", pointer)) == base + uva
            for asked in (R, W, RW):
                assert (missing(view, iova, 1, asked) is None) == (perm & asked == asked)
