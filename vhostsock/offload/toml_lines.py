"""Where a table or a key stands in a TOML file.

tomllib gives values without positions, and an error without a line is half an error. This scan finds the lines only: it
runs after tomllib accepted the text, so it need not judge syntax. It blanks strings and comments, then notes each table header
and each ``key =``. A key in an inline table counts for the table that the line belongs to. Multi-line strings may add lines
that are no keys; the worst that follows is the line of the table instead of that of the key.
"""

from __future__ import annotations

import re

__all__ = ["Lines"]

_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|\'[^\']*\'|#.*')
_HEADER = re.compile(r"\s*\[\[?\s*([A-Za-z0-9_.\-\s]+?)\s*\]\]?\s*$")
_KEY = re.compile(r"""(?:^|[{,])\s*([A-Za-z0-9_-]+(?:\s*\.\s*[A-Za-z0-9_-]+)*)\s*=""")


class Lines:
    """Line numbers (from 1) of the tables and keys of ``text``."""

    def __init__(self, text: str) -> None:
        self._tables: dict[tuple[str, int], int] = {}
        self._keys: dict[tuple[str, int, str], int] = {}
        table, number = "", 0
        counts: dict[str, int] = {}
        for lineno, line in enumerate(text.splitlines(), 1):
            code = _STRING_OR_COMMENT.sub(lambda m: "" if m[0].startswith("#") else '""', line)
            header = _HEADER.match(code)
            if header:
                name = re.sub(r"\s", "", header[1])
                if code.lstrip().startswith("[["):
                    counts[name] = counts.get(name, 0) + 1
                    table, number = name, counts[name]
                else:  # [rule.match] continues the rule above it
                    table, *inner = name.split(".")
                    number = counts.get(table, 0)
                    for part in inner:
                        self._keys.setdefault((table, number, part), lineno)
                self._tables.setdefault((table, number), lineno)
                continue
            for key in _KEY.finditer(code):
                for part in re.split(r"\s*\.\s*", key[1]):
                    self._keys.setdefault((table, number, part), lineno)

    def of(self, table: str, number: int, key: str | None = None) -> int:
        """The line of ``key`` in the ``number``-th (from 1) ``[[table]]``, else that of the table, else 1. The top level is
        ``table`` "" with ``number`` 0."""
        line = self._keys.get((table, number, key)) if key is not None else None
        return line or self._tables.get((table, number), 1)
