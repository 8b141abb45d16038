"""Projections on the eigenvectors above a gap, of a few columns, without the eigenvectors.

The step function in the gap between two eigenvalues is 1/2 + 1/2 sign, and the best rational approximation of sign on
[−1, −δ] ∪ [δ, 1] is Zolotarev's. In partial fractions its poles lie on one upright line through the gap, so that of a
tridiagonal T a projection of k columns costs one tridiagonal solution for each pole: O(n k). The number of poles grows
with the logarithm of 1 / δ.

Formulas: Nakatsukasa and Freund, "Computing fundamental matrix decompositions accurately via the matrix sign function
in two iterations: the power of Zolotarev's functions", SIAM Review 58 (2016), §2 and (4.6), type (2 J − 1, 2 J).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.lapack import Tridiagonal

# How far from 0 and 1 a direction's share may be, and how many poles are tried before there are too many.
_EXACT, _MOST = 1e-7, 64


@dataclass(frozen=True, eq=False)
class Step:
    """f(x) = 1/2 + 1/2 Σ aⱼ Re 1 / (x − zⱼ): 1 above the gap, 0 below.

    Attributes:
        poles: zⱼ, (J,), complex.
        weights: aⱼ, (J,).
    """

    poles: NDArray[np.complex128]
    weights: NDArray[np.float64]

    def at(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """f of numbers, (n,)."""
        found: NDArray[np.float64] = 0.5 + 0.5 * (self.weights / (x[:, None] - self.poles)).real.sum(1)
        return found

    def of(self, matrix: Tridiagonal, columns: NDArray[np.float64], *, over: bool = False) -> NDArray[np.float64]:
        """f(T) x.

        Args:
            matrix: T.
            columns: of x as rows, (k, n).
            over: (f(T) − f(0)) T⁻¹ x in its place: in the same poles, and without a division by small eigenvalues.
        """
        found = np.zeros_like(columns) if over else 0.5 * columns
        for pole, weight in zip(self.poles, self.weights, strict=True):
            share = 0.5 * weight / pole if over else 0.5 * weight
            found += (share * matrix.solved(columns, pole)).real
        return found


def step_between(values: NDArray[np.float64], count: int) -> Step | None:
    """The step that keeps the ``count`` largest of some eigenvalues; None where the gap is too narrow for it.

    Args:
        values: eigenvalues, smallest first, (n,); 0 counts as one of those that are not kept.
        count: 1 to n − 1.
    """
    below, above = float(values[-count - 1]), float(values[-count])
    middle, half = (above + below) / 2, (above - below) / 2
    reach = max(float(values[-1]) - middle, middle - min(float(values[0]), 0.0))
    if not half > 1e-9 * reach:
        return None
    wanted = np.append(np.arange(len(values)) >= len(values) - count, False)
    points = np.append(values, 0.0)
    # The error falls by a factor of about exp(π² / log(4 / δ)) with each pole.
    pace = np.pi**2 / np.log(4 * reach / half)
    poles = int(np.ceil(np.log(4 / _EXACT) / pace))
    while poles <= _MOST:
        found = _zolotarev(middle, half, reach, poles)
        if np.abs(found.at(points) - wanted).max() <= _EXACT:
            return found
        poles += max(1, poles // 4)
    return None


def _zolotarev(middle: float, half: float, reach: float, count: int) -> Step:
    from scipy.special import ellipj, ellipkm1

    share = half / reach
    step = ellipkm1(share**2) / (2 * count)
    sn, cn, _, _ = ellipj(np.arange(1, count) * step, 1 - share**2)
    lower = (share * sn / cn) ** 2
    # sc(K − u) = 1 / (δ sc(u)): near K, where sn and cn lose their digits, by what they are near 0.
    squares = np.concatenate([lower, [share], share**2 / lower[::-1]])
    odd, even = squares[::2], squares[1::2]
    weights = np.array([_residue(c, odd, even) for c in odd])
    # Between the ends of the range the approximation swings by as much above 1 as below.
    x = np.geomspace(share, 1, 64 * count)
    swing = (weights * x[:, None] / (x[:, None] ** 2 + odd)).sum(1)
    weights *= 2 / (swing.max() + swing.min())
    return Step(middle + 1j * reach * np.sqrt(odd), reach * weights)


def _residue(c: float, odd: NDArray[np.float64], even: NDArray[np.float64]) -> float:
    others = odd[odd != c]
    # In pairs, as numbers that span many decades would leave the range of doubles.
    return float(np.prod((even - c) / (others - c)))
