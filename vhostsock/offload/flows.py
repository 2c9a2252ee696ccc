"""What Python remembers of each flow: enough to answer, to log and to clean up. The bytes and the states are the engine's.

    asked     a task or a decision is under way; ``open`` is False. Leaves with the answer, or with CANCEL.
    open      the engine has its descriptor. Leaves with ENDED.

The engine bounds their number (max_flows). Flows that the device announced itself (accepted connections) are known here only by
their last event, which carries all the log wants.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from .engine import Event
from .errnos import errno_name
from .handlers.base import Connection
from .handlers.listen import Listener
from .policy import INITIAL, Guest, Publish
from .uri import Address, InetURI, IpxURI

__all__ = ["Flow", "ended_text"]


@dataclass(slots=True)
class Flow:
    """One flow that the driver opened."""

    handle: int
    id: int
    uri: InetURI | IpxURI
    guest: Guest
    since: float  # time.monotonic() of the request
    open: bool = False
    task: asyncio.Task[None] | None = None  # connects
    connection: Connection | None = None
    listener: Listener | None = None
    publish: Publish | None = None  # what published it
    groups: set[Address] = field(default_factory=set)  # multicast, joined on the host
    family: int = 0  # of an unconnected datagram socket: AF_INET or AF_INET6

    def __str__(self) -> str:
        netns = f" netns={self.guest.netns}" if self.guest.netns != INITIAL else ""
        return f"#{self.id}{netns} {self.uri}"


def ended_text(event: Event, seconds: float | None) -> str:
    """What an ENDED event says: the error if any, bytes each way and the flow's age."""
    how = f"ended with {errno_name(event.error)}" if event.error else "ended"
    age = f", {seconds:.1f} s" if seconds is not None else ""
    return f"{how}: {event.to_host} bytes to the host, {event.to_guest} to the guest{age}"
