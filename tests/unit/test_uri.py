"""URIs: one text for one address, and an error that shows the right form."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostsock.offload import uri
from vhostsock.offload.uri import InetURI, IpxURI, Transport, UnixURI, URIError

ports = st.integers(0, 65535)
transports: st.SearchStrategy[Transport] = st.sampled_from(("tcp", "udp"))
scopes = st.sampled_from(["", "%2", "%eth0"])


@given(transports, st.ip_addresses(v=4), ports)
def test_every_ipv4_uri_survives_its_own_text(transport: Transport, address: IPv4Address, port: int) -> None:
    one = InetURI(transport, address, port)
    assert uri.parse(str(one)) == one


@given(transports, st.ip_addresses(v=6), scopes, ports)
def test_every_ipv6_uri_survives_its_own_text(transport: Transport, address: IPv6Address, scope: str, port: int) -> None:
    one = InetURI(transport, IPv6Address(f"{address}{scope}"), port)
    if address.ipv4_mapped is None:
        assert uri.parse(str(one)) == one
    else:
        with pytest.raises(URIError, match="IPv4-mapped"):
            uri.parse(str(one))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**48 - 1), st.integers(0, 2**16 - 1))
def test_every_ipx_uri_survives_its_own_text(network: int, node: int, number: int) -> None:
    one = IpxURI(network, node, number)
    assert uri.parse(str(one)) == one


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_with_uri_error(text: str) -> None:
    for scheme in ("", "tcp://", "udp6://", "ipx://", "unix://"):
        try:
            parsed = uri.parse(scheme + text)
        except URIError:
            continue
        assert uri.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("tcp://10.0.0.5:5432", "tcp://10.0.0.5:5432"),
        ("udp://10.0.2.3:53", "udp://10.0.2.3:53"),
        ("tcp6://2001:DB8:0:0:0::1/443", "tcp6://2001:db8::1/443"),
        ("udp6://fe80::1%2/53", "udp6://fe80::1%2/53"),
        ("ipx://1.2.4000", "ipx://00000001.000000000002.4000"),
        ("unix:///run/db.sock", "unix:///run/db.sock"),
    ],
)
def test_text_becomes_canonical(text: str, canonical: str) -> None:
    assert str(uri.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("10.0.0.5:80", "no scheme"),
        ("http://10.0.0.5:80", "unknown scheme 'http'"),
        ("tcp://10.0.0.5", "no port; write tcp://a.b.c.d:port"),
        ("tcp://10.0.0.05:80", "no IPv4 address"),
        ("tcp://example.org:80", "names are not resolved"),
        ("tcp://10.0.0.5:080", "no port"),
        ("tcp://10.0.0.5:65536", "0..65535"),
        ("tcp://10.0.0.5:+80", "0..65535"),
        ("tcp://10.0.0.5:8\u0660", "0..65535"),
        ("tcp://2001:db8::1:80", "tcp6://address/port"),
        ("tcp6://[2001:db8::1]/80", "without brackets"),
        ("tcp6://2001:db8::1", "no port"),
        ("tcp6://::ffff:10.0.0.5/80", "write tcp://10.0.0.5:80"),
        ("udp6://fe80::1%a b/53", "no interface"),
        ("unix://run/db.sock", "three slashes"),
        ("unix:///" + "a" * 107, "107 bytes"),
        ("ipx://1.2", "network.node.socket"),
        ("ipx://100000000.2.3", "32 bits"),
    ],
)
def test_bad_text_is_refused_with_the_right_form(text: str, advice: str) -> None:
    with pytest.raises(URIError) as caught:
        uri.parse(text)
    assert advice in str(caught.value)


def test_parse_inet_refuses_other_schemes() -> None:
    with pytest.raises(URIError, match="a unix address cannot stand here"):
        uri.parse_inet("unix:///run/db.sock")


def test_sockaddr_is_what_the_kernel_uses() -> None:
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as one, socket.socket(family, socket.SOCK_DGRAM) as other:
            one.bind((host, 0))
            local = InetURI.of_name("udp", one.getsockname())
            other.connect(local.name())
            assert InetURI.of_name("udp", other.getpeername()) == local
            raw = local.sockaddr()
            assert int.from_bytes(raw[:2], "little") == family
            assert int.from_bytes(raw[2:4], "big") == local.port
            assert local.address.packed in raw


def test_ipv4_on_a_dual_stack_socket_is_mapped_both_ways() -> None:
    local = InetURI("udp", IPv4Address("10.0.2.3"), 53)
    raw = local.sockaddr(socket.AF_INET6)
    assert len(raw) == 28
    assert IPv6Address(raw[8:24]).ipv4_mapped == local.address
    assert InetURI.of_name("udp", ("::ffff:10.0.2.3", 53, 0, 0)) == local


def test_ipv6_on_an_ipv4_socket_is_an_os_error() -> None:
    with pytest.raises(OSError, match="IPv4 socket"):
        uri.parse_inet("udp6://2001:db8::1/53").sockaddr(socket.AF_INET)


def test_scope_is_kept_in_names_and_left_out_of_plain() -> None:
    one = uri.parse_inet("udp6://fe80::1%7/53")
    assert one.name() == ("fe80::1", 53, 0, 7)
    assert one.plain == IPv6Address("fe80::1")
    assert InetURI.of_name("udp", ("fe80::1%eth0", 53, 0, 7)) == one


def test_unix_uri_is_its_path() -> None:
    assert uri.parse("unix:///run/db.sock") == UnixURI("/run/db.sock")
