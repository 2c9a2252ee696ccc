"""What ``vhostsock serve offload`` and ``vhostsock check-policy`` do; their arguments are in cli.py."""

from __future__ import annotations

import argparse

from ..errors import PolicyError
from . import ipx
from .device import OffloadDevice
from .policy import Guest, Policy
from .policy_file import BUILT_IN, load_policy
from .uri import IpxURI, parse, parse_inet

__all__ = ["check", "make_device"]


def make_device(options: argparse.Namespace) -> OffloadDevice:
    policy = load_policy(options.policy) if options.policy else Policy()
    return OffloadDevice(name=options.name, policy=policy, pairs=options.pairs, max_flows=options.max_flows,
                         busy_poll=options.busy_poll)  # fmt: skip


def check(options: argparse.Namespace) -> None:
    """Load the policy and explain. PolicyError, or ValueError for a URI on the command line that is none."""
    explain = [uri if isinstance(uri := parse(u), IpxURI) else parse_inet(u) for u in options.explain]
    explain_bind = [parse_inet(u) for u in options.explain_bind]
    policy = load_policy(options.file)
    for name, rule in policy.handlers().items():
        if name not in (*BUILT_IN, *options.handler):
            raise PolicyError(f"{rule.where}: rule {rule.number}, key 'handler': {name!r} is not built in; "
                              f"if it is a handler of your own program, add --handler {name}")  # fmt: skip
    guest = Guest(options.name, options.uid)
    print(f"{options.file}: good; {_count(len(policy.rules), 'rule')}, {_count(len(policy.publishes), 'publish rule')}, "
          f"default {policy.default}")  # fmt: skip
    for uri in explain:
        lines = ipx.explain(policy, uri, guest) if isinstance(uri, IpxURI) else policy.explain(uri, guest)
        print(*lines, sep="\n")
    for uri in explain_bind:
        print(*policy.explain_bind(uri, guest), sep="\n")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
