"""The rows of an update: parts of a fused weight's update, and the fused update of parts.

A fused projection (qkv) is one weight whose rows are those of several. `take_rows` gives the update of some of its
rows, `join_rows` the fused update again: the very same tensors where the parts came from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.errors import OutputError
from regraft.tensors import InMemory, Shape, TensorRef
from regraft.updates._kind import Kind, decomposed, is_per_column
from regraft.updates._views import BlockDiagonal, Ranges, Zeros, cut, joined, n_rows, same
from regraft.updates._views import composed as composed_ranges
from regraft.updates._views import merged as merged_ranges
from regraft.updates.lowrank import LowRank

if TYPE_CHECKING:
    from regraft.updates import Update


@dataclass(frozen=True)
class Slice(Kind):
    """Some rows of an update whose tensors can't be cut along them.

    Attributes:
        of: the update of the whole weight.
        ranges: (start, stop) of rows, in the order in which they are wanted.
    """

    of: Update
    ranges: tuple[tuple[int, int], ...]

    @property
    def kind(self) -> str:
        return self.of.kind

    @property
    def rank(self) -> int | None:
        return self.of.rank

    @property
    def shape(self) -> Shape:
        return (n_rows(self.ranges), *self.of.shape[1:])

    @property
    def rows(self) -> int:
        return n_rows(self.ranges)

    def fits(self, weight_shape: Shape) -> bool:
        """Whether these can be rows of a weight that the whole update fits."""
        whole = self.of.rows
        return self.rows == weight_shape[0] and self.of.fits((whole or weight_shape[0], *weight_shape[1:]))

    @property
    def alpha(self) -> TensorRef | None:
        return self.of.alpha

    @property
    def magnitude(self) -> TensorRef | None:
        """DoRA's magnitudes: those of the rows, or the whole weight's where they are per input column."""
        whole = self.of.magnitude
        return whole if whole is None or is_per_column(whole.shape) else cut(whole, self.ranges)

    @property
    def additive(self) -> bool:
        return self.of.additive

    def parts(self) -> dict[str, TensorRef]:
        """The tensors of the whole update."""
        return self.of.parts()

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The rows of ΔW, of `shape`.

        Args:
            weight: where ΔW depends on it: the whole weight, not its rows.

        Raises:
            ValueError: ΔW depends on the whole weight, and it is not given.
        """
        if self._rows_alone:
            rows = self._rows(self.of.delta())
            return rows.reshape(weight.shape) if weight is not None and weight.numel() == rows.numel() else rows
        return self._rows(self.of.delta(self._whole(weight)))

    def merged(self, weight: Tensor) -> Tensor:
        """The changed rows, float32.

        Args:
            weight: the rows of the weight; the whole weight where the update acts across its rows.

        Raises:
            ValueError: the whole weight is needed.
        """
        magnitude = self.magnitude
        if self._rows_alone and (magnitude is None or not is_per_column(magnitude.shape)):
            return decomposed(weight.float() + self.delta(weight).reshape(weight.shape), magnitude)
        return self._rows(self.of.merged(self._whole(weight)))

    def scaled(self, strength: float) -> Slice:
        return replace(self, of=self.of.scaled(strength))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Slice:
        return replace(self, of=self.of.mapped(change))

    @property
    def _rows_alone(self) -> bool:
        return self.of.additive or self.of.magnitude is not None

    def _rows(self, whole: Tensor) -> Tensor:
        return torch.cat([whole[start:stop] for start, stop in self.ranges])

    def _whole(self, weight: Tensor | None) -> Tensor:
        rows = self.of.rows
        enough = weight is not None and weight.shape[0] >= max(stop for _, stop in self.ranges)
        if weight is None or not enough or (rows is not None and weight.shape[0] != rows):
            raise ValueError(f"a {self.kind} update acts across the rows of a fused weight and needs the whole of it")
        return weight


def take_rows(update: Update, ranges: Ranges) -> Update:
    """The update of the rows ``ranges`` of the weight, one range after the other; exact, and nothing is read.

    Args:
        update: of a weight with (out, …).
        ranges: (start, stop) of rows.

    Raises:
        ValueError: a range lies outside.
    """
    ranges = merged_ranges(ranges)
    if isinstance(update, Slice):
        return take_rows(update.of, composed_ranges(update.ranges, ranges))
    along = update.row_parts()
    if along is None or any(bound % part.rows_each for part in along.values() for pair in ranges for bound in pair):
        whole = update.rows
        if whole is not None and any(not 0 <= start <= stop <= whole for start, stop in ranges):
            raise ValueError(f"the rows {ranges} are not within the {whole} there are")
        return update if ranges == ((0, whole),) else Slice(update, ranges)
    changes: dict[str, Any] = {}
    for name, (dim, each) in along.items():
        changes[name] = cut(getattr(update, name), [(start // each, stop // each) for start, stop in ranges], dim)
    if getattr(update, "weight_shape", None) is not None:
        changes["weight_shape"] = (n_rows(ranges), *update.shape[1:])
    if along and all(getattr(update, name) is changes[name] for name in along):
        return update
    return replace(update, **changes)


def empty(shape: Shape, dtype: torch.dtype = torch.float32) -> LowRank:
    """A LoRA of rank 0: the part of a fused weight that an adapter leaves alone."""
    tail = (1,) * (len(shape) - 2)
    return LowRank(Zeros((shape[0], 0, *tail), dtype), Zeros((0, *shape[1:]), dtype), 1.0)


def join_rows(parts: Sequence[Update]) -> Update:
    """The update of a fused weight from those of its parts, in the order of its rows; the inverse of `take_rows`.

    Parts that were taken from one update come back as that update, with the same tensors. Parts that differ only in
    what runs along the rows (equal ``down`` and scale in LoRA) keep their rank. Other LoRA become block-diagonal: the
    rank is the sum, and scales that differ are folded into ``up``.

    Raises:
        OutputError: the kinds can't be joined exactly.
    """
    if len(parts) == 1:
        return parts[0]
    update = _one_update(parts) or _along_rows(parts) or _block_diagonal(parts)
    if update is None:
        kinds = ", ".join(dict.fromkeys(part.kind for part in parts))
        raise OutputError(
            f"updates of the parts of a fused weight ({kinds}) can't be joined exactly",
            remedy="Turn them into LoRA first, or write a format that keeps the parts.",
        )
    return update


def _one_update(parts: Sequence[Update]) -> Update | None:
    """The update that all parts are slices of."""
    slices = [part for part in parts if isinstance(part, Slice)]
    if len(slices) < len(parts) or not all(_equal(part.of, slices[0].of) for part in slices):
        return None
    whole, ranges = slices[0].of, merged_ranges([pair for part in slices for pair in part.ranges])
    # Some kinds don't know how many rows the weight has: the parts together are the whole.
    complete = len(ranges) == 1 and ranges[0][0] == 0 and whole.rows in (None, ranges[0][1])
    return whole if complete else Slice(whole, ranges)


def _equal(one: Update, other: Update, apart_from: Sequence[str] = ()) -> bool:
    """Whether two updates of one kind are the same but for some fields."""
    if type(one) is not type(other):
        return False
    for name in (field.name for field in fields(one) if field.name not in apart_from):
        a, b = getattr(one, name), getattr(other, name)
        if a is not b and not (same(a, b) if hasattr(a, "load") and hasattr(b, "load") else a == b):
            return False
    return True


def _along_rows(parts: Sequence[Update]) -> Update | None:
    """Parts of one kind that share whatever serves every row."""
    first, along = parts[0], parts[0].row_parts()
    if along is None or any(type(part) is not type(first) or part.row_parts() != along for part in parts):
        return None
    if any(not _equal(first, part, (*along, "key", "weight_shape")) for part in parts[1:]):
        return None
    changes: dict[str, Any] = {}
    for name, (dim, _) in along.items():
        refs = [getattr(part, name) for part in parts]
        if len({(*ref.shape[:dim], *ref.shape[dim + 1 :]) for ref in refs}) > 1:
            return None
        changes[name] = joined(refs, dim)
    if getattr(first, "weight_shape", None) is not None:
        changes["weight_shape"] = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return replace(first, **changes)


def _block_diagonal(parts: Sequence[Update]) -> LowRank | None:
    loras = [part for part in parts if isinstance(part, LowRank)]
    if len(loras) < len(parts) or len({(part.shape[1:], part.orientation) for part in loras}) > 1:
        return None
    trained = [part for part in loras if part.rank] or loras[:1]
    first = trained[0]
    magnitudes = [part.magnitude for part in loras if part.magnitude is not None]
    if magnitudes and (len(magnitudes) < len(loras) or any(is_per_column(m.shape) for m in magnitudes)):
        return None
    shared = all(same(part.down, first.down) and part.scale == first.scale for part in trained[1:])
    even = len({part.scale for part in trained}) == 1
    factors = tuple(1.0 if even or not part.rank else part.scale for part in loras)
    if shared:
        ups = [part.up if part.rank else Zeros((part.shape[0], *first.up.shape[1:]), first.up.dtype) for part in loras]
        up, down = joined(ups), first.down
    else:
        up, down = BlockDiagonal(tuple(part.up for part in loras), factors), joined([part.down for part in trained])
    scale = first.scale if even else 1.0
    return LowRank(
        up,
        down,
        scale,
        alpha=_alpha(trained, scale, down.shape[0]),
        magnitude=joined(magnitudes) if magnitudes else None,
        bias=_bias(loras, factors),
        orientation=first.orientation,
    )


def _alpha(parts: Sequence[LowRank], scale: float, rank: int) -> TensorRef | None:
    """alpha so that alpha / rank is the scale, where the parts store one."""
    stored = [part.alpha for part in parts if part.alpha is not None]
    if not stored:
        return None
    value = torch.tensor(scale * rank, dtype=torch.float64)
    narrow = value.to(stored[0].dtype)
    return InMemory(narrow if float(narrow) == float(value) else value.float())


def _bias(parts: Sequence[LowRank], factors: Sequence[float]) -> TensorRef | None:
    stored = [part.bias for part in parts if part.bias is not None]
    if not stored:
        return None
    biases: list[TensorRef] = []
    for part, factor in zip(parts, factors, strict=True):
        if part.bias is None:
            biases.append(Zeros((part.shape[0],), stored[0].dtype))
        else:
            biases.append(part.bias if factor == 1.0 else InMemory(part.bias.load().float() * factor))
    return joined(biases)
