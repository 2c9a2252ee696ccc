# SPDX-License-Identifier: BSD-3-Clause
"""A few seconds of every fuzz target, from the corpus that the repository keeps; and the proof that the C targets can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests/fuzz/run"

# name -> file, what is there, what is put in its place, and the target that must see it
PLANTED = {
    "a length that is fetched again after it was checked": (
        "core/vs_desc.h",
        "\t/* virtio 1.3, 2.7.5.2: a chain",
        "\tif (w.indirect_at < 0 && vq->ops == &vs_split_ops && c->n_out + c->n_in)\n"
        "\t\tc->iov[c->n_out + c->n_in - 1].iov_len = *(volatile uint32_t *)(vq->split.desc + 16 * w.i + 8);\n"
        "\t/* virtio 1.3, 2.7.5.2: a chain",
        "race",
    ),
    "a head that is not checked": ("core/vs_split.c", "if (vs_unlikely(head >= vq->num))", "if (0)", "ring"),
    "an overlap in the front-end's addresses that is accepted": (
        "core/vs_mem.c", "gpa_at < 0 ? -1 : range_slot(m->by_uva, m->n, r->uva, r->size, &other)",
        "gpa_at < 0 ? -1 : range_slot(m->by_uva, m->n, r->uva, 1, &other)", "mem",
    ),
    "bytes of a message that nobody accounts for": ("engine/vs_seqpkt.c", "\te->reserved += cap - f->wcap;\n", "", "vsock"),
    "a descriptor of a port that leads nowhere": (
        "engine/vs_route.c", "rc != -EINPROGRESS) {\n\t\tclose(*fd);\n", "rc != -EINPROGRESS) {\n", "vsock",
    ),
    "a chain that the engine forgets": ("engine/vs_listen.c", "vse_rx_unget(f->pair, c);\n\t\tswitch", "switch", "engine"),
    "a socket number of IPX that outlives its flow": ("engine/vs_flow.c", "\tvse_ipx_free(f);\n", "", "engine"),
}  # fmt: skip


def fuzz(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RUN, *arguments], capture_output=True, text=True, timeout=110, check=False,
                          env=os.environ | environment)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("target", ["ring", "race", "mem", "engine", "vsock", "session"])
def test_a_few_seconds_of_fuzzing_break_nothing(target: str) -> None:
    done = fuzz("--seconds", "5", target)
    assert done.returncode == 0, done.stderr
    executions = re.search(rf"{target}: (\d+) executions", done.stdout)
    assert executions, done.stdout
    assert int(executions[1]) > 100


@pytest.mark.long
@pytest.mark.parametrize("name", PLANTED)
def test_a_bug_that_is_put_in_is_found(name: str, tmp_path: Path) -> None:
    file, before, after, target = PLANTED[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / file
    assert source.read_text().count(before) == 1, f"{file} has changed: plant the bug anew"
    source.write_text(source.read_text().replace(before, after))
    done = fuzz("--seconds", "60", target, FUZZ_CSRC=str(tmp_path / "csrc"), FUZZ_WORK=str(tmp_path))
    assert done.returncode == 1, done.stdout
    assert f"{target} failed" in done.stderr
