"""Updates that meet on one module of the new base: their sum, cut back to the wanted rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from regraft.adapter import ModuleRef
from regraft.errors import InputError
from regraft.report.schema import PortedModule
from regraft.tensors import InMemory
from regraft.transport import cut
from regraft.updates import Diff, LowRank, Update
from regraft.updates.exact import as_lowrank


def joined(
    landed: Mapping[ModuleRef, Sequence[Update]],
    rows: Sequence[PortedModule],
    rank: int | float | None,
    file: Path | None = None,
) -> tuple[dict[ModuleRef, Update], list[PortedModule]]:
    """One update for each module, and the report's rows with what the joining cut off.

    Args:
        landed: module of the new base → the updates that were carried there; their sum is meant.
        rows: of the report.
        rank: of a sum: a number, a share of ‖ΔW‖² to keep, or None for that of the largest part.
        file: of the adapter, for errors.

    Raises:
        InputError: updates meet that no low rank holds: those don't add up.
    """
    updates: dict[ModuleRef, Update] = {}
    lost: dict[str, float] = {}
    dora: set[str] = set()
    for place, parts in landed.items():
        if len(parts) == 1:
            updates[place] = parts[0]
            continue
        if all(isinstance(part, Diff) and part.shape == parts[0].shape for part in parts):
            updates[place] = _summed([part for part in parts if isinstance(part, Diff)])
            continue
        factored = [as_lowrank(part) for part in parts]
        known = [part for part in factored if part is not None]
        if len(known) < len(parts):
            what = f"several updates meet on {place} of the new base, and can't be added up"
            raise InputError(what, file=file, key=str(place), remedy="--removed drop keeps them apart.")
        # Magnitudes are no sum: one of them goes on, which keeps the file one of DoRA.
        magnitudes = [part.magnitude for part in known if part.magnitude is not None]
        plain = [replace(part, magnitude=None) for part in known]
        summed, lost[str(place)] = total(plain, rank)
        updates[place] = replace(summed, magnitude=magnitudes[0]) if magnitudes else summed
        if magnitudes:
            dora.add(str(place))
    told = [_with_loss(row, lost.get(row.target or "", 0.0)) for row in rows]
    return updates, [_with_magnitude(row) if row.target in dora else row for row in told]


def _summed(parts: Sequence[Diff]) -> Diff:
    value = torch.stack([part.delta() for part in parts]).sum(dim=0)
    return replace(parts[0], value=InMemory(value.to(parts[0].value.dtype)))


def _with_magnitude(row: PortedModule) -> PortedModule:
    return row.model_copy(update={"reason": f"{row.reason}; DoRA magnitudes that meet are not joined: one is kept"})


def _with_loss(row: PortedModule, loss: float) -> PortedModule:
    if loss == 0.0:
        return row
    return row.model_copy(update={"cut_loss": 1 - (1 - (row.cut_loss or 0.0)) * (1 - loss)})


def total(parts: Sequence[LowRank], rank: int | float | None = None) -> tuple[LowRank, float]:
    """Σ ΔW as one LoRA in the first part's dtype and scale, and the share of ‖Σ ΔW‖² that the cut lost.

    Args:
        parts: of one shape, without magnitudes.
        rank: as `joined` has it.
    """
    first = parts[0]
    scale = first.scale or 1.0
    factors = [part.factors() for part in parts]
    up = torch.cat([part.scale / scale * up for part, (up, _) in zip(parts, factors, strict=True)], dim=1)
    down = torch.cat([down for _, down in factors])
    wanted = max(part.rank for part in parts) if rank is None else rank
    short_up, short_down = cut(up, down, wanted) if isinstance(wanted, float) or wanted < up.shape[1] else (up, down)
    whole = float((up.double() @ down.double()).square().sum())
    kept = float((short_up.double() @ short_down.double()).square().sum())
    update = replace(first, scale=scale).with_factors(short_up, short_down)
    biases = [(part.scale / scale) * part.bias.load().float() for part in parts if part.bias is not None]
    if biases:
        bias = torch.stack(biases).sum(dim=0)
        update = replace(update, bias=InMemory(bias.to(first.up.dtype)))
    return update, max(0.0, 1.0 - kept / whole) if whole > 0 else 0.0
