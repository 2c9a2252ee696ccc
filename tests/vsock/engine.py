# SPDX-License-Identifier: BSD-3-Clause
"""The engine alone, speaking vsock: real rings in a memfd, socket pairs for the host, no Python device."""

from __future__ import annotations

import errno
import socket
from typing import Any

from tests.engine.engine import EngineUnderTest, Event
from vhostsock._core import ffi, lib
from vhostsock.testing.vsock import VsockDriver

CID = 42


class VsockEngine(EngineUnderTest):
    """Every connection of the guest gets one end of a socket pair; ``hosts`` has the other, by the port of the guest."""

    driver: VsockDriver  # type: ignore[assignment]

    def __init__(
        self, *, config: dict[str, int] | None = None, driver_class: type[VsockDriver] = VsockDriver, **options: Any
    ) -> None:
        self.hosts: dict[int, socket.socket] = {}
        self.buffers: int | None = None  # SO_SNDBUF of both ends: how soon the host pushes back
        config = {"dialect": lib.VSE_VSOCK, "guest_cid": CID} | (config or {})
        super().__init__(config=config, driver_class=driver_class, cid=CID, **options)  # type: ignore[arg-type]
        self.on_connect = self.connect_pair
        self.closing.callback(self._close_hosts)

    def _close_hosts(self) -> None:
        for host in self.hosts.values():
            host.close()

    def connect_pair(self, event: Event) -> None:
        kind = ffi.from_buffer("struct vsk_hdr *", event.payload).type
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET if kind == 2 else socket.SOCK_STREAM)
        if self.buffers:
            for sock in (ours, theirs):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffers)
        theirs.settimeout(30)
        self.hosts[event.flow >> 32] = theirs
        code = lib.vse_connected(self.ptr, event.handle, ours.detach(), ffi.NULL, ffi.NULL)
        assert code in (0, -errno.ESTALE), code  # stale: the guest has given it up meanwhile

    def pop_host(self, port: int) -> socket.socket:
        """The host's end of the connection from ``port`` of the guest."""
        self.driver.wait(lambda: port in self.hosts)
        return self.hosts[port]
