# SPDX-License-Identifier: BSD-3-Clause
"""Small devices that the tests steer."""

from __future__ import annotations

import asyncio

from vhostsock import Chain, Device, Queue

__all__ = ["Gate", "Recorder", "Upper"]


class Upper(Device):
    """Answers in capitals, a batch at a time."""

    virtio_id = 39

    def __init__(self, num_queues: int = 1) -> None:
        self.num_queues = num_queues

    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
        for chain in chains:
            chain.write(chain.read().upper())
            chain.complete()


class Gate(Device):
    """Answers once ``gate`` is open; counts what is under way."""

    virtio_id = 39

    def __init__(self, concurrency: int = 64) -> None:
        self.concurrency = concurrency
        self.gate = asyncio.Event()
        self.waiting = 0
        self.most = 0
        self.cancelled = 0
        self.arrived = asyncio.Event()  # set when somebody waits; to be cleared by the test

    async def handle(self, queue: Queue, chain: Chain) -> None:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        self.arrived.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        chain.write(chain.read())


class Recorder(Device):
    """Writes down what the server tells it; has no data plane of its own."""

    virtio_id = 39

    def __init__(self, num_queues: int = 1) -> None:
        self.num_queues = num_queues
        self.told: list[str] = []

    def take(self) -> list[str]:
        told, self.told = self.told, []
        return told

    async def connected(self) -> None:
        self.told.append("connected")

    async def disconnected(self) -> None:
        self.told.append("disconnected")

    def reset(self) -> None:
        self.told.append("reset")

    def queue_started(self, queue: Queue) -> None:
        assert queue.vring.running
        assert queue.kick_fd >= 0
        self.told.append(f"started {queue.index}")

    async def queue_draining(self, queue: Queue) -> None:
        self.told.append(f"draining {queue.index}")

    def queue_stopped(self, queue: Queue) -> None:
        assert queue.vring.running
        self.told.append(f"stopped {queue.index}")
