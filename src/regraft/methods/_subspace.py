"""What projecting methods do with the singular subspaces of weights: project on them, compare them, match them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regraft.methods._directions import HUGE, TINY, Directions, directions, lower_gram
from regraft.transport import Chained, LinearMap, Terms, Transport, projection

# Least τ² by the sum of σ², which the largest σ² can't exceed, at which a Cholesky factor is sound in float32.
_LEAST = 1e-6
#: Largest τ of a soft edge: beyond it nothing is left to carry.
MOST_EDGE = 100.0


class Projected(Chained):
    """ΔW ↦ P ΔW Q with P = U Uᵀ and Q = V Vᵀ; of two each, U₂U₂ᵀU₁U₁ᵀ ΔW V₁V₁ᵀV₂V₂ᵀ and what lies outside of all.

    The second term is (I − U₂U₂ᵀ)(I − U₁U₁ᵀ) ΔW (I − V₁V₁ᵀ)(I − V₂V₂ᵀ).

    Args:
        left: U, or U₁ and U₂.
        right: V, or V₁ and V₂.
    """

    def __init__(self, left: Sequence[Directions], right: Sequence[Directions]) -> None:
        super().__init__(rotates=False)
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)

    left: Sequence[Directions]
    right: Sequence[Directions]

    @property
    def terms(self) -> Terms:
        ups, downs = [d.matrix for d in self.left], [d.matrix for d in self.right]
        if len(ups) == 1:
            return ((projection(ups[0]), projection(downs[0])),)
        return tuple(zip(_in_and_out(ups[1], ups[0]), _in_and_out(downs[0], downs[1]), strict=True))

    def images(self, up: Tensor, down: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        like = self.left[0].like
        up, down = up.to(like), down.T.to(like)
        found = [(_along(self.left, up), _along(self.right, down))]
        if len(self.left) > 1:
            found.append((_past(self.left, up), _past(self.right, down)))
        return tuple((one.to("cpu", torch.float32), other.T.to("cpu", torch.float32)) for one, other in found)


def _along(chain: Sequence[Directions], x: Tensor) -> Tensor:
    for basis in chain:
        x = basis.project(x)
    return x


def _past(chain: Sequence[Directions], x: Tensor) -> Tensor:
    for basis in chain:
        x = x - basis.project(x)
    return x


def _in_and_out(a: Tensor, b: Tensor) -> tuple[LinearMap, LinearMap]:
    """A Aᵀ B Bᵀ, and (I − A Aᵀ)(I − B Bᵀ) = I − A Aᵀ − B Bᵀ + A AᵀB Bᵀ as one thin product.

    Args:
        a: (m, r), orthonormal columns.
        b: likewise.
    """
    product = (a.T @ b) @ b.T
    outside = LinearMap(1.0, torch.cat([a, b], dim=1), torch.cat([product - a.T, -b.T]))
    return LinearMap(0.0, a, product), outside


def subspaces(weight: Tensor, rank: int | float | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """`directions` as matrices: U (out, r) and V (in, r)."""
    left, right = directions(weight, rank, energy)
    return left.matrix, right.matrix


class Filtered(Chained):
    """ΔW ↦ F_U ΔW F_V: the projections on a weight's singular subspaces with a soft edge, without a decomposition.

    Along the singular pair i they keep the share σᵢ² / (σᵢ² + τ²) (Tikhonov's filter factors): near 1 above τ, near 0
    below. With the Cholesky factor of the smaller side's Gram matrix, WᵀW + τ² I = L Lᵀ for W (m, n) tall, the one of
    the side n is I − τ² (L Lᵀ)⁻¹, and that of the side m is W (L Lᵀ)⁻¹ Wᵀ.
    """

    def __init__(self, weight: Tensor, edge: float, largest: float) -> None:
        """Factorise.

        Args:
            weight: float32 matrix W (out, in).
            edge: τ, in root mean squares of the singular values, ‖W‖ / √min(out, in). On MPS, which has no float64, at
                least 1e-3 √min(out, in).
            largest: its largest number, above 0.
        """
        super().__init__(rotates=False)
        is_tall = weight.shape[0] >= weight.shape[1]
        tall = weight if is_tall else weight.T
        if not TINY < largest < HUGE:
            # The filter is the same for any multiple of W; the squares would leave float32.
            tall = tall / largest
        share = edge**2 / tall.shape[1]
        if weight.device.type == "mps":
            share = max(share, _LEAST)
        elif share < _LEAST:
            tall = tall.double()
        gram = lower_gram(tall)
        total = float(gram.diagonal().sum())
        squared = share * total
        gram.diagonal().add_(squared)
        found = {"is_tall": is_tall, "tall": tall, "squared": squared, "factor": torch.linalg.cholesky(gram)}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    is_tall: bool
    tall: Tensor
    squared: float
    factor: Tensor

    @property
    def terms(self) -> Terms:
        x = torch.linalg.solve_triangular(self.factor, self.tall.T, upper=False).T.float()
        inverse = torch.cholesky_inverse(self.factor).mul_(-self.squared).float()
        long, short = LinearMap(0.0, x, x.T), LinearMap(1.0, inverse)
        return ((long, short) if self.is_tall else (short, long),)

    def images(self, up: Tensor, down: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        up, down = up.to(self.tall), down.T.to(self.tall)
        left, right = (self._long(up), self._short(down)) if self.is_tall else (self._short(up), self._long(down))
        return ((left.to("cpu", torch.float32), right.T.to("cpu", torch.float32)),)

    def _long(self, x: Tensor) -> Tensor:
        return self.tall @ torch.cholesky_solve(self.tall.T @ x, self.factor)

    def _short(self, x: Tensor) -> Tensor:
        return x - self.squared * torch.cholesky_solve(x, self.factor)


def filtered(weight: Tensor, edge: float) -> Transport:
    """`Filtered`; of a weight of zeros, which has no directions to tell apart, the identity."""
    largest = float(torch.linalg.vector_norm(weight, math.inf))
    return Filtered(weight, edge, largest) if largest > 0 else Transport()


def overlap(a: Tensor, b: Tensor) -> float:
    """Chance-corrected overlap of two subspaces of R^m: (Φ − r/m) / (1 − r/m), Φ = ‖AᵀB‖²_F / r (LoRA-X eq. 4).

    Args:
        a: (m, r), orthonormal columns.
        b: (m, r'), orthonormal columns; the smaller r counts.
    """
    r, r_other, m = min(a.shape[1], b.shape[1]), max(a.shape[1], b.shape[1]), a.shape[0]
    phi = float((a.T @ b).square().sum()) / r
    chance = r_other / m
    return 1.0 if chance >= 1 else (phi - chance) / (1 - chance)


def phi(a: Tensor, b: Tensor) -> float:
    """Φ = ‖AᵀB‖²_F / r as the papers have it, not corrected for chance; arguments as in `overlap`."""
    return float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1])


def index_matched(u_old: Tensor, v_old: Tensor, u_new: Tensor, v_new: Tensor) -> Transport:
    """ΔW_new = U_t U_sᵀ ΔW V_s V_tᵀ: what ΔW does between the old singular pairs, between the new ones of their index.

    A pair (u, v) is as good as (−u, −v). Where one side has one size in both bases, the new pair takes the sign that
    makes its vector there agree with the old one's; where neither has, each vector u is turned so that its sum is not
    negative, and v with it.

    Args:
        u_old: left singular vectors of the old weight, (out, r).
        v_old: right ones, (in, r).
        u_new: of the new weight, (out', r'); the smaller rank counts.
        v_new: (in', r').
    """
    r = min(u_old.shape[1], u_new.shape[1])
    u_old, v_old, u_new, v_new = (basis[:, :r] for basis in (u_old, v_old, u_new, v_new))
    agreement = torch.zeros(r, dtype=u_new.dtype, device=u_new.device)
    for one, other in ((u_old, u_new), (v_old, v_new)):
        if len(one) == len(other):
            agreement = agreement + (one * other).sum(dim=0)
    if len(u_old) != len(u_new) and len(v_old) != len(v_new):
        agreement = u_old.sum(dim=0) * u_new.sum(dim=0)
    sign = torch.where(agreement < 0, -1.0, 1.0)
    return Transport(((LinearMap(0.0, u_new * sign, u_old.T), LinearMap(0.0, v_old, (v_new * sign).T)),))
