"""The direct handler: a TCP or UDP socket of the host, connected to the target.

Also what unconnected datagram sockets of the guest use: one host socket that any target of its family can be sent to.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from ..uri import InetURI
from .base import Connection, Request, apply_options, connect, connected, shown_local

__all__ = ["DirectHandler", "open_datagram"]


def _inet_target(request: Request) -> InetURI:
    if not isinstance(request.target, InetURI):
        raise OSError(errno.EAFNOSUPPORT, f"the direct handler cannot connect {request.target}")
    if request.kind == socket.SOCK_SEQPACKET:
        raise OSError(errno.EPROTOTYPE, f"{request.target} is a stream, and messages are asked for")
    return request.target


def _socket(target: InetURI) -> socket.socket:
    """OSError; for an echo socket that this process may not have, it says where the permission is."""
    try:
        return socket.socket(target.family, target.kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, target.protocol)
    except PermissionError as error:
        if target.transport != "icmp":
            raise
        why = "this process's groups are not in the host's sysctl net.ipv4.ping_group_range"
        raise OSError(errno.EACCES, f"{os.strerror(errno.EACCES)} ({why})") from error


class DirectHandler:
    """tcp, tcp6, udp, udp6, icmp and icmp6 targets. The guest's own bound address is not used: it is none of the host's."""

    async def connect(self, request: Request) -> Connection:
        target = _inet_target(request)
        dialed = request.dialed()
        sock = dialed or _socket(target)
        try:
            if dialed:
                await connected(sock)
            else:
                apply_options(sock, request.opts)
                await connect(sock, target.name())
            if target.transport == "tcp" and sock.getsockname() == sock.getpeername():
                # the kernel chose the very port that was asked for and the socket met itself (RFC 9293, 3.5); nobody listens
                raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            local = shown_local(request, InetURI.of_name(target.transport, sock.getsockname()))
        except BaseException:
            sock.close()
            raise
        return Connection(sock, local, request.uri)


def open_datagram(request: Request, make: Callable[[int, int], socket.socket] = socket.socket) -> Connection:
    """An unconnected UDP socket for a guest that uses sendto(): of the target's family, IPv6 also reaching IPv4 (mapped).

    ``make`` makes it. OSError when the host cannot. Bound at once, to any free port, so that it has an address to show.
    """
    target = _inet_target(request)
    if target.transport == "icmp":
        sock = _socket(target)
    else:
        sock = make(target.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if target.family == socket.AF_INET6 and target.transport == "udp":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        apply_options(sock, request.opts)
        sock.bind(("::" if target.family == socket.AF_INET6 else "0.0.0.0", 0))
        bound = InetURI.of_name(target.transport, sock.getsockname())
        # as on Linux, getsockname() of an unconnected socket shows the wildcard and the port
        asked = request.uri.plain if isinstance(request.uri, InetURI) else target.plain
        address = request.local.address if request.local else type(asked)(0)
        port = request.local.port if request.local and request.local.port else bound.port
    except BaseException:
        sock.close()
        raise
    return Connection(sock, InetURI(target.transport, address, port), request.uri)
