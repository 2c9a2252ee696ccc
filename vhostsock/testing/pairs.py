# SPDX-License-Identifier: BSD-3-Clause
"""A driver of ring pairs: what drivers of socket devices have in common, whatever they say to their device.

Even rings carry messages to the driver, odd rings messages from it, one message in a chain. :class:`RingDriver` keeps the
former full of buffers, waits for room in the latter, and hands each message to ``_on_message``.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from vhostsock.testing.driver import DriverQueue, GuestMemory, RingFull
from vhostsock.testing.flow import TIMEOUT

__all__ = ["RingDriver"]


class RingDriver:
    """The driver of these rings: [to the driver, from it] for each pair. It belongs to one thread at a time.

    ``rx_buffers`` chains are kept on every to-driver ring, each with writable buffers of the sizes ``rx_layout``.
    """

    def __init__(self, queues: Sequence[DriverQueue], *, rx_layout: Sequence[int], rx_buffers: int) -> None:
        self.queues = list(queues)
        self.rx_layout = list(rx_layout)
        self.rx_buffers = rx_buffers
        self._poll = select.poll()
        self._watched: dict[int, Callable[[], None]] = {}
        for ring in range(len(self.queues)):
            self._take_on(ring)

    @classmethod
    def in_memory(cls, memory: GuestMemory, pairs: int = 1, num: int = 256, **options: Any) -> Self:
        """A driver with new rings of ``num`` descriptors; close() closes them."""
        return cls([DriverQueue(memory, num) for _ in range(2 * pairs)], **options)

    def _on_message(self, pair: int, data: bytes) -> None:
        """A message of the device."""
        raise NotImplementedError

    def _take_on(self, ring: int) -> None:
        queue = self.queues[ring]
        self._poll.register(queue.call_fd, select.POLLIN)
        if ring % 2 == 0:
            for _ in range(self.rx_buffers):
                queue.add(writable=self.rx_layout)
            queue.publish()
            queue.kick()

    def replace(self, ring: int, queue: DriverQueue) -> None:
        """A new ring in the place of one that is closed, as after a device reset. What was in the old one is lost."""
        self.queues[ring] = queue
        self._take_on(ring)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the rings' eventfds. Says nothing to the device."""
        for queue in self.queues:
            queue.close()

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``fd`` is readable while this driver waits: to run the device's control side meanwhile."""
        self._watched[fd] = callback
        self._poll.register(fd, select.POLLIN)

    def post_raw(self, readable: Sequence[bytes], writable: Sequence[int] = (), pair: int = 0) -> None:
        """Send one chain of any shape, waiting for room in the ring."""
        queue = self.queues[2 * pair + 1]
        while True:
            queue.collect()
            try:
                queue.submit(readable, writable)
                return
            except (RingFull, MemoryError):
                if not queue.in_flight:
                    raise  # it will never fit
            # step() collects; that is what makes room
            self.wait(lambda full=queue.in_flight: queue.in_flight < full, TIMEOUT, "room in a ring")  # type: ignore[misc]

    def step(self) -> int:
        """Take what the device has completed; never blocks. The number of messages."""
        count = 0
        for pair, queue in enumerate(self.queues[::2]):
            done = queue.collect()
            for request in done:
                queue.add(writable=[size for _, size in request.writable])
            if done:
                queue.publish()
                queue.kick()
            for request in done:
                self._on_message(pair, request.data)
            count += len(done)
        for queue in self.queues[1::2]:
            queue.collect()
        return count

    def wait(self, condition: Callable[[], object], timeout: float = TIMEOUT, what: str = "a message") -> None:
        """Until ``condition()`` is true. TimeoutError naming ``what`` after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while True:
            self.step()
            if condition():
                return
            if any([queue.enable_calls() for queue in self.queues]):
                continue
            left = end - time.monotonic()
            ready = self._poll.poll(left * 1000) if left > 0 else []
            if not ready:
                raise TimeoutError(f"waited {timeout:g} s for {what}")
            for fd, _ in ready:
                if fd in self._watched:
                    self._watched[fd]()
            for queue in self.queues:
                queue.take_call()
