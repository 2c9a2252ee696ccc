"""Handlers in the device's own process: an async function at the other end of the guest's connection."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Any, TypeAlias

import pytest

from vhostsock._core import lib
from vhostsock.errors import PolicyError, UsageError
from vhostsock.offload import Connection, OffloadDevice, Request, parse_policy
from vhostsock.testing.offload import Refused

from .conftest import MakeGuest

POLICY = '[[rule]]\nmatch = { scheme = "tcp" }\naction = "offload"\nhandler = "mine"\n'
Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter


async def echo(reader: Reader, writer: Writer, _request: Request) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


def test_a_function_serves_the_guest(make_guest: MakeGuest) -> None:
    flow = make_guest(POLICY, handlers={"mine": echo}).connect("tcp://192.0.2.9:7")
    assert (flow.local.rpartition(":")[0], flow.peer) == ("tcp://192.0.2.2", "tcp://192.0.2.9:7")
    sent = bytes(range(256)) * 4096
    received = b""
    for start in range(0, len(sent), 65536):
        flow.send(sent[start : start + 65536])
        received += flow.recv()
    flow.shutdown()
    assert received + flow.recv_all() == sent
    flow.close()


def test_a_function_learns_who_asks_for_what(make_guest: MakeGuest) -> None:
    async def tell(_reader: Reader, writer: Writer, request: Request) -> None:
        words = (request.guest.device, request.guest.uid, request.uri, request.target, request.pid, request.comm)
        writer.write(" ".join(map(str, words)).encode())

    guest = make_guest(POLICY, handlers={"mine": tell})
    flow = guest.connect("tcp6://2001:db8::9/7", uid=1000, pid=42, comm=b"curl")
    assert flow.recv_all() == b"vm1 1000 tcp6://2001:db8::9/7 tcp6://2001:db8::9/7 42 curl"
    assert flow.local.startswith("tcp6://2001:db8::2/")
    flow.close()


def test_a_function_that_fails_resets_the_guest_and_never_ends_its_stream(
    make_guest: MakeGuest, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(reader: Reader, writer: Writer, _request: Request) -> None:
        writer.write(b"half an answer")
        await writer.drain()
        await reader.read(1)
        raise RuntimeError("out of ideas")

    flow = make_guest(POLICY, handlers={"mine": fail}).connect("tcp://192.0.2.9:7")
    assert flow.recv_exactly(14) == b"half an answer"
    flow.send(b"?")
    with pytest.raises(ConnectionResetError):
        flow.recv()
    flow.close()
    assert "out of ideas" in caplog.text


class Ending:
    """Tells how the stream of its connection ended."""

    def __init__(self) -> None:
        self.how = ""

    async def __call__(self, reader: Reader, writer: Writer, _request: Request) -> None:
        writer.write(b"go")
        try:
            while await reader.read(65536):
                pass
            self.how = "EOF"
        except ConnectionResetError as error:
            self.how = errno.errorcode[error.errno or 0]
            raise


@pytest.mark.parametrize(("abort", "how"), [(False, "EOF"), (True, "ECONNRESET")])
def test_an_abort_of_the_guest_is_no_end_of_stream(make_guest: MakeGuest, abort: bool, how: str) -> None:
    ending = Ending()
    guest = make_guest(POLICY, handlers={"mine": ending})
    flow = guest.connect("tcp://192.0.2.9:7")
    assert flow.recv_exactly(2) == b"go"
    flow.send(b"a part")
    flow.close(abort=abort)
    guest.until(lambda: ending.how)
    assert ending.how == how


def test_functions_that_outlive_their_connections_are_bounded(make_guest: MakeGuest) -> None:
    async def wait(_reader: Reader, _writer: Writer, _request: Request) -> None:
        await asyncio.Event().wait()

    guest = make_guest(POLICY, handlers={"mine": wait}, max_flows=2, max_pending=1)
    for _ in range(3):
        guest.connect("tcp://192.0.2.9:7").close()
    with pytest.raises(Refused) as caught:
        guest.connect("tcp://192.0.2.9:7")
    assert (caught.value.verdict, caught.value.errno) == (lib.VSO_OFFLOAD, errno.ENOBUFS)


def test_functions_end_with_their_front_end(make_guest: MakeGuest) -> None:
    from .conftest import serving

    cancelled = []

    async def wait(_reader: Reader, _writer: Writer, _request: Request) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    device = OffloadDevice(policy=parse_policy(POLICY), handlers={"mine": wait})
    with serving(device) as guest:
        guest.connect("tcp://192.0.2.9:7")
        guest.until(lambda: device._tasks)
    assert cancelled == [True]


class Refusing:
    """A handler of one's own, with connect()."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def connect(self, _request: Request) -> Connection:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EHOSTUNREACH, "no such host"), errno.EHOSTUNREACH),
        (TimeoutError(), errno.ETIMEDOUT),
        (OSError(errno.EMFILE, "full"), errno.ENOBUFS),
        (ZeroDivisionError(), errno.ECONNABORTED),
        (asyncio.CancelledError(), errno.ECONNABORTED),
    ],
    ids=["errno", "timeout", "host limit", "bug", "cancelled itself"],
)
def test_an_error_of_a_handler_becomes_the_guests_errno(make_guest: MakeGuest, error: BaseException, code: int) -> None:
    guest = make_guest(POLICY, handlers={"mine": Refusing(error)})
    with pytest.raises(Refused) as caught:
        guest.connect("tcp://192.0.2.9:7")
    assert (caught.value.verdict, caught.value.errno) == (lib.VSO_OFFLOAD, code)


def test_a_handler_that_gives_the_wrong_kind_of_socket_fails_its_request(make_guest: MakeGuest) -> None:
    class Wrong:
        async def connect(self, request: Request) -> Connection:
            return Connection(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), request.uri, request.uri)

    with pytest.raises(Refused) as caught:
        make_guest(POLICY, handlers={"mine": Wrong()}).connect("tcp://192.0.2.9:7")
    assert caught.value.errno == errno.EPROTOTYPE


def test_handler_that_nobody_gave_is_a_policy_error_with_its_place() -> None:
    with pytest.raises(PolicyError, match=r"p.toml:1: rule 1, key 'handler': no handler 'mine' here; there are 'direct'"):
        OffloadDevice(policy=parse_policy(POLICY, "p.toml"))


WRONG: list[dict[str, Any]] = [{"pairs": 0}, {"pairs": 65}, {"max_flows": 0}, {"buffer": 0}, {"busy_poll": -1},
                                {"handlers": {"direct": echo}}]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_arguments_out_of_range_are_usage_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        OffloadDevice(**arguments)


def test_log_names_the_flow_of_a_failed_function(make_guest: MakeGuest, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(reader: Reader, _writer: Writer, _request: Request) -> None:
        await reader.read(1)
        raise RuntimeError("out of ideas")

    caplog.set_level(logging.ERROR, "vhostsock.offload")
    flow = make_guest(POLICY, handlers={"mine": fail}).connect("tcp://192.0.2.9:7")
    flow.send(b"?")
    with pytest.raises(ConnectionResetError):
        flow.recv()
    assert caplog.messages == [f"vm1 #{flow.id} tcp://192.0.2.9:7 reset: its handler failed"]
