# SPDX-License-Identifier: BSD-3-Clause
"""Random drivers. Whatever they send: no crash, bounded memory, RST or a broken ring; and an honest connection is unharmed."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhostsock._core import ffi, lib
from vhostsock.testing.vsock import HDR_SIZE, Connection, VsockDriver

from .engine import CID, VsockEngine

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
HONEST = 5000  # the port of the connection that behaves
BUF = 4096

u32 = st.one_of(st.sampled_from([0, 1, 2, 4, 100, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))
packets = st.fixed_dictionaries({
    "op": st.one_of(st.integers(0, 8), st.just(lib.VSK_OP_REQUEST), st.just(lib.VSK_OP_RW)),
    "type": st.sampled_from([1, 1, 1, 2, 2, 0, 3]),
    "src_port": st.integers(1, 3), "dst_port": st.sampled_from([52, 1 << 30]),
    "src_cid": st.sampled_from([CID, CID, CID, CID, 2]), "dst_cid": st.sampled_from([2, 2, 2, 2, CID]),
    "flags": st.sampled_from([0, 1, 2, 3, 0xFFFFFFFF]), "buf_alloc": u32, "fwd_cnt": u32,
    "payload": st.integers(0, 5000).map(bytes), "length": st.sampled_from([None] * 20 + [0, 1, 0xFFFFFFFF]),
})  # fmt: skip


class LooseDriver(VsockDriver):
    """Takes any packet for the connections that misbehave, and looks at the honest one's as strictly as ever."""

    def _on_message(self, pair: int, data: bytes) -> None:
        h = ffi.from_buffer("struct vsk_hdr *", data[:HDR_SIZE])
        assert h.len == len(data) - HDR_SIZE
        assert h.op in range(lib.VSK_OP_REQUEST, lib.VSK_OP_CREDIT_UPDATE + 1)
        assert h.dst_cid == CID
        if h.dst_port == HONEST:
            super()._on_message(pair, data)


@QUICK
@given(st.lists(packets, max_size=60), st.sampled_from(["connect", "refuse", "never"]))
def test_no_sequence_of_packets_does_harm(sequence: list[dict[str, Any]], answer: str) -> None:
    engine = VsockEngine(driver_class=LooseDriver, config={"max_flows": 4, "buf_alloc": BUF, "buf_total": 8 * BUF})
    driver, peers = engine.driver, []
    honest = Connection(driver, HONEST, 52, lib.VSK_TYPE_STREAM)
    driver.connections[HONEST, 52] = honest

    def connect(event: Any) -> None:
        if event.flow >> 32 == HONEST or answer == "connect":
            old = engine.hosts.get(event.flow >> 32)
            if old:
                peers.append(old)
            engine.connect_pair(event)
        elif answer == "refuse":
            engine.refuse(event, lib.VSO_DENY, 111)

    def broken() -> bool:
        return bool(lib.vs_vq_broken(engine.vrings[1].ptr))

    engine.on_connect = connect
    try:
        honest.post(lib.VSK_OP_REQUEST)
        driver.wait(lambda: honest.established)
        for packet in sequence:
            driver.post(**packet)
            driver.wait(lambda: broken() or not driver.queues[1].in_flight)
            if broken():
                engine.wait_event("BROKEN")
                engine.renew(1)
        honest.send(b"unharmed")
        assert engine.hosts[HONEST].recv(100) == b"unharmed"
        stats = engine.stats
        assert stats.flows <= 4
        assert stats.buffered <= 8 * BUF
    finally:
        for peer in peers:
            peer.close()
        engine.close()
