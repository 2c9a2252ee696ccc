# SPDX-License-Identifier: BSD-3-Clause
"""A network namespace of a test's own: what is called through it, and every process that is started through it, is in there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from pyroute2 import IPRoute

__all__ = ["Namespace", "may_make_namespaces"]

CLONE_NEWNET = 0x40000000
P = ParamSpec("P")
T = TypeVar("T")


def may_make_namespaces() -> bool:
    """Whether this process is root enough, and the system has taps."""
    return os.geteuid() == 0 and os.path.exists("/dev/net/tun")


class Namespace:
    """A namespace belongs to a thread, so this is one thread. Sockets and taps made in it stay what they are anywhere."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.run(self._enter)

    def _enter(self) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, f"unshare: {os.strerror(error)}")

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.submit(function, *args, **kwargs).result()

    def link(self, command: str, name: str, **values: Any) -> None:
        """As "ip link COMMAND NAME ..."."""

        def change() -> None:
            with IPRoute() as route:
                route.link(command, index=route.link_lookup(ifname=name)[0], **values)

        self.run(change)

    def address(self, name: str, address: str, prefix: int) -> None:
        """As "ip address add ADDRESS/PREFIX dev NAME"."""

        def add() -> None:
            with IPRoute() as route:
                route.addr("add", index=route.link_lookup(ifname=name)[0], address=address, prefixlen=prefix)

        self.run(add)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
