"""The dirty log under the data plane in C: what it reads from a socket straight into guest memory is in the log."""

from __future__ import annotations

from vhostsock._core import lib
from vhostsock.memory import DirtyLog
from vhostsock.testing.memory import DirtyPages, pages

from .engine import EngineUnderTest, connection


def test_what_the_engine_reads_into_guest_memory_is_in_the_log(engine: EngineUnderTest) -> None:
    with DirtyPages(engine.memory) as dirty, connection(engine) as (flow, host):
        lib.vse_lock(engine.ptr)
        log = DirtyLog(dirty.fd, size=dirty.size)
        for queue, vring in zip(engine.driver.queues, engine.vrings, strict=True):
            vring.set_log(log, address=queue.used)
        lib.vse_unlock(engine.ptr)
        log.close()
        payload = b"".join(b"%015d\n" % i for i in range(6400))  # 100 KiB, no 16 bytes of it alike
        host.sendall(payload)
        received = b""
        while len(received) < len(payload):
            received += flow.recv()
        assert received == payload
        lib.vse_lock(engine.ptr)
        taken = dirty.take()
        region = engine.memory.regions[0]
        memory = engine.memory.read(region.gpa, region.size)
        lib.vse_unlock(engine.ptr)
        found = [memory.find(payload[at : at + 16]) for at in range(0, len(payload), 512)]
        assert min(found) >= 0
        assert {page for at in found for page in pages(region.gpa + at, 1)} <= taken
        for queue in engine.driver.queues[:1]:
            assert pages(queue.used, 4) <= taken
