# SPDX-License-Identifier: BSD-3-Clause
"""Each check of the probe can fail: against each there is a back-end with exactly one fault, which the check must find.

The same checks pass against the same back-end without a fault (below, and test_probe.py), so it is the fault that they find.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Callable

import pytest

from tests.probe.faults import FAULTS
from tests.probe.relay import Fault, Faulty, offer_of
from vhostsock import Device
from vhostsock.devices.echo import Echo
from vhostsock.probe.check import Check, Result, Verdict
from vhostsock.probe.runner import look, run_checks
from vhostsock.probe.table import CHECKS
from vhostsock.probe.target import ProcessTarget
from vhostsock.probe.traffic import TRAFFIC
from vhostsock.proto import ProtocolFeature, VirtioFeature
from vhostsock.state import StateReader, StateWriter

# seconds until one hangs. Those that do are waited for together; where that is not what is looked for, nobody is in a hurry
SOON, LATE = 2.0, 30.0


async def verdict_on(check: Check, fault: Fault, limit: float, make: Callable[[], Device] = Echo) -> Result:
    sound = Faulty(make, Fault(), LATE)
    offer = await offer_of(sound)
    await sound.close()
    target = Faulty(make, fault, limit)
    protocol, features = ProtocolFeature(offer.protocol | fault.protocol), VirtioFeature(offer.features | fault.features)
    offer = type(offer)(features, protocol, offer.queues, offer.slots, offer.config)
    try:
        [result] = await run_checks(target, offer, [check], TRAFFIC["echo"])
    finally:
        await target.close()
    return result


def check_of(name: str) -> Check:
    [check] = [check for check in CHECKS if check.name == name]
    return check


@pytest.mark.parametrize("name", [name for name, (verdict, _) in FAULTS.items() if verdict is not Verdict.HUNG])
def test_fault_is_found(name: str) -> None:
    verdict, fault = FAULTS[name]
    result = asyncio.run(verdict_on(check_of(name), fault, LATE))
    assert result.verdict is verdict, "\n".join([result.detail, *result.evidence])


def test_faults_that_leave_the_front_end_waiting_are_found() -> None:
    async def run() -> list[Result]:
        work = (verdict_on(check_of(name), fault, SOON) for name, (verdict, fault) in FAULTS.items() if verdict is Verdict.HUNG)
        return await asyncio.gather(*work)

    assert {result.check.name: result.verdict for result in asyncio.run(run()) if result.verdict is not Verdict.HUNG} == {}


def test_each_check_has_a_fault_that_it_finds() -> None:
    assert {check.name for check in CHECKS} == FAULTS.keys() | {"it_ends_when_it_is_told_to"}


DEAF = """
import asyncio, signal, sys
from vhostsock import Server
from vhostsock.devices.echo import Echo
signal.signal(signal.SIGTERM, signal.SIG_IGN)
async def main():
    async with Server(Echo(), path=sys.argv[1]) as server:
        await server.serve_forever()
asyncio.run(main())
"""


def test_program_that_does_not_end_when_it_is_told_to_is_found() -> None:
    async def run() -> Result:
        target = ProcessTarget(f"{shlex.quote(sys.executable)} -c {shlex.quote(DEAF)} {{socket}}", 10.0)
        try:
            offer = await look(target)
            target.limit = SOON
            [result] = await run_checks(target, offer, [check_of("it_ends_when_it_is_told_to")])
        finally:
            await target.close()
        return result

    assert asyncio.run(run()).verdict is not Verdict.PASS


class Everything(Echo):
    """Asks for all that the library can offer and that a check looks at."""

    packed = in_order = inflight = migratable = True

    async def save_state(self, stream: StateWriter) -> None:
        await stream.write(self.answered.to_bytes(8, "little"))

    async def load_state(self, stream: StateReader) -> None:
        self.answered = int.from_bytes(await stream.read(8), "little")


def test_device_that_asks_for_everything_passes_every_check() -> None:
    async def run() -> list[Result]:
        target = Faulty(Everything, Fault(), LATE)
        try:
            return await run_checks(target, await offer_of(target), CHECKS, TRAFFIC["echo"])
        finally:
            await target.close()

    results = {result.check.name: result for result in asyncio.run(run())}
    bad = [f"{result.check.name}: {result.detail}" for result in results.values() if result.verdict.bad]
    assert not bad
    left = {name for name, result in results.items() if result.verdict is Verdict.NOT_APPLICABLE}
    assert left == {"it_ends_when_it_is_told_to"}
