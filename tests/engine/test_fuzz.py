"""Random drivers. Whatever they send: no crash, bounded memory, every outcome typed; and what honest flows send arrives."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhostsock._core import lib
from vhostsock.testing.offload import Flow, Message, OffloadDriver, pack_open

from .engine import EngineUnderTest

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TYPES = [1, 2, 3, 4, 5, 6, 16, 17, 18, 19, 20, 21, 22]

u32 = st.one_of(st.sampled_from([0, 1, 2, 4, 100, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))
uris = st.sampled_from(["tcp://10.0.0.1:1", "tcp6://::1/2", "udp://10.0.0.1:53", "", "x", "tcp://\n"])
payloads = st.one_of(
    st.binary(max_size=64), uris.map(pack_open), st.builds(pack_open, uris, options=st.binary(max_size=40)),
    st.integers(0, 5000).map(bytes),
)  # fmt: skip
messages = st.tuples(
    st.sampled_from(TYPES), st.sampled_from([0, 1, 2, 3, 0x80000001]), u32, u32, u32, payloads, st.one_of(st.none(), u32)
)


class LooseDriver(OffloadDriver):
    """Takes any answer: the other side is what is tested."""

    def _on_message(self, pair: int, data: bytes) -> None:
        kind = int.from_bytes(data[:2], "little")
        assert kind in range(lib.VSO_DATA, lib.VSO_PONG + 1) or kind in range(lib.VSO_HELLO_REPLY, lib.VSO_SOCKOPT_REPLY + 1)
        self.stray.append(Message(pair, kind, 0, 0, 0, 0, int.from_bytes(data[24:28], "little"), data[32:]))


@QUICK
@given(st.lists(messages, max_size=60), st.integers(0, 2))
def test_no_sequence_of_messages_does_harm(sequence: list[tuple[Any, ...]], answer: int) -> None:
    engine = EngineUnderTest(driver_class=LooseDriver, config={"max_flows": 3, "buf_alloc": 4096, "buf_total": 8192})
    peers = []

    def connect(event: Any) -> None:
        kind = socket.SOCK_DGRAM if event.uri.startswith("udp") else socket.SOCK_STREAM
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        peers.append(theirs)
        if answer == 0:
            engine.refuse(event, lib.VSO_DENY, 13)
            ours.close()
        elif answer == 1:
            engine.connected(event, ours, "tcp://10.0.0.2:1", event.uri)
        else:
            ours.close()  # never answered

    engine.on_connect = connect
    engine.on_bind = lambda event: engine.refuse(event, lib.VSO_NATIVE, 0)
    try:
        engine.driver.hello(epoch=1)
        for kind, flow, arg, buf_alloc, fwd_cnt, payload, length in sequence:
            engine.driver.post(kind, flow, arg=arg, buf_alloc=buf_alloc, fwd_cnt=fwd_cnt, payload=payload, length=length)
            engine.take_events()
        # a ring that broke says why; a new one in its place serves again
        def broken() -> list[bytes]:
            return [event.payload for event in engine.events if event.name == "BROKEN"]

        engine.driver.wait(lambda: broken() or not engine.driver.queues[1].in_flight)
        if broken():
            assert all(broken())
            engine.renew(1)
        engine.driver.hello(epoch=2)
        assert engine.stats.flows == 0
        assert engine.stats.buffered == 0
    finally:
        for sock in peers:
            sock.close()
        engine.close()


steps = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["up", "down", "host", "guest", "step"]), st.integers(1, 9000)), max_size=120
)


@QUICK
@given(steps, st.integers(1, 20000), st.integers(1, 20000), st.sampled_from([2048, 4096, 65536]))
def test_no_byte_and_no_credit_is_ever_lost(
    plan: list[tuple[int, str, int]], device_window: int, guest_window: int, rx_size: int
) -> None:
    """Three flows, both directions, any order of sending and reading: at the end each side has read all that the other sent."""
    engine = EngineUnderTest(config={"buf_alloc": device_window}, window=guest_window, rx_size=rx_size, rx_buffers=3)
    ends: list[tuple[Flow, socket.socket]] = []
    try:
        engine.driver.hello()
        for i in range(3):
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            engine.on_connect = lambda event, ours=ours: engine.connected(event, ours, "", event.uri)  # type: ignore[misc]
            ends.append((engine.driver.connect(f"tcp://10.0.0.1:{i + 1}"), theirs))
        up, down = [bytearray() for _ in ends], [bytearray() for _ in ends]
        at_host, at_guest = [bytearray() for _ in ends], [bytearray() for _ in ends]
        for i, what, size in plan:
            flow, host = ends[i]
            data = bytes((size + k) % 251 for k in range(size))
            if what == "up":
                up[i] += data[: flow.try_send(data)]
            elif what == "down":
                with contextlib.suppress(BlockingIOError):
                    down[i] += data[: host.send(data)]
            elif what == "host":
                with contextlib.suppress(BlockingIOError):
                    at_host[i] += host.recv(size)
            elif what == "guest" and flow.received:
                at_guest[i] += flow.recv(size)
            else:
                engine.driver.step()
        for i, (flow, host) in enumerate(ends):
            host.setblocking(True)
            host.settimeout(30)
            flow.shutdown()
            host.shutdown(socket.SHUT_WR)
            at_guest[i] += flow.recv_all()
            at_host[i] += b"".join(iter(lambda host=host: host.recv(65536), b""))  # type: ignore[misc]
            flow.close()
            host.close()
        assert at_host == up
        assert at_guest == down
        assert engine.stats.flows == 0
    finally:
        for _, host in ends:
            host.close()
        engine.close()
