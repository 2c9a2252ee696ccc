# SPDX-License-Identifier: BSD-3-Clause
"""serve_rng_without.py FEATURE SOCKET RECORD: the rng device of a back-end that does not offer this protocol feature."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import sys

from vhostsock import Device, Server, backend
from vhostsock.devices.rng import Rng
from vhostsock.proto import ProtocolFeature, SessionConfig
from vhostsock.recording import Recorder


async def main(name: str, path: str, record: str) -> None:
    offered = backend.session_config

    def session_config(device: Device) -> SessionConfig:
        config = offered(device)
        return dataclasses.replace(config, protocol_features=config.protocol_features & ~ProtocolFeature[name])

    backend.session_config = session_config
    with Recorder(record) as tap:
        async with Server(Rng(), path=path, tap=tap) as server:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
            print(f"listening on {path}", flush=True)
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
