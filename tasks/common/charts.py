"""The charts that every run draws, as SVG: a line, bars, a histogram.

matplotlib draws the charts that are seldom asked for. To import it and to draw two takes half a second, which is longer
than many a run scores.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]

INK = "#1f2933"
_STYLE = f'font-family="system-ui,sans-serif" fill="{INK}"'
# The first is that of a chart of one colour.
_COLOURS = ("#2f6f9f", "#d0743c", "#3f8f5f", "#8a6fa8")
_GRID = "#e4e7eb"
_TOP, _BOTTOM, _SIDE = 34, 44, 26
_TICKS_MAX, _MARKS_MAX = 6, 60
_BAR_MAX, _BAR_SHARE = 26.0, 0.7
_CHARACTER_WIDTH = 6.2
# XML has no other characters, not even as references.
_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart of a picture: SVG elements, in pixels from its own upper left corner."""

    width: int
    height: int
    elements: tuple[str, ...]


def arrange_panels(panels: Sequence[Panel], columns: int, heading: str = "") -> bytes:
    """Return a picture of panels in rows of so many, under a heading: an SVG document.

    Args:
        panels: At least one, all of the same height.
        columns: The panels of a row.
        heading: A line above all panels.
    """
    top = 26 if heading else 0
    parts = [_write(8, 18, heading)] if heading else []
    rows = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    for row in rows:
        left = 0
        for panel in row:
            parts += [f'<g transform="translate({left} {top})">', *panel.elements, "</g>"]
            left += panel.width
        top += row[0].height
    width = max(sum(panel.width for panel in row) for row in rows)
    size = f'width="{width}" height="{top}"'
    document = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {top}" {_STYLE}>',
        f'<rect {size} fill="#fff"/>',
        *parts,
        "</svg>",
    )
    return "\n".join(document).encode()


def draw_line(
    title: str, points: Sequence[tuple[float, float]], limit: float, axes: tuple[str, str], width: int, height: int
) -> Panel:
    """Draw a line through points, up to a limit that is a dotted line.

    Args:
        title: What stands above the chart.
        points: At least one, in the order of the line; neither number is negative.
        limit: The largest value of the second axis.
        axes: What is along, and what is upwards.
        width: Of the panel, in pixels.
        height: Of the panel, in pixels.
    """
    left, right, bottom = 84, width - _SIDE, height - _BOTTOM
    most, along = max(limit, 1.0) * 1.05, max(points[-1][0], 1e-3)
    placed = [(left + (right - left) * x / along, bottom - (bottom - _TOP) * min(y / most, 1.0)) for x, y in points]
    marked = placed if len(placed) <= _MARKS_MAX else []
    at_limit = bottom - (bottom - _TOP) * limit / most
    elements = [_write(8, 20, title, size=13)]
    for tick in choose_ticks(0.0, most):
        y = bottom - (bottom - _TOP) * tick / most
        elements += [_rule(left, y, right, y, _GRID), _write(left - 6, y + 4, f"{tick:,.0f}", anchor="end", size=11)]
    for tick in choose_ticks(0.0, along):
        elements.append(
            _write(left + (right - left) * tick / along, bottom + 16, f"{tick:g}", anchor="middle", size=11)
        )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    elements += [
        f'<polyline points="{path}" fill="none" stroke="{_COLOURS[0]}" stroke-width="1.6"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{_COLOURS[0]}"/>' for x, y in marked),
        f'<g stroke-dasharray="2 3">{_rule(left, at_limit, right, at_limit, INK)}</g>',
        _rule(left, bottom, right, bottom, INK),
        _write((left + right) / 2, height - 8, axes[0], anchor="middle", size=11),
        f'<g transform="rotate(-90 14 {(_TOP + bottom) / 2})">',
        _write(14, (_TOP + bottom) / 2, axes[1], anchor="middle", size=11),
        "</g>",
    ]
    return Panel(width=width, height=height, elements=tuple(elements))


def draw_bars(title: str, bars: Sequence[tuple[str, float, str]], note: str, width: int, height: int) -> Panel:
    """Draw horizontal bars, each with its name before it and its value, in words, behind it.

    Args:
        title: What stands above the chart.
        bars: From the top, each with its name, its length, which is not negative, and the words for that.
        note: What stands below the chart.
        width: Of the panel, in pixels.
        height: Of the panel, in pixels.
    """
    left = 14 + max((_estimate_width(name) for name, _, _ in bars), default=0.0)
    long_max = width - _SIDE - left - 8 - max((_estimate_width(words) for _, _, words in bars), default=0.0)
    most = max((length for _, length, _ in bars), default=0.0) or 1.0
    step = (height - _TOP - _BOTTOM) / max(len(bars), 1)
    thick = min(_BAR_MAX, _BAR_SHARE * step)
    elements = [_write(8, 20, title, size=13), _write(left, height - 20, note, size=11)]
    for at, (name, length, words) in enumerate(bars):
        middle, long = _TOP + step * (at + 0.5), long_max * length / most
        elements += [
            _fill(left, middle - thick / 2, long, thick),
            _write(left - 6, middle + 4, name, anchor="end", size=11),
            _write(left + long + 5, middle + 4, words, size=11),
        ]
    return Panel(width=width, height=height, elements=tuple(elements))


def draw_histogram(
    title: str, series: Sequence[tuple[str, Counts]], edges: Numbers, note: str, width: int, height: int
) -> Panel:
    """Draw how often numbers fall between edges: one series as bars, up to four as steps that a legend names.

    Args:
        title: What stands above the chart.
        series: Each with its name and the count of each bin. One alone needs no name.
        edges: Those of the bins, one more than there are bins.
        note: What stands below the chart.
        width: Of the panel, in pixels.
        height: Of the panel, in pixels.
    """
    left, right, bottom = _SIDE, width - _SIDE, height - _BOTTOM
    low, span = float(edges[0]), float(edges[-1] - edges[0])
    most = max(int(counts.max()) for _, counts in series) or 1
    x_edges = np.linspace(left, right, len(edges))
    elements = [_write(8, 20, title, size=13), _write(left, height - 8, note, size=11)]
    for at, (name, counts) in enumerate(series):
        y_bins = bottom - (bottom - _TOP) * counts / most
        # Up, along and down again at each bin, in one path.
        corners = np.column_stack([np.repeat(x_edges, 2)[1:-1], np.repeat(y_bins, 2)])
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(left, bottom), *corners.tolist(), (right, bottom)])
        if len(series) == 1:
            elements.append(f'<polygon points="{path}" fill="{_COLOURS[0]}"/>')
        else:
            elements += [
                f'<polyline points="{path}" fill="none" stroke="{_COLOURS[at]}" stroke-width="1.4"/>',
                f'<g fill="{_COLOURS[at]}">',
                _write(width / 2, _TOP + 10 + 14 * at, name, anchor="middle", size=11),
                "</g>",
            ]
    shown = ""
    for tick in choose_ticks(low, low + span):
        # Neighbours of a large number read alike.
        if f"{tick:.4g}" != shown:
            shown = f"{tick:.4g}"
            x = left + (right - left) * (tick - low) / span
            elements += [_rule(x, bottom, x, bottom + 4, INK), _write(x, bottom + 16, shown, anchor="middle", size=10)]
    elements.append(_rule(left, bottom, right, bottom, INK))
    return Panel(width=width, height=height, elements=tuple(elements))


def choose_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within a range, at most six, one, two or five times a power of ten apart.

    Args:
        low: The start of the range, finite.
        high: Its end, which is larger.
    """
    least = (high - low) / (_TICKS_MAX - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    first = math.ceil(low / step)
    return [tick for tick in ((first + at) * step for at in range(_TICKS_MAX)) if low <= tick <= high]


def _write(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12) -> str:
    shown = escape(_NOT_IN_XML.sub("\ufffd", " ".join(words.split())))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{shown}</text>'


def _estimate_width(words: str) -> float:
    """Return about how many pixels small words take. Characters of East Asia take twice as many as others."""
    return _CHARACTER_WIDTH * sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in words)


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _fill(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{_COLOURS[0]}"/>'
