"""Tensors cut out of, or put together from, other tensors by reference: nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from regraft.tensors import Shape, Stored, TensorRef, Transposed, read_rows

#: Ranges of rows, (start, stop), in the order in which they are wanted.
Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Cut:
    """A `TensorRef` to ranges along one dimension of another, one after the other. Make it by `cut`."""

    of: TensorRef
    ranges: tuple[tuple[int, int], ...]
    dim: int = 0

    @property
    def shape(self) -> Shape:
        shape = self.of.shape
        return (*shape[: self.dim], n_rows(self.ranges), *shape[self.dim + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def load(self) -> Tensor:
        if self.dim == 0:
            return read_rows(self.of, [range(*pair) for pair in self.ranges or ((0, 0),)])
        whole = self.of.load()
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges or ((0, 0),)]
        return torch.cat(pieces, self.dim)


def cut(ref: TensorRef, ranges: Ranges, dim: int = 0) -> TensorRef:
    """Ranges of ``ref`` along ``dim``; ``ref`` itself where they come to the whole in its order.

    Raises:
        ValueError: a range lies outside.
    """
    wanted = tuple(ranges)
    if any(not 0 <= start <= stop <= ref.shape[dim] for start, stop in wanted):
        raise ValueError(f"the rows {wanted} are not within the {ref.shape[dim]} there are")
    if isinstance(ref, Cut) and ref.dim == dim:
        return cut(ref.of, composed(ref.ranges, wanted), dim)
    wanted = merged(wanted)
    return ref if wanted == ((0, ref.shape[dim]),) else Cut(ref, wanted, dim)


def composed(outer: Ranges, inner: Ranges) -> tuple[tuple[int, int], ...]:
    """The ranges ``inner`` of what ``outer`` has taken, in terms of the whole."""
    found = []
    for start, stop in inner:
        at = 0
        for first, last in outer:
            low, high = max(start, at), min(stop, at + last - first)
            if low < high:
                found.append((first + low - at, first + high - at))
            at += last - first
    return tuple(found)


def merged(ranges: Ranges) -> tuple[tuple[int, int], ...]:
    """The same rows with neighbouring ranges made one, and empty ones left out."""
    result: list[tuple[int, int]] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def n_rows(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


@dataclass(frozen=True)
class Joined:
    """A `TensorRef` to several tensors, one after the other along one dimension."""

    parts: tuple[TensorRef, ...]
    dim: int = 0

    @property
    def shape(self) -> Shape:
        shape = self.parts[0].shape
        return (*shape[: self.dim], sum(part.shape[self.dim] for part in self.parts), *shape[self.dim + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return _common([part.dtype for part in self.parts])

    def load(self) -> Tensor:
        return torch.cat([part.load().to(self.dtype) for part in self.parts], self.dim)


def joined(parts: Sequence[TensorRef], dim: int = 0) -> TensorRef:
    """The tensors one after the other along ``dim``: a cut of one tensor again where all are cuts of it."""
    pieces = [
        (part.of, part.ranges) if isinstance(part, Cut) and part.dim == dim else (part, ((0, part.shape[dim]),))
        for part in parts
    ]
    whole = pieces[0][0]
    if all(_is(piece, whole) for piece, _ in pieces):
        return cut(whole, [pair for _, ranges in pieces for pair in ranges], dim)
    return Joined(tuple(parts), dim)


def _is(one: TensorRef, other: TensorRef) -> bool:
    return one is other or (isinstance(one, Stored) and isinstance(other, Stored) and one == other)


@dataclass(frozen=True)
class BlockDiagonal:
    """A `TensorRef` to matrices along a diagonal, each times its factor; (Σ rows, Σ columns, 1, …)."""

    parts: tuple[TensorRef, ...]
    factors: tuple[float, ...]

    @property
    def shape(self) -> Shape:
        rows, columns = (sum(part.shape[dim] for part in self.parts) for dim in (0, 1))
        return (rows, columns, *self.parts[0].shape[2:])

    @property
    def dtype(self) -> torch.dtype:
        return _common([part.dtype for part in self.parts])

    def load(self) -> Tensor:
        pairs = zip(self.parts, self.factors, strict=True)
        blocks = [_times(part.load(), factor).to(self.dtype).flatten(1) for part, factor in pairs]
        whole = torch.zeros(self.shape, dtype=self.dtype)
        row = column = 0
        for block in blocks:
            whole.flatten(1)[row : row + block.shape[0], column : column + block.shape[1]] = block
            row, column = row + block.shape[0], column + block.shape[1]
        return whole


@dataclass(frozen=True)
class Zeros:
    """A `TensorRef` to zeros."""

    shape: Shape
    dtype: torch.dtype

    def load(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class Cast:
    """A `TensorRef` to another in a dtype."""

    of: TensorRef
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:
        return self.of.shape

    def load(self) -> Tensor:
        return self.of.load().to(self.dtype)


def padded_to(ref: TensorRef, dim: int, size: int) -> TensorRef:
    """``ref`` with zeros at the end of ``dim``.

    Raises:
        ValueError: it is longer than ``size``.
    """
    missing = size - ref.shape[dim]
    if missing < 0:
        raise ValueError(f"a tensor of {ref.shape[dim]} can't be padded to {size}")
    shape = (*ref.shape[:dim], missing, *ref.shape[dim + 1 :])
    return ref if missing == 0 else Joined((ref, Zeros(shape, ref.dtype)), dim)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor.float() * factor


def _common(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    if len(set(dtypes)) == 1:
        return dtypes[0]
    # torch promotes no 8-bit floats.
    wide = [torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in dtypes]
    return reduce(torch.promote_types, wide)


def same(one: TensorRef | None, other: TensorRef | None) -> bool:
    """Whether both are the same tensor; values are read only where the references don't tell."""
    if one is None or other is None:
        return one is other
    if _is(one, other):
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if isinstance(one, Transposed) and isinstance(other, Transposed):
        return same(one.of, other.of)
    if isinstance(one, Cast) and isinstance(other, Cast) and same(one.of, other.of):
        return True
    if isinstance(one, Cut) and isinstance(other, Cut) and (one.dim, one.ranges) == (other.dim, other.ranges):
        return same(one.of, other.of)
    # By bytes: torch.equal knows no 8-bit floats.
    first, second = (ref.load().reshape(-1).view(torch.uint8) for ref in (one, other))
    return torch.equal(first, second)
