"""The input columns (channels) of an update: some of them, or more than it has, for inputs that a new base widened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from regraft.tensors import TensorRef
from regraft.updates._views import Ranges, cut, n_rows, padded_to
from regraft.updates.diff import Diff
from regraft.updates.exact import as_lowrank
from regraft.updates.loha import LoHa
from regraft.updates.lokr import LoKr
from regraft.updates.lowrank import LowRank
from regraft.updates.rows import Slice, take_rows
from regraft.updates.tucker import Tucker

if TYPE_CHECKING:
    from regraft.updates import Update

# A tensor, its dimension along the inputs, and how many of its entries each input has → the changed tensor.
_Change = Callable[[TensorRef, int], TensorRef]


def take_columns(update: Update, ranges: Ranges) -> Update | None:
    """The update of some inputs of the weight, one range after the other; None where that is not exact.

    Args:
        update: of a weight with (out, in, …).
        ranges: (start, stop) of inputs.
    """

    def taken(ref: TensorRef, each: int) -> TensorRef:
        return cut(ref, [(start * each, stop * each) for start, stop in ranges], 1)

    return _changed(update, taken, n_rows(ranges))


def widen(update: Update, new_in: int) -> Update | None:
    """The update of a weight with inputs added at its end, which it leaves alone; None where that is not exact.

    Args:
        update: of a weight with (out, in, …).
        new_in: how many inputs the widened weight has.

    Raises:
        ValueError: the update has more.
    """

    def padded(ref: TensorRef, each: int) -> TensorRef:
        return padded_to(ref, 1, new_in * each)

    return update if update.shape[1:2] == (new_in,) else _changed(update, padded, new_in)


def _changed(update: Update, change: _Change, new_in: int) -> Update | None:
    # DoRA's norms take in every column.
    if update.magnitude is not None:
        return None
    if isinstance(update, (LowRank, Tucker)):
        return replace(update, down=change(update.down, 1))
    if isinstance(update, Diff) and len(update.shape) > 1:
        return replace(update, value=change(update.value, 1))
    if isinstance(update, LoHa):
        each = _kernel(update) if update.t1 is None and len(update.w1_b.shape) == 2 else 1
        shape = None if update.weight_shape is None else (update.shape[0], new_in, *update.shape[2:])
        return replace(update, w1_b=change(update.w1_b, each), w2_b=change(update.w2_b, each), weight_shape=shape)
    if isinstance(update, LoKr):
        # Whole groups of its inputs could be cut from w1 alone; as a LoRA any of them can.
        low = as_lowrank(update)
        return None if low is None else _changed(low, change, new_in)
    if isinstance(update, Slice):
        whole = _changed(update.of, change, new_in)
        return None if whole is None else take_rows(whole, update.ranges)
    return None


def _kernel(update: LoHa) -> int:
    """How many entries of a flattened kernel each input has."""
    return prod(update.shape[2:])
