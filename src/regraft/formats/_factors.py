"""Views of factors: the shapes and orientations in which formats store what `LowRank` holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from regraft.errors import OutputError
from regraft.tensors import InMemory, Shape, TensorRef, Transposed
from regraft.updates import LowRank


@dataclass(frozen=True)
class Reshaped:
    """A `TensorRef` to the same values in another shape."""

    of: TensorRef
    shape: Shape

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    @property
    def name(self) -> str:
        """The file's own key, for messages."""
        return str(getattr(self.of, "name", "a tensor in memory"))

    def load(self) -> Tensor:
        return self.of.load().reshape(self.shape)


@dataclass(frozen=True)
class Repeated:
    """A `TensorRef` to a matrix whose columns each stand ``times`` times, side by side."""

    of: TensorRef
    times: int

    @property
    def shape(self) -> Shape:
        rows, columns = self.of.shape
        return rows, columns * self.times

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def load(self) -> Tensor:
        return self.of.load().repeat_interleave(self.times, 1)


def flat(ref: TensorRef) -> TensorRef:
    """A view with one dimension."""
    return ref if len(ref.shape) == 1 else Reshaped(ref, (prod(ref.shape),))


def transposed(ref: TensorRef) -> TensorRef:
    """The transpose, or what ``ref`` is the transpose of."""
    return ref.of if isinstance(ref, Transposed) else InMemory(ref.load().T.contiguous())


def folded(update: LowRank) -> LowRank:
    """The same ΔW with scale 1: B takes the factor."""
    if update.scale == 1.0:
        return update
    return replace(update.scaled(update.scale), scale=1.0, alpha=None)


def magnitude_per_output(update: LowRank, format: str, module: object) -> TensorRef:
    """DoRA's magnitude as PEFT and diffusers store it: (out,), or (1, out, 1, 1) on a convolution.

    Raises:
        OutputError: it is a norm per input column, which they have no place for.
    """
    assert update.magnitude is not None
    size, turned = update.shape[0], update.orientation != "weight"
    shape = update.magnitude.shape
    if turned:
        size = update.shape[1]
    per_input = not turned and len(shape) > 1 and shape[0] == 1 and shape[1] == update.shape[1]
    ref = flat(update.magnitude)
    if per_input or ref.shape != (size,):
        raise cannot_hold(format, "DoRA magnitudes per input column", module, "Keep the old format, or write kohya.")
    if len(update.shape) > 2:
        return Reshaped(ref, (1, size, *[1] * (len(update.shape) - 2)))
    return ref


#: The remedy where there is no better one.
KEEP = "Keep the old format."


def cannot_hold(format: str, what: str, module: object, remedy: str = KEEP) -> OutputError:
    """The error for an update that a format has no place for."""
    return OutputError(f"{format} files can't hold {what}", key=str(module), remedy=remedy)
