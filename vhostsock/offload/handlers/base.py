"""What a socket handler is: a URI in, a connected file descriptor out.

The device asks a handler once per connection. From the answer on the engine owns the descriptor and moves the bytes; the
handler sees none of them. A handler raises OSError, and the guest's application gets that errno; it is cancelled when the guest
gives up or the policy's connect timeout passes, and must not leak its socket then.

Addresses.  getpeername() in the guest shows what the application asked for, whatever policy made of it. getsockname() shows
the host socket's own address where the guest's socket can hold it, else ``NO_ADDRESS`` (documentation addresses, RFC 5737 and
RFC 3849: nobody has them, so nobody trusts them) with a port from 49152 on. What the guest had bound before stays what it
shows: the host's socket is not bound to it, since it is an address of the guest.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import select
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, Protocol

from ..._core import ffi, lib
from ..policy import Guest
from ..uri import URI, Address, InetURI, VsockURI

__all__ = [
    "NO_ADDRESS", "Connection", "Handler", "Request", "apply_options", "connect", "connected", "made_up_port", "shown_local",
]  # fmt: skip

NO_ADDRESS: Final[Mapping[int, Address]] = {4: IPv4Address("192.0.2.2"), 6: IPv6Address("2001:db8::2")}
_made_up_ports = itertools.cycle(range(49152, 65536))  # IANA's dynamic ports, RFC 6335


def made_up_port() -> int:
    """A port for an address that no host socket has."""
    return next(_made_up_ports)


def _ignore_reset(error: int) -> None:
    """A request that no device made has no flow to reset."""


def _nothing_to_settle() -> None:
    """Nor one that ended."""


def _nothing_dialed() -> None:
    """Nor an engine that began to connect."""


@dataclass(frozen=True, slots=True)
class Request:
    """One connection that a guest wants. ``uri`` is what it asked for, ``target`` what policy made of it.

    ``opts`` are the socket options of the application, packed as on the wire. ``pid`` and ``comm`` are the guest's word.
    ``reset(errno)`` ends the connection with a reset, at any time after ``connect`` returned. ``settle()`` makes the device
    take what the engine has told by now: who sees the descriptor's other end closed knows then how the flow ended. ``kind`` is
    the type of the socket that is wanted for a stream: SOCK_STREAM, or SOCK_SEQPACKET (from a vsock device only). ``bound``
    duplicates the host's socket that the guest's has been bound or connected with, if it was. ``dialed()`` is for the direct
    handler: the socket that the engine has begun to connect to ``target``, its options set, or None; OSError if that failed.
    """

    uri: InetURI | VsockURI
    target: URI
    guest: Guest = field(default_factory=Guest)
    local: InetURI | None = None
    opts: bytes = b""
    flow: int = 0
    pid: int = 0
    comm: str = ""
    reset: Callable[[int], Any] = _ignore_reset
    settle: Callable[[], Any] = _nothing_to_settle
    kind: socket.SocketKind = socket.SOCK_STREAM
    bound: Callable[[], socket.socket] | None = None
    dialed: Callable[[], socket.socket | None] = _nothing_dialed


class Connection:
    """A handler's answer: a connected descriptor, and the addresses the guest's application sees.

    The descriptor is the Connection's until ``detach()``. ``task`` is what goes on serving the other end, if anything does;
    ``ended(errno)`` is called when the engine is done with the flow, with 0 after an orderly close.
    """

    def __init__(self, sock: socket.socket, local: InetURI | VsockURI, peer: InetURI | VsockURI, *,
                 task: asyncio.Task[None] | None = None, ended: Callable[[int], None] | None = None) -> None:  # fmt: skip
        self._sock = sock
        self.family: int = sock.family
        self.local = local
        self.peer = peer
        self.task = task
        self.ended = ended

    def detach(self) -> int:
        """Give the descriptor away."""
        return self._sock.detach()

    def close(self) -> None:
        """The connection is not wanted any more: close what was not detached, cancel the task."""
        self._sock.close()
        if self.task is not None:
            self.task.cancel()


class Handler(Protocol):
    """Connects one request. Implementations: direct, unix, inprocess; or your own (see docs/policy.md)."""

    async def connect(self, request: Request) -> Connection:
        """The connected socket for ``request.target``. OSError: the guest gets its errno."""
        ...


async def connect(sock: socket.socket, name: Any) -> None:
    """Connect a non-blocking socket; OSError carries the host's errno.

    Not loop.sock_connect(): that takes a Unix socket's EAGAIN (the listener's backlog is full) for a connection under way,
    and the socket's being writable for its success.
    """
    code = sock.connect_ex(name)
    if code == errno.EINPROGRESS:
        await connected(sock)
    elif code:
        raise OSError(code, os.strerror(code))


async def connected(sock: socket.socket) -> None:
    """The end of a connect that is in progress; OSError carries the host's errno."""
    at_once = select.poll()
    at_once.register(sock, select.POLLOUT)
    if not at_once.poll(0):  # else it was over when connect() returned, as on loopback
        await _writable(sock)
    if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    writable: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not writable.done():
            writable.set_result(None)

    loop.add_writer(sock.fileno(), wake)
    try:
        await writable
    finally:
        loop.remove_writer(sock.fileno())


def apply_options(sock: socket.socket, opts: bytes) -> int:
    """Set the application's options before connecting, as far as this kind of socket has them.

    Returns 0, or the errno of the first that failed. The engine has one whitelist of options for all; see docs/offload-abi.md.
    """
    code: int = lib.vse_apply_opts(sock.fileno(), ffi.from_buffer(opts), len(opts)) if opts else 0
    return -code


def shown_local(request: Request, host: InetURI | None) -> InetURI | VsockURI:
    """What getsockname() shows for ``request`` on a host socket that is bound to ``host`` (None: no IP address). A vsock guest
    knows its own address."""
    asked = request.uri
    if isinstance(asked, VsockURI):
        return asked
    address: Address = NO_ADDRESS[asked.address.version]
    if host is not None and host.family == asked.family:
        address = host.address
    port = host.port if host is not None else 0
    if request.local is not None:
        if not request.local.address.is_unspecified:
            address = request.local.address
        port = request.local.port or port
    return InetURI(asked.transport, address, port or made_up_port())
