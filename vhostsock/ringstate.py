# SPDX-License-Identifier: BSD-3-Clause
"""What the server knows of one ring (vrings.py says what its states mean)."""

from __future__ import annotations

import dataclasses
from typing import Any

from .device import Queue
from .inband import Signal
from .proto.features import VirtioFeature

__all__ = ["Ring"]


@dataclasses.dataclass(slots=True)
class Ring:
    """One ring. The fields are the front-end's values; ``queue.vring`` has them too."""

    queue: Queue
    call: Signal | None = None  # in-band notifications, instead of fds that the front-end did not give
    err: Signal | None = None
    fds_set: set[str] = dataclasses.field(default_factory=set)  # "call", "err": the front-end chose how, once for all
    polled: bool = False  # the queue's kick fd is ours, and polling writes to it
    inband_kick: bool = False  # the queue's kick fd is ours, and VRING_KICK writes to it
    waiting: bool = False  # started, and the vring does not run: behind an IOMMU its parts are not translated yet
    asked: tuple[int, int] | None = None  # the miss that is under way for it
    enabled: bool = False
    started: bool = False
    attached: bool = False
    num: int = 0
    address: tuple[int, int, int] = (0, 0, 0)  # desc, avail, used, as Vring.set_addr takes them
    base: int | None = None  # None: nobody said, so from the beginning
    features: int = 0
    logged: bool = False  # VRING_F_LOG
    log_address: int = 0
    suspended: bool = False  # detached with requests in flight, and not restarted since
    stopped_with: tuple[Any, ...] | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a pause keeps and a new driver most likely changes."""
        return self.num, self.address, self.base, self.features & ~VirtioFeature.LOG_ALL
