# SPDX-License-Identifier: BSD-3-Clause
"""A whole installation for the offload tests: servers of the host, the back-end with a policy, and a guest without a NIC.

The guest knows the servers under addresses that do not exist; the policy rewrites them to loopback:

| the guest connects to  | and reaches on the host                               |
|------------------------|-------------------------------------------------------|
| tcp 10.0.0.5:80        | a web server with the files of ``www``                |
| tcp, udp 10.0.0.5:7000 | peer.py                                               |
| udp 10.0.0.6:7000      | peer.py at another address                            |
| tcp, udp [fd00::5]:7000 | peer.py over IPv6                                    |
| tcp, udp 10.0.0.5:7001, [fd00::5]:7001 | a port where nobody listens           |
| tcp 10.0.0.5:7003, [fd00::5]:7003      | the stuck port of peer.py             |
| tcp 10.0.0.5:7002      | ``own``, a listening socket of the test itself        |
| tcp 10.0.0.5:7004      | the guest's own listener on 8080, through the host    |
| udp 10.0.0.5:7005      | the guest's own datagram server on 8090, through the host |
| udp 10.0.0.53:53       | ``dns``, a datagram socket of the test itself         |
| 10.66.0.N, any port    | refused with the errno DENIED[N]                      |
| IPX                    | its own node of network ``IPX_NETWORK``, nobody else's |
| anything else          | not offloaded: native                                 |

Guest listeners on 8080 and 8081 are published on loopback, on the ports ``published``; so is UDP port 8090, and 8082 and
8083 on some that the log tells. Port 8086 is published for each family, IPv6 at ::.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from tests.e2e.clients import drive_datagram_server, drive_group_member, drive_listener
from tests.e2e.peer import deaf_datagram
from tests.e2e.vm import WITHIN, Backend, Program, Vm, free_port, wait_until
from vhostsock.offload.uri import IpxURI
from vhostsock.qemu import qemu_args

HERE = Path(__file__).resolve().parent
DENIED = ["EACCES", "EPERM", "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "ETIMEDOUT", "EHOSTDOWN"]
DATA_SIZE = 16 << 20
GROUP = f"239.77.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"  # multicast, this run's alone
IPX_NETWORK, IPX_PORT = "000000a1", 2131
IPX_HOST = IPv4Address(f"127.{64 | os.getpid() >> 8 & 63}.{os.getpid() & 255}.8")  # of the loopback, and this run's alone


@dataclass
class Site:
    """The installation; what is where is said above."""

    folder: Path
    backend: Backend
    vm: Vm
    own: socket.socket
    dns: socket.socket
    ports: dict[str, int]  # on the host's loopback: of peer, closed and others
    published: dict[int, int]  # guest port -> host port
    plugged: int = 0  # how often the device was plugged again

    @property
    def device(self) -> str:
        """QEMU's name of the device."""
        return f"vhostsock{self.plugged}"

    @property
    def www(self) -> Path:
        return self.folder / "www"

    def fetch(self, guest_port: int, path: str = "/") -> bytes:
        """GET from a published web server of the guest."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.published[guest_port]}{path}", timeout=WITHIN) as answer:
            data: bytes = answer.read()
            return data

    def accept(self) -> socket.socket:
        """The connection that the guest made to 10.0.0.5:7002."""
        sock, _ = self.own.accept()
        sock.settimeout(WITHIN)
        return sock

    def hwsock(self) -> list[list[str]]:
        """The guest's /proc/net/hwsock: for each offloaded socket its columns."""
        return [line.split() for line in self.vm.run("cat /proc/net/hwsock").text.splitlines()[1:]]

    def plug_again(self) -> None:
        """Hot-plug a device for the same back-end in place of the one that was unplugged; returns when it serves."""
        self.vm.qmp.execute("chardev-remove", id=f"{self.device}-socket")
        self.plugged += 1
        address = {"type": "unix", "data": {"path": str(self.backend.socket)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        self.vm.qmp.execute("chardev-add", id=f"{self.device}-socket", backend=backend)
        driver, *properties = qemu_args("", name=self.device)[-1].split(",")
        # numbers as numbers: newer versions of QEMU insist
        typed = {name: int(value) if value.isdecimal() else value for name, value in (word.split("=") for word in properties)}
        self.vm.qmp.execute("device_add", driver=driver, **typed)
        fetches = "wget -q -O /dev/null http://10.0.0.5/"
        wait_until(lambda: self.vm.run(fetches, check=False).status == 0, "the new device serves")

    def check(self, program: str, timeout: float = 2 * WITHIN) -> str:
        """Run one of guest/*_check.c; AssertionError with the claims that do not hold. Returns its output."""
        result = self.vm.run(program, timeout=timeout, check=False)
        failed = [line for line in result.text.splitlines() if line.startswith("not ok")]
        assert not failed, "\n".join(failed)
        assert result.status == 0, str(result)
        assert "# SKIP" not in result.text, result.text
        assert re.search(r"^1\.\.[1-9]", result.text, re.MULTILINE), str(result)
        return result.text

    def check_races(self) -> None:
        """The claims about threads that come between each other's steps, for a module that was built with --races."""
        for claim in ("threads_that_race", "listener_that_changes_hands", "closing_while_connecting"):
            self.check(f"CHECK_ONLY={claim} takeover_check 10.0.0.5 7000 fd00::5 7000 192.0.2.1", timeout=10 * WITHIN)

    def check_streams(self, host: str, denied: str = "") -> None:
        """All that claims what a TCP client may rely on. ``denied``: an address, a port, the errno that it shall give."""
        self.check(f"connect_check {host} 7000 7001 7003 {denied}")
        for program in ("stream_check", "option_check", "io_check", "urgent_check"):
            self.check(f"{program} {host} 7000")

    def check_datagrams(self) -> None:
        """Run all of guest/dgram_*check.c that have no client on the host."""
        self.check("dgram_check 10.0.0.5 7000 10.0.0.6 7000")
        self.check("dgram_policy_check 10.0.0.5 7000 10.66.0.0 192.0.2.1")
        for address in ("10.0.0.5", "fd00::5"):
            self.check(f"dgram_error_check {address} 7000 7001")
            self.check(f"dgram_cmsg_check {address} 7000")

    def check_groups(self) -> None:
        """Run guest/group_check.c with its client on the host, which sends to the group over the host's loopback."""
        start = self.backend.logged()
        checking = self.vm.start(f"group_check 8084 {GROUP} 239.78.0.1")
        port = int(self.backend.await_log(r"udp://0\.0\.0\.0:8084 published as udp://0\.0\.0\.0:(\d+)", start)[1])
        self.backend.await_log(rf"joins group 'udp://{GROUP}:0': EADDRINUSE", start)  # all that it does before it listens
        drive_group_member("127.0.0.1", GROUP, port)
        result = checking.wait(check=False)
        assert result.status == 0, result
        assert "not ok" not in result.text, result.text

    def check_ipx(self) -> None:
        """Run guest/ipx_check.c with this guest as its own peer."""
        echo, _ = self.vm.start_until("ipx_check echo", "ready")
        own, denied = (f"{IpxURI.node_at(host, IPX_PORT):012x}" for host in (IPX_HOST, IPX_HOST + 1))
        self.check(f"ipx_check {IPX_NETWORK} {own} {own} {denied}")
        self.vm.run("kill $(pidof ipx_check)")
        echo.wait(check=False)

    def check_gone(self, take_away: Callable[[], None], *, back: bool = False) -> None:
        """Run guest/gone_check.c; once it waits in every way there is, the device is taken away, and ``back`` again."""
        checking, file = self.vm.start_until(f"gone_check 10.0.0.5 7000 7003 {'back' if back else ''}", "ready", timeout=200)
        take_away()
        result = checking.wait(check=False)
        claims = self.vm.run(f"cat {file}").text
        assert result.status == 0, claims
        assert "not ok" not in claims

    def check_memory(self) -> None:
        """Run guest/memory_check.c while the back-end is stopped. The driver must be patient: ``virtio_socket.ping_secs``."""
        checking = self.vm.start("memory_check 10.0.0.5 7000 /tmp/go 2>/tmp/memory")
        wait_until(lambda: "ready" in self.vm.run("cat /tmp/memory; true").text, "the program has its connections")
        self.backend.process.send_signal(signal.SIGSTOP)
        try:
            self.vm.run("touch /tmp/go")
            result = checking.wait(check=False)
        finally:
            self.backend.process.send_signal(signal.SIGCONT)
        assert result.status == 0, result
        assert "not ok" not in result.text, result.text

    def suspend_and_wake(self) -> None:
        """Suspend the guest to memory (ACPI S3) and wake it as its power button would."""
        self.vm.start("echo mem >/sys/power/state")
        self.vm.qmp.await_event("SUSPEND")
        self.vm.qmp.execute("system_wakeup")
        self.vm.qmp.await_event("WAKEUP")

    def check_listener(self) -> None:
        """Run guest/listen_check.c with its client on the host; AssertionError with the claims that do not hold."""
        checking, file = self.vm.start_until("listen_check 8081 8086", "port 8081")
        try:
            drive_listener("127.0.0.1", self.published[8081], self.published[8086])
        finally:
            result = checking.wait(check=False)
            claims = self.vm.run(f"cat {file}").text
            assert result.status == 0, claims
            assert "not ok" not in claims

    def check_datagram_server(self) -> None:
        """The same with guest/dgram_server_check.c."""
        start = self.backend.logged()
        serving = self.vm.start("dgram_server_check 8082 8083")
        port = int(self.backend.await_log(r"udp://0\.0\.0\.0:8083 published as udp://127\.0\.0\.1:(\d+)", start)[1])
        drive_datagram_server("127.0.0.1", port)
        result = serving.wait()
        assert "not ok" not in result.text, result.text


def _policy(ports: dict[str, int], published: dict[int, int]) -> str:
    def offload(scheme: str, address: str, port: int, target: str) -> str:
        match = f'{{ scheme = "{scheme}", address = "{address}", port = {port} }}'
        return f'[[rule]]\nmatch = {match}\naction = "offload"\nrewrite = "{target}"\n'

    rules = [
        offload("tcp", "10.0.0.5", 80, f"tcp://127.0.0.1:{ports['web']}"),
        offload("tcp", "10.0.0.5", 7000, f"tcp://127.0.0.1:{ports['peer']}"),
        offload("udp", "10.0.0.5", 7000, f"udp://127.0.0.1:{ports['peer']}"),
        offload("udp", "10.0.0.6", 7000, f"udp://127.0.0.2:{ports['peer']}"),
        offload("tcp6", "fd00::5", 7000, f"tcp6://::1/{ports['peer']}"),
        offload("tcp", "10.0.0.5", 7001, f"tcp://127.0.0.1:{ports['closed']}"),
        offload("tcp6", "fd00::5", 7001, f"tcp6://::1/{ports['closed']}"),
        offload("udp6", "fd00::5", 7000, f"udp6://::1/{ports['peer']}"),
        offload("udp", "10.0.0.5", 7001, f"udp://127.0.0.1:{ports['closed']}"),
        offload("udp6", "fd00::5", 7001, f"udp6://::1/{ports['closed']}"),
        offload("tcp", "10.0.0.5", 7003, f"tcp://127.0.0.1:{ports['stuck']}"),
        offload("tcp6", "fd00::5", 7003, f"tcp6://::1/{ports['stuck']}"),
        offload("tcp", "10.0.0.5", 7002, f"tcp://127.0.0.1:{ports['own']}"),
        offload("tcp", "10.0.0.5", 7004, f"tcp://127.0.0.1:{published[8080]}"),
        offload("udp", "10.0.0.5", 7005, f"udp://127.0.0.1:{published[8090]}"),
        offload("udp", "10.0.0.53", 53, f"udp://127.0.0.1:{ports['dns']}"),
    ]
    rules += [
        f'[[rule]]\nmatch = {{ address = "10.66.0.{n}" }}\naction = "deny"\nerrno = "{name}"\n' for n, name in enumerate(DENIED)
    ]
    rules += [f'[[rule]]\nmatch = {{ scheme = "ipx", address = "{IPX_HOST + 1}" }}\naction = "deny"\nerrno = "EPERM"\n']
    rules += [f'[[ipx]]\nnetwork = "{IPX_NETWORK}"\nlisten = "udp://{IPX_HOST}:{IPX_PORT}"\n']
    rules += ['[[publish]]\nguest = "udp://0.0.0.0:8084"\nhost = "udp://0.0.0.0:0"\n' f'groups = "{GROUP}"\ninterface = "lo"\n']
    rules += ['[[publish]]\nguest = "udp://0.0.0.0:8082-8083"\nhost = "udp://127.0.0.1:0"\n']
    rules += [f'[[publish]]\nguest = "tcp6://::/8086"\nhost = "tcp6://::/{published[8086]}"\n']
    for guest, host in published.items():
        scheme = "udp" if guest == 8090 else "tcp"
        rules.append(f'[[publish]]\nguest = "{scheme}://0.0.0.0:{guest}"\nhost = "{scheme}://127.0.0.1:{host}"\n')
    return "\n".join(rules)


def _local(stack: contextlib.ExitStack, kind: socket.SocketKind) -> socket.socket:
    sock = stack.enter_context(socket.socket(socket.AF_INET, kind))
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(WITHIN)
    return sock


@contextlib.contextmanager
def site(folder: Path, initramfs: str, *boot: str, pairs: int = 1, disk: str = "", hints: bool = False) -> Iterator[Site]:
    """Set all of it up, and take it down. ``disk``: made by make-guest-image. ``hints``: the guest is told what is native."""
    with contextlib.ExitStack() as stack:
        www = folder / "www"
        www.mkdir()
        (www / "data").write_bytes(os.urandom(DATA_SIZE))
        own, dns = _local(stack, socket.SOCK_STREAM), _local(stack, socket.SOCK_DGRAM)
        closed = _local(stack, socket.SOCK_STREAM)  # bound and never listening: nobody else gets the port
        for host in ("127.0.0.1", "::1"):
            stack.enter_context(deaf_datagram(host, closed.getsockname()[1]))
        closed6 = stack.enter_context(socket.socket(socket.AF_INET6))
        closed6.bind(("::1", closed.getsockname()[1]))
        own.listen()
        peers = [sys.executable, str(HERE / "peer.py"), "0", "127.0.0.1", "127.0.0.2", "::1"]
        peer = stack.enter_context(Program(folder / "peer.log", peers))
        server = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(www), "0"]
        web = stack.enter_context(Program(folder / "web.log", server))
        ports = {
            "web": int(web.await_log(r" port (\d+)")[1]),
            "peer": int(peer.await_log(r"(\d+) \d+\n")[1]),
            "stuck": int(peer.await_log(r"\d+ (\d+)\n")[1]),
            "own": own.getsockname()[1],
            "dns": dns.getsockname()[1],
            "closed": closed.getsockname()[1],
        }
        published = {8080: free_port(), 8081: free_port(), 8086: free_port(), 8090: free_port(socket.SOCK_DGRAM)}
        policy = folder / "policy.toml"
        policy.write_text(f"hints = {str(hints).lower()}\n{_policy(ports, published)}")
        backend = stack.enter_context(Backend(folder, "offload", "--policy", policy, "--name", "vm1", "--pairs", str(pairs)))
        vm = stack.enter_context(Vm(folder, initramfs, "--socket", backend.socket, "--pairs", str(pairs), *boot, disk=disk))
        yield Site(folder, backend, vm, own, dns, ports, published)
