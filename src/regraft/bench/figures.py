"""Recovery, retention and share of the teacher, with bootstrap intervals over inputs and seeds.

Each figure is a ratio of two means over inputs: a gain over a gain. Its interval is the bootstrap's (Efron 1979,
percentiles): inputs are drawn with replacement, alike for all rows. Seeds and adapters count alike in a mean over them.
Adapters and pairs are not drawn: the figures are about these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from regraft.bench.worlds import Scores
from regraft.report.schema import Interval

RESAMPLES, LEVEL = 1000, 0.95
_LOW, _HIGH = (1 - LEVEL) / 2, (1 + LEVEL) / 2
#: Standard errors on each side of a normal variable's mean that make `LEVEL`.
_Z = 1.96

Array = NDArray[np.float64]
#: The rows of one pair, adapter and seed.
Rows = Mapping[str, Scores | None]
#: Above and below the line, one value per input each.
Fraction = tuple[Array, Array]
#: A row's fraction on one seed; None where a score is missing.
FractionOf = Callable[[Rows, str], Fraction | None]


def _gain(wanted: str, base: str, over: str, part: str = "task") -> FractionOf:
    """(row − base) / (wanted − over) of one part of the scores; ``base`` is taken off both."""

    def fraction(rows: Rows, row: str) -> Fraction | None:
        found = [rows.get(name) for name in (row, base, wanted, over)]
        if any(scores is None for scores in found):
            return None
        mine, start, best, lowest = (getattr(scores, part) for scores in found)
        return mine - start, best - lowest

    return fraction


recovery = _gain("native", "none", "none")
teacher_share = _gain("reverted", "none", "none")
retention = _gain("none", "old", "old", "retention")


def versus_copy(rows: Rows, row: str) -> Fraction | None:
    """Recovery less the copy's; where nothing could be copied, the copy is the base alone."""
    copied = "copy" if rows.get("copy") is not None else "none"
    return _gain("native", copied, "none")(rows, row)


def of_one(rows: Rows, row: str, fraction: FractionOf, undefined: str) -> Interval:
    """A row's figure with its interval, of one adapter as one seed made it.

    Args:
        rows: all scores.
        row: whose figure.
        fraction: which figure.
        undefined: the reason to give where the gain below the line may be none.
    """
    found = fraction(rows, row)
    if found is None or not len(found[0]):
        return Interval(mean=None, low=None, high=None, reason="not scored")
    top, bottom = (_resampled(part) for part in found)
    if not (found[1].mean() > 0 and float(np.quantile(bottom, _LOW)) > 0):
        return Interval(mean=None, low=None, high=None, reason=undefined)
    low, high = np.quantile(top / bottom, [_LOW, _HIGH])
    return Interval(
        mean=_round(float(found[0].mean() / found[1].mean())), low=_round(float(low)), high=_round(float(high))
    )


def _resampled(values: Array) -> Array:
    """Means over drawn inputs, (resamples,)."""
    drawn: Array = values[_indices(len(values))].mean(1)
    return drawn


@lru_cache(maxsize=64)
def _indices(inputs: int) -> NDArray[np.int64]:
    """Which inputs each resample draws, (resamples, inputs): the same for every row, so that rows differ by what they
    are alone.
    """
    return np.random.default_rng(0).integers(inputs, size=(RESAMPLES, inputs))


def over_seeds(each: Sequence[Interval]) -> Interval:
    """The mean of a figure over seeds, which share their inputs, with its interval.

    Half-width: √(mean hᵢ² + z² s² / n), of the seeds' own half-widths h, which many seeds would not narrow, and the
    standard deviation s between seeds.

    Args:
        each: the figure on each seed.
    """
    known = _known(each)
    if known is None:
        return next((i for i in each if i.reason), Interval(mean=None, low=None, high=None, reason="not scored"))
    means, lows, highs = known
    mean, n = float(means.mean()), len(means)
    between = _Z**2 * float(means.var(ddof=1)) / n if n > 1 else 0.0
    below, above = (float(np.sqrt(np.square(half).mean() + between)) for half in (means - lows, highs - means))
    note = None if n == len(each) else f"defined on {n} of {len(each)} seeds"
    return Interval(mean=_round(mean), low=_round(mean - below), high=_round(mean + above), reason=note)


def _known(each: Sequence[Interval | None]) -> tuple[Array, Array, Array] | None:
    """Means, lower and upper ends where there are any."""
    found = [(i.mean, i.low, i.high) for i in each if i is not None and i.mean is not None]
    return tuple(np.array(found, dtype=np.float64).T) if found else None


def over_adapters(each: Sequence[Interval | None], adapters: int) -> Interval:
    """The mean of a figure over adapters, each counting alike, with its interval.

    Adapters are measured apart: the half-widths add up as those of independent figures, √(Σ hᵢ²) / n.

    Args:
        each: the figure of each adapter that the row was measured on.
        adapters: how many there are.
    """
    known = _known(each)
    if known is None:
        reason = next((i.reason for i in each if i is not None and i.reason), "not scored")
        return Interval(mean=None, low=None, high=None, reason=reason)
    means, lows, highs = known
    mean, n = float(means.mean()), len(means)
    below, above = (float(np.sqrt(np.square(half).sum())) / n for half in (means - lows, highs - means))
    note = None if n == adapters else f"defined on {n} of {adapters} adapters"
    return Interval(mean=_round(mean), low=_round(mean - below), high=_round(mean + above), reason=note)


def difference(rows: Rows, row: str, base: str, part: str = "task") -> Interval:
    """Mean of row − base in the world's own unit, with its interval."""
    one, two = rows.get(row), rows.get(base)
    if one is None or two is None or not len(getattr(one, part)):
        return Interval(mean=None, low=None, high=None, reason="not scored")
    values = getattr(one, part) - getattr(two, part)
    low, high = np.quantile(_resampled(values), [_LOW, _HIGH])
    return Interval(mean=_round(float(values.mean())), low=_round(float(low)), high=_round(float(high)))


def mean_of(intervals: Sequence[Interval | None]) -> Interval | None:
    """Mean of a figure over seeds or adapters, each end likewise; None where none has it."""
    known = [i for i in intervals if i is not None and i.mean is not None and i.low is not None and i.high is not None]
    if not known:
        return next((i for i in intervals if i is not None), None)
    mean, low, high = (float(np.mean([getattr(i, end) for i in known])) for end in ("mean", "low", "high"))
    return Interval(mean=_round(mean), low=_round(low), high=_round(high), reason=known[0].reason)


def _round(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) >= 1 else round(value, 4)
