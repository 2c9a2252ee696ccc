# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-vsock device: AF_VSOCK sockets of a stock guest, connected to sockets of the host.

    device = VsockDevice(3, uds_path="/run/vm1.vsock", forwards={5432: "tcp://127.0.0.1:5432"})
    async with Server(device, path="/tmp/vm1.sock") as server:
        await server.serve_forever()

docs/vsock.md says which port leads where.
"""

from .device import VsockDevice

__all__ = ["VsockDevice"]
