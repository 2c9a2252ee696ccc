#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""An entropy source with a sense of humour: the guest's /dev/hwrng reads what we please.

    python3 examples/loaded_dice.py /tmp/dice.sock
"""

import asyncio
import contextlib
import sys

from vhostsock import Chain, Device, Queue, Server


class LoadedDice(Device):
    virtio_id = 4  # an entropy source (virtio 1.3, 5.4), so the stock virtio-rng driver takes it

    def __init__(self, face: int) -> None:
        self.face = face
        self.rolls = 0

    async def handle(self, queue: Queue, chain: Chain) -> None:
        self.rolls += 1
        text = f"roll {self.rolls}: {self.face}\n".encode()
        chain.write(text * (chain.writable // len(text) + 1))  # as much as fits


async def main(path: str) -> None:
    async with Server(LoadedDice(face=6), path=path) as server:
        print(f"listening on {path}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1]))
