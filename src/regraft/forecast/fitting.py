"""Fit the forecast on measured ports, and judge it on pairs that it has not seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from regraft.forecast.curve import Array, Curve, fit_curve, interval, width_that_holds
from regraft.forecast.features import BELIEF, LEAST_WEIGHT
from regraft.forecast.rows import Row, Table

#: Share of held-out ports whose recovery the interval is to hold.
LEVEL = 0.9
# Distances are measured in each figure's range over the rows, and in this where no row shows any of it.
_SPAN = 0.2


@dataclass(frozen=True)
class Held:
    """A forecast for one row, made without its pair.

    Attributes:
        row: the row.
        measured: its recovery, within the bounds.
        expected: the forecast.
        low, high: its interval, with a width from the other pairs alone.
    """

    row: Row
    measured: float
    expected: float
    low: float
    high: float


@dataclass(frozen=True)
class Fitted:
    """A curve with the width of its intervals.

    Attributes:
        curve: fitted on all rows.
        width: λ of an interval amid the rows.
        spans: per figure, the range over rows, in which distances are measured.
        near: a distance that is usual from one pair to the nearest other one.
        pairs: number of pairs.
        adapters: number of rows' adapters.
    """

    curve: Curve
    width: float
    spans: tuple[float, ...]
    near: float
    pairs: int
    adapters: int

    def novelty(self, point: Array, table: Table) -> float:
        """How much farther than usual a point lies from the nearest row; 0 amid them."""
        return _novelty(point, table.figures, np.array(self.spans), self.near)

    def interval(self, point: Array, table: Table) -> tuple[float, float]:
        """Least and most recovery of a point, wider away from the rows that the curve was fitted on.

        More damage than any row shows is nothing to hope from: the top is never above that of the same point with each
        figure cut to the most that was measured.
        """
        low, high = self._around(point, table)
        measured = np.minimum(point, table.figures.max(axis=0, initial=0.0))
        return low, min(high, self._around(measured, table)[1])

    def _around(self, point: Array, table: Table) -> tuple[float, float]:
        damage = self.curve.damage(dict(zip(self.curve.names, map(float, point), strict=True)))
        return interval(damage, self.width * (1 + self.novelty(point, table)))


def fit(rows: Iterable[Row], way: str, names: Sequence[str], *, offset: bool = False) -> Fitted:
    """Fit on all rows that have this recovery; λ is a quantile over pairs held out one by one (jackknife+ over pairs).

    Args:
        rows: measured ports.
        way: whose recovery.
        names: of the figures to go by.
        offset: whether some damage is done where no figure shows any.
    """
    return fit_table(Table.of(rows, way, names), names, offset=offset)


def fit_table(table: Table, names: Sequence[str], *, offset: bool = False) -> Fitted:
    """See `fit`."""
    importance = table.importance
    spans = np.maximum(np.ptp(_places(table.figures), axis=0), _SPAN) if len(table.rows) else np.ones(len(names))
    nearest = [
        _nearest(x, table.without(pair).figures, spans) for x, pair in zip(table.figures, table.pairs, strict=True)
    ]
    known = [d for d in nearest if np.isfinite(d)]
    near = float(np.median(known)) if known else 1.0
    scores = np.zeros(len(table.rows))
    for pair in dict.fromkeys(table.pairs):
        rest, mine = table.without(pair), np.array([name == pair for name in table.pairs])
        if not rest.rows:
            scores[mine] = 1.0
            continue
        curve = _curve(rest, names, offset)
        for i in np.flatnonzero(mine):
            damage = curve.damage(dict(zip(names, table.figures[i], strict=True)))
            width = width_that_holds(damage, float(table.recoveries[i]))
            scores[i] = width / (1 + _novelty(table.figures[i], rest.figures, spans, near))
    curve = _curve(table, names, offset)
    adapters = {(row.pair, row.adapter) for row in table.rows}
    width = _quantile(scores, importance, len(set(table.pairs)))
    return Fitted(curve, width, tuple(map(float, spans)), near, len(set(table.pairs)), len(adapters))


def _curve(table: Table, names: Sequence[str], offset: bool) -> Curve:
    return fit_curve(
        names,
        table.figures,
        table.recoveries,
        table.importance,
        belief=BELIEF,
        least=LEAST_WEIGHT,
        offset=offset,
    )


def leave_one_pair_out(rows: Iterable[Row], way: str, names: Sequence[str], *, offset: bool = False) -> list[Held]:
    """Each pair's forecasts from the other pairs alone: curve, width and distances know nothing of it."""
    table = Table.of(rows, way, names)
    held = []
    for pair in dict.fromkeys(table.pairs):
        rest, mine = table.without(pair), table.only(pair)
        fitted = fit_table(rest, names, offset=offset)
        for row, point, measured in zip(mine.rows, mine.figures, mine.recoveries, strict=True):
            low, high = fitted.interval(point, rest)
            held.append(Held(row, float(measured), fitted.curve.recovery(row.figures), low, high))
    return held


@dataclass(frozen=True)
class Score:
    """How good held-out forecasts are.

    Attributes:
        pairs, adapters: that were held out, one pair at a time.
        spearman: rank correlation of forecast and measured recovery.
        error: mean absolute error.
        held: share of measured recoveries within their intervals.
        refusals: share of adapters on whose refusal the forecast was right: refused where less than the floor was
            recovered, and not refused where the floor or more was.
        wrongly_refused: share of adapters that were refused, and recovered the floor or more.
    """

    pairs: int
    adapters: int
    spearman: float
    error: float
    held: float
    refusals: float
    wrongly_refused: float


def score(held: Sequence[Held], floor: float) -> Score:
    """Figures over pair × adapter."""
    from scipy.stats import spearmanr

    measured, expected = np.array([h.measured for h in held]), np.array([h.expected for h in held])
    tops = np.array([h.high for h in held])
    refused, lost = tops < floor, measured < floor
    return Score(
        pairs=len({h.row.pair for h in held}),
        adapters=len(held),
        spearman=float(spearmanr(expected, measured).statistic),
        error=float(np.abs(expected - measured).mean()),
        held=float(np.mean([h.low <= h.measured <= h.high for h in held])),
        refusals=float((refused == lost).mean()),
        wrongly_refused=float((refused & ~lost).mean()),
    )


def _nearest(point: Array, figures: Array, spans: Array) -> float:
    if not len(figures):
        return float("inf")
    away = (_places(figures) - _places(point)) / spans
    return float(np.sqrt((away**2).sum(axis=1)).min()) / sqrt(len(spans))


def _places(figures: Array) -> Array:
    """Where figures lie between none and without end: beyond some, more of it is nothing new."""
    return figures / (1 + figures)


def _novelty(point: Array, figures: Array, spans: Array, near: float) -> float:
    distance = _nearest(point, figures, spans)
    # Without any row to compare with, the widest that a forecast gets.
    return max(0.0, distance - near) / max(near, 0.05) if np.isfinite(distance) else 10.0


def _quantile(scores: Array, importance: Array, pairs: int) -> float:
    """The `LEVEL` quantile of scores in which each pair counts the same, corrected for their small number."""
    level = min(1.0, LEVEL * (pairs + 1) / max(1, pairs))
    order = np.argsort(scores)
    reached = np.cumsum(importance[order]) / importance.sum()
    return float(scores[order][min(len(scores) - 1, int(np.searchsorted(reached, level - 1e-9)))])
