"""Changes that take the shape of the base's weight, which their files don't tell, and nothing else of it."""

from __future__ import annotations

from math import prod
from typing import Literal

from torch import Tensor

from regraft.tensors import Shape
from regraft.updates._kind import Kind


class ByShape(Kind):
    """A change of a matrix whose shape is told by the base alone.

    Once the shape is told, ΔW is the same on every weight; before that, it takes a weight to be made.

    Attributes:
        weight_shape: shape of the base's weight where it is known.
        orientation: ``conv1d`` where that is (in, out).
    """

    weight_shape: Shape | None
    orientation: Literal["weight", "conv1d"]

    @property
    def additive(self) -> bool:
        return self.weight_shape is not None

    @property
    def rows(self) -> int | None:
        return None if self.weight_shape is None else self.weight_shape[0]

    def sides(self, weight: Tensor | None = None) -> tuple[int, int]:
        """(out, in) of the layer, by the known shape or by ``weight``.

        Raises:
            ValueError: there is neither.
        """
        shape = self.weight_shape if self.weight_shape is not None or weight is None else tuple(weight.shape)
        if shape is None:
            raise ValueError(f"the change of a {self.kind} update depends on the base's weight: on its shape")
        return self._sides_of(shape)

    def _sides_of(self, shape: Shape) -> tuple[int, int]:
        first, second = shape[0], prod(shape[1:])
        return (second, first) if self.orientation == "conv1d" else (first, second)
