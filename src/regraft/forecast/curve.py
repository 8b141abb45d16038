"""The calibrated curve: recovery = exp(−damage), damage a sum of figures with weights of 0 or more.

At no damage (old and new base are the same) a copy recovers all, whatever the weights; more drift never forecasts more
recovery. An interval is the forecast with its damage multiplied and divided by 1 + λ, and a little noise about it;
λ comes from rows that were held out (see `regraft.forecast.fitting`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]

#: What two trainings of one adapter differ by, though nothing was lost on the way.
NOISE = 0.05
#: A recovery is scored within these bounds: below 0 an adapter does harm, and how much says nothing of the bases.
LEAST, MOST = 0.0, 1.1
# Penalty on the squared contributions, so that two figures that tell the same share the weight.
_RIDGE = 1e-3
# No interval is wider than the whole range by then.
_WIDEST = 1e3


@dataclass(frozen=True)
class Curve:
    """recovery = exp(−(offset + Σ weight · figure)).

    Attributes:
        names: of the figures.
        weights: of each, at least 0.
        offset: damage where no figure shows any; 0 for a copy.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    offset: float = 0.0

    def damage(self, figures: Mapping[str, float]) -> float:
        """The expected damage; a figure that is not known counts as 0."""
        return self.offset + sum(w * figures.get(name, 0.0) for name, w in zip(self.names, self.weights, strict=True))

    def recovery(self, figures: Mapping[str, float]) -> float:
        return exp(-self.damage(figures))


def interval(damage: float, width: float) -> tuple[float, float]:
    """Least and most recovery at a width λ ≥ 0."""
    low = exp(-damage * (1 + width)) - NOISE * width
    return max(LEAST, low), min(MOST, exp(-damage / (1 + width)) + NOISE * width)


def width_that_holds(damage: float, recovery: float) -> float:
    """The smallest λ whose interval holds a measured recovery."""
    low, high = 0.0, _WIDEST
    for _ in range(60):
        middle = (low + high) / 2
        least, most = interval(damage, middle)
        low, high = (low, middle) if least <= recovery <= most else (middle, high)
    return high


def fit_curve(
    names: Sequence[str], figures: Array, recoveries: Array, importance: Array, *, offset: bool = False
) -> Curve:
    """Least squares over rows, with weights (and an offset, if wanted) of 0 or more.

    Args:
        names: of the figures.
        figures: (rows, figures).
        recoveries: (rows,), within `LEAST` and `MOST`.
        importance: (rows,); each pair's rows add up to the same.
        offset: fit one.
    """
    x = np.concatenate([np.ones((len(figures), 1)), figures], axis=1) if offset else figures
    # Each figure in units of its own size, so that the penalty means the same for all.
    size = np.sqrt((x**2).mean(axis=0)) + 1e-9
    scaled, root = x / size, np.sqrt(importance / importance.sum())

    def residuals(w: Array) -> Array:
        off = root * (np.exp(-scaled @ w) - recoveries)
        return np.concatenate([off, np.sqrt(_RIDGE) * w])

    best = min(
        (
            least_squares(residuals, np.full(x.shape[1], start / x.shape[1]), bounds=(0, np.inf))
            for start in (0.1, 1.0, 4.0)
        ),
        key=lambda found: found.cost,
    )
    weights = [float(w) for w in best.x / size]
    return Curve(tuple(names), tuple(weights[1:] if offset else weights), weights[0] if offset else 0.0)
