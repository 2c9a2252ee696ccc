# SPDX-License-Identifier: BSD-3-Clause
"""Multicast groups of a guest's datagram servers, joined on the host where a ``[[publish]]`` rule names them.

The host's socket joins, so what is sent to the group on the host's network comes to it as any datagram does. A group that no
rule names is none of the device's: the guest's own stack joins it, or says why it cannot.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final

from .policy import Publish
from .uri import Address, InetURI

__all__ = ["ALL_GROUPS", "change", "named"]

# linux/in.h, linux/in6.h; the socket module has no names for them. With 0 a socket hears the groups that it joined itself, and
# not those of anybody else on the host
ALL_GROUPS: Final = {socket.AF_INET: (socket.IPPROTO_IP, 49), socket.AF_INET6: (socket.IPPROTO_IPV6, 29)}


def named(rule: Publish | None, group: Address, family: int) -> bool:
    """Does the rule of a published socket of that family name the group?"""
    same = (group.version == 6) == (family == socket.AF_INET6)
    return rule is not None and same and any(span.holds(group) for span in rule.groups)


def change(sock: socket.socket, asked: InetURI, interface: str, *, join: bool) -> None:
    """Join or leave. ``interface`` of the host, empty: its routes decide. OSError, as of setsockopt."""
    try:
        index = socket.if_nametoindex(interface) if interface else 0
    except OSError as error:  # without a number
        raise OSError(errno.ENODEV, f"{os.strerror(errno.ENODEV)} ({interface})") from error
    if sock.family == socket.AF_INET6:
        name = socket.IPV6_JOIN_GROUP if join else socket.IPV6_LEAVE_GROUP
        sock.setsockopt(socket.IPPROTO_IPV6, name, asked.plain.packed + struct.pack("=I", index))
    else:
        name = socket.IP_ADD_MEMBERSHIP if join else socket.IP_DROP_MEMBERSHIP
        sock.setsockopt(socket.IPPROTO_IP, name, asked.plain.packed + struct.pack("=4xi", index))
