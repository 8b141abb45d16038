"""What an adapter's own file format can hold of a port's result, where updates have changed their kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import OutputError
from regraft.formats import get_format
from regraft.formats._peft_config import as_lora
from regraft.methods.task import HOLD_DIFF
from regraft.report.schema import PortedModule
from regraft.singular import print_of
from regraft.tensors import InMemory
from regraft.updates import Diff, LowRank, SpectralShift, Update

# A file of spectral shifts holds nothing else; LyCORIS' grammar holds all that a shift can turn into.
_INSTEAD = {"svdiff": "lycoris"}


def settled(
    adapter: Adapter, updates: Mapping[ModuleRef, Update], rows: Sequence[PortedModule], new: Base | None
) -> tuple[Adapter, list[PortedModule]]:
    """The adapter with its new updates, in forms that one file of its format holds, and the rows that say so.

    Where a format holds one kind per file (PEFT), the others are turned into the LoRA that they equal, or that their
    change on the new base is. A weight's full-rank change is a ``diff`` where the format has that key.

    Args:
        adapter: as it was read.
        updates: by the new base's modules, as the adapter spells names.
        rows: of the report.
        new: without it, updates that act on the weight itself stay what they are.
    """
    before = {update.kind for update in adapter.updates.values()}
    other = {ref for ref, update in updates.items() if update.kind not in before}
    if not other:
        return replace(adapter, updates=updates), list(rows)
    shifts = as_shifts(adapter, updates, new) if new is not None else None
    if shifts is not None:
        named = {f"{ref}.weight" for ref in shifts.updates}
        return shifts, [_told(row, "as a shift per element" if row.target in named else "", 0.0) for row in rows]
    ready = replace(for_factors(adapter), updates=updates)
    format = ready.format
    if format == "peft" and ready.config is not None and any(isinstance(u, LowRank) for u in updates.values()):
        ready = replace(ready, config=as_lora(ready.config))
    whole = {ref: diff for ref in other if format in HOLD_DIFF and (diff := _dense(ref, updates[ref])) is not None}
    names = {ref: next(iter(whole[ref])) if ref in whole else ref for ref in updates}
    ready = replace(
        ready, updates={names[ref]: whole[ref][names[ref]] if ref in whole else updates[ref] for ref in updates}
    )
    said = {str(ref): ("as a whole change, which is smaller", 0.0) for ref in whole}
    if not _holds(ready, format):
        # Imported here: the verbs on adapters import what a port does.
        from regraft.ops._common import saving_norms
        from regraft.ops.convert import plan_conversion

        plan = plan_conversion(ready, format, new, energy=1.0)
        # What has no other form is left for the writer to refuse.
        ready = ready if plan.lost else plan.adapter
        if not plan.lost and format == "peft" and ready.config is not None:
            made = [ref for ref, u in ready.updates.items() if u.kind == "full" and u is not updates.get(ref)]
            ready = saving_norms(ready, new, made) if new is not None else ready
        for row in () if plan.lost else plan.changes:
            said[row.name] = (row.reason, 1.0 - (row.energy_kept or 1.0))
    return ready, [_told(row, *said.get(row.target or "", ("", 0.0))) for row in rows]


def as_shifts(adapter: Adapter, updates: Mapping[ModuleRef, Update], new: Base) -> Adapter | None:
    """Changes of norms alone, as PEFT's file of spectral shifts holds them: one number per element, W' = W + δ.

    No LoRA is among them, and PEFT begins no adapter of norms alone.
    """
    if (adapter.config or {}).get("peft_type") != "SVDIFF" or adapter.format != "peft":
        return None
    # Imported here: as below.
    from regraft.ops._common import BaseWeights

    weights = BaseWeights(new, replace(adapter, updates=updates))
    made: dict[ModuleRef, Update] = {}
    for ref, update in updates.items():
        found = weights.find(ref)
        if found is None or len(found.shape) != 1 or not isinstance(update, Diff | SpectralShift):
            return None
        weight = found.load()
        dtype = (update.value if isinstance(update, Diff) else update.shift).dtype
        shift, stamp = update.delta(weight).to(dtype), InMemory(print_of(weight.float()))
        made[ModuleRef(ref.component, ref.path.removesuffix(".weight"))] = SpectralShift(
            InMemory(shift), weight_shape=found.shape, stamp=stamp
        )
    return replace(adapter, updates=made, config={**(adapter.config or {}), "norm_shift": "element"})


def for_factors(adapter: Adapter) -> Adapter:
    """The adapter in a format that holds LoRAs: in its own, but for a file of spectral shifts."""
    format = _INSTEAD.get(adapter.format)
    return adapter if format is None else replace(adapter, format=format, layout={})


def _dense(ref: ModuleRef, update: Update) -> dict[ModuleRef, Update] | None:
    """The whole change of a weight, where its factors are no smaller."""
    if not isinstance(update, LowRank) or update.magnitude is not None or update.bias is not None:
        return None
    columns = prod(update.shape[1:])
    if update.rank * (update.shape[0] + columns) < update.shape[0] * columns:
        return None
    value = update.delta().to(update.up.dtype).contiguous()
    return {ModuleRef(ref.component, f"{ref.path}.weight"): Diff(InMemory(value), f"{ref.path}.diff")}


def _holds(adapter: Adapter, format: str) -> bool:
    write = get_format(format).write
    try:
        if write is not None:
            write(replace(adapter, tokens={}, sidecars={}))
    except OutputError:
        return False
    return True


def _told(row: PortedModule, reason: str, loss: float) -> PortedModule:
    if not reason:
        return row
    cut = 1 - (1 - (row.cut_loss or 0.0)) * (1 - loss) if loss > 0 else row.cut_loss
    return row.model_copy(update={"reason": f"{row.reason}; {reason}", "cut_loss": cut})
