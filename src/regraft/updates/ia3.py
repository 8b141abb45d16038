"""IA³: one factor per output row or input column (Liu et al. 2022, arXiv 2205.05638, section 3.3).

LyCORIS 4.1.3: W' = W · (1 + weight). PEFT 0.21.2: W' = W · ia3_l, and per output row the bias is scaled likewise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from torch import Tensor

from regraft.tensors import InMemory, Shape, TensorRef
from regraft.updates._kind import Kind, RowPart, needed


@dataclass(frozen=True)
class Ia3(Kind):
    """W' = W · factor, the factor along one axis.

    Attributes:
        weight: n numbers; (n,), (1, n), (n, 1) or (1, n, 1, 1).
        on_input: a scalar, not 0 where the factor is per input column. PEFT's files have none: its reader makes one.
        convention: whether the factor is 1 + weight (``lycoris``) or weight (``peft``).
        weight_shape: shape of the base's weight where it is known: the update itself knows one axis of it.
    """

    weight: TensorRef
    on_input: TensorRef
    convention: Literal["lycoris", "peft"] = "lycoris"
    weight_shape: Shape | None = None

    @property
    def kind(self) -> str:
        return "ia3"

    @property
    def shape(self) -> Shape:
        """Shape of ΔW where it is known, else that of the factors."""
        return self.weight_shape or self.weight.shape

    @property
    def rows(self) -> int | None:
        if self.weight_shape is not None:
            return self.weight_shape[0]
        return None if self.per_input else prod(self.weight.shape)

    def fits(self, weight_shape: Shape) -> bool:
        return len(weight_shape) > 1 and weight_shape[1 if self.per_input else 0] == prod(self.weight.shape)

    @property
    def additive(self) -> bool:
        return False

    @property
    def per_input(self) -> bool:
        return bool(self.on_input.load().item())

    def factor(self) -> Tensor:
        """What every row or column is multiplied by, (n,), float32."""
        weight = self.weight.load().float().flatten()
        return 1 + weight if self.convention == "lycoris" else weight

    def delta(self, weight: Tensor | None = None) -> Tensor:
        base = needed(weight, self.kind)
        along = [1] * base.dim()
        along[1 if self.per_input else 0] = -1
        return base * (self.factor() - 1).reshape(along)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The layer's bias as PEFT changes it, (out,), float32; LyCORIS leaves it as it is."""
        return bias.float() if self.per_input or self.convention == "lycoris" else bias.float() * self.factor()

    def scaled(self, strength: float) -> Ia3:
        if strength == 1.0:
            return self
        stored = self.weight.load()
        centre = 0.0 if self.convention == "lycoris" else 1.0
        moved = (centre + strength * (stored.float() - centre)).to(stored.dtype)
        return replace(self, weight=InMemory(moved))

    def row_parts(self) -> dict[str, RowPart] | None:
        if self.per_input:
            return {}
        shape = self.weight.shape
        return {"weight": RowPart(max(range(len(shape)), key=shape.__getitem__))}
