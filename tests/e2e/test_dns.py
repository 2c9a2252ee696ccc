# SPDX-License-Identifier: BSD-3-Clause
"""Debian's dig and glibc's resolver in a guest without a NIC ask a name server of the host."""

from __future__ import annotations

import re
import selectors
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.site import Site, site
from tests.e2e.vm import script

A, TXT, AAAA, LARGE = 1, 16, 28, 1400
LONG = "t" * 250
RECORDS = {A: bytes([192, 0, 2, 7]), AAAA: bytes.fromhex("20010db8000000000000000000000007")}


def answer(query: bytes) -> bytes:
    """RFC 1035: the question, and a record of the type that is asked for; of TXT as many as fill a large datagram."""
    end = query.index(b"\0", 12) + 5
    question, kind = query[12:end], struct.unpack("!H", query[end - 4 : end - 2])[0]
    text = bytes([len(LONG)]) + LONG.encode()
    data = [text] * (LARGE // len(text)) if kind == TXT else [RECORDS[kind]] if kind in RECORDS else []
    records = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 60, len(item)) + item for item in data)
    return query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(data), 0, 0) + question + records


def serve(sock: socket.socket, stop: socket.socket) -> None:
    """Answer until ``stop`` is closed at its other end."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(sock, selectors.EVENT_READ)
        waiting.register(stop, selectors.EVENT_READ)
        while not any(key.fileobj is stop for key, _ in waiting.select()):
            query, client = sock.recvfrom(4096)
            sock.sendto(answer(query), client)


@pytest.fixture(scope="module")
def resolving(initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose 10.0.0.53 answers every question, and whose guest has dig and knows that name server."""
    disk = script("make-guest-image", "bind9-dnsutils")
    with site(tmp_path_factory.mktemp("site"), initramfs, disk=disk) as it:
        ours, theirs = socket.socketpair()
        server = threading.Thread(target=serve, args=(it.dns, theirs))
        server.start()
        try:
            it.vm.run_in_image("echo nameserver 10.0.0.53 >/etc/resolv.conf; echo hosts: files dns >/etc/nsswitch.conf")
            yield it
        finally:
            ours.close()
            server.join()
            theirs.close()


def test_dig_asks_a_name_server_of_the_host(resolving: Site) -> None:
    result = resolving.vm.run_in_image("dig @10.0.0.53 some.name A").text
    assert re.search(r"^some\.name\.\s+60\s+IN\s+A\s+192\.0\.2\.7$", result, re.MULTILINE), result
    assert "SERVER: 10.0.0.53#53" in result


def test_dig_finds_the_name_server_in_resolv_conf(resolving: Site) -> None:
    assert resolving.vm.run_in_image("dig +short some.name AAAA").text == "2001:db8::7"


def test_dig_reads_an_answer_longer_than_512_bytes(resolving: Site) -> None:
    lines = resolving.vm.run_in_image("dig +short +notcp some.name TXT").text.splitlines()
    assert lines == [f'"{LONG}"'] * 5


def test_dig_says_so_when_nobody_listens(resolving: Site) -> None:
    """The host's ICMP error ends it at once; without it dig would wait and say "timed out"."""
    result = resolving.vm.run_in_image("dig +tries=1 +time=50 -p 7001 @10.0.0.5 some.name", check=False, timeout=120)
    assert result.status != 0
    assert "connection refused" in result.text, result


def test_getaddrinfo_of_glibc_resolves_both_families(resolving: Site) -> None:
    """It asks for A and AAAA on one connected socket, with sendmmsg."""
    addresses = {line.split()[0] for line in resolving.vm.run_in_image("getent ahosts some.name").text.splitlines()}
    assert addresses == {"192.0.2.7", "2001:db8::7"}
