# SPDX-License-Identifier: BSD-3-Clause
"""A guest as a node of an IPX network that is carried over UDP (RFC 1234): what an ``[[ipx]]`` table of the policy comes to.

One UDP socket of the host is the guest's node; it is made when a socket of the guest first asks to be bound, and lives as long
as the front-end's session. The engine writes and reads the headers and gives each packet to its flow (csrc/engine/vs_ipx.c).
Here is decided who may be sent to; who may be sent to is also heard.

    the table's peers, this node     sent to, heard, and sent broadcasts, without a rule
    broadcast                        to all of these
    other nodes                      by the rules with the scheme ipx: ``address`` and ``port`` are where the node is over UDP
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final

from .._core import lib
from .errnos import errno_name
from .policy import Guest, Ipx, Policy
from .uri import IPX_BROADCAST, InetURI, IpxURI

__all__ = ["IpxNode", "explain"]

_OFFLOAD: Final[int] = lib.VSO_OFFLOAD


class IpxNode:
    """The node that a table makes of a guest."""

    def __init__(self, table: Ipx) -> None:
        self._table = table
        self.network = table.network
        self.listen = table.listen
        self.node = _node_of(table.listen)
        self.peers = [_node_of(peer) for peer in table.peers]

    def __str__(self) -> str:
        return str(self._table)

    def socket(self) -> socket.socket:
        """The node's socket. OSError: the address is not the host's, or taken; port 213 needs a permission (EACCES)."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.bind(self.listen.name())
        except OSError as error:
            sock.close()
            # to the guest it is an interface that is not there
            reason = f"{os.strerror(errno.EADDRNOTAVAIL)} (listen on {self.listen}: {error.strerror})"
            raise OSError(errno.EADDRNOTAVAIL, reason) from error
        return sock

    def check_local(self, asked: IpxURI) -> None:
        """OSError when the guest wants to bind an address of another network. The node is not the guest's to choose."""
        if asked.network not in (0, self.network):
            raise OSError(errno.EADDRNOTAVAIL, f"network {asked.network:08x} is not {self.network:08x}")

    def decide(self, asked: IpxURI, guest: Guest, policy: Policy) -> tuple[bytes, int, int, str]:
        """May the guest send there? The socket address of the node, or the verdict and errno that refuse it; and why."""
        where = asked.endpoint
        if asked.network not in (0, self.network):
            return b"", _OFFLOAD, errno.ENETUNREACH, f"network {asked.network:08x} is not {self.network:08x}"
        if asked.node == IPX_BROADCAST:
            return self.listen.sockaddr(), _OFFLOAD, 0, f"broadcast, {self}"
        if asked.node == self.node or asked.node in self.peers:
            return where.sockaddr(), _OFFLOAD, 0, str(self)
        decision = policy.decide(where, guest)
        if decision.action == "deny":
            return b"", lib.VSO_DENY, decision.errno, decision.why
        if decision.action == "native":
            return b"", _OFFLOAD, errno.ENETUNREACH, f"{where} is no peer of {self}, and {decision.why}"
        return where.sockaddr(), _OFFLOAD, 0, decision.why


def explain(policy: Policy, asked: IpxURI, guest: Guest) -> Iterator[str]:
    """Lines that say what happens to a datagram to ``asked``."""
    table = policy.ipx_of(guest.device)
    if table is None:
        yield f"{asked}: the guest has no IPX network"
        yield f"  because no [[ipx]] of {policy.file} names the device {guest.device!r}"
        return
    _, _, code, why = IpxNode(table).decide(asked, guest, policy)
    outcome = f"the application gets {errno_name(code)}" if code else "sent over UDP, and whoever is there is heard"
    yield f"{asked}: {outcome}"
    yield f"  because of {why}"


def _node_of(where: InetURI) -> int:
    assert isinstance(where.address, IPv4Address)
    return IpxURI.node_at(where.address, where.port)
