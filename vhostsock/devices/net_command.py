# SPDX-License-Identifier: BSD-3-Clause
"""``vhostsock serve net``: its arguments, and the device they make. The device itself is imported only when it is made."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .net import Net

__all__ = ["add_arguments", "make"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--loopback", action="store_true", help="give the guest back what it sends")
    where.add_argument("--tap", metavar="NAME", help="the host's end is this tap interface, which is made if it is not there")
    parser.add_argument("--mac", type=_mac, metavar="ADDRESS", help="for a front-end that has none of its own")
    parser.add_argument("--mtu", type=int, metavar="BYTES", help="tell the guest to use this MTU")
    parser.add_argument("--pairs", type=int, default=1, metavar="N", help="queue pairs (default: 1)")


def make(options: argparse.Namespace) -> Net:
    """ValueError: the arguments do not go together."""
    from .net import Loopback, Net

    if options.tap is not None:
        from .tap import Tap

        return Net(Tap(options.tap, options.pairs), mac=options.mac, mtu=options.mtu, pairs=options.pairs)
    if not options.loopback:
        raise ValueError("say where packets go: --loopback or --tap NAME")
    return Net(Loopback(), mac=options.mac, mtu=options.mtu, pairs=options.pairs)


def _mac(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as 52:54:00:12:34:56")
    return bytes.fromhex(text.replace(":", ""))
