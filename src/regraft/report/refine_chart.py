"""The course of a refine as inline SVG: the share recovered and the drift, over steps and seconds.

It takes its colours from the page's CSS variables, so that it follows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from regraft.report.depth import number, percent
from regraft.report.refine_schema import RefineLook, RefineReport

_WIDTH, _LEFT, _RIGHT = 960.0, 56.0, 24.0
_PLOT = _WIDTH - _LEFT - _RIGHT
_GAINED, _DRIFT, _HEAD, _BETWEEN, _FOOT = 190.0, 84.0, 34.0, 46.0, 44.0
#: A start can be worse than nothing by any measure; what lies lower is drawn at the edge, as a triangle.
_LOWEST = -0.5
# Labels under the axis stand at least this far apart.
_APART = 70.0


class _Lane:
    """One plot of the two: its place on the picture, and the values at its ends."""

    def __init__(self, top: float, height: float, low: float, high: float) -> None:
        self.top, self.height, self.low, self.high = top, height, low, high

    def at(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.top + self.height * (self.high - inside) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def draw_course(report: RefineReport) -> str:
    """The chart of a refine that is done."""
    return draw_looks(report.looks, report.steps)


def draw_looks(taken: Sequence[RefineLook], kept: int | None = None) -> str:
    """The chart; empty where there are fewer than two looks, as after a start that had all that is wanted.

    Args:
        taken: all looks until now.
        kept: the step whose numbers are kept, once that is known.
    """
    looks = [look for look in taken if math.isfinite(look.recovered)]
    if len(looks) < 2:
        return ""
    drifts = [look.drift for look in looks if look.drift is not None]
    last = max(look.step for look in looks)
    x = {look.step: _LEFT + _PLOT * look.step / last for look in looks}
    gained = _gained_lane(looks)
    bottom = gained.top + gained.height
    shapes = [_gained(gained, looks, x)]
    if drifts:
        lane = _Lane(bottom + _BETWEEN, _DRIFT, 0.0, max(1.0, *drifts) * 1.04)
        shapes.append(_drift(lane, looks, x))
        bottom = lane.top + lane.height
    shapes = [_kept_line(kept, x, bottom), *shapes, _ticks(looks, x, bottom)]
    told = "; ".join(_words(look) for look in looks)
    return (
        f'<svg id="course" class="chart course" viewBox="0 0 {_WIDTH:.0f} {bottom + _FOOT:.0f}" role="img" '
        'aria-labelledby="course-t course-d"><title id="course-t">Recovered share over the steps</title>'
        f'<desc id="course-d">{escape(told)}</desc>{"".join(shapes)}</svg>'
    )


def _gained_lane(looks: Sequence[RefineLook]) -> _Lane:
    low = max(_LOWEST, min(0.0, *(look.recovered for look in looks)))
    return _Lane(_HEAD, _GAINED, low, 1.0)


def _gained(lane: _Lane, looks: Sequence[RefineLook], x: dict[int, float]) -> str:
    levels = [tick / 4 for tick in range(-2, 5) if lane.holds(tick / 4)]
    rows = [_text(_LEFT, lane.top - 12, "Share of what is wanted, on held-out inputs", "lane")]
    rows += [_level(lane, value, f"{100 * value:.0f} %".replace("-", "−")) for value in levels]
    points = [(x[look.step], lane.at(look.recovered)) for look in looks]
    rows.append(_path(points, "gained"))
    for look, (at, height) in zip(looks, points, strict=True):
        mark = (
            f'<circle class="gained-dot" cx="{at:.1f}" cy="{height:.1f}" r="4"/>'
            if lane.holds(look.recovered)
            else f'<path class="gained-dot" d="M{at - 5:.1f} {height - 8:.1f}h10l-5 8z"/>'
        )
        rows.append(_mark(look, mark))
    return "".join(rows)


def _drift(lane: _Lane, looks: Sequence[RefineLook], x: dict[int, float]) -> str:
    rows = [_text(_LEFT, lane.top - 9, "Drift on the new base's own inputs", "lane")]
    rows += [_level(lane, value, f"{value:g}") for value in (0.0, 1.0)]
    known = [(look, x[look.step], lane.at(look.drift)) for look in looks if look.drift is not None]
    rows.append(_path([(at, height) for _, at, height in known], "drifted"))
    for look, at, y in known:
        points = f"{at:.1f},{y - 5:.1f} {at + 5:.1f},{y:.1f} {at:.1f},{y + 5:.1f} {at - 5:.1f},{y:.1f}"
        rows.append(_mark(look, f'<polygon class="drift-dot" points="{points}"/>'))
    return "".join(rows)


def _kept_line(kept: int | None, x: dict[int, float], bottom: float) -> str:
    """Where the numbers were taken that are kept."""
    if kept is None or kept not in x:
        return ""
    at = x[kept]
    end = "end" if at > _WIDTH / 2 else "start"
    label = _text(at + (-6 if end == "end" else 6), _HEAD - 12, "kept", f"kept-word {end}-at")
    return f'<line class="kept-line" x1="{at:.1f}" y1="{_HEAD - 22:.1f}" x2="{at:.1f}" y2="{bottom:.1f}"/>{label}'


def _ticks(looks: Sequence[RefineLook], x: dict[int, float], bottom: float) -> str:
    """Steps and seconds of the looks, as many as have room; the last one always."""
    rows = [_text(_LEFT - 10, bottom + 18, "step", "end"), _text(_LEFT - 10, bottom + 34, "s", "end")]
    shown: list[RefineLook] = []
    for look in looks[:-1]:
        if x[looks[-1].step] - x[look.step] >= _APART and (not shown or x[look.step] - x[shown[-1].step] >= _APART):
            shown.append(look)
    for look in [*shown, looks[-1]]:
        rows += [
            _text(x[look.step], bottom + 18, str(look.step), "mid"),
            _text(x[look.step], bottom + 34, f"{look.seconds:.0f}", "mid"),
        ]
    return "".join(rows)


def _words(look: RefineLook) -> str:
    drift = "" if look.drift is None else f", drift {number(look.drift)}"
    return f"step {look.step}, {look.seconds:.0f} s: {percent(look.recovered)}{drift}"


def _mark(look: RefineLook, shape: str) -> str:
    return f'<g class="mark"><title>{escape(_words(look))}</title>{shape}</g>'


def _level(lane: _Lane, value: float, label: str) -> str:
    y = lane.at(value)
    line = f'<line class="grid" x1="{_LEFT:.1f}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT:.1f}" y2="{y:.1f}"/>'
    return line + _text(_LEFT - 10, y + 3.5, label, "end")


def _path(points: Sequence[tuple[float, float]], style: str) -> str:
    return f'<polyline class="{style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _text(x: float, y: float, words: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'
