"""Errors, named for the peer that broke the rules; that decides the consequence.

| error          | who is to blame              | consequence                                                     |
|----------------|------------------------------|-----------------------------------------------------------------|
| FrontendError  | the front-end (QEMU)         | its session ends, everything it owned is closed; listening goes on |
|                |                              | (one request that cannot be carried out: a failure ack, if asked)  |
| DriverError    | the guest's driver           | that vring is marked broken and its error fd signalled          |
| RequestError   | one request of the driver    | that chain completes with a status; nothing else is touched     |
| PolicyError    | the policy file's author     | the file is refused whole, with file, line and key              |
| UsageError     | the device author or caller  | raised to them at once                                          |

A host ``OSError`` is nobody's fault: it becomes the errno that the guest application sees.
"""

from __future__ import annotations

__all__ = ["DriverError", "FrontendError", "PolicyError", "RequestError", "UsageError", "VhostsockError"]


class VhostsockError(Exception):
    """Base of every error this library raises on purpose."""


class FrontendError(VhostsockError):
    """The front-end broke the vhost-user protocol. The session ends."""


class DriverError(VhostsockError):
    """The driver broke the virtqueue rules. The vring is broken until it is set up again."""

    def __init__(self, message: str, *, vring: int | None = None) -> None:
        super().__init__(f"vring {vring}: {message}" if vring is not None else message)
        self.vring = vring


class RequestError(VhostsockError):
    """One request cannot be served. ``status`` is the device's own status value for it."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class PolicyError(VhostsockError):
    """The policy file is wrong. The text names file, line and key and says what to write instead."""


class UsageError(VhostsockError):
    """The caller used the library against its documentation."""
