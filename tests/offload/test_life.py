"""The device beside its flows: figures, pause, reboot, a front-end that goes or breaks its promises."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Awaitable

import pytest

from tests.device_thread import PATIENCE
from vhostsock._core import lib
from vhostsock.offload import OffloadDevice, parse_policy

from .conftest import Guest, MakeGuest, accept, port_of, read_all, serving

POLICY = '[[rule]]\nmatch = { address = "127.0.0.1" }\naction = "offload"\n'


def run(guest: Guest, work: Awaitable[None]) -> None:
    """Await something on the device's thread."""

    async def waited() -> None:
        await asyncio.wait_for(work, PATIENCE)

    asyncio.run_coroutine_threadsafe(waited(), guest.loop).result(2 * PATIENCE)


def test_bytes_never_pass_through_python(make_guest: MakeGuest, listener: socket.socket) -> None:
    guest = make_guest(POLICY)
    flow = guest.connect(f"tcp://127.0.0.1:{port_of(listener)}")
    before = guest.device.stats().events
    size, block = 16 << 20, bytes(1 << 20)
    with accept(listener) as server:
        server.settimeout(PATIENCE)
        received = 0
        for _ in range(0, size, len(block)):
            server.setblocking(False)
            left = memoryview(block)
            while left:
                try:
                    left = left[server.send(left) :]
                except BlockingIOError:
                    received += len(flow.recv())
        while received < size:
            received += len(flow.recv())
    assert guest.device.stats().to_guest == size
    assert guest.device.stats().events == before
    flow.close()
    guest.until(lambda: not guest.device._flows)
    assert guest.device.stats().events == before + 1  # ENDED


def test_figures_are_one_line_of_names_and_numbers(
    make_guest: MakeGuest, listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vhostsock.offload")
    guest = make_guest(POLICY)
    flow = guest.connect(f"tcp://127.0.0.1:{port_of(listener)}")
    with accept(listener) as server:
        flow.send(b"12345")
        assert server.recv(5) == b"12345"
    guest.in_loop(guest.device.report)
    line = next(message for message in caplog.messages if message.startswith("stats "))
    figures = dict(word.split("=") for word in line.split()[1:])
    assert figures["name"] == "vm1"
    assert {key: int(figures[key]) for key in ("flows", "to_host", "to_guest", "events")} == {
        "flows": 1, "to_host": 5, "to_guest": 0, "events": 2,
    }  # fmt: skip
    assert int(figures["wakeups"]) > 0
    flow.close()


def test_figures_of_the_last_session_stay(listener: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vhostsock.offload")
    device = OffloadDevice(policy=parse_policy(POLICY))
    assert device.stats().opened == 0
    with serving(device) as guest:
        guest.connect(f"tcp://127.0.0.1:{port_of(listener)}")
    assert (device.stats().opened, device.stats().flows) == (1, 0)
    assert re.search(r"stats name=guest flows=0 .*events=3", caplog.text)  # HELLO, CONNECT, ENDED


def test_flows_survive_a_pause(make_guest: MakeGuest, listener: socket.socket) -> None:
    guest = make_guest(POLICY)
    flow = guest.connect(f"tcp://127.0.0.1:{port_of(listener)}")
    with accept(listener) as server:
        run(guest, guest.frontend.pause())
        server.sendall(b"while you slept")
        flow.send(b"before I woke")
        run(guest, guest.frontend.resume())
        assert flow.recv_exactly(15) == b"while you slept"
        assert server.recv(64) == b"before I woke"
    flow.close()


def test_a_closed_that_may_be_late_comes_all_the_same(make_guest: MakeGuest, listener: socket.socket) -> None:
    """When there are many, when nothing follows, and when the ring stops."""
    guest = make_guest(POLICY)
    assert guest.hello(features=lib.VSO_F_LATE_CLOSED).features == lib.VSO_F_LATE_CLOSED
    uri = f"tcp://127.0.0.1:{port_of(listener)}"
    flows = [guest.connect(uri) for _ in range(20)]
    for flow in flows:
        flow.close(wait=False)
    for flow in flows:
        flow.close()
        accept(listener).close()
    last = guest.connect(uri)
    last.close(wait=False)
    run(guest, guest.frontend.pause())
    run(guest, guest.frontend.resume())
    last.close()
    accept(listener).close()


@pytest.mark.parametrize("how", ["reboot", "reset_device"])
def test_a_guest_that_boots_again_starts_from_nothing(make_guest: MakeGuest, listener: socket.socket, how: str) -> None:
    guest = make_guest(POLICY)
    uri = f"tcp://127.0.0.1:{port_of(listener)}"
    guest.connect(uri)
    with accept(listener) as server:
        run(guest, getattr(guest.frontend, how)())
        again = Guest(guest.frontend.queues)
        again.hello()
        with pytest.raises(ConnectionResetError):
            read_all(server)
        assert again.connect(uri).id == 1
        accept(listener).close()
        guest.in_loop(guest.device._settle)
        assert len(guest.device._flows) == 1


def test_every_pair_serves(make_guest: MakeGuest, listener: socket.socket) -> None:
    guest = make_guest(POLICY, pairs=3)
    for pair in range(3):
        flow = guest.connect(f"tcp://127.0.0.1:{port_of(listener)}", pair=pair)
        with accept(listener) as server:
            flow.send(b"x")
            assert server.recv(1) == b"x"
        flow.close()


def test_more_flows_than_allowed_is_enfile(make_guest: MakeGuest, listener: socket.socket) -> None:
    import errno

    from vhostsock.testing.offload import Refused

    guest = make_guest(POLICY, max_flows=1)
    uri = f"tcp://127.0.0.1:{port_of(listener)}"
    flow = guest.connect(uri)
    with pytest.raises(Refused) as caught:
        guest.connect(uri)
    assert caught.value.errno == errno.ENFILE
    flow.close()
    guest.connect(uri).close()


def test_a_front_end_that_goes_resets_the_host_sides(listener: socket.socket) -> None:
    device = OffloadDevice(policy=parse_policy(POLICY))
    with serving(device) as guest:
        guest.connect(f"tcp://127.0.0.1:{port_of(listener)}")
        server = accept(listener)
    with server, pytest.raises(ConnectionResetError):
        read_all(server)


def test_a_ring_that_the_driver_breaks_is_told_with_the_evidence(
    make_guest: MakeGuest, caplog: pytest.LogCaptureFixture
) -> None:
    guest = make_guest(POLICY)
    guest.post(99)
    guest.until(lambda: caplog.messages)
    assert re.fullmatch(r"vm1 ring 1 is broken: chain \d+ has message type 99, which no driver sends", caplog.messages[0])


def test_memory_that_is_truncated_ends_the_session(make_guest: MakeGuest, caplog: pytest.LogCaptureFixture) -> None:
    guest = make_guest(POLICY)
    region = guest.frontend.memory.regions[0]
    os.ftruncate(region.fd, region.size // 2)
    ring = guest.queues[1]
    ring.write_desc(0, region.gpa + region.size - 4096, 64)
    ring.offer(0)
    ring.publish()
    os.eventfd_write(ring.kick_fd, 1)
    run(guest, guest.frontend.ended())
    assert "truncated" in caplog.text
