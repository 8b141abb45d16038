"""Leading singular vectors of a weight: as matrices, or as projections that are made without them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft.errors import UsageError
from regraft.lapack import LapackError, Tridiagonal
from regraft.methods._filters import Step, step_between
from regraft.transport import rank_for_energy

# From this size on, an eigendecomposition of the Gram matrix is worth its care.
_LARGE = 256
# Of the largest singular value: what float32 still tells apart after squaring.
_SMALL = 0.03
#: Sizes whose squares float32 holds.
TINY, HUGE = 1e-15, 1e15
# Directions that are settled at the cut: so many of smaller values, and of larger ones from the fewest to the most, as
# the gap above them is widest.
_AROUND, _FEWEST, _MOST = 16, 12, 24
# Of a weight, that are held in double precision at a time.
_ROWS = 1024
# Column blocks of the Gram matrix; only those on and below the diagonal are made.
_BLOCKS = 4


class Directions(ABC):
    """Orthonormal columns U (m, r)."""

    @property
    @abstractmethod
    def matrix(self) -> Tensor:
        """U."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """r."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """m."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device that `project` takes."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is known to lie outside of them."""
        return self.rows == self.rank

    def project(self, x: Tensor) -> Tensor:
        """U Uᵀ x for x (m, k)."""
        return x if self.is_whole else self._projected(x)

    @abstractmethod
    def _projected(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Made(Directions):
    """U as a matrix; that of a weight's longer side as U = W M, which is not multiplied out unasked.

    Attributes:
        inner: M (n, r), or U itself.
        weight: W (m, n), or None.
    """

    inner: Tensor
    weight: Tensor | None = None
    _matrix: list[Tensor] = field(default_factory=list)

    @property
    def matrix(self) -> Tensor:
        if self.weight is None:
            return self.inner
        if not self._matrix:
            found: Tensor = self.weight @ self.inner
            self._matrix.append(found / found.norm(dim=0))
        return self._matrix[0]

    @property
    def rank(self) -> int:
        return self.inner.shape[1]

    @property
    def rows(self) -> int:
        return (self.inner if self.weight is None else self.weight).shape[0]

    @property
    def like(self) -> Tensor:
        return self.inner

    def _projected(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return self.inner @ (self.inner.T @ x)
        return self.weight @ (self.inner @ (self.inner.T @ (self.weight.T @ x)))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The r leading eigenvectors of WᵀW of a weight W (m, n), of which those next to the cut are known.

    Attributes:
        weight: W, m ≥ n.
        form: Q and the tridiagonal T of WᵀW = Q T Qᵀ.
        step: what keeps the eigenvectors of T that are larger than the known ones; None where there are none.
        larger: their number.
        near: the others, orthonormal columns, (n, r − ``larger``).
        sizes: their singular values, (r − ``larger``,).
    """

    weight: Tensor
    form: Tridiagonal
    step: Step | None
    larger: int
    near: Tensor
    sizes: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.larger + self.near.shape[1]

    def project(self, x: Tensor, side: int) -> Tensor:
        """U Uᵀ x of the longer side (0), x (m, k), with U = W V S⁻¹; V Vᵀ x of the shorter one (1), x (n, k)."""
        if side == 1:
            return self._projected(x, over=False)
        return self.weight @ self._projected(self.weight.T @ x, over=True)

    def _projected(self, x: Tensor, *, over: bool) -> Tensor:
        """V Vᵀ x of x (n, k); with ``over`` V S⁻² Vᵀ x, S being the singular values."""
        near = self.near / self.sizes.square() if over else self.near
        found: Tensor = near @ (self.near.T @ x)
        if self.step is not None:
            columns = self.form.towards(x).T.double().numpy()
            found += self.form.back(torch.from_numpy(self.step.of(self.form, columns, over=over)).T)
        return found


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
    squares, vectors = torch.linalg.eigh(lower_gram(tall))
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
        form = Tridiagonal(lower_gram(tall))
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
    return TINY < largest < HUGE and float(values[r - 1]) > _SMALL * largest


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


def lower_gram(tall: Tensor) -> Tensor:
    """TᵀT of T (m, n), right on and below the diagonal; what lies above is not told."""
    n = tall.shape[1]
    gram = tall.new_zeros(n, n)
    step = -(-n // _BLOCKS)
    for start in range(0, n, step):
        gram[start:, start : start + step] = tall[:, start:].T @ tall[:, start : start + step]
    return gram


def _own(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)
