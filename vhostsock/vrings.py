# SPDX-License-Identifier: BSD-3-Clause
"""The rings of one connection: what the front-end configured, which of them run, and which the device's data plane has.

A ring has three facts that come and go independently (the vhost-user document, "Ring states"):

    started     SET_VRING_KICK to GET_VRING_BASE: the vring runs, its configuration was checked
    enabled     SET_VRING_ENABLE, or always without PROTOCOL_FEATURES; kept while the ring is stopped
    attached    both of the above: the device's data plane has the queue

Nobody reads the kick fd of a ring that is not attached, and attaching scans the ring, so a kick that comes before
SET_VRING_ENABLE is not lost. Detaching finishes the requests under way (Device.stop_timeout bounds it).

Setting something of a started ring again: the same value changes nothing; another one restarts the ring with it. The call fd,
the memory map and the dirty log change under a running ring without a stop, while ``Device.quiesced()`` is held.

With GET_VRING_BASE_INFLIGHT and a region for what is in flight, detaching cancels the requests under way instead. The region
has them, and the vring's next start finds them there; one that is attached again without a stop is restarted for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import stat
from collections.abc import Callable
from typing import Any

from .channel import Channel
from .device import Device, Queue
from .errors import FrontendError
from .inband import Signal, new_eventfd
from .iotlb import Iotlb
from .memory import DirtyLog, InflightArea, MemoryMap
from .misses import Misses
from .polling import Poller
from .proto import Session, events, wire
from .proto.features import ProtocolFeature, VirtioFeature
from .recording import Tap
from .ring import NotTranslated
from .ringstate import Ring

__all__ = ["Vrings"]

log = logging.getLogger("vhostsock.server")

VRING_F_LOG = 1  # in the flags of SET_VRING_ADDR
PACKED_START = 0x8000_8000  # of a packed ring: both places 0, both wrap counters 1 (virtio 1.3, 2.8.1)


class Vrings:
    """All rings of a device. The methods named ``set_...`` and ``get_base`` carry out the ring messages.

    fail: told when a data plane found that the session cannot go on. ``memory`` is the guest memory of now.
    """

    def __init__(
        self, device: Device, session: Session, channel: Channel, fail: Callable[[Exception], None], tap: Tap
    ) -> None:
        self._device = device
        self._session = session
        self._channel = channel
        self._tap = tap
        self.memory = MemoryMap.empty()
        self._inflight: InflightArea | None = None
        self._log: DirtyLog | None = None
        self._log_fd = events.OwnedFd(-1)
        self._poller = Poller(self._poll)
        self._iotlb: Iotlb | None = None  # while ACCESS_PLATFORM is acked
        self._view = self.memory  # what the vrings translate with
        self._misses = Misses(session, channel, fail)
        self._rings = [Ring(Queue(index, fail)) for index in range(device.num_queues)]
        for ring in self._rings:
            self._install(ring)

    # ---- messages

    async def set_features(self, event: events.FeaturesSet) -> None:
        self._device.acked_features = event.value
        if bool(event.value & VirtioFeature.ACCESS_PLATFORM) != bool(self._iotlb):
            self._iotlb = None if self._iotlb else Iotlb()
            self._use_view()
        for ring in self._rings:
            ring.features = event.value
            ring.queue.vring.set_features(event.value)
            if ring.base is None:
                ring.queue.vring.set_base(PACKED_START if event.value & VirtioFeature.RING_PACKED else 0)
            self._install_log(ring)
            if not event.value & VirtioFeature.PROTOCOL_FEATURES:
                ring.enabled = True
        self._attach_ready()

    @property
    def any_started(self) -> bool:
        """Whether the device is not suspended (the vhost-user document, "Suspended device state")."""
        return any(ring.started for ring in self._rings)

    async def reset(self) -> None:
        """Stop and disable all rings; their next start is from the beginning."""
        for ring in self._rings:
            ring.enabled = False
        await asyncio.gather(*map(self._stop, self._rings))
        for ring in self._rings:
            ring.stopped_with = None
            ring.base = None
            ring.queue.vring.set_base(PACKED_START if ring.features & VirtioFeature.RING_PACKED else 0)
        self._use_inflight(None)  # what was in flight was the old driver's

    async def set_num(self, event: events.VringNum) -> None:
        if event.num > self._device.max_queue_size:
            raise FrontendError(f"ring {event.index}: {event.num} descriptors, this device takes {self._device.max_queue_size}")
        await self._configure(self._rings[event.index], "num", event.num)

    async def set_address(self, event: events.VringAddress) -> None:
        ring = self._rings[event.index]
        await self._configure(ring, "address", (event.desc, event.avail, event.used))
        ring.logged, ring.log_address = bool(event.flags & VRING_F_LOG), event.log
        self._install_log(ring)

    async def set_base(self, event: events.VringBase) -> None:
        await self._configure(self._rings[event.index], "base", event.num)

    async def get_base(self, event: events.VringStop) -> int:
        ring = self._rings[event.index]
        await self._stop(ring)
        assert ring.base is not None
        return ring.base

    async def set_enable(self, event: events.VringEnable) -> None:
        if event.num > 1:
            raise FrontendError(f"ring {event.index}: SET_VRING_ENABLE with {event.num}, must be 0 or 1")
        ring = self._rings[event.index]
        ring.enabled = bool(event.num)
        if not ring.enabled:
            await self._detach(ring)
        self._attach_ready()

    async def set_kick(self, event: events.VringKick) -> None:
        ring = self._rings[event.index]
        if event.fd:
            if stat.S_IFMT(os.fstat(event.fd.fileno()).st_mode) not in _PLAIN_EVENT_FDS:
                raise FrontendError(f"ring {event.index}: the kick fd must be an eventfd, a socket or a pipe")
            os.set_blocking(event.fd.fileno(), False)  # of the open file, so also for the front-end; QEMU's is that already
        await self._detach(ring)
        self._drop_kick(ring)
        self._start(ring)
        ring.polled = event.fd is None
        ring.queue.kick_fd = event.fd.take() if event.fd else new_eventfd()
        self._attach_ready()
        if ring.polled:
            self._poller.start()

    async def inband_kick(self, event: events.VringInbandKick) -> None:
        """VRING_KICK: starts a stopped ring. A kick fd, where there is one, is preferred to the message."""
        ring = self._rings[event.index]
        if not ring.started:
            self._start(ring)
            ring.queue.kick_fd = new_eventfd()
            ring.inband_kick = True
            self._attach_ready()
        elif ring.inband_kick:
            os.eventfd_write(ring.queue.kick_fd, 1)

    async def set_call(self, event: events.VringCall) -> None:
        ring = self._rings[event.index]
        with self._device.quiesced():
            ring.queue.vring.set_call(event.fd.fileno() if event.fd else None)
        ring.fds_set.add("call")
        if ring.started and event.fd and stat.S_IFMT(os.fstat(event.fd.fileno()).st_mode) == 0:
            # The old fd may have swallowed a call: QEMU gives a masked one first and the guest's after SET_VRING_ENABLE. One
            # call too many is harmless (virtio 1.3, 2.3: the driver looks at the ring), one too few hangs the guest.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(event.fd.fileno(), 1)

    async def set_err(self, event: events.VringErr) -> None:
        with self._device.quiesced():
            self._rings[event.index].queue.vring.set_err(event.fd.fileno() if event.fd else None)
        self._rings[event.index].fds_set.add("err")

    # ---- what is in flight

    async def make_inflight(self, event: events.InflightGet) -> events.WithFd:
        self._check_inflight(event.num_queues, event.queue_size)
        size, fd = InflightArea.create(num_queues=event.num_queues, queue_size=event.queue_size, packed=self._packed)
        return events.WithFd(size, events.OwnedFd(fd))

    async def set_inflight(self, event: events.InflightSet) -> None:
        self._check_inflight(event.num_queues, event.queue_size)
        self._use_inflight(
            InflightArea(
                event.fd.fileno(), size=event.size, offset=event.offset, num_queues=event.num_queues,
                queue_size=event.queue_size, packed=self._packed,
            )
        )  # fmt: skip

    def _check_inflight(self, num_queues: int, queue_size: int) -> None:
        device = self._device
        if not 1 <= num_queues <= device.num_queues or not 1 <= queue_size <= device.max_queue_size:
            raise FrontendError(
                f"in-flight region for {num_queues} queues of {queue_size}: this device has 1 to {device.num_queues} queues"
                f" of at most {device.max_queue_size}"
            )

    @property
    def _packed(self) -> bool:
        return bool(self._rings[0].features & VirtioFeature.RING_PACKED)

    def _use_inflight(self, area: InflightArea | None) -> None:
        """From the next starts on; no ring is started."""
        old, self._inflight = self._inflight, area
        for ring in self._rings:
            ring.queue.vring.set_inflight(self._area_of(ring))
        if old:
            old.close()

    def _area_of(self, ring: Ring) -> InflightArea | None:
        """The region, if it has a part for a ring of this size.

        QEMU 10.0 lets its SeaBIOS take a ring of 256 from a device of 128: better a ring without tracking than a guest that
        does not boot.
        """
        area = self._inflight
        return area if area and ring.queue.index < area.num_queues and ring.num <= area.queue_size else None

    def _start_vring(self, ring: Ring) -> None:
        ring.queue.vring.set_inflight(self._area_of(ring))
        if self._inflight and ring.num > self._inflight.queue_size:
            log.warning(
                "ring %d has %d descriptors, the in-flight region %d: a crash of this back-end would lose its requests",
                ring.queue.index, ring.num, self._inflight.queue_size,
            )  # fmt: skip
        self._run(ring)
        ring.queue.on_miss = functools.partial(self._missed, ring) if self._iotlb else None
        ring.started = True

    def _suspends(self, ring: Ring) -> bool:
        """Whether the requests under way need not be finished before the ring stops: they are in the region."""
        tracked = self._area_of(ring) is not None
        return tracked and bool(self._session.protocol_features & ProtocolFeature.GET_VRING_BASE_INFLIGHT)

    # ---- dirty log

    async def set_log(self, event: events.LogBase) -> int:
        new = DirtyLog(event.fd.fileno(), size=event.size, offset=event.offset)
        new.set_notify(self._log_fd.fileno())
        old, self._log = self._log, new
        for ring in self._rings:
            self._install_log(ring)
        if old:
            old.close()
        return 0

    async def set_log_fd(self, event: events.LogFd) -> None:
        if self._log:
            with self._device.quiesced():
                self._log.set_notify(event.fd.fileno())
        self._log_fd.close()
        self._log_fd = events.OwnedFd(event.fd.take())

    def _install_log(self, ring: Ring) -> None:
        """LOG_ALL says whether writes to buffers are logged, VRING_F_LOG whether those to the ring are; none without a log."""
        with self._device.quiesced():
            ring.queue.vring.set_log(
                self._log, data=bool(ring.features & VirtioFeature.LOG_ALL), ring=ring.logged, address=ring.log_address
            )

    # ---- memory

    def use_memory(self, memory: MemoryMap) -> None:
        """Translate through ``memory`` from now on. FrontendError when a running ring is not in it."""
        old, self.memory = self.memory, memory
        try:
            self._use_view()
        finally:
            old.close()

    def _use_view(self) -> None:
        old, self._view = self._view, self._iotlb.view(self.memory) if self._iotlb else self.memory
        errors = []
        with self._device.quiesced():
            for ring in self._rings:
                try:
                    self._install(ring)
                except FrontendError as error:
                    errors.append(error)
        if old is not self.memory:
            old.close()
        if errors:
            raise errors[0]

    def _install(self, ring: Ring) -> None:
        """Give the vring the memory map of now. FrontendError when a running one is not in it."""
        ring.queue.memory = self._view
        ring.queue.vring.set_memory(self._view)

    # ---- behind an IOMMU

    async def set_iotlb(self, event: events.Iotlb) -> None:
        """IOTLB_MSG. A running ring whose parts are no longer known is stopped, and goes on when they are known again."""
        if not self._iotlb:
            return  # of a driver that was reset; nothing of it is here any more
        if event.type == wire.IotlbType.UPDATE:
            self._iotlb.update(event.iova, event.size, event.uaddr, event.perm)
        elif event.type == wire.IotlbType.INVALIDATE:
            self._iotlb.invalidate(event.iova, event.size)
        else:
            raise FrontendError(f"IOTLB_MSG of type {event.type}: a front-end sends updates (2) and invalidations (3)")
        view = self._iotlb.view(self.memory)
        try:
            for ring in self._rings:
                if ring.started and not ring.waiting and not ring.queue.vring.fits(view):
                    await self._detach(ring)
                    ring.base = ring.queue.vring.stop()
                    ring.waiting, ring.suspended = True, False
        finally:
            view.close()
        self._use_view()
        for ring in self._rings:
            if ring.waiting:
                self._run(ring)
            elif ring.queue.plane and ring.asked and Iotlb.has(self._view, *ring.asked):
                ring.asked = None
                ring.queue.plane.wake()
        self._attach_ready()

    def _missed(self, ring: Ring, iova: int, perm: int) -> None:
        self._misses.ask(ring, self._view, iova, perm)

    def _run(self, ring: Ring) -> None:
        """Start the vring, now or when its parts are translated."""
        try:
            ring.queue.vring.start()
        except NotTranslated:
            ring.waiting = True
            missing = ring.queue.vring.missing
            assert missing
            self._missed(ring, *missing)
        else:
            ring.waiting = False
            ring.asked = None

    # ---- states

    def _start(self, ring: Ring) -> None:
        if ring.started:
            return
        if self._session.protocol_features & ProtocolFeature.INBAND_NOTIFICATIONS:
            self._signal_in_band(ring)
        self._start_vring(ring)

    def _signal_in_band(self, ring: Ring) -> None:
        state = {"index": ring.queue.index, "num": 0}
        if "call" not in ring.fds_set and not ring.call:
            ring.call = Signal(lambda: self._notify(wire.BackendRequest.VRING_CALL, state))
            ring.queue.vring.set_call(ring.call.fd)
        if "err" not in ring.fds_set and not ring.err:
            ring.err = Signal(lambda: self._notify(wire.BackendRequest.VRING_ERR, state))
            ring.queue.vring.set_err(ring.err.fd)

    def _notify(self, request: wire.BackendRequest, state: dict[str, int]) -> None:
        self._channel.notify(request, state, key=state["index"], ack=True)

    async def _configure(self, ring: Ring, name: str, value: Any) -> None:
        """Set num, address or base; restart a started ring if that changes it."""
        if ring.started and getattr(ring, name) == value:
            return
        restart = ring.started
        if restart:
            await self._detach(ring)
            ring.base = ring.queue.vring.stop()
            ring.started = ring.suspended = ring.waiting = False
        setter = {"num": "set_num", "address": "set_addr", "base": "set_base"}[name]
        getattr(ring.queue.vring, setter)(*value if name == "address" else (value,))
        setattr(ring, name, value)
        if restart:
            self._start_vring(ring)
            self._attach_ready()

    def _attach_ready(self) -> None:
        """Hand every ring that is started and enabled to the device."""
        ready = [r for r in self._rings if r.started and r.enabled and not r.attached and not r.waiting]
        if not ready:
            return
        if not any(ring.attached for ring in self._rings) and any(
            ring.started and ring.stopped_with not in (None, ring.identity) for ring in self._rings
        ):
            self._device._was_reset()
        for ring in self._rings:
            ring.stopped_with = None
        for ring in ready:
            if ring.suspended:
                ring.suspended = False
                ring.queue.vring.stop()
                self._run(ring)
                if ring.waiting:
                    continue
            self._device.queue_started(ring.queue)
            ring.attached = True
            self._tap.noted(f"ring {ring.queue.index} started")

    async def _detach(self, ring: Ring) -> None:
        if not ring.attached:
            return
        ring.attached = False
        ring.suspended = self._suspends(ring)
        try:
            if ring.suspended:
                await self._device.queue_suspending(ring.queue)
            else:
                await self._device.queue_draining(ring.queue)
        finally:  # also when this task is cancelled: a data plane must never see its vring stop
            self._device.queue_stopped(ring.queue)
            self._tap.noted(f"ring {ring.queue.index} stopped")

    async def _stop(self, ring: Ring) -> None:
        await self._detach(ring)
        self._drop_kick(ring)
        ring.base = ring.queue.vring.stop()
        ring.suspended, ring.waiting, ring.asked = False, False, None
        if ring.started:
            ring.started = False
            ring.stopped_with = ring.identity
        if self._iotlb and not self.any_started:  # from here on nobody tells us of what is unmapped
            self._iotlb.clear()
            self._use_view()

    def _poll(self) -> bool | None:
        """What Poller wants to have done."""
        polled = [ring for ring in self._rings if ring.polled]
        with self._device.quiesced():
            found = [ring for ring in polled if ring.attached and ring.queue.vring.has_available]
        for ring in found:
            os.eventfd_write(ring.queue.kick_fd, 1)
        return bool(found) if polled else None

    def _drop_kick(self, ring: Ring) -> None:
        ring.inband_kick = ring.polled = False
        fd, ring.queue.kick_fd = ring.queue.kick_fd, -1
        if fd >= 0:
            os.close(fd)

    async def close(self) -> None:
        """Stop all rings and give everything back; what a device raises meanwhile is logged."""
        self._poller.close()
        try:
            for result in await asyncio.gather(*map(self._stop, self._rings), return_exceptions=True):
                if isinstance(result, Exception):
                    log.error("%s failed to stop a queue", type(self._device).__name__, exc_info=result)
        finally:
            for ring in self._rings:
                self._drop_kick(ring)
                ring.queue.vring.close()
                for signal in (ring.call, ring.err):
                    if signal:
                        signal.close()
            self._misses.close()
            if self._view is not self.memory:
                self._view.close()
            self.memory.close()
            self._use_inflight(None)
            self._log_fd.close()
            if self._log:
                self._log.close()


_PLAIN_EVENT_FDS = (0, stat.S_IFSOCK, stat.S_IFIFO)  # an eventfd is an anonymous inode, which has no type
