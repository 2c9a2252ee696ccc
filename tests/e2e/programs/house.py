# SPDX-License-Identifier: BSD-3-Clause
"""A guest without a NIC and a host, the same Debian packages on both, and a policy that lets each reach the other's servers.

| who connects | to | reaches |
|---|---|---|
| a program of the guest | host.test, which is 10.0.0.5 and fd00::5, port P | `here`, port P: servers of the host; TCP and UDP |
| a program of the guest | its resolver, 10.0.0.53 | dnsmasq of the host |
| a program of the host | `there`, port P | whatever the guest has bound to 0.0.0.0, :: or 198.51.100.1, port P (from 1024 on) |

`here` and `there` are loopback addresses that no other process uses, as each run has its own; hence every port of them is free.

The guest has no other way out, and `there` none in: whatever arrives has come through the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.vm import SCRIPTS, WITHIN, Backend, Program, Vm, script, wait_until
from vhostsock.testing.guest import Command, CommandError, Result

SUITE = "trixie"
FEW_PACKAGES = (
    "bind9-dnsutils", "curl", "dnsmasq-base", "fcgiwrap", "git", "hey", "nginx", "openssh-client", "openssh-server", "openssl",
    "redis-server", "redis-tools",
)  # fmt: skip
"""What the slice of every day needs: small to fetch."""
PACKAGES = (
    *FEW_PACKAGES, "apt", "caddy", "iperf3", "nghttp2-client", "nodejs", "postgresql-17", "python3-requests", "rsync", "wget",
)  # fmt: skip
HOST, HOST6 = "10.0.0.5", "fd00::5"  # the host, as the guest knows it
OWN = "198.51.100.1"  # for servers of the guest that want to bind an address of theirs; the guest has none
POLICY = """
[[rule]]
match = {{ scheme = "tcp", address = ["10.0.0.5", "fd00::5"] }}
action = "offload"
rewrite = "tcp://{here}:{{port}}"
[[rule]]
match = {{ scheme = "udp", address = ["10.0.0.5", "fd00::5"] }}
action = "offload"
rewrite = "udp://{here}:{{port}}"
[[rule]]
match = {{ scheme = "udp", address = "10.0.0.53", port = 53 }}
action = "offload"
rewrite = "udp://{here}:{dns}"
[[publish]]
guest = "tcp://0.0.0.0:1024-65535"
host = "tcp://{there}:{{port}}"
[[publish]]
guest = "udp://0.0.0.0:1024-65535"
host = "udp://{there}:{{port}}"
[[publish]]
guest = "tcp://198.51.100.1:1024-65535"
host = "tcp://{there}:{{port}}"
[[publish]]
guest = "udp://198.51.100.1:1024-65535"
host = "udp://{there}:{{port}}"
"""


HANGS = 900.0
"""Seconds after which a program hangs that may be busy for some on a slow machine."""


def dnsmasq(port: int, listen: str) -> str:
    """The command of a name server that knows host.test, some.test, and large.test with more than a datagram may hold."""
    known = {"host.test": (HOST, HOST6), "some.test": ("192.0.2.7", "2001:db8::7")}
    names = " ".join(f"--address=/{name}/{address}" for name, addresses in known.items() for address in addresses)
    large = " ".join(f"--txt-record=large.test,{n:02}{'x' * 240}" for n in range(12))
    alone = "--conf-file=/dev/null --pid-file= --user=root --no-resolv --no-hosts"
    return f"dnsmasq -k {alone} --port={port} {listen} {names} {large}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The digest of each file below ``folder``, as `House.guest_digests` has them for the guest."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


class GuestServer:
    """A server in the guest: ended with SIGTERM (or another), and its output told if it fails."""

    def __init__(self, house: House, name: str, command: str, port: int, ends_on: str, kind: str) -> None:
        self._house, self._name, self._ends_on = house, name, ends_on
        pid = f"/tmp/{name}.pid"
        text = f"cd /var/tmp && echo $$ >{pid} && exec {command} >/tmp/{name}.log 2>&1 </dev/null"
        self._running: Command = house.vm.start_in_image(text, timeout=3600)
        listens = f"grep -Eq '^(mp)?{kind}6? +{'LISTEN' if kind == 'tcp' else '[A-Z]+'} +[^ ]*[:/]{port} ' /proc/net/hwsock"

        def up() -> bool:
            assert not self._running.done, f"{name} has ended: {self.log()}"
            return house.vm.run(listens, check=False).status == 0

        wait_until(up, f"{name} of the guest listens on {port}")

    def log(self) -> str:
        return self._house.vm.run(f"cat /tmp/{self._name}.log", check=False).text

    def signal(self, name: str) -> None:
        self._house.vm.run(f"kill -{name} $(cat /tmp/{self._name}.pid)")

    def __enter__(self) -> GuestServer:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._running.done:
            self.signal(self._ends_on)
        self._running.wait(check=False)


class House:
    """Host and guest; see above."""

    def __init__(self, folder: Path, initramfs: str, packages: tuple[str, ...], stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.long = bool(os.environ.get("VHOSTSOCK_PROGRAMS_LONG"))
        """Whether this is the long run (tests/e2e/programs/run --long): minutes for each program."""
        self.disk = Path(script("make-guest-image", "--suite", SUITE, *packages, timeout=1800))
        self.root = self.disk.parent / "root"
        number = os.getpid()
        net = f"127.{64 + (number >> 16) % 64}.{(number >> 8) & 255}"
        self.here, self.there = f"{net}.{1 + 2 * (number % 120)}", f"{net}.{2 + 2 * (number % 120)}"
        self.dns_port = self.port()
        policy = folder / "policy.toml"
        text = POLICY.format(here=self.here, there=self.there, dns=self.dns_port)
        policy.write_text(text)
        self.backend = stack.enter_context(Backend(folder, "offload", "--policy", policy, "--name", "guest", "--pairs", "2"))
        options = ("--socket", self.backend.socket, "--pairs", "2", "--memory", "1G")
        self.vm = stack.enter_context(Vm(folder, initramfs, *options, disk=str(self.disk)))
        listen = f"--listen-address={self.here} --bind-interfaces"
        stack.enter_context(self.host_server("dnsmasq", dnsmasq(self.dns_port, listen), self.dns_port))
        self.vm.run_in_image("printf 'nameserver 10.0.0.53\\noptions timeout:30 attempts:4\\n' >/etc/resolv.conf")

    def pick(self, short: int, long: int) -> int:
        """How much: in the run of every day, and in the long run."""
        return long if self.long else short

    def port(self) -> int:
        """A free port of the host's address; of the guest's, too."""
        with socket.socket() as sock:
            sock.bind((self.here, 0))
            port: int = sock.getsockname()[1]
            return port

    def version(self, package: str) -> str:
        lines = (self.disk.parent / "versions").read_text().splitlines()
        return next(line.split()[1] for line in lines if line.split()[0] == package)

    # ---- the host's side

    def _in_root(self, command: str) -> list[str | Path]:
        return [SCRIPTS / "in-root", self.root, self.folder, "--", "sh", "-c", f"cd {self.folder} && {command}"]

    def host(self, command: str, *, timeout: float = HANGS, input: bytes = b"") -> str:
        """Run a shell command on the host, among its own copy of the packages; its output. AssertionError if it fails."""
        done = subprocess.run(self._in_root(command), capture_output=True, input=input, timeout=timeout, check=False)
        output = done.stdout.decode(errors="replace")
        assert done.returncode == 0, (
            f"on the host: {command}: {done.returncode}\n{output}\n{done.stderr.decode(errors='replace')}"
        )
        return output.rstrip("\n")

    def host_start(self, name: str, command: str) -> Program:
        """The same in the background; a context manager that ends it."""
        return Program(self.folder / f"{name}.log", self._in_root(f"exec {command}"))

    @contextlib.contextmanager
    def host_server(self, name: str, command: str, port: int) -> Iterator[Program]:
        """A server of the host, once it accepts connections."""
        with self.host_start(name, command) as server:

            def up() -> bool:
                assert server.process.poll() is None, f"{name}: {server.log.read_text()}"
                with socket.socket() as sock:
                    return sock.connect_ex((self.here, port)) == 0

            wait_until(up, f"{name} of the host listens on {port}")
            yield server

    def random_file(self, name: str, size: int) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
        return path

    # ---- the guest's side

    def guest(self, command: str, *, timeout: float = HANGS, input: bytes = b"") -> str:
        """Run a shell command in the guest, among its packages; its output. CommandError if it fails."""
        return self.guest_result(command, timeout=timeout, input=input).text

    def guest_result(self, command: str, *, timeout: float = HANGS, input: bytes = b"") -> Result:
        result = self.vm.run_in_image(f"cd /var/tmp && {command}", timeout=timeout, input=input, check=False)
        if result.status:
            raise CommandError(str(result))
        return result

    def guest_start(self, command: str, *, timeout: float = HANGS) -> Command:
        return self.vm.start_in_image(f"cd /var/tmp && {command}", timeout=timeout)

    def guest_server(self, name: str, command: str, port: int, *, ends_on: str = "TERM", kind: str = "tcp") -> GuestServer:
        """A server in the guest, once the device has its listener (/proc/net/hwsock shows it)."""
        return GuestServer(self, name, command, port, ends_on, kind)

    def give(self, *paths: Path, to: str = "/var/tmp") -> None:
        """Copy files and folders of the host into a folder of the guest's disk, not by way of the device."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for path in paths:
                tar.add(path, arcname=path.name)
        self.vm.run_in_image(f"mkdir -p {to} && tar -x --no-same-owner -C {to}", input=packed.getvalue())

    def guest_sha256(self, path: str) -> str:
        return self.guest(f"sha256sum {path}").split()[0]

    def guest_digests(self, folder: str) -> dict[str, str]:
        lines = self.guest(f"cd {folder} && find . -type f -exec sha256sum {{}} +").splitlines()
        return {name.removeprefix("./"): digest for digest, name in (line.split(maxsplit=1) for line in lines)}

    def settled(self) -> None:
        """Wait until no socket of the guest is offloaded and the device has no flow; AssertionError if one stays."""
        shows = "tail -n +2 /proc/net/hwsock"
        wait_until(lambda: not self.vm.run(shows).text, f"no socket stays offloaded; within {WITHIN:.0f} s")
        wait_until(lambda: self.backend.stats("guest")["flows"] == 0, "the device has no flow left")


@contextlib.contextmanager
def house(folder: Path, initramfs: str, packages: tuple[str, ...]) -> Iterator[House]:
    with contextlib.ExitStack() as stack:
        yield House(folder, initramfs, packages, stack)
