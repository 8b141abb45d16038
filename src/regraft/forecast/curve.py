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

Array = NDArray[np.float64]

#: What two trainings of one adapter differ by, though nothing was lost on the way.
NOISE = 0.05
#: A recovery is scored within these bounds: below 0 an adapter does harm, and how much says nothing of the bases.
LEAST, MOST = 0.0, 1.1
# Pull of the weights towards what is believed beforehand, as if so large a share of the rows said it.
_PULL = 1e-3
# A figure's usual size, where no row shows more of it.
_SIZE = 0.2
# Noise grows with λ no further than to this many times itself: where all is lost, that is certain.
_MOST_NOISE = 2.0
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
    noise = NOISE * min(width, _MOST_NOISE)
    return max(LEAST, exp(-damage * (1 + width)) - noise), min(MOST, exp(-damage / (1 + width)) + noise)


def width_that_holds(damage: float, recovery: float) -> float:
    """The smallest λ whose interval holds a measured recovery."""
    low, high = 0.0, _WIDEST
    for _ in range(60):
        middle = (low + high) / 2
        least, most = interval(damage, middle)
        low, high = (low, middle) if least <= recovery <= most else (middle, high)
    return high


def fit_curve(
    names: Sequence[str],
    figures: Array,
    recoveries: Array,
    importance: Array,
    *,
    belief: Mapping[str, float],
    least: Mapping[str, float] | None = None,
    offset: bool = False,
) -> Curve:
    """Least squares over rows, with weights (and an offset, if wanted) of 0 or more, pulled a little towards a belief.

    Args:
        names: of the figures.
        figures: (rows, figures).
        recoveries: (rows,), within `LEAST` and `MOST`.
        importance: (rows,); each pair's rows add up to the same.
        belief: figure → its weight before anything is measured.
        least: figure → what its weight is never below; 0 by default.
        offset: fit one.
    """
    # SciPy takes long to import, and a forecast fits nothing.
    from scipy.optimize import least_squares

    x = np.concatenate([figures, np.ones((len(figures), 1))], axis=1) if offset else figures
    start = np.array([belief.get(name, 0.0) for name in names] + [0.0] * offset)
    # Each weight in units of the damage that it usually does, so that the pull means the same for all.
    size = np.maximum(np.sqrt((np.minimum(x, 1.0) ** 2).mean(axis=0)), _SIZE)
    root, pull = np.sqrt(importance / importance.sum()), np.sqrt(_PULL)

    def residuals(w: Array) -> Array:
        return np.concatenate([root * (np.exp(-x @ w) - recoveries), pull * size * (w - start)])

    bottom = np.array([(least or {}).get(name, 0.0) for name in names] + [0.0] * offset)
    found = least_squares(residuals, np.maximum(start, bottom) + 1e-6, bounds=(bottom, np.inf))
    weights = [float(w) for w in found.x]
    return Curve(tuple(names), tuple(weights[: len(names)]), weights[-1] if offset else 0.0)
