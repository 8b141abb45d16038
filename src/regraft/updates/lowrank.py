"""LoRA and DoRA: a low-rank change of one weight, with or without DoRA's magnitude.

LoRA (Hu et al. 2021, arXiv 2106.09685): W' = W + s · B A. DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5):
W' = m · (W + s · B A) / ‖W + s · B A‖, the norm taken per output row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from regraft.tensors import InMemory, Shape, TensorRef

# How the file orders the factors: as the weight is, or transposed (PEFT on nn.Embedding and GPT-2's Conv1D).
Orientation = Literal["weight", "embedding", "conv1d"]


@dataclass(frozen=True)
class LowRank:
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

    def delta(self) -> Tensor:
        """ΔW in float32, of `shape`; DoRA's magnitude is not part of it (see `merged`)."""
        up, down = self.factors()
        return (self.scale * (up @ down)).reshape(self.shape)

    def merged(self, weight: Tensor) -> Tensor:
        """The changed weight, float32, of `shape`: what the real tools compute on the base ``weight``."""
        changed = weight.float().reshape(self.shape) + self.delta()
        if self.magnitude is None:
            return changed
        magnitude = self.magnitude.load().float()
        # Per input column, as LyCORIS and OneTrainer may have it: (1, in, …). Per output row comes as (out,).
        if is_per_column(magnitude.shape):
            norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (changed.dim() - 2))
            by_column: Tensor = changed * (magnitude.reshape(norm.shape) / norm)
            return by_column
        norm = changed.flatten(1).norm(dim=1).reshape(-1, *[1] * (changed.dim() - 1))
        by_row: Tensor = changed * (magnitude.reshape(norm.shape) / norm)
        return by_row

    def norm(self) -> float:
        """‖ΔW‖_F through r × r Gram matrices: ΔW itself is never built."""
        up, down = (factor.double() for factor in self.factors())
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return abs(self.scale) * float(squared.clamp_min(0).sqrt())

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
        up = self.up.load()
        bias = self.bias
        if bias is not None:
            bias = InMemory((bias.load().float() * strength).to(bias.dtype))
        return replace(self, up=InMemory((up.float() * strength).to(up.dtype)), bias=bias)

    def cast(self, dtype: torch.dtype) -> LowRank:
        """The same update with its tensors in ``dtype``."""

        def to(ref: TensorRef | None) -> TensorRef | None:
            return None if ref is None else InMemory(ref.load().to(dtype))

        up, down = InMemory(self.up.load().to(dtype)), InMemory(self.down.load().to(dtype))
        return replace(self, up=up, down=down, magnitude=to(self.magnitude), bias=to(self.bias), alpha=to(self.alpha))


def is_per_column(shape: Shape) -> bool:
    """Whether a DoRA magnitude of this shape holds one norm per input column, not per output row."""
    return len(shape) > 1 and shape[0] == 1
