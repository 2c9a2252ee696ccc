# SPDX-License-Identifier: BSD-3-Clause
"""Programs about the network itself: iperf3 in every direction and protocol, dig and dnsmasq."""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.programs.conftest import Done
from tests.e2e.programs.house import HOST, OWN, House, dnsmasq

IN, OUT = "host to guest", "guest to host"
KIND = pytest.mark.parametrize("kind", ["up", "-R", "--bidir", "-P 32", "-u"])
MIB = 1 << 20
BLOCK = 128 << 10  # what iperf3 writes at once over TCP


def options(kind: str, amount: int) -> str:
    """iperf3's, for about ``amount`` bytes in all."""
    if kind == "-u":
        return f"-u -b 20M -l 1200 -n {amount}"
    return f"{'' if kind == 'up' else kind} -n {amount}"


def moved(told: str) -> int:
    """The bytes that arrived, of iperf3 --json; AssertionError if a sum does not fit."""
    report = json.loads(told)
    assert "error" not in report, report["error"]
    streams = report["start"]["test_start"]["num_streams"]
    end, total = report["end"], 0
    if "sum" in end and "lost_packets" in end["sum"]:
        assert end["sum"]["packets"] > 0, end["sum"]
        assert end["sum_received"]["bytes"] > 0, end
        return int(end["sum_received"]["bytes"])
    for way in ("", "_bidir_reverse"):
        if f"sum_sent{way}" in end:
            sent, received = end[f"sum_sent{way}"]["bytes"], end[f"sum_received{way}"]["bytes"]
            # up to a block a stream more than "sent": it cancels its sending threads wherever they are, also between a write
            # and its counting (over the kernel's own loopback, too: one block in 4 of 150 runs on a busy machine)
            assert 0 < received <= sent + streams * BLOCK, (way, sent, received)
            total += received
    return total


@KIND
@pytest.mark.program("iperf3", OUT, "TCP: one stream, -R, --bidir, 32 streams; UDP: -u", "no error, bytes received")
def test_iperf3_to_the_host(programs: House, kind: str, done: Done) -> None:
    port = programs.port()
    with programs.host_server("iperf3d", f"iperf3 -s -B {programs.here} -p {port}", port):
        told = programs.guest(f"iperf3 -c {HOST} -p {port} -J {options(kind, programs.pick(8, 1000) * MIB)}", timeout=1200)
    done(f"{kind}: {moved(told)} bytes")


@KIND
@pytest.mark.program("iperf3", IN, "TCP: one stream, -R, --bidir, 32 streams; UDP: -u", "no error, bytes received")
def test_iperf3_to_the_guest(programs: House, kind: str, done: Done) -> None:
    port = programs.port()
    with programs.guest_server("iperf3d", f"iperf3 -s -4 -p {port}", port):
        told = programs.host(
            f"iperf3 -c {programs.there} -p {port} -J {options(kind, programs.pick(8, 1000) * MIB)}", timeout=1200
        )
    done(f"{kind}: {moved(told)} bytes")


# ---- DNS


def answers(run: object, address: str, port: int) -> int:
    """dig over UDP and TCP, with an answer that is truncated first; the number of queries."""
    assert callable(run)
    dig = f"dig +tries=1 +timeout=300 @{address} -p {port}"
    assert run(f"{dig} +short some.test A some.test AAAA").split() == ["192.0.2.7", "2001:db8::7"]
    assert run(f"{dig} +short +tcp some.test") == "192.0.2.7"
    told = run(f"{dig} +bufsize=1232 large.test TXT")
    assert "Truncated, retrying in TCP mode" in told, told
    assert sorted(re.findall(r'"(\d\d)x{240}"', told)) == [f"{n:02}" for n in range(12)], told
    assert "NXDOMAIN" in run(f"{dig} none.invalid") or "REFUSED" in run(f"{dig} none.invalid")
    return 5


@pytest.mark.program(
    "bind9-dnsutils", OUT, "dig over UDP and TCP, an answer truncated and asked again; getaddrinfo (getent)", "the answers"
)
def test_dig_asks_the_host(programs: House, done: Done) -> None:
    count = answers(programs.guest, HOST, programs.dns_port)
    told = programs.guest("getent ahosts some.test")
    assert {line.split()[0] for line in told.splitlines()} == {"192.0.2.7", "2001:db8::7"}, told
    done(f"{count + 1} queries")


@pytest.mark.program("dnsmasq-base", IN, "dig of the host, over UDP and TCP, at dnsmasq in the guest", "the answers")
def test_dig_asks_the_guest(programs: House, done: Done) -> None:
    port = programs.port()
    # bound to "any address" it would turn down TCP to an address that none of its interfaces has
    with programs.guest_server("dnsmasq", dnsmasq(port, f"--listen-address={OWN} --bind-interfaces"), port):
        count = answers(programs.host, programs.there, port)
    done(f"{count} queries")
