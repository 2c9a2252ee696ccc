# SPDX-License-Identifier: BSD-3-Clause
"""HTTP clients of the guest, at nginx of the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.programs.conftest import Done
from tests.e2e.programs.house import House, sha256
from tests.e2e.programs.web import Web, web_of_the_host

OUT = "guest to host"
MIB = 1 << 20


@pytest.fixture(scope="module")
def web(programs: House) -> Iterator[Web]:
    with web_of_the_host(programs) as it:
        yield it


@pytest.fixture(scope="module")
def big(programs: House, web: Web) -> Path:
    return programs.random_file("web/www/big", programs.pick(8, 256) * MIB)


@pytest.mark.program("curl", OUT, "HTTP/1.1 downloads, four at once and four on one connection", "SHA-256 of each")
def test_curl_downloads(programs: House, web: Web, big: Path, done: Done) -> None:
    at_once = [programs.guest_start(f"curl -sS {web.url}/big | sha256sum") for _ in range(4)]
    assert {command.wait().text.split()[0] for command in at_once} == {sha256(big)}
    names = " ".join(f"-o one{n} {web.url}/big" for n in range(4))
    assert programs.guest(f"curl -sS -w '%{{num_connects}} ' {names}").split() == ["1", "0", "0", "0"]
    assert {line.split()[0] for line in programs.guest("sha256sum one?; rm one?").splitlines()} == {sha256(big)}
    done(f"8 times {big.stat().st_size} bytes")


@pytest.mark.program("curl", OUT, "HTTP/2 over TLS, 20 streams on one connection", "certificate, protocol, SHA-256 of each")
def test_curl_speaks_http_2(programs: House, web: Web, done: Done) -> None:
    parts = [programs.random_file(f"web/www/part{n}", programs.pick(64, 4096) << 10) for n in range(20)]
    shows = "%{http_version} %{num_connects}\\n"
    command = f"curl -sS --cacert cert.pem --http2 -Z -w '{shows}' '{web.secure}/part[0-19]' -o 'got#1'"
    told = programs.guest(command).splitlines()
    assert [line.split()[0] for line in told] == ["2"] * 20, told
    assert sum(int(line.split()[1]) for line in told) < 20, "streams share connections"
    got = dict(line.split()[::-1] for line in programs.guest("sha256sum got*; rm got*").splitlines())
    assert got == {f"got{n}": sha256(part) for n, part in enumerate(parts)}
    done(f"20 streams, {sum(part.stat().st_size for part in parts)} bytes")


@pytest.mark.program("curl", OUT, "uploads: PUT with a length, and chunked from a pipe", "SHA-256 of what the host has")
def test_curl_uploads(programs: House, web: Web, done: Done) -> None:
    size = programs.pick(4, 128) * MIB
    programs.guest(f"head -c {size} /dev/urandom >sent")
    digest = programs.guest_sha256("sent")
    programs.guest(f"curl -sSf -T sent {web.url}/up/whole && cat sent | curl -sSf -T - {web.url}/up/chunked; rm sent")
    assert {sha256(web.home / "www" / "up" / name) for name in ("whole", "chunked")} == {digest}
    done(f"2 times {size} bytes")


@pytest.mark.program("curl", OUT, "--limit-rate: a reader slower than its sender; a download cut in two by --range", "SHA-256")
def test_curl_reads_slowly(programs: House, web: Web, big: Path, done: Done) -> None:
    assert programs.guest(f"curl -sS --limit-rate {big.stat().st_size // 3} {web.url}/big | sha256sum").split()[0] == sha256(
        big
    )
    halves = f"(curl -sS -r 0-{MIB - 1} {web.url}/big; curl -sS -r {MIB}- {web.url}/big) | sha256sum"
    assert programs.guest(halves).split()[0] == sha256(big)
    done(f"2 times {big.stat().st_size} bytes")


@pytest.mark.program("wget", OUT, "a download by name, then the rest of one that was cut off (-c)", "SHA-256")
def test_wget_continues(programs: House, web: Web, big: Path, done: Done) -> None:
    programs.guest(f"wget -q -O whole {web.url}/big && head -c 1000000 whole >big && wget -q -c {web.url}/big && cmp whole big")
    assert programs.guest("sha256sum whole && rm whole big").split()[0] == sha256(big)
    done(f"{2 * big.stat().st_size - 1000000} bytes")


PYTHON = """
import hashlib, sys, urllib.request, requests
from concurrent.futures import ThreadPoolExecutor
plain, secure, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
print(hashlib.sha256(urllib.request.urlopen(plain + "/big", timeout=600).read()).hexdigest())
session = requests.Session()
session.verify = "cert.pem"
def get(n):
    answer = session.get(secure + "/big", timeout=600, headers={"Range": f"bytes={n * 1000}-{n * 1000 + 999}"})
    answer.raise_for_status()
    return answer.content
with ThreadPoolExecutor(4) as pool:
    print(hashlib.sha256(b"".join(pool.map(get, range(count)))).hexdigest())
with session.get(plain + "/big", stream=True, timeout=600) as answer:
    print(len(answer.raw.read(100000)))
print(session.put(plain + "/up/python", data=(b"%d," % n for n in range(count)), timeout=600).status_code)
try:
    session.get(plain + "/none", timeout=600).raise_for_status()
except requests.HTTPError as error:
    print(error.response.status_code)
"""


@pytest.mark.program(
    "python3-requests",
    OUT,
    "urllib; requests with TLS, four threads on pooled connections, a generator uploaded, a download dropped half way",
    "SHA-256, status codes",
)
def test_python_requests(programs: House, web: Web, big: Path, done: Done) -> None:
    from hashlib import sha256 as sum_of

    count = programs.pick(40, 4000)
    script = programs.folder / "requests_check.py"
    script.write_text(PYTHON)
    programs.give(script)
    told = programs.guest(f"python3 requests_check.py {web.url} {web.secure} {count}").splitlines()
    assert told == [sha256(big), sum_of(big.read_bytes()[: count * 1000]).hexdigest(), "100000", "201", "404"]
    assert (web.home / "www" / "up" / "python").read_bytes() == b"".join(b"%d," % n for n in range(count))
    done(f"{count + 4} requests")


@pytest.mark.program("nghttp2-client", OUT, "h2load over TLS: 4 connections of 10 streams", "every request succeeded, bytes")
def test_h2load(programs: House, web: Web, done: Done) -> None:
    programs.random_file("web/www/page", 10000)
    count = programs.pick(400, 40000)
    told = programs.guest(f"h2load -n {count} -c 4 -m 10 {web.secure}/page", timeout=900)
    assert f"{count} succeeded, 0 failed, 0 errored, 0 timeout" in told, told
    assert f"({count * 10000}) data" in told, told
    done(f"{count} requests")


@pytest.mark.program("hey", OUT, "a client in Go: 10 workers", "every answer 200, bytes")
def test_hey(programs: House, web: Web, done: Done) -> None:
    programs.random_file("web/www/page", 10000)
    count = programs.pick(200, 20000)
    told = programs.guest(f"hey -t 0 -n {count} -c 10 {web.url}/page", timeout=900)
    assert f"[200]\t{count} responses" in told, told
    assert "Error distribution" not in told, told
    done(f"{count} requests")
