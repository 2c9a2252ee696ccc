"""Serves devices in processes that may be killed: run with one end of a socket pair as its standard input.

For each descriptor that comes over it (with the name of a device), a child is forked that serves a front-end on it; the answer
is its process id. Forking from here is much quicker than starting an interpreter each time. It ends with its input.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket

from vhostsock import Chain, Device, Queue, Server

__all__ = ["DEVICES"]


LATENCIES = (0, 0, 0.001, 0.01)  # of a request, seconds


class Dawdler(Device):
    """Answers with the request reversed, after a while that differs, and with "!" behind it if it came again.

    A request that begins with "hold" is kept for ever the first time.
    """

    virtio_id = 42
    inflight = True
    packed = True
    max_queue_size = 64
    num_queues = 2

    async def handle(self, queue: Queue, chain: Chain) -> None:
        data = chain.read()
        if data.startswith(b"hold") and not chain.again:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(random.choice(LATENCIES))
        chain.write(data[::-1] + b"!" * chain.again)


class Tidy(Dawdler):
    """The same, and completes in order."""

    in_order = True


DEVICES = {"dawdler": Dawdler, "tidy": Tidy}


async def serve(fd: int, name: str) -> None:
    async with Server(DEVICES[name](), sock=socket.socket(fileno=fd)) as server:
        await server.serve_forever()


def main() -> None:
    control = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        name, fds, _, _ = socket.recv_fds(control, 64, 1)
        if not name:
            return
        pid = os.fork()
        if not pid:
            asyncio.run(serve(fds[0], name.decode()))
            os._exit(0)
        os.close(fds[0])
        control.send(str(pid).encode())


if __name__ == "__main__":
    main()
