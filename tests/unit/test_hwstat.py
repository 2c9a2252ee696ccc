# SPDX-License-Identifier: BSD-3-Clause
"""hwstat on a /proc made up here: what it shows of which line, and who holds the socket."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc/hwstat"
HEAD = "proto state local remote rx_queue tx_queue uid inode flow pair drops host shut"
SOCKETS = """\
tcp CONNECTED tcp://10.0.2.15:41712 tcp://10.0.0.5:80 3 12 1000 101 00000005 0 0 open -
tcp CONNECTED tcp6://fd00::2/41713 tcp6://fd00::5/7000 0 0 0 102 00000006 1 0 fin -
tcp CONNECTED tcp://10.0.2.15:41714 tcp://10.0.0.5:7000 0 0 0 103 00000007 0 0 open s
mptcp CONNECTED tcp://10.0.2.15:41715 tcp://10.0.0.5:7000 0 0 0 104 00000008 0 0 fin rs
tcp CONNECTING tcp://0.0.0.0:0 tcp://10.0.0.5:7004 0 0 0 105 00000009 0 0 asked -
tcp CLOSED tcp://10.0.2.15:41716 - 0 0 0 106 0000000a 0 0 gone -
tcp LISTEN tcp://0.0.0.0:8080 - 1 5 0 107 0000000b 0 0 open -
udp CONNECTED udp://0.0.0.0:8082 - 0 0 0 108 0000000c 0 4 open -
udp CONNECTED udp://10.0.2.15:41717 udp://10.0.0.53:53 0 0 0 109 0000000d 0 0 open -
icmp CONNECTED icmp://10.0.2.15:33 icmp://10.0.0.5:0 0 0 0 110 0000000e 0 0 open -
icmp CONNECTED icmp://0.0.0.0:34 - 64 0 0 111 0000000f 0 0 open -
"""


@pytest.fixture(scope="module")
def proc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("proc")
    (root / "net").mkdir()
    (root / "net/hwsock").write_text(f"{HEAD}\n{SOCKETS}")
    for pid, comm, links in [(7, "nginx", {"3": 107, "4": 101}), (8, "nginx", {"3": 107}), (9, "a b", {"0": 105})]:
        (root / f"{pid}/fd").mkdir(parents=True)
        (root / f"{pid}/comm").write_text(f"{comm}\n")
        for name, inode in links.items():
            (root / f"{pid}/fd/{name}").symlink_to(f"socket:[{inode}]")
        (root / f"{pid}/fd/9").symlink_to("/dev/null")
    return root


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hwstat")
    flags = "-O1 -Werror -fsanitize=undefined -fno-sanitize-recover"
    subprocess.run(["make", "-s", "-C", SOURCE, f"BUILD={out}", f"CFLAGS={flags}"], check=True)
    return out / "hwstat"


def run(program: Path, proc: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PROC_ROOT": str(proc)}
    return subprocess.run([program, *options], env=environment, capture_output=True, text=True, check=False)


def shown(program: Path, proc: Path, *options: str) -> list[list[str]]:
    done = run(program, proc, "-nH", *options)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_connections_are_shown_and_named_as_ss_does(program: Path, proc: Path) -> None:
    assert shown(program, proc) == [
        ["tcp", "ESTAB", "3", "12", "10.0.2.15:41712", "10.0.0.5:80", "open"],
        ["tcp", "CLOSE-WAIT", "0", "0", "[fd00::2]:41713", "[fd00::5]:7000", "fin"],
        ["tcp", "FIN-WAIT", "0", "0", "10.0.2.15:41714", "10.0.0.5:7000", "open"],
        ["mptcp", "CLOSING", "0", "0", "10.0.2.15:41715", "10.0.0.5:7000", "fin"],
        ["tcp", "SYN-SENT", "0", "0", "0.0.0.0:*", "10.0.0.5:7004", "asked"],
        ["tcp", "CLOSE", "0", "0", "10.0.2.15:41716", "*:*", "gone"],
        ["udp", "ESTAB", "0", "0", "10.0.2.15:41717", "10.0.0.53:53", "open"],
        ["icmp", "ESTAB", "0", "0", "10.0.2.15:33", "10.0.0.5:*", "open"],
    ]


def test_listening_shows_listeners_and_datagram_servers_only(program: Path, proc: Path) -> None:
    assert [line[:5] for line in shown(program, proc, "-l")] == [
        ["tcp", "LISTEN", "1", "5", "0.0.0.0:8080"],
        ["udp", "UNCONN", "0", "0", "0.0.0.0:8082"],
        ["icmp", "UNCONN", "64", "0", "0.0.0.0:34"],
    ]


@pytest.mark.parametrize(("options", "count"), [("-a", 11), ("-at", 7), ("-au", 4), ("-atu", 11), ("-lt", 1), ("-u", 2)])
def test_filters(program: Path, proc: Path, options: str, count: int) -> None:
    assert len(shown(program, proc, options)) == count


def test_every_process_that_holds_a_socket_is_named(program: Path, proc: Path) -> None:
    listening = run(program, proc, "-ltnp").stdout.splitlines()[1]
    assert sorted(listening.partition(" users:")[2].strip("()").split("),(")) == ['"nginx",pid=7,fd=3', '"nginx",pid=8,fd=3']
    assert 'users:(("a b",pid=9,fd=0))' in run(program, proc, "--processes").stdout
    assert "users" not in run(program, proc, "-p", "-u").stdout


def test_extended_has_what_the_columns_have_not(program: Path, proc: Path) -> None:
    assert "uid:0 ino:108 flow:0000000c pair:0 drops:4" in run(program, proc, "-lue").stdout


def test_a_service_is_named_unless_numbers_are_wished_for(program: Path, proc: Path) -> None:
    """Where this machine has /etc/services; a guest may not."""
    expected = ":http" if Path("/etc/services").exists() else ":80"
    assert expected in run(program, proc, "-t").stdout


def test_a_list_without_the_newer_columns_is_understood(program: Path, tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    lines = [line.rsplit(" ", 2)[0] for line in [HEAD, *SOCKETS.splitlines()]]
    (tmp_path / "net/hwsock").write_text("\n".join(lines) + "\n")
    assert shown(program, tmp_path)[0] == ["tcp", "ESTAB", "3", "12", "10.0.2.15:41712", "10.0.0.5:80", "-"]


def test_without_the_module_it_says_so(program: Path, tmp_path: Path) -> None:
    done = run(program, tmp_path)
    assert done.returncode == 1
    assert "is virtio_socket loaded?" in done.stderr


def test_wrong_arguments_are_refused_and_help_names_all_options(program: Path, proc: Path) -> None:
    for wrong in ("-x", "--wrong", "word"):
        assert run(program, proc, wrong).returncode == 2
    text = run(program, proc, "--help").stdout
    assert all(f"-{letter}, --" in text for letter in "tulanpeHh")
