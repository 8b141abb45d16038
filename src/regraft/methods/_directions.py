"""Leading singular vectors of a weight as matrices; and their projections, that are made without them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft.lapack import Tridiagonal
from regraft.methods._filters import Step


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
