# SPDX-License-Identifier: BSD-3-Clause
"""Runs checks against a back-end, one after the other, and makes verdicts of what happens.

First it looks how the back-end takes it that a front-end leaves: goes on listening, or ends. That decides what "died" means
(target.py), and is said in the report. Between two checks nothing is shared but the back-end; with ``--exec``, not even that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

from construct import ConstructError

from ..errors import UsageError
from ..proto import ProtocolFeature, VirtioFeature
from ..proto.features import names
from ..testing.driver import DeviceFault
from ..testing.frontend import BackendGone, Refused
from .check import Check, Died, NotApplicable, Probe, Result, Stuck, Verdict
from .connection import Connection, Failed, Options, Transcript
from .offer import Offer, discover
from .target import Gone, ProcessTarget, Target
from .traffic import Traffic

__all__ = ["look", "run_checks"]


async def look(target: Target, config_size: int = 0) -> Offer:
    """What the back-end offers; also finds out how it ends. Gone or UsageError when it cannot be probed."""
    await target.renew()
    try:
        with contextlib.closing(Connection(await target.connect(), Transcript(), Options())) as connection:
            offer = await discover(connection, config_size)
    except (BackendGone, Refused) as error:
        raise Gone(f"the first questions were not answered: {error}") from None
    if await target.answers():
        return offer
    if not target.renewable:
        raise UsageError("this back-end serves no second front-end: let the probe start it for each check, --exec COMMAND")
    assert isinstance(target, ProcessTarget)
    target.ends_with_its_front_end = await target.ended() is not None
    if not target.ends_with_its_front_end:
        raise Gone("when a front-end has left, it neither ends nor serves another one")
    return offer


async def run_checks(
    target: Target,
    offer: Offer,
    checks: Iterable[Check],
    traffic: Traffic | None = None,
    progress: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """The results, in the order of the checks; ``progress`` hears of each at once."""
    results: list[Result] = []
    gone = ""
    for check in checks:
        reason = f"not run: {gone}" if gone else _inapplicable(check, offer, traffic)
        if reason:
            result = Result(check, Verdict.NOT_APPLICABLE, reason)
        else:
            result = await _run(target, offer, check, traffic)
            if result.fatal and not target.renewable:
                gone = result.detail
        results.append(result)
        progress(result)
    return results


def _inapplicable(check: Check, offer: Offer, traffic: Traffic | None) -> str:
    protocol = ProtocolFeature(check.protocol & ~offer.protocol)
    features = VirtioFeature(check.features & ~offer.features)
    if protocol or features:
        return f"{names(protocol) if protocol else names(features)} is not offered"
    if check.traffic and not traffic:
        return "needs requests that the device understands (--device)"
    return ""


async def _run(target: Target, offer: Offer, check: Check, traffic: Traffic | None) -> Result:
    probe = Probe(target, offer, check, traffic, Transcript())
    verdict, detail, fatal = Verdict.PASS, "", False
    try:
        await target.renew()
        async with probe.patience:
            await check.run(probe)
    except NotApplicable as reason:
        verdict, detail = Verdict.NOT_APPLICABLE, str(reason)
    except TimeoutError:
        verdict, detail = Verdict.HUNG, f"nothing came within {target.limit:g} s"
    except (Died, Gone) as error:
        verdict, detail = Verdict.DIED, str(error)
    except Stuck as error:
        verdict, detail, fatal = Verdict.HUNG, str(error), True
    except Refused as error:
        verdict, detail = Verdict.FAIL, f"{error} was refused"
    except BackendGone:
        verdict, detail = Verdict.FAIL, "it closed the connection"
    except (Failed, DeviceFault, ConstructError) as error:
        verdict, detail = Verdict.FAIL, str(error)
    finally:
        probe.close()
    if verdict is not Verdict.DIED and not fatal:
        fate = await target.fate()
        if fate:
            verdict, fatal = Verdict.DIED if fate.dead else Verdict.HUNG, True
            detail = "; ".join(part for part in (fate.text, detail) if part)
    evidence = probe.transcript.lines + (target.last_words() if verdict.bad else [])
    return Result(check, verdict, detail, evidence, fatal or verdict is Verdict.DIED)
