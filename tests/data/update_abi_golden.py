"""Write abi-golden.hex from abi-golden.json. See README.md here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]

from abi_golden import HEX, entries, message_of  # noqa: E402

if __name__ == "__main__":
    HEX.write_text("".join(f"{name} {message_of(entry).pack().hex()}\n" for name, entry in entries().items()))
    print(f"wrote {HEX}")
