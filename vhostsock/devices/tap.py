# SPDX-License-Identifier: BSD-3-Clause
"""A tap interface as the port of a network card: what the guest sends comes out of it, and what the host sends into it goes in.

A tap that is there is used as it is found; one that is not is made, brought up, and is gone when this process is. Each queue
pair has a queue of the tap, which is detached while the guest does not use the pair: the kernel spreads its packets over those
that are attached.

Packets carry virtio's own header to the kernel and back, so checksums and segmentation go through to where they are done. The
kernel checks the header once more.

The guest's link follows the tap's: it is down while somebody has set the tap down (rtnetlink tells).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Iterable

from ..errors import RequestError
from ..ring import Chain
from .net import MAX_FRAME, Net, Pair
from .net_header import HEADER_SIZE, LEGACY_HEADER_SIZE, NetFeature

__all__ = ["Tap"]

log = logging.getLogger("vhostsock.net")

BUDGET = 64  # packets per wake-up, then others get their turn

# linux/if_tun.h
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
TUNSETQUEUE, TUNSETVNETLE = 0x400454D9, 0x400454DC
IFF_TAP, IFF_MULTI_QUEUE, IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 2, 0x100, 0x200, 0x400, 0x1000, 0x4000
IFF_UP = 1
_IFREQ = struct.Struct("16sH22x")
# what the kernel may leave to the guest
OFFLOADS = {NetFeature.GUEST_CSUM: 1, NetFeature.GUEST_TSO4: 2, NetFeature.GUEST_TSO6: 4}
RTNLGRP_LINK = 1
RTM_NEWLINK = 16
NUM_BUFFERS = b"\1\0"  # means nothing towards the kernel


class _TapQueue:
    """One descriptor of the tap. ``packet`` is one that the guest had no room for; while it is there, nothing is read."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.reading = False
        self.attached = True
        self.packet: tuple[bytes, bytes] | None = None


class Tap:
    """``Port`` on the tap ``name`` (1 to 15 bytes) with that many queues.

    OSError says what the kernel has against it. Not to be made on a running event loop (pyroute2).
    """

    def __init__(self, name: str, pairs: int = 1) -> None:
        from pyroute2 import IPRoute

        self.features: int = NetFeature.CSUM | NetFeature.HOST_TSO4 | NetFeature.HOST_TSO6
        self.features |= NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6
        self._name = name
        self._many = pairs > 1
        if not 1 <= len(name.encode()) <= 15:
            raise OSError(errno.EINVAL, "no name of an interface: 1 to 15 bytes", name)
        new = name not in (known for _, known in socket.if_nameindex())
        self._queues: list[_TapQueue] = []
        self._watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        try:
            for _ in range(pairs):
                self._queues.append(_TapQueue(self._open()))
            self._watch.bind((0, RTNLGRP_LINK))
            self._index = socket.if_nametoindex(name)
            with IPRoute() as route:
                if new:
                    route.link("set", index=self._index, state="up")
                [link] = route.get_links(self._index)
                self._up = bool(link["flags"] & IFF_UP)
                self.mtu: int | None = link.get_attr("IFLA_MTU")
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if self._many else 0)
            fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(self._name.encode(), flags))
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
            fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
        except OSError as error:
            os.close(fd)
            hints = {
                errno.EPERM: "; this needs CAP_NET_ADMIN, or a tap that belongs to this user",
                errno.EINVAL: "; it is no tap, or was made with one queue where several are wanted or the other way round",
                errno.EBUSY: "; somebody uses it",
            }
            text = f"cannot open the tap: {error.strerror}{hints.get(error.errno or 0, '')}"
            raise OSError(error.errno, text, self._name) from None
        return fd

    def close(self) -> None:
        """Let go of the tap, which is gone then unless it is a persistent one. The device is disconnected."""
        self._watch.close()
        for queue in self._queues:
            os.close(queue.fd)
        self._queues.clear()

    # ---- as the card wants it

    def attach(self, net: Net) -> None:
        self._net = net
        net.set_link(self._up)
        for queue in self._queues:
            self._use(queue, False)

    def connected(self) -> None:
        asyncio.get_running_loop().add_reader(self._watch, self._link_changed)

    def disconnected(self) -> None:
        asyncio.get_running_loop().remove_reader(self._watch)

    def changed(self, pair: Pair) -> None:
        queue = self._queues[pair.index]
        if self._net.in_use(pair):
            acked = self._net.acked_features
            offloads = sum(flag for feature, flag in OFFLOADS.items() if acked & feature)
            # segmentation needs checksums (virtio 1.3, 5.1.3.1); the kernel would refuse all of a word without them
            self._control(queue, TUNSETOFFLOAD, offloads if acked & NetFeature.GUEST_CSUM else 0)
            self._use(queue, True)
            self.room(pair)
        else:
            self._pause(queue)
            self._use(queue, False)
            if queue.packet:
                queue.packet = None
                self._net.counters["rx_dropped"] += 1

    def room(self, pair: Pair) -> None:
        queue = self._queues[pair.index]
        if queue.packet:
            if not self._net.deliver(pair, *queue.packet):
                return
            queue.packet = None
            self._net.flush(pair)
        if not queue.reading and queue.attached and pair.buffers:
            queue.reading = True
            asyncio.get_running_loop().add_reader(queue.fd, self._readable, pair)

    def transmit(self, pair: Pair, chains: Iterable[Chain]) -> None:
        fd = self._queues[pair.index].fd
        for chain in chains:
            packet = self._net.packet_of(chain)
            if packet:
                header, frame = packet
                try:
                    os.writev(fd, [header.pack() + NUM_BUFFERS, frame])
                except OSError:  # the tap is down, or the kernel does not believe the header
                    self._net.counters["tx_dropped"] += 1
            chain.complete()

    def announce(self, mac: bytes) -> None:
        """A RARP request in the guest's name, as switches learn its new place from (RFC 903)."""
        body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 3) + mac + bytes(4) + mac + bytes(4)
        frame = (b"\xff" * 6 + mac + b"\x80\x35" + body).ljust(60, b"\0")
        try:
            os.writev(self._queues[0].fd, [bytes(HEADER_SIZE), frame])
        except OSError as error:
            raise RequestError(f"{self._name}: cannot announce {mac.hex(':')}: {error.strerror}") from None

    # ---- the tap

    def _readable(self, pair: Pair) -> None:
        queue = self._queues[pair.index]
        for _ in range(BUDGET):
            if not pair.buffers:
                self._pause(queue)
                break
            try:
                data = os.read(queue.fd, HEADER_SIZE + MAX_FRAME)
            except BlockingIOError:
                break
            except OSError as error:
                log.error("%s: cannot be read any more: %s", self._name, error.strerror)
                self._pause(queue)
                queue.attached = False
                self._net.set_link(False)
                break
            packet = data[:LEGACY_HEADER_SIZE], data[HEADER_SIZE:]
            if not self._net.deliver(pair, *packet):
                queue.packet = packet
                self._pause(queue)
                break
        self._net.flush(pair)

    def _pause(self, queue: _TapQueue) -> None:
        if queue.reading:
            queue.reading = False
            asyncio.get_running_loop().remove_reader(queue.fd)

    def _use(self, queue: _TapQueue, used: bool) -> None:
        if self._many and queue.attached != used:
            flags = IFF_ATTACH_QUEUE if used else IFF_DETACH_QUEUE
            queue.attached = used if self._control(queue, TUNSETQUEUE, _IFREQ.pack(b"", flags)) else queue.attached

    def _control(self, queue: _TapQueue, request: int, value: int | bytes) -> bool:
        try:
            fcntl.ioctl(queue.fd, request, value)
        except OSError as error:
            log.warning("%s: %s", self._name, error.strerror)
            return False
        return True

    def _link_changed(self) -> None:
        from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

        while True:
            try:
                data = self._watch.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:  # some were lost; the next one tells again
                log.warning("rtnetlink: %s", error.strerror)
                continue
            while len(data) >= 16:
                size, kind = struct.unpack_from("=IH", data)
                if kind == RTM_NEWLINK:
                    message = ifinfmsg(data[:size])
                    message.decode()
                    if message["index"] == self._index:
                        self._net.set_link(bool(message["flags"] & IFF_UP))
                data = data[max(16, size + 3 & ~3) :]
