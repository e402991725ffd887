"""The results as a chart: accuracy against FLOPs and against measured time, a line for every method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pruneops.data.export import write_atomically
from pruneops.evaluation.results import Entry, Results
from pruneops.evaluation.ways import BLANK, DENSE

# The first seven are distinguishable with the common kinds of colour blindness (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
COLOURS += ("#b0a000", "#7f3fbf", "#8b4513", "#7a7f87", "#c2185b")
WIDTH, PLOT_HEIGHT, LEGEND_ROW = 1000, 360, 20
_LEFT, _GAP, _TOP, _PLOT = 64, 76, 44, 412


@dataclass(frozen=True)
class Line:
    """A method of a model: ``points`` are (x, accuracy, lowest, highest), all in per cent."""

    name: str
    colour: str
    dashed: bool
    points: list[tuple[float, float, float, float]]


def draw_chart(results: Results, path: Path) -> None:
    """Write an SVG; nothing is drawn of what has not been asked or timed yet."""
    entries = [entry for entry in results.in_order() if entry.tally.questions]
    rows = sorted({rows for entry in entries for rows in entry.times})
    middle = rows[len(rows) // 2] if rows else None
    panels = [("FLOPs of the prefill, % of the model without pruning", _lines(results, entries, None))]
    if middle is not None:
        title = f"time to the first token at batch {middle}, % of the model without pruning"
        panels.append((title, _lines(results, entries, middle)))
    model = None if results.reference is None else results.reference.model
    floors = [entry for entry in entries if entry.model == model and entry.way in (BLANK, DENSE)]
    levels = [(entry.way, 100 * entry.tally.accuracy) for entry in floors]
    values = [value for _, lines in panels for line in lines for point in line.points for value in point[2:]]
    values += [level for _, level in levels]
    low, high = 10 * math.floor(min(values, default=0) / 10), 10 * math.ceil(max(values, default=100) / 10)
    lines = panels[0][1]
    height = _TOP + PLOT_HEIGHT + 60 + LEGEND_ROW * -(-len(lines) // 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12" fill="#1e2228">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">Exactly right answers, % (bars: 95 % intervals)</text>',
    ]
    for number, (title, drawn) in enumerate(panels):
        left = _LEFT + number * (_PLOT + _GAP)
        parts += _panel(left, title, drawn, levels, low, max(high, low + 10))
    parts += _legend(lines, _TOP + PLOT_HEIGHT + 60)
    parts.append("</svg>")
    write_atomically(path, ("\n".join(parts) + "\n").encode())


def _lines(results: Results, entries: Sequence[Entry], rows: int | None) -> list[Line]:
    """A line for every method; x is the share of FLOPs, or of the time of a batch."""
    grouped: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for entry in entries:
        if entry.way == BLANK:
            continue
        # Every method has a line, and so its colour, in every panel.
        points = grouped.setdefault((entry.model, entry.way), [])
        if rows is None or rows in entry.times:
            x = entry.tally.flop_ratio if rows is None else entry.times[rows]["first_token_ratio"]
            points.append((100 * x, 100 * entry.tally.accuracy, *(100 * end for end in entry.tally.interval)))
    lines, several = [], len(results.models) > 1
    for number, ((model, way), points) in enumerate(grouped.items()):
        name = results.shown_way(model, way)
        dashed = way.startswith("random")
        colour = COLOURS[number % len(COLOURS)]
        lines.append(Line(f"{model}: {name}" if several else name, colour, dashed, sorted(points)))
    return lines


def _panel(
    left: int, title: str, lines: Sequence[Line], levels: Sequence[tuple[str, float]], low: int, high: int
) -> Iterator[str]:
    bottom, right = _TOP + PLOT_HEIGHT, left + _PLOT
    largest = max([100.0, *(point[0] for line in lines for point in line.points)])

    def at(x: float, y: float) -> tuple[float, float]:
        return left + _PLOT * x / (1.05 * largest), bottom - PLOT_HEIGHT * (y - low) / (high - low)

    for tick in range(low, high + 1, 10):
        y = at(0, tick)[1]
        yield f'<path d="M{left} {y:.1f}H{right}" stroke="#e2e4e8"/>'
        yield f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>'
    for tick in range(0, int(1.05 * largest) + 1, 20):
        x = at(tick, low)[0]
        yield f'<path d="M{x:.1f} {bottom}v5" stroke="#1e2228"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{tick}</text>'
    yield f'<path d="M{left} {_TOP}V{bottom}H{right}" fill="none" stroke="#1e2228"/>'
    yield f'<text x="{left + _PLOT / 2}" y="{bottom + 39}" text-anchor="middle">{escape(title)}</text>'
    for way, level in levels:
        y = at(0, level)[1]
        yield f'<path d="M{left} {y:.1f}H{right}" stroke="#696f7a" stroke-dasharray="2 4"/>'
        yield f'<text x="{left + 4}" y="{y - 4:.1f}" fill="#696f7a">{way}</text>'
    for line in lines:
        places = [(at(x, y), at(x, low_end)[1], at(x, high_end)[1]) for x, y, low_end, high_end in line.points]
        dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _, _ in places)
        yield f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.6"{dashes}/>'
        for (x, y), lowest, highest in places:
            yield f'<path d="M{x:.1f} {lowest:.1f}V{highest:.1f}" stroke="{line.colour}" stroke-opacity="0.5"/>'
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{line.colour}"/>'


def _legend(lines: Sequence[Line], top: int) -> Iterator[str]:
    for number, line in enumerate(lines):
        x, y = _LEFT + number % 3 * 310, top + number // 3 * LEGEND_ROW
        dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
        yield f'<path d="M{x} {y}h24" stroke="{line.colour}" stroke-width="1.6"{dashes}/>'
        yield f'<circle cx="{x + 12}" cy="{y}" r="3.2" fill="{line.colour}"/>'
        yield f'<text x="{x + 32}" y="{y + 4}">{escape(line.name)}</text>'
