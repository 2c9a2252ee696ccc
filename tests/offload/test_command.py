"""``vhostsock serve offload`` and ``vhostsock check-policy``, run as a user runs them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.aio import in_loop
from tests.device_thread import PATIENCE
from vhostsock.cli import main
from vhostsock.offload import Guest, load_policy, parse_uri
from vhostsock.testing.frontend import Frontend
from vhostsock.testing.offload import OffloadDriver

from .conftest import accept, port_of

COMMAND = (sys.executable, "-P", "-m", "vhostsock")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "policy.toml"


@in_loop
async def test_served_device_tells_its_figures_on_sigusr1_and_at_the_end(tmp_path: Path) -> None:
    policy, path = tmp_path / "policy.toml", tmp_path / "vm1.sock"
    policy.write_text('[[rule]]\nmatch = { address = "127.0.0.1", device = "vm1" }\naction = "offload"\n')
    arguments = ["--policy", str(policy), "--name", "vm1", "--pairs", "2", "--socket-path", str(path)]
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "serve", "offload", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    try:
        assert await process.stdout.readline() == f"listening on {path}\n".encode()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        async with Frontend(sock, queues=4, size=256, memory=(32 << 20,)) as frontend:
            await frontend.handshake()
            await frontend.start()
            driver = OffloadDriver(frontend.queues)  # its calls block this loop: the device is another process
            driver.hello()
            with socket.create_server(("127.0.0.1", 0)) as listener:
                listener.settimeout(PATIENCE)
                flow = driver.connect(f"tcp://127.0.0.1:{port_of(listener)}", pair=1)
                with accept(listener) as server:
                    server.sendall(b"hello")
                    assert flow.recv_exactly(5) == b"hello"
            process.send_signal(signal.SIGUSR1)
            while b"stats " not in (line := await process.stderr.readline()):
                assert line
            assert b"stats name=vm1 flows=1 " in line
            assert b" to_guest=5 " in line
        process.send_signal(signal.SIGTERM)
        _, rest = await process.communicate()
        assert process.returncode == 0, rest
        assert b"stats name=vm1 flows=0 " in rest
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert not os.path.exists(path)  # noqa: ASYNC240


@in_loop
async def test_example_of_a_handler_answers_the_guest(tmp_path: Path) -> None:
    path = str(tmp_path / "vm1.sock")
    process = await asyncio.create_subprocess_exec(
        sys.executable, EXAMPLE.parent / "hello_handler.py", path, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    try:
        assert await process.stdout.readline() == f"listening on {path}\n".encode()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        async with Frontend(sock, queues=2, size=256, memory=(32 << 20,)) as frontend:
            await frontend.handshake()
            await frontend.start()
            driver = OffloadDriver(frontend.queues)
            driver.hello()
            flow = driver.connect("tcp://192.0.2.80:80")
            flow.send(b"good morning\n")
            assert flow.recv_all() == b"vm1 said: good morning\n"
            flow.close()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def test_serve_without_a_policy_serves_nothing_and_a_wrong_one_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[[rule]]\nmatch = {}\n")
    assert main(["serve", "offload", "--policy", str(policy), "--socket-path", str(tmp_path / "s")]) == 1
    assert capsys.readouterr().err == (
        f"vhostsock: {policy}:1: rule 1: no 'action'; write action = \"offload\", \"native\" or \"deny\"\n"
    )
    assert not os.path.exists(tmp_path / "s")


def test_check_policy_explains(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--name", "vm1", "--explain", "tcp://10.0.0.5:5432", "--explain", "tcp://10.0.0.6:1", "--explain-bind", "tcp6://::/8080"]
    assert main(["check-policy", str(EXAMPLE), *arguments]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{EXAMPLE}: good; 5 rules, 1 publish rule, default native\n")
    assert "tcp://10.0.0.5:5432: offload, handler unix connects unix:///run/postgresql/.s.PGSQL.5432\n" in output
    assert f"tcp://10.0.0.6:1: deny, the application gets EHOSTUNREACH\n  because of rule 4 at {EXAMPLE}:" in output
    assert "tcp6://::/8080: published as tcp://127.0.0.1:18080\n" in output


def test_check_policy_explains_destinations_of_ipx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "p.toml"
    rule = '[[rule]]\nmatch = { scheme = "ipx", address = "10.0.0.3" }\naction = "deny"\nerrno = "EPERM"\n'
    node = 'network = "000000a1"\nlisten = "udp://10.0.0.1"\npeers = ["udp://10.0.0.2"]\ndevice = "vm1"\n'
    policy.write_text(f"{rule}[[ipx]]\n{node}")
    uris = [f"ipx://000000a1.00000a0000{last}.4000" for last in ("02", "03", "04")]
    for name in ("vm1", "vm2"):
        assert main(["check-policy", str(policy), "--name", name, *(word for uri in uris for word in ("--explain", uri))]) == 0
    output = capsys.readouterr().out
    assert f"{uris[0]}: sent over UDP, and whoever is there is heard\n  because of ipx 1 at {policy}:5\n" in output
    assert f"{uris[1]}: the application gets EPERM\n  because of rule 1 at {policy}:1\n" in output
    assert f"{uris[2]}: the application gets ENETUNREACH\n" in output
    assert f"{uris[0]}: the guest has no IPX network\n" in output


def test_check_policy_wants_to_know_of_handlers_that_are_not_built_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text('[[rule]]\nmatch = { scheme = "tcp" }\naction = "offload"\nhandler = "mine"\n')
    assert main(["check-policy", str(policy)]) == 1
    assert "add --handler mine" in capsys.readouterr().err
    assert main(["check-policy", str(policy), "--handler", "mine"]) == 0


def test_check_policy_refuses_a_uri_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check-policy", str(EXAMPLE), "--explain", "10.0.0.5:5432"])
    assert caught.value.code == 2
    assert "no scheme" in capsys.readouterr().err


def test_example_policy_lets_only_vm1_reach_the_web_and_nobody_the_hosts_own_servers() -> None:
    policy = load_policy(EXAMPLE)

    def action(uri: str, name: str) -> str:
        return policy.decide(parse_uri(uri), Guest(name)).action  # type: ignore[arg-type]

    assert action("tcp6://2001:db8::1/443", "vm1") == "offload"
    assert action("tcp6://2001:db8::1/443", "vm2") == "native"
    assert action("tcp://127.0.0.1:80", "vm1") == "native"
    assert action("tcp://169.254.169.254:80", "vm1") == "native"
    assert action("tcp://192.0.2.1:25", "vm1") == "deny"
