"""Calls and kicks: made when wanted, left out when not, and never blocking."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.ring.conftest import MakePair, Pair, both_formats
from vhostsock.errors import DriverError, FrontendError
from vhostsock.ring import Vring
from vhostsock.testing.packed import PackedQueue


def complete(pair: Pair, n: int = 1) -> bool:
    """The device completes n requests and flushes once; was the driver called?"""
    for _ in range(n):
        pair.queue.add([b"x"])
    pair.queue.publish()
    chains = pair.vring.pop_batch(n)
    assert len(chains) == n
    for chain in chains:
        chain.complete()
    called = pair.vring.flush()
    assert pair.queue.take_call() == called
    pair.queue.collect()
    return called


# Calls


@both_formats
def test_without_event_idx_the_flag_decides_on_the_call(make_pair: MakePair) -> None:
    pair = make_pair(event_idx=False)
    assert complete(pair)
    assert complete(pair)
    pair.queue.disable_calls()
    assert not complete(pair)
    assert not pair.queue.enable_calls()
    assert complete(pair, 3)


def test_with_event_idx_only_the_element_asked_for_calls(pair: Pair) -> None:
    assert complete(pair)  # used_event 0: the first
    assert not complete(pair)
    pair.queue.used_event = 5
    assert not complete(pair, 3)  # 2, 3, 4
    assert complete(pair)  # 5
    assert not complete(pair)


@pytest.mark.parametrize("base", [0, 65530, 32760])
@pytest.mark.parametrize("event", range(-1, 9))
def test_used_event_is_compared_modulo_2_16(make_pair: MakePair, base: int, event: int) -> None:
    pair = make_pair(base=base)
    assert complete(pair, 2)
    pair.queue.used_event = (base + event) % 65536
    # virtio 1.3, 2.7.7.2: elements 2..6 are published; the call is for one of them
    assert complete(pair, 5) == (2 <= event <= 6)


@both_formats
def test_nothing_pushed_calls_nobody(pair: Pair) -> None:
    assert not pair.vring.flush()
    assert complete(pair)
    assert not pair.vring.flush()
    assert not pair.queue.take_call()


def test_with_event_idx_the_flag_is_ignored(pair: Pair) -> None:
    pair.queue.avail_flags = 1
    assert complete(pair)


@both_formats
def test_a_call_that_fell_due_without_an_fd_is_made_when_one_comes(pair: Pair) -> None:
    pair.vring.set_call(None)
    pair.queue.submit([b"x"])
    pair.echo_all()
    assert not pair.queue.take_call()
    pair.vring.set_call(pair.queue.call_fd)
    assert pair.queue.take_call()
    pair.vring.set_call(pair.queue.call_fd)
    assert not pair.queue.take_call()


@both_formats
def test_a_call_that_fell_due_without_an_fd_outlives_a_restart(pair: Pair) -> None:
    pair.vring.set_call(None)
    pair.queue.submit([b"x"])
    pair.echo_all()
    pair.vring.stop()
    pair.vring.start()
    pair.vring.set_call(pair.queue.call_fd)
    assert pair.queue.take_call()


@both_formats
def test_the_call_fd_may_be_swapped_while_running(pair: Pair) -> None:
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        pair.vring.set_call(other)
        pair.queue.submit([b"x"])
        pair.echo_all()
        assert not pair.queue.take_call()
        assert os.eventfd_read(other) == 1
    finally:
        os.close(other)


# Kicks


def test_without_event_idx_the_flag_asks_for_kicks(make_pair: MakePair) -> None:
    pair = make_pair(event_idx=False)
    assert pair.queue.used_flags == 0
    pair.vring.disable_kick()
    assert pair.queue.used_flags == 1
    pair.queue.submit([b"x"])
    assert not pair.queue.take_kick()
    assert pair.vring.enable_kick()  # one came meanwhile
    pair.echo_all()
    assert not pair.vring.enable_kick()
    pair.queue.submit([b"x"])
    assert pair.queue.take_kick()


@pytest.mark.parametrize("base", [0, 65535])
def test_with_event_idx_kicks_come_only_after_enable(make_pair: MakePair, base: int) -> None:
    pair = make_pair(base=base)
    assert pair.queue.avail_event == base
    pair.queue.submit([b"x"])
    assert pair.queue.take_kick()
    pair.vring.disable_kick()
    pair.echo_all()
    for _ in range(3):
        pair.queue.submit([b"x"])
        assert not pair.queue.take_kick()
    assert pair.vring.enable_kick()
    assert pair.echo_all() == 3
    assert not pair.vring.enable_kick()
    assert pair.queue.used_flags == 0  # virtio 1.3, 2.7.10.2
    pair.queue.submit([b"x"])
    assert pair.queue.take_kick()


@both_formats
def test_has_available_looks_and_does_not_touch(pair: Pair) -> None:
    assert not pair.vring.has_available
    pair.queue.submit([b"x"])
    before = pair.memory.read(pair.queue.used, 134), pair.memory.read(pair.queue.desc, 16 * pair.queue.num)
    assert pair.vring.has_available
    assert (pair.memory.read(pair.queue.used, 134), pair.memory.read(pair.queue.desc, 16 * pair.queue.num)) == before
    assert pair.vring.pop() is not None
    assert not pair.vring.has_available


@both_formats
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_start_asks_for_kicks_whatever_the_last_run_left(make_pair: MakePair, event_idx: bool) -> None:
    pair = make_pair(event_idx=event_idx)
    pair.vring.disable_kick()
    pair.vring.stop()
    if not isinstance(pair.queue, PackedQueue):
        pair.memory.write(pair.queue.used, b"\1\0")
    pair.vring.start()
    pair.queue.submit([b"x"])
    assert pair.queue.take_kick()


# What a call may be written to


@pytest.fixture(params=["pipe", "stream", "datagram"])
def channel(request: pytest.FixtureRequest) -> Iterator[tuple[int, int, Callable[[], None]]]:
    """(reading end, writing end, close the reading end)"""
    if request.param == "pipe":
        r, w = os.pipe()
    else:
        kind = socket.SOCK_STREAM if request.param == "stream" else socket.SOCK_DGRAM
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        r, w = a.detach(), b.detach()
    open_ = {r, w}

    def close_reader() -> None:
        os.close(r)
        open_.discard(r)

    yield r, w, close_reader
    for fd in open_:
        os.close(fd)


@both_formats
def test_a_call_may_go_to_a_pipe_or_a_socket(pair: Pair, channel: tuple[int, int, Callable[[], None]]) -> None:
    r, w, _ = channel
    pair.vring.set_call(w)
    pair.queue.submit([b"x"])
    pair.echo_all()
    assert os.read(r, 64) == (1).to_bytes(8, "little")


@both_formats
def test_a_channel_that_nobody_reads_never_blocks(make_pair: MakePair, channel: tuple[int, int, Callable[[], None]]) -> None:
    pair = make_pair(event_idx=False)
    _, w, _ = channel
    pair.vring.set_call(w)
    for _ in range(20_000):  # 8 bytes each: more than any default buffer holds
        pair.queue.add([b"x"])
        pair.queue.publish()
        chain = pair.vring.pop()
        assert chain is not None
        chain.complete()
        pair.vring.flush()
        pair.queue.collect()


@both_formats
def test_a_reader_that_is_gone_raises_no_sigpipe(pair: Pair, channel: tuple[int, int, Callable[[], None]]) -> None:
    _, w, close_reader = channel
    pair.vring.set_call(w)
    close_reader()
    was = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # would end this process
    try:
        pair.queue.submit([b"x"])
        pair.echo_all()
        assert signal.SIGPIPE not in signal.sigpending()
        assert signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGPIPE, was)
    assert pair.queue.wait()


@both_formats
def test_a_saturated_eventfd_does_not_block(pair: Pair) -> None:
    blocking = os.eventfd((1 << 32) - 1)
    try:
        os.eventfd_write(blocking, (1 << 64) - 2 - ((1 << 32) - 1))
        pair.vring.set_call(blocking)
        pair.queue.submit([b"x"])
        pair.echo_all()
        assert os.eventfd_read(blocking) == (1 << 64) - 2
    finally:
        os.close(blocking)


@both_formats
def test_the_fds_stay_the_callers_and_ours_are_closed(pair: Pair) -> None:
    before = set(os.listdir("/proc/self/fd"))
    fd = os.eventfd(0)
    for _ in range(5):
        pair.vring.set_call(fd)
        pair.vring.set_err(fd)
    os.close(fd)
    pair.vring.set_call(-1)
    pair.vring.set_err(None)
    assert len(before) == len(os.listdir("/proc/self/fd")) + 2  # both ends of the fixture's were let go


@both_formats
@pytest.mark.parametrize("which", ["call", "error"])
def test_an_fd_that_cannot_carry_calls_is_refused(pair: Pair, which: str) -> None:
    setter = pair.vring.set_call if which == "call" else pair.vring.set_err
    with open("/proc/self/exe", "rb") as file, pytest.raises(FrontendError, match=f"the {which} fd must be an eventfd, a"):
        setter(file.fileno())
    with pytest.raises(FrontendError, match=f"{which} fd: Bad file descriptor"):
        setter(1 << 20)
    # and the old one still works
    if which == "error":
        pair.queue.offer_chain((0, 1, 0))
    else:
        pair.queue.add([b"x"])
    pair.queue.publish()
    if which == "call":
        pair.echo_all()
        assert pair.queue.take_call()
    else:
        with pytest.raises(DriverError):
            pair.vring.pop()
        assert os.eventfd_read(pair.queue.err_fd) == 1


@both_formats
def test_an_error_fd_that_comes_late_is_told(pair: Pair) -> None:
    pair.vring.set_err(None)
    pair.queue.offer_chain((0, 1, 0))
    pair.queue.publish()
    with pytest.raises(DriverError):
        pair.vring.pop()
    pair.vring.set_err(pair.queue.err_fd)
    assert os.eventfd_read(pair.queue.err_fd) == 1


def test_a_vring_can_be_thrown_away_unconfigured() -> None:
    for index in (0, 65535):
        assert repr(Vring(index)) == f"<Vring {index} idle>"
