# SPDX-License-Identifier: BSD-3-Clause
"""What a device declares, and the feature bits that are offered for it: one table.

A device says what it supports in one place, its class: attributes, and the hooks that it overrides. A row of ``OFFERS`` says
what that brings: virtio bits, protocol bits, and a line of text. ``session_config`` adds up the rows that apply to a device;
docs/protocol-support.md is made from all of them. So a new ability is a row here, the attribute in device.py, and the messages
that it allows in proto/messages.py (whose ``needs`` column names its protocol bit).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .device import Device
from .errors import UsageError
from .proto import SessionConfig, wire
from .proto.features import DEVICE_FEATURES, RING_FEATURES, ProtocolFeature, VirtioFeature, names
from .shmem import check_sizes

__all__ = ["OFFERS", "Offer", "session_config"]


_V, _P = VirtioFeature, ProtocolFeature
_NO_VIRTIO, _NO_PROTOCOL = _V(0), _P(0)


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """A row.

    says      what of the device brings it, as its author writes it: an attribute, hooks; "" for what every device gets
    applies   whether this device says so
    virtio    the bits of the feature word; the driver decides
    protocol  the bits between the two ends of the socket; the front-end decides
    text      what it is, for people
    """

    says: str
    applies: Callable[[Device], bool]
    virtio: VirtioFeature = _NO_VIRTIO
    protocol: ProtocolFeature = _NO_PROTOCOL
    text: str = ""



def _overrides(device: Device, *hooks: str) -> bool:
    return all(getattr(type(device), hook) is not getattr(Device, hook) for hook in hooks)


OFFERS = (
    Offer("", lambda _: True, RING_FEATURES, text="rings in any of the usual ways"),
    Offer(
        "",
        lambda _: True,
        protocol=_P.MQ | _P.REPLY_ACK | _P.BACKEND_REQ | _P.RESET_DEVICE | _P.CONFIGURE_MEM_SLOTS | _P.STATUS,
        text="what any session needs",
    ),
    # QEMU 7.2 warns when it is offered without being used
    Offer("config or read_config", lambda d: d.has_config, protocol=_P.CONFIG, text="a config space"),
    Offer(
        "save_state and load_state", lambda d: _overrides(d, "save_state", "load_state"),
        protocol=_P.DEVICE_STATE, text="migration with the device's own state",
    ),
    Offer("announce", lambda d: _overrides(d, "announce"), protocol=_P.RARP, text="telling the network where the guest went"),
    Offer("set_mtu", lambda d: _overrides(d, "set_mtu"), protocol=_P.NET_MTU, text="the MTU that the guest is told"),
    Offer(
        "shared_objects = True", lambda d: d.shared_objects,
        protocol=_P.SHARED_OBJECT | _P.BACKEND_SEND_FD, text="dma-bufs shared among devices",
    ),
    Offer(
        "shmem", lambda d: bool(d.shmem),
        protocol=_P.SHMEM_MAP | _P.BACKEND_SEND_FD, text="shared memory regions",
    ),
    Offer(
        "postcopy = True", lambda d: d.postcopy,
        protocol=_P.PAGEFAULT, text="migrations in which the guest runs here before its memory has arrived",
    ),
    Offer("gpa_addresses = True", lambda d: d.gpa_addresses, protocol=_P.GPA_ADDRESSES, text="no addresses of the front-end"),
    Offer("inband = True", lambda d: d.inband, protocol=_P.INBAND_NOTIFICATIONS, text="kicks and calls as messages"),
    Offer("iommu = True", lambda d: d.iommu, _V.ACCESS_PLATFORM, text="drivers behind an IOMMU"),
    Offer("packed = True", lambda d: d.packed, _V.RING_PACKED, text="packed rings"),
    Offer("in_order = True", lambda d: d.in_order, _V.IN_ORDER, text="completion in order"),
    Offer(
        "inflight = True", lambda d: d.inflight, protocol=_P.INFLIGHT_SHMFD | _P.GET_VRING_BASE_INFLIGHT,
        text="requests under way survive a crash of the back-end, and a stop does not wait for them",
    ),
    Offer("migratable = True", lambda d: d.migratable, _V.LOG_ALL, _P.LOG_SHMFD, "a dirty log for live migration"),
)  # fmt: skip


def session_config(device: Device) -> SessionConfig:
    """What a session offers on behalf of a device. UsageError when the device asks for what cannot be offered."""
    name = type(device).__name__
    reserved = VirtioFeature(device.features & ~DEVICE_FEATURES)
    if reserved:
        raise UsageError(f"{name}.features: {names(reserved)}: a device chooses among bits 0 to 23 and 50 to 63")
    if len(device.config) > wire.CONFIG_MAX:
        raise UsageError(f"{name}.config has {len(device.config)} bytes; {wire.CONFIG_MAX} is all that a front-end can read")
    if _overrides(device, "save_state") != _overrides(device, "load_state"):
        raise UsageError(f"{name} overrides one of save_state and load_state: it needs both to be migrated, or neither")
    features, protocol = device.features, _NO_PROTOCOL
    for offer in OFFERS:
        if offer.applies(device):
            features |= offer.virtio
            protocol |= offer.protocol
    return SessionConfig(features, protocol, device.num_queues, shmem=check_sizes(device.shmem))
