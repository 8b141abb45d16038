"""LoKr: the Kronecker product of a small and a large matrix, either of them low-rank or full.

As LyCORIS 4.1.3 and PEFT 0.21.2 store it (Yeh et al. 2023, arXiv 2309.14859, section 3.3): W' = W + s · w1 ⊗ w2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import (
    Kind,
    RowPart,
    fits_flattened,
    fitted,
    floats,
    low_rank_norm,
    magnitude_rows,
    scaled_ref,
    tucker_norm,
    tucker_product,
)


@dataclass(frozen=True)
class LoKr(Kind):
    """ΔW = scale · w1 ⊗ w2, with out = l · k and in = m · n.

    Attributes:
        scale: alpha / r; 1 where both halves are full, whatever alpha says.
        w1: (l, m), or None where it is ``w1_a w1_b``.
        w1_a: (l, r).
        w1_b: (r, m).
        w2: (k, n, kh, kw), or None where it is a product.
        w2_a: (k, r); in the Tucker form (r, k).
        w2_b: (r, n · kh · kw); in the Tucker form (r, n).
        t2: (r, r, kh, kw), of the Tucker form.
        alpha: alpha as the file stores it.
        magnitude: DoRA's m, as in `LowRank`.
        weight_shape: shape of the base's weight where it is known: a low-rank w2 flattens the kernel.
    """

    scale: float
    w1: TensorRef | None = None
    w1_a: TensorRef | None = None
    w1_b: TensorRef | None = None
    w2: TensorRef | None = None
    w2_a: TensorRef | None = None
    w2_b: TensorRef | None = None
    t2: TensorRef | None = None
    alpha: TensorRef | None = None
    magnitude: TensorRef | None = None
    weight_shape: Shape | None = None

    def __post_init__(self) -> None:
        for whole, a, b in ((self.w1, self.w1_a, self.w1_b), (self.w2, self.w2_a, self.w2_b)):
            if (whole is None) == (a is None or b is None):
                raise ValueError("each half of a LoKr update is one matrix or the product of two")

    @property
    def kind(self) -> str:
        return "lokr"

    def fits(self, weight_shape: Shape) -> bool:
        return super().fits(weight_shape) or fits_flattened(self.shape, weight_shape)

    @property
    def rank(self) -> int | None:
        """The rank of the low-rank halves, which alpha is divided by; None where both halves are full."""
        low = self.w1_b if self.w1_b is not None else self.w2_b
        return None if low is None else low.shape[0]

    @property
    def shape(self) -> Shape:
        if self.weight_shape is not None:
            return self.weight_shape
        one, two = self.half_shapes()
        return (one[0] * two[0], one[1] * two[1], *two[2:])

    def half_shapes(self) -> tuple[Shape, Shape]:
        """Shapes of w1, (l, m), and of w2, (k, n, …) or (k, n · kh · kw)."""
        if self.w1 is not None:
            one = self.w1.shape
        else:
            assert self.w1_a is not None
            assert self.w1_b is not None
            one = (self.w1_a.shape[0], self.w1_b.shape[1])
        if self.w2 is not None:
            return one, self.w2.shape
        assert self.w2_a is not None
        assert self.w2_b is not None
        if self.t2 is not None:
            return one, (self.w2_a.shape[1], self.w2_b.shape[1], *self.t2.shape[2:])
        return one, (self.w2_a.shape[0], *self.w2_b.shape[1:])

    def first(self) -> Tensor:
        """w1 in float32, (l, m)."""
        if self.w1 is not None:
            return self.w1.load().float()
        assert self.w1_a is not None
        assert self.w1_b is not None
        a, b = floats(self.w1_a, self.w1_b)
        return a @ b

    def second(self) -> Tensor:
        """w2 in float32, (k, n, …) or (k, n · kh · kw)."""
        if self.w2 is not None:
            return self.w2.load().float()
        assert self.w2_a is not None
        assert self.w2_b is not None
        a, b = floats(self.w2_a, self.w2_b)
        if self.t2 is not None:
            return tucker_product(self.t2.load().float(), a, b)
        return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        one, two = self.first(), self.second()
        product = torch.kron(one.reshape(*one.shape, *[1] * (two.dim() - 2)), two.contiguous())
        return fitted((self.scale * product).reshape(self.shape), weight)

    def norm(self, weight: Tensor | None = None) -> float:
        """‖ΔW‖_F = scale · ‖w1‖ · ‖w2‖: the product is never built."""
        if self.w2 is not None:
            second = float(self.w2.load().double().norm())
        else:
            assert self.w2_a is not None
            assert self.w2_b is not None
            a, b = floats(self.w2_a, self.w2_b)
            tucker = None if self.t2 is None else self.t2.load()
            second = low_rank_norm(a, b.flatten(1)) if tucker is None else tucker_norm(tucker, a, b)
        return abs(self.scale) * float(self.first().double().norm()) * second

    def scaled(self, strength: float) -> LoKr:
        if strength == 1.0:
            return self
        if self.w1 is not None:
            return replace(self, w1=scaled_ref(self.w1, strength))
        assert self.w1_a is not None
        return replace(self, w1_a=scaled_ref(self.w1_a, strength))

    def row_parts(self) -> dict[str, RowPart] | None:
        magnitude = magnitude_rows(self.magnitude)
        if magnitude is None:
            return None
        rows = self.half_shapes()[1][0]
        return {"w1_a" if self.w1 is None else "w1": RowPart(0, rows), **magnitude}
