"""SVDiff: the singular values of the weight are shifted (Han et al. 2023, arXiv 2303.11305, eq. 2).

W' = U diag(relu(σ + s · δ)) Vᵀ, with U σ Vᵀ the SVD of the weight as a matrix (out, in · kh · kw), as in
mkshing/svdiff-pytorch (``….delta``) and the authors' own code. On a vector (a norm's weight) the former takes the SVD
of (1, n), whose one singular value is the norm; the latter adds n numbers. Which of several equal singular values a
number shifts is settled by `regraft.singular`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from regraft.singular import decompose, print_of
from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import Kind, needed
from regraft.updates.lorax import check_stamp


@dataclass(frozen=True)
class SpectralShift(Kind):
    """W' = U diag(relu(σ + scale · shift)) Vᵀ; on a vector the same with one σ, or W + scale · shift.

    Attributes:
        shift: δ, (min(out, in · kh · kw),), largest singular value first; for a vector of n, (1,) or (n,).
        scale: the strength of the shift; no file stores one.
        weight_shape: shape of the base's weight where it is known.
        stamp: the print of the base that it was trained on, (8,), in files of `regraft.tuners`.
    """

    shift: TensorRef
    scale: float = 1.0
    weight_shape: Shape | None = None
    stamp: TensorRef | None = None

    @property
    def kind(self) -> str:
        return "svdiff"

    @property
    def rank(self) -> int:
        return self.shift.shape[0]

    @property
    def shape(self) -> Shape:
        """Shape of ΔW where it is known, else that of the shift."""
        return self.weight_shape or self.shift.shape

    @property
    def rows(self) -> int | None:
        return None if self.weight_shape is None else self.weight_shape[0]

    def fits(self, weight_shape: Shape) -> bool:
        if self.weight_shape is not None:
            return super().fits(weight_shape)
        n = self.shift.shape[0]
        if len(weight_shape) == 1:
            return n in (1, weight_shape[0])
        return len(weight_shape) > 1 and n == min(weight_shape[0], prod(weight_shape[1:]))

    @property
    def additive(self) -> bool:
        return False

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.merged(needed(weight, self.kind)) - needed(weight, self.kind)

    def merged(self, weight: Tensor) -> Tensor:
        """The changed weight, float32.

        Raises:
            InputError: the weight is not the one that the adapter was trained on.
        """
        base, shift = weight.float(), self.scale * self.shift.load().float()
        if self.stamp is not None:
            check_stamp(self.stamp, print_of(base), "SVDiff")
        if base.dim() == 1 and len(shift) > 1:
            return base + shift
        u, s, v = decompose(base)
        change = (u * (torch.relu(s + shift) - s)) @ v.mT
        return (base.double() + change.reshape(weight.shape)).float()

    def scaled(self, strength: float) -> SpectralShift:
        return self if strength == 1.0 else replace(self, scale=self.scale * strength)
