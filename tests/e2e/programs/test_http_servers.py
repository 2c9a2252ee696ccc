# SPDX-License-Identifier: BSD-3-Clause
"""HTTP servers of the guest, published, under load from clients of the host; and node and Go servers of the host."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest

from tests.e2e.programs.conftest import Done
from tests.e2e.programs.house import HOST, House, sha256
from tests.e2e.programs.web import config
from tests.e2e.vm import wait_until

IN, OUT = "host to guest", "guest to host"
MIB = 1 << 20


@pytest.fixture(scope="module")
def pages(programs: House) -> str:
    """A folder of the guest with ``page`` (10000 bytes) and ``big``."""
    folder = programs.folder / "guest-web"
    (folder / "www" / "up").mkdir(parents=True)
    programs.random_file("guest-web/www/page", 10000)
    programs.random_file("guest-web/www/big", 4 * MIB)
    programs.give(folder)
    return "/var/tmp/guest-web"


def hey_succeeds(text: str, count: int) -> None:
    assert f"[200]\t{count} responses" in text, text
    assert "Error distribution" not in text, text


@pytest.mark.program(
    "nginx",
    IN,
    "reloaded three times while curl of the host downloads and hey asks, and uploads",
    "SHA-256 of each download and upload, every answer 200",
)
def test_nginx_is_reloaded_under_load(programs: House, pages: str, done: Done) -> None:
    port = programs.port()
    programs.guest(f"cat >{pages}/nginx.conf", input=config(pages, f"0.0.0.0:{port}").encode())
    digest, page, count = (
        programs.guest_sha256(f"{pages}/www/big"),
        f"http://{programs.there}:{port}/page",
        programs.pick(300, 30000),
    )
    rounds = programs.pick(3, 100)

    def has_seen(n: int) -> bool:
        return programs.guest(f"grep -c 'SIGHUP. received from' {pages}/error.log || true") == str(n)

    with contextlib.ExitStack() as stack:
        server = programs.guest_server("nginx", f"nginx -p {pages} -e {pages}/error.log -c {pages}/nginx.conf", port)
        stack.enter_context(server)
        load = stack.enter_context(programs.host_start("hey", f"hey -disable-keepalive -t 0 -n {count} -c 6 {page}"))
        got = []
        for n in range(rounds):
            server.signal("HUP")
            # signals of one kind that come together are one
            wait_until(partial(has_seen, n + 1), f"nginx has seen reload {n + 1}")
            got.append(programs.host(f"curl -sSf http://{programs.there}:{port}/big | sha256sum").split()[0])
        assert got == [digest] * rounds
        load.process.wait(900)
        hey_succeeds(load.log.read_text(), count)
        sent = programs.random_file("sent", 2 * MIB)
        programs.host(f"curl -sSf -T {sent} http://{programs.there}:{port}/up/sent")
        assert programs.guest_sha256(f"{pages}/www/up/sent") == sha256(sent)
    done(f"{count + rounds + 1} requests, {rounds} reloads")


NODE = """
const http = require("http"), crypto = require("crypto");
http.createServer((request, response) => {
  const hash = crypto.createHash("sha256");
  let size = 0;
  request.on("data", (chunk) => { hash.update(chunk); size += chunk.length; });
  request.on("end", () => response.end(JSON.stringify({ url: request.url, size, digest: hash.digest("hex") })));
}).listen(Number(process.argv[2]), process.argv[3]);
"""
FETCH = """
const crypto = require("crypto"), url = process.argv[2], count = Number(process.argv[3]);
(async () => {
  const body = crypto.randomBytes(300000), digest = crypto.createHash("sha256").update(body).digest("hex");
  const posts = Array.from({ length: count }, (_, n) => fetch(`${url}/${n}`, { method: "POST", body }).then((r) => r.json()));
  const answers = await Promise.all(posts);
  console.log(answers.filter((a, n) => a.url === `/${n}` && a.size === body.length && a.digest === digest).length);
})();
"""


@pytest.fixture(scope="module")
def node(programs: House) -> None:
    for name, text in (("server.js", NODE), ("fetch.js", FETCH)):
        (programs.folder / name).write_text(text)
        programs.give(programs.folder / name)


@pytest.mark.usefixtures("node")
@pytest.mark.program(
    "nodejs", IN, "node's HTTP server; fetch() of node on the host posts, 20 at once", "each body's SHA-256 and length"
)
def test_node_serves(programs: House, done: Done) -> None:
    port, count = programs.port(), programs.pick(20, 500)
    with programs.guest_server("node", f"node server.js {port} 0.0.0.0", port):
        assert programs.host(f"node fetch.js http://{programs.there}:{port} {count}") == str(count)
    done(f"{count} times 300000 bytes")


@pytest.mark.usefixtures("node")
@pytest.mark.program("nodejs", OUT, "fetch() posts, 20 at once, to node's HTTP server", "each body's SHA-256 and length")
def test_node_fetches(programs: House, done: Done) -> None:
    port, count = programs.port(), programs.pick(20, 500)
    with programs.host_server("node", f"node server.js {port} {programs.here}", port):
        assert programs.guest(f"node fetch.js http://{HOST}:{port} {count}") == str(count)
    done(f"{count} times 300000 bytes")


@pytest.mark.program(
    "caddy",
    IN,
    "a server in Go, on an MPTCP socket (Go's default from 1.24 on) on :: ; hey and curl of the host",
    "every answer 200, SHA-256, the socket is offloaded",
)
def test_caddy_serves_over_mptcp(programs: House, pages: str, done: Done) -> None:
    port, count = programs.port(), programs.pick(100, 10000)
    command = f"env HOME=/tmp GODEBUG=multipathtcp=1 caddy file-server --listen :{port} --root {pages}/www"
    with programs.guest_server("caddy", command, port):
        programs.vm.run(f"grep -Eq '^mptcp +LISTEN .*[:/]{port} ' /proc/net/hwsock")
        hey_succeeds(programs.host(f"hey -t 0 -n {count} -c 10 http://{programs.there}:{port}/page", timeout=900), count)
        digest = programs.host(f"curl -sSf http://{programs.there}:{port}/big | sha256sum").split()[0]
        assert digest == programs.guest_sha256(f"{pages}/www/big")
    done(f"{count + 1} requests")
