"""One pair of the benchmark as inline SVG: each method's recovery with its interval, beside the controls.

It takes its colours from the page's CSS variables, so that it follows light and dark.
"""

from __future__ import annotations

from html import escape

from regraft.report import depth
from regraft.report.bench_schema import BenchPair, BenchRow
from regraft.report.schema import Interval

_WIDTH, _LEFT, _RIGHT, _ROW, _HEAD, _FOOT = 960.0, 236.0, 196.0, 22.0, 46.0, 26.0
_PLOT = _WIDTH - _LEFT - _RIGHT
#: Wider than this nothing is told apart any more: what lies beyond is drawn at the edge, as a triangle.
_LOWEST, _HIGHEST = -1.0, 1.5
#: Said by lines, or equal to another row by what they are.
_NO_ROWS = ("none", "empty", "native", "reverted", "old")


class _Axis:
    def __init__(self, rows: list[BenchRow]) -> None:
        ends = [v for row in rows for v in (row.recovery.low, row.recovery.high, row.recovery.mean) if v is not None]
        self.low = max(_LOWEST, min([-0.1, *ends]) - 0.03)
        self.high = min(_HIGHEST, max([1.06, *ends]) + 0.03)

    def at(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return _LEFT + _PLOT * (inside - self.low) / (self.high - self.low)

    def beyond(self, value: float) -> bool:
        return not self.low <= value <= self.high


def drawn_rows(pair: BenchPair) -> list[BenchRow]:
    """The rows that have a line of their own: controls first, then methods from best to worst, then the others."""
    rows = [row for row in pair.rows if row.name not in _NO_ROWS]
    controls = [row for row in rows if row.kind == "control"]
    methods = [row for row in rows if row.kind == "method"]
    known = [row for row in methods if row.recovery.mean is not None]
    known.sort(key=lambda row: -(row.recovery.mean or 0.0))
    return controls + known + [row for row in methods if row.recovery.mean is None]


def draw_pair(pair: BenchPair) -> str:
    """The pair's chart."""
    rows = drawn_rows(pair)
    axis = _Axis([*rows, *(row for row in pair.rows if row.name in ("native", "reverted"))])
    bottom = _HEAD + _ROW * len(rows)
    key = f"pair-{pair.name}"
    shapes = [_grid(axis, bottom), _references(pair, axis, bottom), _heads()]
    shapes += [_row(pair, row, axis, _HEAD + _ROW * (i + 0.5)) for i, row in enumerate(rows)]
    told = ", ".join(f"{row.name} {row.recovery.mean:.2f}" for row in rows if row.recovery.mean is not None)
    return (
        f'<svg id="{escape(key)}" class="chart bench" viewBox="0 0 {_WIDTH:.0f} {bottom + _FOOT:.0f}" role="img" '
        f'aria-labelledby="{escape(key)}-t {escape(key)}-d"><title id="{escape(key)}-t">Recovery on '
        f'{escape(pair.name)}</title><desc id="{escape(key)}-d">{escape(told)}</desc>{"".join(shapes)}</svg>'
    )


def _text(x: float, y: float, words: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _grid(axis: _Axis, bottom: float) -> str:
    ticks = [tick / 4 for tick in range(int(4 * _LOWEST), int(4 * _HIGHEST) + 1) if not axis.beyond(tick / 4)]
    shapes = []
    for tick in ticks:
        x = axis.at(tick)
        shapes += [_line(x, _HEAD, x, bottom, "grid"), _text(x, bottom + 16, f"{tick:g}".replace("-", "−"), "mid")]
    return "".join(shapes)


def _references(pair: BenchPair, axis: _Axis, bottom: float) -> str:
    """Vertical lines: the new base alone, the copy, the native adapter, the teacher; names that collide go up a row."""
    found = {row.name: row.recovery.mean for row in pair.rows}
    marks = [("none", 0.0, "at"), ("native", 1.0, "at")]
    for name, label in (("copy", "copy"), ("reverted", "teacher")):
        value = found.get(name)
        if value is not None:
            marks.append((label, value, label))
    shapes, ends = [], [-99.0, -99.0, -99.0]
    for label, value, style in sorted(marks, key=lambda mark: mark[1]):
        x, half = axis.at(value), 3.4 * len(label) + 3
        level = next((i for i, end in enumerate(ends) if x - half > end), 2)
        ends[level] = x + half
        shapes += [_line(x, _HEAD - 4, x, bottom, f"ref {style}"), _text(x, _HEAD - 8 - 12 * level, label, "mid")]
    return "".join(shapes)


def _heads() -> str:
    right = _WIDTH - _RIGHT
    return "".join(
        _text(right + x, _HEAD - 8, words, "end")
        for x, words in ((62.0, "recovery"), (130.0, "retention"), (190.0, "seconds"))
    )


def _row(pair: BenchPair, row: BenchRow, axis: _Axis, y: float) -> str:
    right = _WIDTH - _RIGHT
    shapes = [
        f'<rect class="hit" x="0" y="{y - _ROW / 2:.1f}" width="{_WIDTH:.0f}" height="{_ROW:.0f}"/>',
        _text(_LEFT - 12, y + 4, _short(row.name), "end name"),
    ]
    mean, low, high = row.recovery.mean, row.recovery.low, row.recovery.high
    style = tone(row)
    if mean is None or low is None or high is None:
        why = "could not be carried" if row.missing else row.recovery.reason or "not defined"
        shapes.append(_text(axis.at(0.0) + 8, y + 4, why, "gone"))
    else:
        shapes.append(_line(axis.at(low), y, axis.at(high), y, f"span {style}"))
        shapes += [_line(axis.at(v), y - 5, axis.at(v), y + 5, f"one {style}") for v in _each(pair, row.name)]
        shapes.append(_dot(axis, mean, y, style, hollow=row.refused))
    figures = ((62.0, _figure(row.recovery)), (130.0, _figure(row.retention)), (190.0, _seconds(row.seconds)))
    shapes += [_text(right + x, y + 4, words, "end") for x, words in figures]
    return f'<g class="mark"><title>{escape(_words(pair, row))}</title>{"".join(shapes)}</g>'


def _dot(axis: _Axis, mean: float, y: float, style: str, *, hollow: bool) -> str:
    x, ring = axis.at(mean), " hollow" if hollow else ""
    if axis.beyond(mean):
        side = 1 if mean > axis.high else -1
        points = f"{x + 6 * side:.1f},{y:.1f} {x - 4 * side:.1f},{y - 5:.1f} {x - 4 * side:.1f},{y + 5:.1f}"
        return f'<polygon class="dot {style}{ring}" points="{points}"/>'
    return f'<circle class="dot {style}{ring}" cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>'


def tone(row: BenchRow) -> str:
    """``control``, ``beats`` or ``loses`` (to the copy, with the whole interval), or ``even``."""
    if row.kind == "control":
        return "control"
    low, high = row.versus_copy.low, row.versus_copy.high
    if low is None or high is None:
        return "even"
    return "loses" if high < 0 else "beats" if low > 0 else "even"


def _each(pair: BenchPair, name: str) -> list[float]:
    """The row's recovery on each adapter."""
    found = [row.recovery.mean for adapter in pair.adapters for row in adapter.rows if row.name == name]
    return [value for value in found if value is not None]


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"{name[:33]}…"


def _figure(value: Interval) -> str:
    return depth.number(value.mean).replace("-", "−")


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _words(pair: BenchPair, row: BenchRow) -> str:
    """The hover text of one row."""
    lines = [row.name + (f" → {row.used}" if row.used and row.used not in row.name else "")]
    parts = {"recovery": row.recovery, "less the copy's": row.versus_copy, "share of the teacher": row.teacher_share}
    for label, value in (parts | {"retention": row.retention}).items():
        if value.mean is not None and value.low is not None and value.high is not None:
            lines.append(f"{label} {value.mean:.3f} [{value.low:.2f}, {value.high:.2f}]")
    for adapter in pair.adapters:
        mine = next((one for one in adapter.rows if one.name == row.name), None)
        if mine is not None and mine.recovery.mean is not None:
            lines.append(f"  {adapter.name}: {mine.recovery.mean:.3f}")
    return "\n".join([*lines, *(["refused: forced here"] if row.refused else []), *row.errors[:2]])
