"""GLoRA: a low-rank change on both sides of the weight (Chavan et al. 2023, arXiv 2306.07967).

LyCORIS 4.1.3: W' = W + s · (W a1 a2 + b1 b2), the b half with a Tucker core where there is a ``bm``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import Kind, RowPart, fitted, floats, needed, scaled_ref, tucker_product


@dataclass(frozen=True)
class GLora(Kind):
    """ΔW = scale · (W a1 a2 + b1 b2).

    Attributes:
        a1: (in, r), or (in, r, 1, 1).
        a2: (r, in), or (r, in, 1, 1).
        b1: (out, r), or (out, r, 1, 1).
        b2: (r, in), (r, in, kh, kw), or (r, in, 1, 1) beside ``bm``.
        scale: alpha / r. LyCORIS does not fold its ``rs_lora`` into the stored alpha here.
        bm: (r, r, kh, kw).
        alpha: alpha as the file stores it.
    """

    a1: TensorRef
    a2: TensorRef
    b1: TensorRef
    b2: TensorRef
    scale: float
    bm: TensorRef | None = None
    alpha: TensorRef | None = None

    @property
    def kind(self) -> str:
        return "glora"

    @property
    def rank(self) -> int:
        return self.a2.shape[0]

    @property
    def shape(self) -> Shape:
        kernel = self.b2.shape[2:] if self.bm is None else self.bm.shape[2:]
        return (self.b1.shape[0], self.b2.shape[1], *kernel)

    @property
    def additive(self) -> bool:
        return False

    def delta(self, weight: Tensor | None = None) -> Tensor:
        base = needed(weight, self.kind)
        a1, a2 = (factor.flatten(1) for factor in floats(self.a1, self.a2))
        turned = torch.einsum("oi...,ir,rj->oj...", base, a1, a2)
        return self.scale * (turned + fitted(self.added(), base))

    def added(self) -> Tensor:
        """b1 b2, the half that does not depend on the base, of `shape`, float32."""
        b1, b2 = floats(self.b1, self.b2)
        if self.bm is not None:
            return tucker_product(self.bm.load().float(), b1.flatten(1).T, b2.flatten(1))
        return (b1.flatten(1) @ b2.flatten(1)).reshape(self.shape)

    def scaled(self, strength: float) -> GLora:
        if strength == 1.0:
            return self
        return replace(self, a1=scaled_ref(self.a1, strength), b1=scaled_ref(self.b1, strength))

    def row_parts(self) -> dict[str, RowPart] | None:
        return {"b1": RowPart(0)}
