# SPDX-License-Identifier: BSD-3-Clause
"""Events for an input device as lines on a Unix socket, in the words of evdev: ``TYPE CODE VALUE``.

    EV_KEY KEY_A 1
    EV_KEY KEY_A 0
    EV_SYN SYN_REPORT 0          a report ends so, and is sent

Names of input_codes.py, or numbers; empty lines, and what follows a "#", are nothing. What comes from the guest (EV_LED
LED_CAPSL 1) goes to everyone who is connected, in the same form. A line that cannot be is answered with a line that begins with
"error:", and so is a report that the guest did not take; the connection stays.

Clients are served while a front-end is connected; until then they wait in the socket's backlog.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import weakref

from ..errors import UsageError
from ..sockfile import SocketFile
from .input import Event, Input, Profile
from .input_codes import code_name, parse_code, parse_type

__all__ = ["SocketInput", "parse_line"]

BACKLOG = 8
ACCEPT_PAUSE = 1.0  # seconds until the next attempt when this process has no descriptor left
CLIENTS_MAX = 16
LINE_MAX = 256  # bytes; no line of the form above is longer
UNREAD_MAX = 65536  # bytes that a client may leave unread; then it is disconnected

log = logging.getLogger("vhostsock.input")


def parse_line(line: str) -> Event | None:
    """ValueError says what is wrong; None for a line without an event."""
    words = line.partition("#")[0].split()
    if not words:
        return None
    if len(words) != 3:
        raise ValueError("a line is TYPE CODE VALUE, for example EV_KEY KEY_A 1")
    kind = parse_type(words[0])
    return Event(kind, parse_code(kind, words[1]), int(words[2], 0))


def line_of(event: Event) -> bytes:
    kind, code = code_name(event.type, event.code)
    return f"{kind} {code} {event.value}\n".encode()


class SocketInput(Input):
    """An input device whose events come over the socket at ``path``. ``close`` removes it, at the latest when Python ends."""

    def __init__(self, path: str, profile: Profile, *, name: str | None = None, serial: str = "") -> None:
        super().__init__(profile, name=name, serial=serial, on_event=self._tell)
        file = SocketFile(path, backlog=BACKLOG)
        self._listener = file.sock
        self._listener.setblocking(False)
        self.close = weakref.finalize(self, file.close)
        self._accepting: asyncio.Task[None] | None = None
        self._clients: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    async def connected(self) -> None:
        await super().connected()
        self._accepting = asyncio.create_task(self._accept())

    async def disconnected(self) -> None:
        tasks = [task for task in (self._accepting, *self._clients.values()) if task]
        self._accepting = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().disconnected()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # no descriptor left for it, most likely
                log.error("cannot accept a client for events: %s", error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            if len(self._clients) >= CLIENTS_MAX:
                sock.send(b"error: too many clients\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                sock.close()
                continue
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=LINE_MAX)
            self._clients[writer] = loop.create_task(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                try:
                    event = parse_line(line.decode())
                    if event and not self.inject([event]):
                        writer.write(b"error: the guest takes no events now; the report was dropped\n")
                except (ValueError, UsageError) as error:
                    writer.write(f"error: {error}\n".encode())
                await writer.drain()
        except ValueError:
            writer.write(b"error: the line is too long\n")
        except ConnectionError:
            pass  # it went
        finally:
            self._clients.pop(writer, None)
            writer.close()

    def _tell(self, event: Event) -> None:
        for writer in list(self._clients):
            if writer.transport.get_write_buffer_size() > UNREAD_MAX:
                log.warning("a client does not read the guest's events; disconnecting it")
                writer.transport.abort()
            else:
                writer.write(line_of(event))
