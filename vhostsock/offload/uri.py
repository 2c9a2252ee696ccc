"""Socket addresses as URIs: what a guest asks for, what policy rewrites it to, what getsockname() shows.

| scheme          | form                          | where it may stand                                   |
|-----------------|-------------------------------|------------------------------------------------------|
| ``tcp``, ``udp``   | ``tcp://192.0.2.1:80``          | on the wire, in policies                             |
| ``tcp6``, ``udp6`` | ``tcp6://2001:db8::1/80``, ``udp6://fe80::1%eth0/53`` | on the wire, in policies       |
| ``icmp``, ``icmp6`` | ``icmp://192.0.2.1:0`` (the port: the identifier)     | on the wire                  |
| ``ipx``           | ``ipx://network.node.socket``   | on the wire                                          |
| ``unix``          | ``unix:///run/db.sock``         | in policies only: a rewriting target on the host     |
| ``vsock``         | ``vsock://2:1234`` (CID, port)  | what a guest asks a vsock device for                 |

One address has one text. The parser is strict (no names, no leading zeros, no missing port), and it refuses IPv4-mapped IPv6
addresses: they would reach an IPv4 host while slipping past every rule that names its IPv4 address. ``str(uri)`` is the
canonical text, and ``parse(str(uri)) == uri`` always holds.
"""

from __future__ import annotations

import errno
import functools
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any, ClassVar, Literal

__all__ = [
    "IPX_BROADCAST", "IPX_UDP_PORT", "URI", "InetURI", "IpxURI", "URIError", "UnixURI", "VsockURI", "parse", "parse_inet",
]  # fmt: skip

Address = IPv4Address | IPv6Address
Transport = Literal["tcp", "udp", "icmp", "ipx"]

IPX_UDP_PORT = 213  # RFC 1234
IPX_BROADCAST = (1 << 48) - 1  # the node that is all nodes
UNIX_PATH_MAX = 107  # sun_path holds 108 bytes with the NUL, unix(7)
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # an interface index, or a name (IFNAMSIZ - 1)
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")


class URIError(ValueError):
    """The text is no socket URI; the message says what is wrong and shows the right form."""


@dataclass(frozen=True, slots=True)
class InetURI:
    """A TCP or UDP endpoint over IPv4 or IPv6, or one of ICMP echo, whose port is the identifier, or the UDP endpoint of a node
    of IPX.

    An IPv6 scope is part of ``address``, as in the ipaddress module.
    """

    transport: Transport
    address: Address
    port: int

    @property
    def scheme(self) -> str:
        return self.transport + ("6" if self.address.version == 6 else "")

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if self.address.version == 6 else socket.AF_INET

    @property
    def kind(self) -> socket.SocketKind:
        return socket.SOCK_STREAM if self.transport == "tcp" else socket.SOCK_DGRAM

    @property
    def plain(self) -> Address:
        """The address without its scope: what rules are matched against."""
        return IPv6Address(int(self.address)) if isinstance(self.address, IPv6Address) else self.address

    @property
    def protocol(self) -> int:
        """For socket(): 0, or that of ICMP echo."""
        if self.transport != "icmp":
            return 0
        return socket.IPPROTO_ICMPV6 if self.address.version == 6 else socket.IPPROTO_ICMP

    def with_port(self, port: int) -> InetURI:
        return InetURI(self.transport, self.address, port)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}{'/' if self.address.version == 6 else ':'}{self.port}"

    def name(self, family: int | None = None) -> tuple[Any, ...]:
        """The address as Python's socket calls take it. OSError when a scope names no interface of this host. ``family``: as
        for ``sockaddr``."""
        if family == socket.AF_INET6 and isinstance(self.address, IPv4Address):
            return (f"::ffff:{self.address}", self.port)
        if isinstance(self.address, IPv6Address):
            return (str(self.plain), self.port, 0, self._scope_index())
        return (str(self.address), self.port)

    def sockaddr(self, family: int | None = None) -> bytes:
        """struct sockaddr_in or sockaddr_in6. ``family`` AF_INET6 gives an IPv4 address as IPv4-mapped (RFC 4291, 2.5.5.2),
        for a dual-stack socket; OSError (EAFNOSUPPORT) for an IPv6 address on AF_INET."""
        family = family or self.family
        if isinstance(self.address, IPv4Address):
            if family == socket.AF_INET:
                return struct.pack("=H2s4s8x", socket.AF_INET, self.port.to_bytes(2, "big"), self.address.packed)
            mapped = b"\0" * 10 + b"\xff\xff" + self.address.packed
            return struct.pack("=H2sI16sI", socket.AF_INET6, self.port.to_bytes(2, "big"), 0, mapped, 0)
        if family == socket.AF_INET:
            raise OSError(errno.EAFNOSUPPORT, f"{self} cannot be reached from an IPv4 socket")
        port = self.port.to_bytes(2, "big")
        return struct.pack("=H2sI16sI", socket.AF_INET6, port, 0, self.address.packed, self._scope_index())

    def _scope_index(self) -> int:
        scope = self.address.scope_id if isinstance(self.address, IPv6Address) else None
        if scope is None:
            return 0
        return int(scope) if scope.isdigit() else socket.if_nametoindex(scope)

    @classmethod
    def of_name(cls, transport: Transport, name: tuple[Any, ...]) -> InetURI:
        """From what getsockname() or accept() gave; an IPv4-mapped address becomes IPv4."""
        if len(name) == 2:
            return cls(transport, IPv4Address(name[0]), name[1])
        address = IPv6Address(name[0].partition("%")[0])
        if address.ipv4_mapped is not None:
            return cls(transport, address.ipv4_mapped, name[1])
        if name[3]:
            address = IPv6Address(f"{address}%{name[3]}")
        return cls(transport, address, name[1])


@dataclass(frozen=True, slots=True)
class UnixURI:
    """A Unix stream socket of the host, by absolute path."""

    path: str

    scheme = "unix"

    def sockaddr(self) -> bytes:
        """struct sockaddr_un."""
        return struct.pack("=H", socket.AF_UNIX) + self.path.encode() + b"\0"

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True, slots=True)
class IpxURI:
    """An IPX endpoint: network (32 bits), node (48 bits), socket (16 bits), hexadecimal in the text.

    A node is where it is reached over UDP: two octets zero and the IPv4 address, as RFC 1234 has it for its port 213; for
    another UDP port the two octets are the port.
    """

    network: int
    node: int
    socket: int

    scheme = "ipx"
    transport: ClassVar[Literal["ipx"]] = "ipx"

    @property
    def endpoint(self) -> InetURI:
        """Where the node is, as rules are matched against: transport ``ipx``, its IPv4 address and UDP port."""
        return InetURI("ipx", IPv4Address(self.node & 0xFFFFFFFF), self.node >> 32 or IPX_UDP_PORT)

    @staticmethod
    def node_at(address: IPv4Address, port: int) -> int:
        """The node that is reached there."""
        return (0 if port == IPX_UDP_PORT else port) << 32 | int(address)

    def __str__(self) -> str:
        return f"ipx://{self.network:08x}.{self.node:012x}.{self.socket:04x}"


@dataclass(frozen=True, slots=True)
class VsockURI:
    """A port of a virtio-vsock context; both numbers have 32 bits. The host is CID 2."""

    cid: int
    port: int

    scheme = "vsock"

    def __str__(self) -> str:
        return f"vsock://{self.cid}:{self.port}"


URI = InetURI | UnixURI | IpxURI | VsockURI


def _port(text: str, whole: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise URIError(f"{whole!r}: {text!r} is no port; write a decimal number 0..65535 without leading zeros")
    return int(text)


def _v4(transport: Transport) -> Callable[[str, str], InetURI]:
    def parse_v4(rest: str, whole: str) -> InetURI:
        host, colon, port = rest.rpartition(":")
        if not colon:
            raise URIError(f"{whole!r}: no port; write {transport}://a.b.c.d:port")
        if ":" in host:
            raise URIError(f"{whole!r}: an IPv6 address has a scheme of its own; write {transport}6://address/port")
        try:
            address = IPv4Address(host)
        except AddressValueError:
            advice = f"write {transport}://a.b.c.d:port (names are not resolved)"
            raise URIError(f"{whole!r}: {host!r} is no IPv4 address; {advice}") from None
        return InetURI(transport, address, _port(port, whole))

    return parse_v4


def _v6(transport: Transport) -> Callable[[str, str], InetURI]:
    def parse_v6(rest: str, whole: str) -> InetURI:
        host, slash, port = rest.rpartition("/")
        if not slash:
            raise URIError(f"{whole!r}: no port; write {transport}6://address/port, without brackets")
        try:
            address = IPv6Address(host)
        except AddressValueError:
            advice = f"write {transport}6://address/port, without brackets"
            raise URIError(f"{whole!r}: {host!r} is no IPv6 address; {advice}") from None
        if address.scope_id is not None and not _SCOPE.fullmatch(address.scope_id):
            raise URIError(f"{whole!r}: {address.scope_id!r} is no interface; write its name or index after the %")
        if address.ipv4_mapped is not None:
            raise URIError(f"{whole!r}: an IPv4-mapped address; write {transport}://{address.ipv4_mapped}:{port}")
        return InetURI(transport, address, _port(port, whole))

    return parse_v6


def _unix(rest: str, whole: str) -> UnixURI:
    if not rest.startswith("/"):
        raise URIError(f"{whole!r}: the path must be absolute; write unix:///run/name.sock, with three slashes")
    if "\0" in rest or len(rest.encode()) > UNIX_PATH_MAX:
        raise URIError(f"{whole!r}: a socket path has at most {UNIX_PATH_MAX} bytes and no NUL")
    return UnixURI(rest)


def _ipx(rest: str, whole: str) -> IpxURI:
    parts = rest.split(".")
    if len(parts) != 3 or not all(re.fullmatch(r"[0-9a-fA-F]+", p) for p in parts):
        raise URIError(f"{whole!r}: write ipx://network.node.socket, each in hexadecimal")
    network, node, number = (int(p, 16) for p in parts)
    if network >> 32 or node >> 48 or number >> 16:
        raise URIError(f"{whole!r}: network has 32 bits, node 48 and socket 16")
    return IpxURI(network, node, number)


def _vsock(rest: str, whole: str) -> VsockURI:
    match = re.fullmatch(r"(0|[1-9][0-9]{0,9}):(0|[1-9][0-9]{0,9})", rest)
    if not match or any(int(number) >> 32 for number in match.groups()):
        raise URIError(f"{whole!r}: write vsock://cid:port, both decimal numbers of 32 bits")
    return VsockURI(int(match[1]), int(match[2]))


_PARSERS: dict[str, Callable[[str, str], URI]] = {
    "tcp": _v4("tcp"), "udp": _v4("udp"), "tcp6": _v6("tcp"), "udp6": _v6("udp"), "icmp": _v4("icmp"), "icmp6": _v6("icmp"),
    "unix": _unix, "ipx": _ipx,
    "vsock": _vsock,
}  # fmt: skip


@functools.lru_cache(maxsize=1024)  # programs connect to the same places again and again
def parse(text: str) -> URI:
    """The URI in ``text``; URIError says what is wrong with it."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise URIError(f"{text!r}: no scheme; write one of {', '.join(_PARSERS)}, then ://")
    if scheme not in _PARSERS:
        raise URIError(f"{text!r}: unknown scheme {scheme!r}; the schemes are {', '.join(_PARSERS)}")
    return _PARSERS[scheme](rest, text)


def parse_inet(text: str) -> InetURI:
    """The TCP or UDP URI in ``text``; URIError for every other scheme too."""
    uri = parse(text)
    if not isinstance(uri, InetURI):
        raise URIError(f"{text!r}: a {uri.scheme} address cannot stand here; write tcp, udp, tcp6 or udp6")
    return uri
