# SPDX-License-Identifier: BSD-3-Clause
"""Feature bits: the virtio ones that a device and a driver agree on, and the protocol ones of the two ends of the socket.

A bit travels three stations. *offered*: this library implements it and the device wants it. *acked*: the front-end (for the
virtio bits, mostly the guest's driver) took it. Only acked bits have an effect. Bits are written here by their specification
names (virtio 1.3, 6; the vhost-user document, "Protocol features").

``NEVER_OFFERED``: QEMU acks every protocol bit inside its mask, also some that it does not implement, and then disagrees about
what is on the wire. Offering one would break the session, so a configuration that holds one is refused.
"""

from __future__ import annotations

import enum

__all__ = [
    "DEVICE_FEATURES",
    "NEVER_OFFERED",
    "REQUIRES",
    "RING_FEATURES",
    "ProtocolFeature",
    "VirtioFeature",
    "names",
]


class VirtioFeature(enum.IntFlag):
    """Bits of GET_FEATURES and SET_FEATURES that are not a device type's own (24..41, and vhost-user's 26 and 30)."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41


class ProtocolFeature(enum.IntFlag):
    """Bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM_MAP = 1 << 22


# what every device of this library offers, whatever its type (offers.py has what is offered beyond)
RING_FEATURES = (
    VirtioFeature.INDIRECT_DESC | VirtioFeature.EVENT_IDX | VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.VERSION_1
)

# what a device type may define for itself (virtio 1.3, 2.2)
DEVICE_FEATURES = (1 << 24) - 1 | ((1 << 14) - 1) << 50

# acked by QEMU 7.2 to 11.1, and implemented by none of them: memory regions would be 8 bytes longer than what it sends.
# INBAND_NOTIFICATIONS is another such bit, but a front-end that goes on using eventfds with it acked is served all the same.
NEVER_OFFERED = ProtocolFeature.XEN_MMAP

# a front-end that acks the first must ack the rest
REQUIRES = {
    ProtocolFeature.INBAND_NOTIFICATIONS: ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK,
    ProtocolFeature.GET_VRING_BASE_INFLIGHT: ProtocolFeature.INFLIGHT_SHMFD,
}


def names(bits: enum.IntFlag) -> str:
    """``"MQ | CONFIG | bit 40"``: every set bit by name, for messages to people. ``"none"`` for 0."""
    kind, value = type(bits), int(bits)
    texts = [kind(1 << n).name or f"bit {n}" for n in range(value.bit_length()) if value >> n & 1]
    return " | ".join(texts) or "none"
