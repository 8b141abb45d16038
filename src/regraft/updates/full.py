"""A parameter stored whole: PEFT's ``modules_to_save`` and trained biases."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regraft.tensors import InMemory, Shape, TensorRef


@dataclass(frozen=True)
class Full:
    """The whole value of one parameter: W' = value. Its change is known only beside the old base.

    Attributes:
        value: the parameter, of any shape.
        key: the key that the file gives it.
    """

    value: TensorRef
    key: str
    alpha: None = None

    @property
    def kind(self) -> str:
        return "full"

    @property
    def rank(self) -> None:
        return None

    @property
    def shape(self) -> Shape:
        return self.value.shape

    def merged(self, weight: Tensor) -> Tensor:
        """The parameter's value, float32; the base's ``weight`` is replaced."""
        return self.value.load().float()

    def with_value(self, value: Tensor) -> Full:
        """The same update with another value, cast to the old one's dtype."""
        return replace(self, value=InMemory(value.to(self.value.dtype).contiguous()))

    def cast(self, dtype: torch.dtype) -> Full:
        return replace(self, value=InMemory(self.value.load().to(dtype)))
