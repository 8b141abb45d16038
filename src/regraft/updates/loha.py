"""LoHa: the elementwise product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098, eq. 3).

As LyCORIS 4.1.3 and PEFT 0.21.2 store it: W' = W + s · (w1_a w1_b) ∘ (w2_a w2_b), or with Tucker kernels t1, t2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import (
    Kind,
    RowPart,
    fits_flattened,
    fitted,
    floats,
    magnitude_rows,
    scaled_ref,
    tucker_product,
)

# Rows of ΔW that are built at a time for its norm.
_CHUNK = 512


@dataclass(frozen=True)
class LoHa(Kind):
    """ΔW = scale · (w1_a w1_b) ∘ (w2_a w2_b).

    Attributes:
        w1_a: (out, r); in the Tucker form (r, out).
        w1_b: (r, in · kh · kw); in the Tucker form (r, in).
        w2_a: as ``w1_a``.
        w2_b: as ``w1_b``.
        scale: alpha / r.
        t1: (r, r, kh, kw), of the Tucker form.
        t2: likewise.
        alpha: alpha as the file stores it.
        magnitude: DoRA's m, as in `LowRank`.
        weight_shape: shape of the base's weight where it is known: without Tucker, the file flattens the kernel.
    """

    w1_a: TensorRef
    w1_b: TensorRef
    w2_a: TensorRef
    w2_b: TensorRef
    scale: float
    t1: TensorRef | None = None
    t2: TensorRef | None = None
    alpha: TensorRef | None = None
    magnitude: TensorRef | None = None
    weight_shape: Shape | None = None

    @property
    def kind(self) -> str:
        return "loha"

    def fits(self, weight_shape: Shape) -> bool:
        return super().fits(weight_shape) or fits_flattened(self.shape, weight_shape)

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def shape(self) -> Shape:
        if self.weight_shape is not None:
            return self.weight_shape
        if self.t1 is not None:
            return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])
        return (self.w1_a.shape[0], *self.w1_b.shape[1:])

    def halves(self) -> tuple[Tensor, Tensor]:
        """The two kernels whose elementwise product is ΔW / scale, float32."""
        w1_a, w1_b, w2_a, w2_b = floats(self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        if self.t1 is None or self.t2 is None:
            return w1_a @ w1_b.flatten(1), w2_a @ w2_b.flatten(1)
        t1, t2 = floats(self.t1, self.t2)
        return tucker_product(t1, w1_a, w1_b), tucker_product(t2, w2_a, w2_b)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        one, two = self.halves()
        return fitted((self.scale * (one * two)).reshape(self.shape), weight)

    def norm(self, weight: Tensor | None = None) -> float:
        """‖ΔW‖_F, built some rows at a time where the form allows it."""
        if self.t1 is not None:
            return super().norm()
        w1_a, w1_b, w2_a, w2_b = floats(self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        squared = 0.0
        for start in range(0, len(w1_a), _CHUNK):
            stop = start + _CHUNK
            rows = (w1_a[start:stop] @ w1_b.flatten(1)) * (w2_a[start:stop] @ w2_b.flatten(1))
            squared += float(rows.double().square().sum())
        return abs(self.scale) * sqrt(squared)

    def scaled(self, strength: float) -> LoHa:
        return self if strength == 1.0 else replace(self, w1_a=scaled_ref(self.w1_a, strength))

    def row_parts(self) -> dict[str, RowPart] | None:
        magnitude = magnitude_rows(self.magnitude)
        dim = RowPart(0 if self.t1 is None else 1)
        return None if magnitude is None else {"w1_a": dim, "w2_a": dim, **magnitude}
