# SPDX-License-Identifier: BSD-3-Clause
"""A recording is played to a device, and every difference from what was recorded is found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.device.test_recording import Configured
from vhostsock import Chain, Device, Queue
from vhostsock.errors import UsageError
from vhostsock.proto import Request, VirtioFeature
from vhostsock.recording import Recorder, read_recording
from vhostsock.testing.frontend import Refused, attach
from vhostsock.testing.replay import Differs, replay

Recorded = Callable[[], str]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """A session with everything in it: requests, config both ways, a refusal, pause, reboot."""

    async def record(path: str) -> None:
        with Recorder(path) as recorder:
            async with attach(Configured(), tap=recorder) as frontend:
                for _ in range(5):
                    frontend.queues[1].submit([b"ping"], [4])
                    await frontend.queues[1].wait_async()
                assert await frontend.read_config(0, 4) == b"\1\2\3\4"
                await frontend.write_config(0, b"\7")
                with pytest.raises(Refused):
                    await frontend.write_config(3, b"\7")
                assert await frontend.read_config(0, 4) == b"\7\2\3\4"
                await frontend.pause()
                await frontend.resume()
                await frontend.reboot()

    def make() -> str:
        path = str(tmp_path / "session.rec")
        asyncio.run(record(path))
        return path

    return make


def test_device_that_has_not_changed_answers_as_it_was_recorded(recorded: Recorded) -> None:
    path = recorded()
    assert replay(path, Configured()) == sum(entry.kind == "<-" for entry in read_recording(path)) > 40


def test_rings_start_empty_where_they_were_and_never_break(recorded: Recorded, caplog: pytest.LogCaptureFixture) -> None:
    path = recorded()
    assert any(entry.payload[4] == 5 for entry in read_recording(path) if entry.request == Request.SET_VRING_BASE)
    replay(path, Configured())
    assert "broken" not in caplog.text


def test_packed_ring_starts_empty_at_its_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Packed(Configured):
        packed = True

    async def record(path: str) -> None:
        with Recorder(path) as recorder:
            async with attach(Packed(), tap=recorder, accept=~0, size=4) as frontend:
                assert frontend.features & VirtioFeature.RING_PACKED
                for _ in range(5):
                    frontend.queues[0].submit([b"ping"], [4])
                    await frontend.queues[0].wait_async()
                await frontend.pause()
                await frontend.resume()

    asyncio.run(record(str(tmp_path / "r")))
    device = Packed()
    handled: list[Chain] = []

    async def count(queue: Queue, chain: Chain) -> None:
        handled.append(chain)

    device.handle = count  # type: ignore[method-assign]
    replay(tmp_path / "r", device)
    assert not handled
    assert "broken" not in caplog.text


def test_other_config_space_is_a_difference_and_both_answers_are_shown(recorded: Recorded) -> None:
    device = Configured()
    device.config = b"\1\2\3\5"
    with pytest.raises(Differs, match=r"(?s)GET_CONFIG.*01020304.*and now.*01020305"):
        replay(recorded(), device)


def test_reply_that_may_differ_can_be_ignored(recorded: Recorded) -> None:
    device = Configured()
    device.config = b"\1\2\3\5"
    assert replay(recorded(), device, ignore=[Request.GET_CONFIG]) > 40


def test_refusal_that_is_a_success_now_is_a_difference(recorded: Recorded) -> None:
    class Obliging(Configured):
        def write_config(self, offset: int, data: bytes, flags: int) -> None:
            self.config = data + self.config[1:]

    with pytest.raises(Differs, match=r"(?s)SET_CONFIG.*ack 1.*and now.*ack 0"):
        replay(recorded(), Obliging())


def test_feature_that_is_not_offered_any_more_is_a_difference_and_a_new_one_is_none(recorded: Recorded) -> None:
    class More(Configured):
        features = 1 << 5

    assert replay(recorded(), More()) > 40

    class Less(Device):  # has no config space
        virtio_id = 39

        async def handle(self, queue: Queue, chain: Chain) -> None:
            pass

    with pytest.raises(Differs, match="GET_PROTOCOL_FEATURES"):
        replay(recorded(), Less())


def test_session_that_ends_early_is_a_difference(recorded: Recorded) -> None:
    class Small(Configured):
        max_queue_size = 8

    with pytest.raises(Differs, match="and now the session is over"):
        replay(recorded(), Small())


def test_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello\n")
    with pytest.raises(UsageError, match="not a recording"):
        replay(tmp_path / "x", Configured())
