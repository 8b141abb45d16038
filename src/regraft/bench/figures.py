"""Recovery, retention and share of the teacher, with bootstrap intervals over inputs and seeds.

Each figure is a ratio of two means over inputs: a gain over a gain. Of several seeds the means are pooled before the
ratio is taken; of several adapters the ratios are averaged, since each adapter has its own unit. The bootstrap (Efron
1979, percentiles) draws inputs with replacement, the same ones for every seed where there are as many, and seeds with
replacement; all rows of an adapter share its draws. Adapters and pairs are not drawn: the figures are about these, and
the interval of a mean over them comes from their own, as independent ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from regraft.bench.worlds import Scores
from regraft.report.schema import Interval

RESAMPLES, LEVEL = 1000, 0.95
_LOW, _HIGH = (1 - LEVEL) / 2, (1 + LEVEL) / 2

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


@dataclass(frozen=True)
class Draws:
    """A figure of one adapter and its bootstrap: all its value needs."""

    value: float
    draws: Array
    defined: bool


def draws_of(fractions: Sequence[Fraction]) -> Draws:
    """The pooled ratio over seeds, and its resamples; not defined where the gain below the line may be none.

    Args:
        fractions: one per seed.
    """
    tops, bottoms = (_resampled([pair[i] for pair in fractions]) for i in (0, 1))
    above, below = (float(np.mean([pair[i].mean() for pair in fractions])) for i in (0, 1))
    if not (below > 0 and float(np.quantile(bottoms, _LOW)) > 0):
        return Draws(0.0, np.zeros(0), False)
    return Draws(above / below, tops / bottoms, True)


def _resampled(values: Sequence[Array]) -> Array:
    """Means over drawn seeds of the means over drawn inputs, (resamples,); ``values`` are one array per seed."""
    inputs, seeds = _indices(tuple(len(value) for value in values))
    means = np.stack([value[chosen].mean(1) for value, chosen in zip(values, inputs, strict=True)])
    drawn: Array = np.take_along_axis(means, seeds, 0).mean(0)
    return drawn


@lru_cache(maxsize=64)
def _indices(sizes: tuple[int, ...]) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Which inputs each resample draws for each seed, (resamples, inputs), and which seeds, (seeds, resamples).

    The same inputs for every seed with as many, since those are the same inputs; the same draws for every row, so that
    rows differ by what they are alone.
    """
    generator = np.random.default_rng(0)
    common = {n: generator.integers(n, size=(RESAMPLES, n)) for n in sorted(set(sizes))}
    return [common[n] for n in sizes], generator.integers(len(sizes), size=(len(sizes), RESAMPLES))


def of_one(seeds: Sequence[Rows], row: str, fraction: FractionOf, undefined: str) -> Interval:
    """A row's figure with its interval, of one adapter of one or more seeds.

    Args:
        seeds: seed → rows.
        row: whose figure.
        fraction: which figure.
        undefined: the reason to give where it is not defined.
    """
    fractions = [f for rows in seeds if (f := fraction(rows, row)) is not None and len(f[0])]
    found = draws_of(fractions) if fractions else None
    if found is None or not found.defined:
        return Interval(mean=None, low=None, high=None, reason=undefined if found is not None else "not scored")
    low, high = np.quantile(found.draws, [_LOW, _HIGH])
    return Interval(mean=_round(found.value), low=_round(float(low)), high=_round(float(high)))


def over_adapters(each: Sequence[Interval | None], adapters: int) -> Interval:
    """The mean of a figure over adapters, each counting alike, with its interval.

    Adapters are measured apart: the half-widths add up as those of independent figures, √(Σ hᵢ²) / n.

    Args:
        each: the figure of each adapter that the row was measured on.
        adapters: how many there are.
    """
    known = [i for i in each if i is not None and i.mean is not None and i.low is not None and i.high is not None]
    if not known:
        reason = next((i.reason for i in each if i is not None and i.reason), "not scored")
        return Interval(mean=None, low=None, high=None, reason=reason)
    means, lows, highs = (np.array([getattr(i, end) for i in known]) for end in ("mean", "low", "high"))
    mean = float(means.mean())
    below, above = (float(np.sqrt(np.square(half).sum())) / len(known) for half in (means - lows, highs - means))
    note = None if len(known) == adapters else f"defined on {len(known)} of {adapters} adapters"
    return Interval(mean=_round(mean), low=_round(mean - below), high=_round(mean + above), reason=note)


def difference(seeds: Sequence[Rows], row: str, base: str, part: str = "task") -> Interval:
    """Mean of row − base in the world's own unit, with its interval, over the seeds of one adapter."""
    pairs = [(rows.get(row), rows.get(base)) for rows in seeds]
    values = [getattr(one, part) - getattr(two, part) for one, two in pairs if one is not None and two is not None]
    if not values or not len(values[0]):
        return Interval(mean=None, low=None, high=None, reason="not scored")
    low, high = np.quantile(_resampled(values), [_LOW, _HIGH])
    mean = float(np.mean([value.mean() for value in values]))
    return Interval(mean=_round(mean), low=_round(float(low)), high=_round(float(high)))


def mean_of(intervals: Sequence[Interval | None]) -> Interval | None:
    """Mean of a figure over seeds or adapters, each end likewise; None where none has it."""
    known = [i for i in intervals if i is not None and i.mean is not None and i.low is not None and i.high is not None]
    if not known:
        return next((i for i in intervals if i is not None), None)
    mean, low, high = (float(np.mean([getattr(i, end) for i in known])) for end in ("mean", "low", "high"))
    return Interval(mean=_round(mean), low=_round(low), high=_round(high), reason=known[0].reason)


def _round(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) >= 1 else round(value, 4)
