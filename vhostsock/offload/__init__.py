"""The socket-offload device: sockets of a guest, served by the host under a policy.

    policy = load_policy("policy.toml")
    async with Server(OffloadDevice(name="vm1", policy=policy), path="/tmp/vm1.sock") as server:
        await server.serve_forever()

docs/policy.md describes the policy file, and how to write a handler of your own.
"""

from .device import OffloadDevice
from .engine import Stats
from .handlers import Connection, Handler, InProcessHandler, Request, StreamFunction
from .policy import BindDecision, Decision, Guest, Policy
from .policy_file import load_policy, parse_policy
from .uri import URI, InetURI, IpxURI, UnixURI, URIError
from .uri import parse as parse_uri

__all__ = [
    "URI",
    "BindDecision",
    "Connection",
    "Decision",
    "Guest",
    "Handler",
    "InProcessHandler",
    "InetURI",
    "IpxURI",
    "OffloadDevice",
    "Policy",
    "Request",
    "Stats",
    "StreamFunction",
    "URIError",
    "UnixURI",
    "load_policy",
    "parse_policy",
    "parse_uri",
]
