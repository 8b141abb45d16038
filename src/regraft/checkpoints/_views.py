"""Views of tensors on disk: rows of a fused weight, another order, another shape. Nothing is read until asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from regraft.tensors import Shape, TensorRef, read_rows


def row_numbers(ranges: Sequence[range], count: int) -> Tensor:
    """The numbers of the rows in ``ranges``, those beyond ``count`` left out."""
    return torch.tensor(list(chain(*(range(count)[part.start : part.stop] for part in ranges))), dtype=torch.long)


def _runs(numbers: list[int]) -> Iterator[range]:
    """Consecutive numbers as ranges, in their order."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield range(numbers[start], numbers[end - 1] + 1)
            start = end


@dataclass(frozen=True)
class RowRanges:
    """Rows of ``of``, range after range: query, key or value out of one fused weight, or two halves swapped."""

    of: TensorRef
    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> Shape:
        return (sum(end - start for start, end in self.ranges), *self.of.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def load(self) -> Tensor:
        return read_rows(self.of, [range(*part) for part in self.ranges])

    def rows(self, ranges: Sequence[range]) -> Tensor:
        held = list(chain(*(range(*part) for part in self.ranges)))
        inside = [held[i] for i in row_numbers(ranges, len(held)).tolist()]
        return read_rows(self.of, list(_runs(inside)) or [range(0)])


@dataclass(frozen=True)
class Reordered:
    """The rows of ``of`` in another order.

    Attributes:
        source: maps numbers of rows of this tensor to those of ``of`` (int64, same shape).
    """

    of: TensorRef
    source: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def shape(self) -> Shape:
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def load(self) -> Tensor:
        return self.of.load()[self.source(torch.arange(self.shape[0]))]

    def rows(self, ranges: Sequence[range]) -> Tensor:
        wanted, places = torch.unique(self.source(row_numbers(ranges, self.shape[0])), return_inverse=True)
        return read_rows(self.of, list(_runs(wanted.tolist())) or [range(0)])[places]


@dataclass(frozen=True)
class Reshaped:
    """The same values in another shape."""

    of: TensorRef
    shape: Shape

    def __post_init__(self) -> None:
        if prod(self.shape) != prod(self.of.shape):
            raise ValueError(f"{list(self.of.shape)} can't be shown as {list(self.shape)}")

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def load(self) -> Tensor:
        return self.of.load().reshape(self.shape)

    def rows(self, ranges: Sequence[range]) -> Tensor:
        if self.of.shape[:1] != self.shape[:1]:
            return self.load()[row_numbers(ranges, self.shape[0])]
        part = read_rows(self.of, ranges)
        return part.reshape(part.shape[0], *self.shape[1:])


@dataclass(frozen=True)
class Shifted:
    """``of`` plus a number: Gemma's norms, which llama.cpp stores with their 1 added."""

    of: TensorRef
    by: float

    @property
    def shape(self) -> Shape:
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def load(self) -> Tensor:
        return self.of.load() + self.by

    def rows(self, ranges: Sequence[range]) -> Tensor:
        return read_rows(self.of, ranges) + self.by


def leaves(ref: TensorRef) -> Iterator[TensorRef]:
    """Every stored tensor that ``ref`` is made from."""
    values: list[Any] = [getattr(ref, part.name) for part in fields(ref)] if is_dataclass(ref) else []
    parts = [item for value in values for item in (value if isinstance(value, tuple) else (value,)) if _is_ref(item)]
    if not parts:
        yield ref
    for part in parts:
        yield from leaves(part)


def _is_ref(value: Any) -> bool:
    return is_dataclass(value) and hasattr(value, "load")
