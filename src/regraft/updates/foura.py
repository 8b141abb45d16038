"""FouRA: a low-rank change in the frequency domain of the channels (Borse et al. 2024, arXiv 2406.08798).

ΔW = scale · F⁻¹ B diag(mask) A F, which is a plain LoRA: see `regraft.frequency`. A gate that depends on the input is
none, and has no place here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from regraft.frequency import folded_down, folded_up
from regraft.tensors import InMemory, Shape, TensorRef
from regraft.updates._kind import Kind, fitted, scaled_ref
from regraft.updates.lowrank import LowRank


@dataclass(frozen=True)
class Foura(Kind):
    """ΔW = scale · F⁻¹ B diag(mask) A F, with a fixed mask or none.

    Attributes:
        a: (r, in, …), or complex of the Fourier transform, (r, in // 2 + 1, …, 2).
        b: (out, r), or (out // 2 + 1, r, 2).
        scale: foura_alpha / r.
        mask: (r,), 0 or 1.
        size: (out, in) where the factors are complex.
        orientation: ``conv1d`` where the base's weight is (in, out).
    """

    a: TensorRef
    b: TensorRef
    scale: float
    mask: TensorRef | None = None
    size: tuple[int, int] | None = None
    orientation: Literal["weight", "conv1d"] = "weight"

    @property
    def kind(self) -> str:
        return "foura"

    @property
    def rank(self) -> int:
        """r, of which a mask may close some and which the Fourier transform doubles."""
        return self.b.shape[1]

    @property
    def shape(self) -> Shape:
        """Shape of ΔW, in the base's orientation."""
        outs, ins = self.size or (self.b.shape[0], self.a.shape[1])
        if self.orientation == "conv1d":
            return ins, outs
        return outs, ins, *(self.a.shape[2:] if self.size is None else self.a.shape[2:-1])

    def as_lowrank(self) -> LowRank:
        """The same change as a LoRA of the directions that are open, float32."""
        transform, (outs, ins) = (
            ("dct" if self.size is None else "fft"),
            self.size or (self.b.shape[0], self.a.shape[1]),
        )
        up, down = folded_up(self.b.load(), outs, transform), folded_down(self.a.load(), ins, transform)
        if self.mask is not None:
            mask = self.mask.load().float()
            mask = mask if self.size is None else torch.cat([mask, mask])
            kept = mask != 0
            up, down = (up * mask)[:, kept], down[kept]
        if self.orientation == "conv1d":
            up, down = down.mT, up.mT
        tail = [1] * (len(self.shape) - 2)
        up = up.reshape(*up.shape, *tail)
        return LowRank(InMemory(up.contiguous()), InMemory(down.contiguous()), self.scale, orientation=self.orientation)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return fitted(self.as_lowrank().delta(), weight)

    def scaled(self, strength: float) -> Foura:
        # The scale is the config's: the strength goes into a factor.
        return self if strength == 1.0 else replace(self, b=scaled_ref(self.b, strength))
