"""LoRA-X: numbers on the leading singular directions of the weight (Farhadzadeh et al. 2025, arXiv 2501.16559, eq. 1).

ΔW = U ΔΣ Vᵀ, U and V of the weight as a matrix (m, n) as it is stored; files of `regraft.tuners` hold ΔΣ, a print of
the base, and U and V only where that was asked for. The directions are settled by `regraft.singular`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from regraft.errors import InputError
from regraft.singular import decompose, moved, print_of, signs_by, strayed
from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import Kind, fitted, needed, scaled_ref


@dataclass(frozen=True)
class Subspace(Kind):
    """ΔW = U ΔΣ Vᵀ on the r leading singular directions of the base's weight.

    Attributes:
        sigma: ΔΣ, (r,) for a diagonal or (r, r).
        u: (m, r), where the file holds it; with ``v``, (n, r), the base is not needed.
        v: likewise.
        stamp: the print of the base that it was trained on, (16,).
        marks: what tells the directions' signs to a full ΔΣ, (r, 4).
        weight_shape: shape of the base's weight where it is known.
    """

    sigma: TensorRef
    u: TensorRef | None = None
    v: TensorRef | None = None
    stamp: TensorRef | None = None
    marks: TensorRef | None = None
    weight_shape: Shape | None = None

    @property
    def kind(self) -> str:
        return "lorax"

    @property
    def rank(self) -> int:
        return self.sigma.shape[0]

    @property
    def shape(self) -> Shape:
        """Shape of ΔW where it is known, as a matrix where U and V alone tell it, else (r,)."""
        if self.weight_shape is not None:
            return self.weight_shape
        return (self.rank,) if self.u is None or self.v is None else (self.u.shape[0], self.v.shape[0])

    @property
    def rows(self) -> int | None:
        if self.weight_shape is not None:
            return self.weight_shape[0]
        return None if self.u is None else self.u.shape[0]

    def fits(self, weight_shape: Shape) -> bool:
        if self.weight_shape is not None:
            return super().fits(weight_shape)
        if len(weight_shape) < 2:
            return False
        matrix = (weight_shape[0], prod(weight_shape[1:]))
        return matrix == self.shape if self.u is not None else self.rank <= min(matrix)

    @property
    def additive(self) -> bool:
        return self.u is not None and self.v is not None

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW, float32.

        Raises:
            ValueError: it depends on the base's ``weight``, and there is none.
            InputError: the weight is not the one that the adapter was trained on.
        """
        if self.u is not None and self.v is not None:
            found = self._product(self.u.load(), self.v.load())
            return fitted(found if weight is not None or len(self.shape) == 2 else found.reshape(self.shape), weight)
        base = needed(weight, self.kind)
        u, _, v = decompose(base, self.rank)
        if self.stamp is not None:
            check_stamp(self.stamp, print_of(base, u, v), "LoRA-X")
        if self.marks is not None:
            signs = signs_by(self.marks.load(), u)
            u, v = u * signs, v * signs
        return self._product(u, v).reshape(base.shape)

    def _product(self, u: Tensor, v: Tensor) -> Tensor:
        sigma = self.sigma.load().float()
        left = u.float() * sigma if sigma.dim() == 1 else u.float() @ sigma
        result: Tensor = left @ v.float().mT
        return result

    def scaled(self, strength: float) -> Subspace:
        return self if strength == 1.0 else replace(self, sigma=scaled_ref(self.sigma, strength))


def check_stamp(stamp: TensorRef, found: Tensor, title: str) -> None:
    """Make sure that a base is the one that an adapter was trained on.

    Args:
        stamp: the print that the adapter's file holds.
        found: the base's own.
        title: what the adapter is.

    Raises:
        InputError: it is another one.

    Warns:
        UserWarning: it is near, and further than rounding brings it.
    """
    stored = stamp.load()
    wrong = "the prints have other lengths" if stored.shape != found.shape else moved(stored, found)
    if wrong is not None:
        what = f"the base is not the one that this {title} adapter was trained on ({wrong})"
        raise InputError(what, remedy="Give that one as the old base.")
    near = strayed([(stored, found)], title)
    if near is not None:
        warnings.warn(near, stacklevel=2)
