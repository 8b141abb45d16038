"""Singular subspaces of a weight, shared by the projecting methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import UsageError
from regraft.lapack import LapackError, Tridiagonal
from regraft.methods._directions import Directions, Made, Spectrum
from regraft.methods._filters import step_between
from regraft.transport import Chained, LinearMap, Terms, Transport, projection, rank_for_energy

# From this size on, an eigendecomposition of the Gram matrix is worth its care.
_LARGE = 256
# Of the largest singular value: what float32 still tells apart after squaring, and sizes whose squares it holds.
_SMALL, _TINY, _HUGE = 0.03, 1e-15, 1e15
# Directions that are settled at the cut: so many of smaller values, and of larger ones from the fewest to the most, as
# the gap above them is widest.
_AROUND, _FEWEST, _MOST = 16, 12, 24
# Of a weight, that are held in double precision at a time.
_ROWS = 1024
# Least τ² by the sum of σ², which the largest σ² can't exceed, at which a Cholesky factor is sound in float32.
_LEAST = 1e-6
#: Largest τ of a soft edge: beyond it nothing is left to carry.
MOST_EDGE = 100.0
# Column blocks of the Gram matrix; only those on and below the diagonal are made.
_BLOCKS = 4


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
    for directions in chain:
        x = directions.project(x)
    return x


def _past(chain: Sequence[Directions], x: Tensor) -> Tensor:
    for directions in chain:
        x = x - directions.project(x)
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


def directions(weight: Tensor, rank: int | float | None, energy: float | None) -> tuple[Directions, Directions]:
    """Leading left and right singular vectors of ``weight`` (out, in).

    Args:
        weight: matrix, float32 or float64.
        rank: r; a float up to 1 is a share of the full rank (1.0 all of it). Takes precedence over ``energy``.
        energy: share of ‖W‖² that the subspace holds.

    Raises:
        UsageError: a rank or energy out of range.
    """
    _check(rank, energy)
    if min(weight.shape) < _LARGE or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return _made(weight, rank, energy)
    both = _Unmade(weight, rank, energy)
    return _Side(both, 0), _Side(both, 1)


class _Unmade:
    """The leading directions of a weight's two sides: projections and matrices of them, each made when asked for."""

    def __init__(self, weight: Tensor, rank: int | float | None, energy: float | None) -> None:
        self.weight, self._asked = weight, (rank, energy)
        self.is_tall = weight.shape[0] >= weight.shape[1]
        # Not cached properties: before Python 3.12 their lock is one for all weights, which are at work side by side.
        self._made: tuple[Directions, Directions] | None = None
        self._spectra: list[Spectrum | None] = []

    @property
    def made(self) -> tuple[Directions, Directions]:
        if self._made is None:
            self._made = _made(self.weight, *self._asked)
        return self._made

    @property
    def spectrum(self) -> Spectrum | None:
        if not self._spectra:
            self._spectra.append(_spectrum(self.weight if self.is_tall else self.weight.T, *self._asked))
        return self._spectra[0]

    @property
    def rank(self) -> int:
        spectrum = self.spectrum if self._made is None else None
        return self.made[0].rank if spectrum is None else spectrum.rank

    @property
    def is_full(self) -> bool:
        """Whether all directions were asked for: told before any is looked for."""
        rank, energy = self._asked
        full = min(self.weight.shape)
        return energy == 1 if rank is None else _number(rank, full) == full

    def project(self, x: Tensor, side: int) -> Tensor:
        spectrum = self.spectrum if self._made is None else None
        if spectrum is None:
            return self.made[side].project(x)
        return spectrum.project(x, side if self.is_tall else 1 - side)


@dataclass(frozen=True, eq=False)
class _Side(Directions):
    """One side of both: 0 is the left one."""

    both: _Unmade
    side: int

    @property
    def matrix(self) -> Tensor:
        return self.both.made[self.side].matrix

    @property
    def rank(self) -> int:
        return self.both.rank

    @property
    def rows(self) -> int:
        return self.both.weight.shape[self.side]

    @property
    def like(self) -> Tensor:
        return self.both.weight

    @property
    def is_whole(self) -> bool:
        return self.both.is_full and self.rows == min(self.both.weight.shape)

    def _projected(self, x: Tensor) -> Tensor:
        return self.both.project(x, self.side)


def _made(weight: Tensor, rank: int | float | None, energy: float | None) -> tuple[Directions, Directions]:
    # There is no float64 on MPS.
    if min(weight.shape) >= _LARGE and weight.device.type != "mps":
        is_tall = weight.shape[0] >= weight.shape[1]
        found = _by_gram(weight if is_tall else weight.T, rank, energy)
        if found is not None:
            return found if is_tall else found[::-1]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    r = _held(s, rank, energy)
    # Copies: a slice would keep the full factors in memory for as long as the transport lives.
    return Made(_own(u[:, :r])), Made(_own(vh[:r].T))


def _check(rank: int | float | None, energy: float | None) -> None:
    if rank is not None:
        if rank <= 0:
            raise UsageError(f"--subspace-rank {rank} is out of range", remedy="Give a rank of 1 or more, or a share.")
    elif energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy {energy} is out of range", remedy="Give a share above 0, up to 1.")


def _number(rank: int | float, full: int) -> int:
    return max(1, round(rank * full)) if isinstance(rank, float) and rank <= 1 else min(int(rank), full)


def _held(singular_values: Tensor, rank: int | float | None, energy: float | None) -> int:
    full = len(singular_values)
    if rank is not None:
        return _number(rank, full)
    share = 0.9 if energy is None else energy
    return full if share == 1 else rank_for_energy(singular_values, share)


def _by_gram(tall: Tensor, rank: int | float | None, energy: float | None) -> tuple[Directions, Directions] | None:
    """The same by the smaller side's Gram matrix, whose eigenvectors cost a third of the decomposition.

    Squaring costs half of the digits. They are enough for directions that are not small: the longer side's vectors are
    orthonormal to 2e-3 at worst, and where the subspace holds smaller ones, the result is None. At the cut, neighbours
    lie so close that their order is settled in double precision.

    Returns:
        The longer side's, and the shorter one's.
    """
    squares, vectors = torch.linalg.eigh(_lower_gram(tall))
    values, vectors = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    r = _held(values, rank, energy)
    if not _is_sound(values, r):
        return None
    near = slice(max(0, r - _AROUND), min(len(values), r + _AROUND))
    settled, block = _settled(tall, vectors[:, near], r - near.start)
    inner = torch.cat([vectors[:, : near.start], block], dim=1)
    return Made(inner / torch.cat([values[: near.start], settled]), tall), Made(inner)


def _spectrum(tall: Tensor, rank: int | float | None, energy: float | None) -> Spectrum | None:
    """The same, without other eigenvectors than those at the cut; None where it can't do without."""
    try:
        form = Tridiagonal(_lower_gram(tall))
        squares = form.values()
        n = len(squares)
        values = torch.from_numpy(squares).flip(0).clamp_min(0).sqrt().to(tall)
        r = _held(values, rank, energy)
        if not _is_sound(values, r):
            return None
        starts = range(max(1, r - _MOST), r - _FEWEST + 1)
        larger = max(starts, key=lambda start: float(squares[n - start] - squares[n - start - 1]), default=0)
        step = step_between(squares, larger) if larger else None
        if larger and step is None:
            # Of values that are all but equal no filter tells one from the next.
            return None
        block = form.back(form.vectors(squares[max(0, n - r - _AROUND) : n - larger]).flip(1))
    except LapackError:
        return None
    sizes, near = _settled(tall, block, r - larger)
    return Spectrum(tall, form, step, larger, near, sizes)


def _is_sound(values: Tensor, r: int) -> bool:
    """Whether the r largest singular values are none too small for their squares in single precision."""
    largest = float(values[0])
    return _TINY < largest < _HUGE and float(values[r - 1]) > _SMALL * largest


def _settled(tall: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest singular values in the span of some right singular vectors, and their vectors.

    Args:
        tall: (m, n).
        block: (n, k), orthonormal columns.
        count: up to k.
    """
    precise = block.double()
    # By parts: in double precision a weight is twice its size.
    moved = torch.cat([part.double() @ precise for part in torch.split(tall, _ROWS)])
    # Largest last.
    squares, turn = torch.linalg.eigh(moved.T @ moved)
    values: Tensor = squares.flip(0).clamp_min(0).sqrt().to(tall)[:count]
    vectors: Tensor = (precise @ turn.flip(1)).to(tall.dtype)[:, :count]
    return values, vectors


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
        if not _TINY < largest < _HUGE:
            # The filter is the same for any multiple of W; the squares would leave float32.
            tall = tall / largest
        share = edge**2 / tall.shape[1]
        if weight.device.type == "mps":
            share = max(share, _LEAST)
        elif share < _LEAST:
            tall = tall.double()
        gram = _lower_gram(tall)
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


def _lower_gram(tall: Tensor) -> Tensor:
    """TᵀT of T (m, n), right on and below the diagonal; what lies above is not told."""
    n = tall.shape[1]
    gram = tall.new_zeros(n, n)
    step = -(-n // _BLOCKS)
    for start in range(0, n, step):
        gram[start:, start : start + step] = tall[:, start:].T @ tall[:, start : start + step]
    return gram


def _own(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


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
