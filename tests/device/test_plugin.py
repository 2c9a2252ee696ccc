# SPDX-License-Identifier: BSD-3-Clause
"""The pytest plugin for device authors: what their tests see, above all of a device that is wrong."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.device.devices import Recorder, Upper
from vhostsock import Chain, Device, Queue, RequestError, UsageError
from vhostsock.testing.frontend import QEMU_7_2, Refused
from vhostsock.testing.plugin import DeviceFailed, VhostUser

pytest_plugins = ["vhostsock.testing.plugin"]


class Moody(Device):
    """Does as it is told: answers, raises, or leaves nothing but its config space."""

    virtio_id = 39
    config = b"\1\2"

    async def handle(self, queue: Queue, chain: Chain) -> None:
        word = chain.read()
        if word == b"raise":
            raise ValueError("in a mood")
        if word == b"refuse":
            raise RequestError("not this one")
        chain.write(word)


class FailsToStart(Recorder):
    """Starts its queue so many times, then raises."""

    def __init__(self, starts: int) -> None:
        super().__init__()
        self.starts = starts

    def queue_started(self, queue: Queue) -> None:
        self.starts -= 1
        if self.starts < 0:
            raise ValueError("no queue today")


def test_a_request_returns_what_the_device_wrote(vhost_user: VhostUser) -> None:
    guest = vhost_user(Upper(num_queues=2))
    assert guest.request(b"ping", room=8) == b"PING"
    assert guest.request(b"ping", room=2, queue=1) == b"PI"
    assert guest.request(b"ping") == b""


def test_pause_and_reboot_are_what_the_device_is_told(vhost_user: VhostUser) -> None:
    device = Recorder()
    guest = vhost_user(device)
    assert device.take() == ["connected", "started 0"]
    guest.pause()
    assert device.take() == ["draining 0", "stopped 0"]
    guest.resume()
    guest.reboot()
    assert device.take() == ["started 0", "draining 0", "stopped 0", "reset", "started 0"]


def test_the_config_space_is_read_and_a_refused_write_says_so(vhost_user: VhostUser) -> None:
    guest = vhost_user(Moody())
    assert guest.read_config(1, 2) == b"\2\0"
    with pytest.raises(Refused):
        guest.write_config(0, b"\7")


def test_several_devices_and_other_front_ends(vhost_user: VhostUser) -> None:
    guests = [vhost_user(Upper(), dialect=QEMU_7_2, size=size) for size in (4, 8)]
    assert [guest.request(b"a", room=1) for guest in guests] == [b"A", b"A"]


def test_an_exception_in_a_handler_is_kept_and_the_guest_goes_on(vhost_user: VhostUser) -> None:
    guest = vhost_user(Moody())
    assert guest.request(b"raise", room=4) == b""
    assert guest.request(b"fine", room=4) == b"fine"
    with pytest.raises(DeviceFailed, match="in a mood") as caught:
        guest.check()
    assert isinstance(caught.value.__cause__, ValueError)
    guest.check()  # dealt with


def test_a_refused_request_is_no_failure_of_the_device(vhost_user: VhostUser) -> None:
    guest = vhost_user(Moody())
    assert guest.request(b"refuse", room=4) == b""
    assert not guest.failures


def test_a_device_that_fails_the_session_is_named_instead_of_the_lost_connection(vhost_user: VhostUser) -> None:
    with pytest.raises(DeviceFailed, match="no queue today"):
        vhost_user(FailsToStart(0))
    guest = vhost_user(FailsToStart(1))
    guest.pause()
    with pytest.raises(DeviceFailed, match="no queue today"):
        guest.resume()


def test_a_device_that_cannot_be_served_is_refused_at_once(vhost_user: VhostUser) -> None:
    with pytest.raises(UsageError, match="overrides none of"):
        vhost_user(Device())


def test_an_exception_that_nobody_looked_at_fails_the_authors_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
        from vhostsock import Device

        pytest_plugins = ["vhostsock.testing.plugin"]

        class Broken(Device):
            virtio_id = 39

            async def handle(self, queue, chain):
                raise KeyError("oops")

        def test_it(vhost_user):
            assert vhost_user(Broken()).request(b"x", room=1) == b""
        """)
    )
    command = (sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q", "test_it.py")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "DeviceFailed: the device raised KeyError('oops')" in done.stdout
    assert "1 passed, 1 error" in done.stdout


def test_the_plugin_is_not_loaded_into_runs_that_do_not_ask_for_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import sys\n\ndef test_it():\n    assert 'vhostsock' not in sys.modules\n")
    command = (sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q", "test_it.py")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_a_change_of_the_config_space_reaches_the_guest(vhost_user: VhostUser) -> None:
    device = Moody()
    guest = vhost_user(device)
    device.config_changed()
    guest.config_change()


def test_a_queue_that_the_driver_broke_is_told_and_heals_with_a_reboot(vhost_user: VhostUser) -> None:
    guest = vhost_user(Upper(num_queues=2))
    queue = guest.frontend.queues[1]
    queue.offer(0xFFFF)
    queue.publish()
    queue.kick()
    guest.broken(1)
    assert guest.request(b"fine", room=4, queue=0) == b"FINE"
    guest.reboot()
    assert guest.request(b"fine", room=4, queue=1) == b"FINE"
