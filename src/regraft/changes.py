"""Updates that are no plain factors, as the low-rank change that they make: what any method can carry.

LoRA, Tucker, LoHa, LoKr, FouRA and VeRA equal a LoRA on every weight. IA3, OFT, BOFT, GLoRA, SVDiff and LoRA-X act on
the weight itself: theirs is ΔW = merged(W_old) − W_old. That and FourierFT's are taken at their numerical rank, so that
nothing is lost before a cut that is asked for.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from regraft.tensors import InMemory
from regraft.updates import Boft, ByShape, Ia3, LowRank, Oft, Slice, SpectralShift, Subspace, Update
from regraft.updates.exact import is_factored, refactor


def is_copied(update: Update, *, weakened: bool = False) -> bool:
    """Whether a copy can carry the update as it is; told without reading a tensor.

    SVDiff's shifts and LoRA-X's numbers go by the order of the old weight's singular values, which another weight does
    not have; a LoRA-X that brings its own vectors does not. No file holds a rotation at a part of its strength.

    Args:
        update: any.
        weakened: another strength than 1 is wanted.
    """
    whole = update.of if isinstance(update, Slice) else update
    ordered = isinstance(whole, SpectralShift) or (isinstance(whole, Subspace) and not whole.additive)
    return not ordered and not (weakened and isinstance(whole, Oft | Boft))


def takes_old(update: Update, *, identity: bool, recut: bool, weakened: bool) -> bool:
    """Whether the old base's weight is needed to carry an update.

    Args:
        update: any.
        identity: the transport is a copy.
        recut: another rank is wanted.
        weakened: another strength than 1 is wanted.
    """
    if isinstance(update, ByShape) and update.additive:
        return False
    return not is_factored(update) and (recut or not identity or not is_copied(update, weakened=weakened))


def by_itself(update: Update) -> LowRank | None:
    """A change that depends on no weight as a LoRA of its numerical rank; None where it depends on one."""
    known = isinstance(update, ByShape) and update.additive
    return refactor(update.delta()).update if known else None


def on_weight(update: Update, weight: Tensor, whole: Tensor | None = None, bias: Tensor | None = None) -> LowRank:
    """The change that an update makes of a weight, as a LoRA of its numerical rank.

    Args:
        update: any.
        weight: W_old, (out, in, …).
        whole: the fused weight that these are rows of, where the update acts across its rows.
        bias: of the layer, which PEFT's IA3 changes too.

    Raises:
        ValueError: the whole fused weight is needed.
    """
    made = refactor(update.merged(weight if whole is None else whole).reshape(weight.shape) - weight.float()).update
    if bias is None or not isinstance(update, Ia3):
        return made
    moved = update.merged_bias(bias) - bias.float()
    return replace(made, bias=InMemory(moved)) if bool(moved.any()) else made
