"""LoCon's Tucker form: a low-rank change of a convolution whose kernel has its own core.

LyCORIS (Yeh et al. 2023, arXiv 2309.14859, section 3.2; version 4.1.3): W' = W + s · up × mid × down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import (
    Kind,
    RowPart,
    fitted,
    floats,
    magnitude_rows,
    scaled_ref,
    tucker_norm,
    tucker_product,
)


@dataclass(frozen=True)
class Tucker(Kind):
    """ΔW = scale · up × mid × down.

    Attributes:
        up: (out, r, 1, …).
        mid: (r, r, kh, kw).
        down: (r, in, 1, …).
        scale: alpha / r.
        alpha: alpha as the file stores it.
        magnitude: DoRA's m, as in `LowRank`.
    """

    up: TensorRef
    mid: TensorRef
    down: TensorRef
    scale: float
    alpha: TensorRef | None = None
    magnitude: TensorRef | None = None

    @property
    def kind(self) -> str:
        return "tucker"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> Shape:
        return (self.up.shape[0], self.down.shape[1], *self.mid.shape[2:])

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(mid, out_factor, in_factor)`` in float32: (r, r, kh, kw), (r, out), (r, in), without the scale."""
        up, mid, down = floats(self.up, self.mid, self.down)
        return mid, up.flatten(1).T, down.flatten(1)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return fitted(self.scale * tucker_product(*self.factors()), weight)

    def norm(self, weight: Tensor | None = None) -> float:
        return abs(self.scale) * tucker_norm(*self.factors())

    def scaled(self, strength: float) -> Tucker:
        return self if strength == 1.0 else replace(self, up=scaled_ref(self.up, strength))

    def row_parts(self) -> dict[str, RowPart] | None:
        magnitude = magnitude_rows(self.magnitude)
        return None if magnitude is None else {"up": RowPart(0), **magnitude}
