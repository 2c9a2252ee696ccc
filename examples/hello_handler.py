"""Answer a guest from this process: an async function behind an address that exists nowhere else.

Usage: hello_handler.py SOCKET. In the guest, `nc 192.0.2.80 80` then talks to hello().
"""

import asyncio
import contextlib
import sys

from vhostsock import Server
from vhostsock.offload import OffloadDevice, Request, parse_policy

POLICY = """
[[rule]]
match = { scheme = "tcp", address = "192.0.2.80", port = 80 }
action = "offload"
handler = "hello"
"""


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> None:
    line = await reader.readline()
    writer.write(f"{request.guest.device} said: ".encode() + line)
    await writer.drain()


async def main(path: str) -> None:
    device = OffloadDevice(name="vm1", policy=parse_policy(POLICY), handlers={"hello": hello})
    async with Server(device, path=path) as server:
        print(f"listening on {server.address}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1]))
