"""Write abi-golden.hex from abi-golden.json: ``python -m tests.data.update_abi_golden``. See README.md here."""

from __future__ import annotations

from .abi_golden import HEX, entries, message_of

if __name__ == "__main__":
    HEX.write_text("".join(f"{name} {message_of(entry).pack().hex()}\n" for name, entry in entries().items()))
    print(f"wrote {HEX}")
