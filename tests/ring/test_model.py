"""The C rings against plain Python models, on rings that no one would write by hand."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.ring import model
from vhostsock._core import ffi, lib
from vhostsock.errors import DriverError, FrontendError
from vhostsock.memory import InflightArea, MemoryMap
from vhostsock.ring import Chain, Vring
from vhostsock.testing.driver import DriverQueue, GuestMemory, Request, RingFull
from vhostsock.testing.packed import PackedQueue

NUM = 8
SIZE = 1 << 16
GPA = 0x4000_0000
END = GPA + 3 * SIZE  # of three adjacent regions
PROFILE = settings(max_examples=int(os.environ.get("VHOSTSOCK_EXAMPLES", "300")), deadline=None, derandomize=True,
                   suppress_health_check=list(HealthCheck))  # fmt: skip

# values near every edge are much likelier than in a uniform draw
inside = st.integers(GPA + 0x8000, GPA + 0xA000)
edges = st.sampled_from([GPA - 1, GPA, GPA + SIZE - 1, GPA + 2 * SIZE - 8, END - 1, END, 0, 2**64 - 1, 2**64 - 16])
addresses = st.one_of(inside, edges)
lengths = st.one_of(st.integers(0, 64), st.sampled_from([16, 16 * NUM, 16 * NUM + 16, SIZE, 2 * SIZE, 2**31, 2**32 - 1]))
flags = st.one_of(st.sampled_from([0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 7]), st.integers(0, 0xFFFF))
nexts = st.one_of(st.integers(0, NUM), st.sampled_from([65535]))
descriptors = st.tuples(addresses, lengths, flags, nexts)
# mostly sane chains, so that long legal ones appear too: descriptor i leads to i + 1
sane = st.tuples(st.one_of(inside, inside, inside, edges), st.integers(0, 40), st.sampled_from([0, 2]), st.just(0))
# (descriptors, link each to the next one)
tables = st.one_of(
    st.tuples(st.lists(descriptors, min_size=1, max_size=NUM + 1), st.booleans()),
    st.tuples(st.lists(sane, min_size=1, max_size=NUM), st.just(True)),
    st.tuples(st.lists(sane, min_size=1, max_size=NUM).map(lambda table: sorted(table, key=lambda d: d[2])), st.just(True)),
)


def as_table(descs: list[tuple[int, int, int, int]], linked: bool) -> bytes:
    rows = []
    for i, (addr, size, flag, following) in enumerate(descs):
        if linked:
            last = i == len(descs) - 1
            flag, following = (flag, 0) if last else (flag | 1, i + 1)
        rows.append(struct.pack("<QIHH", addr, size, flag, following))
    return b"".join(rows)


@pytest.mark.parametrize("indirect", [False, True])
def test_any_descriptor_table_is_judged_as_the_model_does(indirect: bool) -> None:
    outcomes: Counter[str] = Counter()

    @PROFILE
    @given(
        ring=tables,
        table=tables,
        table_at=st.sampled_from([None, 0, 1, 3]),
        table_len=st.one_of(st.none(), lengths),
        head=st.integers(0, NUM),
    )
    def judge(
        ring: tuple[list[Any], bool], table: tuple[list[Any], bool], table_at: int | None, table_len: int | None, head: int
    ) -> None:
        with GuestMemory(SIZE, SIZE, SIZE, gpa=GPA) as memory, DriverQueue(memory, NUM, indirect=indirect) as queue:
            memory.write(GPA + 0x8000, bytes(range(256)) * 64)
            memory.write(queue.desc, as_table(ring[0][:NUM], ring[1]))
            where = GPA + 0xC000
            memory.write(where, as_table(*table))
            if table_at is not None and table_at < min(NUM, len(ring[0])):  # refers to the table, mostly rightly
                queue.write_desc(table_at, where, 16 * len(table[0]) if table_len is None else table_len, 4)
            plain = model.Memory([(r.gpa, memory.read) for r in memory.regions], [r.size for r in memory.regions])
            expected: list[model.Buffer] | str
            try:
                expected = model.chain(plain, queue.desc, NUM, head, indirect)
            except model.Broken as error:
                expected = str(error)
            outcomes[expected if isinstance(expected, str) else "legal"] += 1
            vring = Vring(0)
            try:
                queue.attach(vring)
                queue.offer(head)
                queue.publish()
                if isinstance(expected, str):
                    with pytest.raises(DriverError):
                        vring.pop()
                    return
                chain = vring.pop()
                assert chain is not None
                compare(chain, expected, memory, vring)
                chain.complete()
            finally:
                vring.close()

    judge()
    # the draw reaches the legal case and the commonest ways to be broken; test_hostile.py has each of them by hand
    common = {"legal", "readable after writable", "buffer not in memory", "head out of range", "indirect rules"}
    assert common <= set(outcomes), outcomes


def compare(chain: Chain, expected: list[model.Buffer], memory: GuestMemory, vring: Vring) -> None:
    """The chain has exactly these buffers: sizes, contents, and the guest addresses that its iovecs translate back to."""
    readable = [b for b in expected if not b.writable]
    writable = [b for b in expected if b.writable]
    assert chain.readable == sum(b.size for b in readable)
    assert chain.writable == sum(b.size for b in writable)
    assert chain.read() == b"".join(memory.read(b.addr, b.size) for b in readable)
    raw = chain.ptr
    base = {}
    for region in memory.regions:
        pointer = lib.vs_mem_gpa(raw.mem, region.gpa, 1)
        base[int(ffi.cast("uintptr_t", pointer))] = region
    seen = []
    for i in range(raw.n_out + raw.n_in):
        host, size = int(ffi.cast("uintptr_t", raw.iov[i].iov_base)), raw.iov[i].iov_len
        start, region = next((s, r) for s, r in base.items() if s <= host < s + r.size)
        assert size
        assert host + size <= start + region.size
        seen += [(region.gpa + host - start + k, i >= raw.n_out) for k in (0, size - 1)]
    ends = [(a, b.writable) for b in expected if b.size for a in split(b, memory)]
    assert seen == ends


def split(buffer: model.Buffer, memory: GuestMemory) -> list[int]:
    """First and last address of each piece of a buffer, cut at region edges."""
    out = []
    addr, size = buffer.addr, buffer.size
    for region in memory.regions:
        if region.gpa <= addr < region.gpa + region.size and size:
            step = min(size, region.gpa + region.size - addr)
            out += [addr, addr + step - 1]
            addr, size = addr + step, size - step
    return out


class RingMachine(RuleBasedStateMachine):
    """Driver and device take turns in any order. Nothing is lost or doubled, and (split) each notification is the model's.

    With IN_ORDER completions wait for older ones. With an in-flight region the device may be stopped with anything under way,
    or killed, and what was not used comes again in the order in which it was first taken.
    """

    @initialize(
        num=st.sampled_from([1, 2, 4, 8]), base=st.sampled_from([0, 65530, 65535, 32767]), event_idx=st.booleans(),
        indirect=st.booleans(), in_order=st.booleans(), tracked=st.booleans(), packed=st.booleans(),
    )  # fmt: skip
    def setup(
        self, num: int, base: int, event_idx: bool, indirect: bool, in_order: bool, tracked: bool, packed: bool
    ) -> None:
        self.memory = GuestMemory(1 << 18)
        self.packed = packed
        if packed:  # some place of some lap, in both halves; and no power of 2
            num += num > 2
            base = (base % num | (base & 1) << 15) * 0x1_0001
        kind = PackedQueue if packed else DriverQueue
        self.queue = kind(self.memory, num, base=base, event_idx=event_idx, indirect=indirect, in_order=in_order)
        self.file = -1
        if tracked:
            self.size, self.file = InflightArea.create(num_queues=1, queue_size=num, packed=packed)
        self.new_vring()
        self.added: list[Request] = []  # not yet visible
        self.offered: list[Request] = []  # visible, not popped; those that come again are in front
        self.popped: list[tuple[Request, Chain]] = []  # and not completed, but in_order: not used
        self.completed: list[Request] = []  # pushed, not yet visible
        self.used: list[Request] = []  # visible to the driver
        self.kept: set[int] = set()  # in_order: of popped, by id: completed, but not the oldest
        self.taken: dict[int, int] = {}  # by id: its place in the order of first popping
        self.holes = False  # a chain was completed before an older one that is still open
        self.used_shown = base  # used.idx as the driver may see it
        self.answers: dict[int, bytes] = {}
        self.count = 0

    def new_vring(self) -> None:
        self.vring = Vring(0)
        if self.file >= 0:
            area = InflightArea(self.file, size=self.size, num_queues=1, queue_size=self.queue.num, packed=self.packed)
            self.vring.set_inflight(area)
            area.close()
        self.queue.attach(self.vring)

    def teardown(self) -> None:
        if hasattr(self, "vring"):
            self.vring.close()
            self.queue.close()
            self.memory.close()
            if self.file >= 0:
                os.close(self.file)

    @rule(readable=st.lists(st.integers(0, 9), max_size=3), writable=st.lists(st.integers(0, 9), max_size=3))
    def add(self, readable: list[int], writable: list[int]) -> None:
        assume(readable or writable)
        assume(len(readable) + len(writable) <= self.queue.num)
        self.count += 1
        data = [bytes([self.count % 256]) * max(1, n) for n in readable]
        try:
            self.added.append(self.queue.add(data, [max(1, n) for n in writable]))
        except RingFull:
            assert self.queue.in_flight

    @rule()
    def publish_and_kick(self) -> None:
        wanted = None if self.packed else self.kick_wanted()
        self.queue.publish()
        self.offered += self.added
        self.added = []
        kicked = self.queue.kick()
        assert kicked == self.queue.take_kick()
        assert wanted in (None, kicked)

    def kick_wanted(self) -> bool:
        if self.queue.event_idx:
            return model.notify_wanted(self.queue._kicked, self.queue._avail_next, self.queue.avail_event)
        return not self.queue.used_flags & 1

    @rule(limit=st.integers(1, 9))
    def pop(self, limit: int) -> None:
        chains = self.vring.pop_batch(limit)
        taken, self.offered = self.offered[:limit], self.offered[limit:]
        assert len(chains) == len(taken)
        for request, chain in zip(taken, chains, strict=True):
            assert chain.read() == b"".join(self.memory.read(a, n) for a, n in request.readable)
            assert chain.writable == request.room
            assert chain.again == (self.file >= 0 and id(request) in self.taken)
            self.taken.setdefault(id(request), len(self.taken))
            self.popped.append((request, chain))

    @precondition(lambda self: len(self.popped) > len(self.kept))
    @rule(which=st.integers(0, 100), size=st.integers(0, 30))
    def complete(self, which: int, size: int) -> None:
        still_open = [i for i, (request, _) in enumerate(self.popped) if id(request) not in self.kept]
        which = still_open[0 if which < 50 else which % len(still_open)]
        request, chain = self.popped[which]
        self.answers[id(request)] = os.urandom(size)[: request.room]
        assert chain.write(self.answers[id(request)]) == min(size, request.room)
        chain.complete()
        if self.queue.in_order:
            self.kept.add(id(request))
            while self.popped and id(self.popped[0][0]) in self.kept:
                self.kept.discard(id(self.popped[0][0]))
                self.completed.append(self.popped.pop(0)[0])
        else:
            self.completed.append(self.popped.pop(which)[0])
            self.holes = bool(self.popped) and (self.holes or which > 0)

    @rule()
    def flush(self) -> None:
        wanted = None if self.packed else self.call_wanted()
        called = self.vring.flush()
        assert called == self.queue.take_call()
        assert wanted in (None, called)
        assert self.completed or not called
        self.used_shown = (self.used_shown + len(self.completed)) % 65536
        self.used += self.completed
        self.completed = []

    def call_wanted(self) -> bool:
        if self.queue.event_idx:
            new = (self.used_shown + len(self.completed)) % 65536
            return model.notify_wanted(self.used_shown, new, self.queue.used_event)
        return bool(self.completed) and not self.queue.avail_flags & 1

    @rule()
    def collect(self) -> None:
        done = self.queue.collect()
        assert done == self.used
        for request in done:
            assert request.data == self.answers.pop(id(request))
            del self.taken[id(request)]
        self.used = []

    @rule(on=st.booleans())
    def calls(self, on: bool) -> None:
        if on:
            assert self.queue.enable_calls() == bool(self.used)
        else:
            self.queue.disable_calls()

    @rule(on=st.booleans())
    def kicks(self, on: bool) -> None:
        if on:
            assert self.vring.enable_kick() == bool(self.offered)
        else:
            self.vring.disable_kick()

    @rule()
    def stop_and_start(self) -> None:
        tracked = self.file >= 0
        if self.holes and not tracked:  # the device has to complete what it holds before
            while self.popped:
                self.complete(0, 3)
        self.flush()
        late = self.popped
        self.come_again(self.popped)
        in_region = sum(id(request) in self.taken for request in self.offered) if tracked else 0
        base = self.vring.stop()
        assert self.packed or base == (self.queue.avail_idx - len(self.offered) + in_region) % 65536
        self.vring.set_base(self.queue.base if tracked else base)  # what it says does not matter then
        self.vring.start()
        assert self.queue.take_call() == tracked
        self.popped = []
        for _, chain in late:
            chain.complete()
        assert not self.vring.flush()

    @precondition(lambda self: self.file >= 0)
    @rule()
    def kill_and_take_over(self) -> None:
        old = self.vring
        self.come_again([*self.popped, *((request, None) for request in self.completed)])
        self.popped, self.completed = [], []
        with pytest.raises(FrontendError):  # a ring without memory flushes nothing any more, as if it had died
            old.set_memory(MemoryMap.empty())
        self.new_vring()
        assert self.queue.take_call()
        old.close()

    def come_again(self, open_: Sequence[tuple[Request, Chain | None]]) -> None:
        """What is open is in front of what is offered, in the order of first popping; and was never answered."""
        again = sorted((request for request, _ in open_), key=lambda request: self.taken[id(request)])
        # those that came again already and were not popped since are as old
        waiting = [request for request in self.offered if self.file >= 0 and id(request) in self.taken]
        rest = [request for request in self.offered if request not in waiting]
        self.offered = sorted(again + waiting, key=lambda request: self.taken[id(request)]) + rest
        for request in again:
            self.answers.pop(id(request), None)
        self.kept.clear()
        self.holes = False

    @invariant()
    def nothing_is_broken(self) -> None:
        if hasattr(self, "vring"):
            assert not self.vring.broken, self.vring.error
            assert self.vring.has_available == bool(self.offered)
            assert self.packed or self.queue.used_idx == self.used_shown


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(PROFILE, stateful_step_count=60, max_examples=PROFILE.max_examples // 3)
