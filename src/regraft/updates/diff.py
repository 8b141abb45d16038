"""The change of one parameter, stored whole: ``diff``, ``diff_b`` (LyCORIS, ComfyUI), ``w_norm``, ``b_norm``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import Kind, RowPart, fitted, scaled_ref


@dataclass(frozen=True)
class Diff(Kind):
    """ΔW = value, for a weight, a norm or a bias; LyCORIS knows neither alpha nor scale here.

    Attributes:
        value: the change, of the parameter's shape.
        key: the key that the file gives it.
    """

    by_parameter: ClassVar[bool] = True

    value: TensorRef
    key: str

    @property
    def kind(self) -> str:
        return "diff"

    @property
    def shape(self) -> Shape:
        return self.value.shape

    def fits(self, weight_shape: Shape) -> bool:
        return super().fits(weight_shape) if len(self.shape) > 1 else weight_shape == self.shape

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return fitted(self.value.load().float(), weight)

    def scaled(self, strength: float) -> Diff:
        return self if strength == 1.0 else replace(self, value=scaled_ref(self.value, strength))

    def row_parts(self) -> dict[str, RowPart] | None:
        return {"value": RowPart(0)} if self.shape else None
