# SPDX-License-Identifier: BSD-3-Clause
"""redis and PostgreSQL: many small requests, pipelines, messages pushed, connections that live long."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.programs.conftest import Done
from tests.e2e.programs.house import HOST, House
from tests.e2e.vm import wait_until

IN, OUT = "host to guest", "guest to host"
Run = Callable[..., str]
BIN = "/usr/lib/postgresql/17/bin"
AS = "setpriv --reuid=postgres --regid=postgres --clear-groups"
LIGHT = "-c fsync=off -c shared_buffers=32MB -c unix_socket_directories= -c max_connections=40 -c autovacuum=off"

# ---- redis


def redis_works(run: Run, cli: str, address: str, port: int, count: int) -> None:
    """A pipeline of ``count`` SETs as redis-cli --pipe sends it, and its sum back; then redis-benchmark with pipelining."""
    commands = "".join(f"SET key{n} {n * n}\r\n" for n in range(count))
    told = run(f"{cli} --pipe --pipe-timeout 0", input=commands.encode())
    assert f"errors: 0, replies: {count}" in told, told
    assert run(f"{cli} DBSIZE") == str(count)
    script = f"local s = 0 for n = 0, {count - 1} do s = s + redis.call('GET', 'key' .. n) end return s"
    assert run(f'{cli} EVAL "{script}" 0') == str(sum(n * n for n in range(count)))
    told = run(f"redis-benchmark -h {address} -p {port} -n {count} -c 20 -P 16 -t set,get,lpush -d 300 --csv", timeout=900)
    assert [line.split(",")[0] for line in told.splitlines() if line.startswith('"')][1:] == ['"SET"', '"GET"', '"LPUSH"'], told
    assert run(f"{cli} LLEN mylist") == str(count)
    assert "rejected_calls=0,failed_calls=0" in run(f"{cli} INFO commandstats | grep cmdstat_lpush")


def redis_publishes(publish: Run, cli: str, received: Callable[[], str], count: int) -> None:
    """Every message that one side publishes reaches the subscriber on the other, in order."""
    wait_until(lambda: publish(f"{cli} PUBSUB NUMSUB news").split() == ["news", "1"], "the subscriber is there")
    messages = "".join(f"PUBLISH news message{n}\r\n" for n in range(count))
    publish(f"{cli} --pipe --pipe-timeout 0", input=messages.encode())
    wait_until(lambda: f"message{count - 1}\n" in received(), "the last message has come")
    assert re.findall(r"message(\d+)\n", received()) == [str(n) for n in range(count)]


@pytest.mark.program(
    "redis-server",
    OUT,
    "a pipeline of SETs, Lua over them, redis-benchmark (20 connections, pipelines of 16); SUBSCRIBE",
    "replies, sums, lengths, every message in order",
)
def test_redis_of_the_host(programs: House, done: Done) -> None:
    port, count = programs.port(), programs.pick(2000, 200000)
    here, cli = f"redis-cli -h {programs.here} -p {port}", f"redis-cli -h {HOST} -p {port}"
    with programs.host_server(
        "redis", f"redis-server --port {port} --bind {programs.here} --save '' --dir {programs.folder}", port
    ):
        redis_works(programs.guest, cli, HOST, port, count)
        subscribing = programs.guest_start(f"exec {cli} SUBSCRIBE news >/tmp/news", timeout=900)
        redis_publishes(programs.host, here, lambda: programs.guest("cat /tmp/news") + "\n", 500)
        programs.host(f"{here} CLIENT KILL TYPE pubsub")
        programs.vm.run("killall redis-cli", check=False)
        subscribing.wait(check=False)
    done(f"{4 * count} requests, 500 messages")


@pytest.mark.program("redis-server", IN, "the same, with the server in the guest", "the same")
def test_redis_of_the_guest(programs: House, done: Done) -> None:
    port, count = programs.port(), programs.pick(2000, 200000)
    cli, inside = f"redis-cli -h {programs.there} -p {port}", f"redis-cli -p {port}"
    with programs.guest_server("redis", f"redis-server --port {port} --protected-mode no --bind 0.0.0.0 --save ''", port):
        redis_works(programs.host, cli, programs.there, port, count)
        with programs.host_start("news", f"{cli} SUBSCRIBE news") as news:
            # published over the guest's own loopback: the same listener serves both sides
            redis_publishes(programs.guest, inside, lambda: news.log.read_text(), 500)
    done(f"{4 * count} requests, 500 messages")


# ---- PostgreSQL


@contextlib.contextmanager
def cluster(programs: House, name: str) -> Iterator[str]:
    """A new, empty cluster in a folder of the host, whoever may connect."""
    home = programs.folder / name
    home.mkdir()
    home.chmod(0o700)
    for folder in (programs.folder, programs.folder.parent):
        folder.chmod(0o755)
    programs.host(f"chown postgres {home} && {AS} {BIN}/initdb -D {home} -U postgres -A trust --no-sync -E UTF8 --locale=C")
    with (home / "pg_hba.conf").open("a") as text:
        text.write("host all all 0.0.0.0/0 trust\n")
    yield str(home)


def pgbench_balances(run: Run, address: str, port: int, clients: int, each: int) -> None:
    """pgbench's transactions move money: afterwards four sums over different tables are the same, and none is lost."""
    to = f"-h {address} -p {port} -U postgres"
    wait_until(
        lambda: "accepting connections" in run(f"{BIN}/pg_isready -h {address} -p {port} || true"), "the server has started up"
    )
    run(f"{BIN}/pgbench -i -q -s 1 {to} postgres", timeout=900)
    told = run(f"{BIN}/pgbench -n -c {clients} -j 2 -t {each} {to} postgres", timeout=3000)
    assert f"number of transactions actually processed: {clients * each}/{clients * each}" in told, told
    assert "number of failed transactions: 0 " in told, told
    tables = ", ".join(f"(SELECT sum({table[0]}balance) FROM pgbench_{table})" for table in ("branches", "tellers", "accounts"))
    sums = f"SELECT count(*), sum(delta), {tables} FROM pgbench_history"
    count, *balances = run(f'{BIN}/psql {to} -At -F " " -c "{sums}" postgres').split()
    assert count == str(clients * each)
    assert len(set(balances)) == 1, balances
    rows = run(f'{BIN}/psql {to} -At -c "COPY pgbench_accounts TO STDOUT" postgres | wc -l')
    assert rows == "100000"


@pytest.mark.program(
    "postgresql-17",
    OUT,
    "pgbench -i (100000 rows), pgbench with 4 clients, COPY TO",
    "every transaction, the balances of four tables, the rows",
)
def test_postgres_of_the_host(programs: House, done: Done) -> None:
    port, each = programs.port(), programs.pick(25, 10000)
    with cluster(programs, "pg") as home:
        server = f"{AS} {BIN}/postgres -D {home} -c listen_addresses={programs.here} -c port={port} {LIGHT}"
        with programs.host_server("postgres", server, port):
            pgbench_balances(programs.guest, HOST, port, 4, each)
    done(f"{4 * each} transactions")


@pytest.mark.program("postgresql-17", IN, "the same, with the server in the guest", "the same")
def test_postgres_of_the_guest(programs: House, done: Done) -> None:
    port, each = programs.port(), programs.pick(25, 2500)
    with cluster(programs, "guest-pg") as home:
        programs.host(f"tar -cf {programs.folder}/pg.tar -C {home} .")
        programs.guest("mkdir pg && tar -x -C pg && chown -R postgres pg", input=(programs.folder / "pg.tar").read_bytes())
    server = f"{AS} {BIN}/postgres -D /var/tmp/pg -c listen_addresses=* -c port={port} {LIGHT}"
    with programs.guest_server("postgres", server, port, ends_on="INT"):
        pgbench_balances(programs.host, programs.there, port, 4, each)
    done(f"{4 * each} transactions")
