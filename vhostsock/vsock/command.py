# SPDX-License-Identifier: BSD-3-Clause
"""What ``vhostsock serve vsock`` does with its arguments."""

from __future__ import annotations

import argparse

from .device import VsockDevice

__all__ = ["make_device"]


def make_device(options: argparse.Namespace) -> VsockDevice:
    """The device of these options. ValueError for a wrong one."""
    return VsockDevice(
        options.guest_cid, name=options.name, uds_path=options.uds_path, seqpacket_path=options.seqpacket_path,
        forwards=dict(_forward(text) for text in options.forward), publish=dict(_publish(text) for text in options.publish),
        max_flows=options.max_flows, busy_poll=options.busy_poll,
    )  # fmt: skip


def _forward(text: str) -> tuple[int, str]:
    port, equals, uri = text.partition("=")
    return _port(port, text, "PORT=URI") if equals else _port("", text, "PORT=URI"), uri


def _publish(text: str) -> tuple[str, int]:
    uri, _, port = text.rpartition("=")
    return uri, _port(port, text, "URI=PORT")


def _port(text: str, whole: str, form: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{whole!r}: write {form}, the port in decimal")
    return int(text)
