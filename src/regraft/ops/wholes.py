"""PiSSA's and OLoRA's adapters as plain ones; see `regraft.residual`."""

from __future__ import annotations

from dataclasses import replace

import torch

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import InputError
from regraft.ops._common import BaseWeights
from regraft.residual import taken_of
from regraft.tensors import InMemory
from regraft.updates import LowRank, Update


def of_whole(adapter: Adapter, base: Base) -> Adapter:
    """The adapter as an update of the base as it was, a LoRA of twice the rank where a part had been taken out of it.

    Args:
        adapter: any; one that left its base as it was is given back.
        base: as it was before the adapter's training.

    Raises:
        InputError: what was taken out of the base does not follow from it, or the base has no such weights.
    """
    taken = taken_of(adapter)
    if taken is None:
        return adapter
    weights = BaseWeights(base, adapter)
    updates: dict[ModuleRef, Update] = {}
    for ref, update in adapter.updates.items():
        if not isinstance(update, LowRank):
            updates[ref] = update
            continue
        weight = weights.load(ref)
        if not update.fits(tuple(weight.shape)):
            what = f"the weight is {tuple(weight.shape)} where the adapter was trained on {update.shape}"
            remedy = "Give the base that the adapter was made for."
            raise InputError(what, file=base.path, key=str(ref), remedy=remedy)
        # The difference of two large products: in half precision, rounding would be a good part of it.
        exact = replace(update, up=InMemory(update.up.load().float()), down=InMemory(update.down.load().float()))
        (up, down), (columns, rows) = exact.factors(), taken(weight.flatten(1), update)
        updates[ref] = exact.with_factors(torch.cat([up, -columns / update.scale], 1), torch.cat([down, rows]))
    return replace(adapter, updates=updates, config={**(adapter.config or {}), "init_lora_weights": True})
