# SPDX-License-Identifier: BSD-3-Clause
"""A network device (virtio 1.3, 5.1): queue pairs, config space and control queue. Where packets go is a *port* (`Port`).

Queue 2k takes from pair k's driver buffers for packets to it ("receiveq"), queue 2k+1 brings packets of it ("transmitq"). The
queue behind the last pair is the control queue; a front-end such as QEMU's vhost-user-net, or DPDK, keeps that one, the config
space and the MAC address to itself and shows us the pairs alone.

A packet to the guest needs buffers that are there already:

    no buffer, or too few with MRG_RXBUF    `deliver` says so; the port keeps the packet and hears `room` when more come
    more than all of the ring can hold      dropped, or it would block the port for ever
    one buffer, without MRG_RXBUF           the packet fits or is dropped; the buffer is kept for the next one

So a guest that takes no packets stops its port, which holds at most one packet for it, and nothing grows. Buffers are used in
the order in which they came, and so are packets: a pause finds all that is left in the rings again.

A header that cannot be believed costs its packet (net_header.py). A request too short for a header breaks its ring.
"""

from __future__ import annotations

import contextlib
import logging
import random
import struct
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from ..device import Device, Queue
from ..errors import DriverError, RequestError
from ..ring import Chain
from .net_header import (
    HEADER_SIZE,
    LEGACY_HEADER_SIZE,
    PLAIN,
    Header,
    NetFeature,
    check,
    finish_checksum,
    needs_checksum,
)

__all__ = ["MAX_FRAME", "MAX_PAIRS", "Loopback", "Net", "Pair", "Port"]

log = logging.getLogger("vhostsock.net")

VERSION_1 = 1 << 32
MAX_PAIRS = 64
# The largest packet is an IP packet of 65535 bytes, to be segmented, behind an Ethernet header with two VLAN tags.
MAX_FRAME = 65535 + 22
MIN_FRAME = 14  # an Ethernet header
MTU_RANGE = range(68, 65536)  # virtio 1.3, 5.1.4.1

_CONFIG = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu (5.1.4)
STATUS_LINK_UP = 1
_COMMAND = struct.Struct("<BB")  # class, command (5.1.6.5)
CTRL_MQ = 4
CTRL_MQ_VQ_PAIRS_SET = 0
CTRL_OK, CTRL_ERR = b"\0", b"\1"


class Pair:
    """The two queues of one pair, while they run, and the driver's free buffers."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.rx: Queue | None = None
        self.tx: Queue | None = None
        self.buffers: deque[Chain] = deque()  # at most the ring's size

    def given_out(self) -> bool:
        """Whether all that the driver's ring can hold is in ``buffers``: no more can come before these are used."""
        return self.rx is not None and sum(chain.ptr.descs for chain in self.buffers) >= self.rx.vring.num


class Port(Protocol):
    """The other end of the cable. All is called on the event loop.

    features    offload bits (NetFeature) that its packets can have or take
    mtu         the largest IP packet it takes; None: any
    """

    features: int
    mtu: int | None

    def attach(self, net: Net) -> None:
        """Once, before all else. ``net.deliver`` and ``net.set_link`` are the port's from then on."""

    def connected(self) -> None:
        """A front-end came."""

    def disconnected(self) -> None:
        """It went; all queues are stopped."""

    def changed(self, pair: Pair) -> None:
        """A queue of this pair started or stopped (``pair.rx``, ``pair.tx``), or the driver uses other pairs (`Net.in_use`).

        Keep no chain of a queue that stopped.
        """

    def room(self, pair: Pair) -> None:
        """The driver gave more buffers."""

    def transmit(self, pair: Pair, chains: Iterable[Chain]) -> None:
        """Packets of the driver: `Net.packet_of` reads each. Complete them in this order, now, or later with a flush."""

    def announce(self, mac: bytes) -> None:
        """The guest with this address is here now. RequestError: nobody can be told."""


class Net(Device):
    """Serves ``-netdev vhost-user`` with virtio-net-pci, DPDK's virtio-user, and the generic carrier with virtio id 1.

    mac     for front-ends that ask the device; others have their own. Default: a random local one
    mtu     told to the driver (68..65535); None: the port's, and if it has none, nothing is told
    pairs   queue pairs, 1..64
    """

    virtio_id = 1
    packed = True
    in_order = True
    max_queue_size = 1024

    def __init__(self, port: Port, *, mac: bytes | None = None, mtu: int | None = None, pairs: int = 1) -> None:
        if not 1 <= pairs <= MAX_PAIRS:
            raise ValueError(f"{pairs} queue pairs; may be 1..{MAX_PAIRS}")
        if mtu is not None and mtu not in MTU_RANGE:
            raise ValueError(f"an MTU of {mtu}; may be {MTU_RANGE.start}..{MTU_RANGE.stop - 1}")
        if mtu is None:
            mtu = port.mtu
        elif port.mtu is not None and mtu > port.mtu:
            raise ValueError(f"an MTU of {mtu}, and the port takes {port.mtu}")
        mac = mac or bytes([0x52, 0x54, 0x00, *random.randbytes(3)])
        if len(mac) != 6 or mac[0] & 1:
            raise ValueError(f"{mac.hex(':')} is no address of one station: 6 bytes, the first of them even")
        self.port = port
        self.mac = mac
        self.mtu = mtu
        self.pairs = [Pair(index) for index in range(pairs)]
        self._active = 1  # pairs that the driver uses, by its word on the control queue
        self._roles: dict[int, Pair | None] = {}  # what each queue was started as
        self.link_up = True
        self.num_queues = 2 * pairs + (pairs > 1)
        self.features = NetFeature.MAC | NetFeature.STATUS | NetFeature.MRG_RXBUF | port.features
        if pairs > 1:
            self.features |= NetFeature.MQ | NetFeature.CTRL_VQ
        if mtu is not None:
            self.features |= NetFeature.MTU
        self.counters = dict.fromkeys(
            ("tx_packets", "tx_bytes", "tx_gso", "tx_refused", "tx_dropped", "rx_packets", "rx_bytes", "rx_gso", "rx_dropped"),
            0,
        )
        port.attach(self)

    # ---- config space and life

    def read_config(self, offset: int, size: int) -> bytes:
        status = STATUS_LINK_UP if self.link_up else 0
        config = _CONFIG.pack(self.mac, status, len(self.pairs), self.mtu or 0)
        return config[offset : offset + size].ljust(size, b"\0")

    def set_link(self, up: bool) -> None:
        """The cable is in or out: the guest sees its carrier come and go, if its front-end takes the status from us."""
        if up != self.link_up:
            self.link_up = up
            log.info("link is %s", "up" if up else "down")
            self.config_changed()

    def reset(self) -> None:
        self._use(1)

    async def connected(self) -> None:
        self.port.connected()

    async def disconnected(self) -> None:
        self.port.disconnected()

    def announce(self, mac: bytes) -> None:
        self.port.announce(mac)

    def set_mtu(self, mtu: int) -> None:
        if self.port.mtu is not None and mtu > self.port.mtu:
            raise RequestError(f"an MTU of {mtu}, and the port takes {self.port.mtu}")

    def report(self) -> None:
        log.info("stats name=net %s", " ".join(f"{key}={value}" for key, value in self.counters.items()))

    def queue_started(self, queue: Queue) -> None:
        self._roles[queue.index] = self._pair_of(queue)
        self._note(queue, queue)
        super().queue_started(queue)

    def queue_stopped(self, queue: Queue) -> None:
        super().queue_stopped(queue)
        self._note(queue, None)

    def _note(self, queue: Queue, running: Queue | None) -> None:
        pair = self._roles[queue.index]
        if pair is None:
            return
        if queue.index % 2:
            pair.tx = running
        else:
            pair.rx = running
            pair.buffers.clear()  # they come again when the queue goes on
        self.port.changed(pair)

    def _pair_of(self, queue: Queue) -> Pair | None:
        """None: it is the control queue, whose place depends on whether the driver knows of more than one pair (5.1.2)."""
        pairs = len(self.pairs) if self.acked_features & NetFeature.MQ or not self.acked_features & NetFeature.CTRL_VQ else 1
        return self.pairs[queue.index // 2] if queue.index < 2 * pairs else None

    def in_use(self, pair: Pair) -> bool:
        """Whether packets may go to this pair. A front-end with a control queue of its own starts only those it uses."""
        ours = self.acked_features & NetFeature.CTRL_VQ
        return pair.rx is not None and (not ours or pair.index < self._active)

    def _use(self, pairs: int) -> None:
        self._active = pairs
        for pair in self.pairs:
            self.port.changed(pair)

    # ---- packets

    @property
    def header_size(self) -> int:
        """Bytes of the header in front of each packet, as negotiated (5.1.6.1)."""
        return HEADER_SIZE if self.acked_features & (VERSION_1 | NetFeature.MRG_RXBUF) else LEGACY_HEADER_SIZE

    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
        pair = self._roles[queue.index]
        if pair is None:
            for chain in chains:
                self._control(chain)
        elif queue.index % 2:
            for chain in chains:
                if chain.readable < self.header_size:
                    raise DriverError(f"a packet of {chain.readable} bytes, shorter than its header", vring=queue.index)
            self.port.transmit(pair, chains)
        else:
            for chain in chains:
                if chain.writable < self.header_size:
                    raise DriverError(f"a receive buffer of {chain.writable} bytes, shorter than a header", vring=queue.index)
            pair.buffers.extend(chains)
            self.port.room(pair)

    def packet_of(self, chain: Chain) -> tuple[Header, bytes] | None:
        """A packet of the driver and its header, which has been checked; None: refused, and counted as that."""
        size = chain.readable - self.header_size
        try:
            if not MIN_FRAME <= size <= MAX_FRAME:
                raise RequestError(f"a packet of {size} bytes; may be {MIN_FRAME}..{MAX_FRAME}")
            data = chain.read()  # once: what the guest writes there later is not looked at
            header = Header.parse(data)
            check(header, size, self.acked_features)
        except RequestError as error:
            self.counters["tx_refused"] += 1
            log.debug("queue %d: packet refused: %s", chain.vring.index, error)
            return None
        self.counters["tx_packets"] += 1
        self.counters["tx_bytes"] += size
        self.counters["tx_gso"] += header.gso_type != 0
        return header, data[self.header_size :]

    def deliver(self, pair: Pair, header: bytes, frame: bytes) -> bool:
        """Give the driver a packet; ``header`` is 10 bytes, without num_buffers. False: keep it until there is `Port.room`.

        The driver is not called before a flush: `flush` after some packets.
        """
        buffers, size = pair.buffers, self.header_size
        need, count = size + len(frame), 0
        if buffers and not self.acked_features & NetFeature.MRG_RXBUF:
            count = 1
            fits = buffers[0].writable >= need
        else:
            room = 0
            for chain in buffers:
                room += chain.writable
                count += 1
                if room >= need:
                    break
            fits = room >= need and count > 0
            if not fits and not pair.given_out():
                return False
        if not fits:
            self.counters["rx_dropped"] += 1
            return True
        data = header + count.to_bytes(2, "little") + frame if size == HEADER_SIZE else header + frame
        at = 0
        for _ in range(count):
            chain = buffers.popleft()
            at += chain.write(data[at : at + chain.writable] if at or count > 1 else data)
            chain.complete()
        self.counters["rx_packets"] += 1
        self.counters["rx_bytes"] += len(frame)
        self.counters["rx_gso"] += header[1] != 0  # gso_type (5.1.6)
        return True

    def flush(self, pair: Pair) -> None:
        """Show the driver what was completed on both queues."""
        for queue in (pair.rx, pair.tx):
            if queue:
                queue.flush()

    # ---- control queue

    def _control(self, chain: Chain) -> None:
        """One command: class, command and its data to read, one byte of ack to write (5.1.6.5)."""
        answer = CTRL_ERR
        with contextlib.suppress(struct.error):  # too short for a command, or for its number
            what = _COMMAND.unpack(chain.read(_COMMAND.size))
            if what == (CTRL_MQ, CTRL_MQ_VQ_PAIRS_SET):
                [pairs] = struct.unpack("<H", chain.read(2))
                if 1 <= pairs <= len(self.pairs):
                    self._use(pairs)
                    answer = CTRL_OK
        chain.write(answer)
        chain.complete()


class Loopback:
    """What the guest sends comes back to it on the same pair, in order. A packet waits in its ring until it has room.

    No packet is lost, so a driver can count; and a driver that takes none back is stopped by its own full transmit queue.
    """

    features: int = NetFeature.CSUM | NetFeature.GUEST_CSUM
    mtu: int | None = None

    def connected(self) -> None:
        """It needs nothing."""

    disconnected = connected

    def announce(self, mac: bytes) -> None:
        """There is nobody else on this cable."""

    def attach(self, net: Net) -> None:
        self._net = net
        self._waiting: dict[int, deque[Chain]] = {pair.index: deque() for pair in net.pairs}
        self._next: dict[int, tuple[bytes, bytes] | None] = dict.fromkeys(self._waiting)  # the first of them, once read

    def changed(self, pair: Pair) -> None:
        if pair.tx is None:
            self._waiting[pair.index].clear()
            self._next[pair.index] = None

    def room(self, pair: Pair) -> None:
        self._go_on(pair)

    def transmit(self, pair: Pair, chains: Iterable[Chain]) -> None:
        self._waiting[pair.index].extend(chains)
        self._go_on(pair)

    def _go_on(self, pair: Pair) -> None:
        """As many packets as there is room for: at most what one batch brought, of packets or of buffers."""
        waiting = self._waiting[pair.index]
        while waiting:
            packet = self._next[pair.index] or self._read(waiting[0])
            if packet and not self._net.deliver(pair, *packet):
                self._next[pair.index] = packet
                break
            self._next[pair.index] = None
            waiting.popleft().complete()
        self._net.flush(pair)

    def _read(self, chain: Chain) -> tuple[bytes, bytes] | None:
        """Header and packet as the guest is to get them."""
        packet = self._net.packet_of(chain)
        if packet is None:
            return None
        header, frame = packet
        if not needs_checksum(header):
            return PLAIN, frame
        if self._net.acked_features & NetFeature.GUEST_CSUM:
            return header._replace(hdr_len=0).pack(), frame
        return PLAIN, finish_checksum(header, frame)
