# SPDX-License-Identifier: BSD-3-Clause
"""What a check is: a coroutine whose name is the claim, and a row that says what the claim rests on.

The coroutine gets a Probe, opens connections through it, and returns when the claim holds. It raises Failed when it does not,
and NotApplicable when it turns out that nothing can be said. A back-end that goes away where it should not (BackendGone,
Refused, DeviceFault) needs no handling: the runner makes verdicts of them. Nothing in a check waits for a duration; the runner
bounds each as a whole, and a back-end that does not answer within that bound hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import os
from collections.abc import Awaitable, Callable

from ..errors import VhostsockError
from ..proto import ProtocolFeature, VirtioFeature
from ..testing.driver import DriverQueue, Request
from ..testing.frontend import BackendGone
from .connection import BASE_FEATURES, BASE_PROTOCOL, Connection, Failed, Options, Transcript
from .offer import Offer
from .target import Target
from .traffic import Traffic

__all__ = ["NO_FEATURE", "NO_PROTOCOL", "Check", "Died", "NotApplicable", "Probe", "Result", "Stuck", "Verdict"]

NO_PROTOCOL = ProtocolFeature(0)
NO_FEATURE = VirtioFeature(0)


class NotApplicable(VhostsockError):
    """Nothing can be said about this back-end here; the text says why."""


class Died(VhostsockError):
    """The back-end is gone, between two cases of a check."""


class Stuck(VhostsockError):
    """It is there, and serves nobody any more."""


class Verdict(enum.Enum):
    PASS = "pass"
    FAIL = "FAIL"
    NOT_APPLICABLE = "n/a"
    DIED = "DIED"  # the back-end is gone: killed, or ended in a way in which a front-end that leaves does not end it
    HUNG = "HUNG"  # it owed an answer or a completion and did not come up with it in time

    @property
    def bad(self) -> bool:
        return self in (Verdict.FAIL, Verdict.DIED, Verdict.HUNG)


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One row.

    clause    the section of the vhost-user document that the claim rests on ("virtio 1.3, x" for one of the rings); for hostile
              checks that no sentence asks for, what is at stake
    protocol, features    bits that it needs; they are acked on its connections
    traffic   it needs requests of the device's type
    hostile   it breaks rules
    """

    run: Callable[[Probe], Awaitable[None]]
    clause: str
    protocol: ProtocolFeature = NO_PROTOCOL
    features: VirtioFeature = NO_FEATURE
    traffic: bool = False
    hostile: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def text(self) -> str:
        """What it does, in a sentence or two."""
        return " ".join((self.run.__doc__ or "").split())


@dataclasses.dataclass(slots=True)
class Result:
    """detail: why it is no pass; evidence: the transcript, and the back-end's last words; fatal: it serves nobody now."""

    check: Check
    verdict: Verdict
    detail: str = ""
    evidence: list[str] = dataclasses.field(default_factory=list)
    fatal: bool = False


class Probe:
    """What a check is given: connections with the features that its row asks for, and the device's traffic."""

    def __init__(self, target: Target, offer: Offer, check: Check, traffic: Traffic | None, transcript: Transcript) -> None:
        self.target = target
        self.offer = offer
        self.check = check
        self.transcript = transcript
        self._traffic = traffic
        self._patience: asyncio.Timeout | None = None
        self._open: list[Connection] = []
        self._numbers = iter(range(1 << 62))

    @property
    def traffic(self) -> Traffic:
        assert self._traffic, "the check's row does not say that it needs traffic"
        return self._traffic

    @property
    def patience(self) -> asyncio.Timeout:
        """What bounds the check; to be entered once."""
        self._patience = asyncio.timeout(self.target.limit)
        return self._patience

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    # ---- connections

    async def renewed(self) -> None:
        """Between two cases of a check: close the connections, see that the back-end is well, start it anew. Died, Stuck."""
        self.close()
        fate = await self.target.fate()
        if fate:
            raise Died(fate.text) if fate.dead else Stuck(fate.text)
        if self.target.ends_with_its_front_end:
            await self.target.renew()
        self.transcript.lines.clear()  # evidence is that of the case that failed
        if self._patience:
            self._patience.reschedule(asyncio.get_running_loop().time() + self.target.limit)

    async def connect(self, *, queues: int | None = None, memory: tuple[int, ...] = (1 << 22,), size: int = 64,
                      protocol: ProtocolFeature = NO_PROTOCOL) -> Connection:  # fmt: skip
        """A connection on which nothing was said yet, but GET_FEATURES if it is not the first one."""
        wanted = self._traffic.queues if self._traffic else 1
        options = Options(
            BASE_PROTOCOL | self.check.protocol | protocol,
            BASE_FEATURES | self.check.features,
            min(queues or wanted, self.offer.queues or queues or wanted),
            size,
            memory,
        )
        self._open.append(await self.target.enter(self.transcript, options))
        return self._open[-1]

    async def negotiated(self, *, queues: int | None = None, memory: tuple[int, ...] = (1 << 22,), size: int = 64,
                         protocol: ProtocolFeature = NO_PROTOCOL) -> Connection:  # fmt: skip
        """One that has agreed on protocol features, and nothing more."""
        connection = await self.connect(queues=queues, memory=memory, size=size, protocol=protocol)
        await connection.handshake()
        return connection

    async def running(self, *, memory: tuple[int, ...] = (1 << 22,), size: int = 64,
                      protocol: ProtocolFeature = NO_PROTOCOL) -> Connection:  # fmt: skip
        """One whose rings run."""
        connection = await self.negotiated(memory=memory, size=size, protocol=protocol)
        await connection.set_up()
        return connection

    # ---- requests

    def ring(self, connection: Connection) -> DriverQueue:
        """The ring that the device's requests go to."""
        return connection.queues[self.traffic.queue]

    def add(self, connection: Connection, *, cut: int = 0, indirect: bool = False) -> tuple[int, Request]:
        """Put one request into the ring, not yet published. cut: into descriptors of at most so many bytes."""
        number = next(self._numbers)
        readable, writable = self.traffic.request(number)
        if cut:
            readable = [data[at : at + cut] for data in readable for at in range(0, len(data), cut)]
            writable = [min(cut, size - at) for size in writable for at in range(0, size, cut)]
        return number, self.ring(connection).add(readable, writable, indirect=indirect)

    def judge(self, number: int, request: Request) -> None:
        complaint = self.traffic.judge(number, request.data)
        if complaint:
            raise Failed(f"request {number} was completed wrongly: {complaint}")

    async def exchange(self, connection: Connection, count: int = 1, *, cut: int = 0, indirect: bool = False) -> None:
        """``count`` requests at once, to their ends."""
        queue = self.ring(connection)
        asked = [self.add(connection, cut=cut, indirect=indirect) for _ in range(count)]
        queue.publish()
        self.transcript.note(f"the driver makes {count} request(s) available{' and kicks' if queue.kick() else ''}")
        await self.completions(connection, count)
        self.transcript.note(f"the device has completed {count} request(s)")
        for number, request in asked:
            self.judge(number, request)

    async def completions(self, connection: Connection, count: int = 1) -> list[Request]:
        """What the device completes, in its order, as soon as that is ``count`` requests. BackendGone when it goes before."""
        waiting = asyncio.ensure_future(self.ring(connection).wait_async(count))
        gone = asyncio.ensure_future(connection.gone())
        try:
            await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                gone.result()
                raise BackendGone("the back-end has closed the connection")
            return waiting.result()
        finally:
            for task in (waiting, gone):
                task.cancel()
            await asyncio.gather(waiting, gone, return_exceptions=True)

    # ---- hostility

    async def refused(self, connection: Connection, request: int, body: bytes = b"", fds: tuple[int, ...] = (), *,
                      why: str) -> None:  # fmt: skip
        """Send what must not be carried out: a non-zero ack, or the end of the connection. Failed when it is acked with 0."""
        if not connection.protocol_features & ProtocolFeature.REPLY_ACK:
            await connection.call(request, body, fds)
            await self.outlived(connection)
            return
        with contextlib.suppress(BackendGone):
            if not await connection.ack_of(request, body, fds):
                raise Failed(f"{why} was acked with 0, as if it had been carried out")
        await self.outlived(connection)

    async def outlived(self, connection: Connection) -> None:
        """The session goes on, or has ended; the runner looks for the back-end itself afterwards."""
        with contextlib.suppress(BackendGone):
            await connection.sign_of_life()

    def open_files(self) -> int:
        """How many descriptors the back-end has open. NotApplicable where that cannot be seen."""
        pid = self.target.pid
        if pid is None:
            raise NotApplicable("the back-end's process id is not known (--exec tells it)")
        try:
            return len(os.listdir(f"/proc/{pid}/fd"))
        except OSError as error:
            raise NotApplicable(f"the descriptors of process {pid} cannot be seen: {error.strerror}") from None
