# SPDX-License-Identifier: BSD-3-Clause
"""The ``vhostsock`` command. Two tables: COMMANDS, and the devices of ``vhostsock serve``.

A device is a row of DEVICES: its arguments, and how to make it of them. Whatever a row imports at length it imports when it
is used, so that ``vhostsock qemu-args`` needs no compiled extension.

Exit status: 0 after a clean stop (SIGTERM, SIGINT, or the end of a connection that was passed in), 1 when something failed,
with a line on stderr that says what and what to do, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import qemu
from .errors import UsageError, VhostsockError
from .probe import command as probe

if TYPE_CHECKING:
    from .device import Device
    from .recording import Tap

__all__ = ["COMMANDS", "DEVICES", "main"]

CAPABILITIES = "--print-capabilities"
FIRST_PASSED_FD = 3  # where a service manager puts the sockets it listened on (sd_listen_fds(3))


class Served(NamedTuple):
    """A device that ``serve`` can serve. None of its own arguments is required (see ``_capabilities_of``)."""

    help: str
    make: Callable[[argparse.Namespace], Device]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    type: str = ""  # as QEMU's vhost-user.json calls it, where that is not the device's name here


class Command(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]  # the exit status, None is 0. ValueError: the arguments do not go together


def _make_rng(_options: argparse.Namespace) -> Device:
    from .devices.rng import Rng

    return Rng()


def _make_echo(_options: argparse.Namespace) -> Device:
    from .devices.echo import Echo

    return Echo()


def _make_blk(options: argparse.Namespace) -> Device:
    from .devices.blk import Blk

    if options.blk_file is None:
        raise ValueError("say what to serve: --image FILE")
    return Blk(
        options.blk_file,
        read_only=options.read_only,
        num_queues=options.num_queues,
        serial=options.serial,
        block_size=options.block_size,
        seg_max=options.seg_max,
        threads=options.threads,
        write_through=options.write_through,
        shared=options.shared,
        postcopy=options.postcopy,
    )


def _blk_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", "--blk-file", dest="blk_file", metavar="FILE", help="a raw image file or a block device")
    parser.add_argument("--read-only", action="store_true", help="refuse writes")
    parser.add_argument("--num-queues", type=int, default=1, metavar="N", help="most queues for a front-end (default: 1)")
    parser.add_argument("--serial", default="", metavar="TEXT", help="at most 20 characters, shown in the guest")
    parser.add_argument("--block-size", type=int, default=512, metavar="N", help="logical block size (default: 512)")
    parser.add_argument("--seg-max", type=int, default=126, metavar="N", help="buffers a request (default: 126)")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="requests in the kernel at once (default: 8)")
    parser.add_argument("--write-through", action="store_true", help="make each write durable before it completes")
    parser.add_argument("--shared", action="store_true", help="do not lock the image while a guest runs")
    parser.add_argument("--postcopy", action="store_true", help="offer postcopy migration; needs userfaultfd, so mostly root")


def _make_input(options: argparse.Namespace) -> Device:
    from .devices.input import PROFILES
    from .devices.input_socket import SocketInput

    if options.events is None:
        raise ValueError("say where events come from: --events PATH")
    return SocketInput(options.events, PROFILES[options.kind], name=options.name, serial=options.serial)


def _input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", metavar="PATH", help="create a Unix socket there that takes events (docs/input.md)")
    parser.add_argument("--kind", choices=("keyboard", "mouse", "tablet"), default="keyboard", help="default: keyboard")
    parser.add_argument("--name", metavar="TEXT", help="what the guest shows (default: vhostsock KIND)")
    parser.add_argument("--serial", default="", metavar="TEXT", help="likewise (default: none)")


def _make_net(options: argparse.Namespace) -> Device:
    from .devices.net_command import make

    return make(options)


def _net_arguments(parser: argparse.ArgumentParser) -> None:
    from .devices.net_command import add_arguments

    add_arguments(parser)


def _make_offload(options: argparse.Namespace) -> Device:
    from .offload.command import make_device

    return make_device(options)


def _offload_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", metavar="FILE", help="what is served (docs/policy.md). Without one: nothing")
    parser.add_argument("--name", default="guest", metavar="NAME", help="who the guest is, for the policy and the log")
    parser.add_argument("--pairs", type=int, default=1, metavar="N", help="ring pairs, as given to qemu-args (default: 1)")
    _engine_limits(parser)


def _engine_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-flows", type=int, default=4096, metavar="N",
                        help="sockets of the guest at once, each takes a descriptor (default: 4096)")  # fmt: skip
    parser.add_argument("--busy-poll", type=int, default=50, metavar="US",
                        help="microseconds to wait awake for what is about to come, where that is found to be faster;"
                        " 0: always sleep (default: 50)")  # fmt: skip


def _make_vsock(options: argparse.Namespace) -> Device:
    from .vsock.command import make_device

    return make_device(options)


def _vsock_arguments(parser: argparse.ArgumentParser) -> None:
    _engine_limits(parser)
    parser.add_argument("--guest-cid", type=int, default=3, metavar="N", help="the guest's context id (default: 3)")
    parser.add_argument("--uds-path", metavar="PATH",
                        help="the guest reaches PATH_<port>; clients of PATH say 'CONNECT <port>'")  # fmt: skip
    parser.add_argument("--seqpacket-path", metavar="PATH", help="listen there, too, for clients with SOCK_SEQPACKET")
    parser.add_argument("--forward", action="append", default=[], metavar="PORT=URI",
                        help="where connections to PORT of the host lead: tcp://a.b.c.d:port, tcp6://address/port or"
                        " unix:///path. Repeatable")  # fmt: skip
    parser.add_argument("--publish", action="append", default=[], metavar="URI=PORT",
                        help="listen on URI for connections to PORT of the guest. Repeatable")  # fmt: skip
    parser.add_argument("--name", default="guest", metavar="NAME", help="who the guest is, for the log (default: guest)")


def _check_policy_arguments(parser: argparse.ArgumentParser) -> None:
    def add_list(option: str, metavar: str, help: str) -> None:
        parser.add_argument(option, action="append", default=[], metavar=metavar, help=help)

    parser.add_argument("file", metavar="FILE", help="the policy")
    add_list("--explain", "URI", "say what happens to a connect or a datagram to URI, by which rule, and why. Repeatable")
    add_list("--explain-bind", "URI", "the same for a bind")
    parser.add_argument("--name", default="guest", metavar="NAME", help="who the guest is (default: guest)")
    parser.add_argument("--uid", type=int, default=0, metavar="N", help="the caller's uid in the guest (default: 0)")
    add_list("--handler", "NAME", "an in-process handler that the program with this policy has. Repeatable")


def _check_policy(options: argparse.Namespace) -> None:
    from .offload.command import check

    check(options)


DEVICES = {
    "rng": Served("an entropy source, for the stock virtio-rng driver", _make_rng),
    "echo": Served("answers each request with its own bytes, for trying things out", _make_echo),
    "blk": Served("a disk from an image file, for the stock virtio-blk driver", _make_blk, _blk_arguments, "block"),
    "input": Served("a keyboard, mouse or tablet, for the stock virtio-input driver", _make_input, _input_arguments),
    "net": Served("a network card, on a tap of the host or looped back", _make_net, _net_arguments),
    "offload": Served("the sockets of a guest, as a policy says", _make_offload, _offload_arguments),
    "vsock": Served("virtio-vsock: AF_VSOCK sockets of a guest, as sockets of the host", _make_vsock, _vsock_arguments),
}


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    devices = parser.add_subparsers(dest="device", required=True, metavar="DEVICE")
    for name, row in DEVICES.items():
        device = devices.add_parser(name, help=row.help, description=f"Serve {row.help}.")
        where = device.add_mutually_exclusive_group()
        where.add_argument("--socket-path", metavar="PATH", help="create a Unix socket there and listen on it")
        where.add_argument(
            "--fd",
            type=int,
            metavar="N",
            help="use descriptor N: a listening or a connected Unix socket. Without --socket-path and --fd: the socket that a"
            " service manager passes (LISTEN_FDS)",
        )
        device.add_argument(CAPABILITIES, action="store_true", help="print as JSON what this back-end can do, and exit")
        levels = ("debug", "info", "warning", "error")
        device.add_argument("--record", metavar="FILE", help="record every message to FILE, for 'vhostsock trace'")
        device.add_argument("--log-level", choices=levels, default="info", help="what to tell on stderr, default info")
        row.add_arguments(device)


def _serve(options: argparse.Namespace) -> None:
    import uvloop

    from .recording import Recorder, Tap

    logging.basicConfig(level=options.log_level.upper(), format="vhostsock: %(levelname)s: %(message)s", stream=sys.stderr)
    fd = _passed_fd() if options.socket_path is None and options.fd is None else options.fd
    device = DEVICES[options.device].make(options)
    with contextlib.ExitStack() as stack:
        tap = stack.enter_context(Recorder(options.record)) if options.record is not None else Tap()
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        runner.run(_serve_device(device, options.socket_path, fd, tap))


async def _serve_device(device: Device, path: str | None, fd: int | None, tap: Tap) -> None:
    from .device import Device
    from .server import Server

    loop = asyncio.get_running_loop()
    async with Server(device, path=path, fd=fd, tap=tap) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        loop.add_signal_handler(signal.SIGUSR1, device.report)
        if type(device).reload is not Device.reload:  # a device without it ends when its terminal goes, as any program
            loop.add_signal_handler(signal.SIGHUP, device.reload)
        print(f"listening on {server.address}", flush=True)
        await server.serve_forever()


def _capabilities_of(argv: Sequence[str]) -> str | None:
    """What "serve DEVICE ... --print-capabilities" prints, None for any other command line.

    The vhost-user document, "Backend program conventions": all other options are to be ignored, so they may even be wrong; that
    is why argparse is not asked. ``features`` lists the device's own options, as QEMU's vhost-user.json does for its devices.
    """
    if len(argv) < 3 or argv[0] != "serve" or argv[1] not in DEVICES or CAPABILITIES not in argv[2:]:
        return None
    parser = argparse.ArgumentParser(add_help=False)
    DEVICES[argv[1]].add_arguments(parser)
    features = sorted(name.replace("_", "-") for name in vars(parser.parse_args([])))
    return json.dumps({"type": DEVICES[argv[1]].type or argv[1], "features": features})


def _passed_fd() -> int:
    """The one socket of LISTEN_FDS. The variables are removed: they are not for our children."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count:
        raise UsageError("say where to listen: --socket-path PATH or --fd N (no service manager has passed a socket)")
    if count != "1":
        raise UsageError(f"the service manager passed {count} sockets; configure exactly one")
    return FIRST_PASSED_FD


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="what 'vhostsock serve ... --record FILE' has written, or is writing")


def _trace(options: argparse.Namespace) -> None:
    from .trace import trace

    try:
        for line in trace(options.file):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # into head(1), say; the interpreter would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMANDS = {
    "serve": Command("serve a device to QEMU", _serve_arguments, _serve),
    "trace": Command("print a recorded session, one line a message", _trace_arguments, _trace),
    "probe": Command("check any back-end against the vhost-user document", probe.add_arguments, probe.run),
    "qemu-args": Command(
        "print the QEMU arguments that attach a served device", qemu.add_arguments, lambda options: print(qemu.run(options))
    ),
    "check-policy": Command("check a policy file, and explain its decisions", _check_policy_arguments, _check_policy),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vhostsock", description="vhost-user device back-ends for QEMU guests.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, row in COMMANDS.items():
        command = commands.add_parser(name, help=row.help, description=f"{row.help[0].upper()}{row.help[1:]}.")
        row.add_arguments(command)
        command.set_defaults(complain=command.error)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    capabilities = _capabilities_of(argv)
    if capabilities is not None:
        print(capabilities)
        return 0
    options = _parser().parse_args(argv)
    try:
        return COMMANDS[options.command].run(options) or 0
    except ValueError as error:
        options.complain(str(error))
    except VhostsockError as error:
        return _failed(str(error))
    except OSError as error:
        return _failed(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except KeyboardInterrupt:  # before the signal handlers are there
        return _failed("interrupted")
    raise AssertionError  # complain() does not return


def _failed(text: str) -> int:
    print(f"vhostsock: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
