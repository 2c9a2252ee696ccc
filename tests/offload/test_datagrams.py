"""UDP of the guest: connected and unconnected sockets, each destination decided by the policy."""

from __future__ import annotations

import errno
import logging
import re
import socket
from collections.abc import Iterator

import pytest

from tests.device_thread import PATIENCE
from vhostsock._core import lib
from vhostsock.testing.offload import Refused

from .conftest import MakeGuest, port_of

TO_SERVER = """
    [[rule]]
    match = {{ scheme = "udp", address = "10.0.2.3", port = 53 }}
    action = "offload"
    rewrite = "udp://127.0.0.1:{port}"
    """


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        one.settimeout(PATIENCE)
        yield one


@pytest.mark.parametrize("flags", [0, lib.VSO_OPEN_ADDR_ONLY], ids=["connected", "unconnected"])
def test_a_query_is_answered_by_the_address_that_was_asked(make_guest: MakeGuest, server: socket.socket, flags: int) -> None:
    guest = make_guest(TO_SERVER.format(port=port_of(server)))
    flow = guest.connect("udp://10.0.2.3:53", flags=flags)
    assert flow.peer == "udp://10.0.2.3:53"
    flow.sendto(b"query", "udp://10.0.2.3:53" if flags else "")
    query, client = server.recvfrom(512)
    assert query == b"query"
    assert flow.local == (f"udp://0.0.0.0:{client[1]}" if flags else f"udp://127.0.0.1:{client[1]}")
    server.sendto(b"answer", client)
    assert flow.recvfrom() == (b"answer", "udp://10.0.2.3:53")
    flow.close()


def test_two_destinations_of_one_socket_are_told_apart(make_guest: MakeGuest, server: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as second:
        second.bind(("127.0.0.1", 0))
        second.settimeout(PATIENCE)
        rules = TO_SERVER.format(port=port_of(server)) + TO_SERVER.format(port=port_of(second)).replace("10.0.2.3", "10.0.2.4")
        flow = make_guest(rules).connect("udp://10.0.2.3:53", flags=lib.VSO_OPEN_ADDR_ONLY)
        for host, uri in ((server, "udp://10.0.2.3:53"), (second, "udp://10.0.2.4:53")):
            flow.sendto(b"to " + uri.encode(), uri)
            data, client = host.recvfrom(512)
            assert data == b"to " + uri.encode()
            host.sendto(b"from", client)
            assert flow.recvfrom() == (b"from", uri)
        flow.close()


def test_later_destination_that_the_policy_does_not_name_is_dropped(
    make_guest: MakeGuest, server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "vhostsock.offload")
    guest = make_guest(TO_SERVER.format(port=port_of(server)))
    flow = guest.connect("udp://10.0.2.3:53", flags=lib.VSO_OPEN_ADDR_ONLY)
    dropped = [f"udp://127.0.0.1:{port_of(server)}", "tcp://10.0.2.3:53", "udp6://2001:db8::1/53", "nonsense"]
    for uri in dropped:
        flow.sendto(b"secret", uri)
    flow.sendto(b"query", "udp://10.0.2.3:53")
    assert server.recvfrom(512)[0] == b"query"
    guest.until(lambda: guest.device.stats().dgrams_dropped == len(dropped))
    for uri in dropped:
        assert re.search(f"datagrams to {uri!r} (native|refused)", caplog.text)
    flow.close()


def test_ipv6_socket_reaches_ipv4_and_ipv6_targets(make_guest: MakeGuest, server: socket.socket) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as second:
        second.bind(("::1", 0))
        second.settimeout(PATIENCE)
        rules = TO_SERVER.format(port=port_of(server)) + '[[rule]]\nmatch = { address = "::1" }\naction = "offload"\n'
        flow = make_guest(rules).connect(f"udp6://::1/{port_of(second)}", flags=lib.VSO_OPEN_ADDR_ONLY)
        for host, uri in ((second, f"udp6://::1/{port_of(second)}"), (server, "udp://10.0.2.3:53")):
            flow.sendto(b"x", uri)
            _, client = host.recvfrom(512)
            host.sendto(b"y", client)
            assert flow.recvfrom() == (b"y", uri)
        flow.close()


@pytest.mark.parametrize("flags", [0, lib.VSO_OPEN_ADDR_ONLY], ids=["connected", "unconnected"])
def test_verdicts_on_the_first_destination(make_guest: MakeGuest, flags: int) -> None:
    guest = make_guest('[[rule]]\nmatch = { port = 54 }\naction = "deny"\nerrno = "EPERM"')
    for port, expected in ((53, (lib.VSO_NATIVE, 0)), (54, (lib.VSO_DENY, errno.EPERM))):
        with pytest.raises(Refused) as caught:
            guest.connect(f"udp://10.0.2.3:{port}", flags=flags)
        assert (caught.value.verdict, caught.value.errno) == expected


def test_a_connected_socket_may_connect_anew(make_guest: MakeGuest, server: socket.socket) -> None:
    guest = make_guest(TO_SERVER.format(port=port_of(server)) + '[[rule]]\nmatch = { port = 54 }\naction = "deny"\n')
    flow = guest.connect("udp://10.0.2.3:53")
    with pytest.raises(Refused):
        guest.connect("udp://10.0.2.3:54", flow=flow)
    guest.connect("udp://10.0.2.3:53", flow=flow)
    flow.sendto(b"query")
    assert server.recvfrom(512)[0] == b"query"
    flow.close()
    guest.until(lambda: not guest.device._flows)
