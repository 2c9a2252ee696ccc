# SPDX-License-Identifier: BSD-3-Clause
"""Figures as an SVG of bars: a panel for each row of a table, a bar for each that is compared, from zero to the median.

A line across the end of a bar leads from the least of the rounds to the most. Each panel has a scale of its own, and says
which way is better. No script, no font of its own: as any browser, and a Markdown page, shows it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

__all__ = ["Bar", "Panel", "drawn"]

PANEL, GAP, MARGIN = 430, 30, 16  # widths, in pixels
LABEL, NUMBER = 150, 60  # of a panel's: left of the bars, and right of them
BAR, STEP, HEAD = 13, 19, 40  # heights: of a bar, from bar to bar, above the first
OURS, OTHERS, INK, PALE = "#1f6feb", "#9aa4af", "#1f2328", "#59636e"


class Bar(NamedTuple):
    """``values``: one for each round; none if there is nothing to show. ``ours``: it stands out."""

    label: str
    values: Sequence[float]
    ours: bool = False


class Panel(NamedTuple):
    """``form``: of the number at a bar's end. ``less``: that is better."""

    title: str
    form: str
    bars: Sequence[Bar]
    less: bool = False


def _text(
    x: float, y: float, words: str, *, colour: str = INK, anchor: str = "start", size: int = 11, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{colour}"{weight}>{escape(words)}</text>'


def _height(panel: Panel) -> int:
    return HEAD + STEP * len(panel.bars) + 14


def _panel(panel: Panel, left: float, top: float) -> list[str]:
    most = max((max(bar.values) for bar in panel.bars if bar.values), default=0) or 1.0
    wide = PANEL - LABEL - NUMBER
    better = "less is better" if panel.less else "more is better"
    lines = [
        _text(left, top + 14, panel.title, size=12, bold=True),
        _text(left, top + 29, better, colour=PALE, size=10),
        f'<path d="M{left + LABEL:.1f} {top + HEAD - 3}v{STEP * len(panel.bars):.1f}" stroke="{PALE}" stroke-width="1"/>',
    ]
    for number, bar in enumerate(panel.bars):
        y = top + HEAD + STEP * number
        lines.append(_text(left + LABEL - 6, y + BAR - 2, bar.label, anchor="end", bold=bar.ours))
        if not bar.values:
            lines.append(_text(left + LABEL + 6, y + BAR - 2, "-", colour=PALE))
            continue
        start = left + LABEL
        low, middle, high = (value / most * wide for value in (min(bar.values), statistics.median(bar.values), max(bar.values)))
        colour = OURS if bar.ours else OTHERS
        lines += [
            f'<rect x="{start:.1f}" y="{y:.1f}" width="{max(middle, 0.5):.1f}" height="{BAR}" fill="{colour}"/>',
            f'<path d="M{start + low:.1f} {y + BAR / 2:.1f}H{start + high:.1f}" stroke="{INK}" stroke-width="1.2"/>',
            _text(start + max(middle, high) + 5, y + BAR - 2, format(statistics.median(bar.values), panel.form)),
        ]
    return lines


def drawn(panels: Sequence[Panel], columns: int = 2) -> str:
    """The SVG; rows of ``columns`` panels."""
    wide = 2 * MARGIN + columns * PANEL + (columns - 1) * GAP
    top, lines = float(MARGIN), []
    for first in range(0, len(panels), columns):
        row = panels[first : first + columns]
        for number, panel in enumerate(row):
            lines += _panel(panel, MARGIN + number * (PANEL + GAP), top)
        top += max(map(_height, row))
    size = f'width="{wide}" height="{top + MARGIN:.0f}" viewBox="0 0 {wide} {top + MARGIN:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *lines, "</svg>"]) + "\n"
