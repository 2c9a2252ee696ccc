# SPDX-License-Identifier: BSD-3-Clause
"""``vhostsock probe``: the command line of the probe. What it imports at length it imports when it runs."""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from .traffic import TRAFFIC

if TYPE_CHECKING:
    from .check import Check, Result
    from .target import Target

__all__ = ["add_arguments", "run"]

LIMIT = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("socket", nargs="?", metavar="SOCKET", help="where the back-end listens")
    parser.add_argument(
        "--exec",
        metavar="COMMAND",
        help="start the back-end with this command, anew for each check; {socket} in it is the path of its socket",
    )
    parser.add_argument(
        "--device", choices=sorted(TRAFFIC), help="what it is: checks of the rings need requests that the device understands"
    )
    parser.add_argument("--hostile", action="store_true", help="also break rules: checks that may kill the back-end")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="checks whose name matches. Repeatable")
    parser.add_argument("--list", action="store_true", help="say what is checked, and stop")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, with all that was said")
    parser.add_argument("--verbose", action="store_true", help="show what was said in checks that passed, too")
    parser.add_argument(
        "--timeout", type=float, default=LIMIT, metavar="SECONDS", help=f"who is silent for so long hangs (default: {LIMIT:g})"
    )


def run(options: argparse.Namespace) -> int:
    """The exit status: 0 when nothing is bad, 1 otherwise. ValueError and VhostsockError as the other commands."""
    from . import report

    checks = _chosen(options)
    if options.list:
        print("\n".join(report.listing(checks)))
        return 0
    if (options.socket is None) == (options.exec is None):
        raise ValueError("say which back-end: SOCKET or --exec COMMAND")
    if options.timeout <= 0:
        raise ValueError("--timeout must be more than 0")
    results = asyncio.run(_probe(options, checks))
    return int(any(result.verdict.bad for result in results))


def _chosen(options: argparse.Namespace) -> Sequence[Check]:
    from .table import CHECKS

    chosen = [check for check in CHECKS if options.hostile or not check.hostile]
    if options.only:
        chosen = [check for check in CHECKS if any(fnmatch.fnmatchcase(check.name, pattern) for pattern in options.only)]
        if not chosen:
            raise UsageError(f"no check matches {' '.join(options.only)}; --list names them")
    return chosen


async def _probe(options: argparse.Namespace, checks: Sequence[Check]) -> list[Result]:
    from . import report
    from .runner import look, run_checks
    from .target import ProcessTarget, SocketTarget

    target: Target
    if options.exec is not None:
        target = ProcessTarget(options.exec, options.timeout)
    else:
        target = SocketTarget(options.socket, options.timeout)
    traffic = TRAFFIC[options.device] if options.device else None
    try:
        offer = await look(target, traffic.config_size if traffic else 0)
        lines = offer.lines(traffic)
        ends = "ends with its front-end" if target.ends_with_its_front_end else "serves one front-end after the other"
        lines.append(f"life               {ends}")
        if not options.json:
            print("\n".join(lines), flush=True)

        def progress(result: Result) -> None:
            if not options.json:
                print("\n".join(report.line_of(result, verbose=options.verbose)), flush=True)

        results = await run_checks(target, offer, checks, traffic, progress)
    finally:
        await target.close()
    print(report.as_json(results, lines) if options.json else report.summary(results))
    return results
