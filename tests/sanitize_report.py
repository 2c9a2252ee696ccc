# SPDX-License-Identifier: BSD-3-Clause
"""What the sanitizers wrote during tests/sanitize, and which of it is news: ``sanitize_report.py FOLDER`` with log.* in it.

Every error and every data race is news. A leak is when our C made the allocation, that is, when one of the first frames below
the allocator is ours: what Python allocated on our behalf it also frees, or keeps until its end.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

# as the extension's debug information has it; test programs that die on purpose have none
OURS = re.compile(r"\bcsrc/(core|engine)/")
START = re.compile(r"^(==\d+==ERROR: |WARNING: ThreadSanitizer|(Direct|Indirect) leak of|.*: runtime error: )", re.MULTILINE)
FRAME = re.compile(r"^\s*#(\d+) .*$", re.MULTILINE)


def records(text: str) -> list[str]:
    """One text for each thing that a sanitizer reports."""
    starts = [match.start() for match in START.finditer(text)] + [len(text)]
    return [text[a:b] for a, b in itertools.pairwise(starts)]


def is_news(record: str) -> bool:
    if "ERROR: LeakSanitizer" in record:
        return False  # the heading of the leaks that follow it
    frames = [match[0] for match in FRAME.finditer(record)]
    if " leak of " in record:
        return any(OURS.search(frame) for frame in frames[1:3])  # below malloc, calloc, realloc
    return True


def main(folder: Path) -> int:
    found = [(path, record) for path in sorted(folder.glob("log.*")) for record in records(path.read_text(errors="replace"))]
    news = [(path, record) for path, record in found if is_news(record)]
    for path, record in news[:20]:
        print(f"{path}:\n{record.rstrip()}\n", file=sys.stderr)
    print(f"sanitizers: {len(news)} findings; {len(found) - len(news)} records of what Python keeps until it ends")
    return 1 if news else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
