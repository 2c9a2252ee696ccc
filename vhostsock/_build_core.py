"""cffi builder of ``vhostsock._core``: the virtqueue core and the data-plane engine as one extension module.

Every declaration comes from the C headers themselves (the text between their "cdef begin" and "cdef end" marks), so that Python
and C cannot drift. ``VHOSTSOCK_CFLAGS`` adds compiler flags, for example sanitizers.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# in this order: a header may use what an earlier one declares
HEADERS = [
    "include/vso_abi.h", "include/vsock_abi.h", "core/vs_mem.h", "core/vs_iotlb.h", "core/vs_uffd.h", "core/vs_vq.h",
    "core/vs_io.h", "engine/vs_engine.h",
]  # fmt: skip
PRELUDE = """
typedef uint16_t vso_le16;
typedef uint32_t vso_le32;
typedef uint64_t vso_le64;
typedef uint16_t vsk_le16;
typedef uint32_t vsk_le32;
typedef uint64_t vsk_le64;
struct iovec { void *iov_base; size_t iov_len; };
"""


def cdef_of(header: Path) -> str:
    """The declarations of one header: what stands between its cdef marks."""
    parts = re.findall(r"/\* cdef begin \*/(.*?)/\* cdef end \*/", header.read_text(), re.DOTALL)
    if not parts:
        raise RuntimeError(f"{header}: no '/* cdef begin */ ... /* cdef end */' part")
    return "".join(parts)


ffibuilder = FFI()
# a header whose directory has no C file declares nothing that could be linked (a source tree with the core alone)
present = [h for h in HEADERS if h.startswith("include/") or any((CSRC / h).parent.glob("*.c"))]
ffibuilder.cdef(PRELUDE)
for _header in present:
    # as its own #pragma says it to C
    ffibuilder.cdef(cdef_of(CSRC / _header), packed="#pragma pack(push, 1)" in (CSRC / _header).read_text())
ffibuilder.set_source(
    "vhostsock._core",
    "#include <sys/uio.h>\n" + "".join(f'#include "{h}"\n' for h in present),
    # relative to setup.py, as setuptools wants them in an sdist
    sources=sorted(str(p.relative_to(ROOT)) for d in ("core", "engine") for p in (CSRC / d).glob("*.c")),
    depends=sorted(str(p.relative_to(ROOT)) for p in CSRC.glob("*/*.h")),
    define_macros=[("_GNU_SOURCE", "1")],
    include_dirs=["csrc", "csrc/include", "csrc/core", "csrc/engine"],
    extra_compile_args=[
        "-std=gnu11", "-O2", "-g", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter",
        "-Wno-missing-field-initializers", *shlex.split(os.environ.get("VHOSTSOCK_CFLAGS", "")),
    ],
    extra_link_args=["-pthread", *shlex.split(os.environ.get("VHOSTSOCK_CFLAGS", ""))],
)
