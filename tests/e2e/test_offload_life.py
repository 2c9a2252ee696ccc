# SPDX-License-Identifier: BSD-3-Clause
"""What becomes of offloaded sockets when the guest, the device or the back-end goes."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from tests.e2e.site import Site, site
from tests.e2e.vm import Vm, script, wait_until

HOLD = "hold 10.0.0.5 7002"
TAKEN_AWAY = ["recv ECONNRESET", "poll HUP", "send EPIPE", "end"]  # what guest/hold.c then says
NewSite = Callable[..., Site]


@pytest.fixture
def new_site(initramfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewSite]:
    with ExitStack() as stack:
        def make(*boot: str, pairs: int = 1) -> Site:
            made: AbstractContextManager[Site] = site(tmp_path_factory.mktemp("site"), initramfs, *boot, pairs=pairs)
            return stack.enter_context(made)

        yield make


def held(place: Site) -> socket.socket:
    """A connection from the guest, seen from the host, with the guest's program in the middle of it."""
    sock = place.accept()
    assert sock.recv(3) == b"hi\n"
    return sock


def over(sock: socket.socket) -> bool:
    """The other side is gone: end of file or a reset."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def download(place: Site) -> None:
    want = hashlib.sha256((place.www / "data").read_bytes()).hexdigest()
    assert place.vm.run("wget -q -O - http://10.0.0.5/data | sha256sum").text.split()[0] == want


def test_reboot_ends_every_flow_and_the_new_system_starts_afresh(new_site: NewSite) -> None:
    place = new_site()
    place.vm.start(HOLD)
    with held(place) as sock:
        place.vm.reset()
        assert over(sock)
    wait_until(lambda: place.backend.stats("vm1")["flows"] == 0, "the flows of the old system are gone")
    download(place)


def test_unplug_resets_sockets_which_are_native_from_then_on(new_site: NewSite) -> None:
    place = new_site()
    holding = place.vm.start(HOLD)
    with held(place) as sock:
        place.vm.unplug()
        assert holding.wait().text.splitlines() == TAKEN_AWAY
        place.vm.qmp.execute("chardev-remove", id="vhostsock0-socket")  # QEMU keeps the connection until then
        assert over(sock)
    refused = place.vm.run("nc 10.0.0.5 80 </dev/null", check=False)
    assert refused.status != 0
    assert os.strerror(errno.ENETUNREACH) in refused.errors.decode()
    place.vm.run("mkdir -p /tmp/w && echo own >/tmp/w/x && httpd -p 82 -h /tmp/w")
    assert place.vm.run("wget -q -O - http://127.0.0.1:82/x").text == "own"


def test_a_device_plugged_again_serves_again(new_site: NewSite) -> None:
    place = new_site()
    download(place)
    place.vm.unplug()
    place.plug_again()
    download(place)


def test_killed_back_end_fails_sockets_and_hangs_nothing(new_site: NewSite) -> None:
    place = new_site("--append", "virtio_socket.ping_secs=1")
    holding = place.vm.start(HOLD)
    with held(place) as sock:
        place.backend.process.kill()
        place.backend.process.wait()
        assert over(sock)
    # a connect that asks the dead device, and one after the driver has noticed
    asking = place.vm.run("nc 10.0.0.5 80 </dev/null", check=False)
    assert asking.status not in (0, 137), str(asking)
    assert holding.wait().text.splitlines() == TAKEN_AWAY
    refused = place.vm.run("nc 10.0.0.5 80 </dev/null", check=False)
    assert os.strerror(errno.ENETUNREACH) in refused.errors.decode()
    place.vm.run("mkdir -p /tmp/w && echo own >/tmp/w/x && httpd -p 82 -h /tmp/w")
    assert place.vm.run("wget -q -O - http://127.0.0.1:82/x").text == "own"


def test_no_flow_is_left_when_programs_ended_and_the_back_end_ends_cleanly(new_site: NewSite) -> None:
    place = new_site()
    holding = place.vm.start(f"{HOLD}; true")
    with held(place) as sock:
        download(place)
        assert place.backend.stats("vm1")["flows"] == 1
        place.vm.run("killall hold")
        assert over(sock)
    holding.wait()
    assert not place.hwsock()
    place.backend.idle("vm1")

    # and with one
    place.vm.start(HOLD)
    with held(place) as sock:
        place.backend.process.terminate()
        assert place.backend.process.wait(30) == 0
        assert over(sock)
    assert not place.backend.socket.exists()


def test_killed_guest_leaves_nothing_and_the_next_is_served(new_site: NewSite, initramfs: str, tmp_path: Path) -> None:
    place = new_site()
    place.vm.start(HOLD)
    with held(place) as sock:
        place.vm.process.kill()
        place.vm.process.wait()
        assert over(sock)
    with Vm(tmp_path, initramfs, "--socket", place.backend.socket) as second:
        assert second.run("wget -q -O - http://10.0.0.5/data | wc -c").text == str((place.www / "data").stat().st_size)


def test_several_ring_pairs(new_site: NewSite) -> None:
    place = new_site(pairs=4)
    running = [place.vm.start("wget -q -O - http://10.0.0.5/data | sha256sum") for _ in range(4)]
    want = hashlib.sha256((place.www / "data").read_bytes()).hexdigest()
    assert {command.wait().text.split()[0] for command in running} == {want}


@pytest.mark.foreign
@pytest.mark.parametrize("carrier", ["generic", "fs"])
def test_carrier_on_qemu_11(new_site: NewSite, carrier: str) -> None:
    place = new_site("--qemu", script("fetch-qemu", "trixie-backports"), "--carrier", carrier)
    download(place)
    place.check("stream_check 10.0.0.5 7000")
    place.vm.run("mkdir -p /tmp/www && echo hello >/tmp/www/x && httpd -p 8080 -h /tmp/www")
    assert place.fetch(8080, "/x") == b"hello\n"
    place.vm.reset()
    download(place)
