# SPDX-License-Identifier: BSD-3-Clause
"""The host-side clients of the in-guest check programs that are servers: guest/{listen,group,dgram_server}_check.c."""

from __future__ import annotations

import contextlib
import socket
import struct
import time


def _rest(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as stream:
        return stream.read()


def _ask(host: str, port: int, line: bytes, answer: bytes = b"ok\n") -> None:
    with socket.create_connection((host, port), timeout=300) as sock:
        sock.sendall(line)
        said = _rest(sock)
        assert said == answer, (line, said)


def _crowd(stack: contextlib.ExitStack, host: str, port: int) -> list[socket.socket]:
    """Eight try to connect, one after the other, to a server that accepts none: those whose connection came to be."""
    queued = []
    for number in range(8):
        with contextlib.ExitStack() as own:
            sock = own.enter_context(socket.socket())
            sock.settimeout(0.1 if number else 300)  # the more patience, the surer it is that one too many is noticed
            with contextlib.suppress(TimeoutError):
                sock.connect((host, port))
                sock.settimeout(300)
                sock.sendall(b"queued\n")
                queued.append(sock)
                stack.push(own.pop_all())
    return queued


def _listener_word(stay: socket.socket, word: str, host: str, port: int, port6: int) -> None:
    """What guest/listen_check.c wants of its client next."""
    match word:
        case "backlog":
            with contextlib.ExitStack() as stack:
                queued = _crowd(stack, host, port)
                stay.sendall(b"%d\n" % len(queued))
                assert [_rest(sock) for sock in queued] == [b"ok\n"] * len(queued)
        case "limit" | "again":
            _ask(host, port, f"{word}\n".encode())
        case "wake":
            for _ in range(16):
                _ask(host, port, b"", b"x")
            stay.sendall(b"done\n")
        case "shared":
            for _ in range(32):
                _ask(host, port, b"shared\n")
        case "both":
            for address in (host, "::1"):
                _ask(address, port6, b"six\n")
        case "refused":
            try:
                _ask(host, port6, b"")
            except ConnectionRefusedError:
                stay.sendall(b"done\n")
        case _:
            raise AssertionError(word)


def drive_listener(host: str, port: int, port6: int) -> None:
    """The client side of guest/listen_check.c; AssertionError where the server does not do what it should."""
    with socket.create_connection((host, port), timeout=300) as sock, sock.makefile() as stream:
        sock.sendall(b"hello\n")
        assert int(stream.read()) == sock.getsockname()[1]
    with socket.create_connection((host, port), timeout=300) as sock:
        sock.sendall(b"rst\n")
        try:
            data = sock.recv(1)
        except ConnectionResetError:
            pass
        else:
            raise AssertionError(f"no reset, but {data!r}")
    with socket.create_connection((host, port), timeout=300) as sock, sock.makefile() as stream:
        sock.sendall(b"half\n")
        sock.shutdown(socket.SHUT_WR)
        assert stream.read() == "eof\n"
    with socket.create_connection((host, port), timeout=300) as sock, sock.makefile() as stream:
        sock.sendall(b"flags\n")
        assert stream.read() == "ok\n"
    with socket.create_connection((host, port), timeout=300) as sock:
        sock.sendall(b"dead\n")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with socket.create_connection((host, port), timeout=300) as sock, sock.makefile() as stream:
        sock.sendall(b"stay\n")
        for line in stream:
            _listener_word(sock, line.strip(), host, port, port6)


def drive_group_member(host: str, group: str, port: int) -> None:
    """The client side of guest/group_check.c, over the loopback."""
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=4x4xi", 1))
        client.bind((host, 0))
        client.settimeout(300)
        for data, to in ((b"hello", host), (b"to the group", group), (b"leave", host)):
            client.sendto(data, (to, port))
            assert client.recv(100) == data
        client.sendto(b"to the group", (group, port))
        client.sendto(b"quit", (host, port))


def drive_datagram_server(host: str, port: int) -> None:
    """The client side of guest/dgram_server_check.c; AssertionError where the server does not do what it should."""
    with socket.socket(type=socket.SOCK_DGRAM) as first, socket.socket(type=socket.SOCK_DGRAM) as second:
        for client in (first, second):
            client.settimeout(1)
            client.connect((host, port))
        answer = b""
        deadline = time.monotonic() + 300
        while not answer and time.monotonic() < deadline:  # until it serves, as a client of UDP has to
            try:
                first.send(b"hello")
                answer = first.recv(100)
            except ConnectionRefusedError:  # at once, on a native kernel
                time.sleep(0.02)
            except TimeoutError:
                pass
        assert answer == b"HELLO"
        first.settimeout(300)
        second.settimeout(300)
        second.send(b"")
        assert second.recv(100) == b""
        big = bytes(range(256)) * 200
        second.send(big)
        assert second.recv(65536) == big.upper()
        first.send(b"connect")
        while (answer := first.recv(100)) == b"HELLO":
            pass
        assert answer == b"CONNECTED"
        second.send(b"not heard")
        first.send(b"again")
        assert first.recv(100) == b"AGAIN"
        first.send(b"disconnect")
        assert first.recv(100) == b"DISCONNECTED"
        with contextlib.suppress(ConnectionRefusedError):  # of the one that was not heard, on a native kernel
            second.send(b"")
            assert second.recv(100) == b""
        second.send(b"heard")
        assert second.recv(100) == b"HEARD"
        first.send(b"accept")
        while (answer := first.recv(100)) == b"HELLO":
            pass
        assert answer == b"ACCEPTED"
        for _ in range(16):  # so many that some would come to either socket, if it were left to chance
            with socket.socket(type=socket.SOCK_DGRAM) as other:
                other.settimeout(300)
                other.connect((host, port))
                for client, said in ((other, b"other"), (first, b"mine")):
                    client.send(said)
                    assert client.recv(100) == said.upper()
        first.send(b"leave")
        assert first.recv(100) == b"LEFT"
        first.send(b"quit")
        while (answer := first.recv(100)) == b"HELLO":  # to a greeting that was sent once too often
            pass
        assert answer == b"QUIT"
