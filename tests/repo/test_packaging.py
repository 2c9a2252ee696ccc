# SPDX-License-Identifier: BSD-3-Clause
"""What DKMS is told agrees with the project and with what kbuild makes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DKMS = dict(re.findall(r'^([A-Z_]+)(?:\[0\])?="(.*)"$', (ROOT / "csrc" / "dkms.conf").read_text(), re.MULTILINE))


def test_dkms_has_the_version_of_the_project_and_so_has_its_page() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert DKMS["PACKAGE_VERSION"] == version
    page = (ROOT / "docs" / "installing-in-a-guest.md").read_text()
    assert set(re.findall(r"vhostsock[-/](\d[\d.]*\d)", page)) == {version}


def test_dkms_installs_what_kbuild_makes() -> None:
    kbuild = (ROOT / "csrc" / DKMS["BUILT_MODULE_LOCATION"] / "Kbuild").read_text()
    assert re.search(rf"^obj-m := {DKMS['BUILT_MODULE_NAME']}\.o$", kbuild, re.MULTILINE)


def test_the_module_needs_nothing_that_dkms_does_not_copy() -> None:
    csrc = ROOT / "csrc"
    for source in (csrc / "guest").glob("*.[ch]"):
        for name in re.findall(r'^#include "(.*)"', source.read_text(), re.MULTILINE):
            assert csrc in (source.parent / name).resolve().parents, f"{source.name} includes {name}"
