"""Errno names and numbers, and which errno of a host call an application in the guest gets.

The wire carries Linux's generic numbers (asm-generic), which are those of every Linux host this runs on.
"""

from __future__ import annotations

import errno
from typing import Final

__all__ = ["errno_name", "errno_number", "guest_errno"]

# What the host's own limits are called in the guest: EMFILE there would blame the application.
_HOST_LIMITS: Final = {errno.EMFILE: errno.ENOBUFS, errno.ENFILE: errno.ENOBUFS, errno.ENOMEM: errno.ENOBUFS}
# A TCP connect that became a Unix one: what the file system says, in TCP's words.
_UNIX: Final = {
    errno.ENOENT: errno.ECONNREFUSED,
    errno.ENOTDIR: errno.ECONNREFUSED,
    errno.ENOTSOCK: errno.ECONNREFUSED,
    errno.EPROTOTYPE: errno.ECONNREFUSED,
    errno.EPERM: errno.EACCES,
    errno.ELOOP: errno.EACCES,
}


def errno_name(number: int) -> str:
    """ "ECONNREFUSED", or "errno 12345"."""
    return errno.errorcode.get(number, f"errno {number}")


def errno_number(name: str) -> int | None:
    """The number of "ECONNREFUSED", None when there is no such errno."""
    number = getattr(errno, name, None) if name.startswith("E") else None
    return number if isinstance(number, int) else None


def guest_errno(error: OSError, *, unix: bool = False) -> int:
    """What the guest's application gets for ``error`` of a host call; ``unix``: the call was on a Unix socket."""
    if isinstance(error, TimeoutError) and error.errno is None:
        return errno.ETIMEDOUT
    number = error.errno or errno.EIO
    number = _UNIX.get(number, number) if unix else number
    return _HOST_LIMITS.get(number, number)

