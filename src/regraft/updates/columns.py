"""More input columns (channels) than an update has: for weights whose inputs a new base widened."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from regraft.updates._views import padded_to
from regraft.updates.diff import Diff
from regraft.updates.exact import as_lowrank
from regraft.updates.foura import Foura
from regraft.updates.fourierft import FourierFT
from regraft.updates.loha import LoHa
from regraft.updates.lokr import LoKr
from regraft.updates.lorax import Subspace
from regraft.updates.lowrank import LowRank
from regraft.updates.rows import Slice, take_rows
from regraft.updates.tucker import Tucker
from regraft.updates.vera import Vera

if TYPE_CHECKING:
    from regraft.updates import Update


def widen(update: Update, new_in: int) -> Update | None:
    """The update of a weight with inputs added at its end, which it leaves alone; None where that is not exact.

    Args:
        update: of a weight with (out, in, …).
        new_in: how many inputs the widened weight has.

    Raises:
        ValueError: the update has more.
    """
    if update.shape[1:2] == (new_in,):
        return update
    # DoRA's norms take in every column.
    if update.magnitude is not None:
        return None
    if isinstance(update, (LowRank, Tucker)):
        return replace(update, down=padded_to(update.down, 1, new_in))
    if isinstance(update, Diff) and len(update.shape) > 1:
        return replace(update, value=padded_to(update.value, 1, new_in))
    if isinstance(update, LoHa):
        # Without a core, the kernel of each input lies flattened.
        flat = update.t1 is None and len(update.w1_b.shape) == 2
        size = new_in * prod(update.shape[2:]) if flat else new_in
        shape = None if update.weight_shape is None else (update.shape[0], new_in, *update.shape[2:])
        w1_b, w2_b = padded_to(update.w1_b, 1, size), padded_to(update.w2_b, 1, size)
        return replace(update, w1_b=w1_b, w2_b=w2_b, weight_shape=shape)
    if isinstance(update, Subspace):
        # A flattened kernel's inputs don't lie at its end.
        if update.v is None or len(update.shape) > 2:
            return None
        shape = None if update.weight_shape is None else (update.shape[0], new_in)
        return replace(update, v=padded_to(update.v, 0, new_in), weight_shape=shape)
    if isinstance(update, (LoKr, Foura, Vera, FourierFT)):
        # A LoKr's new width need not be a multiple of w2's; transforms take in every column; VeRA's A goes on.
        low = as_lowrank(update, dense=True)
        return None if low is None else widen(low, new_in)
    if isinstance(update, Slice):
        whole = widen(update.of, new_in)
        return None if whole is None else take_rows(whole, update.ranges)
    return None
