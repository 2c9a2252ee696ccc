# SPDX-License-Identifier: BSD-3-Clause
"""The back-end channel: questions and answers, and front-ends that do not read, do not answer, or answer nonsense."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from tests.aio import in_loop
from tests.device.devices import Upper
from vhostsock.channel import CALLS
from vhostsock.proto import ProtocolFeature, Request, wire
from vhostsock.proto.wire import BackendRequest
from vhostsock.testing.frontend import QEMU_11_1, Dialect, Frontend, Refused, attach

NAME = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")


class Sharer(Upper):
    config = b"fixed"
    shared_objects = True


def without(bits: ProtocolFeature) -> Dialect:
    return Dialect("less", QEMU_11_1.protocol_mask & ~bits, True, True, False)


def error_of(task: asyncio.Task[Any]) -> int | None:
    error = task.exception()
    assert isinstance(error, OSError), error
    return error.errno


@in_loop
async def test_a_message_is_done_when_the_front_end_says_so() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        task = asyncio.create_task(device.share_object(NAME))
        message = await frontend.channel.receive()
        assert (message.request, message.value.uuid) == (BackendRequest.SHARED_OBJECT_ADD, NAME.bytes)
        assert message.wants_answer
        await frontend.settled()
        assert not task.done()
        await frontend.channel.answer(message.request)
        await task


@in_loop
async def test_a_message_that_the_front_end_refuses_fails_its_caller_alone() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        task = asyncio.create_task(device.share_object(NAME))
        await frontend.channel.receive()
        await frontend.channel.answer(BackendRequest.SHARED_OBJECT_ADD, 1)
        await asyncio.wait([task])
        assert error_of(task) == errno.EREMOTEIO
        frontend.queues[0].submit([b"x"], [1])
        await frontend.queues[0].wait_async()


@in_loop
async def test_without_reply_ack_a_message_is_done_when_it_was_sent() -> None:
    device = Sharer()
    async with attach(device, dialect=without(ProtocolFeature.REPLY_ACK)) as frontend:
        await device.share_object(NAME)
        assert frontend.channel
        message = await frontend.channel.receive()
        assert not message.wants_answer


@in_loop
async def test_a_lookup_returns_the_descriptor_that_the_front_end_found() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        task = asyncio.create_task(device.lookup_object(NAME))
        await frontend.channel.receive()
        reader, writer = os.pipe()
        await frontend.channel.answer(BackendRequest.SHARED_OBJECT_LOOKUP, 0, [writer])
        os.close(writer)
        got = await task
        os.write(got, b"through")
        assert os.read(reader, 7) == b"through"
        os.close(got)
        os.close(reader)


@in_loop
async def test_a_lookup_that_finds_nothing_is_an_error_and_leaks_no_descriptor() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        for value, fds in ((1, []), (1, [0]), (0, [])):
            task = asyncio.create_task(device.lookup_object(NAME))
            await frontend.channel.receive()
            await frontend.channel.answer(BackendRequest.SHARED_OBJECT_LOOKUP, value, fds)
            await asyncio.wait([task])
            assert error_of(task) == errno.EREMOTEIO


@in_loop
async def test_answers_belong_to_the_questions_in_their_order() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        tasks = [asyncio.create_task(device.share_object(NAME)) for _ in range(3)]
        for _ in tasks:
            await frontend.channel.receive()
        for value in (0, 1, 0):
            await frontend.channel.answer(BackendRequest.SHARED_OBJECT_ADD, value)
        await asyncio.wait(tasks)
        assert [bool(task.exception()) for task in tasks] == [False, True, False]


@pytest.mark.parametrize(
    "bits", [ProtocolFeature.SHARED_OBJECT, ProtocolFeature.BACKEND_REQ], ids=["no such feature", "no channel"]
)
@in_loop
async def test_what_was_not_negotiated_is_not_sent(bits: ProtocolFeature) -> None:
    device = Sharer()
    async with attach(device, dialect=without(bits)):
        with pytest.raises(OSError, match="the front-end") as caught:
            await device.share_object(NAME)
        assert caught.value.errno == errno.EOPNOTSUPP


@in_loop
async def test_without_a_front_end_there_is_nobody_to_ask() -> None:
    device = Sharer()
    with pytest.raises(OSError, match="no front-end is connected"):
        await device.share_object(NAME)


@in_loop
async def test_a_suspended_device_sends_nothing_and_says_all_of_it_when_it_runs_again() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        await frontend.pause()
        task = asyncio.create_task(device.share_object(NAME))
        device.config_changed()
        device.config_changed()
        await frontend.settled()
        with pytest.raises(BlockingIOError):
            frontend.channel.sock.recv(1)
        await frontend.resume()
        assert {(await frontend.channel.acknowledge(r)).request for r in (
            BackendRequest.CONFIG_CHANGE_MSG, BackendRequest.SHARED_OBJECT_ADD,
        )} == {BackendRequest.CONFIG_CHANGE_MSG, BackendRequest.SHARED_OBJECT_ADD}  # fmt: skip
        await task
        with pytest.raises(BlockingIOError):  # the second change said nothing new
            frontend.channel.sock.recv(1)


@in_loop
async def test_a_front_end_that_does_not_read_holds_up_nothing_and_gets_everything_in_the_end() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        tasks = []
        for number in range(4 * CALLS):
            tasks.append(asyncio.create_task(device.share_object(uuid.UUID(int=number))))
        for _ in range(16):  # it reads nothing, and its rings and messages are served all the same
            await still_works(frontend)
            await frontend.settled()
        assert not any(task.done() for task in tasks)
        names = []
        for _ in tasks:
            message = await frontend.channel.acknowledge(BackendRequest.SHARED_OBJECT_ADD)
            names.append(uuid.UUID(bytes=message.value.uuid).int)
        await asyncio.gather(*tasks)
        assert names == list(range(4 * CALLS))


@in_loop
async def test_a_full_socket_is_written_on_when_it_has_room_again() -> None:
    """Without REPLY_ACK nothing but the socket's buffer holds messages back."""
    device = Sharer()
    async with attach(device, dialect=without(ProtocolFeature.REPLY_ACK)) as frontend:
        await frontend.open_channel(room=1)  # the least there is: some 4 KiB, of which the kernel charges 768 for a message
        await frontend.settled()
        assert frontend.channel
        count = 60
        tasks = [asyncio.create_task(device.share_object(uuid.UUID(int=number))) for number in range(count)]
        await frontend.settled()
        assert not all(task.done() for task in tasks)
        for number in range(count):
            assert (await frontend.channel.receive()).value.uuid == uuid.UUID(int=number).bytes
        await asyncio.gather(*tasks)


@in_loop
async def test_a_caller_that_gives_up_leaves_the_channel_in_order() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        sent = asyncio.create_task(device.lookup_object(NAME))
        await frontend.channel.receive()
        await frontend.pause()
        unsent = asyncio.create_task(device.share_object(NAME))
        await asyncio.sleep(0)
        for task in (sent, unsent):
            task.cancel()
        await asyncio.wait([sent, unsent])
        await frontend.resume()
        await frontend.channel.answer(BackendRequest.SHARED_OBJECT_LOOKUP, 0, [0])  # nobody wants it any more
        after = asyncio.create_task(device.unshare_object(NAME))
        await frontend.channel.acknowledge(BackendRequest.SHARED_OBJECT_REMOVE)
        await after


@in_loop
async def test_a_channel_that_the_front_end_closes_fails_its_calls_and_not_the_session() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        tasks = [asyncio.create_task(device.share_object(NAME)) for _ in range(CALLS + 1)]
        await frontend.channel.receive()
        frontend.channel.close()
        await asyncio.wait(tasks)
        assert {error_of(task) for task in tasks} == {errno.EPIPE}
        device.config_changed()
        await frontend.settled()
        await frontend.open_channel()  # and another one works
        device.config_changed()
        await frontend.channel.acknowledge(BackendRequest.CONFIG_CHANGE_MSG)


@in_loop
async def test_calls_end_with_the_session() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        task = asyncio.create_task(device.share_object(NAME))
        await frontend.channel.receive()
    await asyncio.wait([task])
    assert error_of(task) == errno.EPIPE


def reply(request: int, *, flags: int = wire.REPLY_FLAGS, size: int = 8, body: bytes = bytes(8)) -> bytes:
    return bytes(wire.HEADER.build({"request": request, "flags": flags, "size": size})) + body


LOOKUP, ADD = BackendRequest.SHARED_OBJECT_LOOKUP, BackendRequest.SHARED_OBJECT_ADD
NONSENSE: dict[str, tuple[bytes, int]] = {
    "another request's": (reply(LOOKUP), 0),
    "no reply": (reply(ADD, flags=wire.REQUEST_FLAGS), 0),
    "need_reply set": (reply(ADD, flags=0xD), 0),
    "too long": (reply(ADD, size=9, body=bytes(9)), 0),
    "too short": (reply(ADD, size=0, body=b""), 0),
    "huge": (reply(ADD, size=2**32 - 1), 0),
    "a descriptor": (reply(ADD), 1),
}


@pytest.mark.parametrize(("answer", "fds"), NONSENSE.values(), ids=NONSENSE)
@in_loop
async def test_an_answer_that_is_none_ends_the_session(answer: bytes, fds: int) -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        task = asyncio.create_task(device.share_object(NAME))
        await frontend.channel.receive()
        await frontend.channel.send(answer, [0] * fds)
        await frontend.ended()
        await asyncio.wait([task])
        assert error_of(task) == errno.EPIPE


@in_loop
async def test_a_second_descriptor_with_a_lookup_ends_the_session() -> None:
    device = Sharer()
    async with attach(device) as frontend:
        assert frontend.channel
        task = asyncio.create_task(device.lookup_object(NAME))
        await frontend.channel.receive()
        await frontend.channel.answer(LOOKUP, 0, [0, 0])
        await frontend.ended()
        await asyncio.wait([task])


@in_loop
async def test_an_answer_that_nobody_asked_for_ends_the_session() -> None:
    async with attach(Sharer()) as frontend:
        assert frontend.channel
        await frontend.channel.answer(ADD)
        await frontend.ended()


@pytest.mark.parametrize("make", [
    lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
    lambda: (socket.socket(socket.AF_INET, socket.SOCK_STREAM), socket.socket()),
], ids=["datagrams", "internet"])  # fmt: skip
@in_loop
async def test_only_a_unix_stream_socket_can_be_the_channel(make: Callable[[], tuple[socket.socket, socket.socket]]) -> None:
    async with attach(Sharer()) as frontend:
        for sock in make():
            with sock, pytest.raises(Refused):
                await frontend.request(Request.SET_BACKEND_REQ_FD, fds=[sock.fileno()], ack=True)
        await still_works(frontend)


async def still_works(frontend: Frontend) -> None:
    frontend.queues[0].submit([b"x"], [1])
    [done] = await frontend.queues[0].wait_async()
    assert done.data == b"X"
