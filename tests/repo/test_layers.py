# SPDX-License-Identifier: BSD-3-Clause
"""The direction of imports: lower layers know nothing of higher ones (docs/architecture.md draws them)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vhostsock"

# a module, or a package with all in it -> what of the project it may import, beside itself; "_core" is the C extension
MAY_IMPORT = {
    "errors": set(),
    "_build_core": set(),
    "qemu": set(),
    "memory": {"errors", "_core"},
    "iotlb": {"errors", "_core", "memory"},
    "ring": {"errors", "_core", "memory"},
    "fileio": {"errors", "_core", "ring"},
    "proto": {"errors"},
    "dataplane": {"errors", "memory", "ring"},
    "postcopy": {"errors", "_core", "memory", "proto"},
    "ancillary": {"proto"},
    "shmem": {"errors"},
    "state": {"errors"},
    "inband": set(),
    "device": {"errors", "_core", "memory", "ring", "proto", "dataplane", "shmem", "state"},
    "recording": {"errors", "proto"},
    "trace": {"proto", "recording"},
    "offers": {"errors", "proto", "device", "shmem"},
    "polling": set(),
    "ringstate": {"device", "inband", "proto"},
    "misses": {"errors", "memory", "iotlb", "proto", "channel", "ringstate"},
    "vrings": {
        "errors", "memory", "iotlb", "ring", "proto", "device", "channel", "inband", "misses", "polling", "recording",
        "ringstate",
    },
    "channel": {"ancillary", "errors", "proto", "recording"},
    "backend": {
        "ancillary", "errors", "memory", "proto", "device", "offers", "vrings", "channel", "postcopy", "shmem", "state",
        "recording",
    },
    "sockfile": set(),
    "server": {"errors", "device", "offers", "backend", "recording", "sockfile"},
    "devices": {"errors", "sockfile", "ring", "fileio", "device"},
    "offload": {"errors", "_core", "memory", "ring", "proto", "device"},
    "vsock": {"errors", "_core", "memory", "ring", "proto", "device", "offload", "sockfile"},
    "testing": {"ancillary", "errors", "_core", "memory", "ring", "proto", "device", "recording", "trace", "server", "offload"},
    "probe": {"ancillary", "errors", "memory", "ring", "proto", "recording", "trace", "testing"},
    "cli": {
        "errors", "_core", "memory", "ring", "proto", "device", "recording", "trace", "server", "devices", "offload", "vsock",
        "qemu", "probe",
    },
    "__main__": {"cli"},
    "__init__": {"errors", "memory", "ring", "fileio", "proto", "device", "server"},
}
ONLY_CLI = {"uvloop"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Dotted names that the file imports anywhere in it, relative ones made absolute."""
    package = ("vhostsock", *path.relative_to(PACKAGE).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_lower_layers(path: Path) -> None:
    layer = layer_of(path)
    assert layer in MAY_IMPORT, f"{path}: a new module or package; give it a place in MAY_IMPORT and in docs/architecture.md"
    public = {name for name in MAY_IMPORT if name != "__init__"} | {"_core"}
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "vhostsock":
            continue
        # "from vhostsock import Device" means the package itself, which is above all that it gathers
        target = parts[1] if len(parts) > 1 and parts[1] in public else "__init__"
        assert target == layer or target in MAY_IMPORT[layer], f"{path.relative_to(ROOT)} ({layer}) imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_command_line_chooses_an_event_loop(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(path)} & ONLY_CLI
    assert not used or layer_of(path) == "cli", f"{path.relative_to(ROOT)} imports {', '.join(used)}"
