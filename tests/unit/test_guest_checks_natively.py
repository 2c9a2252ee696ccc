"""The in-guest check programs pass on a native kernel: they claim what Linux does, not what our module happens to do."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import socket
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

E2E = Path(__file__).resolve().parent.parent / "e2e"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"e2e_{name}", E2E / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checks")
    cc = shutil.which("cc") or shutil.which("gcc")
    assert cc, "no C compiler: apt-get install gcc libc6-dev"
    flags = ["-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-pthread"]
    sources = (E2E / "guest").glob("*_check.c")
    compiling = [subprocess.Popen([cc, *flags, "-o", str(out / source.stem), str(source)]) for source in sources]
    assert not any([process.wait() for process in compiling])
    return out


def closed_port(host: str) -> socket.socket:
    """Bound but not listening: connects to it are refused, and nobody else gets it."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.bind((host, 0))
    return sock


async def run(program: Path, *args: str) -> str:
    process = await asyncio.create_subprocess_exec(program, *args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = (await process.stdout.read()).decode()
    assert await process.wait() == 0, output
    return output


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_stream_claims_hold_on_the_native_kernel(programs: Path, host: str) -> None:
    async def main() -> list[str]:
        async with load("peer").peer(host) as (port, stuck):
            with closed_port(host) as closed:
                ports = {"connect_check": [str(closed.getsockname()[1]), str(stuck)]}
                names = ["connect_check", "stream_check", "option_check", "io_check", "urgent_check"]
                return await asyncio.gather(*(run(programs / name, host, str(port), *ports.get(name, [])) for name in names))

    assert not any("not ok" in output for output in asyncio.run(main()))


def test_datagram_claims_hold_on_the_native_kernel(programs: Path) -> None:
    async def main() -> str:
        peer = load("peer").peer
        async with peer("127.0.0.1") as (port, _), peer("127.0.0.2") as (port2, _):
            return await run(programs / "dgram_check", "127.0.0.1", str(port), "127.0.0.2", str(port2))

    assert "not ok" not in asyncio.run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagram_error_and_control_claims_hold_on_the_native_kernel(programs: Path, host: str) -> None:
    async def main() -> str:
        async with load("peer").peer(host) as (port, _):
            with load("peer").deaf_datagram(host) as deaf:
                errors = await run(programs / "dgram_error_check", host, str(port), str(deaf.getsockname()[1]))
                return errors + await run(programs / "dgram_cmsg_check", host, str(port))

    assert "not ok" not in asyncio.run(main())


def test_hairpin_claims_hold_on_the_native_kernel(programs: Path) -> None:
    assert "not ok" not in asyncio.run(run(programs / "hairpin_check"))


def test_listener_claims_hold_on_the_native_kernel(programs: Path) -> None:
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::", 0))
        port6 = sock.getsockname()[1]
    with subprocess.Popen([programs / "listen_check", "0", str(port6)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("port "):
                load("clients").drive_listener("127.0.0.1", int(line.split()[1]), port6)
        assert process.wait() == 0, "".join(lines)


def test_datagram_server_claims_hold_on_the_native_kernel(programs: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as one, socket.socket(type=socket.SOCK_DGRAM) as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = [sock.getsockname()[1] for sock in (one, two)]
    with subprocess.Popen([programs / "dgram_server_check", *map(str, ports)], stdout=subprocess.PIPE, text=True) as process:
        load("clients").drive_datagram_server("127.0.0.1", ports[1])
        output, _ = process.communicate()
        assert process.returncode == 0, output
