# SPDX-License-Identifier: BSD-3-Clause
"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.aio import in_loop
from vhostsock.offload.policy_file import load_policy
from vhostsock.testing.frontend import attach

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    [text] = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return str(text)


@in_loop
async def test_the_device_is_fifteen_lines_and_answers_a_driver() -> None:
    code = block("python").strip()
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    *program, last = code.splitlines()
    assert last == "asyncio.run(main())"
    names: dict[str, Any] = {}
    exec(compile("\n".join(program), "README.md", "exec"), names)
    async with attach(names["Rng"]()) as frontend:
        frontend.queues[0].submit([], [64])
        [done] = await frontend.queues[0].wait_async()
        assert done.written == 64
        assert len(set(done.data)) > 1


def test_the_policy_is_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(block("toml"))
    load_policy(path)


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
