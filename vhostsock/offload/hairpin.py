# SPDX-License-Identifier: BSD-3-Clause
"""Hairpin: a network namespace of the host that one guest has for itself, and whose loopback is its loopback.

What the guest does in the namespace that the policy names is done here, in the same words: bind() binds, connect() connects
from the bound socket, names are the real ones. So a program that talks to itself over 127.0.0.1 talks through the device, both
ways.

A network namespace belongs to a thread when a socket is *made*; the socket stays in it whoever uses it. So one thread lives in
the namespace and makes sockets, and nothing else knows of it. The namespace lives as long as the thread or a socket of it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from pyroute2 import IPRoute

from ..errors import UsageError
from .handlers.base import Connection, Request, apply_options, connected
from .handlers.direct import open_datagram
from .uri import InetURI

__all__ = ["HostNamespace", "finish"]

CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


class HostNamespace:
    """A new network namespace with nothing but its loopback. UsageError: this process may not make one."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "hairpin")
        try:
            self._thread.submit(_enter).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def close(self) -> None:
        """The namespace goes with the last of its sockets."""
        self._thread.shutdown()

    def make(self, family: int, kind: int) -> socket.socket:
        """A socket in the namespace."""
        return self._thread.submit(socket.socket, family, kind).result()

    def socket_for(self, request: Request) -> socket.socket:
        """The socket to connect for ``request``: the one that the guest's is bound to if there is one, with the options set."""
        target = request.target
        assert isinstance(target, InetURI)
        kind = target.kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        sock = request.bound() if request.bound else self.make(target.family, kind)
        apply_options(sock, request.opts)
        return sock

    def open_datagram(self, request: Request) -> Connection:
        """For a socket that uses sendto(); the bound or connected one, if there is one, has no peer from here on."""
        if not request.bound:
            return open_datagram(request, self.make)
        sock = request.bound()
        try:
            if _libc.connect(sock.fileno(), bytes(16), 16):  # AF_UNSPEC, which Python's sockets do not know
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            local = InetURI.of_name("udp", sock.getsockname())
        except BaseException:
            sock.close()
            raise
        return Connection(sock, local, request.uri if isinstance(request.uri, InetURI) else local)


async def finish(request: Request, sock: socket.socket) -> Connection:
    """A connect that is in progress: its connection, with the real names. OSError."""
    target = request.target
    assert isinstance(target, InetURI)
    try:
        await connected(sock)
        local = InetURI.of_name(target.transport, sock.getsockname())
        try:
            peer = InetURI.of_name(target.transport, sock.getpeername())
        except OSError:  # reset already: the engine will find out
            peer = target
    except BaseException:
        sock.close()
        raise
    return Connection(sock, local, peer)


def _enter() -> None:
    if _libc.unshare(CLONE_NEWNET):
        code = ctypes.get_errno()
        hint = "; start the back-end as root or by unshare --user --map-root-user" if code == errno.EPERM else ""
        raise UsageError(f"hairpin needs a network namespace of its own: {os.strerror(code)}{hint}")
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
