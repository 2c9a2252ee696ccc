# SPDX-License-Identifier: BSD-3-Clause
"""serve_state.py SOCKET RECORD STATE: a device for the fs carrier that has the bytes of the file STATE as its state.

They are its state for save_state, and what load_state is given becomes the file. Requests are answered with nothing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from vhostsock import Chain, Device, Queue, Server
from vhostsock.recording import Recorder
from vhostsock.state import StateReader, StateWriter


class Stateful(Device):
    virtio_id = 26
    num_queues = 2
    migratable = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def handle_batch(self, queue: Queue, chains: list[Chain]) -> None:
        for chain in chains:
            chain.complete()

    async def save_state(self, stream: StateWriter) -> None:
        await stream.write(self.path.read_bytes())

    async def load_state(self, stream: StateReader) -> None:
        self.path.write_bytes(await stream.read())


async def main(path: str, record: str, state: str) -> None:
    with Recorder(record) as tap:
        async with Server(Stateful(Path(state)), path=path, tap=tap) as server:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
            print(f"listening on {path}", flush=True)
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
