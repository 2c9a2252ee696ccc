"""The host-side peer of the in-guest check programs: servers that do what one line asks.

Stream (one connection, one line, then):
    echo            send back everything until EOF, then close
    sink            read until EOF, answer "<count> <crc32>\\n", close
    source N        send N bytes of the pattern, half-close, then read until EOF and answer nothing
    reset N         send N bytes of the pattern, wait for one more byte, then RST
    name            answer with the client address as this side sees it, close
    hold            send nothing, read nothing, wait for the client to go
    gate            read nothing until somebody says "open", then as "sink"
    open            answer "ok\\n"
    stick           fill the queue of the stuck port, so that connects to it hang; answer "ok\\n"
    unstick         serve it from now on; connects that hang go on when they try again, within seconds; answer "ok\\n"
    urgent N        send N bytes of the pattern, an urgent "U" and "after", wait for EOF
    keepalive       when the keepalive timer of the client's socket runs, answer "ok\\n" (the client's is of this system)
    priority N      when the client's socket has this SO_PRIORITY, answer "ok\\n" (as above)
    mark            answer "go\\n", read until EOF, answer "<before the mark> <urgent byte> <after it>\\n"
Datagram: each datagram is sent back to where it came from, but for these:
    drop...         no answer
    big N           N bytes
    flood N SIZE    N datagrams of SIZE bytes
    how             "<ttl> <tos>" that it came with
    priority        SO_PRIORITY of the client's socket
    set TTL TOS     sent back with these
    split N SIZE    N * SIZE bytes in datagrams of SIZE, by one call (UDP_SEGMENT)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import select
import socket
import struct
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

UDP_SEGMENT, IP_RECVTTL = 103, 12  # linux/udp.h, linux/in.h; the socket module has no names for them


def pattern(n: int) -> bytes:
    """The first n bytes of the pattern of guest/check.h."""
    return bytes((i ^ (i >> 8) ^ (i >> 16) ^ 0x5A) & 0xFF for i in range(n))


SIOCATMARK = 0x8905


def _send_urgent(sock: socket.socket, n: int) -> None:
    sock.setblocking(True)
    sock.sendall(pattern(n))
    sock.send(b"U", socket.MSG_OOB)
    sock.sendall(b"after")


def _keeps_alive(sock: socket.socket) -> bool:
    """Whether the other end of this connection, on this system, has its keepalive timer running (proc_net_tcp: tr is 2)."""
    table = Path("/proc/net/tcp6" if sock.family == socket.AF_INET6 else "/proc/net/tcp").read_text()
    ports = [f"{address[1]:04X}" for address in (sock.getpeername(), sock.getsockname())]
    for line in table.splitlines()[1:]:
        words = line.split()
        if [words[1].rpartition(":")[2], words[2].rpartition(":")[2]] == ports:
            return words[5].startswith("02:")
    return False


def _priority(family: int, protocol: int, local: Any, remote: Any) -> int:
    """SO_PRIORITY of a socket of this system with these names (sock_diag(7), linux/inet_diag.h)."""
    if protocol == socket.IPPROTO_UDP:  # swapped for historical reasons, says the kernel
        local, remote = remote, local
    hosts = [socket.inet_pton(family, name[0]).ljust(16, b"\0") for name in (local, remote)]
    names = struct.pack("!HH", local[1], remote[1]) + b"".join(hosts) + struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    # INET_DIAG_CLASS_ID, which is the priority unless a cgroup of version 1 gave it a class, comes with INET_DIAG_TCLASS
    request = struct.pack("=BBBBI", family, protocol, 1 << 5, 0, 0xFFFFFFFF) + names
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as netlink:
        netlink.send(struct.pack("=IHHII", 16 + len(request), 20, 1, 1, 0) + request)
        answer = netlink.recv(4096)
    at = 16 + 72
    while at < len(answer):
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == 17:
            return int.from_bytes(answer[at + 4 : at + 8], sys.byteorder)
        at += (length + 3) & ~3
    raise OSError(f"sock_diag: {answer!r}")


def _read_urgent(sock: socket.socket) -> bytes:
    """What comes before the mark, the urgent byte, and what comes after it, in a thread of its own."""
    sock.setblocking(True)
    sock.send(b"go\n")
    poller = select.poll()
    poller.register(sock, select.POLLPRI)
    poller.poll(300000)
    urgent = sock.recv(1, socket.MSG_OOB)
    before = after = b""
    while not struct.unpack("i", fcntl.ioctl(sock, SIOCATMARK, bytes(4)))[0]:
        before += sock.recv(1)
    while data := sock.recv(4096):
        after += data
    return b"%s %s %s\n" % (before, urgent, after)


class _Peer:
    """What the connections of one peer share."""

    def __init__(self, stuck: list[socket.socket]) -> None:
        self.gates: set[asyncio.Event] = set()
        self.stuck = stuck
        self.fillers: list[socket.socket] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection."""
        self._spawn(self._client(reader, writer))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):  # the client may be gone at any point
                await self._serve(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words = (await reader.readline()).split()
        match words:
            case [b"echo"]:
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            case [b"sink"]:
                await self._sink(reader, writer)
            case [b"source", n]:
                writer.write(pattern(int(n)))
                await writer.drain()
                if writer.can_write_eof():
                    writer.write_eof()
                while await reader.read(65536):
                    pass
            case [b"reset", n]:
                writer.write(pattern(int(n)))
                await writer.drain()
                await reader.read(1)
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return
            case [b"name"]:
                host, port = writer.get_extra_info("peername")[:2]
                writer.write(f"{host} {port}\n".encode())
            case [b"hold"]:
                await asyncio.get_running_loop().create_future()
            case [b"gate"]:
                gate = asyncio.Event()
                self.gates.add(gate)
                await gate.wait()
                await self._sink(reader, writer)
            case [b"open"]:
                for gate in self.gates:
                    gate.set()
                self.gates.clear()
                writer.write(b"ok\n")
            case [b"stick"]:
                await self._stick()
                writer.write(b"ok\n")
            case [b"unstick"]:
                self._unstick()
                writer.write(b"ok\n")
            case [b"urgent", n]:
                await self._raw(writer, lambda sock: _send_urgent(sock, int(n)))
                while await reader.read(65536):
                    pass
            case [b"keepalive"]:
                while not _keeps_alive(writer.get_extra_info("socket")):  # noqa: ASYNC110  the kernel tells nobody of it
                    await asyncio.sleep(0.01)
                writer.write(b"ok\n")
            case [b"priority", n]:
                sock = writer.get_extra_info("socket")
                names = sock.getpeername(), sock.getsockname()
                while _priority(sock.family, socket.IPPROTO_TCP, *names) != int(n):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                writer.write(b"ok\n")
            case [b"mark"]:
                writer.write(await self._raw(writer, _read_urgent))
            case _:
                writer.write(b"?\n")
        await writer.drain()

    @staticmethod
    async def _sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count = crc = 0
        while data := await reader.read(65536):
            count, crc = count + len(data), zlib.crc32(data, crc)
        writer.write(b"%d %08x\n" % (count, crc))

    @staticmethod
    async def _raw(writer: asyncio.StreamWriter, work: Callable[[socket.socket], bytes | None]) -> bytes:
        """Do ``work`` in a thread with a blocking duplicate of the socket, while asyncio keeps off it."""
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        with writer.get_extra_info("socket").dup() as sock:
            answer = await asyncio.to_thread(work, sock)
            sock.setblocking(False)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        return answer or b""

    async def _stick(self) -> None:
        """A backlog of 0 holds one connection; SYNs that come then get no answer."""
        if self.fillers:
            return
        loop = asyncio.get_running_loop()
        for listener in self.stuck:
            loop.remove_reader(listener)
            filler = socket.socket(listener.family)
            filler.setblocking(False)
            self.fillers.append(filler)
            await loop.sock_connect(filler, listener.getsockname())
            queued = asyncio.Event()
            loop.add_reader(listener, queued.set)
            await queued.wait()
            loop.remove_reader(listener)

    def _unstick(self) -> None:
        for listener in self.stuck:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)
        for filler in self.fillers:
            filler.close()
        self.fillers.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = listener.accept()
            sock.setblocking(False)
            self._spawn(self._accepted(sock))

    async def _accepted(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        await self._client(reader, writer)

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        for sock in self.stuck:
            loop.remove_reader(sock)
            sock.close()
        for sock in self.fillers:
            sock.close()
        for task in self.tasks:  # those that hold
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def _datagram(sock: socket.socket) -> None:
    # a plain socket: asyncio's own datagram transport swallows empty datagrams
    data, control, _, addr = sock.recvmsg(65536, 256)
    six = sock.family == socket.AF_INET6
    level, ttl, tos = (41, socket.IPV6_HOPLIMIT, socket.IPV6_TCLASS) if six else (0, socket.IP_TTL, socket.IP_TOS)
    how: list[tuple[int, int, bytes]] = []
    match data.split():
        case [b"big", size]:
            data = pattern(int(size))
        case [b"flood", count, size]:
            for _ in range(int(count)):
                with contextlib.suppress(BlockingIOError):
                    sock.sendto(bytes(int(size)), addr)
            return
        case [b"how"]:
            told = {kind: int.from_bytes(value, sys.byteorder) for _, kind, value in control}
            data = b"%d %d" % (told[ttl], told[tos])
        case [b"priority"]:
            data = b"%d" % _priority(sock.family, socket.IPPROTO_UDP, addr, sock.getsockname())
        case [b"set", number, kind]:
            how = [(level, ttl, struct.pack("i", int(number))), (level, tos, struct.pack("i", int(kind)))]
        case [b"split", count, size]:
            data, how = pattern(int(count) * int(size)), [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", int(size)))]
    if not data.startswith(b"drop"):
        sock.sendmsg([data], how, 0, addr)


def _bind(hosts: tuple[str, ...], port: int, *kinds: socket.SocketKind) -> list[socket.socket]:
    """For each host a socket of each kind, all on one port number; port 0: one that all of them have free."""
    tries = 1 if port else 50
    while True:
        tries -= 1
        socks: list[socket.socket] = []
        number = port
        try:
            for host, kind in itertools.product(hosts, kinds):
                socks.append(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind | socket.SOCK_NONBLOCK))
                if kind == socket.SOCK_DGRAM:
                    options = [(0, IP_RECVTTL), (0, socket.IP_RECVTOS)]
                    if ":" in host:
                        options = [(41, socket.IPV6_RECVHOPLIMIT), (41, socket.IPV6_RECVTCLASS)]
                    for level, option in options:
                        socks[-1].setsockopt(level, option, 1)
                socks[-1].bind((host, number))
                number = socks[-1].getsockname()[1]
        except OSError as error:
            for sock in socks:
                sock.close()
            if not tries or error.errno != errno.EADDRINUSE:
                raise
        else:
            return socks


@contextlib.asynccontextmanager
async def peer(*hosts: str, port: int = 0) -> AsyncIterator[tuple[int, int]]:
    """Serve both kinds on one port number of all hosts; yields it and the stuck port's."""
    loop = asyncio.get_running_loop()
    socks = _bind(hosts, port, socket.SOCK_STREAM, socket.SOCK_DGRAM)
    stuck = _bind(hosts, 0, socket.SOCK_STREAM)
    for sock in stuck:
        sock.listen(0)
    state = _Peer(stuck)
    servers = [await asyncio.start_server(state.start, sock=sock, limit=1 << 16) for sock in socks[::2]]
    for sock in socks[1::2]:
        loop.add_reader(sock, _datagram, sock)
    try:
        yield socks[0].getsockname()[1], stuck[0].getsockname()[1]
    finally:
        for sock in socks[1::2]:
            loop.remove_reader(sock)
            sock.close()
        for server in servers:
            server.close()
        await state.close()


def deaf_datagram(host: str, port: int = 0) -> socket.socket:
    """A datagram socket on a port that is closed to all: it is connected, to itself, so others are refused."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    sock.connect(sock.getsockname())
    return sock


async def _main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    async with peer(*(sys.argv[2:] or ["127.0.0.1"]), port=port) as ports:
        print(*ports, flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
