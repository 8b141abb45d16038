"""A parameter stored whole: PEFT's ``modules_to_save`` and trained biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from regraft.tensors import InMemory, Shape, TensorRef
from regraft.updates._kind import Kind, RowPart, needed


@dataclass(frozen=True)
class Full(Kind):
    """The whole value of one parameter: W' = value. Its change is known only beside the old base.

    Attributes:
        value: the parameter, of any shape.
        key: the key that the file gives it.
    """

    by_parameter: ClassVar[bool] = True

    value: TensorRef
    key: str

    @property
    def kind(self) -> str:
        return "full"

    @property
    def shape(self) -> Shape:
        return self.value.shape

    def fits(self, weight_shape: Shape) -> bool:
        return weight_shape == self.shape

    @property
    def additive(self) -> bool:
        return False

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """value − W, of `shape`."""
        return self.value.load().float() - needed(weight, self.kind).reshape(self.shape)

    def merged(self, weight: Tensor) -> Tensor:
        """The parameter's value, float32, of `shape`; the base's ``weight`` is replaced."""
        return self.value.load().float()

    def with_value(self, value: Tensor) -> Full:
        """The same update with another value, cast to the old one's dtype."""
        return replace(self, value=InMemory(value.to(self.value.dtype).contiguous()))

    def scaled(self, strength: float) -> Full:
        """The update itself at strength 1.

        Raises:
            ValueError: any other strength takes the base's weight: see `with_value`.
        """
        if strength != 1.0:
            raise ValueError("the strength of a whole parameter can't be changed without the base's weight")
        return self

    def row_parts(self) -> dict[str, RowPart] | None:
        return {"value": RowPart(0)} if self.shape else None
