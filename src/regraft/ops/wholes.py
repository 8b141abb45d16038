"""PiSSA's and OLoRA's adapters as plain ones; see `regraft.residual`."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import InputError
from regraft.ops._common import BaseWeights
from regraft.residual import taken_of
from regraft.transport import cut
from regraft.updates import LowRank, Update


def of_whole(adapter: Adapter, base: Base, *, dry_run: bool = False) -> Adapter:
    """The adapter as an update of the base as it was, a LoRA of twice the rank where a part had been taken out of it.

    Args:
        adapter: any; one that left its base as it was is given back.
        base: as it was before the adapter's training.
        dry_run: have factors of the right shapes, and zeros in them.

    Raises:
        InputError: what was taken out of the base does not follow from it, or the base has no such weights.
    """
    taken = taken_of(adapter)
    if taken is None:
        return adapter
    weights = BaseWeights(base, adapter)
    updates: dict[ModuleRef, Update] = {}
    for ref, update in adapter.updates.items():
        if not isinstance(update, LowRank) or update.orientation == "embedding":
            # PEFT begins an embedding as it begins any other LoRA's, and leaves the base's own as it is.
            updates[ref] = update
            continue
        found = weights.find(ref)
        if found is not None and not update.fits(found.shape):
            what = f"the weight is {found.shape} where the adapter was trained on {update.shape}"
            remedy = "Give the base that the adapter was made for."
            raise InputError(what, file=base.path, key=str(ref), remedy=remedy)
        if dry_run and found is not None:
            up, down = (
                torch.zeros(update.shape[0], 2 * update.rank),
                torch.zeros(2 * update.rank, prod(update.shape[1:])),
            )
        else:
            (up, down), (columns, rows) = update.factors(), taken(weights.load(ref).flatten(1), update)
            up, down = torch.cat([up, -columns / update.scale], 1), torch.cat([down, rows])
            # Both halves are large and their difference is small: of factors as they are, rounding to half precision
            # would be a good part of it.
            up, down = cut(up, down, up.shape[1])
        updates[ref] = update.with_factors(up, down)
    return replace(adapter, updates=updates, config={**(adapter.config or {}), "init_lora_weights": True})
