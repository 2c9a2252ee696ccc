# SPDX-License-Identifier: BSD-3-Clause
"""Unmodified programs of a guest without a NIC reach servers of the host, and the other way round (QEMU 7.2, carrier fs)."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.e2e.site import DATA_SIZE, DENIED, Site, site
from tests.e2e.vm import wait_until

DOWNLOAD = "wget -q -O - http://10.0.0.5/data | sha256sum"


@pytest.fixture(scope="module")
def offload(initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site"), initramfs) as it:
        yield it


def digest(offload: Site) -> str:
    return hashlib.sha256((offload.www / "data").read_bytes()).hexdigest()


def refusal(offload: Site, address: str, port: int = 80) -> str:
    """What busybox nc says when it cannot connect, which ends in strerror(errno)."""
    result = offload.vm.run(f"nc {address} {port} </dev/null", check=False)
    assert result.status != 0, str(result)
    return result.errors.decode().strip().rpartition(": ")[2]


def test_the_guest_has_no_nic(offload: Site) -> None:
    assert offload.vm.run("ls /sys/class/net").text == "lo"


def test_wget_downloads_16_mib_unharmed(offload: Site) -> None:
    assert offload.vm.run(DOWNLOAD).text.split()[0] == digest(offload)


def test_bytes_do_not_pass_through_python(offload: Site) -> None:
    """Setting a connection up and taking it down costs a few events; 16 MiB of data in thousands of messages cost none."""
    before = offload.backend.stats("vm1")
    offload.vm.run(DOWNLOAD)
    after = offload.backend.stats("vm1")
    assert after["events"] - before["events"] <= 16


def test_upload_of_4_mib_arrives_unharmed(offload: Site) -> None:
    offload.vm.run("head -c 4194304 /dev/urandom >/tmp/up")
    crc = offload.vm.run("crc32 /tmp/up").text.split()[0]
    answer = offload.vm.run("{ echo sink; cat /tmp/up; } | nc 10.0.0.5 7000").text
    assert answer == f"4194304 {crc}"


def test_eight_downloads_at_once_arrive_unharmed(offload: Site) -> None:
    running = [offload.vm.start(DOWNLOAD) for _ in range(8)]
    assert {command.wait().text.split()[0] for command in running} == {digest(offload)}


@pytest.mark.parametrize(("host", "denied"), [("10.0.0.5", "10.66.0.0 80 13"), ("fd00::5", "")], ids=["IPv4", "IPv6"])
def test_stream_claims_hold(offload: Site, host: str, denied: str) -> None:
    offload.check_streams(host, denied)


def test_datagram_claims_hold(offload: Site) -> None:
    offload.check_datagrams()


def test_programs_of_a_cgroup_are_asked_about_connect_and_nothing_else(offload: Site) -> None:
    offload.check("cgroup_check 10.0.0.5 7000")


def test_the_kernels_own_sockets_are_left_alone_and_its_firewall_is_not_asked(offload: Site) -> None:
    offload.check("kernel_check 10.0.0.5 7000")


def test_listener_claims_hold(offload: Site) -> None:
    offload.check_listener()


def test_datagram_server_claims_hold(offload: Site) -> None:
    offload.check_datagram_server()


def test_group_claims_hold(offload: Site) -> None:
    offload.check_groups()


def test_guest_httpd_is_reached_through_a_published_port(offload: Site) -> None:
    offload.vm.run("mkdir -p /tmp/www && echo hello from the guest >/tmp/www/hello && httpd -p 8080 -h /tmp/www")
    assert offload.fetch(8080, "/hello") == b"hello from the guest\n"
    # and from the guest itself, as natively
    assert offload.vm.run("wget -q -O - http://127.0.0.1:8080/hello").text == "hello from the guest"


def test_host_downloads_from_the_guest_unharmed(offload: Site) -> None:
    offload.vm.run("mkdir -p /tmp/www && head -c 4194304 /dev/urandom >/tmp/www/big")
    offload.vm.run("pidof httpd || httpd -p 8080 -h /tmp/www")
    assert hashlib.sha256(offload.fetch(8080, "/big")).hexdigest() == offload.vm.run("sha256sum </tmp/www/big").text.split()[0]


def test_a_listener_that_is_not_published_is_not_reachable(offload: Site) -> None:
    offload.vm.run("echo inside >/tmp/inside && httpd -p 8099 -h /tmp")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 8099), timeout=10)
    assert offload.vm.run("wget -q -O - http://127.0.0.1:8099/inside").text == "inside"


@pytest.mark.parametrize("number", range(len(DENIED)), ids=DENIED)
def test_denied_address_gives_the_errno_of_the_policy(offload: Site, number: int) -> None:
    assert refusal(offload, f"10.66.0.{number}") == os.strerror(getattr(errno, DENIED[number]))


def test_host_refusal_gives_the_hosts_errno(offload: Site) -> None:
    assert refusal(offload, "10.0.0.5", 7001) == os.strerror(errno.ECONNREFUSED)


def test_unnamed_address_stays_native(offload: Site) -> None:
    assert refusal(offload, "192.0.2.1") == os.strerror(errno.ENETUNREACH)


def test_guest_loopback_stays_native(offload: Site) -> None:
    before = offload.backend.stats("vm1")["opened"]
    offload.vm.run("mkdir -p /tmp/local && echo local >/tmp/local/x && httpd -p 127.0.0.1:81 -h /tmp/local")
    assert offload.vm.run("wget -q -O - http://127.0.0.1:81/x").text == "local"
    assert offload.backend.stats("vm1")["opened"] == before


def _dns_answer(query: bytes) -> bytes:
    """RFC 1035: the question repeated, and for an A question one A record, 192.0.2.7."""
    end = query.index(b"\0", 12) + 5
    question, kind = query[12:end], struct.unpack("!H", query[end - 4 : end - 2])[0]
    answer = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + bytes([192, 0, 2, 7]) if kind == 1 else b""
    return query[:2] + struct.pack("!HHHHH", 0x8180, 1, 1 if answer else 0, 0, 0) + question + answer


def test_nslookup_asks_a_name_server_of_the_host(offload: Site) -> None:
    asking = offload.vm.start("nslookup -type=a some.name 10.0.0.53")
    query, client = offload.dns.recvfrom(512)
    assert b"\x04some\x04name" in query
    offload.dns.sendto(_dns_answer(query), client)
    assert "192.0.2.7" in asking.wait().text


def test_proc_lists_an_offloaded_socket_while_it_lives(offload: Site) -> None:
    holding = offload.vm.start("{ echo hi; cat /dev/ttyS1; } | nc 10.0.0.5 7002")
    with offload.accept() as sock:
        assert sock.recv(3) == b"hi\n"
        lines = [line for line in offload.hwsock() if "tcp://10.0.0.5:7002" in line]
        assert [line[:2] for line in lines] == [["tcp", "CONNECTED"]]
    holding.wait(check=False)
    wait_until(lambda: not any("tcp://10.0.0.5:7002" in line for line in offload.hwsock()), "the closed socket leaves the list")


def test_a_live_flow_survives_pause_and_resume(offload: Site) -> None:
    downloading = offload.vm.start(DOWNLOAD)
    holding = offload.vm.start("{ echo before; cat; } | nc 10.0.0.5 7002; true")
    with offload.accept() as sock:
        assert sock.recv(7) == b"before\n"
        for _ in range(3):
            offload.vm.pause()
            offload.vm.resume()
        sock.sendall(b"after\n")
        sock.shutdown(socket.SHUT_WR)
        assert holding.wait().text == "after"
    assert downloading.wait().text.split()[0] == digest(offload)


def test_the_data_is_as_large_as_the_tests_say(offload: Site) -> None:
    assert int(offload.vm.run("wget -q -O - http://10.0.0.5/data | wc -c").text) == DATA_SIZE
