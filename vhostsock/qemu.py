# SPDX-License-Identifier: BSD-3-Clause
"""QEMU arguments for a vhost-user back-end of ours: the carriers as a table.

A *carrier* is the QEMU device that shows a guest our virtqueues. The offload protocol is in-band and needs nothing but pairs of
rings, so which device carries them is a row here and nowhere an ``if``:

| carrier   | QEMU                    | rings for N pairs                       | the driver knows it by                       |
|-----------|-------------------------|-----------------------------------------|----------------------------------------------|
| `fs`      | 5.0+, all distributions | 1 + num-request-queues, so ask for 2N-1 | virtio id 26, a tag that starts "vhostsock"  |
| `generic` | 10.2+ (creatable there) | num_vqs = 2N                            | virtio id 39, which no stock driver claims   |
| `rng`     | 6.0+                    | its one queue; for the rng device       | virtio id 4, the stock virtio-rng driver     |
| `input`   | 4.1+                    | its two queues; for the input device    | virtio id 18, the stock virtio-input driver  |
| `net`     | 2.1+                    | queues=N; for the net device            | virtio id 1, the stock virtio-net driver     |
| `blk`     | 4.0+                    | --queues; for the blk device            | virtio id 2, the stock virtio-blk driver     |
| `vsock`   | 5.1+                    | one pair; the event ring is QEMU's      | virtio id 19, the stock vsock driver         |

vhost-user needs guest memory that the back-end can map, so the memory object is part of the answer.

This file needs nothing but the standard library and can be run as a program: boot calls it before anything is built.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CARRIERS", "Carrier", "add_arguments", "main", "qemu_args"]

MAX_PAIRS = 64
"""Ring pairs a carrier may be asked for: QEMU's generic device wraps its ring numbers past 256, and this stays far below."""


@dataclass(frozen=True, slots=True)
class Carrier:
    """One QEMU device that can carry our rings. ``device`` may use {chardev}, {id}, {tag}, {rings}, {queues}, {virtio_id}.

    So may ``parts``, the arguments in front of -device: a network card has its back-end in one of its own, with {pairs}.
    """

    device: str
    since: str
    purpose: str
    paired: bool = True
    extra_rings: int = 0  # rings the device adds to those it is asked for
    virtio_id: int | None = None  # default of a device that can take any id
    max_queues: int = 1  # of a device that counts queues and not pairs of rings
    reconnects: bool = False  # QEMU keeps the guest's device while the back-end is away
    parts: tuple[str, ...] = ()


CARRIERS = {
    "fs": Carrier(
        "vhost-user-fs-pci,id={id},chardev={chardev},tag={tag},num-request-queues={rings},queue-size=1024",
        "5.0", "socket offload on any distribution's QEMU", extra_rings=1,
    ),
    "generic": Carrier(
        "vhost-user-test-device-pci,id={id},chardev={chardev},virtio-id={virtio_id},num_vqs={rings},vq_size=1024",
        "10.2", "socket offload, or any device with --virtio-id", virtio_id=39,
    ),
    "rng": Carrier("vhost-user-rng-pci,id={id},chardev={chardev}", "6.0", "the rng device, for the stock driver", paired=False),
    "input": Carrier(
        "vhost-user-input-pci,id={id},chardev={chardev}", "4.1", "the input device, for the stock driver", paired=False
    ),
    "net": Carrier(
        "virtio-net-pci,id={id},netdev={id}-netdev,mq=on,romfile=",
        "2.1", "the net device, for the stock driver", reconnects=True,
        parts=("-netdev", "vhost-user,id={id}-netdev,chardev={chardev},queues={pairs}"),
    ),
    "blk": Carrier(
        "vhost-user-blk-pci,id={id},chardev={chardev},num-queues={queues}",
        "4.0", "the blk device, for the stock driver", paired=False, max_queues=64, reconnects=True,
    ),
    "vsock": Carrier(
        "vhost-user-vsock-pci,id={id},chardev={chardev}", "5.1", "the vsock device, for the stock driver", paired=False
    ),
}  # fmt: skip


def qemu_args(
    socket_path: str,
    *,
    carrier: str = "fs",
    pairs: int = 1,
    memory: str = "256M",
    name: str = "vhostsock0",
    virtio_id: int | None = None,
    config_size: int | None = None,
    queues: int = 1,
    reconnect: int = 0,
    reconnect_ms: int = 0,
) -> list[str]:
    """The arguments that attach the back-end listening on ``socket_path``, shared guest memory included.

    ``pairs`` is in ring pairs (1..64), ``memory`` in QEMU's notation ("256M"), ``name`` becomes the device's id (for
    ``device_del``) and the carrier's tag. ``queues`` is for carriers that count queues and not pairs. ``reconnect``: seconds
    after which QEMU looks for a back-end that went away; ``reconnect_ms``: the same in milliseconds, for QEMU 9.2 and later
    (11.1 knows the other no more). ValueError names what is wrong with an argument and what it may be.
    """
    row = CARRIERS.get(carrier)
    if row is None:
        raise ValueError(f"carrier {carrier!r} is unknown; there are {', '.join(CARRIERS)}")
    if not 1 <= pairs <= (MAX_PAIRS if row.paired else 1):
        raise ValueError(f"carrier {carrier}: {pairs} ring pairs; may be 1..{MAX_PAIRS if row.paired else 1}")
    if not 1 <= queues <= row.max_queues:
        raise ValueError(f"carrier {carrier}: {queues} queues; may be 1..{row.max_queues}")
    if (reconnect or reconnect_ms) and not row.reconnects:
        able = ", ".join(key for key, other in CARRIERS.items() if other.reconnects)
        raise ValueError(f"carrier {carrier} cannot reconnect; {able} can")
    if reconnect < 0 or reconnect_ms < 0 or (reconnect and reconnect_ms):
        raise ValueError(f"reconnect {reconnect} s, {reconnect_ms} ms: give one of the two, greater than 0")
    if not re.fullmatch(r"[1-9][0-9]*[MG]", memory):
        raise ValueError(f"memory {memory!r}: write a number and M or G, for example 256M")
    if not re.fullmatch(r"vhostsock[A-Za-z0-9_-]{0,27}", name):  # a virtiofs tag is 36 bytes
        raise ValueError(f"name {name!r}: must start with 'vhostsock', then at most 27 letters, digits, '-' and '_'")
    if virtio_id is not None and row.virtio_id is None:
        raise ValueError(f"carrier {carrier} has a fixed virtio id; --virtio-id goes with carrier generic")
    if config_size is not None and row.virtio_id is None:
        raise ValueError(f"carrier {carrier} has a config space of its own; --config-size goes with carrier generic")
    if config_size is not None and not 0 <= config_size <= 256:
        raise ValueError(f"a config space of {config_size} bytes; may be 0..256")
    *parts, device = (
        part.format(
            chardev=f"{name}-socket", id=name, tag=name, rings=2 * pairs - row.extra_rings, queues=queues, pairs=pairs,
            virtio_id=virtio_id or row.virtio_id,
        )
        for part in (*row.parts, row.device)
    )  # fmt: skip
    if config_size:
        device += f",config_size={config_size}"
    escaped = socket_path.replace(",", ",,")  # how QEMU's option syntax writes a comma
    again = f",reconnect={reconnect}" if reconnect else f",reconnect-ms={reconnect_ms}" if reconnect_ms else ""
    return [
        "-m", memory,
        "-object", f"memory-backend-memfd,id=vhostsock-memory,size={memory},share=on",
        "-machine", "memory-backend=vhostsock-memory",
        "-chardev", f"socket,id={name}-socket,path={escaped}{again}",
        *parts,
        "-device", device,
    ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vhostsock qemu-args``; ``run`` serves them."""
    rows = "; ".join(f"{name}: {row.purpose} (QEMU {row.since}+)" for name, row in CARRIERS.items())
    parser.add_argument("--socket-path", required=True, metavar="PATH", help="where the back-end listens")
    parser.add_argument("--carrier", default="fs", choices=list(CARRIERS), help=f"the QEMU device, default fs. {rows}")
    parser.add_argument("--pairs", type=int, default=1, metavar="N", help="ring pairs, default 1")
    parser.add_argument("--queues", type=int, default=1, metavar="N", help="queues of the device, for carrier blk; default 1")
    parser.add_argument("--reconnect", type=int, default=0, metavar="S", help="look for a back-end that went, every S seconds")
    parser.add_argument("--reconnect-ms", type=int, default=0, metavar="MS", help="the same from QEMU 9.2 on, in milliseconds")
    parser.add_argument("--memory", default="256M", metavar="SIZE", help="guest memory, default 256M")
    parser.add_argument("--name", default="vhostsock0", help="id and tag of the device, default vhostsock0")
    parser.add_argument("--virtio-id", type=int, metavar="ID", help="carrier generic only: the device type, default 39")
    parser.add_argument("--config-size", type=int, metavar="BYTES", help="carrier generic only: of its config space, default 0")
    parser.add_argument("--one-per-line", action="store_true", help="one argument a line, unquoted, not one shell line")


def run(options: argparse.Namespace) -> str:
    """The text that ``vhostsock qemu-args`` prints. Raises ValueError as `qemu_args` does."""
    args = qemu_args(
        options.socket_path,
        carrier=options.carrier,
        pairs=options.pairs,
        memory=options.memory,
        name=options.name,
        virtio_id=options.virtio_id,
        config_size=options.config_size,
        queues=options.queues,
        reconnect=options.reconnect,
        reconnect_ms=options.reconnect_ms,
    )
    return "\n".join(args) if options.one_per_line else shlex.join(args)


def main(argv: Sequence[str] | None = None) -> int:
    """``vhostsock qemu-args`` as a program of its own. Exit status 2 for a wrong argument, which is named on stderr."""
    parser = argparse.ArgumentParser(prog="vhostsock qemu-args", description="Print the QEMU arguments that attach a back-end.")
    add_arguments(parser)
    options = parser.parse_args(argv)
    try:
        print(run(options))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
