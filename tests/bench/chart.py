# SPDX-License-Identifier: BSD-3-Clause
"""Bars of what was measured, as SVG: a group a measure, in it for each name a bar to the median and a line from min to max."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Group", "bars"]

COLOURS = ("#8c8c8c", "#bdbdbd", "#1f77b4", "#2ca02c", "#d99a2b")
LEFT, WIDTH, BAR, GAP, TOP = 300, 460, 12, 14, 40  # pixels: titles, the longest line, a bar, between groups, the legend


class Group(NamedTuple):
    """values: of each round, by name. Each group has a scale of its own: ``unit`` says of what."""

    title: str
    unit: str
    values: Mapping[str, Sequence[float]]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'


def bars(groups: Sequence[Group], names: Sequence[str], heading: str) -> str:
    """The picture. A name has the same colour in every group."""
    colour = dict(zip(names, COLOURS, strict=False))
    shapes, y = [], float(TOP + GAP)
    for group in groups:
        present = [name for name in names if name in group.values]
        scale = WIDTH / max(max(group.values[name]) for name in present)
        shapes.append(_text(LEFT - 10, y + len(present) * BAR / 2 + 4, f"{group.title}, {group.unit}", "end"))
        for name in present:
            values = group.values[name]
            least, middle, most = min(values) * scale, statistics.median(values) * scale, max(values) * scale
            line = y + BAR / 2 - 0.5
            shapes += [
                f'<rect x="{LEFT}" y="{y:.0f}" width="{middle:.1f}" height="{BAR - 1}" fill="{colour[name]}"/>',
                f'<path d="M{LEFT + least:.1f} {line}H{LEFT + most:.1f}" stroke="#222" stroke-width="1"/>',
                _text(LEFT + most + 5, y + BAR - 2, f"{statistics.median(values):.3g}"),
            ]
            y += BAR
        y += GAP
    legend, x = [], float(LEFT)
    for name in names:
        legend.append(f'<rect x="{x:.0f}" y="{TOP - 14}" width="10" height="10" fill="{colour[name]}"/>')
        legend.append(_text(x + 14, TOP - 5, name))
        x += 30 + 7 * len(name)
    size = f'width="{LEFT + WIDTH + 60}" height="{y:.0f}"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>', _text(10, 16, heading), *legend, *shapes, "</svg>", "",
    ])  # fmt: skip
