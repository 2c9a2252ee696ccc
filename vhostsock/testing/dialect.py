# SPDX-License-Identifier: BSD-3-Clause
"""How versions of QEMU differ in what they send, for vhostsock.testing.frontend."""

from __future__ import annotations

import dataclasses

from ..proto.features import ProtocolFeature

__all__ = ["QEMU_7_2", "QEMU_11_1", "Dialect"]


@dataclasses.dataclass(frozen=True, slots=True)
class Dialect:
    """How one version of QEMU speaks.

    protocol_mask       the protocol bits it acks when they are offered
    ack_vring_fds       asks for acks of SET_VRING_KICK, CALL and ERR
    ack_enable          waits for SET_VRING_ENABLE
    calls_when_stopped  gives each ring its masked call fd before a start and after a stop
    inband              starts and kicks rings by messages, and gives them no eventfds (QEMU never does; for simulations)
    """

    name: str
    protocol_mask: int
    ack_vring_fds: bool
    ack_enable: bool
    calls_when_stopped: bool
    inband: bool = False


_GENERIC = ~(ProtocolFeature.CONFIG | ProtocolFeature.GET_VRING_BASE_INFLIGHT)
QEMU_7_2 = Dialect("QEMU 7.2 vhost-user-rng", ((1 << 17) - 1) & _GENERIC, False, False, True)
QEMU_11_1 = Dialect("QEMU 11.1 vhost-user-test-device", ((1 << 23) - 1) & _GENERIC, True, True, False)
