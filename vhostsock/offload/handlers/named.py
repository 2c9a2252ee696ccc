"""The handlers that a policy names: the built-in ones, and those that the device was given."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import PolicyError, UsageError
from ..policy import Policy
from .base import Handler
from .direct import DirectHandler
from .inprocess import InProcessHandler, StreamFunction
from .unix import UnixHandler

__all__ = ["named_handlers"]


def named_handlers(policy: Policy, named: Mapping[str, Handler | StreamFunction]) -> dict[str, Handler]:
    """Built-in and given handlers by name; PolicyError when the policy names another one."""
    handlers: dict[str, Handler] = {"direct": DirectHandler(), "unix": UnixHandler()}
    for name, handler in named.items():
        if name in handlers:
            raise UsageError(f"handler {name!r} is built in; choose another name")
        handlers[name] = handler if hasattr(handler, "connect") else InProcessHandler(handler)
    for name, rule in policy.handlers().items():
        if name not in handlers:
            known = ", ".join(map(repr, handlers))
            raise PolicyError(f"{rule.where}: rule {rule.number}, key 'handler': no handler {name!r} here; there are {known}")
    return handlers
