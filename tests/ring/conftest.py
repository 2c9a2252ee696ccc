"""A driver and a device on one ring in shared memory, without any process but this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from vhostsock.ring import Vring
from vhostsock.testing.driver import DriverQueue, GuestMemory
from vhostsock.testing.packed import FRESH_BASE, PackedQueue

# on a test: run it on a split ring and on a packed one
both_formats = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@dataclass
class Pair:
    """Both ends of one ring."""

    memory: GuestMemory
    queue: DriverQueue
    vring: Vring

    def echo_all(self) -> int:
        """Be a device: complete everything available with what was sent, in order; returns how many."""
        n = 0
        while chain := self.vring.pop():
            chain.write(chain.read())
            chain.complete()
            n += 1
        self.vring.flush()
        return n


class MakePair:
    def __init__(self, stack: ExitStack, packed: bool) -> None:
        self._stack = stack
        self._kind = PackedQueue if packed else DriverQueue

    def __call__(
        self,
        num: int = 16,
        *,
        sizes: tuple[int, ...] = (1 << 20,),
        base: int | None = None,
        event_idx: bool = True,
        indirect: bool = True,
        in_order: bool = False,
        index: int = 1,
    ) -> Pair:
        memory = self._stack.enter_context(GuestMemory(*sizes))
        if base is None:
            base = FRESH_BASE if self._kind is PackedQueue else 0
        queue = self._kind(memory, num, base=base, event_idx=event_idx, indirect=indirect, in_order=in_order)
        self._stack.enter_context(queue)
        vring = Vring(index)
        self._stack.callback(vring.close)
        queue.attach(vring)
        return Pair(memory, queue, vring)


@pytest.fixture
def packed() -> bool:
    """The format of the ring; ``both_formats`` overrides it."""
    return False


@pytest.fixture
def make_pair(packed: bool) -> Iterator[MakePair]:
    """make_pair(num, ...) -> Pair, on a running vring."""
    with ExitStack() as stack:
        yield MakePair(stack, packed)


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """A ring of 16 with EVENT_IDX and indirect descriptors in 1 MiB of memory."""
    return make_pair()
