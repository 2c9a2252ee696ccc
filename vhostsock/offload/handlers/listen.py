"""Sockets for listeners of the guest: what a [[publish]] rule binds on the host.

*Options.* SO_REUSEADDR is the guest's. SO_REUSEPORT is never set before the first bind of a port, even if the guest asked for
it: another VM could take a share of the connections. The first socket binds alone; only then is it made shareable (the kernel
compares the flags of both at the second bind, net/ipv4/inet_connection_sock.c), and only this device sets the flag first, for
a port that it holds already. So a guest's workers share its port with each other and with nobody else.

SO_REUSEADDR of a datagram socket would let any user of the host take its port over: it is never set. What the guest means by
it, several sockets at one port (a server that connects one to each client), is done with SO_REUSEPORT in the same way. The
host's kernel then spreads what comes over these sockets, and the driver in the guest hands it to the one that it is for.

*Unix targets.* A socket file that nobody listens on any more is left over from a crash and is replaced; any other file is not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ..groups import ALL_GROUPS
from ..policy import BindDecision
from ..uri import InetURI, UnixURI
from .base import made_up_port

__all__ = ["Listener", "Listeners"]

SHARE_MAX = 1024
"""Sockets of a guest that share one port: each is looked at when one answers a client of another."""


@dataclass(slots=True)
class Listener:
    """A bound host socket: where (for the log), what getsockname() shows in the guest, and what to undo when it ends."""

    sock: socket.socket
    host: InetURI | UnixURI
    shown: InetURI
    file: tuple[int, int] | None = None  # device and inode of a Unix socket's file
    counted: bool = True  # among the device's ports


class Listeners:
    """The host sockets that one device has bound for its guest."""

    def __init__(self) -> None:
        self._ports: Counter[InetURI] = Counter()
        self._shared: dict[InetURI, InetURI] = {}  # what the guest bound, and the host's address that it shares

    def holders(self, host: InetURI | UnixURI) -> int:
        """How many sockets of the guest have this address of the host."""
        return self._ports[host] if isinstance(host, InetURI) else 0

    def bind(self, asked: InetURI, decision: BindDecision, *, reuseaddr: bool, reuseport: bool, v6only: bool,
             private: Callable[[int, int], socket.socket] | None = None) -> Listener:
        """Bind what ``decision`` says. ``private`` makes sockets in a namespace that is the guest's alone: there nobody
        needs to be kept off its ports. OSError: the guest's bind() fails with its errno (EADDRINUSE, EACCES, ...)."""
        if private is not None:
            return _bind_private(asked, private, reuseaddr=reuseaddr, reuseport=reuseport, v6only=v6only)
        if isinstance(decision.host, UnixURI):
            return self._bind_unix(asked, decision.host)
        assert isinstance(decision.host, InetURI)
        shares = reuseport or (reuseaddr and decision.host.transport != "tcp")
        held = self._shared.get(asked) if shares else None
        same = held is not None and held.with_port(0) == decision.host.with_port(0)
        ports = (held.port,) if held is not None and same else decision.ports
        for port in ports:
            host = decision.host.with_port(port)
            try:
                return self._bind_inet(asked, host, reuseaddr=reuseaddr, shares=shares, v6only=v6only)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port == ports[-1]:
                    raise
        raise OSError(errno.EADDRINUSE, "no port to bind")

    def _bind_inet(self, asked: InetURI, host: InetURI, *, reuseaddr: bool, shares: bool, v6only: bool) -> Listener:
        stream = host.transport == "tcp"
        if self._ports[host] >= SHARE_MAX:
            raise OSError(errno.ENOBUFS, f"{SHARE_MAX} sockets share {host}")
        kind = socket.SOCK_STREAM if stream else socket.SOCK_DGRAM
        sock = socket.socket(host.family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if reuseaddr and stream:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if host.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
            if shares and host in self._ports:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if not stream:
                sock.setsockopt(*ALL_GROUPS[host.family], 0)
            sock.bind(host.name())
            if shares:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            host = InetURI.of_name(host.transport, sock.getsockname())
        except BaseException:
            sock.close()
            raise
        self._ports[host] += 1
        shown = asked.with_port(asked.port or host.port)
        if shares:
            self._shared[shown] = host
        return Listener(sock, host, shown)

    def _bind_unix(self, asked: InetURI, host: UnixURI) -> Listener:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            _remove_if_stale(host.path)
            sock.bind(host.path)
            made = os.stat(host.path)
        except OSError as error:
            sock.close()
            # a missing directory and the like, in the words of a TCP bind()
            code = error.errno if error.errno in (errno.EADDRINUSE, errno.EACCES) else errno.EADDRNOTAVAIL
            raise OSError(code, f"{os.strerror(code)} ({host}: {error.strerror})") from error
        except BaseException:
            sock.close()
            raise
        return Listener(sock, host, asked.with_port(asked.port or made_up_port()), (made.st_dev, made.st_ino))

    def ended(self, listener: Listener) -> None:
        """The listener is closed: its port is free, its socket file goes (unless somebody put another one there)."""
        if isinstance(listener.host, InetURI) and listener.counted:
            self._ports[listener.host] -= 1
            self._ports += Counter()  # drops what is 0
            if listener.host not in self._ports and self._shared.get(listener.shown) == listener.host:
                del self._shared[listener.shown]
        elif listener.file is not None and isinstance(listener.host, UnixURI):
            with contextlib.suppress(OSError):
                there = os.stat(listener.host.path)
                if (there.st_dev, there.st_ino) == listener.file:
                    os.unlink(listener.host.path)


def _bind_private(asked: InetURI, make: Callable[[int, int], socket.socket], *, reuseaddr: bool, reuseport: bool,
                  v6only: bool) -> Listener:
    sock = make(asked.family, asked.kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuseaddr))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuseport))
        if asked.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        sock.bind(asked.name())
        shown = InetURI.of_name(asked.transport, sock.getsockname())
    except BaseException:
        sock.close()
        raise
    return Listener(sock, shown, shown, counted=False)


def _remove_if_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
