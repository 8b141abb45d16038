"""LoRA and DoRA: a low-rank change of one weight, with or without DoRA's magnitude.

LoRA (Hu et al. 2021, arXiv 2106.09685): W' = W + s · B A. DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5):
W' = m · (W + s · B A) / ‖W + s · B A‖, the norm taken per output row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from regraft.tensors import InMemory, Shape, TensorRef
from regraft.updates._kind import Kind, RowPart, fitted, is_per_column, low_rank_norm, magnitude_rows, scaled_ref

__all__ = ["LowRank", "Orientation", "is_per_column"]

# How the file orders the factors: as the weight is, or transposed (PEFT on nn.Embedding and GPT-2's Conv1D).
Orientation = Literal["weight", "embedding", "conv1d"]


@dataclass(frozen=True)
class LowRank(Kind):
    """ΔW = scale · up · down, in the orientation of the base's own weight.

    Attributes:
        up: B, (out, r), or (out, r, 1, 1) for a convolution.
        down: A, (r, in), or (r, in, kh, kw) for a convolution.
        scale: the whole factor (alpha / r, or alpha / √r with rsLoRA).
        alpha: alpha as the file stores it; None where it stores none.
        magnitude: DoRA's m; per output row (out,) or (out, 1, …), or per input column (1, in, …).
        bias: the bias of B, (out,), scaled like ΔW (PEFT's ``lora_bias``).
        orientation: how the file lays the factors out.
    """

    up: TensorRef
    down: TensorRef
    scale: float
    alpha: TensorRef | None = None
    magnitude: TensorRef | None = None
    bias: TensorRef | None = None
    orientation: Orientation = "weight"

    @property
    def kind(self) -> str:
        return "dora" if self.magnitude is not None else "lora"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> Shape:
        """Shape of ΔW: (out, in) or (out, in, kh, kw)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(up, down)`` as float32 matrices, (out, r) and (r, in · kh · kw), without the scale."""
        return self.up.load().float().flatten(1), self.down.load().float().flatten(1)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        up, down = self.factors()
        return fitted((self.scale * (up @ down)).reshape(self.shape), weight)

    def norm(self, weight: Tensor | None = None) -> float:
        """‖ΔW‖_F through r × r Gram matrices: ΔW itself is never built."""
        return abs(self.scale) * low_rank_norm(*self.factors())

    def with_factors(self, up: Tensor, down: Tensor, shape: Shape | None = None) -> LowRank:
        """The same update with new factors, cast to the old ones' dtypes; the scale stays.

        Args:
            up: (out', r').
            down: (r', in' · kh · kw).
            shape: shape of the new ΔW where it differs from the old one.
        """
        shape = shape or (up.shape[0], *self.shape[1:])
        rank, tail = down.shape[0], [1] * (len(shape) - 2)
        return replace(
            self,
            up=InMemory(up.to(self.up.dtype).reshape(shape[0], rank, *tail).contiguous()),
            down=InMemory(down.to(self.down.dtype).reshape(rank, *shape[1:]).contiguous()),
        )

    def scaled(self, strength: float) -> LowRank:
        """strength · ΔW. The factor B takes it, so that alpha and rank stay as they are."""
        if strength == 1.0:
            return self
        bias = None if self.bias is None else scaled_ref(self.bias, strength)
        return replace(self, up=scaled_ref(self.up, strength), bias=bias)

    def row_parts(self) -> dict[str, RowPart] | None:
        magnitude = magnitude_rows(self.magnitude)
        if magnitude is None:
            return None
        bias = {} if self.bias is None else {"bias": RowPart(0)}
        return {"up": RowPart(0), **bias, **magnitude}
