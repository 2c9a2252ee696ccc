# SPDX-License-Identifier: BSD-3-Clause
"""Credit: whatever honest guests and hosts do, in any order and at any pace, all that was sent arrives and nothing stalls."""

from __future__ import annotations

import contextlib
import socket
from itertools import islice

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhostsock.testing.vsock import Connection

from .engine import VsockEngine

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WINDOWS = st.sampled_from([1, 7, 100, 4096, 65536])
SIZES = st.sampled_from([1, 5, 44, 1000, 4052, 4096, 20000, 65536])
STEPS = st.tuples(st.sampled_from(["guest sends", "guest reads", "host sends", "host reads"]), st.integers(0, 2), SIZES)


def pattern(start: int, size: int, salt: int) -> bytes:
    """Bytes that tell their place in the stream, so that lost, doubled and swapped ones all show."""
    return bytes((i ^ (i >> 8) ^ salt) & 0xFF for i in range(start, start + size))


class Pair:
    """A connection, the host's end, and what went either way."""

    def __init__(self, connection: Connection, host: socket.socket, salt: int) -> None:
        self.connection, self.host, self.salt = connection, host, salt
        host.setblocking(False)
        connection.driver.watch(host.fileno(), lambda: None)  # who waits is woken by what reaches the host, too
        self.guest_sent = self.host_sent = 0
        self.guest_got, self.host_got = bytearray(), bytearray()

    def do(self, what: str, size: int) -> int:
        """One step, as far as it goes without waiting; the bytes that moved."""
        if what == "guest sends":
            data = pattern(self.guest_sent, min(size, self.connection.credit), self.salt)
            done = self.connection.try_send(data) if data else 0
            self.guest_sent += done
        elif what == "guest reads":
            data = self.connection.recv(size) if self.connection.received else b""
            self.guest_got += data
            done = len(data)
        elif what == "host sends":
            done = 0
            with contextlib.suppress(BlockingIOError):
                done = self.host.send(pattern(self.host_sent, size, self.salt + 1))
            self.host_sent += done
        else:
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = self.host.recv(size)
            self.host_got += data
            done = len(data)
        return done

    @property
    def drained(self) -> bool:
        return len(self.host_got) == self.guest_sent and len(self.guest_got) == self.host_sent


def test_a_guest_that_has_no_more_under_way_than_it_would_take_itself_hears_of_room_in_time() -> None:
    engine = VsockEngine(window=4096, capped=True, config={"buf_alloc": 65536})
    try:
        connection = engine.driver.connect(52)
        for _ in range(16):
            connection.send(pattern(0, 4096, 0))
            assert engine.hosts[connection.local].recv(4096, socket.MSG_WAITALL) == pattern(0, 4096, 0)
        connection.close()
    finally:
        engine.close()


@QUICK
@given(steps=st.lists(STEPS, max_size=60), window=WINDOWS, buf_alloc=WINDOWS, host_buffer=st.sampled_from([1, 20000]),
       rx_layout=st.sampled_from([(4096,), (44, 4052), (45,)]), capped=st.booleans())  # fmt: skip
def test_random_honest_guests_lose_nothing_and_never_stall(
    steps: list[tuple[str, int, int]], window: int, buf_alloc: int, host_buffer: int, rx_layout: tuple[int, ...], *,
    capped: bool,
) -> None:  # fmt: skip
    engine = VsockEngine(
        memory=8 << 20, num=64, window=window, rx_layout=rx_layout, rx_buffers=16, capped=capped,
        config={"buf_alloc": buf_alloc, "grow_ns": 1},
    )  # fmt: skip
    engine.buffers = host_buffer
    try:
        pairs = []
        for salt in range(3):
            connection = engine.driver.connect(52)
            pairs.append(Pair(connection, engine.hosts[connection.local], 16 * salt))
        most = 100 * min(window, sum(rx_layout) - 44)  # so that no example takes more packets than it tells
        for what, index, size in steps:
            pairs[index].do(what, min(size, most) if what == "host sends" else size)
            engine.driver.step()
        settle(engine, pairs)
        for pair in pairs:
            assert pair.host_got == pattern(0, pair.guest_sent, pair.salt)
            assert pair.guest_got == pattern(0, pair.host_sent, pair.salt + 1)
        assert engine.stats.buffered == 0
        # and each can still move a byte each way: no credit was lost
        for pair in pairs:
            for what in ("guest sends", "host sends"):
                engine.driver.wait(lambda: pair.do(what, 1))  # noqa: B023
        settle(engine, pairs)
        for pair in pairs:
            pair.connection.close()
    finally:
        engine.close()


def settle(engine: VsockEngine, pairs: list[Pair]) -> None:
    """Read at both ends until everything has arrived; a stall is a TimeoutError."""
    for pair in pairs:
        while not pair.drained:
            pair.do("guest reads", 1 << 20)
            if not pair.do("host reads", 1 << 20) and not pair.drained:
                engine.driver.wait(lambda: pair.connection.received or readable(pair.host), timeout=10)  # noqa: B023


def readable(sock: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        return bool(sock.recv(1, socket.MSG_PEEK))
    return False


def test_a_stalled_host_reader_stalls_its_own_connection_alone() -> None:
    engine = VsockEngine()
    stalled, other = engine.driver.connect(52), engine.driver.connect(52)
    while stalled.credit:
        stalled.try_send(bytes(min(65536, stalled.credit)))
        engine.driver.step()
    for size in islice([1000, 65536] * 20, 40):
        other.send(bytes(size))
        left = size
        while left:
            left -= len(engine.hosts[other.local].recv(left))
    sent, host = stalled.tx_cnt, engine.hosts[stalled.local]
    got = 0
    while got < sent:
        got += len(host.recv(1 << 20))
    engine.driver.wait(lambda: stalled.credit)  # what the host took is given back
    engine.close()


def test_a_stalled_guest_reader_stalls_its_own_connection_alone() -> None:
    engine = VsockEngine(window=10000)
    stalled, other = engine.driver.connect(52), engine.driver.connect(52)
    engine.hosts[stalled.local].sendall(bytes(50000))
    engine.driver.wait(lambda: len(stalled.received) == 10000)
    for _ in range(20):
        engine.hosts[other.local].sendall(bytes(3000))
        assert len(other.recv_exactly(3000)) == 3000
    assert len(stalled.received) == 10000
    assert len(stalled.recv_exactly(50000)) == 50000
    engine.close()


def test_end_of_file_and_errors_need_no_credit() -> None:
    engine = VsockEngine(window=10)
    connection = engine.driver.connect(52)
    host = engine.hosts[connection.local]
    host.sendall(bytes(10))
    engine.driver.wait(lambda: len(connection.received) == 10)
    host.shutdown(socket.SHUT_WR)
    engine.driver.wait(lambda: connection.eof)
    engine.close()
