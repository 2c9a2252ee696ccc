# SPDX-License-Identifier: BSD-3-Clause
"""A vsock installation for the end-to-end tests: the back-end, programs of the host, and a guest with stock modules only.

| port of the host | leads to                                                                    |
|------------------|-----------------------------------------------------------------------------|
| 7000             | peer.py, over TCP (a forward)                                               |
| 7001             | nobody                                                                      |
| 7002             | ``own``, a listening Unix socket of the test itself                         |
| 7100             | an echo of messages: a SOCK_SEQPACKET Unix socket                           |

Port 1234 of the guest is published on loopback, too: ``published``.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.vm import WITHIN, Backend, Program, Vm, free_port

HERE = Path(__file__).resolve().parent
CID = 123


@dataclass
class VsockSite:
    """The installation; what is where is said above. ``path`` is the back-end's --uds-path."""

    path: Path
    backend: Backend
    vm: Vm
    own: socket.socket
    published: int

    def check(self, mode: str, timeout: float = 2 * WITHIN) -> str:
        """Run guest/vsock_check.c in a mode; AssertionError with the claims that do not hold. Returns its output."""
        result = self.vm.run(f"vsock_check {mode}", timeout=timeout, check=False)
        failed = [line for line in result.text.splitlines() if line.startswith("not ok")]
        assert not failed, "\n".join(failed)
        assert result.status == 0, str(result)
        assert "1.." in result.text, str(result)
        return result.text

    def accept(self) -> socket.socket:
        """The connection that the guest made to port 7002."""
        sock, _ = self.own.accept()
        sock.settimeout(WITHIN)
        return sock

    def connect(self, port: int) -> socket.socket:
        """A connection to a port of the guest, by the line of Firecracker's convention. ConnectionError when it is refused."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WITHIN)
        try:
            sock.connect(str(self.path))
            sock.sendall(b"CONNECT %d\n" % port)
            answer = b""
            while not answer.endswith(b"\n"):
                byte = sock.recv(1)
                if not byte:
                    raise ConnectionError("closed")
                answer += byte
        except BaseException:
            sock.close()
            raise
        assert answer.startswith(b"OK "), answer
        return sock


def _echo_messages(server: socket.socket) -> None:
    """Serve connections one after the other, until the socket is shut down."""
    with contextlib.suppress(OSError):
        while True:
            sock, _ = server.accept()
            with sock, contextlib.suppress(OSError):
                while data := sock.recv(1 << 20):
                    sock.sendall(data)


@contextlib.contextmanager
def listening(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as server:
        server.bind(path)
        server.listen(16)
        yield server


@contextlib.contextmanager
def echo_of_messages(path: str) -> Iterator[None]:
    with listening(path, socket.SOCK_SEQPACKET) as server:
        thread = threading.Thread(target=_echo_messages, args=(server,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)  # wakes accept()
            thread.join()


@contextlib.contextmanager
def vsock_site(folder: Path, initramfs: str, *boot: str | Path) -> Iterator[VsockSite]:
    """Everything up, until the end of the block. ``boot`` are more options of the boot script."""
    path = folder / "v"
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Program(folder / "peer.log", [sys.executable, "-u", HERE / "peer.py", "0", "127.0.0.1"]))
        port = int(peer.await_log(r"^(\d+) \d+\n")[1])
        own = stack.enter_context(listening(f"{path}_7002"))
        own.settimeout(WITHIN)
        stack.enter_context(echo_of_messages(f"{path}_7100"))
        published = free_port()
        backend = stack.enter_context(Backend(
            folder, "vsock", "--guest-cid", str(CID), "--uds-path", path, "--name", "vm1",
            "--forward", f"7000=tcp://127.0.0.1:{port}", "--publish", f"tcp://127.0.0.1:{published}=1234",
        ))  # fmt: skip
        vm = stack.enter_context(Vm(folder, initramfs, "--socket", backend.socket, "--carrier", "vsock", *boot))
        yield VsockSite(path, backend, vm, own, published)
