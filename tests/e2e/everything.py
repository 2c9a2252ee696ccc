# SPDX-License-Identifier: BSD-3-Clause
"""A device that has all of the protocol offered that it can, with the queues of an entropy source or of a file system:

    python everything.py SOCKET RECORDING QUEUES
"""

from __future__ import annotations

import asyncio
import signal
import sys

from vhostsock import Server
from vhostsock.devices.rng import Rng
from vhostsock.recording import Recorder
from vhostsock.state import StateReader, StateWriter


class Everything(Rng):
    packed = True
    inflight = True
    migratable = True
    iommu = True
    postcopy = True
    gpa_addresses = True
    shared_objects = True
    inband = True
    shmem = {0: 1 << 20}  # noqa: RUF012

    def __init__(self, num_queues: int) -> None:
        self.num_queues = num_queues

    async def save_state(self, stream: StateWriter) -> None:
        await stream.write(b"state " * 100000)  # more than a pipe holds

    async def load_state(self, stream: StateReader) -> None:
        print(f"loaded {len(await stream.read())} bytes", flush=True)


async def main(path: str, recording: str, queues: str) -> None:
    with Recorder(recording) as tap:
        async with Server(Everything(int(queues)), path=path, tap=tap) as server:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
            print("listening", flush=True)
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
