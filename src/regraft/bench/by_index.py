"""LoRA-X and SVDiff carried by index, as neither should be: what their transfer by projection is held against."""

from __future__ import annotations

from dataclasses import replace

from regraft.adapter import Adapter, ModuleRef
from regraft.errors import InputError
from regraft.updates import SpectralShift, Subspace, Update


def by_index(adapter: Adapter) -> Adapter:
    """The same numbers for whichever base they are applied to: the i-th on its own i-th singular direction.

    Args:
        adapter: of LoRA-X or SVDiff; without the prints of its base it is one of no base in particular.

    Raises:
        InputError: it is of another kind.
    """
    bare: dict[ModuleRef, Update] = {}
    for ref, update in adapter.updates.items():
        if isinstance(update, Subspace):
            bare[ref] = replace(update, stamp=None, marks=None)
        elif isinstance(update, SpectralShift):
            bare[ref] = replace(update, stamp=None)
        else:
            raise InputError("only LoRA-X and SVDiff have numbers by index", file=adapter.path, key=str(ref))
    return replace(adapter, updates=bare)
